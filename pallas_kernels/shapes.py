"""Checks of arguments' shapes, with messages that name every argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax

Sizes = dict[str, int]


def check_shapes(
    operation: str,
    expected: Mapping[str, str],
    arrays: Sequence[jax.Array],
    derived: Mapping[str, Callable[[Sizes], int]],
) -> None:
    """Raises ValueError, with every argument's name, shape and letters, unless each letter stands for one size.

    Args:
      expected: the letters of every argument's axes by its name, such as {"queries": "B, S, H, D"}, in the order of `arrays`.
      derived: letters whose size follows from the others', such as {"ceil(T / 32)": lambda sizes: -(-sizes["T"] // 32)}.
    """
    letters = [axes.split(", ") for axes in expected.values()]
    fits = all(x.ndim == len(axes) for x, axes in zip(arrays, letters, strict=True))
    if fits:
        sizes: Sizes = {}
        for x, axes in zip(arrays, letters, strict=True):
            fits &= all(sizes.setdefault(letter, size) == size for letter, size in zip(axes, x.shape, strict=True))
        fits &= all(sizes[letter] == size_of(sizes) for letter, size_of in derived.items())
    if not fits:
        shapes = "; ".join(f"{name} [{axes}] is {x.shape}" for (name, axes), x in zip(expected.items(), arrays, strict=True))
        raise ValueError(f"{operation}: shapes do not fit together: {shapes}")
