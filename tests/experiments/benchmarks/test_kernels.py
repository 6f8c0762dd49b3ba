import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import run  # noqa: F401  run defines the flags that reports quote
from experiments.benchmarks import kernels

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="the whole table would be measured there")


@pytest.fixture
def flags_parsed():
    kernels.flags.FLAGS(["test"])


def test_it_measures_rows_and_writes_them(tmp_path, monkeypatch, flags_parsed):
    monkeypatch.setattr(kernels, "WINDOW_SECONDS", 1e-3)
    with flagsaver.flagsaver(rows="top-k, 8 x 122880|grouped matmul, 64 x"):
        kernels.run(str(tmp_path), 0)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    names = [row["name"] for row in metrics["rows"]]
    assert len(names) == len(set(names)) == 3 and all(name.endswith(", small") for name in names)
    for row in metrics["rows"]:
        assert row["ms"] == np.median(row["windows_ms"]) > 0
        assert row["published_ms"] is None and row["target_ms"] is None  # small shapes have no such figures
    (one,) = metrics["runs"]
    assert one["baselines"]["matmul_tflops"] > 0 and one["baselines"]["copy_tbps_at_the_end"] > 0
    assert one["rows"] == names and one["complete"]
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names)
    assert "Not measured: scores fp8" in report
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_kept_where_they_were_measured_alike(tmp_path, monkeypatch, flags_parsed):
    monkeypatch.setattr(kernels, "WINDOW_SECONDS", 1e-3)

    def measure(pattern):
        with flagsaver.flagsaver(rows=pattern):
            kernels.run(str(tmp_path), 0)
        metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
        return {row["name"]: row["ms"] for row in metrics["rows"]}, [one["rows"] for one in metrics["runs"]]

    alone, given, few = (
        f"{name}, small"
        for name in (
            "top-k, 8 x 122880, scores alone",
            "top-k, 8 x 122880, block maxima given",
            "grouped matmul, 64 x 2048 x 3072, 64 groups",
        )
    )
    first, _ = measure("grouped matmul, 64 x|8 x 122880, block")
    second, runs = measure("8 x 122880, scores|8 x 122880, block")
    assert list(second) == [alone, given, few]  # in the table's order
    assert runs == [[few], [alone, given]]
    assert second[few] == first[few] and second[given] != first[given]
    monkeypatch.setattr(kernels, "versions", lambda: {"jax": "another"})
    assert list(measure("8 x 122880, scores")[0]) == [alone]


@pytest.mark.slow
def test_small_shapes_take_little_memory():
    """Where there is no Hopper GPU: what all rows together are given is far below what any host has."""
    leaves = jax.tree.leaves([row.make().program_arguments for row in kernels.table(kernels.Sizes(small=True))])
    arrays = {id(x): x.nbytes for x in leaves if hasattr(x, "nbytes")}
    assert 10**6 < sum(arrays.values()) < 10**9


@pytest.mark.parametrize("rows, message", [("[", "not a regular expression"), ("no such row", "no row")])
def test_wrong_rows_are_named(rows, message, tmp_path, flags_parsed):
    with flagsaver.flagsaver(rows=rows), pytest.raises(ValueError, match=message):
        kernels.run(str(tmp_path), 0)


def test_a_run_that_is_out_of_time_keeps_what_it_has(tmp_path, monkeypatch, flags_parsed):
    monkeypatch.setattr(kernels, "WINDOW_SECONDS", 1e-3)
    with flagsaver.flagsaver(rows="grouped matmul", time_limit=0.0):
        kernels.run(str(tmp_path), 0)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["rows"] == [] and not metrics["runs"][0]["complete"]


def test_rows_that_miss_their_target_are_measured_with_stages_left_out(tmp_path, monkeypatch, flags_parsed):
    monkeypatch.setattr(kernels, "WINDOW_SECONDS", 1e-3)
    case = kernels.Case(lambda x: x + 1, [(np.ones(64),)], bytes=512, variants={"nothing": lambda x: x})
    rows = [kernels.Row("slow", lambda: case, target=0.0), kernels.Row("quick", lambda: case, target=1e9)]
    monkeypatch.setattr(kernels, "table", lambda sizes: rows)
    kernels.run(str(tmp_path), 0)
    measured = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["metrics"]["rows"]}
    assert measured["slow"]["variants_ms"]["nothing"] > 0 and measured["quick"]["variants_ms"] == {}
    assert "| slow |" in (tmp_path / "report.md").read_text().split("What stages cost")[1]


def test_a_stage_that_the_kernels_do_not_know_is_named():
    from pallas_kernels.indexer_topk import mosaic_gpu_scores, mosaic_gpu_select
    from pallas_kernels.sparse_mla import mosaic_gpu_attention
    from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import Tasks

    with pytest.raises(ValueError, match="leave_out 'sums'"):
        mosaic_gpu_select.SelectConfig(leave_out="sums")
    with pytest.raises(ValueError, match="leave_out 'sums'"):
        mosaic_gpu_scores.ScoresConfig(queries=4, leave_out="sums")
    tasks = Tasks(1, 1, 64, 1024, pairs=1)
    with pytest.raises(ValueError, match="leave_out 'sums'"):
        mosaic_gpu_attention.attend(None, None, None, None, tasks, scale=1.0, leave_out="sums")


def test_rows_with_targets_come_first():
    rows = kernels.table(kernels.Sizes(small=False))
    assert [row.priority for row in rows if row.target is not None] == [0] * sum(row.target is not None for row in rows)
    assert {row.priority for row in rows if row.target is None} == {1, 2}


def test_a_rate_is_work_over_time():
    row = kernels.Row("some", lambda: None)
    one = kernels.Measured(row, flops=4e12, bytes=0, windows=[3.0, 5.0, 4.0])
    assert one.ms == 4 and one.rate == 1000 and one.of_baseline({"matmul_tflops": 500.0, "copy_tbps": 4.0}) == 2
    other = kernels.Measured(row, flops=0, bytes=4e9, windows=[2.0])
    assert other.rate == 2 and other.of_baseline({"matmul_tflops": 500.0, "copy_tbps": 4.0}) == 0.5


@pytest.mark.parametrize("keys, k", [(120, 20), (1001, 64), (64, 64)])
def test_selections_are_distinct_and_shared_as_asked(keys, k):
    chosen = np.asarray(kernels.selections((2, 50), keys, k, 0.75, 1))
    assert chosen.min() >= 0 and chosen.max() < keys and (np.diff(chosen) > 0).all()
    if keys > 4 * k:
        assert 0.7 < np.mean(chosen[:, 1:] == chosen[:, :-1]) < 0.82  # a fresh draw may repeat the old one


@pytest.mark.parametrize("megabytes, different, calls", [(10_000, 1, 1), (500, 1, 4), (42, 3, 32), (4, 25, 32), (1, 64, 64)])
def test_arguments_exceed_the_cache_and_calls_the_launch(megabytes, different, calls):
    seeds = kernels.Sizes(small=False).seeds(megabytes * 2**20)
    assert sorted(set(seeds)) == list(range(different)) and len(seeds) == calls


def test_the_published_figures_stand_beside_the_shapes_they_were_measured_at():
    rows = kernels.table(kernels.Sizes(small=False))
    assert len({row.name for row in rows}) == len(rows)
    published = {row.name: row.published[0] for row in rows if row.published}
    assert published["scores fp8, 4096 x 122880, Hi 32"] == 4.27
    assert published["sparse MLA, 4096 x 61440, 128 heads, random"] == 3.98
    assert published["top-k, 1024 x 204800, scores alone"] == published["top-k, 1024 x 204800, block maxima given"] == 0.317
