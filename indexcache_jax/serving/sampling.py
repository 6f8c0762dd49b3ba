"""Drawing the next token: greedy, by temperature, among the likeliest; with one setting for all rows, or one a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: at temperature 0, and at one that as a float32 divisor would be 0."""
        return self.temperature < _TINY


@flax.struct.dataclass
class RowSampling:
    """The fields of a `Sampling` for each row, as arrays: one program draws with whatever settings."""

    temperature: jax.Array | np.ndarray  # [B] float32
    top_k: jax.Array | np.ndarray  # [B] int32
    top_p: jax.Array | np.ndarray  # [B] float32


@flax.struct.dataclass
class SharedSampling:
    """A `Sampling` of all rows that is not greedy: one program draws with whatever temperature and top_p.

    A program is compiled for top_k, the number of logits to sort, and for whether top_p is below 1.
    """

    inverse_temperature: np.float32 | jax.Array  # XLA multiplies by it too where it knows the temperature
    top_p: np.float32 | jax.Array
    top_k: int = flax.struct.field(pytree_node=False)
    nucleus: bool = flax.struct.field(pytree_node=False)


_TINY = float(jnp.finfo(jnp.float32).tiny)
_HUGE = float(jnp.finfo(jnp.float32).max)
GREEDY = Sampling()
NO_TOKEN = -1  # of a row whose logits are NaN or infinite: nothing can be drawn from them


def by_row(samplings: Sequence[Sampling]) -> Sampling | RowSampling:
    """The settings of a batch's rows. Where all are greedy that is `GREEDY`, which needs no random numbers."""
    if all(s.greedy for s in samplings):
        return GREEDY
    return RowSampling(
        temperature=np.array([min(s.temperature, _HUGE) for s in samplings], np.float32),
        top_k=np.array([min(s.top_k, np.iinfo(np.int32).max) for s in samplings], np.int32),
        top_p=np.array([s.top_p for s in samplings], np.float32),
    )


def for_all(sampling: Sampling) -> Sampling | SharedSampling:
    """The settings of all rows of a batch. Greedy ones are `GREEDY`, which needs no random numbers."""
    if sampling.greedy:
        return GREEDY
    inverse_temperature = np.float32(1) / np.float32(min(sampling.temperature, _HUGE))
    return SharedSampling(inverse_temperature, np.float32(sampling.top_p), sampling.top_k, sampling.top_p < 1)


def sample(logits: jax.Array, sampling: Sampling | SharedSampling | RowSampling, keys: jax.Array) -> jax.Array:
    """One token [B] int32 a row, or NO_TOKEN, from logits [B, V] float32; `keys` [B] are the rows' own.

    With a `RowSampling` a row's token depends on its own logits, settings and key alone.
    """
    drawn = _drawn_by_row(logits, sampling, keys) if isinstance(sampling, RowSampling) else _drawn(logits, sampling, keys)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), drawn, NO_TOKEN)


def _drawn(logits: jax.Array, sampling: Sampling | SharedSampling, keys: jax.Array) -> jax.Array:
    if isinstance(sampling, Sampling):
        sampling = for_all(sampling)
    if isinstance(sampling, Sampling):  # which is greedy
        return _likeliest(logits)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) * sampling.inverse_temperature  # the best stays finite
    vocabulary = logits.shape[-1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count < vocabulary or sampling.nucleus:
        logits = jnp.where(logits < _least_kept(jax.lax.top_k(logits, count)[0], count, sampling.top_p), -jnp.inf, logits)
    return _categorical(keys, logits)


def _drawn_by_row(logits: jax.Array, sampling: RowSampling, keys: jax.Array) -> jax.Array:
    greedy, vocabulary = sampling.temperature < _TINY, logits.shape[-1]
    divisor = jnp.where(greedy, 1, sampling.temperature)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor
    count = jnp.where((sampling.top_k > 0) & (sampling.top_k < vocabulary), sampling.top_k, vocabulary)[:, None]
    top_p = sampling.top_p[:, None]
    restricted = ~greedy[:, None] & ((count < vocabulary) | (top_p < 1))

    def among_the_likeliest(scaled: jax.Array) -> jax.Array:
        best = jnp.where(jnp.arange(vocabulary) < count, jax.lax.top_k(scaled, vocabulary)[0], -jnp.inf)
        return jnp.where(restricted & (scaled < _least_kept(best, count, top_p)), -jnp.inf, scaled)

    scaled = jax.lax.cond(jnp.any(restricted), among_the_likeliest, lambda scaled: scaled, scaled)  # sorting takes long
    return jnp.where(greedy, _likeliest(logits), _categorical(keys, scaled))


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _least_kept(best: jax.Array, count: jax.typing.ArrayLike, top_p: jax.typing.ArrayLike) -> jax.Array:
    """The least logit [B, 1] of the tokens kept, of logits `best` [B, K] that descend; those after `count` are -inf."""
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    last = jnp.clip(last, 0, jnp.asarray(count) - 1)  # top_p may round to 0, and the sum of `count` to less than 1
    return jnp.take_along_axis(best, last, axis=-1)


def row_keys(seed: jax.Array | int, ids: jax.Array, count: jax.Array | int) -> jax.Array:
    """The random keys [B] with which every request of ids [B] draws its token number `count`.

    They depend on (seed, id, count) alone, so a request draws the same tokens whatever else is in its batch. seed: of all
    rows, or [B] of each.
    """

    def key(seed: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), count)

    return jax.vmap(key)(jnp.broadcast_to(jnp.asarray(seed), jnp.shape(ids)), ids)
