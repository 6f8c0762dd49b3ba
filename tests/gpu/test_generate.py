"""Inference through the Hopper kernels: the same model through them and through plain XLA."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config, preset
from indexcache_jax.generate import generate, prefill
from indexcache_jax.schedule import Schedule
from pallas_kernels import hopper

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

FIELDS = preset("30b") | {"num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}
FIELDS |= {"index_topk": 2048, "eos_token_id": None, "pad_token_id": None}
CONFIG, SCHEDULE = Config.from_hf(FIELDS), Schedule("FSFS")
PROMPTS = [np.random.default_rng(i).integers(0, 512, n) for i, n in enumerate((1500, 700, 33))]


def difference(ours, exact):
    """Root mean square of the difference against the values' own."""
    return np.sqrt(np.mean((ours - exact) ** 2)) / np.std(exact)


@functools.cache
def weights():
    return serving.restrict(serving.random_weights(jax.random.key(0), CONFIG), CONFIG, SCHEDULE)


def prefill_and_steps(**options):
    """Logits after the prompts, and after each of three further tokens."""
    cache = serving.init_cache(CONFIG, SCHEDULE, 3, 2048, **options)
    logits, cache = prefill(weights(), PROMPTS, cache, CONFIG, chunk=512)
    found, step = [logits], jax.jit(serving.step)
    for token in (5, 6, 7):
        logits, cache = step(weights(), jnp.full((3,), token), cache, CONFIG)
        found.append(logits)
    return np.stack(found)


@functools.cache
def in_plain_xla():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "why_not", lambda: "left out for comparison")
        for operation in ("indexer_topk", "sparse_mla"):
            triton = importlib.import_module(f"pallas_kernels.{operation}.triton")
            patch.setattr(triton, "why_not", lambda *args, **options: "left out")
        jax.clear_caches()
        found = prefill_and_steps()
    jax.clear_caches()
    return found


@pytest.mark.parametrize("options", [{}, {"index_dtype": jnp.float8_e4m3fn}], ids=["bf16", "fp8 keys"])
def test_logits_equal_those_of_plain_xla(options):
    """Every visible key is selected: with fewer, one near-tie that falls the other way changes a random model's logits."""
    exact = in_plain_xla()
    assert np.std(exact) > 0.1
    assert difference(prefill_and_steps(**options), exact) < 0.05


def test_a_row_generates_alone_what_it_generates_in_a_batch_of_copies():
    """Greedy tokens of one prompt in a batch of three copies are three times the same."""
    rows = generate(weights(), [PROMPTS[1]] * 3, CONFIG, SCHEDULE, 40, chunk=512)
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 40
