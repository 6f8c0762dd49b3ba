"""What a search says of its noise, on losses that are made up."""

import numpy as np
import pytest

from experiments.common import search_noise
from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from tests.support.loss_tables import Table

ALL = Schedule.all_full(5)


def steps(sequences=16, race=None):
    """Layers 1 and 2 cost next to nothing and are hardly told apart, layer 3 costs more, layer 4 much more."""
    spread = [np.sin(2.1 * (layer + 1) * np.arange(sequences)) for layer in range(5)]
    alone = [cost * (1 + 0.3 * row) for cost, row in zip((0, 0.0010, 0.00103, 0.1, 1.0), spread, strict=True)]
    return search.greedy_search(Table(alone, sequences=sequences), ALL, race=race)


def test_a_change_has_its_standard_error():
    assert search_noise.change([2.0, 3.1], [2.0, 3.0]) == "+2.00% ± 2.00%"
    assert search_noise.change([2.0, 3.0], [2.0, 3.0]) == "+0.00%"
    assert search_noise.change([2.2], [2.0]) == "+10.00%"


def test_the_table_says_which_flips_are_within_noise_and_what_would_settle_them():
    header, cells = search_noise.steps_table(steps())
    rows = [dict(zip(header, row, strict=True)) for row in cells]
    assert [row["layers to S"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["closest other"] for row in rows] == ["2", "3", "4", "-"]
    assert rows[0]["within noise"] == "1 of 3" and int(rows[0]["sequences to settle"]) > 16
    assert [row["sequences to settle"] for row in rows[1:]] == ["settled"] * 3
    assert rows[2]["cost of the step"].startswith("+0.1") and " ± " in rows[2]["cost of the step"]


def test_a_flip_that_is_taken_back_is_named():
    taken_back = search.Step(Schedule("FFSSF"), (1.0, 2.0), flipped=(2, 3), restored=(1,))
    _, cells = search_noise.steps_table([search.Step(Schedule("FSFFF"), (1.0, 1.9)), taken_back])
    assert cells[0][1] == "2 3, 1 to F" and cells[0][4] == "-"


def test_the_cheapest_schedule_within_noise():
    noise = 0.05 * np.random.default_rng(1).standard_normal((3, 16))
    made = [
        search.Step(Schedule(pattern), tuple(losses))
        for pattern, losses in zip(("FFF", "FFS", "FSS"), (1 + noise[0], 1.0 + noise[1], 1.5 + noise[2]), strict=True)
    ]
    cheaper, margin = search_noise.cheapest_within_noise(made, Schedule("FFF"))
    assert cheaper.schedule.pattern == "FFS" and abs(margin.mean) < 0.05
    assert search_noise.cheapest_within_noise(made, Schedule("FFS")) is None


def test_sentences_say_what_is_open_and_name_a_cheaper_schedule_when_asked():
    found = steps()
    of_choice, of_cheaper = search_noise.sentences(found, found[2].schedule, name_cheaper=True)
    assert of_choice.startswith("On 16 calibration sequences 1 of the 2 steps to this schedule are within noise (95%)")
    needed = found[1].sequences_to_settle(0.05)
    counts = " and ".join(f"{count} sequences would settle 1 of them" for count in (64, 256) if needed <= count)
    ends = f"About {counts}." if counts else "Even 256 sequences would settle none of them."
    assert of_choice.endswith(ends)
    assert of_cheaper == "No schedule of the search with fewer indexers is within noise of it (95%)."
    assert len(search_noise.sentences(found, found[2].schedule, name_cheaper=False)) == 1
    few = search_noise.sentences(steps(sequences=2), found[2].schedule, name_cheaper=True)
    assert few[-1].startswith("2 calibration sequences are too few to name a cheaper schedule")
    alone = search_noise.sentences(steps(sequences=1), found[2].schedule, name_cheaper=True)
    assert alone == ["A single calibration sequence says nothing about noise: --sequences=8 does."]


def test_sentences_say_what_a_race_saved():
    found = steps(sequences=64, race=search.Race())
    lines = search_noise.sentences(found, found[-1].schedule, name_cheaper=False)
    share = int(lines[1].removeprefix("Schedules that cannot win were dropped early: ").split("%")[0])
    assert 25 < share < 75


def test_json_has_no_infinity():
    assert search_noise.as_json(search.Margin.between([1.0], [0.5])) == {"mean": 0.5, "error": None, "sequences": 1}
    assert search_noise.as_json(search.Margin(0.5, 0.1, 3)) == {"mean": 0.5, "error": pytest.approx(0.1), "sequences": 3}
