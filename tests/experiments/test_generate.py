"""The generate experiment: lines that cannot be done are named and the others done, in the order of the file."""

import json
import subprocess
import sys
import time

import pytest

from experiments import generate
from experiments.common import text
from experiments.common.options import DEMO
from experiments.common.report import Output
from experiments.generate import Meter, Request, batches, parse, read_line, requests
from indexcache_jax.config import Config

CONFIG = Config.from_hf(DEMO)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ('"text"', 'not an object with either "prompt" or "tokens"'),
        ("{}", "not an object with either"),
        ('{"prompt": "a", "tokens": [1]}', "not an object with either"),
        ('{"prompt": 3}', "prompt: int, not a string"),
        ('{"tokens": "abc"}', "tokens: not a list of integers"),
        ('{"tokens": [1, true]}', "tokens: not a list of integers"),
        ('{"prompt": "a", "temperature": 0.5}', "temperature: is not read of a line; the flags hold for all of them"),
        ('{"prompt": "a", "max_tokens": 5, "seed": 1}', "max_tokens: is not read of a line"),
        ('{"prompt": "a", "\\u001b[31m": 5}', r"\\x1b\[31m: is not read"),
        ('{"custom_id": "a", "method": "POST", "body": {"messages": []}}', "body: lines of OpenAI's batch format are not read"),
        ('{"prompt": "a", "id": [1]}', r"id: \[1\] is neither a string nor an integer"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages: the checkpoint has no chat template"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, message):
    with pytest.raises(ValueError, match=message):
        fields = read_line(line.encode())
        generate.ids_of(fields)
        parse(fields, text.Bytes())


def test_an_answer_has_its_lines_own_name(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab", "id": "x\\n"}\n{"custom_id": 7, "prompt": 3}\n')
    good, bad = requests(path, text.Bytes(), CONFIG, room=4)
    assert good.ids == {"id": "x\n"} and bad.ids == {"custom_id": 7}
    journal = generate.completions(Output.create(str(tmp_path)), {}, [good, bad])
    with journal:
        writer = generate.Writer(journal, [good, bad])
        writer.add({"line": 1, **good.ids, "completion": "c"})
        writer.write()
    lines = [json.loads(line) for line in (tmp_path / generate.OUTPUT).read_text().splitlines()]
    assert [line.get("id", line.get("custom_id")) for line in lines] == ["x\n", 7] and "error" in lines[1]


def test_a_prompt_is_read_by_the_tokenizer():
    assert parse({"prompt": "aé"}, text.Bytes()) == [97, 195, 169]
    assert parse({"tokens": [3, 1]}, text.Bytes()) == [3, 1]


def test_every_line_keeps_its_number_and_its_own_error(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab"}\n\n{"prompt": ""}\nnonsense\n{"prompt": "too long"}\n{"tokens": [999]}\n')
    found = list(requests(path, text.Bytes(), CONFIG, room=4))
    assert [r.line for r in found] == [1, 3, 4, 5, 6]
    assert found[0] == Request(1, [97, 98])
    for request, message in zip(found[1:], ["is empty", "not JSON", "8 tokens are more than the 4", "token 999"], strict=True):
        assert request.error.startswith(message) and request.tokens == ()


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\u0085c"}\r\n\r\n{"tokens": [7]}'.encode())
    expected = "a\u2028b\u0085c".encode()
    assert list(requests(path, text.Bytes(), CONFIG, room=20)) == [Request(1, list(expected)), Request(3, [7])]


def test_bytes_that_are_no_text_are_said_and_not_replaced(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "b"}\n')
    bad, good = requests(path, text.Bytes(), CONFIG, room=20)
    assert "can't decode byte 0xe9" in bad.error and bad.tokens == () and good == Request(2, [98])


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


# ---- going on after a kill

FOUND = [Request(1, [5]), Request(3, error="bad"), Request(4, [6])]


def written(tmp_path, text, about=None):
    (tmp_path / generate.OUTPUT).write_bytes(text)
    if about is not None:
        (tmp_path / generate.ABOUT).write_text(json.dumps(about))
    return Output(tmp_path)


@pytest.mark.parametrize("tail", [b"", b'{"line": 4, "tok', b'{"line": 4}'])
def test_whole_lines_are_kept_and_half_a_line_is_cut_off(tmp_path, tail):
    whole = b'{"line": 1, "tokens": [7]}\n{"line": 3, "error": "bad"}\n'
    output = written(tmp_path, whole + tail, {"seed": 0})
    assert [entry["line"] for entry in generate.completions(output, {"seed": 0}, FOUND).entries] == [1, 3]
    assert (tmp_path / generate.OUTPUT).read_bytes() == whole


@pytest.mark.parametrize("text", [b"", b'{"li', None])
def test_half_a_first_line_is_a_start_from_nothing(tmp_path, text):
    output = Output(tmp_path) if text is None else written(tmp_path, text, {})
    assert generate.completions(output, {}, FOUND).entries == []
    assert (tmp_path / generate.OUTPUT).read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"line": 3}\n', "line 1 is of prompt 3, not of 1"),
        (b'{"line": 1}\nnonsense\n', "line 2 is not a JSON object with line: b'nonsense"),
        (b'{"line": 1}\n' * 4, "4 lines for 3 prompts"),
    ],
)
def test_completions_that_are_not_of_these_prompts_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        generate.completions(written(tmp_path, text, {}), {}, FOUND)
    assert (tmp_path / generate.OUTPUT).read_bytes() == text


def test_completions_made_with_something_else_are_refused(tmp_path):
    output = written(tmp_path, b"", {"seed": 0, "dtype": "float32"})
    with pytest.raises(ValueError, match="was made with another dtype: 'float32' there, 'bfloat16' here"):
        generate.completions(output, {"seed": 0, "dtype": "bfloat16"}, FOUND)
    (tmp_path / generate.ABOUT).unlink()
    with pytest.raises(ValueError, match="is missing"):
        generate.completions(output, {"seed": 0}, FOUND)


def command(tmp_path, *flags):
    return [sys.executable, "-m", "experiments.run", "--experiment=generate", f"--output_dir={tmp_path / 'out'}", *flags]


def run(tmp_path, *flags):
    return subprocess.run(command(tmp_path, *flags), capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompts: name a JSONL file"),
        (["--prompts=nowhere.jsonl"], "--prompts=nowhere.jsonl: no such file"),
        (["--prompts={p}", "--top_p=2"], "top_p: 2.0"),
        (["--prompts={p}", "--stop_tokens=9999"], "--stop_tokens=9999"),
        (["--prompts={p}", "--cache_len=10"], "--cache_len=10: no room"),
        (["--prompts={p}", "--cache_len=4097"], "--cache_len=4097: the model has 4096 positions"),
        (["--prompts={p}", "--document=nowhere.txt"], "--document=nowhere.txt: no such file"),
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
    document_tokens = len(document.read_bytes())  # prefilled once for both batches
    filled = [1, 16, 22, 22]  # three prompts in batches of two, the last one filled up
    assert metrics["prompt_tokens"] == document_tokens + sum(filled)
    assert metrics["new_tokens"] == sum(len(line.get("tokens", ())) for line in lines)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_completes_as_an_uninterrupted_one(tmp_path):
    path, target = tmp_path / "p.jsonl", tmp_path / "out" / generate.OUTPUT
    prompts = [json.dumps({"tokens": list(range(1, 2 + 5 * i % 13))}) for i in range(21)]
    path.write_text("\n".join([*prompts[:9], "nonsense", *prompts[9:]]) + "\n")
    flags = [f"--prompts={path}", "--max_new_tokens=5", "--rows_per_batch=2", "--cache_len=512", "--temperature=1"]
    assert run(tmp_path, *flags).returncode == 1  # of the line that is none
    uninterrupted = target.read_bytes()
    assert uninterrupted.count(b"\n") == 22
    target.unlink()

    process = subprocess.Popen(command(tmp_path, *flags), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not target.exists() or not target.read_bytes().count(b"\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    begun = target.read_bytes()
    assert uninterrupted.startswith(begun) and begun.count(b"\n") < 22  # killed in time
    with open(target, "ab") as out:
        out.write(b'{"line": 999, "comp')

    other = run(tmp_path, *flags, "--seed=1", "--resume")
    (said,) = [line for line in other.stderr.splitlines() if line.startswith("error:")]  # libtpu has lines of its own
    assert other.returncode == 1 and "was made with another sampling.seed: 0 there, 1 here" in said
    assert "1 of 22 lines could not be done: 10" in run(tmp_path, *flags, "--resume").stderr
    assert target.read_bytes() == uninterrupted
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["of_them_done_before"] == begun.count(b"\n")
