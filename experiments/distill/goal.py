"""What indexers are distilled for: the schedule, or several spans; the other layers, or their own alone."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from experiments.common import inputs, options
from indexcache_jax.foreign import read_json, shown
from indexcache_jax.schedule import Schedule

SCHEDULE_FLAGS = "schedule", "retention"
SCHEDULE_FROM = flags.DEFINE_string(
    "schedule_from", "", "output folder of a search, such as out/search: train for the schedule that it chose"
)
CROSS_LAYER = flags.DEFINE_bool("cross_layer", True, "teach an indexer all layers it serves, not its own alone")
SPANS = flags.DEFINE_integer(
    "spans",
    None,
    "instead of --schedule and --retention: keep the checkpoint's schedule, and teach every indexer to serve 1, 2, ... and up "
    "to so many layers, for a search afterwards; with --train=indexers",
    lower_bound=1,
)


def target_schedule(base: Schedule) -> Schedule:
    """The checkpoint's with --spans; else that of --schedule_from, --schedule, or uniform at --retention."""
    if SPANS.value is not None:
        return base
    if SCHEDULE_FROM.value:
        return schedule_of_search(SCHEDULE_FROM.value, base.num_layers)
    if (entry := inputs.only_schedule()) is not None:
        return inputs.schedule(entry, base.num_layers)
    return Schedule.uniform(base.num_layers, inputs.kept_at_retention(base.num_layers))


def schedule_of_search(folder: str, num_layers: int) -> Schedule:
    """The schedule that the search with this output folder chose. ValueError for another folder, and for another model's."""
    path = pathlib.Path(folder) / "results.json"
    results = read_json(path)
    if results.get("experiment") != "search":
        raise ValueError(
            f"--schedule_from={folder}: the experiment of {path} is {shown(results.get('experiment'))}, not 'search'"
        )
    metrics = results.get("metrics")
    pattern: Any = metrics.get("pattern") if isinstance(metrics, dict) else None
    return Schedule.parse(pattern, num_layers, f"--schedule_from={folder}: metrics.pattern of {path}")


def check_schedule_flags() -> None:
    """ValueError for a flag that names a schedule beside another one that does, where it would count for nothing."""
    if SPANS.value is not None:
        options.refuse(f"counts for nothing beside --spans={SPANS.value}; leave one out", "schedule_from", *SCHEDULE_FLAGS)
    if SCHEDULE_FROM.value:
        options.refuse(f"counts for nothing beside --schedule_from={SCHEDULE_FROM.value}; leave one out", *SCHEDULE_FLAGS)
    if (entry := inputs.only_schedule()) is not None:
        options.refuse(f"counts for nothing beside --schedule={entry}; leave one out", "retention")
