"""The speed experiment: its models, its bookkeeping, and a small run from flags to files."""

import functools
import json
import math
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import speed
from experiments.benchmarks.speed import stages
from experiments.benchmarks.speed.bench import MARGIN, ROWS_WITHOUT_MEMORY_FIGURES, Bench, Sizes, profiled_layer, refill
from experiments.benchmarks.speed.models import SEARCHED, model
from experiments.benchmarks.speed.rounds import PAIRS, Rounds, neighbours_overlap, random_prompt
from experiments.benchmarks.speed.rows import PUBLISHED, PUBLISHED_LENGTHS, Row, published, record
from experiments.benchmarks.speed.tables import HEADER, cells, notes, savings, shares_table
from experiments.common import inputs
from indexcache_jax import serving
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from tests.support import command_flags


def test_published_patterns_fit_their_models_and_are_nested():
    for (name, pattern), letters in SEARCHED.items():
        shape = model(name, 0)
        assert len(letters) == shape.layers
        top, bottom = map(int, pattern.split("/"))
        assert abs(math.ceil(shape.layers * top / bottom) - letters.count("F")) <= 2
        half = SEARCHED[name, "1/2"]
        assert all(h == "F" for h, letter in zip(half, letters, strict=True) if letter == "F")


def test_schedules_of_a_whole_and_of_a_cut_model():
    whole = model("30b", 0)
    assert whole.scale == 1 and whole.schedule("1/4").pattern == SEARCHED["30b", "1/4"]
    assert whole.schedule("all F") == Schedule("F" * 47)
    cut = model("glm-5", 0)
    assert (cut.config.num_layers, cut.scale, cut.config.moe_layers) == (4, 78 / 4, (True,) * 4)
    assert cut.config.vocab_size == inputs.CUT_VOCABULARY  # the head is not among what is scaled
    assert [cut.schedule(p).pattern for p in ("all F", "1/2", "1/4")] == ["FFFF", "FSFS", "FSSS"]
    assert model("demo", 3).scale == 4


@pytest.mark.parametrize("pattern", ["all f", "0/2", "3/2", "1/", "half", "1/0"])
def test_a_pattern_that_is_none_is_named(pattern):
    with pytest.raises(ValueError, match=f"--schedule={pattern}"):
        model("30b", 0).schedule(pattern)


@pytest.mark.parametrize("layers", [-1, 48])
def test_layers_that_a_model_does_not_have(layers):
    with pytest.raises(ValueError, match=f"--num_layers={layers}: 30b has 47 layers"):
        model("30b", layers)


def test_published_figures_belong_to_the_30b_model_only():
    assert published("30b", "prefill_seconds", "1/4", 204800) == 10.7
    assert published("30b", "decode_full", "all F", 10240) == 2700
    assert published("demo", "decode_full", "all F", 10240) is None
    assert published("30b", "decode_one", "1/8", 10240) is None
    assert published("30b", "decode_one", "all F", 20480) is None
    for figures_of in PUBLISHED.values():
        assert all(len(figures) == len(PUBLISHED_LENGTHS) for figures in figures_of.values())


def test_a_record_scales_times_and_prices_tokens():
    shape = model("demo", 3)  # of 12 layers
    row = Row("all F", 1000, prefill=[1.0, 3.0, 2.0], step=[0.5], full_step=0.25, full_rows=8)
    row.prefill_stages = {"scores": 3.0, "top-k": 1.0, "sparse MLA": 4.0, "experts": 1.0, "projections and the rest": 1.0}
    r = record(row, shape, price=3.6)
    assert r["prefill_seconds"] == 8 and r["decode_one"] == 0.5 and r["decode_full"] == 8 and r["scaled"]
    assert r["cost_of_a_million_prompt_tokens"] == pytest.approx(8.0)  # 8000 s at 0.001 a second
    assert r["cost_of_a_million_output_tokens"] == pytest.approx(125.0)
    assert r["prefill_shares"]["scores"] == pytest.approx(0.3) and r["decode_shares"] is None
    assert cells(r)[:3] == ["all F scaled", "1000", "8 s"] and "40 %" in cells(r)
    faster = Row("1/4", 1000, prefill=[1.0], full_step=0.125, full_rows=8)
    assert savings([r, record(faster, shape, 3.6)]) == [
        "- 1/4 at 1000 saves 50 % of the cost of prompt tokens and 50 % of the cost of output tokens of all F's."
    ]
    assert savings([r]) == []


def test_an_unfinished_row_has_no_figures():
    r = record(Row("all F", 1000), model("demo", 0), 3.0)
    assert r["prefill_seconds"] is r["decode_one"] is r["decode_full"] is r["cost_of_a_million_output_tokens"] is None
    assert len(cells(r)) == len(HEADER)


def test_refill_copies_the_first_row():
    shape = model("demo", 2)
    cache = serving.init_cache(shape.config, Schedule("FS"), 2, 12, CacheFormat(jnp.float32, jnp.float8_e4m3fn))
    marked = cache.layers[0].latents.at[0].set(7.0).at[1].set(9.0)
    cache = cache.replace(layers=(cache.layers[0].replace(latents=marked), cache.layers[1]))
    filled = refill(cache, 3, 5, 8)
    assert filled.lengths.tolist() == [5] * 3 and filled.max_len == 8
    assert np.all(filled.layers[0].latents == 7) and filled.layers[0].index_keys.shape == (3, 8, 32)
    assert filled.layers[1].index_keys is None


def test_rows_fill_what_weights_temporaries_and_one_layers_part_leave(monkeypatch):
    shape = model("demo", 2)
    weights = {"all F": serving.random_weights(jax.random.key(0), shape.config, jnp.float32)}
    bench = Bench(shape, weights, {"all F": Schedule("FF")}, Sizes([128], [128], 64, 4), CacheFormat())
    held = sum(x.nbytes for x in jax.tree.leaves(weights))
    row = bench.bytes_per_token("all F") * bench.sizes.room(128)
    limit = held + MARGIN + row // 2 + 5 * row + 1000
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert [bench.full_rows("all F", 128, 0, extra) for extra in (0, 1000, 1001, 100 * row)] == [5, 5, 4, 1]
    assert bench.full_rows("all F", 128, 7) == 7


def test_a_full_cache_that_does_not_fit_after_all_gets_fewer_rows(monkeypatch):
    shape = model("demo", 2)
    bench = Bench(shape, {"all F": None}, {"all F": Schedule("FF")}, Sizes([128], [128], 64, 4), CacheFormat())
    bench.decode_full["all F", 128] = 45, None
    monkeypatch.setattr(bench, "compile_full", lambda p, n, rows: bench.decode_full.update({(p, n): (rows, None)}))
    measured = Rounds(bench, np.zeros(128), math.inf, 3.0, lambda _: None)
    monkeypatch.setattr(measured, "show", lambda row: None)

    def full_step(pattern, one, length):
        if bench.decode_full[pattern, length][0] > 40:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 0.5

    monkeypatch.setattr(measured, "full_step", full_step)
    measured.decode_full("all F", None)
    row = measured.rows["all F", 128]
    assert (row.full_step, row.full_rows, row.notes) == (0.5, 39, [])  # 45, 43, 41, 39


def demo_run(lengths, chunk=64):
    """A run of the small model, 2 layers, without its decode program."""
    shape = model("demo", 2)
    weights = {"all F": serving.random_weights(jax.random.key(0), shape.config, jnp.float32)}
    schedules = {"all F": Schedule("FF")}
    bench = Bench(shape, weights, schedules, Sizes(lengths, lengths, chunk, 4), CacheFormat())
    bench.decode_one["all F"] = None
    return Rounds(bench, random_prompt(0, shape.config.vocab_size, lengths[-1], 1), math.inf, 3.0, lambda _: None)


def profiled(monkeypatch, seen, seen_decoding):
    """The rows of a run where a chunk takes 1 s and a decode program 0.2 s, of which kernels are seen for these parts."""
    measured = demo_run([64, 128, 256])
    bench, clock, layers = measured.bench, [0.0], []
    kernels = []

    def prefill_chunk(pattern, tokens, cache, layer):
        clock[0] += 1.0
        layers.append(layer)
        end = int(cache.lengths[0]) + bench.sizes.chunk
        kernels[:] = [("indexer_scores_k", float(end)), ("sparse_mla_few_heads", 1000 * seen[end] - end)]
        return jnp.zeros(()), cache

    def decode(program, pattern, cache):
        clock[0] += 0.2
        part = seen_decoding[int(cache.lengths[0])]
        kernels[:] = [("sparse_mla", 25 * part), ("gemm", 25 * part)] * bench.sizes.steps
        return jnp.zeros(()), cache

    def kernels_of(function):
        function()
        return list(kernels)

    monkeypatch.setattr(bench, "prefill_chunk", prefill_chunk)
    monkeypatch.setattr(bench, "decode", decode)
    monkeypatch.setattr(stages, "kernels_of", kernels_of)
    monkeypatch.setattr(stages, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    measured.profile("all F", bench.cache("all F", 1, bench.sizes.max_len))
    assert set(layers) == {profiled_layer}
    return [measured.rows["all F", n] for n in bench.sizes.lengths]


def test_shares_are_those_of_all_chunks_between_the_ones_that_were_profiled(monkeypatch):
    rows = profiled(monkeypatch, dict.fromkeys((64, 128, 256), 0.9), dict.fromkeys((64, 128, 256), 0.95))
    assert [row.prefill_stages["scores"] for row in rows] == pytest.approx([64, 64 + 128, 64 + 128 + 192 + 256])
    assert [sum(row.prefill_stages.values()) for row in rows] == pytest.approx([900, 1800, 3600])
    assert [row.decode_stages["sparse MLA"] for row in rows] == pytest.approx([95.0] * 3)
    assert [row.notes for row in rows] == [["2 launches a decode step"]] * 3


def test_where_kernels_are_missing_there_are_no_shares(monkeypatch):
    rows = profiled(monkeypatch, {64: 0.97, 128: 0.57, 256: 0.97}, {64: 0.84, 128: 0.97, 256: 0.97})
    records = [record(row, model("demo", 2), 3.0) for row in rows]
    assert [r["prefill_shares"] is None for r in records] == [False, True, True]
    assert [r["decode_shares"] is None for r in records] == [True, False, False]
    assert [row.notes for row in rows] == [
        ["stage shares omitted: CUPTI reported kernels for only 84 % of the decode program's time"],
        ["2 launches a decode step", "stage shares omitted: CUPTI reported kernels for only 57 % of the prefill chunk's time"],
        ["2 launches a decode step", "no shares of the prefill, because a shorter one has none"],
    ]
    assert "| all F | 128 | prefill |" not in shares_table(records)
    assert "| all F | 128 | decode |" in shares_table(records)


def test_without_cupti_no_layer_is_compiled_for_a_profile(monkeypatch):
    measured = demo_run([64, 128])
    monkeypatch.setattr(measured.bench, "prefill_chunk", lambda *_: pytest.fail("a chunk ran"))
    monkeypatch.setattr(measured.bench, "decode", lambda program, pattern, cache: (jnp.zeros(()), cache))

    def kernels_of(function):
        raise ValueError("no times of kernels: not a GPU")

    monkeypatch.setattr(stages, "kernels_of", kernels_of)
    measured.profile("all F", measured.bench.cache("all F", 1, measured.bench.sizes.max_len))
    assert [row.notes for row in measured.rows.values()] == [["no times of kernels: not a GPU"], []]


def test_the_layer_that_is_profiled_computes_the_same():
    measured = demo_run([64])
    bench, tokens = measured.bench, measured.chunk_at(64)
    empty = functools.partial(bench.cache, "all F", 1, bench.sizes.max_len)
    expected, _ = bench.prefill_chunk("all F", tokens, empty())
    logits, _ = bench.prefill_chunk("all F", tokens, empty(), profiled_layer)
    np.testing.assert_array_equal(logits, expected)


def test_a_prefill_without_graphs_is_timed_in_turn(monkeypatch):
    measured = demo_run([64, 128])
    measured.kernel_by_kernel = True
    layers = []

    def chunk(pattern, tokens, cache, layer=None):
        layers.append(layer)
        return jnp.zeros((1, 8)), cache

    monkeypatch.setattr(measured.bench, "prefill_chunk", chunk)
    monkeypatch.setattr(measured, "decode_one", lambda row, cache: cache)
    monkeypatch.setattr(measured, "decode_full", lambda *_: None)
    for first in (True, False):
        measured.one_schedule("all F", first)
    one_by_one, graphs = [profiled_layer] * 2, [None] * 2
    assert layers == [profiled_layer, *one_by_one, *graphs, *one_by_one, *graphs]  # the first of all compiles
    found = record(measured.rows["all F", 128], model("demo", 2), 3.0)
    assert len(found["prefill_kernel_by_kernel_rounds"]) == len(found["prefill_rounds"]) == 2
    (note,) = notes(found)
    assert note.startswith("prefill with its kernels launched one by one") and notes(found | {"notes": ["a"]}) == ["a", note]
    assert notes(record(Row("all F", 64), model("demo", 2), 3.0)) == []


def test_tokens_of_a_prompt_stand_in_runs():
    prompt = random_prompt(0, 50, 10, 3)
    assert len(prompt) == 10 and (prompt.reshape(-1)[:9].reshape(3, 3) == prompt[:9:3, None]).all() and len(set(prompt)) > 2


def test_overlap_of_neighbours():
    k, count = 4, PAIRS * 3 + 1
    indices = np.arange(count)[:, None] * 2 + np.arange(k)  # a query shares k - 2 keys with the next
    assert float(neighbours_overlap(jnp.asarray(indices[None]))) == 0.5
    indices[:, 3] = -1  # what is not selected is not shared
    assert float(neighbours_overlap(jnp.asarray(indices[None]))) == pytest.approx(1 / 3)
    assert float(neighbours_overlap(jnp.full((1, 2, k), -1))) == 0


def run(tmp_path, *flags):
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        "--experiment=speed",
        f"--output_dir={tmp_path}",
        "--preset=demo",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lengths=100", "--lengths=100: not a multiple of --chunk=10240"),
        ("--lengths=", "--lengths=: name at least one"),
        ("--lengths=1k", "--lengths=1k: not a number"),
        ("--rounds=0", "--rounds=0"),
        ("--token_run=0", "--token_run=0"),
        ("--schedule=most", "--schedule=most"),
    ],
)
def test_bad_flags_are_named(tmp_path, flag, message):
    with command_flags.given("--preset=demo", flag), pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        speed.run(str(tmp_path / "out"), 0)


@pytest.mark.slow
def test_a_small_run_writes_rows_report_and_plot(tmp_path):
    flags = ["--num_layers=4", "--lengths=64,128", "--chunk=64", "--schedule=all F,1/4", "--decode_steps=4", "--rounds=2"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["patterns"] == {"all F": "FFFF", "1/4": "FSSS"} and metrics["rounds"] == 2
    assert [(r["pattern"], r["length"]) for r in metrics["rows"]] == [(p, n) for p in ("all F", "1/4") for n in (64, 128)]
    for r in metrics["rows"]:
        assert len(r["prefill_rounds"]) == len(r["decode_one_rounds"]) == 3  # two rounds and the profile
        assert r["prefill_seconds"] > 0 and r["decode_one"] > 0 and r["decode_full"] > 0 and r["scaled"]
        assert r["full_rows"] == ROWS_WITHOUT_MEMORY_FIGURES
        assert r["published_prefill_seconds"] is None
    assert set(metrics["neighbours_overlap"]) == {"all F", "1/4"}
    assert all(0.9 < share <= 1 for share in metrics["neighbours_overlap"].values())  # the model selects 128 keys
    dense, quarter = metrics["rows"][1], metrics["rows"][3]
    assert dense["cache_bytes"] > quarter["cache_bytes"]
    assert "4 of 12 layers" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 10_000
