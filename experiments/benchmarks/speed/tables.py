"""What a run leaves behind: the table, what schedules save, the stages' shares, and the plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks.speed.stages import OTHER, STAGES
from experiments.common.options import ALL_F
from experiments.common.report import Output, markdown_table

HEADER = ["schedule", "length", "prefill", "published", "one request", "published", "full cache", "published", "rows"]
HEADER += ["cache of a request", "indexer in prefill", "in decode", "1M prompt tokens", "1M output tokens"]


def cells(r: Mapping[str, Any]) -> list[str]:
    """A record as a row of the report."""

    def number(value: float | None, unit: str, form: str = ".3g") -> str:
        return "" if value is None else f"{value:{form}} {unit}".strip()

    def indexer(shares: Mapping[str, float] | None) -> float | None:
        return None if shares is None else 100 * (shares["scores"] + shares["top-k"])

    return [
        r["pattern"] + (" scaled" if r["scaled"] else ""),
        str(r["length"]),
        number(r["prefill_seconds"], "s"),
        number(r["published_prefill_seconds"], "s"),
        number(r["decode_one"], "tok/s", ".1f"),
        number(r["published_decode_one"], "tok/s", ".1f"),
        number(r["decode_full"], "tok/s", ".0f"),
        number(r["published_decode_full"], "tok/s", ".0f"),
        str(r["full_rows"] or ""),
        number(r["cache_bytes"] / 1e9, "GB", ".2f"),
        number(indexer(r["prefill_shares"]), "%", ".0f"),
        number(indexer(r["decode_shares"]), "%", ".0f"),
        number(r["cost_of_a_million_prompt_tokens"], ""),
        number(r["cost_of_a_million_output_tokens"], ""),
    ]


def savings(records: list[dict[str, Any]]) -> list[str]:
    """What each schedule saves against all F, one line a schedule and length."""
    dense = {r["length"]: r for r in records if r["pattern"] == ALL_F}
    lines = []
    for r in records:
        base = dense.get(r["length"])
        if base is None or r is base:
            continue
        parts = []
        for name, kind in (("prompt", "cost_of_a_million_prompt_tokens"), ("output", "cost_of_a_million_output_tokens")):
            if r[kind] is not None and base[kind] is not None:
                parts.append(f"{100 * (1 - r[kind] / base[kind]):.0f} % of the cost of {name} tokens")
        if parts:
            lines.append(f"- {r['pattern']} at {r['length']} saves {' and '.join(parts)} of all F's.")
    return lines


def shares_table(records: list[dict[str, Any]]) -> str:
    """The stages' shares, "" where none were measured."""
    rows = []
    for r in records:
        for what in ("prefill", "decode"):
            shares = r[f"{what}_shares"]
            if shares is not None:
                cells_ = [f"{100 * share:.0f} %" if share else "-" for share in shares.values()]
                rows.append([r["pattern"], r["length"], what, *cells_])
    if not rows:
        return ""
    return markdown_table(["schedule", "length", "of", *STAGES.values(), OTHER], rows)


def notes(r: Mapping[str, Any]) -> list[str]:
    """What the report says of a record beside its figures."""
    rounds = r["prefill_kernel_by_kernel_rounds"]
    if not rounds:
        return r["notes"]
    seconds = f"{statistics.median(rounds):.3f} s, with CUDA graphs {r['prefill_seconds']:.3f} s"
    return [*r["notes"], f"prefill with its kernels launched one by one takes {seconds}"]


def report(records: list[dict[str, Any]], about: Mapping[str, Any], how: str) -> str:
    """The text of report.md. about: of the run; how: the times were taken."""
    parts = ["# Speed of inference", how]
    parts.append("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()) + ".")
    parts.append(markdown_table(HEADER, [cells(r) for r in records]))
    parts.append(
        'Columns "published" are what the paper reports for its own 30B model in SGLang on H100s: another model of about this '
        "shape on another device. Costs are in the currency of --gpu_hour_price, output tokens those of the full cache."
    )
    parts += ["\n".join(savings(records)), shares_table(records)]
    parts += ["\n".join(f"- {r['pattern']} at {r['length']}: {note}." for r in records for note in notes(r))]
    return "\n\n".join(part for part in parts if part)


def plot(output: Output, records: list[dict[str, Any]], title: str) -> None:
    """speed.png: bars of prefill and decode beside the published ones."""
    from matplotlib.figure import Figure

    patterns = list(dict.fromkeys(r["pattern"] for r in records))
    panels = {
        "prefill_seconds": "prefill, s",
        "decode_one": "decode, one request, tok/s",
        "decode_full": "decode, full cache, tok/s",
    }
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        lengths = sorted({r["length"] for r in records if r[metric] or r[f"published_{metric}"]})
        bars = [(p, kind) for p in patterns for kind in ("ours", "published")]
        if not any(r[f"published_{metric}"] for r in records):
            bars = [(p, "ours") for p in patterns]
        width = 0.8 / len(bars)
        for place, (pattern, kind) in enumerate(bars):
            field = metric if kind == "ours" else f"published_{metric}"
            by_length = {r["length"]: r[field] or 0 for r in records if r["pattern"] == pattern}
            ours = kind == "ours"
            axis.bar(
                [i + (place - (len(bars) - 1) / 2) * width for i in range(len(lengths))],
                [by_length.get(n, 0) for n in lengths],
                width,
                color=f"C{patterns.index(pattern)}",
                alpha=1.0 if ours else 0.4,
                hatch=None if ours else "//",
                label=pattern if ours else f"{pattern}, published (paper, H100)",
            )
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:.0f}K" for n in lengths])
        axis.set(ylabel=label, xlabel="prompt tokens")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(title)
    output.save_figure(figure, "speed.png")
