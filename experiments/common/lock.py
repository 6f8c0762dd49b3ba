"""A folder that one run at a time writes into."""

from __future__ import annotations

import fcntl
import os
import pathlib
import weakref


class Lock:
    """Holds a folder for this process for as long as the object lives; a kill lets go of it. Nothing is written.

    ValueError, naming --output_dir, where another process holds it.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output_dir={directory}: another run writes there; wait for it, or choose another") from None
        except OSError:  # a file system without locks
            return


_held: weakref.WeakValueDictionary[pathlib.Path, Lock] = weakref.WeakValueDictionary()


def hold(directory: pathlib.Path) -> Lock:
    """The lock of a folder, which this process may hold several times."""
    path = directory.resolve()
    lock = _held.get(path)
    if lock is None:
        lock = _held[path] = Lock(path)
    return lock
