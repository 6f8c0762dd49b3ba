"""Writes results/plan/report.md from the plans in its folders: `python -m experiments.benchmarks.plan.overview`."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from experiments.common.report import markdown_table

RESULTS = pathlib.Path(__file__).parents[3] / "results" / "plan"

HEADER = [
    "model",
    "devices",
    "mesh",
    "weights, GB",
    "cache of 128K, GB",
    "temporaries, GB",
    "in all, GB",
    "there is, GB",
    "fits",
]
HEADER += ["longest cache, tokens", "the same split over context, estimate", "fewest such devices, by the estimates"]
HEADER += ["weights with --weights=fp8, GB", "longest cache with those, tokens, estimate"]
ESTIMATE_HEADER = ["plan", "estimated, GB", "compiled, GB", "estimated / compiled"]
TEXT = """# What the large models take of each device

One request, bfloat16, a cache of 131,072 tokens, the model's own schedule or a quarter of the layers F. Nothing was run:
weights and caches are sums over abstract trees, temporaries are those of compiled prefill and decode programs, and each row
has its folder here with the command that made it. There is what a process may use: 95 % of an H200's 141 GiB
(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95), and 95 GiB of a v5p. What NCCL and other libraries take of the rest is not counted.
Weights are in the form that --weights says, by default bfloat16. Lengths are those that memory allows: a model's positions
may be fewer.

{models}

## Estimated and compiled temporaries

Experiments say before they load a model what it needs, from `memory.prefill_temporaries`; here beside the most that a
compiled program holds, for chunks of 4,096 tokens for each H200 and 256 for each v5p.

{estimates}
"""


def gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def tokens(count: int) -> str:
    return f"{count:,}" if count > 0 else "none"


def compiled_temporaries(metrics: dict[str, Any]) -> int | None:
    """The most that a program of the schedule holds beside weights and caches; None where nothing was compiled."""
    programs = metrics["programs"][:-1]  # the last has all layers F
    return max((program["temporaries"] for program in programs), default=None)


def rows_of(name: str, results: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    """A plan's row of both tables; no second one where nothing was compiled."""
    given, metrics = results["flags"], results["metrics"]
    need, compiled = metrics["need"], compiled_temporaries(results["metrics"])
    temporaries = need["temporaries"] if compiled is None else compiled
    row = [f"[{given['preset']}]({name}/report.md)", given["topology"], f"`{metrics['mesh']}`"]
    row += [gb(need["weights"]), gb(need["cache"]), gb(temporaries), gb(metrics["bytes_needed"]), gb(metrics["bytes_there"])]
    context = int((re.search(r"context=(\d+)", metrics["mesh"]) or [0, 1])[1])
    beside = metrics["bytes_there"] - temporaries  # bytes for weights and cache
    per_token = need["cache"] / given["tokens"]
    row += ["yes" if metrics["fits"] else "no", tokens(metrics["longest_tokens"])]
    row.append(tokens(int((beside - need["weights"]) * context / per_token)))
    row.append(f"`{metrics['smallest_mesh']}`" if metrics["smallest_mesh"] else "none")
    in_8_bits = metrics["weights_by_form"]["fp8"]
    row += ["-", "-"] if in_8_bits is None else [gb(in_8_bits), tokens(int((beside - in_8_bits) / per_token))]
    if compiled is None:
        return row, None
    ratio = f"{need['temporaries'] / compiled:.2f}"
    return row, [name, gb(need["temporaries"]), gb(compiled), ratio]


def main() -> None:
    plans = {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/results.json"))}
    rows = [rows_of(name, results) for name, results in plans.items()]
    models = markdown_table(HEADER, [row for row, _ in rows])
    estimates = markdown_table(ESTIMATE_HEADER, [row for _, row in rows if row is not None])
    (RESULTS / "report.md").write_text(TEXT.format(models=models, estimates=estimates), encoding="utf-8")


if __name__ == "__main__":
    main()
