"""Addresses, loads and stores: shared memory, that of other blocks of a cluster, and global memory (ld, st, red, atom).

Of several registers at once: words are four, pairs two; where it says so, `count`. A predicate says which threads do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.ptx.registers import Address, Float, Predicate, Word, as_value, asm, f32, i32, i64


def offset(base: Address, index: Word, scale: int) -> Address:
    """The address `base` + `index` (a word, not negative) * `scale` bytes."""
    wide = arith.extui(i64(), index)
    return Address(arith.addi(base, arith.muli(wide, arith.constant(i64(), scale))))


def shared_address(ref: Any) -> Word:
    return Word(llvm.ptrtoint(i32(), utils.memref_ptr(ref)))


def global_address(ref: Any) -> Address:
    return Address(llvm.ptrtoint(i64(), utils.memref_ptr(ref)))


def load_global(address: Address) -> Word:
    """A 32-bit load of what nothing writes during the kernel."""
    return asm("ld.global.nc.b32 $0, [$1];", [address], "=r,l", i32())


def load_global_float(address: Address) -> Float:
    """A float32 of what nothing writes during the kernel."""
    return asm("ld.global.nc.f32 $0, [$1];", [address], "=f,l", f32())


def store_global(address: Address, value: Word, predicate: Predicate) -> None:
    asm("@$2 st.global.b32 [$0], $1;", [address, value, predicate], "l,r,b")


def load_shared(address: Word) -> Word:
    return asm("ld.shared.b32 $0, [$1];", [address], "=r,r", i32())


def load_shared_pair(address: Word) -> list[Word]:
    """Two words that lie side by side."""
    return asm("ld.shared.v2.b32 {$0, $1}, [$2];", [address], "=r,=r,r", i32(), 2)


def load_shared_short(address: Word, predicate: Predicate) -> Word:
    """A 16-bit number, 0 without the predicate."""
    text = "{\n.reg .b16 h;\nmov.b16 h, 0;\n@$2 ld.shared.u16 h, [$1];\ncvt.u32.u16 $0, h;\n}"
    return asm(text, [address, predicate], "=r,r,b", i32())


def _where(text: str, arguments: Sequence[ir.Value], constraints: str, predicate: Predicate | None) -> None:
    if predicate is None:
        asm(text, arguments, constraints)
    else:
        asm(f"@${len(arguments)} {text}", [*arguments, predicate], f"{constraints},b")


def store_shared(address: Word, value: Word | int, predicate: Predicate | None = None) -> None:
    _where("st.shared.b32 [$0], $1;", [address, as_value(value)], "r,r", predicate)


def store_shared_pair(address: Word, pair: Sequence[Word], predicate: Predicate | None = None) -> None:
    """Two words that lie side by side."""
    _where("st.shared.v2.b32 [$0], {$1, $2};", [address, *pair], "r,r,r", predicate)


def store_shared_short(address: Word, value: Word, predicate: Predicate) -> None:
    """The lower 16 bits."""
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, $1;\n@$2 st.shared.b16 [$0], h;\n}", [address, value, predicate], "r,r,b")


def append_at_least(xs: Sequence[Float], threshold: Float, address: Word, position: Word) -> None:
    """Stores (bits, position + i) of the floats xs[i] >= threshold, i < 4, one after the other from the shared address on."""
    text = "{\n.reg .pred p;\n.reg .b32 a, q;\nmov.b32 a, $0;\n"
    for i in range(4):
        text += f"add.u32 q, $1, {i};\nsetp.ge.f32 p, ${3 + i}, $2;\n@p st.shared.v2.b32 [a], {{${3 + i}, q}};\n"
        text += "@p add.u32 a, a, 8;\n"
    asm(text + "}", [address, position, threshold, *xs], "r,r,f,f,f,f,f")


def increment_shared(address: Word, predicate: Predicate) -> None:
    """Adds 1 atomically."""
    asm("@$1 red.shared.add.u32 [$0], 1;", [address, predicate], "r,b")


def store_shared_zeros(address: Word) -> None:
    """Writes 16 bytes."""
    asm("{\n.reg .b32 z;\nmov.b32 z, 0;\nst.shared.v4.b32 [$0], {z, z, z, z};\n}", [address], "r")


def or_shared(address: Word, bits: Word) -> Word:
    """Sets bits of a shared word atomically and returns the word as it was."""
    return asm("atom.shared.or.b32 $0, [$1], $2;", [address, bits], "=r,r,r", i32())


def peer_address(address: Word, rank: Word | int) -> Word:
    """The address of the same shared memory in block `rank` of the cluster."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", [address, as_value(rank)], "=r,r,r", i32())


def load_peer_float(address: Word) -> Float:
    return asm("ld.shared::cluster.f32 $0, [$1];", [address], "=f,r", f32())


def load_peer_words(address: Word) -> list[Word]:
    """16 bytes as four words."""
    return asm("ld.shared::cluster.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", i32(), 4)


def store_global_words(address: Address, words: Sequence[Word], predicate: Predicate, *, passing: bool = False) -> None:
    """16 bytes; `passing` ones are the first that L2 gives up, so that it keeps what this kernel reads again."""
    how = ".cs" if passing else ""
    asm(f"@$5 st.global{how}.v4.b32 [$0], {{$1, $2, $3, $4}};", [address, *words, predicate], "l,r,r,r,r,b")


def load_global_words_or_zeros(address: Address, predicate: Word, count: int) -> list[Word]:
    """4 or 2 words of what nothing writes during the kernel, zeros where the predicate (0 or not) says so."""
    outputs = ", ".join(f"${i}" for i in range(count))
    zeros = "\n".join(f"mov.b32 ${i}, 0;" for i in range(count))
    ptx = (
        f"{{\n.reg .pred p;\nsetp.ne.b32 p, ${count + 1}, 0;\n{zeros}\n"
        f"@p ld.global.nc.L2::128B.v{count}.b32 {{{outputs}}}, [${count}];\n}}"
    )
    return asm(ptx, [address, predicate], ",".join(["=&r"] * count + ["l", "r"]), i32(), count)


def load_global_float_or_zero(address: Address, predicate: Word) -> Float:
    ptx = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0f00000000;\n@p ld.global.nc.f32 $0, [$1];\n}"
    return asm(ptx, [address, predicate], "=&f,l,r", f32())


def load_shared_float(address: Word) -> Float:
    return asm("ld.shared.f32 $0, [$1];", [address], "=f,r", f32())


def load_shared_floats(address: Word, count: int = 2) -> list[Float]:
    """Loads `count` floats, 2 or 4, that lie side by side."""
    outputs = ", ".join(f"${i}" for i in range(count))
    text = f"ld.shared.v{count}.f32 {{{outputs}}}, [${count}];"
    return asm(text, [address], ",".join(["=f"] * count + ["r"]), f32(), count)


def store_shared_floats(address: Word, floats: Sequence[Float]) -> None:
    """Stores 2 or 4 floats side by side."""
    inputs = ", ".join(f"${i + 1}" for i in range(len(floats)))
    asm(f"st.shared.v{len(floats)}.f32 [$0], {{{inputs}}};", [address, *floats], "r" + ",f" * len(floats))


def load_global_words(address: Address) -> list[Word]:
    """16 bytes, as four words, of what is read once and nothing writes during the kernel."""
    text = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];"
    return asm(text, [address], "=r,=r,=r,=r,l", i32(), 4)


def load_shared_words(address: Word) -> list[Word]:
    """16 bytes as four words."""
    return asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", i32(), 4)


def store_shared_words(address: Word, words: Sequence[Word]) -> None:
    asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [address, *words], "r,r,r,r,r")


def store_global_bfloat16(address: Address, x: Float, predicate: Predicate) -> None:
    ptx = "{\n.reg .b16 h;\ncvt.rn.bf16.f32 h, $1;\n@$2 st.global.b16 [$0], h;\n}"
    asm(ptx, [address, x, predicate], "l,f,b")


def load_fresh(address: Address) -> Word:
    """A 32-bit load of what another block wrote before the grid met: not through L1."""
    return asm("ld.global.cg.b32 $0, [$1];", [address], "=r,l", i32())


def load_fresh_pair(address: Address) -> list[Word]:
    """8 bytes of the same as two words."""
    return asm("ld.global.cg.v2.b32 {$0, $1}, [$2];", [address], "=r,=r,l", i32(), 2)


def load_fresh_words(address: Address) -> list[Word]:
    """16 bytes of the same as four words."""
    return asm("ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,l", i32(), 4)


def load_global_floats_or_nan(address: Address, predicate: Predicate) -> list[Float]:
    """Four floats from a 16-byte boundary of what nothing writes during the kernel, NaN without the predicate."""
    fill = "".join(f"mov.b32 ${i}, 0x7fffffff;\n" for i in range(4))
    load = "@$5 ld.global.nc.L1::no_allocate.v4.f32 {$0, $1, $2, $3}, [$4];\n"
    return asm("{\n" + fill + load + "}", [address, predicate], "=&f,=&f,=&f,=&f,l,b", f32(), 4)
