"""Verbs, help, and flags that a verb does not read."""

import importlib
import io
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

import indexcache_jax
from experiments import run as run_module
from experiments.common import command_line
from experiments.common.options import EXPERIMENTS

ROOT = pathlib.Path(__file__).parents[3]


def run(*arguments):
    command = [sys.executable, "-m", "experiments.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_verb_is_another_way_to_name_an_experiment():
    assert command_line.with_flag(["search", "--seed=1"]) == ["--experiment=search", "--seed=1"]
    assert command_line.with_flag(["--seed=1"]) == ["--seed=1"] and command_line.with_flag([]) == []
    for arguments in (["--experiment=distill"], ["--experiment", "distill"], command_line.with_flag(["distill"])):
        assert command_line.experiment_of(arguments) == "distill"
    assert command_line.experiment_of(["--seed=1"]) == "search"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch"], r"'serch' is none of search, .*; the nearest is search"),
        (["covert"], r"'covert' is none of .*; the nearest is convert"),
        (["gnerate", "--help"], r"'gnerate' is none of .*; the nearest is generate"),
        (["12"], r"'12' is none of [\w, ]*$"),
        (["search", "--experiment=distill"], "search: --experiment=distill names another"),
        (["--experiment=distil"], "--experiment=distil: is none of .*; the nearest is distill"),
    ],
)
def test_a_wrong_verb_is_an_error_that_names_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        command_line.experiment_of(command_line.with_flag(arguments))


@pytest.fixture
def parsed(monkeypatch):
    importlib.import_module("experiments.run")
    for module in EXPERIMENTS.values():
        importlib.import_module(module)
    before = {name: flags.FLAGS[name].present for name in flags.FLAGS}

    def parse(*arguments):
        return command_line.parse(["run", *arguments])

    yield parse
    for name, was in before.items():
        if not was:
            flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time_limit=5"], "error: --time_limit: search does not read it; speed, kernels, pretrain, quality do; "),
        (["--max_new_tokns=4"], "error: --max_new_tokns: no flag of search; python -m"),
        (["--experiment=generate", "--retention=1/4"], "error: --retention: generate does not read it; "),
        (["--experiment=generate", "--loss_budget=1"], "error: --loss_budget: generate does not read it; search does; "),
        (["--sequence=4"], "error: --sequence: no flag of search; the nearest is --sequences; "),
        (["--zzzz=4"], "error: --zzzz: no flag of search; python -m experiments.run search --help shows"),
        (["--sequences=four"], "error: flag --sequences=four"),
        (["--loss_budget=nan"], "error: --loss_budget=nan: not a number; "),
        (["--stream=maybe"], "error: flag --stream=maybe: neither true nor false ('maybe'); "),
        (["glm-5"], "error: 'glm-5' is no flag; flags look like --checkpoint=DIR; "),
    ],
)
def test_a_flag_that_would_count_for_nothing_is_refused_in_one_line(parsed, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments)
    assert caught.value.code == command_line.USAGE_ERROR
    err = capsys.readouterr().err
    assert err.startswith(message) and len(err.splitlines()) == 1


def test_flags_that_a_verb_reads_are_taken(parsed):
    assert parsed("--sequences=4", "--seed=3", "--output_dir=x", "--coordinator=a:1") == ["run"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_has_every_flag_that_a_verb_reads_and_nothing_of_absls(parsed, name):
    text = command_line.help_of(name)
    shown = {word.split("=")[0].removeprefix("--").removeprefix("[no]") for word in text.split() if word.startswith("--")}
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[name])}
    assert own | {"output_dir", "seed"} <= shown
    assert not {"verbosity", "alsologtostderr", "helpfull", "only_check_args", "run_with_pdb"} & shown
    assert command_line.summary(EXPERIMENTS[name]) in text and max(map(len, text.splitlines())) < 130


def test_the_overview_has_every_verb(monkeypatch):
    text = command_line.overview()
    assert all(f"  {name} " in text for name in (*EXPERIMENTS, "convert"))
    assert text.startswith("usage: python -m experiments.run [VERB]")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/indexcache"])
    assert command_line.overview().startswith("usage: indexcache [VERB]")


def test_help_behind_the_word_help_and_a_version():
    assert command_line.with_flag(["help", "distill"]) == ["--experiment=distill", "--help"]
    assert command_line.with_flag(["help"]) == ["help"] and command_line.wants_help(["help"])
    assert command_line.wants_version(["--version"]) and not command_line.wants_version(["search", "version"])


def test_a_terminal_shows_what_it_can_of_a_report():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    run_module.replace_what_it_lacks(stream)
    print("+1 ± 2 %", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"+1 ? 2 %\n"


def test_help_from_the_command_line():
    done = run("search", "--help")
    assert done.returncode == 0 and "--loss_budget" in done.stdout and "--retention" in done.stdout and not done.stderr
    assert "Shows" not in done.stdout and "absl" not in done.stdout
    assert run("--version").stdout == f"indexcache-jax {indexcache_jax.__version__}\n"
    converter = run("convert", "--help")
    assert "SRC is a Hugging Face directory" in converter.stdout and "keep_mtp" in converter.stdout
    wrong = run("serch")
    assert (
        wrong.returncode == 2
        and wrong.stderr == f"error: 'serch' is none of {', '.join(EXPERIMENTS)}, convert; the nearest is search\n"
    )


def test_help_whose_reader_has_gone_ends_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.run", "search", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
