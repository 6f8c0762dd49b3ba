"""IndexCache for DeepSeek Sparse Attention: schedules, models, search and distillation as pure functions in JAX."""

from indexcache_jax.config import Config, preset
from indexcache_jax.model import forward, selections
from indexcache_jax.params import Params, init
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

__all__ = [
    "Cache",
    "CacheFormat",
    "Config",
    "Params",
    "Sampling",
    "Schedule",
    "Weights",
    "decode_step",
    "forward",
    "generate",
    "init",
    "init_cache",
    "prefill",
    "preset",
    "selections",
]
