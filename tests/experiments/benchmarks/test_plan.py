"""The plan experiment: collectives read from a program's text, and a small model's plan from flags to files."""

import json
import subprocess
import sys

import pytest
from absl import flags

from experiments import run  # noqa: F401  results record the flags that `run` defines
from experiments.benchmarks import plan
from experiments.benchmarks.plan import overview
from experiments.benchmarks.plan.collectives import Traffic, collectives
from experiments.common import topologies
from experiments.common.topologies import H200_MEMORY, topology
from pallas_kernels import tpu

MESH = "replica_groups=mesh['data'=2,'context'=4,'tensor'=1] {'context'}"
LINES = {
    # 4 devices gather 16 rows, each has 4 of them and sends these to 3 others: 16 x 8 x 2 bytes x 3 / 4.
    f"%all-gather.1 = bf16[16,8]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%x), channel_id=1, {MESH}": ("all-gather", 192),
    f"%all-gather-start = ((bf16[4,8]{{1,0}}), bf16[16,8]{{1,0}}) all-gather-start(%x), {MESH}": ("all-gather", 192),
    # Two arrays at once.
    f"%s = ((s32[4,8], f32[4,8]), (s32[16,8], f32[16,8])) all-gather-start(%x, %y), {MESH}": ("all-gather", 768),
    "%reduce-scatter.2 = f32[4,8]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add": ("reduce-scatter", 384),
    "%r = ((f32[16,8]), f32[4,8]) reduce-scatter-start(%x), replica_groups=[2,4]<=[8]": ("reduce-scatter", 384),
    "ROOT %psum.3 = bf16[16]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("all-reduce", 32),
    "%psum.4 = (bf16[16]{0}, bf16[16]{0}) all-reduce-start(%x, %y), replica_groups={}": ("all-reduce", 112),
    "%a = s32[8,2]{1,0} all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}": ("all-to-all", 56),
    "%p = (u8[64]{0}, u8[64]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}": (
        "collective-permute",
        64,
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_what_a_collective_sends(line):
    kind, sent = LINES[line]
    assert collectives(f"ENTRY %main () -> f32[] {{\n  {line}, metadata={{}}\n}}", 8) == {kind: Traffic(1, sent)}


def test_what_is_no_collective_of_several_devices_does_not_count():
    text = """ENTRY %main () -> f32[] {
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  %fusion = bf16[16,8] fusion(%all-gather.1), calls=%all-reduce-scatter
  %psum = f32[8] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
}"""
    assert collectives(text, 2) == {}


def test_a_reduce_scatter_as_a_tpu_has_it():
    line = "  %all-reduce.4 = bf16[32,8]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add\n"
    named = f"%all-reduce-scatter.1.clone (input: bf16[32,8]) -> bf16[8,8] {{\n{line}}}\n\nENTRY %main () -> f32[] {{\n{line}}}"
    assert collectives(named, 4) == {"reduce-scatter": Traffic(1, 384), "all-reduce": Traffic(1, 768)}


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="no replica groups that can be read"):
        collectives("  %a = f32[8] all-gather(%x), replica_groups=<maximal>", 8)


@pytest.mark.parametrize("name", ["h100:8", "v5p", "v9:2x2", "h200:12", "h200:0", "here"])
def test_a_topology_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=f"--topology={name}: "):
        topology(name)


def test_topologies_that_nothing_can_be_compiled_for_say_why(monkeypatch):
    monkeypatch.setattr(topologies, "described", lambda name: "no libtpu")
    monkeypatch.setattr(topologies, "_described_gpus", lambda hosts, of_a_host: f"no plugin for {hosts} x {of_a_host}")
    slice_ = topology("v5p:4x4x4")
    assert (slice_.num_devices, slice_.memory, slice_.devices) == (64, tpu.CHIPS["TPU v5"].hbm, None)
    gpus = topology("h200:16")
    assert (gpus.num_devices, gpus.devices, gpus.why_not) == (16, None, "no plugin for 2 x 8")
    assert gpus.memory == int(0.95 * H200_MEMORY)


def planned(tmp_path, *arguments):
    flags.FLAGS(["test", *arguments])
    plan.run(str(tmp_path), 0)
    return json.loads((tmp_path / "results.json").read_text())["metrics"], (tmp_path / "report.md").read_text()


@pytest.fixture(autouse=True)
def flags_as_they_were():
    yield
    for name in ("preset", "topology", "mesh", "tokens", "chunk", "schedule", "weights"):
        flags.FLAGS[name].unparse()


def test_where_nothing_can_be_compiled_the_sums_are_reported_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(topologies, "_described_gpus", lambda hosts, of_a_host: "no plugin")
    metrics, report = planned(tmp_path, "--preset=glm-5.2", "--topology=h200:16", "--mesh=context=16")
    assert metrics["not_compiled"] == "no plugin" and metrics["programs"] == []
    assert "Programs were not compiled: no plugin." in report and "Compiled programs" not in report
    assert metrics["fits"] and metrics["longest_tokens"] >= 131_072 and metrics["smallest_mesh"] == "context=16"
    # 256 experts of 3 x 6144 x 2048 in 75 layers, a sixteenth of them.
    assert metrics["weights"]["routed experts"] == 75 * 256 * 3 * 6144 * 2048 * 2 // 16
    assert sum(metrics["weights"].values()) == metrics["need"]["weights"]
    assert metrics["weights_by_form"]["bf16"] == metrics["need"]["weights"]


def test_weights_in_8_bits_are_counted_with_their_scales(tmp_path, monkeypatch):
    monkeypatch.setattr(topologies, "_described_gpus", lambda hosts, of_a_host: "no plugin")
    metrics, report = planned(tmp_path, "--preset=glm-5.2", "--topology=h200:8", "--mesh=context=8", "--weights=fp8")
    numbers = 75 * 256 * 3 * 6144 * 2048 // 8
    assert metrics["weights"]["routed experts"] == numbers + 4 * numbers // 128**2
    assert metrics["need"]["weights"] == metrics["weights_by_form"]["fp8"] < 0.55 * metrics["weights_by_form"]["bf16"]
    assert metrics["fits"] and "weights in all, with --weights=bf16" in report


def test_half_as_many_devices_do_not_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(topologies, "_described_gpus", lambda hosts, of_a_host: "no plugin")
    metrics, report = planned(tmp_path, "--preset=glm-5.2", "--topology=h200:8")
    assert not metrics["fits"] and metrics["longest_tokens"] == 0 and metrics["smallest_mesh"] == "context=16"
    assert "It does not fit" in report and "No length fits." in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens=0"], "--tokens=0: must be at least 1"),
        (["--preset=demo", "--tokens=5000"], "--tokens=5000: demo has 4096 positions"),
        (["--tokens=64", "--chunk=65"], "--chunk=65: is more than --tokens=64"),
        (["--topology=h200:8", "--mesh=context=4"], "--mesh=context=4: .* is not the number of devices, 8"),
    ],
)
def test_flags_that_cannot_be(arguments, message):
    flags.FLAGS(["test", *arguments])
    with pytest.raises(ValueError, match=message):
        plan.read_inputs()


def test_the_overview_is_that_of_the_plans_in_its_folders():
    """results/plan/report.md says what the folders' results.json say; `python -m experiments.benchmarks.plan.overview`."""
    text = (overview.RESULTS / "report.md").read_text()
    plans = {path.parent.name: json.loads(path.read_text()) for path in overview.RESULTS.glob("*/results.json")}
    assert {"glm-5.2-h200-8", "glm-5.2-h200-16", "deepseek-v3.2-h200-16", "glm-5-h200-16"} <= set(plans)
    for name, results in plans.items():
        for row in overview.rows_of(name, results):
            assert row is None or f"| {' | '.join(row)} |" in text


@pytest.mark.slow
def test_the_command_plans_for_the_devices_at_hand(tmp_path):
    command = f"-m experiments.run --experiment=plan --preset=demo --tokens=1024 --chunk=256 --output_dir={tmp_path}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    names = [program["name"] for program in metrics["programs"]]
    assert names == ["prefill: F, dense", "prefill: F, experts", "prefill: S, experts", "decode step", "decode step, all F"]
    assert all(program["refused"] is None for program in metrics["programs"])
    held = metrics["need"]["weights"] + metrics["need"]["cache"]
    assert held <= metrics["programs"][3]["arguments"] <= held + 64
    assert "saved" in done.stdout and metrics["not_compiled"] is None
