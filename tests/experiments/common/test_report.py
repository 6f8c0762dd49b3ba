"""What an experiment leaves behind."""

import json
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure

from experiments import run as _run  # they define the flags that results.json records
from experiments import search as _search
from experiments.common import report

assert _run.EXPERIMENTS and _search.run


@pytest.fixture(autouse=True)
def parsed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--seed=3"])
    for name in report.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["run.py"])


def test_a_folder_to_be_resumed_that_is_not_there_is_said(tmp_path, capsys):
    with flagsaver.flagsaver(resume=True):
        report.Output.create(str(tmp_path / "typo"))
        assert "--resume: " in (said := capsys.readouterr().err) and "typo is not there" in said
        report.Output.create(str(tmp_path))
    assert not capsys.readouterr().err


def test_results_say_what_was_run_on_what(tmp_path):
    output = report.Output.create(str(tmp_path / "a" / "b"))
    output.finish("search", {"loss": 1.5}, "# Title")
    results = json.loads((tmp_path / "a/b/results.json").read_text())
    assert set(results) == {"experiment", "command", "flags", "versions", "commit", "date", "device", "metrics"}
    assert results["metrics"] == {"loss": 1.5} and results["command"] == "python -m experiments.run --seed=3"
    assert results["versions"]["jax"] and results["device"]["platform"] and "retention" in results["flags"]
    assert "--seed=3" in (tmp_path / "a/b/report.md").read_text()


def test_a_command_names_the_variables_that_change_what_is_measured(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    assert report.command() == "XLA_FLAGS='--a=1 --b' python -m experiments.run --seed=3"


def test_figures_are_png_and_nothing_partial_stays(tmp_path):
    output = report.Output.create(str(tmp_path))
    output.save_figure(Figure(), "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output_dir="):
        report.Output.create(str(tmp_path / "file" / "x"))


def test_the_checkpoints_own_folder_is_no_output_folder(tmp_path):
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to(model)
    with flagsaver.flagsaver(checkpoint=str(link)):
        with pytest.raises(ValueError, match=f"^--output_dir={model}: is the checkpoint's folder {link}; choose another$"):
            report.Output.create(str(model))
        assert not list(model.iterdir())
        for folder in (tmp_path, model / "out" / "search"):  # as of a distillation that made it; as the default in its folder
            report.Output.create(str(folder))


def test_tables():
    assert report.markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert report.text_table(["a", "bb"], [["ccc", 1]]) == "a    bb\nccc  1"


def test_time_left_is_that_of_the_rate_so_far(monkeypatch):
    monkeypatch.setattr(report.time, "perf_counter", lambda: 40.0)
    assert report.time_left(3, 12, began=10.0) == "3 of 12, 01:30 left"
    assert report.time_left(1, 121, began=10.0) == "1 of 121, 1:00:00 left"
