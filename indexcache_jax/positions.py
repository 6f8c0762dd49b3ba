"""Where new tokens stand in their rows: what masks, caches and rotary embeddings are made from."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import sharding
from indexcache_jax.config import Config
from indexcache_jax.rope import CosSin, cos_sin


@flax.struct.dataclass
class Positions:
    """The positions of new tokens.

    queries [B, S] int32: each token's position in its row, -1 for padding. kv_lengths [B] int32: tokens of each row, the
    new ones included. cos_sin: rope's cosines and sines of the new tokens, [B, S, dr / 2] float32 each.
    """

    queries: jax.Array
    kv_lengths: jax.Array
    cos_sin: CosSin


def make_positions(
    starts: jax.Array, lengths: jax.Array, width: int, config: Config, order: np.ndarray | None = None
) -> Positions:
    """The positions of `width` right-padded tokens a row, of which lengths [B] count, after starts [B] earlier ones.

    order [width]: which token stands in each place, where they are not in their own order.
    """
    offsets = jnp.arange(width) if order is None else jnp.asarray(order)
    queries = jnp.where(offsets < lengths[:, None], starts[:, None] + offsets, -1)
    return Positions(queries, starts + lengths, cos_sin(jnp.maximum(queries, 0), config))


def even_order(width: int) -> np.ndarray | None:
    """The order in which a chunk's tokens are split over the devices of a mesh; None for their own order.

    A later query sees more keys. Of 2 n pieces, n devices get the first and the last, the second and the last but one, and
    so on, so that all see as many.
    """
    devices = sharding.devices_along("queries")
    if devices == 1 or width % (2 * devices):
        return None
    pieces = np.arange(width).reshape(2 * devices, -1)
    return np.stack([pieces[:devices], pieces[: devices - 1 : -1]], axis=1).reshape(-1)


def in_own_order(x: jax.Array, order: np.ndarray | None) -> jax.Array:
    """x [B, S, D] of tokens that stand in the order of `even_order`, in their own order and on all devices of the row.

    x itself where they stand in their own order (None). Whole pieces are moved, whose gradient is a move too.
    """
    if order is None:
        return x
    x = sharding.constrain(x, "batch", None, None)
    pieces = 2 * sharding.devices_along("queries")
    came_from = np.argsort(order[:: x.shape[1] // pieces])
    return x.reshape(x.shape[0], pieces, -1, x.shape[2])[:, came_from].reshape(x.shape)


def whole_rows(x: jax.Array, config: Config, lengths: jax.Array | None = None, order: np.ndarray | None = None) -> Positions:
    """The positions of the right-padded rows x [B, S, ...], which nothing precedes; lengths [B] defaults to S everywhere.

    order [S]: as for `make_positions`.
    """
    batch, width = x.shape[:2]
    lengths = jnp.full((batch,), width, jnp.int32) if lengths is None else lengths
    return make_positions(jnp.zeros((batch,), jnp.int32), lengths, width, config, order)
