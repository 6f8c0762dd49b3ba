"""The rows of the quality tables: kept through kills, compared sequence by sequence, and laid out."""

import time

import numpy as np
import pytest

from experiments.common.report import Output
from experiments.reproduction import quality_tables, retrieval
from experiments.reproduction.quality_tables import Found, Result, Rows
from indexcache_jax.schedule import Schedule

LATER = time.perf_counter() + 1e6


def row(losses, solved=(1, 0), **more):
    """A row's value: long-range losses are half of the losses, of 2 tokens a sequence."""
    return {
        "losses": losses,
        "long_range": losses,
        "long_range_tokens": [2] * len(losses),
        "solved": {task: [[hit] for hit in solved] for task in retrieval.TASKS},
        **more,
    }


def result(**changes):
    patterns = {"all F": "FF", "1/2 uniform": "FS"}
    found = Found(patterns, {"all F": 1.0, "1/2 uniform": 1.5}, [])
    measured = {
        "untrained": {
            "all F": {0: row([1.0, 2.0]), 1: row([3.0, 4.0])},
            "1/2 uniform": {0: row([1.1, 2.2]), 1: row([3.3, 4.4])},
        },
        "indexers": {
            "all F": {0: row([1.0, 2.0], seconds=3.0)},
            "1/2 uniform": {0: row([1.0, 2.1], seconds=4.0, curve=[[0.0, 2.0], [9.0, 1.0]])},
        },
        "everything": {"all F": {0: row([0.5, 1.0])}, "1/2 uniform": {0: row([0.5, 1.0]), 1: row([1.0, 1.0])}},
    }
    given = dict(
        searches={"untrained": {0: found, 1: found}},
        measured=measured,
        domains=[],
        overlap=np.array([[1.0, 0.5], [0.5, 1.0]]),
        beside={"deep": (0.75, 0.25)},
        about=["Of a test."],
    )
    return Result(**(given | changes))


def test_intervals_over_seeds_are_students():
    mean, half = quality_tables.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(quality_tables.interval([1.0])[1])
    assert quality_tables.shown([1.0], 2) == "1.00" and quality_tables.shown([1.0, 1.0], 2) == "1.00 ± 0.00"


def test_ratios_have_the_interval_of_what_they_are_sums_of():
    rng = np.random.default_rng(1)
    hits = rng.random(400) < 0.3
    value, low, high = quality_tables.ratio(hits, np.ones(400))
    error = 1.96 * (value * (1 - value) / 400) ** 0.5
    assert value == hits.mean() and (low, high) == pytest.approx((value - error, value + error), abs=0.01)
    assert quality_tables.ratio([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)
    assert quality_tables.ratio([0.0, 1.0], [0.0, 2.0])[0] == 0.5  # a draw of the first alone has no ratio


def test_changes_are_paired_and_of_the_seeds_that_both_have():
    _, header, rows = quality_tables.overview(result())
    assert header == ["", "as it came", "indexers distilled", "everything distilled"]
    assert rows[0] == ["all F", "+0.00%", "+0.00%", "+0.00%"]
    assert rows[1][1].startswith("+10.00% ± ") and rows[1][2].startswith("+3.33% ± ")
    assert rows[1][3] == "+0.00%"  # against all F trained as long, of the one seed that it has


def test_a_way_s_table_has_every_measure():
    _, header, rows = quality_tables.way_table(result(), "untrained")
    assert header[:7] == ["", "schedules", "seeds", "loss", "change", "long-range loss", "its change"]
    assert rows[1][:4] == ["1/2 uniform", "`FS`", "2", "2.7500"] and rows[1][-1] == "47.4"
    assert rows[1][5].startswith("1.375 (") and rows[1][6] == "+10.0 % (+10.0 to +10.0)"
    assert rows[1][7].startswith("0.50 (") and len(rows[1]) == len(header)


def test_a_report_is_made_of_what_there_is(tmp_path):
    output = Output.create(str(tmp_path))
    whole = result()
    text = quality_tables.markdown("Title", whole, "1/2", quality_tables.write_plots(output, whole, Schedule("FF"), 0))
    for part in (
        "## What is lost",
        "## Everything distilled",
        "| indexers distilled | 7 |",
        "deep 0.750 and 0.250",
        "Of a test.",
    ):
        assert part in text
    assert (tmp_path / "training.png").exists() and (tmp_path / "overlap.png").exists()
    assert quality_tables.metrics(whole)["rows"]["untrained"]["1/2 uniform"]["1"]["loss"] == pytest.approx(3.85)
    nothing = result(searches={"untrained": {}}, measured={"untrained": {}}, overlap=None)
    assert "Of a test." in quality_tables.markdown("Title", nothing, "1/2", "")


def test_similarity_is_held_against_the_loss_step_by_step():
    steps = [
        {"full": 4, "similarity": [3.0, 2.0, 1.0], "loss": [1.0, 1.1, 1.2]},
        {"full": 3, "similarity": [1.0, 2.0], "loss": [1.0, 2.0]},
    ]
    turned = [{"full": 4, "similarity": [1.0, 2.0, 3.0], "loss": [1.0, 1.1, 1.2]}, steps[1]]
    found = [Found({}, {}, s) for s in (steps, turned)]
    rows = quality_tables.proxy_table(found)[1]
    assert len(rows) == 1 and rows[0][0] == "4"  # two flips have no order worth the name
    assert rows[0][1].startswith("0.00 ±") and rows[0][2].startswith("20.00 ± 0.00") and rows[0][3].startswith("10.00 ±")
    assert quality_tables.proxy_table(found[:1])[1][0][1] == "-1.00"


def test_rows_survive_a_kill_and_are_not_made_twice(tmp_path):
    path, about = tmp_path / "rows.jsonl", {"flags": {"context": 3}}
    rows = Rows(path, about, False, LATER)
    assert rows.once("free", 0, "FF", lambda: row([1.5]), "all F") == row([1.5])
    rows.close()
    with open(path, "ab") as file:
        file.write(b'{"part": "free", "seed": 1, "na')
    with pytest.raises(ValueError, match="holds an earlier run; --resume"):
        Rows(path, about, False, LATER)
    with pytest.raises(ValueError, match=r"another flags\.context: 3 there, 4 here"):
        Rows(path, {"flags": {"context": 4}}, True, LATER)
    rows = Rows(path, about, True, LATER)
    assert rows.once("free", 0, "FF", lambda: pytest.fail("made twice")) == row([1.5])
    assert rows.get("free", 1, "FF") is None and rows.once("free", 1, "FF", lambda: [2]) == [2]
    rows.close()
    assert len(path.read_text().splitlines()) == 3


def test_nothing_is_begun_after_the_deadline(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", {}, False, time.perf_counter() - 1)
    assert rows.once("free", 0, "FF", lambda: pytest.fail("begun")) is None and rows.skipped == 1
    rows.close()
