"""How a schedule is given to an inference engine: the fields, where they go, and what to know before."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from typing import Any

from checkpoints_convert.orbax_io import is_orbax
from indexcache_jax.config import Config
from indexcache_jax.config_json import ARCHITECTURES, GLM
from indexcache_jax.schedule import ENGINES, Schedule


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to give a schedule to an engine: the config fields, and where they go."""

    engine: str
    fields: dict[str, Any]
    usage: str


def settings(schedule: Schedule, checkpoint: str, config: Config) -> list[Setting]:
    """How every engine is given a schedule for the checkpoint in a directory."""
    path = shlex.quote(checkpoint)
    found = []
    for engine in ENGINES:
        fields = schedule.to_engine(engine)
        pasted = shlex.quote(json.dumps(fields))
        usage = {
            "transformers": f"AutoModelForCausalLM.from_pretrained({checkpoint!r}, **{fields!r})",
            "sglang": f"python -m sglang.launch_server --model-path {path} --json-model-override-args {pasted}",
            "vllm": f"vllm serve {path} --hf-overrides {pasted}",
            "tensorrt-llm": f"in {pathlib.Path(checkpoint) / 'config.json'}: {json.dumps(fields)[1:-1]}",
        }[engine]
        if engine == "transformers" and config.family != GLM:
            usage = f"not supported: transformers runs every layer of a {ARCHITECTURES[config.family]} as full"
        found.append(Setting(engine, fields, usage))
    return found


def caveats(config: Config) -> list[str]:
    """What to know before a setting is pasted (docs/model.md, Schedules)."""
    found = [
        "The settings are those of transformers 5.23, SGLang 0.5.23 and the vLLM and TensorRT-LLM of that time; older ones "
        "ignore them and run every layer as F.",
        "With pipeline parallelism let every stage begin with an F layer: indices stay within a stage.",
        "The draft layer of multi-token prediction is no layer of the pattern; it keeps its own indexer.",
    ]
    if config.family != GLM:
        found.append(
            "transformers gives indexers that a checkpoint lacks random weights, without an error: from a checkpoint that was "
            "written for this schedule its logits are wrong."
        )
    return found


def for_engines(checkpoint: str) -> tuple[str, str]:
    """The directory that engines are to read, and the command that makes it, "" where `checkpoint` is of their format."""
    if not is_orbax(pathlib.Path(checkpoint)):
        return checkpoint, ""
    made = f"{checkpoint.rstrip('/')}-safetensors"
    return made, f"python -m checkpoints_convert {shlex.quote(checkpoint)} {shlex.quote(made)} --format=safetensors"


def to_paste(schedule: Schedule, checkpoint: str, config: Config) -> str:
    """Every engine's setting, and what to know before it is pasted, in Markdown. checkpoint: a directory of either format."""
    directory, first = for_engines(checkpoint)
    lines = "\n\n".join(f"{s.engine}:\n\n    {s.usage}" for s in settings(schedule, directory, config))
    lines += "\n\n" + "\n".join(f"- {caveat}" for caveat in caveats(config))
    return f"Engines read safetensors, so first:\n\n    {first}\n\n{lines}" if first else lines
