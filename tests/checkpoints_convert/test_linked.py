"""Checkpoints with new indexers beside links to everything else, or copies of it: what they hold and who reads what."""

import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_convert import convert, load, save, save_indexers
from checkpoints_convert.ending import DiskFull
from checkpoints_convert.safetensors_io import INDEX, read_directory
from indexcache_jax.params import Params, with_schedule
from indexcache_jax.schedule import Schedule
from tests.checkpoints_convert import files
from tests.support.eight_bits import RAGGED
from tests.support.full_disk import no_file_above
from tests.support.tiny_models import CASES, GLM_FIELDS, Case

BASE = CASES["glm-all-full"]
SCHEDULE = Schedule("FFSFS")
CONFIG = BASE.config


def with_new_indexers(params: Params, before: Schedule, schedule: Schedule) -> Params:
    params = with_schedule(params, before, schedule)
    return dataclasses.replace(params, indexer=jax.tree.map(lambda a: 1.25 * a + 0.01, params.indexer))


PARAMS = with_new_indexers(BASE.params, BASE.schedule, SCHEDULE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The base in many files, most of which hold indexers and something else."""
    directory = tmp_path_factory.mktemp("base") / "source"
    save(directory, BASE.params, CONFIG, BASE.schedule, max_shard_size="60KB")
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return directory


@pytest.fixture(scope="module", params=[True, False], ids=["linked", "copied"])
def written(request, source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "new"
    save_indexers(directory, PARAMS, CONFIG, SCHEDULE, source, link=request.param)
    return directory


def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def read_whole_files(paths):
    """What a loader has that reads every tensor of every file, one file after the other."""
    return {name: tensor for path in paths for name, tensor in safetensors.numpy.load_file(path).items()}


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_loads_as_the_base_with_the_new_indexers_and_the_schedule(written):
    config, schedule, params = load(written)
    assert config == CONFIG and schedule == SCHEDULE
    assert_equal(params, PARAMS)
    fields = json.loads((written / "config.json").read_text())
    assert fields["indexer_types"] == ["full", "full", "shared", "full", "shared"]
    assert (written / "tokenizer.json").exists()


def test_the_index_lists_new_indexers_in_the_last_file_and_none_of_shared_layers(written, source):
    listed, last = weight_map(written), shards(written)[-1].name
    new = {name for name, shard in listed.items() if shard == last}
    assert new == {name for name in weight_map(source) if ".indexer." in name and int(name.split(".")[2]) in (0, 1, 3)}
    assert set(weight_map(source)) - set(listed) == {
        name for name in weight_map(source) if ".indexer." in name and int(name.split(".")[2]) in (2, 4)
    }
    assert [path.name for path in shards(written)] == sorted(set(listed.values()))
    total = sum(entry.nbytes for entry in read_directory(written).values())
    assert json.loads((written / INDEX).read_text())["metadata"]["total_size"] == total


def needed_files(source):
    """Those of the source's files that hold something besides indexers, and of these the ones that hold indexers too."""
    names = {path: list(safetensors.numpy.load_file(path)) for path in shards(source)}
    needed = [path for path, held in names.items() if not all(".indexer." in name for name in held)]
    return needed, [path for path in needed if any(".indexer." in name for name in names[path])]


def test_linked_costs_the_new_indexers_and_links_lead_into_the_source_only(source, tmp_path):
    notes = save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, source)
    *links, new = shards(tmp_path / "new")
    needed, mixed = needed_files(source)
    assert [link.readlink() for link in links] == needed and 0 < len(mixed) < len(needed) < len(shards(source))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS.indexer))
    assert not new.is_symlink() and size < new.stat().st_size < size + 5000
    assert len(notes) == 1 and f"of {len(needed)} linked files still hold old indexers" in notes[0]


def test_what_was_said_of_linked_files_is_not_said_at_every_load(source, tmp_path):
    save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, source)
    with warnings.catch_warnings(action="error"):
        load(tmp_path / "new")
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    index["metadata"]["unlisted_tensors"] += 1  # another file than the one that was written
    (tmp_path / "new" / INDEX).write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="does not list there"):
        load(tmp_path / "new")


def test_copies_hold_no_tensor_twice_and_files_without_indexers_as_they_were(source, tmp_path):
    assert save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, source, link=False) == []
    names = [name for path in shards(tmp_path / "new") for name in safetensors.numpy.load_file(path)]
    assert sorted(names) == sorted(weight_map(tmp_path / "new"))
    needed, mixed = needed_files(source)
    for path, old in zip(shards(tmp_path / "new")[:-1], needed, strict=True):
        assert not path.is_symlink()
        assert (path.read_bytes() == old.read_bytes()) == (old not in mixed)


def test_who_reads_whole_files_has_new_indexers_of_linked_files_only_in_the_order_of_names(written):
    paths, new = shards(written), safetensors.numpy.load_file(shards(written)[-1])
    in_order, backwards = read_whole_files(paths), read_whole_files(paths[::-1])
    for name, tensor in new.items():
        np.testing.assert_array_equal(in_order[name], tensor)
    still_there = {name for path in paths[:-1] for name in safetensors.numpy.load_file(path)} & set(new)
    assert bool(still_there) == paths[0].is_symlink()
    assert {name for name, tensor in new.items() if not np.array_equal(backwards[name], tensor)} == still_there


def test_a_single_file_is_linked_under_another_name(tmp_path):
    """A model.safetensors would be all that many loaders read."""
    save(tmp_path / "source", BASE.params, CONFIG, BASE.schedule)
    save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, tmp_path / "source")
    assert [path.name for path in shards(tmp_path / "new")] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert_equal(load(tmp_path / "new")[2], PARAMS)


def test_only_indexers_are_asked_for(source, tmp_path):
    nothing = jax.tree.map(lambda _: None, PARAMS)
    save_indexers(tmp_path / "new", dataclasses.replace(nothing, indexer=PARAMS.indexer), CONFIG, SCHEDULE, source)
    assert_equal(load(tmp_path / "new")[2], PARAMS)


def test_a_linked_checkpoint_is_a_source_too(source, tmp_path):
    save_indexers(tmp_path / "first", PARAMS, CONFIG, SCHEDULE, source)
    fewer = Schedule("FSSFS")
    again = with_new_indexers(PARAMS, SCHEDULE, fewer)
    for link in (True, False):
        save_indexers(tmp_path / f"{link}", again, CONFIG, fewer, tmp_path / "first", link=link)
        assert_equal(load(tmp_path / f"{link}")[2], again)
    assert {link.readlink().parent for link in shards(tmp_path / "True")[:-1]} == {tmp_path / "first"}
    in_order = read_whole_files(shards(tmp_path / "True"))
    assert_equal(in_order["model.layers.3.self_attn.indexer.k_norm.weight"], again.indexer.key_norm[1])


def test_a_snapshot_of_links_is_linked_to_not_what_it_links_to(source, tmp_path):
    """The cache of huggingface_hub is made of links into a folder of blobs."""
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        (tmp_path / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, snapshot)
    assert {link.readlink().parent for link in shards(tmp_path / "new")[:-1]} == {snapshot}
    assert_equal(load(tmp_path / "new")[2], PARAMS)


def test_the_rest_of_config_json_stays(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    fields = json.loads((source / "config.json").read_text()) | {"index_topk_freq": 4, "of_some_engine": [1]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, tmp_path / "source")
    found = json.loads((tmp_path / "new" / "config.json").read_text())
    fields.pop("index_topk_freq")
    assert found == fields | SCHEDULE.to_hf()


# FP8


@pytest.mark.parametrize("link, scale_fmt", [(True, "float"), (False, "ue8m0")])
def test_indexers_of_an_fp8_checkpoint_are_fp8_as_they_were_and_the_rest_keeps_its_bytes(tmp_path, link, scale_fmt):
    base, schedule = dataclasses.replace(RAGGED, pattern="FFF"), RAGGED.schedule
    stored, _ = files.quantised(base)
    quantisation = {"quant_method": "fp8", "scale_fmt": scale_fmt, "weight_block_size": [128, 128]}
    source = files.write_checkpoint(
        tmp_path / "source", files.config_fields(base, quantization_config=quantisation), stored, shards=3
    )
    params = with_new_indexers(load(source, dtype="float32")[2], base.schedule, schedule)
    save_indexers(tmp_path / "new", params, RAGGED.config, schedule, source, link=link)
    before, after = read_directory(source), read_directory(tmp_path / "new")
    replaced = {name for name in after if after[name].file == shards(tmp_path / "new")[-1]}
    assert "model.layers.2.self_attn.indexer.wq_b.weight_scale_inv" in replaced
    assert all(".indexer." in name for name in replaced)
    for name in after.keys() - replaced:
        assert after[name].read(0, after[name].nbytes).tobytes() == before[name].read(0, before[name].nbytes).tobytes()
    for name in replaced:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
    name = "model.layers.2.self_attn.indexer.wq_b.weight"
    values = 1.25 * files.dequantise(stored[name], stored[f"{name}_scale_inv"]) + np.float32(0.01)
    codes, scales = files.quantise(values)
    new_codes, new_scales = after[name].rows(0, len(codes)), after[f"{name}_scale_inv"].rows(0, len(scales))
    if scale_fmt == "ue8m0":  # DeepSeek-V3.2: engines may keep the exponents of scales alone
        assert set(np.frexp(new_scales)[0].flat) == {0.5} and np.all(scales <= new_scales) and np.all(new_scales < 2 * scales)
        np.testing.assert_allclose(files.dequantise(new_codes, new_scales), values, rtol=1 / 16, atol=2**-9 * new_scales.max())
    else:
        np.testing.assert_array_equal(new_codes.view(np.uint8), codes.view(np.uint8))
        np.testing.assert_allclose(new_scales, scales, rtol=1e-6)
    fields = json.loads((tmp_path / "new" / "config.json").read_text())
    assert fields["quantization_config"] == quantisation
    assert load(tmp_path / "new", weights="stored")[1] == schedule


# What is refused leaves nothing behind.


def refused(tmp_path, source, match, params=PARAMS, config=CONFIG, schedule=SCHEDULE, error=ValueError):
    with pytest.raises(error, match=match):
        save_indexers(tmp_path / "new", params, config, schedule, source)
    assert not (tmp_path / "new").exists()


def test_a_source_of_another_format_or_model_is_refused(source, tmp_path):
    convert(source, tmp_path / "orbax")
    refused(tmp_path, tmp_path / "orbax", "is an orbax checkpoint")
    refused(tmp_path, tmp_path / "nowhere", "nowhere: no such directory")
    refused(tmp_path, source, "describes another model", config=dataclasses.replace(CONFIG, index_topk=3))


def test_a_source_without_an_indexer_is_refused(tmp_path):
    shared = with_schedule(BASE.params, BASE.schedule, Schedule("FSSFS"))
    save(tmp_path / "source", shared, CONFIG, Schedule("FSSFS"))
    refused(tmp_path, tmp_path / "source", r"layers\.1\.self_attn\.indexer.* is missing, which the schedule needs")


def test_indexers_of_another_schedule_are_refused(source, tmp_path):
    refused(tmp_path, source, r"indexer\.queries has shape \[3, ", schedule=Schedule("FFFFS"))
    without = dataclasses.replace(PARAMS, indexer=dataclasses.replace(PARAMS.indexer, keys=None))
    refused(tmp_path, source, r"indexer\.keys is missing", params=without)


def test_scales_that_are_no_float32_are_not_written_yet(tmp_path):
    stored, _ = files.quantised(RAGGED, files.SCALES["F8_E8M0"])
    source = files.write_checkpoint(
        tmp_path / "source", files.config_fields(RAGGED, quantization_config={"quant_method": "fp8"}), stored
    )
    params = load(source, dtype="float32")[2]
    refused(tmp_path, source, "F8_E8M0", params, RAGGED.config, RAGGED.schedule, NotImplementedError)


@pytest.mark.parametrize("link", [True, False])
def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(source, tmp_path, link):
    with (
        no_file_above(4000),
        pytest.raises(DiskFull, match=r"new\.\w+\.partial/model-\d+.*safetensors: .*it takes [\d,]+ bytes"),
    ):
        save_indexers(tmp_path / "new", PARAMS, CONFIG, SCHEDULE, source, link=link)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_written_into(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        save_indexers(tmp_path, PARAMS, CONFIG, SCHEDULE, source)


# transformers


def test_transformers_computes_the_same_from_links_and_copies(source, tmp_path):
    """It reads whole files, in the order of their names, and has no use for what layers that became S had."""
    pytest.importorskip("torch", reason="the oracle needs torch; it is tested where the test extra installs it")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    from tests.support import oracle

    case = Case(GLM_FIELDS, SCHEDULE.pattern, BASE.seed)
    save(tmp_path / "saved", PARAMS, CONFIG, SCHEDULE)
    expected = oracle.record(oracle.load(tmp_path / "saved"), case)[0]
    save_indexers(tmp_path / "copied", PARAMS, CONFIG, SCHEDULE, source, link=False)
    np.testing.assert_array_equal(oracle.record(oracle.load(tmp_path / "copied"), case)[0], expected)
    save_indexers(tmp_path / "linked", PARAMS, CONFIG, SCHEDULE, source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "linked", attn_implementation="eager", output_loading_info=True
    )
    assert all(".indexer." in name and int(name.split(".")[2]) in (2, 4) for name in info.pop("unexpected_keys"))
    assert not any(info.values())
    np.testing.assert_array_equal(oracle.record(model.eval(), case)[0], expected)
    assert not np.array_equal(oracle.record(oracle.build(case), case)[0], expected)  # as they were before
