"""The rows of the quality tables: kept as they are finished, compared, and reported.

A schedule is compared with all F on the same sequences of all seeds, so what is said of a change is its paired standard
error. Ratios of sums (long-range losses, shares of prompts) have 95 % intervals by a bootstrap over sequences and prompts.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments.common import plots
from experiments.common.journal import Journal
from experiments.common.options import ALL_F
from experiments.common.report import Output, markdown_table, text_table, time_left
from experiments.common.search_noise import change
from experiments.reproduction import retrieval
from experiments.reproduction.scoring import Scores, neighbours_and_pairs
from indexcache_jax.schedule import Schedule

KINDS = ("uniform", "greedy", "floating", "similarity")  # of schedules, at every retention
# The ways to the indexers of a schedule, by what --ways calls them, in the order in which they are measured.
WAYS = {
    "untrained": "as it came",
    "indexers": "indexers distilled",
    "own": "indexers distilled, own layer only",
    "once": "distilled once, searched after",
    "everything": "everything distilled",
    "everything-own": "everything distilled, own layer only",
}
REFERENCE = {"everything": "everything", "everything-own": "everything"}  # whose all F a way's rows are compared with
RESAMPLES = 2000
# 30B, mean of five long-context benchmarks (arXiv 2603.12201, tables 2 and 3): to compare orders with, not numbers.
PAPER = {
    "untrained": {
        ALL_F: 50.2,
        "1/2 uniform": 47.4,
        "1/2 greedy": 50.3,
        "1/4 uniform": 43.0,
        "1/4 greedy": 49.9,
        "1/8 uniform": 35.3,
        "1/8 greedy": 46.1,
    },
    "everything": {ALL_F: 51.0, "1/2 uniform": 51.6, "1/2 greedy": 50.6, "1/4 uniform": 50.6},
    "everything-own": {"1/2 uniform": 49.8},
}

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
Measured = Mapping[int, Mapping[str, Any]]  # a row's values as JSON, by seed


# ---- finished rows


class Rows:
    """The finished parts of the tables, by part, seed and name, in a `Journal` about one checkpoint, text and set of flags.

    deadline: of time.perf_counter(), after which no further part is begun. ValueError as for a `Journal`.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any], resume: bool, deadline: float) -> None:
        fields = {"part": str, "seed": int, "name": str, "value": object}
        self._journal = Journal(path, about, fields=fields, resume=resume)
        self._known = {(row["part"], row["seed"], row["name"]): row["value"] for row in self._journal.entries}
        self._deadline, self._began, self._made = deadline, time.perf_counter(), 0
        self.left = 0  # parts that are asked for and not finished, to say how long they take
        self.skipped = 0  # for want of time

    def get(self, part: str, seed: int, name: str) -> Any | None:
        return self._known.get((part, seed, name))

    def once(self, part: str, seed: int, name: str, make: Callable[[], Any], shown: str = "") -> Any | None:
        """The value that is known, or what `make` returns, kept; None where no time is left to begin.

        shown: what the part is called besides its name.
        """
        key = part, seed, name
        if key not in self._known:
            began = time.perf_counter()
            if began > self._deadline:
                self.skipped += 1
                return None
            self._known[key] = value = make()
            self._journal.append({"part": part, "seed": seed, "name": name, "value": value})
            self._made += 1
            seconds, rest = time.perf_counter() - began, time_left(self._made, self._made + self.left, self._began)
            what = ", ".join(filter(None, (f"seed {seed}", part, shown, name)))
            print(f"{what}: {_summary(value)}{seconds:.1f} s ({rest})", flush=True)
        return self._known[key]

    def close(self) -> None:
        self._journal.close()


def _summary(value: Any) -> str:
    """The means of a row's scores for a reader; nothing for other values."""
    if not isinstance(value, dict) or "losses" not in value:
        return ""
    return ", ".join(f"{name} {mean:.4g}" for name, mean in scores(value).means.items()) + ", "


def scores(value: Mapping[str, Any]) -> Scores:
    """The scores in a row's value."""
    return Scores(**{field.name: value[field.name] for field in dataclasses.fields(Scores)})


# ---- statistics


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over seeds (Student's t); NaN for a single value."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, max(1, len(values) - 1)) * spread)


def shown(values: Sequence[float], digits: int = 4) -> str:
    """The mean and its interval, as tables have them."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """The sum over the sum, and its 95 % interval by a bootstrap over the units, which both sequences go through alike."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    picks = np.random.default_rng(0).integers(above.size, size=(RESAMPLES, above.size))
    totals = below[picks].sum(axis=1)
    resampled = above[picks].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(above.sum() / below.sum()), float(low), float(high)


def _ratio_cell(numerators: Sequence[float], denominators: Sequence[float], digits: int = 2, percent: bool = False) -> str:
    if not np.sum(denominators):
        return "-"
    value, low, high = ratio(numerators, denominators)
    if percent:
        return f"{100 * value:+.{digits}f} % ({100 * low:+.{digits}f} to {100 * high:+.{digits}f})"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _joined(found: Measured, seeds: Sequence[int], field: str) -> list[float]:
    return [value for seed in seeds for value in found[seed][field]]


def loss_change(found: Measured, reference: Measured) -> str:
    """How much higher the losses are than the reference's, in per cent, ± the paired standard error; of the seeds both have."""
    seeds = [seed for seed in found if seed in reference]
    return change(*(_joined(of, seeds, "losses") for of in (found, reference))) if seeds else "-"


# ---- tables


@dataclasses.dataclass(frozen=True)
class Found:
    """The schedules of one seed by name, their losses on what they were searched on, and the search's steps beside the DP.

    steps[i]: the number of F layers before a step of the greedy search, and for every flip that it tried the DP's total
    similarity and the loss.
    """

    patterns: dict[str, str]
    calibration: dict[str, float]
    steps: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured, as far as it was.

    searches: by "untrained" or "once", whose indexers they ran on, and by seed. measured: rows by way and name. domains: a
    matrix a seed. overlap [L, L]: of all F's selections. beside: what the overlap is to be compared with, by name: the mean
    of adjacent layers and that of all pairs.
    """

    searches: Mapping[str, Mapping[int, Found]]
    measured: Mapping[str, Mapping[str, Measured]]
    domains: Sequence[Mapping[str, Mapping[str, float]]]
    overlap: np.ndarray | None
    beside: Mapping[str, tuple[float, float]]
    about: Sequence[str]  # sentences on how it was measured

    def patterns(self, way: str, name: str) -> dict[int, str]:
        """The patterns of a row, by seed."""
        searches = self.searches["once" if way == "once" else "untrained"]
        return {seed: searches[seed].patterns[name] for seed in self.measured[way][name]}

    def reference(self, way: str) -> Measured:
        """The row of all F that a way's rows are compared with."""
        return self.measured.get(REFERENCE.get(way, "untrained"), {}).get(ALL_F, {})


def overview(result: Result) -> Table:
    """The change of the held-out loss by schedule and way."""
    ways = [way for way in WAYS if result.measured.get(way)]
    names = dict.fromkeys(name for way in ways for name in result.measured[way])
    rows = [[name, *(loss_change(result.measured[way].get(name, {}), result.reference(way)) for way in ways)] for name in names]
    return "What is lost: held-out loss against all F", ["", *(WAYS[way] for way in ways)], rows


def way_table(result: Result, way: str) -> Table:
    """All measures of a way's schedules."""
    reference, paper, rows = result.reference(way), PAPER.get(way, {}), []
    for name, found in result.measured[way].items():
        seeds, patterns = list(found), list(dict.fromkeys(result.patterns(way, name).values()))
        long, tokens = (_joined(found, seeds, field) for field in ("long_range", "long_range_tokens"))
        common = [seed for seed in seeds if seed in reference]
        before = _joined(reference, common, "long_range")
        after = _joined(found, common, "long_range")
        changed = _ratio_cell(np.subtract(after, before).tolist(), before, 1, percent=True) if common else "-"
        tasks = []
        for task in retrieval.TASKS:
            hits = [of_prompt for seed in seeds for of_prompt in found[seed]["solved"][task]]
            tasks.append(_ratio_cell([sum(of) for of in hits], [len(of) for of in hits]))
        loss = float(np.mean(_joined(found, seeds, "losses")))
        measures = [f"{loss:.4f}", loss_change(found, reference), _ratio_cell(long, tokens, 3), changed, *tasks]
        rows.append([name, " ".join(f"`{p}`" for p in patterns), str(len(seeds)), *measures, str(paper.get(name, "-"))])
    header = ["", "schedules", "seeds", "loss", "change", "long-range loss", "its change", *retrieval.TASKS, "paper, Long"]
    return f"{WAYS[way][:1].upper()}{WAYS[way][1:]}", header, rows


def proxy_table(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """How a step's flips are ordered by similarity and by loss: a row for every number of F layers before the step."""
    rows = []
    for steps in zip(*(one.steps for one in found), strict=False):
        if len(steps[0]["loss"]) < 3:
            continue
        correlations = [float(scipy.stats.spearmanr(step["similarity"], step["loss"]).statistic) for step in steps]
        spreads = [100 * (max(step["loss"]) / min(step["loss"]) - 1) for step in steps]
        chosen = [step["loss"][int(np.argmax(step["similarity"]))] for step in steps]
        regrets = [100 * (loss / min(step["loss"]) - 1) for loss, step in zip(chosen, steps, strict=True)]
        rows.append([str(steps[0]["full"]), shown(correlations, 2), shown(spreads, 2), shown(regrets, 2)])
    return ["F layers before", "rank correlation", "worst flip over best, %", "most similar flip over best, %"], rows


def tables(result: Result, retention: str) -> list[Table]:
    """The report's tables. retention: that of the domains' schedules."""
    found = [overview(result)] if result.measured else []
    found += [way_table(result, way) for way in WAYS if result.measured.get(way)]
    if matrices := result.domains:
        columns = list(matrices[0][ALL_F])
        matrix_rows = [[row, *(shown([m[row][column] for m in matrices]) for column in columns)] for row in matrices[0]]
        found.append((f"Domains: held-out loss at {retention}", ["", *(f"on {c}" for c in columns)], matrix_rows))
    for way, of_seeds in result.searches.items():
        if searches := list(of_seeds.values()):
            rows = [[name, shown([one.calibration[name] for one in searches])] for name in searches[0].calibration]
            found.append((f"Loss on what was searched on, {WAYS[way]}", ["", "loss"], rows))
    if searches := list(result.searches["untrained"].values()):
        header, rows = proxy_table(searches)
        if rows:
            found.append(("Similarity (the DP's measure) against loss, over the flips of each greedy step", header, rows))
    costs = [(way, seconds_of_training(result, way)) for way in WAYS]
    if cost_rows := [[WAYS[way], shown(seconds, 0)] for way, seconds in costs if seconds]:
        found.append(("Seconds of training, all schedules of a seed together", ["", "seconds"], cost_rows))
    return found


def seconds_of_training(result: Result, way: str) -> list[float]:
    """What the rows of a way took to train, by seed: a group of layers that several schedules share counts once."""
    distinct: dict[tuple[int, str], float] = {}
    for name, found in result.measured.get(way, {}).items():
        for seed, pattern in result.patterns(way, name).items():
            if "seconds" in found[seed]:
                distinct[seed, pattern] = found[seed]["seconds"]
    return [sum(s for (of, _), s in distinct.items() if of == seed) for seed in dict.fromkeys(seed for seed, _ in distinct)]


def note(result: Result) -> str:
    """What the tables' figures are of."""
    lines = [
        "A change is against all F with the indexers that the model came with, and where everything was distilled against all "
        "F trained as long, ± its standard error over paired sequences of all seeds. Ranges in brackets are 95 % intervals by "
        "a bootstrap over sequences or prompts. ± in other tables: 95 %, over seeds.",
        *result.about,
        "A rank correlation of -1 says that similarity orders flips as the loss does; near 0 it says nothing about it.",
    ]
    if result.overlap is not None:
        adjacent, pairs = neighbours_and_pairs(result.overlap).values()
        others = {"the paper's 30B": (0.733, 0.622), **result.beside}
        of = ", ".join(f"{name} {a:.3f} and {p:.3f}" for name, (a, p) in others.items())
        lines.append(f"Overlap of selections: adjacent layers {adjacent:.3f}, all pairs {pairs:.3f} ({of}).")
    return "\n".join(lines)


# ---- the report


def plot_training(output: Output, result: Result, seed: int) -> None:
    """training.png: the divergence of the indexers of a seed's uniform schedules over the steps, and of those for spans."""
    lines = {}
    for way in ("indexers", "own", "once"):
        for name, found in result.measured.get(way, {}).items():
            is_drawn = name == ALL_F if way == "once" else name.endswith("uniform")
            if is_drawn and seed in found and found[seed].get("curve"):
                lines["all spans" if way == "once" else f"{name}{', own layer' if way == 'own' else ''}"] = found[seed]["curve"]
    if lines:
        panel = plots.Panel("Divergence of the indexers", "nats per token, mean of the F layers", lines)
        plots.training_curves(output, [panel], "step", (7, 4))


def write_plots(output: Output, result: Result, base: Schedule, seed: int) -> str:
    """Draws what there is, and returns the report's lines that show it."""
    shown_ = []
    if result.overlap is not None:
        plots.overlap(output, result.overlap, base, base)
        shown_.append("![overlap](overlap.png)")
    plot_training(output, result, seed)
    if (output.directory / "training.png").exists():
        shown_.append("![training](training.png)")
    return "\n\n".join(shown_)


def metrics(result: Result) -> dict[str, Any]:
    """What results.json says."""
    rows: dict[str, Any] = {}
    for way, of_way in result.measured.items():
        for name, of_seeds in of_way.items():
            patterns = result.patterns(way, name)
            rows.setdefault(way, {})[name] = {
                str(seed): {"pattern": patterns[seed], **scores(value).means, "sequence_losses": value["losses"]}
                for seed, value in of_seeds.items()
            }
    found: dict[str, Any] = {
        "rows": rows,
        "searches": {
            way: {str(seed): dataclasses.asdict(one) for seed, one in of.items()} for way, of in result.searches.items()
        },
        "domains": list(result.domains),
        "training_seconds": {way: seconds_of_training(result, way) for way in result.measured},
    }
    if result.overlap is not None:
        found["overlap"] = {"matrix": result.overlap.tolist(), **neighbours_and_pairs(result.overlap)}
    return found


def markdown(title: str, result: Result, retention: str, images: str) -> str:
    """The report: all tables, each under its name, the note and the images."""
    sections = "\n\n".join(f"## {name}\n\n{markdown_table(header, rows)}" for name, header, rows in tables(result, retention))
    return f"# {title}\n\n{sections}\n\n{note(result)}\n\n{images}\n"


def terminal(result: Result) -> str:
    """The overview and the note, for the terminal."""
    _, header, rows = overview(result)
    return f"{text_table(header, rows)}\n\n{note(result)}"
