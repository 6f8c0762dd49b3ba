"""Pictures that more than one experiment draws. Matplotlib is imported by the first that is drawn: it takes a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.common.report import Output
from indexcache_jax.schedule import Schedule


def overlap(output: Output, matrix: np.ndarray, base: Schedule, chosen: Schedule) -> None:
    """overlap.png: the heat map of |A n B| / k [N, N] between the selections of the N F layers of `base`.

    A layer's tick also shows its letter in the schedule `chosen`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.2))
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="|A ∩ B| / k")
    labels = [f"{layer} {'F' if chosen.is_full[layer] else 'S'}" for layer in base.full_layers]
    step = -(-len(labels) // 26)
    ticks = range(0, len(labels), step)
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=90)
    axes.set_yticks(ticks, [labels[i] for i in ticks])
    axes.set(title="Overlap of the layers' selections", xlabel="layer, with its letter in the schedule", ylabel="layer")
    output.save_figure(figure, "overlap.png")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel of training curves: (step, value) points by the name of their line."""

    title: str
    ylabel: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def training_curves(output: Output, panels: Sequence[Panel], xlabel: str, size: tuple[float, float]) -> None:
    """training.png: the panels side by side, in a figure of `size` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set(xlabel=xlabel, ylabel=panel.ylabel, title=panel.title)
        axes.legend()
    output.save_figure(figure, "training.png")
