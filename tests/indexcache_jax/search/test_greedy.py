"""The search: planted optima, an exhaustive naive greedy, resumption, how much compiles, the similarity DP."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import at_layer, init, with_schedule
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import greedy as search
from indexcache_jax.search import layerwise
from tests.support import numpy_reference
from tests.support.tiny_models import GLM_FIELDS, state, to_params

FIELDS = GLM_FIELDS | {"num_hidden_layers": 6}
CONFIG = Config.from_hf(FIELDS)
ALL = Schedule.all_full(6)


def tokens(seed: int, rows: int = 1, length: int = 41) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@dataclasses.dataclass
class Table:
    """A model that is a formula: the sum of what each S layer costs, plus what pairs of them cost together."""

    alone: tuple[float, ...]
    pairs: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def loss(self, schedule):
        off = [i for i, full in enumerate(schedule.is_full) if not full]
        return sum(self.alone[i] for i in off) + sum(self.pairs.get(p, 0.0) for p in itertools.combinations(off, 2))

    def flips(self, schedule, layers):
        self.asked.append((schedule.pattern, tuple(layers)))
        return {i: self.loss(schedule.shared(i)) for i in layers}


def test_commits_the_lowest_loss_and_gives_ties_to_the_lowest_layer():
    steps = search.greedy(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), num_full=2)
    assert [s.flipped for s in steps] == [(), (2,), (3,), (1,)]
    assert [s.schedule.pattern for s in steps] == ["FFFFF", "FFSFF", "FFSSF", "FSSSF"]
    assert [s.loss for s in steps] == [0, 1, 2, 4]
    assert steps[1].candidates == {1: 2, 2: 1, 3: 1, 4: 3}


def test_judges_flips_by_what_they_cost_beside_those_already_made():
    steps = search.greedy(Table((0, 1, 2, 3), {(1, 2): 10.0}), Schedule.all_full(4), num_full=2)
    assert steps[-1].schedule.pattern == "FSFS"


def test_stops_before_the_loss_exceeds_its_bound():
    steps = search.greedy(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), max_loss=2.0)
    assert steps[-1].schedule.pattern == "FFSSF"


def test_starts_from_a_schedule_with_shared_layers():
    steps = search.greedy(Table((0, 5, 0, 1, 2)), Schedule("FFSFF"), num_full=2)
    assert [s.schedule.pattern for s in steps] == ["FFSFF", "FFSSF", "FFSSS"]


def test_blocks_commit_one_flip_each_and_keep_their_first_layer():
    table = Table((0, 3, 1, 0, 0, 2, 9, 1))
    steps = search.greedy(table, Schedule.all_full(8), blocks=2, num_full=4)
    assert [s.flipped for s in steps] == [(), (3, 7), (2, 5)]
    assert [asked for _, asked in table.asked] == [(1, 2, 3, 5, 6, 7), (1, 2, 5, 6)]
    assert search.greedy(table, Schedule.all_full(8), blocks=2)[-1].schedule.pattern == "FSSSFSSS"


def test_blocks_take_only_the_best_flip_where_all_would_cost_too_much():
    table = Table((0, 1, 9, 0, 2, 9), {(1, 4): 50.0})
    assert search.greedy(table, Schedule.all_full(6), blocks=2, max_loss=10.0)[1].flipped == (1,)


def test_a_last_step_of_several_blocks_takes_no_more_than_asked():
    steps = search.greedy(Table((0, 2, 9, 0, 1, 9)), Schedule.all_full(6), blocks=2, num_full=5)
    assert steps[-1].schedule.pattern == "FFFFSF"


@pytest.mark.parametrize(
    "options, named", [({"num_full": 0}, "num_full: 0"), ({"num_full": 7}, "7"), ({"blocks": 9}, "blocks: 9")]
)
def test_settings_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        search.greedy(Table((0,) * 6), ALL, **options)


def test_with_at_most():
    steps = search.greedy(Table((0, 2, 1, 1, 3)), Schedule.all_full(5), num_full=3)
    assert search.with_at_most(steps, 4).schedule.pattern == "FFSFF"
    with pytest.raises(ValueError, match="ended at 3"):
        search.with_at_most(steps, 2)


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
    with pytest.raises(ValueError, match="layer 2 is F, but the params hold no indexer"):
        evaluator.loss(ALL)


def test_a_loss_that_is_not_finite_ends_the_search(params, tmp_path):
    broken = params.replace(final_norm=params.final_norm.at[0].set(jnp.nan))
    log = search.Log(tmp_path / "log", {})
    with pytest.raises(ValueError, match="loss of FFFFFF on batch 0 is nan"):
        search.greedy(search.Evaluator(broken, CONFIG, ALL, [tokens(0)], log), ALL)
    assert log.get(ALL, 0) is None


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
        flips = {i: reference_loss(weights, schedule.shared(i), batch) for i in schedule.full_layers[1:]}
        schedule = schedule.shared(min(flips, key=flips.__getitem__))
        expected.append((schedule, min(flips.values())))
    steps = search.greedy(search.Evaluator(params, CONFIG, ALL, [batch]), ALL)[1:]
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
    steps = search.greedy(search.Evaluator(params, CONFIG, ALL, [text]), ALL, num_full=2)
    assert steps[3].schedule.pattern == "FFSSFS"
    assert steps[3].loss == pytest.approx(steps[0].loss, abs=1e-5)
    assert steps[4].loss > steps[0].loss + 0.01


def test_compiles_three_programs_for_twelve_layers():
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 12})
    base = Schedule.all_full(12)
    evaluator = search.Evaluator(init(jax.random.key(0), config, base), config, base, [tokens(0), tokens(1)])
    programs = (layerwise.start, layerwise.advance, layerwise.finish)
    before = sum(p._cache_size() for p in programs)
    search.greedy(evaluator, base, num_full=11)
    evaluator.loss(Schedule.uniform(12, 3))
    assert sum(p._cache_size() for p in programs) - before <= 3


class Killed(Exception):
    pass


def test_resumes_after_a_kill_with_the_identical_result(params, tmp_path):
    batches, about = [tokens(0), tokens(1)], {"weights": 1}
    ran = []

    def search_it(log, progress=ran.append):
        return search.greedy(search.Evaluator(params, CONFIG, ALL, batches, log, progress), ALL, num_full=2)

    whole = search_it(search.Log(tmp_path / "whole", about))
    uninterrupted = sum(ran)
    ran.clear()

    def until_killed(layers):
        ran.append(layers)
        if sum(ran) > uninterrupted // 2:
            raise Killed

    with pytest.raises(Killed):
        search_it(search.Log(tmp_path / "log", about), until_killed)
    with open(tmp_path / "log", "a") as file:
        file.write('{"pattern": "FFFSFF", "batch": 0, "lo')  # cut off within a line
    ran.clear()
    assert search_it(search.Log(tmp_path / "log", about)) == whole
    assert 0 < sum(ran) < 0.7 * uninterrupted
    ran.clear()
    assert search_it(search.Log(tmp_path / "log", about)) == whole
    assert not ran
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[0] == about and len({(e["pattern"], e["batch"]) for e in lines[1:]}) == len(lines) - 1


def test_a_log_about_something_else_is_refused(tmp_path):
    search.Log(tmp_path / "log", {"weights": 1, "dtype": "float32"}).close()
    with pytest.raises(ValueError, match=r"another weights \(1 there, 2 here\)"):
        search.Log(tmp_path / "log", {"weights": 2, "dtype": "float32"})
    (tmp_path / "other").write_text("not JSON\n")
    with pytest.raises(ValueError, match="line 1 is not an evaluation"):
        search.Log(tmp_path / "other", {})


def test_fingerprints_tell_weights_and_text_apart(params):
    one = search.fingerprint(params, [tokens(0)])
    assert one == search.fingerprint(params, [tokens(0)])
    assert one["calibration tokens"] != search.fingerprint(params, [tokens(1)])["calibration tokens"]
    changed = params.replace(final_norm=params.final_norm * 1.5)
    assert one["weights"] != search.fingerprint(changed, [tokens(0)])["weights"]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_progress_never_runs_past_its_total(params, blocks):
    ran = []
    evaluator = search.Evaluator(params, CONFIG, ALL, [tokens(0)], progress=ran.append)
    search.greedy(evaluator, ALL, num_full=3, blocks=blocks)
    assert 0.4 < sum(ran) / search.layers_to_run(ALL, 3, blocks) <= 1


def test_similarities_compare_a_layers_outputs_with_anothers_indices(params):
    batch = tokens(2)
    found = search.similarities(params, CONFIG, ALL, [batch])
    np.testing.assert_allclose(np.diag(found), 1.0)
    assert np.isnan(found[0, 1]) and np.all(np.abs(found[np.tril_indices(6)]) <= 1 + 1e-6)
    # Layer 1 by hand.
    x = model.embed(params, jnp.asarray(batch[:, :-1]))
    positions = whole_rows(x, CONFIG)
    x, theirs = model.attention_block(model.attention_layer(params, 0, 0), x, None, positions, CONFIG, True)
    x = model.mlp_block(at_layer(params.dense, 0), params.mlp_norm[0], x, CONFIG)
    layer = model.attention_layer(params, 1, 1)
    a, b = (np.asarray(model.attention_block(layer, x, theirs, positions, CONFIG, full)[0] - x)[0] for full in (True, False))
    cosines = np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    assert found[1, 0] == pytest.approx(cosines.mean(), abs=1e-5) and cosines.mean() < 0.99
    with pytest.raises(ValueError, match="indexers of all layers"):
        search.similarities(params, CONFIG, Schedule("FFSFFF"), [batch])


def test_most_similar_equals_trying_all_schedules():
    similarity = np.tril(np.random.RandomState(0).rand(7, 7))
    np.fill_diagonal(similarity, 1.0)
    for num_full in range(1, 8):
        every = [Schedule("F" + "".join(c)) for c in itertools.product("FS", repeat=6)]
        every = [s for s in every if s.num_full == num_full]
        totals = {s: sum(similarity[i, j] for i, j in enumerate(s.source)) for s in every}
        assert totals[search.most_similar(similarity, num_full)] == pytest.approx(max(totals.values()))
    with pytest.raises(ValueError, match="num_full: 8"):
        search.most_similar(similarity, 8)
