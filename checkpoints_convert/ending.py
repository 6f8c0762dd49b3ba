"""How a command ends: with one line for an error, in seconds after Ctrl-C or SIGTERM, and without anything half-made."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import jax

from indexcache_jax.foreign import escaped

GRACE_SECONDS = 3.0  # from a signal to the end, whatever the process is doing, such as compiling
MAX_LINE = 2000  # characters of an error
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")  # as libraries pass them on

# Files and folders that are being written beside what they will become.
_unfinished: set[pathlib.Path] = set()


@contextlib.contextmanager
def unfinished(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file or folder that is to be removed where the block does not end as it should, also at an end by a signal."""
    _unfinished.add(path)
    try:
        yield path
    except BaseException:
        _remove(path)
        raise
    finally:
        _unfinished.discard(path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class DiskFull(OSError):
    """A full disk; the message names the file and how much it wanted."""


@contextlib.contextmanager
def writing(path: pathlib.Path, nbytes: int | None = None) -> Iterator[None]:
    """Makes an error of a full disk, of the system or of a library, one that names the file and what it wanted."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if (why := full_disk(error)) is None:
            raise
        wanted = "" if nbytes is None else f"; it takes {nbytes:,} bytes, {shutil.disk_usage(path.parent).free:,} are free"
        raise DiskFull(f"{path}: {why}{wanted}") from None


def full_disk(error: BaseException) -> str | None:
    """What an error says of a full disk; None for another error."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    return next((words for words in _FULL_WORDS if words in str(error)), None)


def one_line(error: BaseException, smaller: str = "") -> str | None:
    """The line in which a command says what is wrong; None for an error that is a fault of the program.

    smaller: the flags that make what is computed smaller, for an error of memory.
    """
    text = escaped(str(error), MAX_LINE)
    if isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in text and full_disk(error) is None):
        first = next(iter(str(error).strip().splitlines()), "how much was wanted is not known")
        return f"out of memory: {escaped(first, 300)}{f'; {smaller} makes it smaller' if smaller else ''}"
    if isinstance(error, (ValueError, NotImplementedError, OSError)) or full_disk(error) is not None:
        return text
    if isinstance(error, (RuntimeError, AssertionError)) and (why := _missing_device()):
        return why
    return None


def _missing_device() -> str | None:
    """Why JAX has no device; None where it has one."""
    try:
        jax.devices()
    except Exception as error:
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.values["jax_platforms"] or ""
        first = escaped(str(error).strip().splitlines()[0], 300) if str(error).strip() else "JAX finds none"
        return f"JAX_PLATFORMS={wanted}: there is no such device here, or it cannot be used: {first}"
    return None


class Ending:
    """What a process does at Ctrl-C and SIGTERM while it runs a command: it says `line` and ends, in seconds."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.signal: int | None = None
        self._said = False
        self._done = threading.Event()

    def code(self) -> int:
        """The exit status after a signal."""
        return 128 + (self.signal or signal.SIGINT)

    def say(self) -> None:
        """Writes the line, once."""
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError):
                os.write(2, f"{self.line}\n".encode())

    def end(self) -> NoReturn:
        """Says the line and ends the process at once: what Python does at an end waits for threads, which may compile."""
        self.say()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(self.code())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:  # a second one may not disturb the tidying up
            self.signal = number
            raise KeyboardInterrupt

    def _watch(self, descriptor: int) -> None:
        """Waits for a signal, and ends the process where Python has not done so in time: code in C++ goes on at a signal."""
        with open(descriptor, "rb", buffering=0) as pipe:
            while (content := pipe.read(1)) and content[0] not in _SIGNALS:
                pass
        if content and not self._done.wait(GRACE_SECONDS):
            self.signal = self.signal or content[0]
            for path in list(_unfinished):
                _remove(path)
            self.end()

    def _passed_over(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Says nothing of a KeyboardInterrupt where Python cannot raise it: `_watch` ends the process."""
        if not (self.signal and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            sys.__unraisablehook__(unraisable)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within the block both signals raise KeyboardInterrupt, and end the process where that does not."""
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        woken = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        hook, sys.unraisablehook = sys.unraisablehook, self._passed_over
        threading.Thread(target=self._watch, args=(readable,), daemon=True, name="ending").start()
        try:
            yield
        finally:
            self._done.set()
            sys.unraisablehook = hook
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writable)


def end_well(run: Callable[[], None], line: str, smaller: str = "") -> None:
    """Runs a command. At an error it exits with 1 and one line, after Ctrl-C and SIGTERM with 130 and 143 and `line`.

    smaller: as for `one_line`.
    """
    ending = Ending(line)
    try:
        with ending.in_force():
            run()
    except KeyboardInterrupt:
        ending.end()
    except Exception as error:
        if ending.signal is not None:  # which library code that was interrupted makes another error of
            ending.end()
        if (said := one_line(error, smaller)) is None:
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        sys.exit(1)
