"""IndexCache for DeepSeek Sparse Attention: schedules, models, search and distillation as pure functions in JAX."""

from indexcache_jax.config import Config
from indexcache_jax.model import forward, selections
from indexcache_jax.params import Params, init
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import (
    Cache,
    CacheFormat,
    Sampling,
    Weights,
    decode_step,
    generate,
    init_cache,
    prefill,
)

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheFormat",
    "Config",
    "Params",
    "Sampling",
    "Schedule",
    "Weights",
    "__version__",
    "decode_step",
    "forward",
    "generate",
    "init",
    "init_cache",
    "prefill",
    "preset",
    "selections",
]
