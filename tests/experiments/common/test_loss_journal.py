"""Losses of a search in a file: known again after a kill, and refused to a search of something else."""

import json

import numpy as np
import pytest

from experiments.common.loss_journal import LossJournal
from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS, Case

CASE = Case(GLM_FIELDS | {"num_hidden_layers": 4}, "FFFF", 0)
BATCHES = [np.random.RandomState(seed).randint(0, 97, (1, 25)).astype(np.int32) for seed in range(2)]
ABOUT = {"weights": 1, "dtype": "float32"}


def test_losses_are_known_by_schedule_and_sequence_and_known_again(tmp_path):
    with LossJournal(tmp_path / "log", ABOUT) as log:
        assert log.get(Schedule("FS"), 0) is None
        log.add(Schedule("FS"), 0, 1 / 3)
        log.add(Schedule("FF"), 1, 2.0)
        assert log.get(Schedule("FS"), 0) == 1 / 3 and log.get(Schedule("FS"), 1) is None
    with LossJournal(tmp_path / "log", ABOUT) as log:
        assert (log.get(Schedule("FS"), 0), log.get(Schedule("FF"), 1), log.get(Schedule("FF"), 0)) == (1 / 3, 2.0, None)


def test_losses_of_something_else_are_refused(tmp_path):
    LossJournal(tmp_path / "log", ABOUT).close()
    with pytest.raises(ValueError, match="another weights: 1 there, 2 here"):
        LossJournal(tmp_path / "log", ABOUT | {"weights": 2})
    with open(tmp_path / "log", "a") as file:
        file.write('{"pattern": "FS", "sequence": 0}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object with pattern, sequence, loss"):
        LossJournal(tmp_path / "log", ABOUT)


def test_losses_on_another_text_are_refused_with_the_flags_that_decide_it(tmp_path):
    LossJournal(tmp_path / "log", search.fingerprint((), BATCHES)).close()
    with pytest.raises(ValueError, match=r"another calibration tokens: .* \(--text, --held_out, --sequences, .* decide them"):
        LossJournal(tmp_path / "log", search.fingerprint((), BATCHES[:1]))


def test_a_search_cut_off_within_any_line_ends_as_the_whole_one_does(tmp_path):
    def searched():
        with LossJournal(tmp_path / "log", ABOUT) as log:
            evaluator = search.Evaluator(CASE.params, CASE.config, CASE.schedule, BATCHES, log)
            return search.greedy_search(evaluator, CASE.schedule)

    steps = searched()
    whole = (tmp_path / "log").read_bytes()
    entries = [json.loads(line) for line in whole.splitlines()[1:]]
    assert len({(entry["pattern"], entry["sequence"]) for entry in entries}) == len(entries)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "log").write_bytes(whole[:size])
        assert searched() == steps
        assert sorted((tmp_path / "log").read_bytes().splitlines()) == sorted(whole.splitlines())
