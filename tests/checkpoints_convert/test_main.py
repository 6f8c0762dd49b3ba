"""The command converts, reports, and fails with one line and an exit code."""

import subprocess
import sys

import pytest

from checkpoints_convert import __main__ as convert
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--format=gguf"], "flag --format=gguf: value should be one of "),
        (["a", "b", "--shard=5GB"], "--shard: no such flag; "),
        (["a"], "expected SRC and DST, got 1 arguments: a; "),
        ([], "expected SRC and DST, got 0 arguments; "),
        (["a", "b", "c"], "expected SRC and DST, got 3 arguments: a b c; "),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.parse(["convert", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and line.endswith("--help shows what there is")


def test_help_is_on_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(convert.sys, "argv", ["convert", "a", "--help"])
    monkeypatch.setattr(convert.signal, "signal", lambda *_: None)
    convert.command()
    said = capsys.readouterr()
    assert "DST must not exist or be empty" in said.out and "--[no]keep_mtp: " in said.out and not said.err
