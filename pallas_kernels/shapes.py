"""Checks of arguments' shapes, with messages that name every argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax

Sizes = dict[str, int]


def check_shapes(
    operation: str,
    expected: Mapping[str, str],
    arrays: Sequence[jax.Array | None],
    derived: Mapping[str, Callable[[Sizes], int]],
) -> None:
    """Raises ValueError, with every argument's name, shape and letters, unless each letter stands for one size.

    Args:
      expected: the letters of every argument's axes by its name, such as {"queries": "B, S, H, D"}, in the order of `arrays`.
        One that is None is left out.
      derived: letters whose size follows from the others', such as {"ceil(T / 32)": lambda sizes: -(-sizes["T"] // 32)}.
    """
    given = [(name, axes, x) for (name, axes), x in zip(expected.items(), arrays, strict=True) if x is not None]
    letters = [(axes.split(", "), x) for _, axes, x in given]
    fits = all(x.ndim == len(axes) for axes, x in letters)
    if fits:
        sizes: Sizes = {}
        for axes, x in letters:
            fits &= all(sizes.setdefault(letter, size) == size for letter, size in zip(axes, x.shape, strict=True))
        fits &= all(sizes[letter] == size_of(sizes) for letter, size_of in derived.items())
    if not fits:
        shapes = "; ".join(f"{name} [{axes}] is {x.shape}" for name, axes, x in given)
        raise ValueError(f"{operation}: shapes do not fit together: {shapes}")
