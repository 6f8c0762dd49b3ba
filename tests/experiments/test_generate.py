"""The generate experiment: lines that cannot be done are named and the others done, in the order of the file."""

import json
import subprocess
import sys

import pytest

from experiments import generate, text
from experiments.generate import Meter, Request, batches, parse, requests
from experiments.options import DEMO
from indexcache_jax.config import Config

CONFIG = Config.from_hf(DEMO)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('"text"', 'not an object with either "prompt" or "tokens"'),
        ("{}", "not an object with either"),
        ('{"prompt": "a", "tokens": [1]}', "not an object with either"),
        ('{"prompt": 3}', "prompt: int, not a string"),
        ('{"tokens": "abc"}', "tokens: not a list of integers"),
        ('{"tokens": [1, true]}', "tokens: not a list of integers"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, message):
    with pytest.raises(ValueError, match=message):
        parse(line, text.Bytes())


def test_a_prompt_is_read_by_the_tokenizer():
    assert parse('{"prompt": "aé"}', text.Bytes()) == [97, 195, 169]
    assert parse('{"tokens": [3, 1]}', text.Bytes()) == [3, 1]


def test_every_line_keeps_its_number_and_its_own_error(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab"}\n\n{"prompt": ""}\nnonsense\n{"prompt": "too long"}\n{"tokens": [999]}\n')
    found = list(requests(path, text.Bytes(), CONFIG, room=4))
    assert [r.line for r in found] == [1, 3, 4, 5, 6]
    assert found[0] == Request(1, [97, 98])
    for request, message in zip(found[1:], ["is empty", "not JSON", "8 tokens are more than the 4", "token 999"], strict=True):
        assert request.error.startswith(message) and request.tokens == ()


def test_batches_hold_requests_of_about_one_length():
    window = [Request(i, [1] * n) for i, n in enumerate((9, 2, 8, 1))] + [Request(9, error="bad")]
    assert [[len(r.tokens) for r in batch] for batch in batches(window, 2)] == [[1, 2], [8, 9]]


def test_the_meter_counts_each_phase_apart(monkeypatch, capsys):
    clock = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    meter = Meter(4)
    meter("prefill", 100)
    meter("decode", 30)
    assert (meter.rate("prefill"), meter.rate("decode")) == (50.0, 30.0)
    assert "prefill 50.0 tok/s, decode 30.0 tok/s" in capsys.readouterr().err
    assert Meter.rate(type("", (), {"tokens": {"decode": 0}, "seconds": {"decode": 0.0}})(), "decode") == 0.0


def run(tmp_path, *flags):
    command = [sys.executable, "-m", "experiments.run", "--experiment=generate", f"--output_dir={tmp_path / 'out'}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompts: name a JSONL file"),
        (["--prompts=nowhere.jsonl"], "--prompts=nowhere.jsonl: no such file"),
        (["--prompts={p}", "--top_p=2"], "top_p: 2.0"),
        (["--prompts={p}", "--stop_tokens=9999"], "--stop_tokens=9999"),
        (["--prompts={p}", "--cache_len=10"], "--cache_len=10: no room"),
        (["--prompts={p}", "--max_new_tokens=0"], "--max_new_tokens=0"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, flags, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    done = run(tmp_path, *(flag.format(p=path) for flag in flags))
    assert done.returncode == 1 and f"error: {message}" in done.stderr


@pytest.mark.slow
def test_completions_come_out_in_order_and_the_rest_is_done(tmp_path):
    path, document = tmp_path / "p.jsonl", tmp_path / "document.py"
    document.write_text("import os\nimport sys\n")
    path.write_text('{"prompt": "def f(x):\\n    return x"}\nnonsense\n{"prompt": "d"}\n{"prompt": "class A:\\n    def"}\n')
    flags = [f"--prompts={path}", "--max_new_tokens=6", "--rows_per_batch=2", "--cache_len=512"]
    done = run(tmp_path, *flags, f"--document={document}")
    assert done.returncode == 1 and "1 of 4 lines could not be done: 2" in done.stderr and "tok/s" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    assert "not JSON" in lines[1]["error"]
    for line in (lines[0], *lines[2:]):
        assert len(line["tokens"]) == 6 or line["finish"] == "stop"
        assert line["completion"] == bytes(t for t in line["tokens"] if t < 256).decode(errors="replace")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["prompts"] == 4 and list(metrics["errors"]) == ["2"]
