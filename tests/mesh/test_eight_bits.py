"""Matrices in 8 bits on a mesh of eight devices: codes and scales lie together, and results are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import load
from checkpoints_convert.safetensors_io import Entry, read_directory
from indexcache_jax import forward, serving, training
from indexcache_jax.sharding import TRAINING
from indexcache_jax.tensors import leaves
from tests.checkpoints_convert import files
from tests.support import meshes
from tests.support.eight_bits import ALIGNED

CONFIG, SCHEDULE = ALIGNED.config, ALIGNED.schedule


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    stored, _ = files.quantised(ALIGNED)
    return files.write_checkpoint(tmp_path_factory.mktemp("stored"), files.config_fields(ALIGNED), stored)


@pytest.mark.parametrize("form", ["params", "serving"])
def test_every_code_is_read_once_and_lies_where_the_rules_say(checkpoint, form, monkeypatch):
    read_into, read = Entry.read_into, []

    def counted(entry, runs):
        runs = list(runs)
        read.extend(out.nbytes for _, out in runs if entry.dtype == "F8_E4M3")
        read_into(entry, runs)

    whole = load(checkpoint, dtype="float32", form=form, weights="fp8")[2]
    monkeypatch.setattr(Entry, "read_into", counted)
    with meshes.use("all"):
        found = load(checkpoint, dtype="float32", form=form, weights="fp8")[2]
    assert sum(read) == sum(entry.nbytes for entry in read_directory(checkpoint).values() if entry.dtype == "F8_E4M3")
    for (path, array), expected in zip(leaves(found), jax.tree.leaves(whole), strict=True):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=path)
    matrix = found.attention.out if form == "params" else found.layers[0].out
    assert matrix.codes.sharding.shard_shape(matrix.codes.shape)[-1] == matrix.codes.shape[-1] // 2
    assert matrix.scales.sharding.shard_shape(matrix.scales.shape)[-1] == matrix.scales.shape[-1] // 2


@pytest.mark.parametrize("mesh", ["tensor", "all"])
def test_results_are_those_of_one_device(checkpoint, mesh):
    def run(tokens):
        params = load(checkpoint, dtype="float32", weights="fp8")[2]
        weights = load(checkpoint, dtype="float32", form="serving", weights="fp8")[2]
        cache = serving.init_cache(CONFIG, SCHEDULE, len(tokens), 64, jnp.float32)
        lengths = jnp.full((len(tokens),), tokens.shape[1], jnp.int32)
        prefilled, cache = serving.prefill(weights, tokens, lengths, cache, CONFIG, SCHEDULE)
        decoded, _ = serving.decode_step(weights, tokens[:, 0], cache, CONFIG, SCHEDULE)
        return forward(params, tokens, CONFIG, SCHEDULE), prefilled, decoded

    tokens = ALIGNED.tokens
    expected = run(tokens)
    with meshes.use(mesh):
        found = run(tokens)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


def test_the_warm_up_on_a_split_base_is_that_of_one_device(checkpoint):
    tokens = np.random.RandomState(0).randint(0, CONFIG.vocab_size, (1, 2, 33)).astype(np.int32)
    stage = training.Stage("warmup", "warmup", 4, 2, 32, 0.0, 1e-3, compute_dtype="float32")

    def run():
        params = load(checkpoint, dtype="float32", weights="fp8 base")[2]
        codes = params.attention.out.codes
        state = training.init_optimiser_state(params, stage, CONFIG, SCHEDULE)
        shard = codes.sharding.shard_shape(codes.shape)
        return training.step(params, state, tokens, CONFIG, SCHEDULE, stage)[2], shard

    expected, whole = run()
    with meshes.use("all", TRAINING):
        found, part = run()
    assert part[1:] == (whole[1] // 2, whole[2] // 2)  # the hidden size over data, heads over tensor
    np.testing.assert_allclose(found, expected, rtol=1e-5)
