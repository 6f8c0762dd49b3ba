"""Times every kernel at the shapes of DeepSeek-V3.2-sized models, beside the best public CUDA kernels.

Rows with a target come first, then those with a published figure, then the rest; where --time_limit cuts a run short, another
one with --rows adds what is missing.

How a time is taken: a program is one XLA executable that calls the operation many times, one call after the other, on
sets of arguments that together exceed twice the L2 cache, so that a call finds nothing there from an earlier one. A
window queues the program many times and waits once; a row's time is the median of the windows' times per call. Launches on
the host overlap with the work of the device, so they count only where the device has to wait for them. What the kernels
alone take, without the gaps between them, is measured afterwards through CUPTI where that is to be had.

Random selections are one key of each of k even parts of the context: sorted, distinct and spread evenly. In "x % shared"
rows a query keeps that part of its predecessor's selection and draws the rest anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

from absl import flags

from experiments.benchmarks.kernels.arrays import selections as selections
from experiments.benchmarks.kernels.baselines import baselines
from experiments.benchmarks.kernels.cases import Case, ProgramArguments, Row, Sizes, on_hopper
from experiments.benchmarks.kernels.rows import table
from experiments.benchmarks.kernels.tables import Measured, cells, merged, plot, report, time_of
from experiments.benchmarks.kernels.timing import compiled, kernel_times, milliseconds
from experiments.common import options
from experiments.common.report import Output, command, device, time_left, versions
from pallas_kernels import hopper

_ROWS = flags.DEFINE_string(
    "rows", "", "measure only rows whose name matches this regular expression, and keep others that lie in the output folder"
)
flags.declare_key_flag("time_limit")
_VARIANTS = flags.DEFINE_bool("variants", True, "measure rows that miss their target also with single stages left out")

SECONDS = 230.0  # by default, of a run
WINDOW_SECONDS = 0.06
PROFILING_SECONDS = 20.0  # of the time limit, kept for the kernels alone
HOW = " ".join((__doc__ or "").split("\n\n", 1)[1].split())  # times are taken


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The shapes' scale, every row of the table, and those to measure, in the order in which they are measured."""

    sizes: Sizes
    rows: list[Row]
    wanted: list[Row]


def read_inputs() -> Inputs:
    """The rows that --rows names; those with targets come first."""
    sizes = Sizes(small=not on_hopper())
    if sizes.small:
        print(f"small shapes and the XLA implementations only: {hopper.why_not()}", flush=True)
    try:
        pattern = re.compile(_ROWS.value)
    except re.error as error:
        raise ValueError(f"--rows={_ROWS.value}: not a regular expression: {error}") from None
    rows = table(sizes)
    wanted = [row for row in rows if pattern.search(row.name)]
    if not wanted:
        raise ValueError(f"--rows={_ROWS.value}: no row has such a name")
    return Inputs(sizes, rows, sorted(wanted, key=lambda row: row.priority))


def earlier_metrics(output: Output) -> dict[str, Any]:
    """The metrics that lie in the output folder, where the same versions measured them on the same device; else none."""
    path = output.directory / "results.json"
    nothing: dict[str, Any] = {"runs": [], "rows": []}
    if not _ROWS.value or not path.exists():  # a run of all rows replaces what there is
        return nothing
    found = json.loads(path.read_text())
    if (found["experiment"], found["versions"], found["device"]) != ("kernels", versions(), device()):
        print(f"{path} is replaced: it is of another experiment, device or versions", flush=True)
        return nothing
    return found["metrics"]


Ready = tuple[Row, Case, Any]  # with the compiled program


class Session:
    """What one run has measured so far, written after each part of it."""

    def __init__(self, given: Inputs, output: Output, began: float, pool: futures.Executor) -> None:
        self.given, self.output, self.began = given, output, began
        self._pool = pool
        self._earlier = earlier_metrics(output)
        self._base: dict[str, float] = {}
        self.measured: list[tuple[Measured, Case, Any]] = []

    def seconds_left(self) -> float:
        return self.began + options.seconds_to_spend(SECONDS) - time.perf_counter()

    def write(self) -> dict[str, Any]:
        """results.json and report.md of what there is; returns the metrics."""
        run = {"command": command(), "baselines": self._base, "seconds": time.perf_counter() - self.began}
        run["complete"] = len(self.measured) == len(self.given.wanted)
        records = [one.record(self._base) for one, _, _ in self.measured]
        metrics = merged(self.given.rows, self._earlier, run, records)
        self.output.finish("kernels", metrics, report(HOW, self.given.rows, metrics))
        return metrics

    def compile(self, what: str, wanted: Iterable[tuple[Callable[..., Any], ProgramArguments]]) -> list[Any]:
        """Programs, compiled while the next ones are traced and their arguments drawn; nothing is measured meanwhile."""
        start = time.perf_counter()
        programs = [one.result() for one in [compiled(function, arguments, self._pool) for function, arguments in wanted]]
        print(f"{len(programs)} {what} compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return programs

    def ready(self, what: str, rows: list[Row]) -> list[Ready]:
        """The rows' cases and programs."""
        cases: list[Case] = []

        def made() -> Iterator[tuple[Callable[..., Any], ProgramArguments]]:
            for row in rows:
                cases.append(row.make())
                yield cases[-1].kernel, cases[-1].program_arguments

        programs = self.compile(what, made())
        return list(zip(rows, cases, programs, strict=True))

    def measure_rows(self) -> None:
        """The wanted rows as far as there is time, between two measurements of the baselines."""
        names = ("matmul_tflops", "matmul_fp8_tflops", "copy_tbps")
        fixed = dict(zip(names, self.ready("baselines", baselines(self.given.sizes)), strict=True))
        to_measure = self.ready("kernels", self.given.wanted)
        self.measure_baselines(fixed, "")
        began = time.perf_counter()
        for row, case, program in to_measure:
            if self.seconds_left() < 0:
                print("nothing further is measured: --time_limit has passed", flush=True)
                break
            one = Measured(row, case.flops, case.bytes, milliseconds(program, case.program_arguments, WINDOW_SECONDS))
            self.measured.append((one, case, program))
            far = time_left(len(self.measured), len(to_measure), began)
            print("  ".join([*cells(one.record(self._base)), f"({far})"]), flush=True)
        self.measure_baselines(fixed, "_at_the_end")
        self.write()

    def measure_baselines(self, fixed: Mapping[str, Ready], when: str) -> None:
        for name, (row, case, program) in fixed.items():
            one = Measured(row, case.flops, case.bytes, milliseconds(program, case.program_arguments, WINDOW_SECONDS))
            self._base[f"{name}{when}"] = one.rate
            print(f"{row.name}: {one.rate:.4g} {'TFLOP/s' if case.flops else 'TB/s'}{when}", flush=True)

    def measure_variants(self) -> None:
        """Rows that miss their target, with single stages left out."""
        parts = [(one, case, name) for one, case, _ in self.measured if one.missed for name in case.variants]
        if not (parts and _VARIANTS.value and self.seconds_left() > 0):
            return
        programs = self.compile("variants", ((case.variants[name], case.program_arguments) for _, case, name in parts))
        for (one, case, name), program in zip(parts, programs, strict=True):
            one.variants[name] = statistics.median(milliseconds(program, case.program_arguments, WINDOW_SECONDS))
            print(f"{one.row.name}, {name}: {time_of(one.variants[name])}", flush=True)
        self.write()

    def compare_with_xla(self) -> None:
        """What the rows' references take, as far as there is time."""
        compared = [(one, case.reference) for one, case, _ in self.measured if case.reference is not None]
        if not compared or self.seconds_left() <= PROFILING_SECONDS:
            return
        programs = self.compile("XLA implementations", ((function, ([given], ())) for _, (function, given, _) in compared))
        for (one, (_, given, factor)), program in zip(compared, programs, strict=True):
            if self.seconds_left() < PROFILING_SECONDS:
                print("no further XLA comparisons: --time_limit is near", flush=True)
                break
            one.xla = factor * statistics.median(milliseconds(program, ([given], ()), WINDOW_SECONDS))
            print(f"XLA, {one.row.name}: {one.xla:.4g} ms, {one.xla / one.ms:.1f} x ours", flush=True)

    def profile(self) -> None:
        """The times of the kernels alone, where CUPTI shows them."""
        for one, case, program in self.measured:
            if self.given.sizes.small or self.seconds_left() < 0:
                break
            try:
                one.kernels, one.launches = kernel_times(program, case.program_arguments)
            except ValueError as error:
                print(error, flush=True)
                break
            print(f"kernels alone, {one.row.name}: {one.kernels:.4g} ms in {one.launches:g}", flush=True)


def measure_all(given: Inputs, output: Output, began: float) -> list[dict[str, Any]]:
    """Measures what there is time for, the most important first. The records of the report's rows."""
    with futures.ThreadPoolExecutor() as pool:
        session = Session(given, output, began, pool)
        session.measure_rows()
        session.measure_variants()
        session.compare_with_xla()
    session.write()
    session.profile()
    print(f"{len(session.measured)} rows in {time.perf_counter() - began:.0f} s, written to {output.directory}", flush=True)
    return session.write()["rows"]


def run(output_dir: str, seed: int) -> None:
    del seed  # the arguments are drawn from fixed ones: the times do not depend on them
    began = time.perf_counter()
    output = Output.create(output_dir)
    plot(output, measure_all(read_inputs(), output, began))
