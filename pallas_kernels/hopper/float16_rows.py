"""bfloat16 rows as float16 in shared memory, where `ptx.multiply_codes` reads them as wgmma's second operand.

A float16 has a smaller exponent than a bfloat16, so every 128 numbers of a row are scaled by a power of two whose inverse, the
factor, is kept beside them. Importing this needs JAX's Mosaic GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import Value, largest_of_group
from pallas_kernels.quant import BLOCK


def write_piece(
    lane: Value, row: Value, piece: Value, halves: Sequence[Sequence[Value]], columns: int, numbers: Value, factors: Value
) -> None:
    """Writes 128 numbers of a row, of which each of eight neighbouring lanes has 16 bytes of either half, and their factor.

    columns: rows of a piece in shared memory. numbers: the address of the first piece's, [columns, 64] float16 for either half,
    swizzled. factors: that of [pieces, columns] float32.
    """
    in_eight = lane & 7
    pairs = [[ptx.from_bfloat16_pair(word) for word in words] for words in halves]
    scale, factor = ptx.float16_scale(largest_of_group([x for of_half in pairs for pair in of_half for x in pair]))
    at = numbers + piece * (2 * BLOCK * columns) + (row << 7)
    word_at = (in_eight >> 1) << 2
    line = row & 7
    for half, of_half in enumerate(pairs):
        for i, pair in enumerate(of_half):
            # Pair 4 in_eight + i of 32: of the 16 bytes with its number modulo 8 one word.
            chunk = ((in_eight & 1) << 2) + i
            swizzled = (chunk ^ line) << 4
            value = ptx.to_float16_pair(*(x * scale for x in pair))
            ptx.store_shared(at + swizzled + word_at + half * BLOCK * columns, value)
    with ptx.when(in_eight.equals(0)):
        factor_at = factors + ((piece * columns + row) << 2)
        ptx.store_shared(factor_at, ptx.bits_of(factor))
