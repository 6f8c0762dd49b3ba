"""Where the Mosaic GPU kernels can run: the one place that says which JAX and which device they need."""

from __future__ import annotations

import jax

MULTIPROCESSORS = 132  # of an H100 SXM and an H200: how many blocks a persistent kernel starts


def why_not() -> str | None:
    """Why a Mosaic GPU kernel cannot run on the default device, None where it can."""
    if jax.default_backend() != "gpu":
        return f"it needs a Hopper GPU, JAX's default backend is {jax.default_backend()!r}"
    if jax.version.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or newer on a GPU, this is {jax.__version__}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None
