"""Inference through the Hopper kernels: the same model through them and through plain XLA."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, Sampling, generate, prefill_chunk, prefill_document
from pallas_kernels import hopper
from tests.support.serving_cases import experts_by_bias

BFLOAT16 = CacheFormat()

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

FIELDS = preset("30b") | {"num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}
FIELDS |= {"index_topk": 2048, "eos_token_id": None, "pad_token_id": None}
CONFIG, SCHEDULE = Config.from_hf(FIELDS), Schedule("FSFS")
PROMPTS = [np.random.default_rng(i).integers(0, 512, n) for i, n in enumerate((1500, 700, 33))]


STEPS = (5, 6, 7, 8, 9, 10, 11, 12)  # tokens that follow every prompt


def errors(ours, exact):
    """Of every row [N, W] its distance from the exact one, relative to that one's length."""
    return np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@functools.cache
def weights(form=None):
    made = serving.random_weights(jax.random.key(0), CONFIG, weights=form)
    return experts_by_bias(serving.restrict(made, CONFIG, SCHEDULE))


def prompts_and_steps(form=BFLOAT16, of=None):
    """Hidden states [N, D] of all tokens of the prompts, and the logits [rows * steps, V] of STEPS after them."""
    cache = serving.init_cache(CONFIG, SCHEDULE, 3, 2048, form)
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    hidden = []
    for start in range(0, lengths.max(), 512):
        tokens, here = np.zeros((3, 512), np.int32), np.clip(lengths - start, 0, 512)
        for row, (prompt, count) in enumerate(zip(PROMPTS, here, strict=True)):
            tokens[row, :count] = prompt[start : start + count]
        x, cache = prefill_chunk(weights(of), jnp.asarray(tokens), jnp.asarray(here), cache, CONFIG)
        x = np.asarray(x, np.float32)
        hidden += [x[row, :count] for row, count in enumerate(here)]
    logits, step = [], jax.jit(serving.step)
    for token in STEPS:
        found, cache = step(weights(of), jnp.full((3,), token), cache, CONFIG)
        logits.append(found)
    return np.concatenate(hidden), np.concatenate(logits)


def single_tokens():
    """The logits [steps, V] of STEPS after a short prompt of a row that is alone, with weights in 8 bits."""
    prompt, cache = PROMPTS[2], serving.init_cache(CONFIG, SCHEDULE, 1, 2048, BFLOAT16)
    _, cache = prefill_chunk(weights("fp8"), jnp.asarray(prompt[None]), jnp.array([len(prompt)]), cache, CONFIG)
    logits, step = [], jax.jit(serving.step)
    for token in STEPS:
        found, cache = step(weights("fp8"), jnp.full((1,), token), cache, CONFIG)
        logits.append(found)
    return np.concatenate(logits)


@functools.cache
def in_plain_xla(function=prompts_and_steps, of=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "why_not", lambda: "left out for comparison")
        for operation in ("indexer_topk", "sparse_mla"):
            triton = importlib.import_module(f"pallas_kernels.{operation}.triton")
            patch.setattr(triton, "why_not", lambda *args, **options: "left out")
        jax.clear_caches()
        found = function() if of is None else function(of=of)
    jax.clear_caches()
    return found


@pytest.mark.parametrize("form", [BFLOAT16, CacheFormat(index_dtype=jnp.float8_e4m3fn)], ids=["bf16", "fp8 keys"])
def test_hidden_states_and_logits_equal_those_of_plain_xla(form):
    """Every visible key is selected and the bias chooses the experts, so that no near-tie decides."""
    for ours, exact in zip(prompts_and_steps(form), in_plain_xla(), strict=True):
        assert errors(ours, exact).max() < 0.06


def test_weights_in_8_bits_give_what_they_give_in_plain_xla():
    """Many tokens are multiplied in 8 bits too, which costs some per cent in each product; a wrong scale costs far more."""
    ours = prompts_and_steps(of="fp8")
    for found, exact in zip(ours, in_plain_xla(prompts_and_steps, "fp8"), strict=True):
        assert errors(found, exact).max() < 0.2
    for found, again in zip(ours, prompts_and_steps(of="fp8"), strict=True):
        np.testing.assert_array_equal(found, again)


def test_single_tokens_with_weights_in_8_bits():
    """Prefill of so few tokens and the kernels for a single one multiply codes by activations in 16 bits."""
    assert errors(single_tokens(), in_plain_xla(single_tokens)).max() < 0.06


def test_a_row_generates_alone_what_it_generates_in_a_batch_of_copies():
    """Greedy tokens of one prompt in a batch of three copies are three times the same."""
    rows = generate(weights(), [PROMPTS[1]] * 3, CONFIG, SCHEDULE, 40, chunk=512)
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 40


@pytest.mark.parametrize("form", [BFLOAT16, CacheFormat.of(jnp.float8_e4m3fn)], ids=["bf16", "all fp8"])
def test_a_documents_cache_serves_several_batches(form):
    """Sampled answers are those with the document given as tokens, and those of one id and question are the same."""
    questions, sampling = [PROMPTS[2], PROMPTS[2][:9], PROMPTS[2]], Sampling(temperature=0.8, top_p=0.9, top_k=50)
    run = functools.partial(
        generate, weights(), questions, CONFIG, SCHEDULE, 20, sampling=sampling, ids=[4, 5, 4], chunk=512, cache_format=form
    )
    cache = prefill_document(weights(), PROMPTS[0], CONFIG, SCHEDULE, chunk=512, cache_format=form)
    answers = run(document=cache)
    assert run(document=cache) == answers == run(document=PROMPTS[0])
    assert answers[0] == answers[2] != answers[1]
