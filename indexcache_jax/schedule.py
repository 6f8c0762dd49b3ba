"""Schedule: which layers run their indexer (F) and which reuse indices (S), as one static value.

The rules that give a schedule, and what each engine reads, are in docs/model.md, Schedules.

A schedule has no array leaves: jit specialises on it, so an S layer is compiled without an indexer, its weights or
its key cache.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from indexcache_jax import arguments
from indexcache_jax.foreign import shown

ENGINES = ("transformers", "sglang", "vllm", "tensorrt-llm")
DEFAULT_OFFSET = 2
_LETTERS = {"F": "F", "S": "S", "FULL": "F", "SHARED": "S"}


def _show(value: Any) -> str:
    text = shown(value)
    return text if not text.endswith("...") else f"{text} ({len(value)} entries)"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The F/S choice of every layer. `pattern` is a string of F and S, one letter a layer, the first one F.

    Raises ValueError, showing the value, for an empty pattern, another letter, or a first layer that is not F.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ValueError(f"schedule pattern: {shown(self.pattern)} is empty or not a string")
        if other := sorted(set(self.pattern) - {"F", "S"}):
            raise ValueError(f"schedule pattern: {_show(self.pattern)} holds {other[0]!r}; only F and S are allowed")
        if self.pattern[0] != "F":
            raise ValueError(f"schedule pattern: {_show(self.pattern)} starts with S, but layer 0 has no indices to reuse")

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.pattern)

    @property
    def is_full(self) -> tuple[bool, ...]:
        """For every layer whether it is F."""
        return tuple(letter == "F" for letter in self.pattern)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The numbers of the F layers, ascending."""
        return tuple(i for i, full in enumerate(self.is_full) if full)

    @property
    def num_full(self) -> int:
        """How many layers are F."""
        return self.pattern.count("F")

    @property
    def source(self) -> tuple[int, ...]:
        """For every layer the F layer whose indices it attends with (itself where it is F)."""
        sources, current = [], 0
        for layer, full in enumerate(self.is_full):
            current = layer if full else current
            sources.append(current)
        return tuple(sources)

    def serves(self, layer: int) -> tuple[int, ...]:
        """The layers that attend with the indices of F layer `layer`: itself and the S layers up to the next F.

        Raises ValueError for a layer that is not F.
        """
        if not (0 <= arguments.integer("layer", layer) < self.num_layers and self.is_full[layer]):
            raise ValueError(f"layer {layer} of {self.pattern} is not an F layer")
        return tuple(i for i, source in enumerate(self.source) if source == layer)

    def check_layers(self, num_layers: int) -> None:
        """ValueError unless the schedule is one for so many layers."""
        if self.num_layers != arguments.integer("num_layers", num_layers):
            raise ValueError(f"schedule pattern: {_show(self.pattern)} has {self.num_layers} entries for {num_layers} layers")

    def _layer(self, layer: int) -> int:
        """The number of a layer; ValueError for one that is none."""
        return arguments.integer("layer", layer, 0, self.num_layers - 1)

    def with_shared(self, layer: int) -> Schedule:
        """This schedule with `layer` turned from F to S, as one flip of the search.

        Raises ValueError for layer 0, and for what is no layer.
        """
        layer = self._layer(layer)
        return Schedule(self.pattern[:layer] + "S" + self.pattern[layer + 1 :])

    def with_full(self, layer: int) -> Schedule:
        """This schedule with `layer` turned to F, as when the search takes a flip back; ValueError for what is no layer."""
        layer = self._layer(layer)
        return Schedule(self.pattern[:layer] + "F" + self.pattern[layer + 1 :])

    @classmethod
    def all_full(cls, num_layers: int) -> Schedule:
        """The schedule in which every layer runs its indexer: plain DeepSeek Sparse Attention. ValueError below one layer."""
        return cls("F" * arguments.integer("num_layers", num_layers, 1))

    @classmethod
    def parse(cls, text: str | Sequence[str], num_layers: int | None = None, field: str = "schedule pattern") -> Schedule:
        """The schedule that "FSSF" or ["full", "shared", ...] spells, in either letter case.

        Raises ValueError that names `field` and shows the value for other entries, a first layer that is not F, or a
        length other than `num_layers`.
        """
        if not isinstance(text, (str, list, tuple)) or not text:
            raise ValueError(f"{field}: {_show(text)} is neither a string like 'FSSF' nor a list like ['full', 'shared']")
        letters = []
        for entry in text:
            letter = _LETTERS.get(entry.upper()) if isinstance(entry, str) else None
            if letter is None:
                raise ValueError(f"{field}: {_show(text)} holds {shown(entry)}; only F, S, full and shared are allowed")
            letters.append(letter)
        if num_layers is not None and len(letters) != arguments.integer("num_layers", num_layers):
            raise ValueError(f"{field}: {_show(text)} has {len(letters)} entries for {num_layers} layers")
        if letters[0] != "F":
            raise ValueError(f"{field}: {_show(text)} starts with a shared layer, but layer 0 has no indices to reuse")
        return cls("".join(letters))

    @classmethod
    def from_freq(cls, num_layers: int, freq: int, offset: int = DEFAULT_OFFSET) -> Schedule:
        """The rule of GLM-5.2's config.json: layer i is F where max(i - offset + 1, 0) mod freq == 0.

        freq and offset are index_topk_freq and index_skip_topk_offset. Raises ValueError for a number below 1.
        """
        for field, value in (("num_hidden_layers", num_layers), ("index_topk_freq", freq), ("index_skip_topk_offset", offset)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}: {shown(value)} is not an integer of at least 1")
        return cls("".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(num_layers)))

    @classmethod
    def uniform(cls, num_layers: int, num_full: int) -> Schedule:
        """The schedule of `num_full` F layers spread evenly from layer 0: what searched schedules are compared with.

        Raises ValueError unless num_full is between 1 and num_layers.
        """
        arguments.integer("num_layers", num_layers, 1)
        if not 1 <= arguments.integer("num_full", num_full) <= num_layers:
            raise ValueError(f"num_full: {num_full!r} is not between 1 and {num_layers}")
        full = {i * num_layers // num_full for i in range(num_full)}
        return cls("".join("F" if i in full else "S" for i in range(num_layers)))

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Schedule:
        """The schedule that a config.json asks for (docs/model.md, Schedules).

        The first field of indexer_types, index_topk_pattern, index_topk_freq (with index_skip_topk_offset) that is not null
        decides, with a warning where a later one disagrees; all layers are F where none is there. Raises ValueError that
        names the field at fault.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"fields: {arguments.described(fields)} is not a mapping of config.json's fields")
        num_layers = fields.get("num_hidden_layers")
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_hidden_layers: {shown(num_layers)} is not an integer of at least 1")
        by_field: dict[str, Schedule] = {}
        for field in ("indexer_types", "index_topk_pattern"):
            if fields.get(field) is not None:
                by_field[field] = cls.parse(fields[field], num_layers, field)
        if fields.get("index_topk_freq") is not None:
            offset = fields.get("index_skip_topk_offset")
            by_field["index_topk_freq"] = cls.from_freq(
                num_layers, fields["index_topk_freq"], DEFAULT_OFFSET if offset is None else offset
            )
        if not by_field:
            return cls.all_full(num_layers)
        winner, schedule = next(iter(by_field.items()))
        for field, other in by_field.items():
            # A freq of 1 is every config class's default, not a statement against the list beside it.
            if other != schedule and not (field == "index_topk_freq" and fields[field] == 1):
                warnings.warn(f"{field} gives {other.pattern}, but {winner} gives {schedule.pattern} and wins", stacklevel=2)
        return schedule

    def to_hf(self) -> dict[str, Any]:
        """Every config.json field that some engine reads, all saying the same schedule.

        index_topk_freq is left out: each engine gives the two fields here precedence over it.
        """
        return {
            "indexer_types": ["full" if full else "shared" for full in self.is_full],
            "index_topk_pattern": self.pattern,
        }

    def to_engine(self, engine: str) -> dict[str, Any]:
        """The setting that makes an inference engine use this schedule, as a dict (docs/model.md, Schedules).

        transformers: config.json, or `from_pretrained(path, **setting)`; sglang: --json-model-override-args;
        vllm: --hf-overrides; tensorrt-llm: config.json. Raises ValueError for another engine.
        """
        fields = self.to_hf()
        arguments.choice("engine", engine, ENGINES)
        if engine == "transformers":
            return {"indexer_types": fields["indexer_types"]}
        if engine == "sglang":
            return fields  # it prefers indexer_types, so a checkpoint that has them must get new ones
        if engine == "vllm":
            return {"use_index_cache": True, "index_topk_pattern": self.pattern}
        return {"index_topk_pattern": self.pattern}  # tensorrt-llm

    def __str__(self) -> str:
        return self.pattern


def check_is_schedule(name: str, value: Any) -> None:
    """ValueError, naming the argument, unless its value is a Schedule."""
    if not isinstance(value, Schedule):
        raise ValueError(f"{name}: {arguments.described(value)} is not a Schedule; Schedule.parse makes one of a pattern")
