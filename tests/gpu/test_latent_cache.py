"""New tokens' latents in a cache in 8 bits on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_latents, hopper
from tests.pallas_kernels.test_latent_cache import check_same, inputs

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize("batch, tokens, length, start", [(1, 2000, 5000, 768), (3, 300, 400, 0)])
def test_latents_are_those_of_the_reference_and_others_stay(batch, tokens, length, start):
    cache, *others = inputs(batch, tokens, length, start)
    append = jax.jit(append_latents, static_argnames=("start", "eps", "implementation"))
    found, expected = (append(cache, *others, start=start, eps=1e-6, implementation=name) for name in ("mosaic_gpu", "xla"))
    check_same(found, expected)
    written = np.isin(np.arange(length), np.asarray(others[-1])[0])
    assert 0 < written.sum() < tokens
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(one[0][~written].astype(jnp.float32), other[0][~written].astype(jnp.float32))
