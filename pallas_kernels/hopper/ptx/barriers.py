"""Barriers of a block's threads, of copies (mbarrier), of a cluster and of a grid, and fences."""

from __future__ import annotations

from pallas_kernels.hopper.ptx.control import when
from pallas_kernels.hopper.ptx.registers import Address, Predicate, Word, asm, i32
from pallas_kernels.hopper.ptx.warp import thread


def block_barrier() -> None:
    """A barrier of all threads of the block."""
    asm("bar.sync 0;")


def barrier_init(address: Word, arrivals: int) -> None:
    """Makes an mbarrier of so many arrivals at a shared address; `barrier_init_done` follows the last one."""
    asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [address], "r")


def barrier_init_done() -> None:
    """Makes the mbarriers that this thread has initialised visible to the cluster."""
    asm("fence.mbarrier_init.release.cluster;")


def barrier_arrive(address: Word, predicate: Predicate | None = None) -> None:
    """An arrival of every thread, or of those for which `predicate` holds."""
    arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
    if predicate is None:
        asm(arrive, [address], "r")
    else:
        asm(f"@$1 {arrive}", [address, predicate], "r,b")


def barrier_arrive_after_copies(address: Word) -> None:
    """This thread arrives once all its cp.async so far have landed."""
    asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [address], "r")


def barrier_wait(address: Word, parity: Word) -> None:
    """Waits until the mbarrier has completed its phase of this parity: 0 for the first, 1 for the second, and so on in turn."""
    asm(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1, 0x989680;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}",
        [address, parity],
        "r,r",
    )


def proxy_fence() -> None:
    """What ordinary instructions and cp.async wrote to shared memory so far is seen by wgmma and TMA from here on."""
    asm("fence.proxy.async.shared::cta;")


def cluster_barrier() -> None:
    """A barrier of all threads of the cluster, after which all see what any wrote to shared memory before."""
    asm("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;")


def cluster_exit() -> None:
    """A barrier of all threads of the cluster before they end, so that no shared memory goes while others read it."""
    asm("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;")


def barrier(identity: int, threads: int) -> None:
    """The named barrier `identity` of `threads` threads of the block; number 0 is that of the whole block."""
    asm(f"barrier.cta.sync {identity}, {threads};")


def barrier_aligned(identity: Word, threads: int) -> None:
    """As `barrier`, with its number in a register; the threads of a warp pass it together."""
    asm(f"bar.sync $0, {threads};", [identity], "r")


def barrier_any(identity: int, threads: int, predicate: Predicate) -> Word:
    """A named barrier of `threads` threads that returns 1 to all of them if the predicate holds for any, else 0."""
    return asm(
        f"{{\n.reg .pred p;\nbarrier.cta.red.or.pred p, {identity}, {threads}, $1;\nselp.b32 $0, 1, 0, p;\n}}",
        [predicate],
        "=r,b",
        i32(),
    )


def grid_arrive(counter: Address, blocks: int) -> Word:
    """This block has written what others wait for. Returns what `grid_wait` waits for.

    The counter is zero when the first grid of a sequence starts, and every grid adds `blocks` to it at each barrier.
    """
    block_barrier()
    ptx = (
        "{\n.reg .pred p;\n.reg .b32 old;\nmov.b32 old, 0;\nsetp.eq.u32 p, $2, 0;\n"
        "@p atom.add.release.gpu.global.u32 old, [$1], 1;\nmov.b32 $0, old;\n}"
    )
    old = asm(ptx, [counter, thread()], "=r,l,r", i32())
    return (old // blocks + 1) * blocks


def grid_wait(counter: Address, target: Word) -> None:
    """Waits until all blocks have arrived; what they wrote before is then seen by `load_fresh`."""
    with when(thread().equals(0)):
        asm(
            "{\n.reg .pred done;\n.reg .b32 seen;\nAGAIN:\nld.acquire.gpu.global.u32 seen, [$0];\n"
            "sub.s32 seen, seen, $1;\nsetp.ge.s32 done, seen, 0;\n@!done bra AGAIN;\n}",
            [counter, target],
            "l,r",
        )
    block_barrier()
