"""What 8 bits change, measured on a mesh: what one device measures."""

import numpy as np
import pytest

from checkpoints_convert import load
from experiments.benchmarks import precision
from tests.checkpoints_convert import files
from tests.support import meshes
from tests.support.eight_bits import ALIGNED


@pytest.mark.slow
def test_measures_are_those_of_one_device(tmp_path):
    stored, _ = files.quantised(ALIGNED)
    directory = files.write_checkpoint(tmp_path, files.config_fields(ALIGNED), stored)
    cuts = np.random.default_rng(0).integers(0, ALIGNED.config.vocab_size, (1, 65)).astype(np.int32)

    def measure():
        whole, in_8_bits = (load(directory, dtype="float32", form="serving", weights=w)[2] for w in (None, "fp8"))
        return precision.measure(whole, in_8_bits, cuts, ALIGNED.config, ALIGNED.schedule)

    expected = measure()
    with meshes.use("split cache"):
        found = measure()
    for name, one in found.items():
        assert one["loss_unrounded"] == pytest.approx(expected[name]["loss_unrounded"], rel=1e-5)
        assert one["loss"] == pytest.approx(expected[name]["loss"], abs=1e-3)  # a rounding may fall to the next code
        assert one["selected_alike"] == pytest.approx(expected[name]["selected_alike"], abs=0.02)
    assert found["fp8 latents"]["selected_alike"] == [1.0] * ALIGNED.schedule.num_full
