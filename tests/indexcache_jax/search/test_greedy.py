"""The greedy search over a model that is a formula: planted optima, ties, blocks, bounds; the log of losses."""

import pytest

from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from tests.support.loss_tables import Table

ALL = Schedule.all_full(6)


def test_commits_the_lowest_loss_and_gives_ties_to_the_lowest_layer():
    steps = search.greedy_search(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), num_full=2)
    assert [s.flipped for s in steps] == [(), (2,), (3,), (1,)]
    assert [s.schedule.pattern for s in steps] == ["FFFFF", "FFSFF", "FFSSF", "FSSSF"]
    assert [s.loss for s in steps] == [0, 1, 2, 4]
    assert steps[1].candidates == {1: 2, 2: 1, 3: 1, 4: 3}


def test_judges_flips_by_what_they_cost_beside_those_already_made():
    steps = search.greedy_search(Table((0, 1, 2, 3), {(1, 2): 10.0}), Schedule.all_full(4), num_full=2)
    assert steps[-1].schedule.pattern == "FSFS"


def test_stops_before_the_loss_exceeds_its_bound():
    steps = search.greedy_search(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), max_loss=2.0)
    assert steps[-1].schedule.pattern == "FFSSF"


def test_starts_from_a_schedule_with_shared_layers():
    steps = search.greedy_search(Table((0, 5, 0, 1, 2)), Schedule("FFSFF"), num_full=2)
    assert [s.schedule.pattern for s in steps] == ["FFSFF", "FFSSF", "FFSSS"]


def test_blocks_commit_one_flip_each_and_keep_their_first_layer():
    table = Table((0, 3, 1, 0, 0, 2, 9, 1))
    steps = search.greedy_search(table, Schedule.all_full(8), blocks=2, num_full=4)
    assert [s.flipped for s in steps] == [(), (3, 7), (2, 5)]
    second = ["FSFSFFFS", "FFSSFFFS", "FFFSFSFS", "FFFSFFSS"]  # flips of layers 1, 2, 5 and 6
    assert second in table.asked and [len(asked) for asked in table.asked] == [1, 6, 2, 1, 4, 2, 1]


def test_blocks_end_in_single_flips_where_the_number_of_layers_asks_for_them():
    """5 of 8 layers lie between two steps of 2 flips; of 1 layer, the first ones of blocks have to be flipped too."""
    table = Table((0, 3, 1, 0, 0, 2, 9, 1))
    by_blocks = search.greedy_search(table, Schedule.all_full(8), blocks=2, num_full=5)
    assert [s.flipped for s in by_blocks] == [(), (3, 7), (4,)]
    down = search.greedy_search(table, Schedule.all_full(8), blocks=2)
    assert [s.schedule.num_full for s in down] == [8, 6, 4, 2, 1] and down[-1].flipped == (4,)


def test_blocks_take_only_the_best_flip_where_all_would_cost_too_much():
    table = Table((0, 1, 9, 0, 2, 9), {(1, 4): 50.0})
    assert search.greedy_search(table, Schedule.all_full(6), blocks=2, max_loss=10.0)[1].flipped == (1,)


def test_a_last_step_of_several_blocks_takes_no_more_than_asked():
    steps = search.greedy_search(Table((0, 2, 9, 0, 1, 9)), Schedule.all_full(6), blocks=2, num_full=5)
    assert steps[-1].schedule.pattern == "FFFSFF"


@pytest.mark.parametrize(
    "options, named", [({"num_full": 0}, "num_full: 0"), ({"num_full": 7}, "7"), ({"blocks": 9}, "blocks: 9")]
)
def test_settings_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        search.greedy_search(Table((0,) * 6), ALL, **options)


def test_first_step_with_at_most():
    steps = search.greedy_search(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), num_full=3)
    assert search.first_step_with_at_most(steps, 4).schedule.pattern == "FFSFF"
    with pytest.raises(ValueError, match="ended at 3"):
        search.first_step_with_at_most(steps, 2)
    by_two = search.greedy_search(Table((0,) * 6), Schedule.all_full(6), num_full=2, blocks=2)
    assert [step.schedule.num_full for step in by_two] == [6, 4, 2]
    assert search.first_step_with_at_most(by_two, 5) is by_two[1]
