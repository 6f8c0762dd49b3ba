"""How devices and processes share a run: its sequences over all devices, its groups over the devices of each process.

Sequences are independent of each other, so on a mesh each device takes its own through a layer, which it holds whole but for
experts where the rules split them. Groups are independent too, so each is trained on one device. Only the hidden states before
a group's layers have to come together in the process that trains it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from indexcache_jax import sharding

T = TypeVar("T")

BARRIER_HOURS = 24 * 7  # that a process waits for the others at most; one that is lost is missed much sooner
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part in a run: its devices on the mesh, none without a mesh, and which process of how many it is."""

    devices: tuple[jax.Device, ...] = ()
    process: int = 0
    processes: int = 1

    @classmethod
    def in_force(cls) -> Share:
        """That of the mesh in force.

        ValueError for a mesh that splits anything but rows, and experts. NotImplementedError for several processes, where
        this JAX has no barrier for them.
        """
        mesh, _ = sharding.current()
        if mesh is None:
            return cls()
        if sharding.devices_along("batch") != mesh.size:
            raise ValueError(f"mesh {dict(mesh.shape)}: indexers of a frozen model train on a mesh whose only axis is data")
        devices = jax.sharding.get_mesh().devices.ravel()
        processes, this = sorted({device.process_index for device in devices}), jax.process_index()
        own = tuple(device for device in devices if device.process_index == this)
        if len(processes) > 1:
            _barrier()
        return cls(own, processes.index(this), len(processes))

    def of(self, groups: list[T]) -> list[T]:
        """The groups that this process trains: processes take turns, so that all have some as the layers pass by."""
        return groups[self.process :: self.processes]

    def at_once(self, groups: int) -> int:
        """How many groups, of so many in a run, a process has on its host at once: one a device, and the one that is next."""
        return max(1, min(len(self.devices) + 1, -(-groups // self.processes))) if self.devices else 1

    def wait_for_others(self) -> None:
        """Waits for the other processes, on the hosts alone: what devices are doing goes on.

        Without it devices would wait, in the first operation that needs all of them, and could train nothing meanwhile.
        """
        if self.processes > 1:
            _barrier()(f"indexers {next(_barriers)}", BARRIER_HOURS * 3600 * 1000)


def _barrier() -> Callable[[str, int], object]:
    """Waits on the hosts for all processes to call it with the same name, for so many milliseconds at most.

    It is JAX's own, to which nothing public leads: the barriers of jax.experimental.multihost_utils run on devices.
    NotImplementedError where this JAX has it elsewhere.
    """
    try:
        from jax._src.distributed import global_state

        client: Any = global_state.client
        return client.wait_at_barrier
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"jax {jax.__version__}: indexers do not train in several processes with this release, which has its barrier "
            f"elsewhere ({error}); train them in one process"
        ) from None
