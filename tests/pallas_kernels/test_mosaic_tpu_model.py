"""A small model whose operations all go through the TPU kernels, interpreted: prompts in chunks, then decode steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import model, serving
from pallas_kernels.sparse_mla import mosaic_tpu
from tests.support.tiny_models import CASES
from tests.support.tpu_interpreter import interpreted


@pytest.mark.slow
def test_logits_are_those_of_the_reference(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "ROWS", 16)
    case = CASES["deepseek-ragged"]
    tokens, lengths = jnp.asarray(case.tokens), jnp.asarray(case.lengths)
    args = case.config, case.schedule
    expected = np.asarray(model.forward(case.params, tokens, *args, lengths=lengths))
    width = int(np.min(case.lengths)) - 1
    weights = serving.from_params(case.params, *args)
    with interpreted(detect_races=False):
        found = model.forward(case.params, tokens, *args, lengths=lengths)
        cache = serving.init_cache(*args, tokens.shape[0], tokens.shape[1], jnp.float32)
        first, cache = serving.prefill(weights, tokens[:, :width], jnp.full_like(lengths, width), cache, *args)
        second, _ = serving.decode_step(weights, tokens[:, width], cache, *args)
    for row, length in enumerate(np.asarray(lengths)):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=2e-4)
    np.testing.assert_allclose(first, expected[:, width - 1], atol=2e-4)
    np.testing.assert_allclose(second, expected[:, width], atol=2e-4)
