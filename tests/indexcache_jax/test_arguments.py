"""Careless calls: what is not what an argument should be is named with its value, before anything runs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_convert
from indexcache_jax import (
    CacheFormat,
    Config,
    Sampling,
    Schedule,
    arguments,
    decode_step,
    forward,
    generate,
    init,
    init_cache,
    prefill,
    preset,
    search,
    serving,
    training,
)
from indexcache_jax.config import Rope
from indexcache_jax.params import with_schedule
from tests.support.tiny_models import CASES, GLM_FIELDS

CASE = CASES["glm-mixed"]
P, C, S, T = CASE.params, CASE.config, CASE.schedule, CASE.tokens
OTHER = Config.from_hf(GLM_FIELDS | {"hidden_size": 128})
SHORT = Schedule("FF")
NO_SCHEDULE = r"schedule: 'FFSFS' is not a Schedule; Schedule\.parse makes one"
NO_CONFIG = r"config: a dict is not a Config; Config\.from_hf reads one"


class Oracle:
    """Gives no losses: whatever is wrong must be said before one is asked for."""

    num_batches = rows = 1

    def sequence_losses(self, schedules, base=None, batches=None):
        raise AssertionError("asked")


def weights():
    return serving.from_params(P, C, S)


def cache(rows=2, length=64, schedule=S, config=C):
    return init_cache(config, schedule, rows, length, "float32")


def full_cache():
    return cache().replace(lengths=jnp.array([3, 64]))


def stage(**fields):
    return training.Stage(**{"name": "a", "kind": "warmup", "steps": 1, "rows": 1, "context": 8} | RATES | fields)


RATES = {"model_learning_rate": 0.0, "indexer_learning_rate": 1e-3}
DEMO = "experiments/assets/demo"
CALLS = {
    "a schedule that is text": (lambda: forward(P, T, C, "FFSFS"), NO_SCHEDULE),
    "a config that is a dict": (lambda: forward(P, T, GLM_FIELDS, S), NO_CONFIG),
    "another shape": (lambda: forward(P, T, OTHER, S), r"params: embedding has shape \[97, 64\], but .* make it \[97, 128\]"),
    "a schedule of another length": (lambda: forward(P, T, C, SHORT), r"'FF' has 2 entries for 5 layers"),
    "no params": (lambda: forward(None, T, C, S), "params: None is not Params"),
    "arguments in another order": (lambda: forward(T, P, C, S), r"params: an array of shape \[2, 60\] .* is not Params"),
    "a length below 0": (lambda: forward(P, T, C, S, [-1, 60]), "lengths: -1 is not between 0 and 60"),
    "a length above S": (lambda: forward(P, T, C, S, jnp.array([61, 60])), "lengths: 61 is not between 0 and 60"),
    "a length for two rows": (lambda: forward(P, T, C, S, [60]), "lengths: 1 of them for 2 rows"),
    "lengths of floats": (lambda: forward(P, T, C, S, [6.0, 5.0]), r"lengths: .* dtype float64, not \[B\] of integers"),
    "no token": (lambda: forward(P, T[:, :0], C, S), r"tokens: an array of shape \[2, 0\] holds nothing"),
    "no row": (lambda: forward(P, T[:0], C, S), r"tokens: an array of shape \[0, 60\] holds nothing"),
    "prompts that are text": (lambda: generate(P, "hello", C, S, 4), "prompts: 'hello' is not a list of rows"),
    "a prompt that is text": (lambda: generate(P, ["hello"], C, S, 4), "prompt 0: 'hello' is text"),
    "a prompt beside a list": (lambda: generate(P, [1, 2], C, S, 4), "prompt 0: 1 is not a row of token numbers"),
    "a prompt of floats": (lambda: generate(P, [[1.5]], C, S, 4), r"prompt 0: .* dtype float64, not \[S\] of integers"),
    "new tokens that are text": (lambda: generate(P, [[1]], C, S, "4"), "max_new_tokens: '4' is not an integer"),
    "half a token": (lambda: generate(P, [[1]], C, S, 4.5), "max_new_tokens: 4.5 is not an integer"),
    "sampling that is a number": (lambda: generate(P, [[1]], C, S, 4, sampling=0.7), "sampling: 0.7 is not a Sampling"),
    "a stop token": (lambda: generate(P, [[1]], C, S, 4, stop_tokens=5), "stop_tokens: 5 is not a list"),
    "stop tokens of text": (lambda: generate(P, [[1]], C, S, 4, stop_tokens=["</s>"]), "stop_tokens: '</s>' is not an integer"),
    "ids of 64 bits": (lambda: generate(P, [[1]], C, S, 4, ids=[2**40]), "ids: 1099511627776 is above"),
    "a cache without room": (lambda: generate(P, [[1]], C, S, 4, cache_len=3), "cache_len: 3 leaves no room"),
    "a cache of 3 bits": (lambda: generate(P, [[1]], C, S, 4, cache_format="int3"), "latent_dtype: 'int3' is not one of"),
    "a document that is text": (lambda: generate(P, [[1]], C, S, 4, document="abc"), "document: 'abc' is text"),
    "a document of 3 rows": (lambda: generate(P, [[1]], C, S, 4, document=cache(3)), "cache: has 3 rows for 1 rows"),
    "a cache of another schedule": (
        lambda: prefill(P, T, [60, 60], cache(schedule=Schedule("FFFFF")), C, S),
        "cache: holds the index keys of schedule FFFFF, not of FFSFS",
    ),
    "a cache of another model": (
        lambda: prefill(P, T, [60, 60], cache(config=Config.from_hf(GLM_FIELDS | {"kv_lora_rank": 64})), C, S),
        "cache: its latents have 80 numbers, but config makes them 48",
    ),
    "no cache": (lambda: prefill(P, T, [60, 60], None, C, S), "cache: None is not a Cache"),
    "a cache that is too short": (
        lambda: prefill(P, T, [5, 60], cache(length=16), C, S),
        "cache: row 1 holds 0 tokens of at most 16, and 60 more come",
    ),
    "a token that is none, in a chunk": (lambda: prefill(P, T + 97, [60, 60], cache(), C, S), "tokens: .* is not one of the"),
    "a token that is none, in a step": (
        lambda: decode_step(P, jnp.array([9999, 1]), cache(), C, S),
        "token: 9999 is not one of the model's 97 tokens",
    ),
    "a token a row too many": (lambda: decode_step(P, [1], cache(), C, S), "cache: has 2 rows for 1 rows"),
    "a token past the end": (lambda: decode_step(P, [1, 1], full_cache(), C, S), "cache: row 1 holds 64 tokens of at most 64"),
    "no steps": (lambda: serving.decode(weights(), [1, 1], cache(), C, steps=0), "steps: 0 is not an integer of at least 1"),
    "half a row": (lambda: init_cache(C, S, 2.5, 16), "batch: 2.5 is not an integer"),
    "a seed for a key": (lambda: init(0, C, S), r"key: 0 is not a random key; jax\.random\.key makes one"),
    "a dtype that is none": (lambda: init(jax.random.key(0), C, S, "bf16"), "dtype: 'bf16' is not one of float32"),
    "a list of models": (lambda: preset(["glm-5"]), r"preset: \['glm-5'\] is not one of 30b"),
    "a config from nowhere": (lambda: Config.from_hf(""), "config.json: '' is not a path"),
    "a base of text": (lambda: Rope(theta="1"), "rope_parameters.rope_theta: '1' is not a number"),
    "layers as text": (lambda: Schedule.uniform("5", 2), "num_layers: '5' is not an integer"),
    "no layers": (lambda: Schedule.all_full(0), "num_layers: 0 is not an integer of at least 1"),
    "a layer above the last": (lambda: S.with_shared(5), "layer: 5 is above 4"),
    "a layer below the first": (lambda: S.with_full(-1), "layer: -1 is not an integer of at least 0"),
    "a hot model": (lambda: Sampling("hot"), "temperature: 'hot' is not a number"),
    "a format that is none": (lambda: CacheFormat("fp8"), "latent_dtype: 'fp8' is not one of bfloat16"),
    "batches of two shapes": (lambda: search.Evaluator(P, C, S, [[[1, 2, 3]], [[1, 2]]]), "batches: shapes .* one shape"),
    "batches that are text": (lambda: search.Evaluator(P, C, S, "text"), "batches: 'text' is not a list of batches"),
    "batches of no token": (lambda: search.Evaluator(P, C, S, [T + 97]), "batches: .* is not one of the model's 97 tokens"),
    "batches without a next token": (lambda: search.Evaluator(P, C, S, [T[:, :1]]), r"\(2, 1\) holds no token with one after"),
    "serving weights for a search": (lambda: search.Evaluator(weights(), C, S, [T]), "params: a Weights is not Params"),
    "one schedule": (lambda: search.Evaluator(P, C, S, [T]).losses(S), "schedules: 'FFSFS' is one schedule, not a list"),
    "a shorter schedule": (lambda: search.Evaluator(P, C, S, [T]).loss(SHORT), "'FF' has 2 entries for 5 layers"),
    "a batch that is not there": (
        lambda: search.Evaluator(P, C, S, [T]).sequence_losses([S], batches=[7]),
        "batches: 7 is above 0",
    ),
    "params for an oracle": (lambda: search.greedy_search(P, S), "oracle: a Params gives no losses"),
    "a search for text": (lambda: search.greedy_search(Oracle(), S, num_full="2"), "num_full: '2' is not an integer"),
    "a bound that is none": (lambda: search.greedy_search(Oracle(), S, max_loss=np.nan), "max_loss: nan is not a number"),
    "an error for a race": (lambda: search.greedy_search(Oracle(), S, race=0.05), "race: 0.05 is neither a Race nor None"),
    "a floating search from text": (lambda: search.floating_search(Oracle(), "FFSFS"), NO_SCHEDULE),
    "no blocks": (lambda: search.candidates(S, 0), "blocks: 0 is not an integer of at least 1"),
    "no steps to choose from": (lambda: search.first_step_with_at_most([], 2), "steps: there are none"),
    "no cosines": (lambda: search.most_similar(np.ones((2, 3)), 1), r"similarity: .* not \[L, L\] of floats"),
    "cosines that are not finite": (lambda: search.most_similar(np.full((2, 2), np.nan), 1), "similarity: .* is not finite"),
    "nothing to compare": (lambda: search.Margin.between([], []), "losses: 0 of them and 0 of the reference"),
    "a search in text": (lambda: search.find_schedule(P, C, S, "text", 2), r"tokens: .* not \[N, S\+1\] of integers"),
    "a new schedule of text": (lambda: with_schedule(P, S, "FSSSS"), "new: 'FSSSS' is not a Schedule"),
    "params to restrict": (lambda: serving.restrict(P, C, S), "weights: a Params is not Weights"),
    "a directory that is none": (lambda: checkpoints_convert.load(None), "directory: None is not a path"),
    "the current directory by chance": (lambda: checkpoints_convert.load(""), "directory: '' is not a path"),
    "a list of forms": (lambda: checkpoints_convert.load(DEMO, form=["params"]), r"form: \['params'\] is not one of"),
    "a tree that is none": (lambda: checkpoints_convert.save("out", {}, C, S), "params: a dict is neither Params nor serving"),
    "a destination without a name": (lambda: checkpoints_convert.convert(DEMO, ""), "directory: '' is not a path"),
    "companions from nowhere": (
        lambda: checkpoints_convert.save("out", P, C, S, companions_of="nowhere"),
        "companions_of: nowhere: no such directory",
    ),
    "a form to train on": (
        lambda: checkpoints_convert.convert(DEMO, "out", weights="fp8 base"),
        "weights: 'fp8 base' is for training on",
    ),
    "a layer that is none": (lambda: checkpoints_convert.Layers(DEMO).layer(99), "layer: 99 is above 11"),
    "a stage of no kind": (lambda: stage(kind="full"), "kind: 'full' is not one of dense, warmup, sparse"),
    "a stage of no rows": (lambda: stage(rows=0), "rows: 0 is not an integer of at least 1"),
    "a rate that is none": (lambda: stage(indexer_learning_rate=np.nan), "indexer_learning_rate: nan is not a number"),
    "rows without micro-batches": (
        lambda: training.step(P, None, T, C, S, stage()),
        r"tokens: .* not \[accumulate, rows, S\+1\] of integers",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_careless_call_is_one_sentence(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_values_are_shown_by_what_they_are():
    assert arguments.described(np.float32(1.5)) == "1.5" and arguments.described([1, "a"]) == "[1, 'a']"
    assert arguments.described(T) == "an array of shape [2, 60] and dtype int32"
    assert arguments.described([T]) == "a list" and arguments.described(P) == "a Params"
    assert len(arguments.described("x" * 10**6)) < 210
    assert arguments.described(types.new_class("\x1b[31m")()).isprintable()


def test_integers_of_any_type_are_integers():
    for value in (3, np.int64(3), np.array(3), jnp.int32(3)):
        assert arguments.integer("n", value, 1, 3) == 3
    for value in (True, np.bool_(True), 3.0, "3", None, np.array([3])):
        with pytest.raises(ValueError, match="n: .* is not an integer of at least 1"):
            arguments.integer("n", value, 1)


def test_checks_are_no_part_of_a_program():
    """A traced function looks at shapes alone; the program is that of what it calls."""
    found = jax.jit(forward).lower(P, jnp.asarray(T), C, S, jnp.array([60, 61])).as_text()
    assert "check" not in found and "callback" not in found
    with pytest.raises(ValueError, match=r"not \[B, S\] of integers"):
        jax.jit(forward).lower(P, jnp.asarray(T, jnp.float32), C, S)
