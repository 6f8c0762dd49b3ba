"""A new token's row in the caches of a layer, and rope, from what the projections down made of it.

The 576 numbers of a latent, and where the layer selects the 128 of an index key, are so few that one thread block writes them
while the others multiply: all its threads normalise the latent, its first warp applies rope to the 64 rotary numbers, its last
warp makes the index key. A lane has a pair of the first and four numbers of the second, in the order in which they are
rotated, so that nothing goes through shared memory but the norm's sum. A cache in 8 bits gets the codes and scales that `quant`
makes of the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels import quant
from pallas_kernels.decode_layer.mosaic_gpu_arrays import INDEX_WIDTH, TokenArrays, TokenSizes
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import SharedMemory, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH


class Token:
    """Writes a token's rows; made with the shared memory that it needs."""

    def __init__(self, p: TokenSizes, shared: SharedMemory):
        self.p = p
        self.sums = shared.allocate(64)
        self.sizes = shared.allocate(64) if p.latents_scaled else None

    def write(self, a: TokenArrays, thread: Thread, position: Word) -> None:
        """Stores the rows at `position` of the caches; all threads of the block take part."""
        p = self.p
        pair = persistent.fresh_pair(ptx.offset(a.down_out, ptx.constant(p.q_rank), 4))
        words: list[tuple[Word, Word, Predicate]] = []  # (i, numbers 2 i and 2 i + 1, whether it exists) of this thread

        def sink(i: Word, word: Word, exists: Predicate) -> None:
            words.append((i, word, exists))

        persistent.normalise(thread, VALUE_DIM // 2, pair, a.kv_norm, p.latent_eps, self.sums, sink, in_bfloat16=False)
        scale = self._write_codes(a, thread, words, position) if p.latents_scaled else None
        if scale is None:
            row, rotary = ptx.offset(a.latents, position, 2 * WIDTH), VALUE_DIM // 2
            for i, word, exists in words:
                ptx.store_global(ptx.offset(row, i, 4), word, exists)
        else:
            row, rotary = ptx.offset(a.latent_rotary, position, 2 * ROTARY), 0
        with ptx.when(thread.warp.equals(0)):
            rotated_pair = rotate_pair(a.cos, a.sin, thread.lane, *pair(thread.lane + VALUE_DIM // 2))
            word = ptx.to_bfloat16_pair(*rotated_pair)
            if scale is not None:
                low, high = (ptx.div_full(x, scale) for x in ptx.from_bfloat16_pair(word))
                word = ptx.to_bfloat16_pair(low, high)
            at = ptx.offset(row, thread.lane + rotary, 4)
            ptx.store_global(at, word, thread.lane.signed >= 0)
        if p.index_heads:
            with ptx.when(thread.warp.equals(persistent.WARPS - 1)):
                write_index_key(p, a, thread.lane, position)

    def _write_codes(
        self, a: TokenArrays, thread: Thread, words: Sequence[tuple[Word, Word, Predicate]], position: Word
    ) -> Float:
        """Stores a latent's first 512 numbers and its scale as quant.quantise_latents makes them; returns the scale."""
        assert self.sizes is not None
        pairs = [ptx.from_bfloat16_pair(word) for _, word, _ in words]
        largest = persistent.block_maximum(thread, [x for pair in pairs for x in pair], self.sizes)
        # XLA multiplies by the inverse of a constant that it divides by.
        scale = ptx.max_nan_f32(largest, ptx.number(quant.MIN_MAGNITUDE)) * (1 / quant.E4M3_MAX)
        is_even = (thread.lane & 1).equals(0)
        row = ptx.offset(a.latent_codes, position, VALUE_DIM)
        for (i, _, exists), pair in zip(words, pairs, strict=True):
            four = [ptx.div_full(x, scale) for x in (*pair, *(ptx.lane_distant(x, 1) for x in pair))]
            ptx.store_global(ptx.offset(row, i >> 1, 4), ptx.to_e4m3_word(four), exists & is_even)
        is_first = thread.index.equals(0)
        ptx.store_global(ptx.offset(a.latent_scales, position, 4), ptx.bits_of(scale), is_first)
        return scale


# ---- vectors of the indexer: a warp has one, a lane its numbers 4 lane .. 4 lane + 3


def write_index_key(p: TokenSizes, a: TokenArrays, lane: Word, position: Word) -> None:
    """Stores the token's index key: layer norm, rope."""
    at = ptx.offset(ptx.offset(a.down_out, ptx.constant(p.latent_end), 4), lane, 16)
    key = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
    mean = persistent.warp_sum(ptx.total(key)) * (1 / INDEX_WIDTH)
    key = [x - mean for x in key]
    squares = ptx.total(x * x for x in key)
    variance = persistent.warp_sum(squares) * (1 / INDEX_WIDTH)
    factor = ptx.rsqrt(variance + 1e-6)
    weights, biases = _load_lane_values(a.key_norm, lane), _load_lane_values(a.key_norm_bias, lane)
    key = [x * factor * w + b for x, w, b in zip(key, weights, biases, strict=True)]
    key = rotate_front(p, a, lane, key)
    store_index_vector(p, key, lane, a.index_keys, position, a.index_scales)


def _load_lane_values(base: Address, lane: Word) -> list[Float]:
    """The four bfloat16 values of this lane, elements 4 lane .. 4 lane + 3, as float32."""
    words = [ptx.load_global(ptx.offset(base, (lane << 1) + i, 4)) for i in range(2)]
    return [x for word in words for x in ptx.from_bfloat16_pair(word)]


def rotate_front(p: TokenSizes, a: TokenArrays, lane: Word, vector: Sequence[Float]) -> list[Float]:
    """Rope on the first 64 of a vector's 128 numbers, of which a lane has four; all are rounded to bfloat16."""
    rotated = lane.signed < ROTARY // 4
    out: list[Float] = []
    if p.index_interleaved:
        for i in range(2):
            j = ((lane << 1) + i) & (ROTARY // 2 - 1)
            out += rotate_pair(a.cos, a.sin, j, *vector[2 * i : 2 * i + 2])
    else:
        in_front = (lane & (ROTARY // 8)).equals(0)
        for i, x in enumerate(vector):
            other = ptx.lane_distant(x, ROTARY // 8)
            j = ((lane << 2) + i) & (ROTARY // 2 - 1)
            cos, sin = _load_cos_sin(a.cos, a.sin, j)
            first, second = _rotate(x, other, cos, sin)[0], _rotate(other, x, cos, sin)[1]
            out.append(ptx.select(in_front, first, second))
    return [ptx.rounded(ptx.select(rotated, new, old)) for new, old in zip(out, vector, strict=True)]


def store_index_vector(
    p: TokenSizes, vector: Sequence[Float], lane: Word, base: Address, row: Word, scales: Address | None
) -> Float | None:
    """Stores a vector as row `row` of [.., 128], in the index cache's format; returns its scale if that is e4m3."""
    always = lane.signed >= 0
    if not p.index_scaled:
        for i in range(2):
            at = ptx.offset(ptx.offset(base, row, 2 * INDEX_WIDTH), (lane << 1) + i, 4)
            ptx.store_global(at, ptx.to_bfloat16_pair(*vector[2 * i : 2 * i + 2]), always)
        return None
    # As quant.quantise_index does: max(|x|, 1e-4) / 448 rounded up to a power of two.
    sizes = [ptx.bits_of(x) & 0x7FFFFFFF for x in vector]
    top = ptx.reduce_warp("max", ptx.max_s32(ptx.max_s32(sizes[0], sizes[1]), ptx.max_s32(sizes[2], sizes[3])))
    finite = top.signed < 0x7F800000
    largest = ptx.max_nan_f32(ptx.float_of(top), ptx.number(1e-4))
    bits = (ptx.bits_of(ptx.div_rn(largest, ptx.number(448.0))) + 0x7FFFFF) & 0x7F800000
    scale = ptx.float_of(ptx.select(finite, bits, 0x7FC00000))
    inverse = ptx.float_of(ptx.select(finite, (254 << 23) - bits, 0x7FC00000))
    word = ptx.to_e4m3_word([x * inverse for x in vector])
    ptx.store_global(ptx.offset(ptx.offset(base, row, INDEX_WIDTH), lane, 4), word, always)
    if scales is not None:
        ptx.store_global(ptx.offset(scales, row, 4), ptx.bits_of(scale), lane.equals(0))
    return scale


# ---- rope


def _load_cos_sin(cos: Address, sin: Address, j: Word) -> tuple[Float, Float]:
    words = [ptx.load_global(ptx.offset(base, j, 4)) for base in (cos, sin)]
    return ptx.float_of(words[0]), ptx.float_of(words[1])


def _rotate(first: Float, second: Float, cos: Float, sin: Float) -> tuple[Float, Float]:
    rotated_pair = first * cos - second * sin
    return rotated_pair, second * cos + first * sin


def rotate_pair(cos: Address, sin: Address, j: Word, first: Float, second: Float) -> tuple[Float, Float]:
    """A pair of numbers rotated by angle j, whose cosines and sines are float32 at `cos` and `sin`."""
    return _rotate(first, second, *_load_cos_sin(cos, sin, j))
