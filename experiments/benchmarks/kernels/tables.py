"""A measured row, what a run leaves of it behind: the record, the report's tables, the plot."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from experiments.benchmarks.kernels.cases import Row
from experiments.common.report import Output, markdown_table


@dataclasses.dataclass
class Measured:
    row: Row
    flops: float
    bytes: float
    windows: list[float]  # milliseconds of a call
    xla: float | None = None
    kernels: float | None = None  # milliseconds of the kernels of a call, without what lies between them
    launches: float | None = None
    variants: dict[str, float] = dataclasses.field(default_factory=dict)  # milliseconds with a stage left out

    @property
    def ms(self) -> float:
        return statistics.median(self.windows)

    @property
    def rate(self) -> float:
        """TFLOP/s or TB/s."""
        return (self.flops or self.bytes) / self.ms / 1e9

    @property
    def missed(self) -> bool:
        return self.row.target is not None and self.ms > self.row.target

    def of_baseline(self, baselines: dict[str, float]) -> float:
        return self.rate / baselines["matmul_tflops" if self.flops else "copy_tbps"]

    def record(self, baselines: dict[str, float]) -> dict[str, Any]:
        published, source = self.row.published or (None, None)
        return {
            "name": self.row.name,
            "ms": self.ms,
            "windows_ms": self.windows,
            "tflops" if self.flops else "tbps": self.rate,
            "of_matmul" if self.flops else "of_copy": self.of_baseline(baselines),
            "xla_ms": self.xla,
            "published_ms": published,
            "published_by": source,
            "target_ms": self.row.target,
            "kernels_ms": self.kernels,
            "launches": self.launches,
            "variants_ms": self.variants,
        }


HEADER = ["operation", "time", "rate", "of baseline", "than XLA", "best public kernel", "target", "kernels alone"]


def time_of(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.2f} ms" if ms >= 1 else f"{1e3 * ms:.1f} us"


def cells(record: dict[str, Any]) -> list[str]:
    """A row of the report."""
    ms, xla, launches = record["ms"], record["xla_ms"], record["launches"]
    public = "" if record["published_ms"] is None else f"{time_of(record['published_ms'])} ({record['published_by']})"
    return [
        record["name"],
        time_of(ms),
        f"{record['tflops']:.0f} TFLOP/s" if "tflops" in record else f"{record['tbps']:.2f} TB/s",
        f"{record['of_matmul']:.2f} of matmul" if "of_matmul" in record else f"{record['of_copy']:.2f} of copy",
        "" if xla is None else f"{xla / ms:.1f} x faster",
        public,
        time_of(record["target_ms"]),
        "" if launches is None else f"{time_of(record['kernels_ms'])} in {launches:g}",
    ]


def report(about: str, rows: list[Row], metrics: dict[str, Any]) -> str:
    """about: how times are taken. `rows` is the whole table: what of it `metrics` lacks is named."""
    lines = ["# Kernels", "", about, ""]
    lines.append(
        '"Than XLA" compares with this library\'s "xla" implementation, for prefill measured on a part of the queries and '
        "multiplied; empty where it was left out for time or does not exist for a part of an operation. For rows that move "
        "bytes the rate counts what has to be read once: keys, scores, selected latents or matrices."
    )
    measured = {record["name"] for record in metrics["rows"]}
    lines += ["", markdown_table(HEADER, [cells(record) for record in metrics["rows"]]), ""]
    parts = [(record, name, ms) for record in metrics["rows"] for name, ms in record.get("variants_ms", {}).items()]
    if parts:
        lines.append("What stages cost: rows that miss their target, measured again with a stage left out.")
        rest = [[record["name"], time_of(record["ms"]), name, time_of(ms)] for record, name, ms in parts]
        lines += ["", markdown_table(["operation", "whole", "variant", "time"], rest), ""]
    lines += [f"- {row.name}: {row.note}" for row in rows if row.note and row.name in measured]
    missing = [row.name for row in rows if row.name not in measured]
    lines += ["", f"Not measured: {'; '.join(missing)}." if missing else "Every row was measured.", ""]
    lines.append("Runs, each with the baselines that its rows are compared with:")
    for one in metrics["runs"]:
        baselines = ", ".join(f"{name} {value:.4g}" for name, value in one["baselines"].items())
        complete = "" if one["complete"] else ", ended before all its rows were measured"
        lines.append(f"- `{one['command']}`: {len(one['rows'])} rows, {baselines}; {one['seconds']:.0f} s{complete}")
    return "\n".join(lines)


def merged(rows: list[Row], earlier: dict[str, Any], run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of earlier runs and this one: its rows replace those of their names."""
    by_name = {record["name"]: record for record in (*earlier["rows"], *records)}
    run = run | {"rows": [record["name"] for record in records]}
    runs = [one | {"rows": [name for name in one["rows"] if name not in run["rows"]]} for one in earlier["runs"]]
    return {
        "runs": [*(one for one in runs if one["rows"]), run],
        "rows": [by_name[row.name] for row in rows if row.name in by_name],
    }


def plot(output: Output, records: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.24 * len(records) + 1.2))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(records))
    left.barh(places, [(one["published_ms"] or 0) / one["ms"] for one in records], color="tab:blue")
    left.axvline(1, color="0.4", linewidth=1)
    left.set(xlabel="best public kernel's time / ours")
    left.set_yticks(places, [one["name"] for one in records], fontsize=7)
    left.invert_yaxis()
    right.barh(places, [(one["xla_ms"] or 0) / one["ms"] for one in records], color="tab:orange")
    right.set(xlabel="XLA implementation's time / ours", xscale="symlog")
    output.save_figure(figure, "kernels.png")
