"""What a caller gives, checked before anything runs: a ValueError of one sentence names the argument and shows its value.

Types, shapes and dtypes are always checked, numbers where they are at hand: not within a function that is traced, not in
arrays on devices of other processes, and for what runs once a token not in those that an accelerator would have to finish
first. A check is therefore no part of any compiled program.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.foreign import escaped, shown

INT32_MAX = 2**31 - 1
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)


def described(value: Any) -> str:
    """A value as a message shows it: an array by its shape and dtype, what is neither an array nor simple by its type."""
    if isinstance(value, np.generic):
        return shown(value.item())
    if isinstance(value, _SIMPLE) or (isinstance(value, (list, tuple)) and all(isinstance(v, _SIMPLE) for v in value)):
        return shown(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {list(value.shape)} and dtype {value.dtype}"
    return f"a {escaped(type(value).__name__)}"


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of these bounds as an int; True and False are none."""
    bounds = "" if least is None else f" of at least {least}"
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ValueError(f"{name}: {described(value)} is not an integer{bounds}")
    if most is not None and number > most:
        raise ValueError(f"{name}: {shown(number)} is above {most}")
    return number


def is_real(value: Any) -> bool:
    """Whether a value is a number, and neither NaN nor a complex one; True and False are none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, numbers.Real) and not math.isnan(value)


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """A string that is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: {described(value)} is not one of {', '.join(allowed)}")
    return value


def dtype(name: str, value: Any, allowed: Collection[str]) -> np.dtype:
    """A dtype, or what names one, that is one of those allowed by name."""
    try:
        found = jnp.dtype(value)
    except TypeError:
        found = None
    if value is None or found is None or found.name not in allowed:
        raise ValueError(f"{name}: {shown(value)} is not one of {', '.join(allowed)}")
    return found


def path(name: str, value: Any) -> pathlib.Path:
    """The path that a string or a path object names; "" would be the folder that happens to be the current one."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name}: {described(value)} is not a path")
    return pathlib.Path(value)


def numbers_of(array: Any, wait: bool = True) -> np.ndarray | None:
    """An array's numbers; None where they do not exist yet or this process cannot read them.

    wait: whether to fetch them from accelerators too, not only from host memory.
    """
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            return None
        if not wait and any(device.platform != "cpu" for device in array.devices()):
            return None
    return np.asarray(array)


def is_text(value: Any) -> bool:
    """Whether a value is text, which has a length and entries like a list."""
    return isinstance(value, (str, bytes))


def integers(name: str, value: Any, axes: Sequence[str]) -> Any:
    """An array of integers that has these axes, none of them of length 0. Other sequences become NumPy arrays."""
    array = value
    if not isinstance(value, jax.Array):
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name}: rows differ in length; fill them up at the end, and give lengths") from None
    if array.ndim == len(axes) and array.size == 0:
        raise ValueError(f"{name}: an array of shape {list(array.shape)} holds nothing")
    if array.ndim != len(axes) or array.dtype.kind not in "iu":
        what = f"an array of shape {list(array.shape)} and dtype {array.dtype}"
        raise ValueError(f"{name}: {what}, not [{', '.join(axes)}] of integers")
    return array


def tokens(name: str, value: Any, vocab_size: int, axes: Sequence[str] = ("B", "S"), wait: bool = True, one: str = "") -> Any:
    """An array of these axes of numbers from 0 to below vocab_size; wait: as for `numbers_of`.

    one: what a message calls a single number, where the argument's name does not say so.
    """
    array = integers(name, value, axes)
    if (values := numbers_of(array, wait)) is not None:
        outside = (values < 0) | (values >= vocab_size)
        if outside.any():
            raise ValueError(f"{name}: {one}{values[outside][0]} is not one of the model's {vocab_size} tokens")
    return array


def lengths(value: Any, rows: int, width: int) -> Any:
    """How many tokens of each of so many rows count, [B] int32: from 0 to their width."""
    array = integers("lengths", value, ("B",))
    if array.shape != (rows,):
        raise ValueError(f"lengths: {array.shape[0]} of them for {rows} rows of tokens")
    if (values := numbers_of(array)) is not None:
        outside = (values < 0) | (values > width)
        if outside.any():
            raise ValueError(f"lengths: {values[outside][0]} is not between 0 and {width}, the width of tokens")
    return array if isinstance(array, jax.Array) else array.astype(np.int32)
