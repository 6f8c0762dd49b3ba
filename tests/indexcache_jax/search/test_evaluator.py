"""Losses of a model in memory: the model's own, an exhaustive naive greedy, resumption, how much compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import model, search
from indexcache_jax.config import Config
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from tests.support import numpy_reference
from tests.support.loss_log import MemoryLog
from tests.support.tiny_models import GLM_FIELDS, state, to_params

FIELDS = GLM_FIELDS | {"num_hidden_layers": 6}
CONFIG = Config.from_hf(FIELDS)
ALL = Schedule.all_full(6)


def tokens(seed: int, rows: int = 1, length: int = 41) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return to_params(state(CONFIG, ALL, 3), CONFIG, ALL)


def static_loss(params, schedule, batch):
    logits = model.forward(with_schedule(params, ALL, schedule), jnp.asarray(batch[:, :-1]), CONFIG, schedule)
    return float(-jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch[:, 1:])[..., None], axis=-1)))


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSF", "FSSSSS"])
def test_evaluator_agrees_with_the_program_compiled_for_the_schedule(params, pattern):
    batches = [tokens(0, rows=2), tokens(1, rows=2)]
    expected = np.mean([static_loss(params, Schedule(pattern), b) for b in batches])
    assert search.Evaluator(params, CONFIG, ALL, batches).loss(Schedule(pattern)) == pytest.approx(expected, abs=1e-5)


def test_evaluator_of_params_without_some_indexers(params):
    shipped = Schedule("FFSFSF")
    evaluator = search.Evaluator(with_schedule(params, ALL, shipped), CONFIG, shipped, [tokens(0)])
    assert evaluator.loss(Schedule("FFSSSF")) == pytest.approx(static_loss(params, Schedule("FFSSSF"), tokens(0)), abs=1e-5)
    with pytest.raises(ValueError, match="layer 2 is F, but the weights have no indexer"):
        evaluator.loss(ALL)


def test_a_loss_that_is_not_finite_ends_the_search(params):
    broken = params.replace(final_norm=params.final_norm.at[0].set(jnp.nan))
    log = MemoryLog()
    with pytest.raises(ValueError, match="loss of FFFFFF on sequence 0 is nan"):
        search.greedy_search(search.Evaluator(broken, CONFIG, ALL, [tokens(0)], log), ALL)
    assert log.get(ALL, 0) is None


def test_a_schedule_is_found_by_one_call(params):
    batches = [tokens(0, rows=2), tokens(1, rows=2)]
    steps = search.greedy_search(search.Evaluator(params, CONFIG, ALL, batches), ALL, num_full=4)
    found = search.find_schedule(params, CONFIG, ALL, np.concatenate(batches), num_full=4, batch_size=2)
    assert found == steps[-1].schedule and found.num_full == 4
    for arguments, message in (
        (dict(tokens=tokens(0, rows=3), num_full=4, batch_size=2), "batch_size: 2 does not divide 3 sequences"),
        (dict(tokens=tokens(0, length=9), num_full=4), "tokens: sequences of 8 tokens; up to index_topk = 8 every"),
        (dict(tokens=tokens(0) + 1000, num_full=4), "is not one of the model's"),
        (dict(tokens=tokens(0), num_full=40), "num_full: 40 is not between"),
    ):
        with pytest.raises(ValueError, match=message):
            search.find_schedule(params, CONFIG, ALL, **arguments)


def test_evaluator_wants_batches_of_one_shape(params):
    with pytest.raises(ValueError, match="one shape is needed"):
        search.Evaluator(params, CONFIG, ALL, [tokens(0), tokens(0, length=30)])


def reference_loss(weights, schedule, batch):
    trace = numpy_reference.forward(weights, FIELDS, schedule.is_full, batch[:, :-1], (batch.shape[1] - 1,) * len(batch))
    logits = trace.logits
    norm = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), axis=-1)) + logits.max(-1)
    return float(np.mean(norm - np.take_along_axis(logits, batch[:, 1:, None], axis=-1)[..., 0]))


def test_equals_a_naive_greedy_with_every_candidate_by_a_full_float64_forward(params):
    weights, batch = state(CONFIG, ALL, 3), tokens(5, rows=2)
    schedule, expected = ALL, []
    while schedule.num_full > 1:
        flips = {i: reference_loss(weights, schedule.with_shared(i), batch) for i in schedule.full_layers[1:]}
        schedule = schedule.with_shared(min(flips, key=flips.__getitem__))
        expected.append((schedule, min(flips.values())))
    steps = search.greedy_search(search.Evaluator(params, CONFIG, ALL, [batch]), ALL)[1:]
    assert [s.schedule for s in steps] == [s for s, _ in expected]
    np.testing.assert_allclose([s.loss for s in steps], [loss for _, loss in expected], atol=5e-5)


def test_finds_planted_layers_that_need_no_indexer_of_their_own(params):
    """Layers whose attention adds nothing can share for free; the text is the model's own, so all else costs."""
    planted = (2, 3, 5)
    out = params.attention.out.at[jnp.array(planted)].set(0.0)
    params = params.replace(attention=params.attention.replace(out=out), head=params.head * 8)
    text = np.zeros((1, 40), np.int32)
    text[0, :12] = tokens(7, length=12)
    for t in range(12, 40):
        logits = model.forward(params, jnp.asarray(text), CONFIG, ALL, jnp.array([t]))
        text[0, t] = int(jnp.argmax(logits[0, t - 1]))
    steps = search.greedy_search(search.Evaluator(params, CONFIG, ALL, [text]), ALL, num_full=2)
    assert steps[3].schedule.pattern == "FFSSFS"
    assert steps[3].loss == pytest.approx(steps[0].loss, abs=1e-5)
    assert steps[4].loss > steps[0].loss + 0.01


def test_compiles_three_programs_for_twelve_layers():
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 12})
    base = Schedule.all_full(12)
    evaluator = search.Evaluator(to_params(state(config, base, 3), config, base), config, base, [tokens(0), tokens(1)])
    programs = (layerwise.start, layerwise.advance, layerwise.finish)
    before = sum(p._cache_size() for p in programs)
    search.greedy_search(evaluator, base, num_full=11)
    evaluator.loss(Schedule.uniform(12, 3))
    assert sum(p._cache_size() for p in programs) - before <= 3


class Killed(Exception):
    pass


SEARCHES = {
    "greedy": search.greedy_search,
    "greedy, raced": functools.partial(search.greedy_search, race=search.Race(error=0.5)),
    "floating, raced": functools.partial(search.floating_search, race=search.Race(error=0.5)),
}


@pytest.mark.parametrize("searched", SEARCHES.values(), ids=SEARCHES)
def test_resumes_after_a_kill_with_the_identical_result(params, searched):
    batches, log, ran = [tokens(seed, rows=2) for seed in range(4)], MemoryLog(), []

    def search_it(log, progress=ran.append):
        return searched(search.Evaluator(params, CONFIG, ALL, batches, log, progress), ALL, num_full=2)

    whole = search_it(None)
    uninterrupted = sum(ran)
    ran.clear()

    def until_killed(layers):
        ran.append(layers)
        if sum(ran) > uninterrupted // 2:
            raise Killed

    with pytest.raises(Killed):
        search_it(log, until_killed)
    ran.clear()
    for key in list(log.losses)[-1:]:  # as if the kill came between the sequences of a batch
        del log.losses[key]
    assert search_it(log) == whole
    assert 0 < sum(ran) < 0.7 * uninterrupted
    ran.clear()
    assert search_it(log) == whole
    assert not ran


def test_fingerprints_tell_weights_and_text_apart(params):
    one = search.fingerprint(params, [tokens(0)])
    assert one == search.fingerprint(params, [tokens(0)])
    assert one["calibration tokens"] != search.fingerprint(params, [tokens(1)])["calibration tokens"]
    changed = params.replace(final_norm=params.final_norm.at[-1].mul(1.5))
    assert one["weights"] != search.fingerprint(changed, [tokens(0)])["weights"]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_progress_never_runs_past_its_total(params, blocks):
    ran = []
    evaluator = search.Evaluator(params, CONFIG, ALL, [tokens(0)], progress=ran.append)
    search.greedy_search(evaluator, ALL, num_full=3, blocks=blocks)
    assert 0.4 < sum(ran) / search.layers_to_run(ALL, 3, blocks) <= 1
