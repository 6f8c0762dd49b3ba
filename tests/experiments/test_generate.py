"""The generate experiment: lines that cannot be done are named and the others done, in the order of the file."""

import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from experiments import generate
from experiments.common import batch_answers, inputs, text
from experiments.common.batch_answers import COMPLETIONS, ERRORS
from experiments.common.batch_file import RequestFile
from experiments.common.batch_requests import Drawing, Request
from experiments.common.options import DEMO
from experiments.common.report import Output
from experiments.generate import WINDOW, Inputs, Meter, Settings, batches, complete_all
from indexcache_jax.serving import CacheFormat, Sampling
from tests.experiments.common.test_batch_requests import call, reader
from tests.support import command_flags

END = 10  # the stop token: a line feed


def request(line, size, new=3, error=""):
    return Request(line, Drawing(Sampling(), new), np.ones(size, np.int32), error=error)


def test_batches_hold_requests_of_about_one_length():
    window = [request(i, n) for i, n in enumerate((9, 2, 8, 1))] + [request(9, 5, error="bad")]
    assert [[len(r.tokens) for r in batch] for batch in batches(window, 2, room=100)] == [[1, 2], [8, 9]]


def test_the_longest_prompt_and_the_longest_completion_of_a_batch_have_room():
    window = [request(1, 90, 10), request(2, 1, 99), request(3, 2, 20), request(4, 80, 3)]
    assert [[r.line for r in batch] for batch in batches(window, 4, room=100)] == [[2], [3, 4], [1]]


def test_the_meter_counts_each_phase_apart(monkeypatch, capsys):
    clock = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    meter = Meter(4)
    meter("prefill", 100)
    meter("decode", 30)
    assert (meter.rate("prefill"), meter.rate("decode")) == (50.0, 30.0)
    assert "prefill 50.0 tok/s, decode 30.0 tok/s" in capsys.readouterr().err
    assert Meter.rate(type("", (), {"tokens": {"decode": 0}, "seconds": {"decode": 0.0}})(), "decode") == 0.0


# ---- a model that costs nothing


def fake_generate(weights, prompts, config, schedule, limits, *, sampling, seed, ids, stop_tokens, ending, **_):
    """Tokens that depend on a row's prompt, settings, seed and id alone."""
    assert len(prompts) == len(limits) == len(sampling) == len(seed) == len(ids)
    rows = []
    for row, prompt in enumerate(prompts):
        of = zlib.crc32(repr((prompt.tobytes(), sampling[row], seed[row], ids[row])).encode())
        tokens = list(f"<{of}>{'ab' * (of % 9)}\n".encode())[: limits[row]]
        end = None if ending is None else ending(row, tokens)
        rows.append(tokens[:end])
    return rows


class Killed(BaseException):
    """In place of a signal."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(batch_answers.time, "time", lambda: 12.0)
    monkeypatch.setattr(generate, "generate", fake_generate)


CONFIG, SCHEDULE = inputs.described(str(DEMO))


def given(path, rows=2, cache_len=500):
    settings = Settings(Drawing(Sampling(0.5), 40), 0, (END,), rows, cache_len, 16, CacheFormat.of("float32"))
    file = open(path, "rb")  # noqa: SIM115 (closed with the object)
    found = dataclasses.replace(reader(cache_len=cache_len), defaults=settings.drawing)
    requests = RequestFile(file, str(path), found, WINDOW * rows)
    return Inputs(CONFIG, SCHEDULE, object(), text.Bytes(), [], requests, settings, {"checksum": requests.scan.checksum})


def complete(path, directory, resume=False, rows=2, cache_len=500, **options):
    return complete_all(given(path, rows, cache_len), Output.create(str(directory)), resume, **options)


def whole_lines(directory):
    """Those of the completions, and of the errors."""
    paths = (directory / name for name in (COMPLETIONS, ERRORS))
    return [path.read_bytes().split(b"\n")[:-1] if path.exists() else [] for path in paths]


def answers(directory):
    """The completions and the errors, parsed."""
    return [list(map(json.loads, lines)) for lines in whole_lines(directory)]


@pytest.fixture
def prompts(tmp_path):
    """Forty lines of both forms with settings of their own, every seventh of which cannot be done."""
    lines = []
    for i in range(40):
        settings = [{}, {"seed": i}, {"temperature": 0, "stop": ["b", "7"]}, {"max_tokens": 4}][i % 4]
        prompt = "x" * (i * 7 % 13 + 1)
        line = call(prompt=prompt, custom_id=f"c{i}", **settings) if i % 3 else {"prompt": prompt, "id": i} | settings
        lines.append("nonsense" if i % 7 == 3 else json.dumps(line))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines[:9], "", *lines[9:]]) + "\n")
    return path


def test_completions_and_errors_come_out_in_order_and_the_rest_is_done(tmp_path, prompts):
    result = complete(prompts, tmp_path / "out")
    completions, errors = answers(tmp_path / "out")
    assert [batch_answers.line_of(error) for error in errors] == [4, 12, 19, 26, 33, 40] and len(completions) == 34
    lines = [batch_answers.line_of(answer) for answer in completions]
    assert lines == sorted(lines) and result.done_before == 0
    for answer in completions:
        said, finish, tokens = parts(answer)
        assert (finish == "stop") == (tokens < 40 and not (finish == "length" and tokens == 4))
        assert "\n" not in said
    named = {answer.get("custom_id", answer.get("id")) for answer in completions}
    assert {0, "c1", "c2"} <= named and len(named) == 34


def parts(answer):
    """The text, why it ended and the number of tokens of a completion of either form."""
    if "line" in answer:
        return answer["completion"], answer["finish"], len(answer["tokens"])
    body = answer["response"]["body"]
    return body["choices"][0]["text"], body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_an_answer_does_not_depend_on_what_stands_beside_it(tmp_path, prompts, rows):
    complete(prompts, tmp_path / "out", rows=2)
    complete(prompts, tmp_path / "other", rows=rows)
    assert answers(tmp_path / "out") == answers(tmp_path / "other")


def test_a_request_with_a_seed_is_answered_alike_wherever_it_stands(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a", "seed": 5},
        {"prompt": "a"},
        {"prompt": "a", "seed": 5},
        {"prompt": "a"},
        {"prompt": "a", "seed": 6},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    complete(path, tmp_path / "out")
    first, *others = [answer["tokens"] for answer in answers(tmp_path / "out")[0]]
    assert [tokens == first for tokens in others] == [False, True, False, False] and others[0] != others[2]


@pytest.mark.parametrize(
    ("settings", "said", "tokens", "finish"),
    [
        ({}, "<1>abab", 8, "stop"),
        ({"max_tokens": 5}, "<1>ab", 5, "length"),
        ({"stop": "ba"}, "<1>a", 6, "stop"),
        ({"stop": ["x", ">"]}, "<1", 3, "stop"),
        ({"stop": "<1>", "max_tokens": 3}, "", 3, "stop"),
        ({"stop": "x", "max_tokens": 3}, "<1>", 3, "length"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "OpenAI's"])
def test_where_a_completion_ends_and_why(tmp_path, monkeypatch, settings, said, tokens, finish, form):
    monkeypatch.setattr(generate, "generate", functools.partial(fixed_generate, list(b"<1>abab\n")))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"} | settings if form == "plain" else call(prompt="a", **settings)) + "\n")
    complete(path, tmp_path / "out", rows=1)
    (answer,), _ = answers(tmp_path / "out")
    assert parts(answer) == (said, finish, tokens)


def fixed_generate(drawn, weights, prompts, config, schedule, limits, *, ending, **_):
    return [drawn[: limits[row]][: ending and ending(row, drawn[: limits[row]])] for row in range(len(prompts))]


@pytest.mark.parametrize("batches_done", [0, 1, 5, 9, 14])
@pytest.mark.parametrize("torn", [COMPLETIONS, ERRORS])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, prompts, monkeypatch, batches_done, torn):
    complete(prompts, tmp_path / "whole")
    left = iter(range(batches_done))

    def killed_generate(*arguments, **options):
        if next(left, None) is None:
            raise Killed
        return fake_generate(*arguments, **options)

    monkeypatch.setattr(generate, "generate", killed_generate)
    with pytest.raises(Killed):
        complete(prompts, tmp_path / "out")
    with open(tmp_path / "out" / torn, "ab") as file:
        file.write(b'{"line": 40, "comp')
    monkeypatch.setattr(generate, "generate", fake_generate)
    begun = sum(map(len, whole_lines(tmp_path / "out")))
    assert complete(prompts, tmp_path / "out", resume=True).done_before == begun < 40
    for name in (COMPLETIONS, ERRORS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert complete(prompts, tmp_path / "out", resume=True).done_before == 40


def test_where_the_model_fails_its_line_is_named_on_a_line_of_its_own(tmp_path, prompts, monkeypatch, capsys):
    def failing_generate(*arguments, progress, **options):
        progress("prefill", 1)
        raise ValueError("request 0: the model's logits are not finite")

    monkeypatch.setattr(generate, "generate", failing_generate)
    with pytest.raises(ValueError, match=r"^line \d+: the model's logits are not finite"):
        complete(prompts, tmp_path / "out")
    assert capsys.readouterr().err.endswith("\n")


def test_completions_for_standard_output_are_those_of_a_file(tmp_path, prompts):
    complete(prompts, tmp_path / "file")
    stream = io.BytesIO()
    complete(prompts, tmp_path / "stream", stream=stream)
    assert stream.getvalue() == (tmp_path / "file" / COMPLETIONS).read_bytes()
    assert (tmp_path / "stream" / ERRORS).read_bytes() == (tmp_path / "file" / ERRORS).read_bytes()
    assert not (tmp_path / "stream" / COMPLETIONS).exists()


def test_a_file_of_30_mb_takes_a_few_of_memory(tmp_path):
    """Read, completed and resumed: what is held is a window of 128 lines of 8 kB."""
    path, count = tmp_path / "prompts.jsonl", 3750
    with open(path, "w") as file:
        for i in range(count):
            prompt = f"{i:<7900}"
            file.write(json.dumps({"prompt": prompt} if i % 2 else call(prompt=prompt, custom_id=str(i), n=1 + i % 4)) + "\n")
    assert path.stat().st_size > 29e6
    tracemalloc.start()
    try:
        for done in (0, count):
            assert complete(path, tmp_path / "out", resume=True, rows=16, cache_len=8000).done_before == done
            assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()
    completions, errors = answers(tmp_path / "out")
    assert len(completions) + len(errors) == count and len(errors) == count // 4


def command(tmp_path, *flags):
    return [sys.executable, "-m", "experiments.run", "--experiment=generate", f"--output_dir={tmp_path / 'out'}", *flags]


def run(tmp_path, *flags):
    return subprocess.run(command(tmp_path, *flags), capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompts: name a JSONL file"),
        (["--prompts=/dev/null"], "--prompts=/dev/null: is no regular file; - reads standard input"),
        (["--prompts=-", "--completions=-", "--resume"], "--resume: what --completions=- wrote is not there to go on from"),
        (["--prompts=nowhere.jsonl"], "--prompts=nowhere.jsonl: no such file"),
        (["--prompts={p}", "--top_p=2"], "--top_p: 2.0"),
        (["--prompts={p}", "--stop_tokens=9999"], "--stop_tokens=9999"),
        (["--prompts={p}", "--cache_len=10"], "--cache_len=10: no room"),
        (["--prompts={p}", "--cache_len=4097"], "--cache_len=4097: the model has 4096 positions"),
        (["--prompts={p}", "--document=nowhere.txt"], "--document=nowhere.txt: no such file"),
        (["--prompts={p}", "--max_new_tokens=0"], "--max_new_tokens=0"),
    ],
)
def test_bad_flags_are_named(tmp_path, flags, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    flags = [flag.format(p=path) for flag in flags]
    with command_flags.given(*flags), pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        generate.run(str(tmp_path / "out"), 0)


@pytest.mark.slow
def test_completions_come_out_in_order_and_the_rest_is_done(tmp_path):
    path, document = tmp_path / "p.jsonl", tmp_path / "document.py"
    document.write_text("import os\nimport sys\n")
    prompts = ["def f(x):\n    return x", "d", "class A:\n    def"]
    own = {"temperature": 1.2, "seed": 5, "max_tokens": 4, "stop": "("}
    lines = [json.dumps(line) for line in ({"prompt": prompts[0]}, call(prompt=prompts[1]), {"prompt": prompts[2]} | own)]
    path.write_text("\n".join([lines[0], "nonsense", *lines[1:]]) + "\n")
    flags = [f"--prompts={path}", "--max_new_tokens=6", "--rows_per_batch=2", "--cache_len=512"]
    done = run(tmp_path, *flags, f"--document={document}")
    assert done.returncode == 1 and "1 of 4 lines could not be done: 2" in done.stderr and "tok/s" in done.stderr
    completions, errors = answers(tmp_path / "out")
    assert [batch_answers.line_of(answer) for answer in completions] == [1, 3, 4]
    assert [error["line"] for error in errors] == [2] and "JSON" in errors[0]["error"]
    for answer, most in zip(completions, (6, 6, 4), strict=True):
        said, finish, tokens = parts(answer)
        assert tokens == most if finish == "length" else tokens <= most
        if "tokens" in answer and finish == "length":
            assert said == bytes(t for t in answer["tokens"] if t < 256).decode(errors="replace")
    usage = completions[1]["response"]["body"]["usage"]
    assert usage["prompt_tokens"] == len(document.read_bytes()) + 1
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["prompts"] == 4 and metrics["failed"] == 1 and list(metrics["errors"]) == ["2"]
    document_tokens = len(document.read_bytes())  # prefilled once for both batches
    filled = [1, 16, 22, 22]  # three prompts in batches of two, the last one filled up
    assert metrics["prompt_tokens"] == document_tokens + sum(filled)
    assert metrics["new_tokens"] == sum(parts(answer)[2] for answer in completions)

    piped = command(tmp_path / "piped", *flags, f"--document={document}", "--prompts=-", "--completions=-")
    ended = subprocess.run(piped, input=path.read_bytes(), capture_output=True, timeout=600, check=False)
    assert ended.returncode == 1 and b"error: standard input: 1 of 4 lines could not be done: 2" in ended.stderr
    streamed = [json.loads(line) for line in ended.stdout.splitlines()]
    for answer in (streamed[1], completions[1]):
        del answer["response"]["body"]["created"]
    assert streamed == completions


@pytest.mark.slow
def test_a_killed_run_goes_on_and_completes_as_an_uninterrupted_one(tmp_path):
    path, target = tmp_path / "p.jsonl", tmp_path / "out" / COMPLETIONS
    prompts = [json.dumps({"tokens": list(range(1, 2 + 5 * i % 13))}) for i in range(21)]
    path.write_text("\n".join([*prompts[:9], "nonsense", *prompts[9:]]) + "\n")
    flags = [f"--prompts={path}", "--max_new_tokens=5", "--rows_per_batch=2", "--cache_len=512", "--temperature=1"]
    assert run(tmp_path, *flags).returncode == 1  # of the line that is none
    uninterrupted = target.read_bytes()
    assert uninterrupted.count(b"\n") == 21
    target.unlink()

    process = subprocess.Popen(command(tmp_path, *flags), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not target.exists() or not target.read_bytes().count(b"\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    begun, done = target.read_bytes(), sum(map(len, whole_lines(tmp_path / "out")))
    assert uninterrupted.startswith(begun) and begun.count(b"\n") < 21  # killed in time
    with open(target, "ab") as out:
        out.write(b'{"line": 999, "comp')

    other = run(tmp_path, *flags, "--seed=1", "--resume")
    (said,) = [line for line in other.stderr.splitlines() if line.startswith("error:")]  # libtpu has lines of its own
    assert other.returncode == 1 and "was made with another sampling.seed: 0 there, 1 here" in said
    assert "1 of 22 lines could not be done: 10" in run(tmp_path, *flags, "--resume").stderr
    assert target.read_bytes() == uninterrupted
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["of_them_done_before"] == done


def test_progress_has_rates_and_the_time_left_by_what_this_run_has_done(capsys):
    meter = generate.Meter(total=12, done=10)
    meter("prefill", 100)
    assert "10/12 prompts, prefill " in (line := capsys.readouterr().err) and "left" not in line
    meter.done = 11
    meter("decode", 5)
    assert "11/12 prompts" in (line := capsys.readouterr().err) and line.endswith("00:00 left")
