"""Pictures that several experiments draw."""

import numpy as np

from experiments.common import plots
from experiments.common.report import Output
from indexcache_jax.schedule import Schedule


def test_the_overlap_of_many_layers_is_drawn_with_few_ticks(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Output, "save_figure", lambda self, figure, name: figures.append((figure, name)))
    base = Schedule("F" * 60)
    plots.overlap(Output(tmp_path), np.eye(60), base, Schedule("FS" * 30))
    ((figure, name),) = figures
    assert name == "overlap.png"
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels[:2] == ["0 F", "3 S"] and len(labels) == 20


def test_training_curves_have_a_panel_each(tmp_path):
    panels = [plots.Panel(title, "nats", {"warm-up": [(0, 2.0), (1, 1.0)]}) for title in ("a", "b")]
    plots.training_curves(Output(tmp_path), panels, "step", (8, 3))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
