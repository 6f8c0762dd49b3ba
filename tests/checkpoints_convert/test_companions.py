"""The tokens that end a text, and the files that go along with weights."""

import json

import pytest

from checkpoints_convert import convert, load, save
from checkpoints_convert.companions import find_companions, with_stop_tokens
from experiments.common import inputs
from tests.checkpoints_convert import files
from tests.checkpoints_convert.test_tokenizer_files import save_tokenizer, token
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"


@pytest.fixture
def directory(tmp_path):
    return files.write_checkpoint(tmp_path / "model", files.config_fields(MIXED), MIXED.state)


def write(directory, file, **fields):
    path = directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


# Stop tokens.


@pytest.mark.parametrize("file", [GENERATION, TOKENIZER])
def test_a_link_to_a_file_that_is_not_there_is_not_no_file(directory, file):
    (directory / file).symlink_to("../blobs/0")
    with pytest.raises(ValueError, match=rf"{file}: no such file, but a link to one"):
        load(directory)


def test_a_number_of_thousands_of_digits_is_no_tokens(directory):
    write(directory, TOKENIZER, eos_token="</s>", added_tokens_decoder={"9" * 5000: token("</s>")})
    assert load(directory)[0].eos_token_ids == ()


@pytest.mark.parametrize(
    ("by_file", "expected"),
    [
        ({}, ()),
        ({CONFIG: {"eos_token_id": 3}}, (3,)),
        ({GENERATION: {"eos_token_id": 4}}, (4,)),
        ({GENERATION: {"eos_token_id": [4, 5]}}, (4, 5)),
        ({CONFIG: {"eos_token_id": [5, 3]}, GENERATION: {"eos_token_id": [4, 3]}}, (5, 3, 4)),
        ({CONFIG: {"eos_token_id": 3}, GENERATION: {"temperature": 1.0}}, (3,)),
        ({TOKENIZER: {"eos_token_id": [6]}}, (6,)),
        ({TOKENIZER: {"eos_token": "</s>", "added_tokens_decoder": {"7": token("</s>")}}}, (7,)),
        ({TOKENIZER: {"eos_token": token("</s>")}, "added_tokens.json": {"</s>": 8}}, (8,)),
        ({TOKENIZER: {"eos_token": "</s>"}, "tokenizer.json": ...}, (259,)),
        ({TOKENIZER: {"eos_token": "the"}, "tokenizer.json": ...}, (257,)),  # of the vocabulary itself
        ({TOKENIZER: {"eos_token": "<none>"}, "tokenizer.json": ...}, ()),
        ({CONFIG: {"eos_token_id": 1}, GENERATION: {"eos_token_id": 2}, TOKENIZER: {"eos_token_id": 3}}, (1, 2, 3)),
    ],
)
def test_every_file_may_name_tokens_that_end_a_text(directory, by_file, expected):
    for file, fields in by_file.items():
        if fields is ...:
            save_tokenizer(directory)
        else:
            write(directory, file, **fields)
    assert load(directory)[0].eos_token_ids == expected
    assert inputs.described(str(directory))[0].eos_token_ids == expected


def test_transformers_stops_at_no_other_token(directory):
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    save_tokenizer(directory)
    write(directory, GENERATION, eos_token_id=[4, 5])
    write(directory, TOKENIZER, eos_token="</s>")
    theirs = transformers.GenerationConfig.from_pretrained(directory).eos_token_id
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert load(directory)[0].eos_token_ids == (*theirs, tokenizer.eos_token_id)


def test_an_unigram_vocabulary_numbers_its_tokens_by_their_order(directory):
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["</s>", -1.5]]}}))
    write(directory, TOKENIZER, eos_token="</s>")
    assert with_stop_tokens(MIXED.config, directory).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (GENERATION, {"eos_token_id": "</s>"}, r"generation_config\.json: eos_token_id: '</s>' is not an integer"),
        (GENERATION, {"eos_token_id": [True]}, r"generation_config\.json: eos_token_id: \[True\]"),
        (TOKENIZER, {"eos_token": 5}, r"tokenizer_config\.json: eos_token: 5 is not a token's text"),
    ],
)
def test_what_is_no_token_is_named_with_its_file(directory, file, fields, message):
    write(directory, file, **fields)
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_stop_tokens_go_along_and_stand_where_they_stood(directory, tmp_path, format):
    write(directory, CONFIG, eos_token_id=3)
    write(directory, GENERATION, eos_token_id=[4, 5])
    convert(directory, tmp_path / "out", format=format)
    assert load(tmp_path / "out")[0].eos_token_ids == (3, 4, 5)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["eos_token_id"] == 3


# Files that go along.


def test_a_link_out_of_the_directory_is_not_copied(directory, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (directory / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json: is a link out of .*model, to .*secret; copy that file here"):
        convert(directory, tmp_path / "out", format="safetensors")
    with pytest.raises(ValueError, match="is a link out of"):
        save(tmp_path / "out", MIXED.params, MIXED.config, MIXED.schedule, companions_of=directory)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_a_cache_links_to_its_own_blobs(tmp_path):
    """As huggingface_hub lays it out; the blobs of another model are not its own."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "models--a--c" / "blobs"):
        folder.mkdir(parents=True)
    (blobs / "77").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/77")
    assert find_companions(snapshot) == [snapshot / "tokenizer.json"]
    (tmp_path / "models--a--c" / "blobs" / "88").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../../models--a--c/blobs/88")
    with pytest.raises(ValueError, match=r"vocab\.json: is a link out of"):
        find_companions(snapshot)


def test_a_companion_that_is_no_file_is_named(directory):
    (directory / "vocab.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"vocab\.json: is a link to a file that is not there"):
        find_companions(directory)
    (directory / "vocab.json").unlink()
    (directory / "merges.txt").mkdir()
    with pytest.raises(ValueError, match=r"merges\.txt: not a regular file"):
        find_companions(directory)
