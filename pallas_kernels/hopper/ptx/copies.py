"""Copies that nothing waits for at once: from global to shared memory (cp.async), and to L2 (prefetch)."""

from __future__ import annotations

from pallas_kernels.hopper.ptx.registers import Address, Predicate, Word, asm


def copy_async(target: Word, source: Address, size: Word, pieces: int, target_step: int, source_step: int) -> None:
    """`pieces` cp.async of 16 bytes each; of every source only `size` bytes (16 or 0) are read, the rest becomes zero."""
    lines = [
        f"cp.async.cg.shared.global.L2::128B [$0+{i * target_step}], [$1+{i * source_step}], 16, $2;" for i in range(pieces)
    ]
    asm("\n".join(lines), [target, source, size], "r,l,r")


def copy_async_where(target: Word, source: Address, predicate: Predicate) -> None:
    """Starts one cp.async of 16 bytes, in the threads of the predicate."""
    asm("@$2 cp.async.cg.shared.global [$0], [$1], 16;", [target, source, predicate], "r,l,b")


def copy_async_word(target: Word, source: Address, size: Word) -> None:
    """A cp.async of 4 bytes, of which `size` (4 or 0) are read; else the word becomes zero."""
    asm("cp.async.ca.shared.global [$0], [$1], 4, $2;", [target, source, size], "r,l,r")


def copies_commit() -> None:
    """Makes one group of the copies that this thread started since the last commit."""
    asm("cp.async.commit_group;")


def copies_done(pending: int | None = None) -> None:
    """This thread waits until its cp.async have landed: without `pending` all, else all but its last so many groups."""
    asm("cp.async.wait_all;" if pending is None else f"cp.async.wait_group {pending};")


def prefetch(address: Address, size: Word, predicate: Predicate) -> None:
    """Asks for `size` bytes, a multiple of 16, to be brought to L2; nothing waits for them."""
    asm("@$2 cp.async.bulk.prefetch.L2.global [$0], $1;", [address, size, predicate], "l,r,b")


def prefetch_line(address: Address, predicate: Predicate) -> None:
    """Asks for the 128 bytes around an address to be brought to L2; nothing waits for them."""
    asm("@$1 prefetch.global.L2 [$0];", [address, predicate], "l,b")
