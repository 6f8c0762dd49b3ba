"""Indexers trained group by group: cut off and resumed, read layer by layer, in 8 bits, with little memory."""

import dataclasses

import jax
import numpy as np
import pytest

import checkpoints_convert
from experiments.common import indexer_runs
from experiments.common.report import Output
from indexcache_jax import indexer_training
from indexcache_jax.indexer_training import Run
from indexcache_jax.layers import Resident
from indexcache_jax.params import FP8_BASE
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

LENGTH = 24
BASE = Case(GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2}, "FFF", 0, (LENGTH,) * 3)
TARGET = Schedule("FSF")
STAGE = Stage("indexers", "warmup", 3, 1, LENGTH, 0.0, 3e-3, compute_dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    checkpoints_convert.save(folder, BASE.params, BASE.config, BASE.schedule)
    return folder


def run(layers=None, schedule=TARGET, **changes):
    return Run(layers or Resident(BASE.config, BASE.schedule, BASE.params), schedule, BASE.tokens, STAGE, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return indexer_runs.train(run(), Output.create(str(tmp_path_factory.mktemp("whole"))), resume=False)


def assert_same(found, expected, layers=(0, 2)):
    assert [group.layer for group in found] == [group.layer for group in expected] == list(layers)
    for a, b in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.indexer, b.indexer)
        assert a.divergence == b.divergence


def cut_off(given, output, monkeypatch):
    """A run that ends when its first group is trained."""
    train = indexer_training.train

    def until_the_second_group(*arguments):
        groups = train(*arguments)
        yield next(groups)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexer_training, "train", until_the_second_group)
        with pytest.raises(KeyboardInterrupt):
            indexer_runs.train(given, output, resume=False)


def test_a_run_that_was_cut_off_ends_as_the_whole_one_does(whole, tmp_path, monkeypatch):
    output = Output.create(str(tmp_path))
    cut_off(run(), output, monkeypatch)
    path = tmp_path / indexer_runs.FOLDER / "layer-0.npz"
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="holds an earlier run; --resume"):
        indexer_runs.train(run(), output, resume=False)
    with pytest.raises(ValueError, match="another seed: 0 there, 1 here"):
        indexer_runs.train(run(seed=1), output, resume=True)
    (path.parent / "layer-2.npz.partial").write_bytes(kept[:100])  # a kill cuts a file short
    assert_same(indexer_runs.train(run(), output, resume=True), whole)
    assert path.read_bytes() == kept
    assert_same(indexer_runs.train(run(), output, resume=True), whole)  # from the files alone


def test_a_run_of_several_spans_that_was_cut_off_ends_streamed_as_the_whole_one_does(checkpoint, tmp_path, monkeypatch):
    given = run(schedule=BASE.schedule, spans=2)
    outputs = [Output.create(str(tmp_path / name)) for name in ("whole", "cut off")]
    whole = indexer_runs.train(given, outputs[0], resume=False)
    cut_off(given, outputs[1], monkeypatch)
    with pytest.raises(ValueError, match="another spans: 2 there, 3 here"):
        indexer_runs.train(dataclasses.replace(given, spans=3), outputs[1], resume=True)
    streamed = dataclasses.replace(given, layers=checkpoints_convert.Layers(checkpoint))
    assert_same(indexer_runs.train(streamed, outputs[1], resume=True), whole, (0, 1, 2))


@pytest.mark.parametrize("wrong", ["no archive", "cut short", "another shape"])
def test_a_group_whose_file_is_not_what_was_written_is_named(wrong, tmp_path, monkeypatch):
    output = Output.create(str(tmp_path))
    cut_off(run(), output, monkeypatch)
    path = tmp_path / indexer_runs.FOLDER / "layer-0.npz"
    with np.load(path) as arrays:
        fields = dict(arrays)
    if wrong == "another shape":
        np.savez(path, **fields | {"keys": np.zeros((2, 2), np.float32)})
    else:
        path.write_bytes(b"nothing" if wrong == "no archive" else path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer-0\.npz.*; remove it"):
        indexer_runs.train(run(), output, resume=True)


def test_weights_that_are_read_layer_by_layer_give_the_same_indexers_bit_for_bit(checkpoint, whole, tmp_path):
    layers = checkpoints_convert.Layers(checkpoint)
    assert_same(indexer_runs.train(run(layers), Output.create(str(tmp_path)), resume=False), whole)


def test_a_base_in_8_bits_trains_as_its_decoded_weights_do(checkpoint, tmp_path):
    checkpoints_convert.convert(checkpoint, tmp_path / "fp8", format="safetensors", weights="fp8")
    decoded = Resident(*checkpoints_convert.load(tmp_path / "fp8", dtype="float32", weights=None))
    layers = checkpoints_convert.Layers(tmp_path / "fp8", dtype="float32", weights=FP8_BASE)
    assert layers.weights == FP8_BASE and decoded.weights is None
    found, expected = ({g.layer: g for g in indexer_training.train(run(given))} for given in (layers, decoded))
    for layer in TARGET.full_layers:
        np.testing.assert_allclose(found[layer].divergence, expected[layer].divergence, rtol=1e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found[layer].indexer, expected[layer].indexer)


def test_what_has_no_room_in_memory_is_computed_again_or_lies_on_disk(whole, tmp_path):
    need = indexer_training.need(run())
    roomy, said = indexer_runs.within(run(), need.states + need.targets, tmp_path)
    assert roomy.keeps_targets and "in memory" in said and roomy.allocate is np.empty
    tight, said = indexer_runs.within(run(), need.states, tmp_path)
    assert not tight.keeps_targets and "in memory, targets computed at every step" in said
    least, said = indexer_runs.within(run(), 0, tmp_path)
    assert not least.keeps_targets and str(tmp_path) in said
    again, on_disk = (list(indexer_training.train(given)) for given in (tight, least))
    for a, b, c in zip(again, on_disk, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.indexer, b.indexer)
        np.testing.assert_allclose(a.divergence, c.divergence, rtol=1e-4)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("memory", [0, 1e15])
def test_a_run_that_goes_on_keeps_its_targets_or_not_as_it_began(tmp_path, memory):
    """How much memory is free, which decides by default, is another matter at every start."""
    began = indexer_runs.within(run(), 1e15 - memory, tmp_path)[0]
    expected = indexer_runs.train(began, Output.create(str(tmp_path)), resume=False)
    resumed, said = indexer_runs.within(run(), memory, tmp_path)
    assert resumed.keeps_targets == began.keeps_targets == (memory == 0)
    assert ("in memory" in said) == (memory > 0)
    assert_same(indexer_runs.train(resumed, Output.create(str(tmp_path)), resume=True), expected)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    given, _ = indexer_runs.within(run(), 0, tmp_path)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=f"{tmp_path}/.*no space left on the disk; it takes [0-9,]+ bytes"):
        list(indexer_training.train(given))


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path):
    indexer_runs.check_free(tmp_path, resume=False)
    with pytest.raises(ValueError, match=f"--output_dir={tmp_path}/elsewhere: process 0 does not see it"):
        indexer_runs.check_free(tmp_path / "elsewhere", resume=False)


def test_targets_of_a_row_that_no_device_holds_are_not_kept(tmp_path):
    long = dataclasses.replace(STAGE, context=65536)
    given = dataclasses.replace(run(), stage=long, tokens=np.zeros((1, 65536), np.int32))
    assert not indexer_runs.within(given, 1e15, tmp_path)[0].keeps_targets
