"""What experiments read, checked once: the checkpoint and its dtype, schedules, sequences of text, and training stages.

Settings come from the flags of options.py; every ValueError names the flag that is wrong.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import math
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints_convert
from checkpoints_convert.companions import with_stop_tokens
from experiments.common import options, text
from indexcache_jax import memory
from indexcache_jax.config import Config
from indexcache_jax.config_json import read_config_json
from indexcache_jax.params import abstract
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import FP8, CacheFormat
from indexcache_jax.sharding import SERVING
from indexcache_jax.training import Stage

CACHE_DTYPES = {"fp8": FP8, "bf16": jnp.dtype(jnp.bfloat16)}  # what the cache's flags may say

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

MOST_TOKENS = 4  # of a byte of a document, or beside it: some tokenizers write a character as several, or mark both ends

SHARE = "1/4"  # of layers that are F, where neither --schedule nor the model says

# ---- the model and its schedule


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The directory that --checkpoint names, and the dtype, "float32" or "bfloat16", to compute in."""

    directory: str
    dtype: str

    @functools.cached_property
    def weights(self) -> str | None:
        """The form to load it in: "fp8" for matrices in 8 bits, which --weights asks for or the checkpoint has, else None."""
        asked = options.WEIGHTS.value
        return checkpoints_convert.stored_weights(self.directory) if asked is None else made_weights()

    @property
    def name(self) -> str:
        """What a report calls it."""
        return options.CHECKPOINT.value or "the shipped checkpoint"


def checkpoint() -> Checkpoint:
    """--checkpoint and --dtype, or what stands for them where they are not given. ValueError for what is no directory."""
    directory = options.CHECKPOINT.value or str(options.DEMO)
    if not pathlib.Path(directory).is_dir():
        raise ValueError(f"--checkpoint={directory}: {_instead_of_a_directory(directory)}")
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return Checkpoint(directory, dtype)


def _instead_of_a_directory(given: str) -> str:
    """What --checkpoint names where it is no directory: a file, or maybe a model of the Hub, which is not downloaded here."""
    if pathlib.Path(given).exists():
        return "is a file; name the directory that holds config.json and the weights"
    if _HUB_NAME.fullmatch(given):
        return f"no such directory; if that is a model of the Hub, get it first: hf download {given} --local-dir DIR"
    return "no such directory"


def made_weights() -> str | None:
    """What --weights makes of weights that no checkpoint stores: "fp8" for matrices in 8 bits, else None."""
    return "fp8" if options.WEIGHTS.value == "fp8" else None


def described(directory: str) -> tuple[Config, Schedule]:
    """The model and the schedule of a checkpoint by its config.json alone; what is wrong elsewhere is said where it is read."""
    with warnings.catch_warnings(action="ignore"):  # they come with the weights
        fields = read_config_json(directory)
        return with_stop_tokens(Config.from_hf(fields), pathlib.Path(directory)), Schedule.from_hf(fields)


def stored_bytes(directory: str) -> int:
    """Bytes of a checkpoint's weights, without layers of multi-token prediction, by its config.json and its headers."""
    fields, (config, schedule) = read_config_json(directory), described(directory)
    tree = abstract(config, schedule, checkpoints_convert.stored_weights(directory))
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    return memory.tree_bytes(tree, dtype if dtype in ("float32", "float16") else "bfloat16", memory.mesh_of(), SERVING)


def preset_model(name: str) -> tuple[Config, Schedule]:
    """The model and the schedule of a released model, or of the small one shipped here ("demo")."""
    fields = read_config_json(options.DEMO) if name == "demo" else preset(name)
    return Config.from_hf(fields), Schedule.from_hf(fields)


def schedule_to_plan(base: Schedule) -> Schedule:
    """--schedule, or the model's own, or a quarter of the layers F where the model has all of them F."""
    entry = only_schedule()
    if entry is None and base.num_full < base.num_layers:
        return base
    return schedule(entry or SHARE, base.num_layers)


def share(flag: str, value: str) -> fractions.Fraction:
    """The share, above 0 and up to 1, that a flag's text such as "1/4" or "0.25" gives."""
    try:
        fraction = fractions.Fraction(value)
    except (ValueError, ZeroDivisionError):
        fraction = fractions.Fraction(0)
    if not 0 < fraction <= 1:
        raise ValueError(f"--{flag}={value}: not a share such as 1/4 or 0.25")
    return fraction


def kept(num_layers: int, retention: fractions.Fraction) -> int:
    """The number of F layers at a retention, rounded up: 12 of 47 at 1/4."""
    return math.ceil(num_layers * retention)


def kept_at_retention(num_layers: int) -> int:
    """The number of F layers at --retention."""
    return kept(num_layers, share("retention", options.RETENTION.value))


def schedule(entry: str, num_layers: int) -> Schedule:
    """One entry of --schedule: a pattern of `num_layers` letters, "all F", or a share of F layers, spread evenly."""
    if entry == options.ALL_F:
        return Schedule.all_full(num_layers)
    if "/" in entry:
        return Schedule.uniform(num_layers, kept(num_layers, share("schedule", entry)))
    return Schedule.parse(entry, num_layers, f"--schedule={entry}")


def only_schedule() -> str | None:
    """The one entry of --schedule, None where it is not given. ValueError for several."""
    entries = options.SCHEDULE.value
    if len(entries) > 1:
        raise ValueError(f"--schedule={','.join(entries)}: this experiment takes one schedule")
    return entries[0] if entries else None


# ---- inference

CUT_VOCABULARY = 1024  # of a model that is cut to some layers


def cut(config: Config, moe_layers: tuple[bool, ...]) -> Config:
    """So many layers of a model, with experts or dense, and few tokens, to be measured without embedding and head."""
    return dataclasses.replace(
        config,
        num_layers=len(moe_layers),
        moe_layers=moe_layers,
        vocab_size=min(CUT_VOCABULARY, config.vocab_size),
        eos_token_ids=(),
        bos_token_id=None,
        pad_token_id=None,
    )


def cache_format(latent_dtype: Any, index_dtype: Any) -> CacheFormat:
    """What --latent_cache and --index_cache ask for, or the dtypes given for those that are not set."""
    latent, index = options.LATENT_CACHE.value, options.INDEX_CACHE.value
    return CacheFormat(CACHE_DTYPES[latent] if latent else latent_dtype, CACHE_DTYPES[index] if index else index_dtype)


# ---- text


@dataclasses.dataclass(frozen=True)
class Sides:
    """Documents to search or train on, and others to evaluate on."""

    train: list[text.Document]
    held_out: list[text.Document]


def split(patterns: str, held_out: str | None, flag: str = "text") -> Sides:
    """The documents of `patterns` (of --`flag`) and of `held_out`, without those that both name, which are held out.

    Without `held_out`, a share of the files by their names' hash; None: the experiment has no --held_out.
    """
    documents = text.documents(patterns, flag)
    if held_out:
        kept_apart = text.documents(held_out, "held_out")
        keys = {d.key for d in kept_apart}
        if not (rest := [d for d in documents if d.key not in keys]):
            raise ValueError(f"--{flag}={patterns}: --held_out={held_out} names all of its files, none is left")
        return Sides(rest, kept_apart)
    sides = Sides([d for d in documents if not d.held_out], [d for d in documents if d.held_out])
    if not (sides.train and sides.held_out):
        hint = "" if held_out is None else "; name others with --held_out"
        raise ValueError(f"--{flag}={patterns}: {len(documents)} file(s) are too few to keep some apart{hint}")
    return sides


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a model's text becomes sequences of `context` tokens, each document ended by `separator` if that is not None."""

    encoder: text.Bytes | text.FromFile
    separator: int | None
    context: int
    vocab_size: int

    def draw(self, documents: list[text.Document], flag: str, count: int, seed: int) -> np.ndarray:
        """`count` cuts [count, context + 1] of the documents, taken in random order until there is enough of them.

        flag: where the documents come from, as ValueErrors name it.
        """
        self.check_size(documents, flag, count)
        order = np.random.default_rng(seed).permutation(len(documents))
        shuffled = [documents[i] for i in order]
        tokens = text.stream(shuffled, self.encoder, self.separator, limit=2 * count * self.context + 1)
        self.check_tokens(tokens, flag)
        try:
            return text.sequences(tokens, count, self.context, seed)
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}; give more text, or less --context or fewer sequences") from None

    def check_size(self, documents: list[text.Document], flag: str, count: int) -> None:
        """ValueError for files that are clearly too small for `count` cuts; nothing of them is read."""
        size = sum(document.nbytes for document in documents)
        if MOST_TOKENS * (size + len(documents)) < count * self.context:
            raise ValueError(
                f"--{flag}: {size} bytes of text do not hold the {count} sequences of {self.context} tokens that are asked "
                "for; give more text, or less --context or fewer sequences"
            )

    def check_tokens(self, tokens: np.ndarray, flag: str) -> None:
        """ValueError for a token that the model does not have."""
        if tokens.size and (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"--{flag}: token {largest} of the {self.encoder.name} tokenizer, but vocab_size is {self.vocab_size}"
            )


def reader(directory: str, config: Config) -> Reader:
    """The tokenizer of the checkpoint in `directory` at --context. ValueError for a context that the model cannot be
    searched, trained or measured at."""
    context = options.CONTEXT.value
    if not config.index_topk < context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={context}: must be above index_topk = {config.index_topk}, up to which every key is selected and all "
            f"schedules are the same, and at most {config.max_position_embeddings}, the model's longest"
        )
    separator = next((token for token in config.eos_token_ids if 0 <= token < config.vocab_size), None)
    return Reader(text.tokenizer(directory, config.vocab_size), separator, context, config.vocab_size)


def num_batches(sequences: int) -> int:
    """How many batches of --batch_size so many sequences make."""
    size = options.BATCH_SIZE.value
    if sequences % size:
        raise ValueError(f"--batch_size={size}: does not divide {sequences} sequences")
    return sequences // size


def batches(cuts: np.ndarray) -> list[np.ndarray]:
    """Cuts [N, S+1] as batches [--batch_size, S+1]."""
    return np.split(cuts, num_batches(len(cuts)))


# ---- distillation


def distillation_stages(context: int, dtype: str, cross_layer: bool = True) -> list[Stage]:
    """The dense warm-up and the sparse stage as the flags describe them, computed in `dtype`.

    cross_layer: indexers learn from all layers that they serve, not from their own alone.
    """

    def stage(name: str, kind: str, steps: int, model_learning_rate: float, indexer_learning_rate: float) -> Stage:
        return Stage(
            name,
            kind,
            steps,
            options.BATCH_SIZE.value,
            context,
            model_learning_rate,
            indexer_learning_rate,
            accumulate=options.ACCUMULATE.value,
            cross_layer=cross_layer,
            compute_dtype=dtype,
        )

    sparse_rates = options.MODEL_LEARNING_RATE.value, options.INDEXER_LEARNING_RATE.value
    return [
        stage("warm-up", "warmup", options.WARMUP_STEPS.value, 0.0, options.WARMUP_LEARNING_RATE.value),
        stage("sparse", "sparse", options.SPARSE_STEPS.value, *sparse_rates),
    ]
