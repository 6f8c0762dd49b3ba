"""Drawing the next token: greedy, by temperature, among the likeliest."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from indexcache_jax.arguments import is_real


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ValueError, naming the field, for values out of range.

    temperature 0 is greedy. top_k > 0 keeps the k likeliest tokens, top_p < 1 then the likeliest ones that together have
    at least that probability; what is as likely as the last one kept is kept too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (is_real(self.temperature) and 0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature: {self.temperature!r} is not a number of at least 0")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k!r} is not an integer of at least 0")
        if not (is_real(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: {self.top_p!r} is not above 0 and at most 1")


GREEDY = Sampling()
NO_TOKEN = -1  # of a row whose logits are NaN or infinite: nothing can be drawn from them


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token [B] int32 a row, or NO_TOKEN, from logits [B, V] float32; `keys` [B] are the rows' own."""
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), _drawn(logits, sampling, keys), NO_TOKEN)


def _drawn(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    if sampling.temperature < jnp.finfo(jnp.float32).tiny:  # as a divisor it would be 0
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature  # the best stays finite
    vocabulary = logits.shape[-1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count < vocabulary or sampling.top_p < 1:
        best = jax.lax.top_k(logits, count)[0]  # [B, count], descending
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.maximum(jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1, 0)  # top_p may round to 0
        logits = jnp.where(logits < jnp.take_along_axis(best, last, axis=-1), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(seed: jax.Array | int, ids: jax.Array, count: jax.Array | int) -> jax.Array:
    """The random keys [B] with which every request of ids [B] draws its token number `count`.

    They depend on (seed, id, count) alone, so a request draws the same tokens whatever else is in its batch.
    """
    base = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(base, i), count))(ids)
