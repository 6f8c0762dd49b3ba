import numpy as np
import pytest

from pallas_kernels.shapes import check_shapes

EXPECTED = {"queries": "B, S, D", "keys": "B, T, D", "bits": "B, ceil(T / 2), S"}
DERIVED = {"ceil(T / 2)": lambda sizes: -(-sizes["T"] // 2)}


def check(*shapes):
    check_shapes("operation", EXPECTED, [np.zeros(shape) for shape in shapes], DERIVED)


def test_shapes_that_fit():
    check((2, 3, 4), (2, 5, 4), (2, 3, 3))


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (2, 5, 7), (2, 3, 3)), ((2, 3, 4), (2, 5, 4), (2, 2, 3)), ((2, 3), (2, 5, 4), (2, 3, 3))]
)
def test_shapes_that_do_not_fit_are_all_named(shapes):
    with pytest.raises(ValueError, match=r"operation: shapes do not fit together: queries \[B, S, D\] is \(2, 3") as error:
        check(*shapes)
    assert f"keys [B, T, D] is {shapes[1]}; bits [B, ceil(T / 2), S] is {shapes[2]}" in str(error.value)
