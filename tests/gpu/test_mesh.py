"""Inference through the Hopper kernels on all GPUs of a host: what one of them computes. NCCL without multicast."""

import functools

import jax
import numpy as np
import pytest

from indexcache_jax import serving, sharding
from indexcache_jax.serving import CacheFormat, generate
from indexcache_jax.serving.weights import abstract
from indexcache_jax.sharding import SERVING
from pallas_kernels import hopper
from tests.gpu.test_generate import CONFIG, PROMPTS, SCHEDULE, errors, weights

pytestmark = [
    pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not())),
    pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs"),
]
FP8_KEYS = CacheFormat(index_dtype=serving.FP8)
ROWS, STEPS = 4, (5, 6, 7, 8)
# The axis that all devices are along, and the rules.
MESHES = {
    "context, experts split": ("context", SERVING),
    "context, experts whole": ("context", SERVING.whole_experts()),
    "context, cache split": ("context", SERVING.split_cache()),
    "data, experts split": ("data", SERVING),
    "data, experts whole": ("data", SERVING.whole_experts()),
    "tensor": ("tensor", SERVING),
}


def logits_of(model, rows):
    """Logits [rows * (1 + steps), V] of prompts in two chunks and of STEPS after them."""
    cache = serving.init_cache(CONFIG, SCHEDULE, rows, 2048, FP8_KEYS)
    prompts = [PROMPTS[0][row : row + 1024] for row in range(rows)]
    found, cache = serving.prefill_prompts(model, prompts, cache, CONFIG, chunk=512)
    every = [sharding.to_host(found)]
    step = jax.jit(serving.step)
    for token in STEPS:
        found, cache = step(model, np.full((rows,), token, np.int32), cache, CONFIG)
        every.append(sharding.to_host(found))
    return np.concatenate(every)


@functools.cache
def on_one_device(rows):
    return logits_of(weights(), rows)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("mesh", MESHES)
def test_logits_are_those_of_one_device(mesh, rows):
    """Every visible key is selected and the bias chooses the experts, so that no near-tie decides."""
    axis, rules = MESHES[mesh]
    expected = on_one_device(rows)
    with sharding.use(sharding.make_mesh(**{axis: jax.device_count()}), rules):
        found = logits_of(sharding.put(weights(), abstract(CONFIG, SCHEDULE)), rows)
    assert errors(found, expected).max() < 0.03


def test_tokens_are_the_same_in_every_run():
    with sharding.use(sharding.make_mesh(context=jax.device_count())):
        model = sharding.put(weights(), abstract(CONFIG, SCHEDULE))
        runs = [generate(model, [PROMPTS[0]], CONFIG, SCHEDULE, 20, chunk=512) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
