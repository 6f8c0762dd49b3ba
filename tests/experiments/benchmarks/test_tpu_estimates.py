"""The counts behind docs/tpu.md on selections whose answer is known, and the page's places for them."""

import numpy as np
import pytest

from experiments.benchmarks import tpu_estimates
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from pallas_kernels import tpu


def test_touched_pages_of_known_unions():
    mask = np.zeros((1, 4, tpu_estimates.READ), bool)
    mask[0, 0, 0] = mask[0, 1, 33] = mask[0, 2, 33] = True
    assert tpu_estimates.touched(mask, 2, 32) == pytest.approx((2 + 1) / 2 / 128)
    assert tpu_estimates.touched(mask, 4, 256) == 1 / 16
    assert tpu_estimates.touched(mask, 1, 1) == pytest.approx(3 / 4 / tpu_estimates.READ)


def test_vector_rates_follow_from_the_published_ones():
    v5e, v5p = tpu.CHIPS["TPU v5 lite"], tpu.CHIPS["TPU v5"]
    assert tpu_estimates.vector_rate(v5e) == pytest.approx(1.503e9 * 4 * 1024, rel=1e-3)
    assert tpu_estimates.vector_rate(v5p) == pytest.approx(2 * 1.751e9 * 4 * 1024, rel=1e-3)


def test_the_dense_form_costs_what_a_page_share_of_one_does():
    config, chip = Config.from_hf(preset("30b")), tpu.CHIPS["TPU v5"]
    *_, pages, dense = tpu_estimates.prefill(config, 61_440, chip, 1.0, 1.0)
    assert pages.times(chip) == dense.times(chip)
    assert dense.multiplied == 2 * 2048 * 61_440 * 20 * (640 + 512)


def test_the_page_has_a_place_for_every_table():
    text = tpu_estimates.PAGE.read_text(encoding="utf-8")
    for name in ("unions", "30b v5e", "30b v5p", "glm-5 v5e", "glm-5 v5p"):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- end of {name} -->") == 1
