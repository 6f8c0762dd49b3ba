"""IndexCache for DeepSeek Sparse Attention: schedules, models, search and distillation as pure functions in JAX."""

from indexcache_jax.cache import Cache, init_cache
from indexcache_jax.config import Config, preset
from indexcache_jax.generate import Sampling, generate
from indexcache_jax.model import decode_step, forward, prefill, selections
from indexcache_jax.params import Params, init
from indexcache_jax.schedule import Schedule

__all__ = [
    "Cache",
    "Config",
    "Params",
    "Sampling",
    "Schedule",
    "decode_step",
    "forward",
    "generate",
    "init",
    "init_cache",
    "prefill",
    "preset",
    "selections",
]
