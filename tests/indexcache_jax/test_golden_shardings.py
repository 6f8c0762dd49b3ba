"""A change of where weights and caches lie is seen: shardings of released models are compared with those committed."""

import pytest

from tests.support import golden_shardings


@pytest.mark.parametrize("model", golden_shardings.MODELS)
def test_shardings_are_those_committed(model):
    committed = (golden_shardings.FOLDER / f"{model}.txt").read_text(encoding="utf-8")
    again = "if the change of placement is meant, run: python -m tests.support.golden_shardings"
    assert golden_shardings.text(model).splitlines() == committed.splitlines(), again


def test_the_committed_files_are_those_of_the_models():
    assert {path.stem for path in golden_shardings.FOLDER.iterdir()} == set(golden_shardings.MODELS)
