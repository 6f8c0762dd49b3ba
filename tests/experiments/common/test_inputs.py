"""What experiments read: shares and schedules, the context, and the two sides of a text."""

import math

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.common import inputs, options, text
from indexcache_jax import host_memory
from indexcache_jax.config import Config
from indexcache_jax.serving import CacheFormat

CONFIG = Config.from_hf(options.DEMO)


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.mark.parametrize(
    ("layers", "retention", "expected"), [(12, "1/2", 6), (12, "1/8", 2), (47, "1/4", 12), (47, "0.5", 24), (5, "1", 5)]
)
def test_retention_rounds_up(layers, retention, expected):
    assert inputs.kept(layers, inputs.share("retention", retention)) == expected
    with flagsaver.flagsaver(retention=retention):
        assert inputs.kept_at_retention(layers) == expected


@pytest.mark.parametrize("value", ["0", "2", "-1/4", "1/0", "a"])
def test_a_share_that_is_none_is_named(value):
    with pytest.raises(ValueError, match=f"--retention={value}"):
        inputs.share("retention", value)


@pytest.mark.parametrize("entry, pattern", [("all F", "FFFF"), ("1/4", "FSSS"), ("1/3", "FSFS"), ("FFSS", "FFSS")])
def test_a_schedule_is_a_pattern_a_share_or_all_f(entry, pattern):
    assert inputs.schedule(entry, 4).pattern == pattern


@pytest.mark.parametrize("entry", ["FS", "SFFF", "DSA", "5/4", "all"])
def test_a_schedule_that_is_none_is_named(entry):
    with pytest.raises(ValueError, match=f"--schedule={entry}"):
        inputs.schedule(entry, 4)


def test_only_one_schedule_where_one_is_asked_for():
    assert inputs.only_schedule() is None
    with flagsaver.flagsaver(schedule=["FS"]):
        assert inputs.only_schedule() == "FS"
    with flagsaver.flagsaver(schedule=["FS", "FF"]), pytest.raises(ValueError, match="--schedule=FS,FF: "):
        inputs.only_schedule()


@pytest.mark.parametrize("context", [128, 4097])
def test_a_context_that_is_too_short_or_too_long_is_named(context):
    message = f"--context={context}: must be above index_topk = 128.*at most 4096"
    with flagsaver.flagsaver(context=context), pytest.raises(ValueError, match=message):
        inputs.reader(str(options.DEMO), CONFIG)


def test_a_reader_ends_documents_as_its_model_does():
    with flagsaver.flagsaver(context=129):
        reader = inputs.reader(str(options.DEMO), CONFIG)
    assert (reader.encoder.name, reader.separator, reader.context, reader.vocab_size) == ("bytes", 256, 129, 258)


def test_cuts_are_drawn_by_the_seed_and_a_text_too_short_is_named(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(bytes(range(97, 107)) * 3)
    documents, reader = text.documents(f"{tmp_path}/*.txt"), inputs.Reader(text.Bytes(), 1, 10, 258)
    cuts = reader.draw(documents, "text", 3, 0)
    assert cuts.shape == (3, 11) and np.array_equal(cuts, reader.draw(documents, "text", 3, 0))
    with pytest.raises(ValueError, match="--text: .*give more text, or less --context or fewer sequences"):
        reader.draw(documents, "text", 13, 0)
    with pytest.raises(ValueError, match="--text: token 106 of the bytes tokenizer, but vocab_size is 100"):
        inputs.Reader(text.Bytes(), 1, 10, 100).draw(documents, "text", 3, 0)


def test_files_too_small_for_what_is_asked_for_are_named_before_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' * 2)
    documents, reader = text.documents(f"{tmp_path}/*"), inputs.Reader(text.Bytes(), 1, 10, 258)
    assert [document.nbytes for document in documents] == [100, 14, 14]
    reader.check_size(documents, "text", 52)  # as many as there could be, with 4 tokens a byte and beside each document
    monkeypatch.setattr(text.Document, "content", None)
    message = "--text: 128 bytes of text do not hold the 1000000 sequences of 10 tokens that are asked for; give more text"
    with pytest.raises(ValueError, match=message):
        reader.draw(documents, "text", 1_000_000, 0)


def test_a_file_that_is_held_out_is_not_searched_on(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("word")
    sides = inputs.split(f"{tmp_path}/*.txt", f"{tmp_path}/3.txt")
    assert [d.name for d in sides.train] == ["0.txt", "1.txt", "2.txt"] and [d.name for d in sides.held_out] == ["3.txt"]
    with pytest.raises(ValueError, match=r"--text=.*1.txt: --held_out=.*\*.txt names all of its files"):
        inputs.split(f"{tmp_path}/1.txt", f"{tmp_path}/*.txt")


def test_without_held_out_files_their_names_decide(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("word")
    sides = inputs.split(f"{tmp_path}/*.txt", "")
    assert {d.held_out for d in sides.train} == {False} and {d.held_out for d in sides.held_out} == {True}
    assert len(sides.train) + len(sides.held_out) == 40
    with pytest.raises(ValueError, match=r"1 file\(s\) are too few to keep some apart; name others with --held_out"):
        inputs.split(f"{tmp_path}/1.txt", "")
    with pytest.raises(ValueError, match=r"--other_text=.*too few to keep some apart$"):
        inputs.split(f"{tmp_path}/1.txt", None, "other_text")


def test_batches_divide_the_sequences():
    with flagsaver.flagsaver(batch_size=2):
        assert [batch.shape for batch in inputs.batches(np.zeros((4, 9)))] == [(2, 9), (2, 9)]
        with pytest.raises(ValueError, match="--batch_size=2: does not divide 3 sequences"):
            inputs.batches(np.zeros((3, 9)))


def test_sizes_that_cannot_be_are_named():
    options.check_positive("batch_size", "chunk")  # whose default is None
    with flagsaver.flagsaver(sequences=0), pytest.raises(ValueError, match="--sequences=0: must be at least 1"):
        options.check_positive("batch_size", "sequences")
    with flagsaver.flagsaver(stream_memory=math.inf), pytest.raises(ValueError, match="--stream_memory=inf: no host"):
        options.stream_memory()
    with flagsaver.flagsaver(chunk=2**31), pytest.raises(ValueError, match="--chunk=2147483648: must be at most 2147483647"):
        options.check_positive("chunk")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zai-org/GLM-5", "no such directory; .* hf download zai-org/GLM-5 --local-dir DIR"),
        ("/nowhere/GLM-5", "no such directory$"),
        (__file__, "is a file; name the directory"),
    ],
)
def test_a_checkpoint_that_is_no_directory_is_named(given, message):
    with flagsaver.flagsaver(checkpoint=given), pytest.raises(ValueError, match=f"--checkpoint={given}: {message}"):
        inputs.checkpoint()


def test_a_cache_is_kept_in_what_the_flags_say():
    assert inputs.cache_format("float32", "bfloat16") == CacheFormat("float32", "bfloat16")
    with flagsaver.flagsaver(latent_cache="fp8", index_cache="bf16"):
        assert inputs.cache_format("float32", "float32") == CacheFormat("float8_e4m3fn", "bfloat16")


def test_hidden_states_take_at_most_half_of_what_the_host_has_left_unless_it_is_said_how_much(monkeypatch):
    for left, size in ((10**12, 64 * 10**9), (20 * 10**9, 10 * 10**9)):
        monkeypatch.setattr(host_memory, "available", lambda left=left: left)
        assert options.stream_memory() == size
    flags.FLAGS(["test", "--stream_memory=64"])
    assert options.stream_memory() == 64 * 10**9
    flags.FLAGS["stream_memory"].unparse()


def test_stored_bytes_are_those_of_the_files():
    (file,) = options.DEMO.glob("*.safetensors")
    assert 0.99 < inputs.stored_bytes(str(options.DEMO)) / file.stat().st_size < 1.01
