"""Sets of positions inside Mosaic TPU kernels, as bits and as ascending lists, without a sort, a scatter or a gather.

A row of bits covers SPAN = 1024 positions in 128 lanes of 8 bits: bit c of lane l of row r is position
1024 r + 128 c + l. Making a row from a mask is then 8 shifts of whole registers.

From bits to a list (`positions`): every place j of the list asks which row holds the j-th set bit, which of its 8 chunks,
which lane. The rows' running counts answer the first; a product of the bits with a one-hot matrix hands every
place its row's 128 bytes; the running counts of the chunks answer the second and, by a product with a triangular matrix,
those of the lanes the third. A list of k out of T positions costs (T / 1024 + 144) x 128 x k multiplications on the matrix
unit, 71 million for 2048 of 128K; a one-hot matrix over all T would cost hundreds of times that.

From a list to bits (`bits_of`): bit (c, l) of row r is the sum over places of [row = r] 2^c [lane = l], one product of two
one-hot matrices. Positions must be distinct, else their bits would add up.

All operands are integers up to 256, exact in bfloat16, and sums stay below 2^24, exact in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.device import LANES, precision

CHUNKS = 8  # bits of a lane: what bfloat16 holds exactly
SPAN = CHUNKS * LANES
MAX_ROWS = MAX_PLACES = 2**15  # both go through bfloat16 in two parts, of 7 bits and of what is above them

_INFO = 16  # numbers about its row that a place asks for: 8 counts, and the row's start and number in two parts each


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _one(condition: jax.Array) -> jax.Array:
    """1 where it holds, in bfloat16 (by way of 32 bits: v5 has no 16-bit vector operations)."""
    return jnp.where(condition, 1.0, 0.0).astype(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def pack(mask: jax.Array) -> jax.Array:
    """One row of bits for every row of mask [R, SPAN]: [R, LANES] int32 below 256."""
    row = jnp.zeros((mask.shape[0], LANES), jnp.int32)
    for chunk in range(CHUNKS):
        row += jnp.where(mask[:, chunk * LANES : (chunk + 1) * LANES], 1 << chunk, 0)
    return row


def positions(bits: jax.Array, places: int) -> tuple[jax.Array, jax.Array]:
    """The set positions of bits [N, LANES], ascending: [1, places] int32, undefined beyond their number, and that, [1, 1].

    N and `places` are multiples of LANES, at most MAX_ROWS and MAX_PLACES.
    """
    rows = bits.shape[0]
    lane = _iota((rows, LANES), 1)
    counts = jnp.zeros((rows, LANES), jnp.float32)  # lane c: how many bits of chunk c the row has
    for chunk in range(CHUNKS):
        ones = jnp.sum(((bits >> chunk) & 1).astype(jnp.float32), axis=1, keepdims=True)
        counts = jnp.where(lane == chunk, ones, counts)
    earlier = _one(_iota((rows, rows), 1) < _iota((rows, rows), 0))
    start = jnp.sum(_product(earlier, counts.astype(jnp.bfloat16), 1, 0), axis=1, keepdims=True).astype(jnp.int32)
    end = start + jnp.sum(counts, axis=1, keepdims=True).astype(jnp.int32)

    place = _iota((1, places), 1)
    holds = _one((start <= place) & (place < end))  # [N, places]
    row = _iota((rows, 1), 0)
    info = counts
    for at, value in enumerate((start >> 7, start & 127, row >> 7, row & 127)):
        info = jnp.where(lane == CHUNKS + at, value.astype(jnp.float32), info)
    info = _product(info[:, :_INFO].astype(jnp.bfloat16), holds, 0, 0).astype(jnp.int32)  # [16, places]
    lanes = _product(bits.astype(jnp.float32).astype(jnp.bfloat16), holds, 0, 0).astype(jnp.int32)  # [LANES, places]

    def asked(at: int) -> jax.Array:
        return info[at : at + 1]

    rank = place - (asked(CHUNKS) * 128 + asked(CHUNKS + 1))  # among the row's bits
    found_row = asked(CHUNKS + 2) * 128 + asked(CHUNKS + 3)
    which, before, through = jnp.zeros_like(rank), jnp.zeros_like(rank), jnp.zeros_like(rank)
    for c in range(CHUNKS - 1):
        through += asked(c)
        which += jnp.where(rank >= through, 1, 0)
        before = jnp.where(rank >= through, through, before)
    rank -= before  # among the chunk's bits
    chosen = _one(((lanes >> which) & 1) == 1)
    up_to = _one(_iota((LANES, LANES), 1) <= _iota((LANES, LANES), 0))
    running = _product(up_to, chosen, 1, 0).astype(jnp.int32)
    found_lane = jnp.sum(jnp.where(running <= rank, 1.0, 0.0), axis=0, keepdims=True).astype(jnp.int32)
    return found_row * SPAN + which * LANES + found_lane, end[rows - 1 :]


def bits_of(listed: jax.Array, rows: int) -> jax.Array:
    """Positions [1, K] int32, distinct but for -1, in any order -> their bits [rows, LANES] int32. K is a multiple of LANES."""
    width = listed.shape[1]
    holds = _one(_iota((rows, width), 0) == (listed >> 10))  # -1 >> 10 is no row
    weight = (1 << ((listed >> 7) & 7)).astype(jnp.float32)
    lanes = jnp.where(_iota((LANES, width), 0) == (listed & 127), weight, 0.0).astype(jnp.bfloat16)
    return _product(holds, lanes, 1, 1).astype(jnp.int32)
