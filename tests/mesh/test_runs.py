"""A training run on a mesh, and its resumption on another one and on one device."""

import contextlib

import jax
import numpy as np
import pytest

from experiments.common import runs
from experiments.common.report import Output
from experiments.common.runs import Saving, TrainingRun
from indexcache_jax import params, sharding, training
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

CASE = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 2)
TOKENS = np.random.default_rng(0).integers(0, 97, 4000).astype(np.int32)
WARMUP = Stage("warm-up", "warmup", 4, 4, 32, 0.0, 1e-2, lr_warmup_steps=1, compute_dtype="float32")
RUN = TrainingRun(TOKENS, [WARMUP], CASE.config, CASE.schedule, 0)
ALL = {"data": 2, "context": 2, "tensor": 2}
OTHER = {"data": 4, "context": 2}


def use(sizes):
    return sharding.use(sharding.make_mesh(**sizes), TRAINING) if sizes else contextlib.nullcontext()


def train(folder, sizes, resume=False):
    with use(sizes):
        saving = Saving(every=2, keep=2, log_every=1)
        return runs.train(CASE.params, RUN, Output.create(str(folder)), resume=resume, saving=saving).params


class Killed(Exception):
    pass


def killed(folder, sizes, monkeypatch, after):
    """A run whose process ends before the step after so many."""
    real, taken = training.step, []

    def step(*arguments):
        if len(taken) == after:
            raise Killed
        taken.append(None)
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(training, "step", step)
        train(folder, sizes)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        differs = np.abs(np.asarray(a) - np.asarray(b)) / WARMUP.indexer_learning_rate
        assert np.mean(differs > 1e-2) < 1e-2


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return jax.device_get(train(tmp_path_factory.mktemp("one"), None))


def test_a_run_is_that_of_one_device_and_is_compiled_once(on_one_device, tmp_path, caplog):
    with use(ALL):
        runs.compile_steps([WARMUP], CASE.config, CASE.schedule)
        of_params = sharding.shardings(params.abstract(CASE.config, CASE.schedule), jax.sharding.get_mesh(), TRAINING)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = train(tmp_path, ALL)
    assert not [record for record in caplog.messages if "Finished XLA compilation of jit(step)" in record]
    jax.tree.map(lambda array, where: array.sharding.is_equivalent_to(where, array.ndim) or pytest.fail(), found, of_params)
    assert_close(found, on_one_device)


@pytest.mark.parametrize(
    "then", [pytest.param(OTHER, marks=pytest.mark.slow, id="another mesh"), pytest.param(None, id="one device")]
)
def test_a_run_goes_on_elsewhere(on_one_device, tmp_path, monkeypatch, then):
    killed(tmp_path, ALL, monkeypatch, after=3)
    assert_close(train(tmp_path, then, resume=True), on_one_device)
    assert [entry["step"] for entry in runs.read_log(tmp_path)] == [0, 1, 2, 3]


def test_weights_that_are_not_finite_are_named():
    broken = CASE.params.replace(final_norm=CASE.params.final_norm.at[1].set(np.inf))
    with use(ALL):
        placed = sharding.put(broken, params.abstract(CASE.config, CASE.schedule))
        assert training.non_finite_weights(placed, "sparse") == [".final_norm"]


@pytest.mark.slow
def test_held_out_losses_are_those_of_one_device():
    cuts = TOKENS[: 3 * 33].reshape(3, 33)
    expected = runs.evaluate(CASE.params, cuts, CASE.config, CASE.schedule, "float32")
    with use(ALL):
        placed = sharding.put(CASE.params, params.abstract(CASE.config, CASE.schedule))
        found = runs.evaluate(placed, cuts, CASE.config, CASE.schedule, "float32")
    np.testing.assert_allclose([found.language, found.indexer], [expected.language, expected.indexer], rtol=1e-5)
