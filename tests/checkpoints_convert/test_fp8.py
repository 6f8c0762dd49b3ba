"""FP8 is decoded by blocks from the top left, ragged at the end, with every way that scales are stored."""

import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import fp8
from tests.checkpoints_convert import files

# 576 rows: the width of a latent with its rotary part in the released models, four blocks and a half.
WEIGHT = np.random.RandomState(0).standard_normal((576, 200)).astype(np.float32) * np.linspace(0.1, 15, 576)[:, None]


def test_every_code_has_its_value():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)[None]
    found = fp8.dequantise(codes, np.ones((1, 2), np.float32), 0, (128, 128))
    np.testing.assert_array_equal(found, codes.astype(np.float32))
    assert found[0, 0x7E] == 448 and np.isnan(found[0, 0x7F])


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 200), (1000, 1000)])
def test_ragged_blocks(block):
    codes, scales = files.quantise(WEIGHT, block)
    assert scales.shape == fp8.scale_shape(WEIGHT.shape, block)
    found = fp8.dequantise(codes, scales, 0, block)
    np.testing.assert_array_equal(found, files.dequantise(codes, scales, block))
    assert np.abs(found - WEIGHT).max() < 0.07 * np.abs(WEIGHT).max()


def test_a_part_of_the_rows_takes_their_blocks():
    codes, scales = files.quantise(WEIGHT)
    assert scales.shape == (5, 2)
    whole = files.dequantise(codes, scales)
    np.testing.assert_array_equal(fp8.dequantise(codes[500:], scales, 500, (128, 128)), whole[500:])
    np.testing.assert_array_equal(fp8.dequantise(codes[127:129], scales, 127, (128, 128)), whole[127:129])


def test_scales_are_multipliers_however_they_are_stored():
    exponents = np.array([[0, 100, 127], [128, 140, 254]], np.uint8)
    powers = (2.0 ** (exponents.astype(np.float64) - 127)).astype(np.float32)
    for stored in (exponents, exponents.view(ml_dtypes.float8_e8m0fnu), powers, powers.astype(ml_dtypes.bfloat16)):
        found = fp8.decode_scale(stored)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, powers)


def test_the_block_size_is_the_config_s():
    assert fp8.block_size({}) == (128, 128)
    assert fp8.block_size({"quantization_config": None}) == (128, 128)
    assert fp8.block_size({"quantization_config": {"weight_block_size": None}}) == (128, 128)
    assert fp8.block_size({"quantization_config": {"weight_block_size": [64, 32]}}) == (64, 32)


@pytest.mark.parametrize("value", [128, [128], [128, 0], [128, -1], [128, 1.5], [True, 128], "ab"])
def test_a_bad_block_size_is_refused(value):
    with pytest.raises(ValueError, match=r"quantization_config\.weight_block_size: "):
        fp8.block_size({"quantization_config": {"weight_block_size": value}})
