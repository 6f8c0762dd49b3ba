"""Checkpoint directories that the tests share."""

import pytest

from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """glm-mixed as a float32 Hugging Face directory in three shards."""
    case = CASES["glm-mixed"]
    return files.write_checkpoint(tmp_path_factory.mktemp("source") / "hf", files.config_fields(case), case.state, shards=3)
