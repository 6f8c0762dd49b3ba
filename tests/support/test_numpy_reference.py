"""The float64 forward is held against transformers wherever that runs the same model."""

import numpy as np
import pytest

from tests.support import numpy_reference, recordings
from tests.support.tiny_models import CASES, RECORDED


@pytest.mark.parametrize("name", RECORDED)
def test_equals_transformers(name, reference):
    logits, indices = recordings.read(name)
    trace = reference(name)
    np.testing.assert_allclose(trace.logits, logits, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(np.stack(trace.indices), indices)


@pytest.mark.parametrize("name", CASES)
def test_no_choice_of_a_case_is_a_near_tie(name, reference):
    """Otherwise float32 rounding could flip one, and a right program would look wrong."""
    assert reference(name).index_gap > numpy_reference.MIN_GAP
    assert reference(name).expert_gap > numpy_reference.MIN_GAP


def test_selection_cuts_ties_at_the_lowest_position():
    case = CASES["glm-one-indexer"]
    state = case.state
    state["model.layers.0.self_attn.indexer.weights_proj.weight"][:] = 0  # every score is 0
    trace = numpy_reference.forward(state, case.fields, case.schedule.is_full, case.tokens, case.lengths)
    np.testing.assert_array_equal(trace.indices[0][0, 59], np.arange(8))
