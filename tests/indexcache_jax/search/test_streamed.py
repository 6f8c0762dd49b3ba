"""Losses by layers that are read when they are needed: those of the whole model, from as few passes as memory allows."""

import jax
import numpy as np
import pytest

from indexcache_jax import search
from indexcache_jax.params import Params, abstract, with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap, streamed
from indexcache_jax.tensors import leaves
from tests.support.loss_log import MemoryLog
from tests.support.tiny_models import CASES, Case

CASE = CASES["glm-mixed"]  # FFSFS, dense layers 0 and 1
SCHEDULES = [Schedule(pattern) for pattern in ("FFSFS", "FSSFS", "FFSSS", "FSSSS")]


class OneByOne:
    """The layers of params in memory, and which were asked for."""

    def __init__(self, case: Case = CASE, schedule: Schedule | None = None, params: Params | None = None) -> None:
        self.config, self.schedule = case.config, schedule or case.schedule
        self._params, self._tree = params or case.params, abstract(self.config, self.schedule)
        self.weights = None
        self.asked: list[int] = []

    def _some(self, place, shardings) -> Params:
        """Of each leaf what `place` says of its tensor: a slot of the stack, "whole" or None."""
        places = [place(tensor) for _, tensor in leaves(self._tree)]
        found = [
            None if at is None else jax.device_put(np.asarray(leaf if at == "whole" else leaf[at : at + 1]), sharding)
            for at, leaf, sharding in zip(places, jax.tree.leaves(self._params), jax.tree.leaves(shardings), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self._tree), found)

    def ends(self, shardings) -> Params:
        return self._some(lambda tensor: "whole" if tensor.layers is None else None, shardings)

    def layer(self, layer: int, shardings) -> Params:
        self.asked.append(layer)
        return self._some(lambda tensor: tensor.layers.index(layer) if layer in (tensor.layers or ()) else None, shardings)


def batches(count: int = 2, rows: int = 2, case: Case = CASE) -> list[np.ndarray]:
    rng = np.random.RandomState(0)
    return [rng.randint(0, case.config.vocab_size, (rows, 41)).astype(np.int32) for _ in range(count)]


def whole(case: Case = CASE, **options) -> search.Evaluator:
    return search.Evaluator(case.params, case.config, case.schedule, batches(case=case), **options)


@pytest.mark.parametrize("name", ["glm-unusual", "deepseek-mixed"])
def test_losses_are_those_of_the_model_in_memory(name):
    case = CASES[name]
    schedules = [case.schedule, *(case.schedule.with_shared(i) for i in case.schedule.full_layers[1:])]
    found = streamed.StreamedEvaluator(OneByOne(case), batches(case=case)).losses(schedules)
    np.testing.assert_allclose(found, whole(case).losses(schedules), atol=1e-5)


def test_the_greedy_search_is_the_same():
    layers = OneByOne()
    steps = search.greedy_search(streamed.StreamedEvaluator(layers, batches()), CASE.schedule)
    expected = search.greedy_search(whole(), CASE.schedule)
    assert [s.schedule for s in steps] == [s.schedule for s in expected]
    np.testing.assert_allclose([s.loss for s in steps], [s.loss for s in expected], atol=1e-5)
    assert layers.asked == [0, 1, 2, 3, 4] * len(steps)  # a pass for the start and one for each step


def test_a_raced_floating_search_is_the_same_and_reads_the_weights_once_a_comparison():
    layers, race, given = OneByOne(), search.Race(error=0.5, growth=2), batches(8)
    steps = search.floating_search(streamed.StreamedEvaluator(layers, given), CASE.schedule, race=race)
    in_memory = search.Evaluator(CASE.params, CASE.config, CASE.schedule, given)
    expected = search.floating_search(in_memory, CASE.schedule, race=race)
    assert [s.schedule for s in steps] == [s.schedule for s in expected]
    np.testing.assert_allclose([s.losses for s in steps], [s.losses for s in expected], atol=1e-5)
    table = Counting(in_memory)
    search.floating_search(table, CASE.schedule, race=race)
    assert layers.asked == [0, 1, 2, 3, 4] * table.asked


class Counting:
    """An oracle that counts how often something is asked of it that was not known before."""

    def __init__(self, oracle: search.LossOracle) -> None:
        self.oracle, self.known, self.asked = oracle, set(), 0
        self.num_batches, self.rows = oracle.num_batches, oracle.rows

    def sequence_losses(self, schedules, base=None, batches=None):
        wanted = {(s.pattern, number) for s in schedules for number in batches or range(self.num_batches)}
        self.asked += not wanted <= self.known
        self.known |= wanted
        return self.oracle.sequence_losses(schedules, base, batches)


def test_memory_says_how_many_batches_a_pass_has():
    config, width = CASE.config, 40
    state = 2 * width * (4 * config.hidden_size + 4 * config.index_topk)  # bytes of two rows
    everything = whole().losses(SCHEDULES)
    for memory, passes in ((8 * state, 1), (8 * state - 1, 2), (0, 2)):
        layers = OneByOne()
        found = streamed.StreamedEvaluator(layers, batches(), memory=memory).losses(SCHEDULES)
        assert layers.asked == [0, 1, 2, 3, 4] * passes
        np.testing.assert_allclose(found, everything, atol=1e-5)


def test_schedules_share_the_layers_below_their_difference():
    ran = []
    streamed.StreamedEvaluator(OneByOne(), batches(1), progress=ran.append).losses(SCHEDULES)
    # One state after layer 0, two after 1 (F and S) and after 2, four after 3 and 4.
    assert sum(ran) == 1 + 2 + 2 + 4 + 4


def test_what_the_log_knows_is_not_run_again():
    log = MemoryLog()
    first = streamed.StreamedEvaluator(OneByOne(), batches(), log).losses(SCHEDULES[:2])
    layers = OneByOne()
    again = streamed.StreamedEvaluator(layers, batches(), log)
    assert again.losses(SCHEDULES[:2]) == first and not layers.asked
    again.losses(SCHEDULES)
    assert layers.asked == [0, 1, 2, 3, 4]


def test_selections_have_the_overlap_of_the_model_in_memory():
    queries = overlap.spread(40, CASE.config.index_topk)
    evaluator = streamed.StreamedEvaluator(OneByOne(), batches(), memory=0)
    found = overlap.mean_overlap(evaluator.selections(CASE.schedule, range(2), queries), CASE.config.index_topk)
    np.testing.assert_array_equal(found, overlap.layer_overlap(CASE.params, CASE.config, CASE.schedule, batches()))


def test_a_layer_without_an_indexer_cannot_be_full():
    with pytest.raises(ValueError, match="FFFFS: layer 2 is F, but the weights have no indexer"):
        streamed.StreamedEvaluator(OneByOne(), batches()).loss(Schedule("FFFFS"))


def test_a_loss_that_is_not_finite_is_no_loss():
    layers = OneByOne(params=CASE.params.replace(final_norm=CASE.params.final_norm.at[0].set(np.nan)))
    with pytest.raises(ValueError, match="loss of FFSFS on sequence 0 is nan"):
        streamed.StreamedEvaluator(layers, batches()).loss(CASE.schedule)


def test_a_layer_that_cannot_be_read_says_why():
    class Torn(OneByOne):
        def layer(self, layer: int, shardings) -> Params:
            if layer == 3:
                raise ValueError("layer 3 is torn")
            return super().layer(layer, shardings)

    with pytest.raises(ValueError, match="layer 3 is torn"):
        streamed.StreamedEvaluator(Torn(), batches()).loss(CASE.schedule)


def test_params_of_fewer_indexers_are_judged_as_they_are():
    schedule = Schedule("FSSFS")
    layers = OneByOne(schedule=schedule, params=with_schedule(CASE.params, CASE.schedule, schedule))
    found = streamed.StreamedEvaluator(layers, batches()).loss(Schedule("FSSSS"))
    assert found == pytest.approx(whole().loss(Schedule("FSSSS")), abs=1e-5)
