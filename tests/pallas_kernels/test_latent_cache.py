"""New tokens' latents in a cache in 8 bits: the kernel for Hopper, run on NumPy, against the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import append_latents
from pallas_kernels.quant import Latents, quantise_latents
from tests.support.rows import run_program, words

interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def inputs(batch: int, tokens: int, length: int, start: int, seed: int = 0):
    """A filled cache and new tokens, one of zeros, some without a place."""
    random = np.random.default_rng(seed)
    cache = quantise_latents(jnp.asarray(random.standard_normal((batch, length, 576)), jnp.float32), 512)
    product = random.standard_normal((batch, tokens, start + 576 + 4)) * 10.0 ** random.uniform(-3, 3, (batch, tokens, 1))
    product[0, 0] = 0
    angles = random.uniform(0, 6, (batch, tokens, 32))
    positions = np.stack([random.permutation(length)[:tokens] for _ in range(batch)])
    positions[:, 1::5] = -1
    positions[:, 2::7] = length
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    norm = jnp.asarray(random.uniform(0.5, 2, 512), jnp.bfloat16)
    return cache, jnp.asarray(product, jnp.float32), norm, cos, sin, jnp.asarray(positions, jnp.int32)


def check_same(found: Latents, expected: Latents) -> None:
    """But for numbers about halfway between two others, where the last bit of a sum or a quotient decides."""
    np.testing.assert_allclose(found.scales, expected.scales, rtol=2.0**-7)
    assert np.mean(np.asarray(found.scales) != np.asarray(expected.scales)) < 0.05
    for one, other in ((found.codes, expected.codes), (found.rotary, expected.rotary)):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=2.0**-3, atol=2.0**-8)
        assert np.mean(one != other) < 0.01


@interpreted
@pytest.mark.parametrize("batch, tokens, length, start", [(1, 21, 40, 768), (2, 9, 16, 0)])
def test_hoppers_latents_are_those_of_the_reference(monkeypatch, batch, tokens, length, start):
    from pallas_kernels.latent_cache import mosaic_gpu

    cache, product, norm, cos, sin, positions = inputs(batch, tokens, length, start)
    program = mosaic_gpu.append_program(batch, tokens, length, product.shape[-1], start, 1e-6)
    kept = [words(x) for x in (cache.codes, cache.rotary, cache.scales)]
    run_program(monkeypatch, program, -(-batch * tokens // 8), [product, norm, cos, sin, positions], kept)
    kinds = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32
    arrays = [x.view(kind).reshape(old.shape) for x, kind, old in zip(kept, kinds, jax.tree.leaves(cache), strict=True)]
    found, expected = Latents(*arrays), append_latents(cache, product, norm, cos, sin, positions, start=start, eps=1e-6)
    check_same(found, expected)
    written = np.isin(np.arange(length), np.asarray(positions)[0])
    assert 0 < written.sum() < tokens
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(np.asarray(one[0][~written], np.float32), np.asarray(other[0][~written], np.float32))


def test_what_does_not_fit_is_named():
    cache, *others = inputs(1, 3, 8, 0)
    with pytest.raises(ValueError, match="with start 8"):
        append_latents(cache, *others, start=8, eps=1e-6)


@interpreted
def test_what_hoppers_kernel_does_not_take():
    from pallas_kernels.latent_cache import mosaic_gpu

    cache, product, *others = inputs(1, 128, 200, 4)
    assert mosaic_gpu.why_not(cache, product, *others, start=4, eps=1e-6) is None
    assert "start 3" in mosaic_gpu.why_not(cache, product, *others, start=3, eps=1e-6)
    assert "bfloat16" in mosaic_gpu.why_not(cache, product.astype(jnp.bfloat16), *others, start=4, eps=1e-6)
    assert "for 64 tokens" in mosaic_gpu.why_not(cache, product, *others[:3], others[3][:, :64], start=4, eps=1e-6)
