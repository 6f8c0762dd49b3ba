"""The command converts, reports, and fails with one line and an exit code."""

import subprocess
import sys

import pytest

from checkpoints_convert import load
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]


def run(*arguments):
    command = [sys.executable, "-m", "checkpoints_convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT)


def test_converts_with_flags_anywhere(tmp_path, source):
    done = run(
        source, tmp_path / "out", "--format=safetensors", "--schedule=FSSFS", "--dtype=bfloat16", "--max_shard_size=100KB"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "left out 5 tensors of indexers in S layers" in done.stderr
    _, schedule, params = load(tmp_path / "out")
    assert schedule.pattern == "FSSFS" and params.embedding.dtype.name == "bfloat16"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_keeps_what_it_is_told_to(tmp_path):
    mtp = {name.replace("layers.3.", "layers.5."): tensor for name, tensor in MIXED.state.items() if "layers.3." in name}
    source = files.write_checkpoint(tmp_path / "in", files.config_fields(MIXED), MIXED.state | mtp)
    done = run("--keep_mtp", "--format=safetensors", source, tmp_path / "out")
    assert done.returncode == 0 and "left out" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule=FFFFF"], "tensor model.layers.2.self_attn.indexer.wq_b.weight is missing"),
        (["--max_shard_size=tiny"], "max_shard_size: 'tiny'"),
        (["--keep_mtp"], "only from safetensors to safetensors"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(tmp_path, source, flags, message):
    done = run(source, tmp_path / "out", *flags)
    assert done.returncode != 0 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_flags_and_arguments_are_checked(tmp_path, source):
    assert "format" in run(source, tmp_path / "out", "--format=gguf").stderr
    wrong = run(source)
    assert wrong.returncode != 0 and "expected SRC and DST" in wrong.stderr + wrong.stdout
