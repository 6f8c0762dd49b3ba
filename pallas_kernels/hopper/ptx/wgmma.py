"""Products by tensor cores (wgmma, mma), and the 8 x 8 blocks of their fragments (stmatrix, ldmatrix, movmatrix)."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.hopper.ptx.registers import Descriptor, Float, Word, asm, constant, f32, i32, i64

# Instructions by the numbers of both matrices: how many of them are 32 bytes, types, and whether lines may lie along either
# dimension, which takes two more operands.
_PRODUCTS = {"bf16": (16, "bf16.bf16", True), "e4m3": (32, "e4m3.e4m3", False)}


def matrix(address: Word) -> Descriptor:
    """The descriptor of a matrix of 128-byte lines in tiles of 8 lines, swizzled, one tile after the other (1024 bytes).

    It serves lines along either dimension. `address` is that of the first tile, or up to 96 bytes into its lines.
    """
    high = 1 << 30 | 1024 >> 4  # 128-byte swizzle, bytes from tile to tile
    ptx = f"{{\n.reg .b32 low;\nshr.u32 low, $1, 4;\nand.b32 low, low, 0x3fff;\nmov.b64 $0, {{low, {high}}};\n}}"
    return asm(ptx, [address], "=l,r", i64())


def multiply(
    sums: Sequence[Sequence[Float]],
    a: Descriptor,
    b: Descriptor,
    steps: Sequence[tuple[int, int, int]],
    *,
    columns: int,
    transposed: bool,
    fresh: bool,
    kind: str = "bf16",
) -> list[list[Float]]:
    """Starts sums[i] [64, columns] += A [64, 16] B [16, columns] for every (i, bytes into a, bytes into b) of `steps`.

    a: descriptor; lines are rows of A, or with `transposed` its columns.
    b: descriptor; lines are columns of B.
    fresh: the sums start at zero.
    kind: "bf16", or "e4m3": then A is [64, 32] and B [32, columns], and A is not transposed.
    Until they are waited for, nothing else may touch the sums.
    """
    flat = [value for values in sums for value in values]
    each, total = columns // 2, len(flat)
    depth, types, either_way = _PRODUCTS[kind]
    directions = f", {int(transposed)}, 0" if either_way else ""
    lines = [".reg .pred add, set;", ".reg .b64 a, b;", f"setp.ne.b32 add, ${2 * total + 2}, 0;"]
    lines += [f"setp.eq.b32 set, ${2 * total + 2}, 0;", "wgmma.fence.sync.aligned;"]
    begun: set[int] = set()
    for i, into_a, into_b in steps:
        registers = ", ".join(f"${i * each + j}" for j in range(each))
        first = fresh and i not in begun
        begun.add(i)
        lines += [f"add.s64 a, ${2 * total}, {into_a >> 4};", f"add.s64 b, ${2 * total + 1}, {into_b >> 4};"]
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{types} {{{registers}}}, a, b, "
            f"{'set' if first else 'add'}, 1, 1{directions};"
        ]
    constraints = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["l", "l", "n"])
    text = "{\n" + "\n".join(lines) + "\n}"
    results = asm(text, [*flat, a, b, constant(1)], constraints, f32(), total)
    return [results[i : i + each] for i in range(0, total, each)]


def multiply_fragments(
    sums: Sequence[Float], fragments: Sequence[Sequence[Word]], b: Descriptor, into_b: Sequence[int], *, columns: int
) -> list[Float]:
    """Starts sums [64, columns] += A [64, 16] B [16, columns] in float16 for every fragment and its bytes into b.

    fragments: A, four words a thread: rows g, g + 8, g, g + 8 of a warp's 16, g = lane / 4, and of these columns
      2 (lane % 4) and the next, for the last two words 8 further on.
    b: descriptor; lines are columns of B.
    Until they are waited for, nothing else may touch the sums and the fragments.
    """
    total, words = len(sums), [word for fragment in fragments for word in fragment]
    at_b = total + len(words) + total
    lines = [".reg .pred add;", ".reg .b64 b;", f"setp.ne.b32 add, ${at_b + 1}, 0;", "wgmma.fence.sync.aligned;"]
    registers = ", ".join(f"${i}" for i in range(total))
    for i, offset_ in enumerate(into_b):
        of_a = ", ".join(f"${2 * total + 4 * i + j}" for j in range(4))
        lines += [
            f"add.s64 b, ${at_b}, {offset_ >> 4};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{registers}}}, {{{of_a}}}, b, add, 1, 1, 0;",
        ]
    constraints = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["r"] * len(words) + ["l", "n"])
    text = "{\n" + "\n".join(lines) + "\n}"
    return asm(text, [*sums, *words, b, constant(1)], constraints, f32(), total)


def multiply_commit() -> None:
    """Makes one group of the products started since the last commit."""
    asm("wgmma.commit_group.sync.aligned;")


def multiply_wait(pending: int) -> None:
    """Waits until at most the last `pending` groups are under way."""
    asm(f"wgmma.wait_group.sync.aligned {pending};")


def multiplied(sums: Sequence[Sequence[Float]]) -> list[list[Float]]:
    """The sums, once everything that was started has ended."""
    flat = [value for values in sums for value in values]
    each, count = len(sums[0]), len(flat)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    ended = asm("wgmma.wait_group.sync.aligned 0;", flat, constraints, f32(), count)
    return [ended[i : i + each] for i in range(0, count, each)]


def store_shared_transposed(address: Word, words: Sequence[Word]) -> None:
    """Two 8 x 8 blocks of 16-bit numbers, a warp's fragments, each column of a block as one line of 16 bytes.

    Lanes 0 to 7 have the addresses of the first block's lines, 8 to 15 those of the second's.
    """
    asm("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};", [address, *words], "r,r,r")


def load_shared_transposed(address: Word) -> list[Word]:
    """Four 8 x 8 blocks of 16-bit numbers as fragments of their transposes.

    Lanes 0 to 7 have the addresses of the first block's lines, the next 8 those of the second's, and so on.
    """
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    return asm(text, [address], "=r,=r,=r,=r,r", i32(), 4)


def transposed_block(word: Word) -> Word:
    """The fragment of the transpose of an 8 x 8 block of 16-bit numbers."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [word], "=r,r", i32())


def products_of_codes(row: Sequence[Word], other_row: Sequence[Word], vector: Sequence[Word]) -> list[Float]:
    """The products of 16 rows of 64 e4m3 codes with 64 float16 numbers, by tensor cores: of rows l / 4 and l / 4 + 8 in lane l.

    row, other_row: 16 codes of each of the two rows, those from 16 (l % 4) on, as four words. vector: the 16 numbers of the
    vector from there on, as eight words.
    """
    lines = [".reg .b16 low, high;", ".reg .b32 a<4>;", ".reg .f32 even, odd, x, y;"]
    lines += [f"mov.f32 {register}, 0f00000000;" for register in ("even", "odd", "x", "y")]
    for i in range(4):
        for half, word in enumerate((f"${2 + i}", f"${6 + i}")):
            lines += [f"mov.b32 {{low, high}}, {word};"]
            lines += [f"cvt.rn.f16x2.e4m3x2 a{half}, low;", f"cvt.rn.f16x2.e4m3x2 a{2 + half}, high;"]
        sums = "{even, x, odd, y}"
        lines += [
            f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {{a0, a1, a2, a3}}, "
            f"{{${10 + 2 * i}, ${11 + 2 * i}}}, {sums};"
        ]
    lines += ["mov.f32 $0, even;", "mov.f32 $1, odd;"]
    text = "{\n" + "\n".join(lines) + "\n}"
    return asm(text, [*row, *other_row, *vector], "=f,=f" + ",r" * 16, f32(), 2)


def add_products(sums: Sequence[Float], row: Sequence[Word], other_row: Sequence[Word], column: Sequence[Word]) -> list[Float]:
    """sums + the products of 16 rows and 8 columns of 32 bfloat16 numbers each, by the tensor cores of a warp.

    row, other_row, column: of rows l / 4 and l / 4 + 8 and of column l / 4, the 8 numbers from 8 (l % 4) on, four words each.
    sums: in lane l two of row l / 4, of columns 2 (l % 4) and the next, and the same two of row l / 4 + 8.
    """
    lines = []
    for i in range(2):
        # In which order the numbers are summed does not matter.
        a = ", ".join(f"${8 + 4 * other + 2 * i + word}" for word in range(2) for other in range(2))
        b = ", ".join(f"${16 + 2 * i + word}" for word in range(2))
        before = "$4, $5, $6, $7" if i == 0 else "$0, $1, $2, $3"
        lines += [f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$0, $1, $2, $3}}, {{{a}}}, {{{b}}}, {{{before}}};"]
    constraints = "=&f,=&f,=&f,=&f" + ",f" * 4 + ",r" * 12
    return asm("\n".join(lines), [*sums, *row, *other_row, *column], constraints, f32(), 4)


def multiply_codes(codes: Sequence[Sequence[Word]], b: Descriptor, chunk: int, columns: int) -> list[Float]:
    """The product of 64 rows of 128 e4m3 codes and a float16 matrix [128, columns] in shared memory, by a warpgroup.

    codes: 16 codes each, as four words, of rows l / 4 and l / 4 + 8 of the warp's 16, for lane l: those from 16 (l % 4) on of
      the first 64 codes, then of the other 64.
    b: descriptor of 64 of the matrix's rows as lines of 64 numbers, a line a column; `chunk` bytes further are the other 64.
      Of the 16 bytes i of a line, word q is rows 16 q + 2 i and 16 q + 2 i + 1: the order in which the lanes have the codes.
    Returns as wgmma does, of every 8 columns, two of row l / 4 and the same two of l / 4 + 8.
    """
    sums, inputs = columns // 2, [word for piece in codes for word in piece]
    lines = [".reg .b16 low, high;", ".reg .b32 a<32>;", ".reg .b64 b;", ".reg .pred set, add;"]
    lines += [f"setp.eq.b32 set, ${sums + 17}, 0;", f"setp.ne.b32 add, ${sums + 17}, 0;"]
    for step in range(8):
        half, word = divmod(step, 4)
        for row in range(2):
            lines += [f"mov.b32 {{low, high}}, ${sums + 4 * (2 * half + row) + word};"]
            lines += [f"cvt.rn.f16x2.e4m3x2 a{4 * step + row}, low;", f"cvt.rn.f16x2.e4m3x2 a{4 * step + 2 + row}, high;"]
    lines += ["wgmma.fence.sync.aligned;"]
    registers = ", ".join(f"${i}" for i in range(sums))
    for step in range(8):
        half, word = divmod(step, 4)
        a = ", ".join(f"a{4 * step + i}" for i in range(4))
        lines += [
            f"add.s64 b, ${sums + 16}, {(half * chunk + 32 * word) >> 4};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{registers}}}, {{{a}}}, b, "
            f"{'add' if step else 'set'}, 1, 1, 0;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    constraints = ",".join(["=&f"] * sums + ["r"] * 16 + ["l", "n"])
    return asm("{\n" + "\n".join(lines) + "\n}", [*inputs, b, constant(1)], constraints, f32(), sums)
