"""Inference: weights and caches laid out for it, a layer over a cache, all layers, and generation.

config, schedule, weights = checkpoints_convert.load(directory, form="serving")
cache = init_cache(config, schedule, batch, max_len)
logits, cache = prefill(weights, tokens, lengths, cache, config, schedule)
logits, cache = decode_step(weights, token, cache, config, schedule)
completions = generate(weights, prompts, config, schedule, max_new_tokens)
"""

from indexcache_jax.serving.cache import FP8, Cache, CacheFormat, LayerCache, bytes_per_token, fork, init_cache
from indexcache_jax.serving.generation import decode, generate, prefill_document, prefill_prompts
from indexcache_jax.serving.model import decode_step, embed, logits, prefill, prefill_chunk, step, walk
from indexcache_jax.serving.sampling import Sampling, sample
from indexcache_jax.serving.weights import Dense, Experts, Layer, Weights, from_params, random_weights, restrict

__all__ = [
    "FP8",
    "Cache",
    "CacheFormat",
    "Dense",
    "Experts",
    "Layer",
    "LayerCache",
    "Sampling",
    "Weights",
    "bytes_per_token",
    "decode",
    "decode_step",
    "embed",
    "fork",
    "from_params",
    "generate",
    "init_cache",
    "logits",
    "prefill",
    "prefill_chunk",
    "prefill_document",
    "prefill_prompts",
    "random_weights",
    "restrict",
    "sample",
    "step",
    "walk",
]
