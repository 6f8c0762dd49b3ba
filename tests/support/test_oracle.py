"""The recordings are what transformers computes today, and a model generates what it generates."""

import numpy as np
import pytest

from indexcache_jax import decode_step, init_cache
from tests.support import recordings
from tests.support.tiny_models import RECORDED

torch = pytest.importorskip("torch", reason="transformers needs torch; tests/fixtures hold what it computed")
oracle = pytest.importorskip("tests.support.oracle", reason="no transformers; tests/fixtures hold what it computed")


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_are_what_transformers_computes(name):
    case = RECORDED[name]
    logits, indices = oracle.record(oracle.build(case), case)
    recorded_logits, recorded_indices = recordings.read(name)
    np.testing.assert_allclose(logits, recorded_logits, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(indices, recorded_indices)


@pytest.mark.parametrize("name", ["glm-mixed", "deepseek-all-full"])
def test_greedy_decoding_writes_what_transformers_writes(name):
    """Both with their caches, across the length where selection begins to leave tokens out."""
    case, prompt, new = RECORDED[name], 6, 20
    tokens = case.tokens[:, :prompt]
    theirs = oracle.build(case).generate(
        torch.from_numpy(tokens).long(), attention_mask=torch.ones(tokens.shape), max_new_tokens=new, do_sample=False
    )
    cache = init_cache(case.config, case.schedule, len(tokens), prompt + new, np.float32)
    written = list(tokens.T)
    for place in range(prompt + new - 1):
        logits, cache = decode_step(case.params, written[place], cache, case.config, case.schedule)
        if place >= prompt - 1:
            written.append(np.argmax(logits, axis=-1).astype(np.int32))
    np.testing.assert_array_equal(np.stack(written, axis=1), theirs.numpy())
