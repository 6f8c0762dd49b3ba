"""Addresses, loads and stores: shared memory, that of other blocks of a cluster, and global memory (ld, st)."""

from __future__ import annotations

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.ptx.registers import Value, as_value, asm, f32, i32, i64


def offset(base: Value, index: Value, scale: int) -> Value:
    """The 64-bit address `base` + `index` (32 bits, not negative) * `scale` bytes."""
    wide = arith.extui(i64(), index)
    return arith.addi(base, arith.muli(wide, arith.constant(i64(), scale)))


def shared_address(ref: Value) -> Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def global_address(ref: Value) -> Value:
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def load_global(address: Value) -> Value:
    """A 32-bit load of what nothing writes during the kernel."""
    return asm("ld.global.nc.b32 $0, [$1];", [address], "=r,l", i32())


def load_global_float(address: Value) -> Value:
    """A float32 of what nothing writes during the kernel."""
    return asm("ld.global.nc.f32 $0, [$1];", [address], "=f,l", ir.F32Type.get())


def store_global(address: Value, value: Value, predicate: Value) -> None:
    asm("@$2 st.global.b32 [$0], $1;", [address, value, predicate], "l,r,b")


def load_shared(address: Value) -> Value:
    return asm("ld.shared.b32 $0, [$1];", [address], "=r,r", i32())


def store_shared(address: Value, value: Value) -> None:
    asm("st.shared.b32 [$0], $1;", [address, value], "r,r")


def store_shared_pair(address: Value, pair: Sequence[Value]) -> None:
    """Two words that lie side by side."""
    asm("st.shared.v2.b32 [$0], {$1, $2};", [address, *pair], "r,r,r")


def store_shared_zeros(address: Value) -> None:
    """Writes 16 bytes."""
    asm("{\n.reg .b32 z;\nmov.b32 z, 0;\nst.shared.v4.b32 [$0], {z, z, z, z};\n}", [address], "r")


def or_shared(address: Value, bits: Value) -> Value:
    """Sets bits of a shared word atomically and returns the word as it was."""
    return asm("atom.shared.or.b32 $0, [$1], $2;", [address, bits], "=r,r,r", i32())


def peer_address(address: Value, rank: Value | int) -> Value:
    """The address of the same shared memory in block `rank` of the cluster."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", [address, as_value(rank)], "=r,r,r", i32())


def load_peer_float(address: Value) -> Value:
    return asm("ld.shared::cluster.f32 $0, [$1];", [address], "=f,r", ir.F32Type.get())


def load_peer_words(address: Value) -> list[Value]:
    """16 bytes as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.shared::cluster.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def store_global_words(address: Value, words: Sequence[Value], predicate: Value, *, passing: bool = False) -> None:
    """16 bytes; `passing` ones are the first that L2 gives up, so that it keeps what this kernel reads again."""
    how = ".cs" if passing else ""
    asm(f"@$5 st.global{how}.v4.b32 [$0], {{$1, $2, $3, $4}};", [address, *words, predicate], "l,r,r,r,r,b")


def load_words_or_zeros(address: Value, predicate: Value, count: int) -> list[Value]:
    """4 or 2 words of what nothing writes during the kernel, zeros where the predicate (0 or not) says so."""
    outputs = ", ".join(f"${i}" for i in range(count))
    zeros = "\n".join(f"mov.b32 ${i}, 0;" for i in range(count))
    ptx = (
        f"{{\n.reg .pred p;\nsetp.ne.b32 p, ${count + 1}, 0;\n{zeros}\n"
        f"@p ld.global.nc.L2::128B.v{count}.b32 {{{outputs}}}, [${count}];\n}}"
    )
    words = ir.Type.parse("!llvm.struct<(" + ", ".join(["i32"] * count) + ")>")
    loaded = asm(ptx, [address, predicate], ",".join(["=&r"] * count + ["l", "r"]), words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(count)]


def load_float_or_zero(address: Value, predicate: Value) -> Value:
    ptx = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0f00000000;\n@p ld.global.nc.f32 $0, [$1];\n}"
    return asm(ptx, [address, predicate], "=&f,l,r", ir.F32Type.get())


def store_shared_products(address: Value, pair: Sequence[Value], scale: Value) -> None:
    """8 e4m3 numbers (two words) times a float32 scale, as 8 bfloat16 (16 bytes) to a shared address."""
    lines = [".reg .b16 a<4>;", ".reg .b16 h<8>;", ".reg .b32 w<4>;", ".reg .f32 f<8>;", ".reg .b32 r<4>;"]
    lines += ["mov.b32 {a0, a1}, $1;", "mov.b32 {a2, a3}, $2;"]
    lines += [f"cvt.rn.f16x2.e4m3x2 w{i}, a{i};" for i in range(4)]
    lines += [f"mov.b32 {{h{2 * i}, h{2 * i + 1}}}, w{i};" for i in range(4)]
    lines += [f"cvt.f32.f16 f{i}, h{i};\nmul.f32 f{i}, f{i}, $3;" for i in range(8)]
    lines += [f"cvt.rn.bf16x2.f32 r{i}, f{2 * i + 1}, f{2 * i};" for i in range(4)]
    lines += ["st.shared.v4.b32 [$0], {r0, r1, r2, r3};"]
    asm("{\n" + "\n".join(lines) + "\n}", [address, *pair, scale], "r,r,r,f")


def load_shared_float(address: Value) -> Value:
    return asm("ld.shared.f32 $0, [$1];", [address], "=f,r", f32())


def load_shared_floats(address: Value) -> list[Value]:
    """Two that lie side by side."""
    pair = ir.Type.parse("!llvm.struct<(f32, f32)>")
    loaded = asm("ld.shared.v2.f32 {$0, $1}, [$2];", [address], "=f,=f,r", pair)
    return [llvm.extractvalue(f32(), loaded, [i]) for i in range(2)]


def store_shared_floats(address: Value, pair: Sequence[Value]) -> None:
    asm("st.shared.v2.f32 [$0], {$1, $2};", [address, *pair], "r,f,f")


def load_words(address: Value) -> list[Value]:
    """16 bytes, as four words, of what is read once and nothing writes during the kernel."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = asm(text, [address], "=r,=r,=r,=r,l", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def load_shared_words(address: Value) -> list[Value]:
    """16 bytes as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def store_shared_words(address: Value, words: Sequence[Value]) -> None:
    asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [address, *words], "r,r,r,r,r")


def store_global_bfloat16(address: Value, x: Value, predicate: Value) -> None:
    ptx = "{\n.reg .b16 h;\ncvt.rn.bf16.f32 h, $1;\n@$2 st.global.b16 [$0], h;\n}"
    asm(ptx, [address, x, predicate], "l,f,b")


def load_fresh(address: Value) -> Value:
    """A 32-bit load of what another block wrote before the grid met: not through L1."""
    return asm("ld.global.cg.b32 $0, [$1];", [address], "=r,l", i32())


def load_fresh_pair(address: Value) -> list[Value]:
    """8 bytes of the same as two words."""
    loaded = asm("ld.global.cg.v2.b32 {$0, $1}, [$2];", [address], "=r,=r,l", ir.Type.parse("!llvm.struct<(i32, i32)>"))
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(2)]


def load_fresh_words(address: Value) -> list[Value]:
    """16 bytes of the same as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,l", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]
