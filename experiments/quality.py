"""The paper's tables 2 and 3 in small: what schedules cost in quality, training-free and distilled, on a model at hand.

Training-free: all F against uniform, searched and similarity-DP schedules at every retention. Distilled: the same
training for all F, uniform, searched, and uniform without the cross-layer loss. Each is measured by the held-out language
loss, by the loss on long-range tokens (whose n-gram last occurred far back) and by retrieval at the full context. Every
seed draws its own calibration, training order, held-out text and prompts; intervals are over seeds. Last, a matrix of
the domains that schedules are searched on against those they are evaluated on.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

import checkpoints_convert
from experiments import data, distill, ngram, options, text, training
from experiments import search as search_experiment
from experiments.report import Output, device, markdown_table, text_table
from experiments.training import Saving
from indexcache_jax import layerwise, model, search
from indexcache_jax.config import Config
from indexcache_jax.overlap import overlap
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule

for _name in (
    *("checkpoint", "context", "batch_size", "held_out_sequences", "dtype", "resume", "retention"),
    *("retentions", "sequences", "blocks"),
    *("accumulate", "warmup_steps", "sparse_steps", "warmup_rate", "indexer_rate", "model_rate"),
):
    flags.declare_key_flag(_name)

_SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds; fewer than 2 give no intervals", lower_bound=1)
_CODE = flags.DEFINE_string("code", "", "text files of the model's own domain, a glob; default the standard library's sources")
_PROSE = flags.DEFINE_string("prose", "", "text files of another domain, a glob; default the documents of installed packages")
_DISTILLED = flags.DEFINE_list(
    "distilled",
    ["DSA", "1/2 uniform", "1/2 searched", "1/2 uniform (own layer only)", "1/4 uniform"],
    "schedules to train for; empty for none",
)
_ORDER = flags.DEFINE_integer("ngram_order", 8, "tokens that must have occurred before for a token to count as long-range", 1)
_LONG = flags.DEFINE_integer("long_range", 1024, "and how many positions back, at least, they last did", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("retrieval_prompts", 8, "retrieval prompts of each task and seed", lower_bound=1)

OWN = " (own layer only)"
# 30B, mean of five long-context benchmarks (arXiv 2603.12201, tables 2 and 3): to compare orders with, not numbers.
PAPER = {
    "DSA": 50.2,
    "1/2 uniform": 47.4,
    "1/2 searched": 50.3,
    "1/4 uniform": 43.0,
    "1/4 searched": 49.9,
    "1/8 uniform": 35.3,
    "1/8 searched": 46.1,
}
PAPER_DISTILLED = {"DSA": 51.0, "1/2 uniform": 51.6, "1/2 searched": 50.6, f"1/2 uniform{OWN}": 49.8, "1/4 uniform": 50.6}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A haystack with something to find: tokens [S+1], of which those marked in answer [S+1] must be predicted."""

    tokens: np.ndarray
    answer: np.ndarray


def _word(rng: np.random.Generator, length: int = 6) -> str:
    return "".join(chr(97 + c) for c in rng.integers(26, size=length))


def one_key(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    """What to hide, and what to ask: (question, answer) in turn."""
    key, value = _word(rng), _word(rng)
    return [f"\n{key} = '{value}'\n"], [(f"\n{key} = '", value)]


def several_keys(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    pairs = [(_word(rng), _word(rng)) for _ in range(4)]
    key, value = pairs[int(rng.integers(4))]
    return [f"\n{k} = '{v}'\n" for k, v in pairs], [(f"\n{key} = '", value)]


def several_values(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    key, values = _word(rng), [_word(rng) for _ in range(3)]
    return [f"\n{key}_{i} = '{v}'\n" for i, v in enumerate(values)], [(f"\n{key}_{i} = '", v) for i, v in enumerate(values)]


def two_hops(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    first, second, value = _word(rng), _word(rng), _word(rng)
    return [f"\n{first} = '{value}'\n", f"\n{second} = {first}\n"], [(f"\nassert {second} == '", value)]


TASKS: dict[str, Callable[[np.random.Generator], tuple[list[str], list[tuple[str, str]]]]] = {
    "one key": one_key,
    "several keys": several_keys,
    "several values": several_values,
    "two hops": two_hops,
}


def prompt(
    task: str, haystack: np.ndarray, encoder: text.Bytes | text.FromFile, context: int, rng: np.random.Generator
) -> Prompt:
    """A prompt of context + 1 tokens: what is hidden stands at random places of the first nine tenths of the haystack.

    ValueError where the context has no room for what is asked.
    """
    hidden, questions = TASKS[task](rng)
    asked, marks = [], []
    for question, answer in questions:
        q, a = (encoder.encode(part.encode()) for part in (question, answer))
        asked += [q, a]
        marks += [np.zeros(q.size, bool), np.ones(a.size, bool)]
    end, needles = np.concatenate(asked), [encoder.encode(part.encode()) for part in hidden]
    room = context + 1 - end.size - sum(needle.size for needle in needles)
    if room < len(needles):
        raise ValueError(f"--context={context}: no room for the retrieval task {task!r}")
    places = np.sort(rng.integers(0, max(1, room * 9 // 10), len(needles)))
    order = rng.permutation(len(needles))
    parts, at = [], 0
    for place, i in zip(places, order, strict=True):
        parts += [haystack[at:place], needles[i]]
        at = place
    tokens = np.concatenate([*parts, haystack[at:room], end]).astype(np.int32)
    return Prompt(tokens, np.concatenate([np.zeros(context + 1 - end.size, bool), *marks]))


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one seed evaluates on: cuts [N, S+1], which of their targets [N, S] are long-range, prompts by task."""

    cuts: np.ndarray
    long_range: np.ndarray
    prompts: Mapping[str, Sequence[Prompt]]


def sample(cuts: np.ndarray, encoder: text.Bytes | text.FromFile, context: int, seed: int) -> Sample:
    rng = np.random.default_rng((seed, 1))
    far = np.stack([ngram.distance(cut, _ORDER.value)[1:] > _LONG.value for cut in cuts])
    prompts = {
        task: [prompt(task, cuts[i % len(cuts)], encoder, context, rng) for i in range(_PROMPTS.value)] for task in TASKS
    }
    return Sample(cuts, far, prompts)


def hidden_states(params: Params, tokens: jax.Array, config: Config, base: Schedule, schedule: Schedule) -> jax.Array:
    """Before the final norm, [1, S, D], in programs that serve every schedule."""
    state = layerwise.start(params, tokens, config)
    for layer, full in enumerate(schedule.is_full):
        state = layerwise.advance(params, state, jnp.int32(layer), jnp.array(full), config, base)
    return state.x


_token_losses = jax.jit(model.token_losses)


@jax.jit
def _hits(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """Where the likeliest token after x [1, W, D] is the target [1, W]."""
    return jnp.argmax(model.unembed(params, x, config), axis=-1) == targets


def measure(params: Params, config: Config, base: Schedule, schedule: Schedule, on: Sample) -> dict[str, float]:
    """Losses in nats per token and the share of prompts whose whole answer is the likeliest continuation, token by token."""
    losses = []
    for cut in on.cuts:
        tokens = jnp.asarray(cut[None])
        x = hidden_states(params, tokens[:, :-1], config, base, schedule)
        losses.append(np.asarray(_token_losses(params, x, tokens[:, 1:], config))[0])
    found = np.stack(losses)
    measured = {"loss": float(found.mean())}
    if on.long_range.any():
        measured["long-range loss"] = float(found[on.long_range].mean())
    for task, prompts in on.prompts.items():
        right = []
        for asked in prompts:
            tokens, answer = jnp.asarray(asked.tokens[None]), asked.answer[1:]
            tail = answer.size - int(np.argmax(answer))
            tail = min(answer.size, -(-tail // 64) * 64)  # few different widths to compile
            x = hidden_states(params, tokens[:, :-1], config, base, schedule)[:, -tail:]
            hits = np.asarray(_hits(params, x, tokens[:, -tail:], config))[0]
            right.append(bool(hits[answer[-tail:]].all()))
        measured[task] = float(np.mean(right))
    return measured


def over(trained: Params, params: Params, base: Schedule, schedule: Schedule) -> Params:
    """Trained params of a schedule with `params`' indexers where it has none: one shape for all schedules."""
    slots = np.array([base.full_layers.index(i) for i in schedule.full_layers])
    indexers = jax.tree.map(lambda whole, part: whole.at[slots].set(part), params.indexer, trained.indexer)
    return dataclasses.replace(trained, indexer=indexers)


@dataclasses.dataclass(frozen=True)
class Model:
    """The checkpoint under study and how its text is read."""

    config: Config
    base: Schedule
    params: Params  # in the dtype to compute in
    stored: Params
    encoder: text.Bytes | text.FromFile
    separator: int | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class Domain:
    """Documents to calibrate and train on, and documents to evaluate on."""

    train: list[text.Document]
    held_out: list[text.Document]


def installed_documents() -> list[text.Document]:
    """Prose that comes with the machine's Python packages: documentation and descriptions."""
    root = pathlib.Path(sysconfig.get_path("purelib"))
    patterns = ("**/*.rst", "**/*.md", "**/*.txt", "*.dist-info/METADATA")
    files = sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file() and p.stat().st_size > 2000})
    return [text.Document(p.relative_to(root).as_posix(), p) for p in files]


def domains() -> dict[str, Domain]:
    found = {
        "code": text.documents(_CODE.value),
        "prose": text.documents(_PROSE.value) if _PROSE.value else installed_documents(),
    }
    sides = {name: Domain([d for d in all_ if not d.held_out], [d for d in all_ if d.held_out]) for name, all_ in found.items()}
    for name, domain in sides.items():
        if not (domain.train and domain.held_out):
            raise ValueError(f"--{name}: {len(found[name])} file(s) are too few to keep some apart")
    return sides


def draw(studied: Model, documents: list[text.Document], flag: str, count: int, seed: int) -> np.ndarray:
    context = options.CONTEXT.value
    return search_experiment.draw(
        documents, f"--{flag}", studied.encoder, studied.separator, count, context, studied.config, seed
    )


def searched(studied: Model, cuts: np.ndarray, num_full: int, output: Output, name: str) -> list[search.Step]:
    """The steps of a greedy search; its evaluations are kept in the output's folder."""
    batches = search_experiment.batches(cuts)
    about = {"pattern": studied.base.pattern, "dtype": studied.dtype, **search.fingerprint(studied.params, batches)}
    log = search.Log(output.directory / f"search-{name}.jsonl", about)
    losses = search.Evaluator(studied.params, studied.config, studied.base, batches, log)
    steps = search.greedy(losses, studied.base, num_full=num_full, blocks=flags.FLAGS.blocks)
    log.close()
    return steps


def schedules(studied: Model, cuts: np.ndarray, output: Output, seed: int) -> dict[str, Schedule]:
    """Every schedule of the tables by its name, searched on the cuts [N, S+1]."""
    layers = studied.base.num_layers
    sizes = {r: search_experiment.kept(layers, search_experiment.share("retentions", r)) for r in flags.FLAGS.retentions}
    steps = searched(studied, cuts, min(sizes.values()), output, f"code-{seed}")
    alike = search.similarities(studied.params, studied.config, studied.base, search_experiment.batches(cuts))
    found = {"DSA": studied.base}
    for retention, size in sizes.items():
        found[f"{retention} uniform"] = Schedule.uniform(layers, size)
        found[f"{retention} searched"] = search.with_at_most(steps, size).schedule
        found[f"{retention} similarity"] = search.most_similar(alike, size)
    return found


def distilled(studied: Model, name: str, schedule: Schedule, tokens: np.ndarray, output: Output, seed: int) -> Params:
    """The checkpoint after both stages, for all layers of `base`, in the dtype to compute in."""
    cross_layer = not name.endswith(OWN)
    plan = [
        dataclasses.replace(stage, cross_layer=cross_layer) for stage in distill.stages(options.CONTEXT.value, studied.dtype)
    ]
    folder = "".join(c if c.isalnum() else "-" for c in name)
    trained = training.train(
        training.under(studied.stored, studied.base, schedule),
        tokens,
        plan,
        studied.config,
        schedule,
        Output.create(str(output.directory / "runs" / f"{seed}-{folder}")),
        seed=seed,
        resume=options.RESUME.value,
        saving=Saving(every=10**9, keep=1),  # at the stages' ends
    )
    like = studied.params
    whole = over(trained.params, jax.tree.map(lambda a: a.astype(jnp.float32), like), studied.base, schedule)
    return jax.tree.map(lambda a, b: a.astype(b.dtype), whole, like)


Scores = dict[str, list[dict[str, float]]]  # of a table's rows, one entry a seed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); NaN for a single value."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, max(1, len(values) - 1)) * spread)


def shown(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}{unit}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def score_table(
    scores: Scores, patterns: Mapping[str, Sequence[str]], paper: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """A row a schedule. The change is that of the language loss against all F of the same seed, in per cent."""
    reference = next(iter(scores.values()))
    names = [name for name in reference[0] if all(name in entry for entries in scores.values() for entry in entries)]
    rows = []
    for row, entries in scores.items():
        changes = [100 * (entry["loss"] / first["loss"] - 1) for entry, first in zip(entries, reference, strict=True)]
        cells = [shown([entry[name] for entry in entries], 4 if "loss" in name else 2) for name in names]
        indexers = "/".join(dict.fromkeys(str(p.count("F")) for p in patterns[row]))
        rows.append([row, indexers, cells[0], shown(changes, 2), *cells[1:], str(paper.get(row, "-"))])
    return ["", "indexers", names[0], "change, %", *names[1:], "paper, Long"], rows


def domain_matrix(studied: Model, found: dict[str, Domain], seed: int, output: Output) -> dict[str, dict[str, float]]:
    """Held-out loss by the domain that a schedule at --retention was searched on (rows) and is evaluated on."""
    count, layers = flags.FLAGS.sequences, studied.base.num_layers
    size = search_experiment.kept(layers, search_experiment.share("retention", options.RETENTION.value))
    cuts = {name: draw(studied, domain.train, name, count, seed) for name, domain in found.items()}
    held_out = {
        name: draw(studied, domain.held_out, name, options.HELD_OUT_SEQUENCES.value, seed) for name, domain in found.items()
    }
    cuts["both"] = np.concatenate([part[: -(-count // 2)] for part in cuts.values()])[: max(count, 2)]
    rows = {"DSA": studied.base, "uniform": Schedule.uniform(layers, size)}
    for name, chosen in cuts.items():
        steps = searched(studied, chosen, size, output, f"{name}-{seed}-{size}")
        rows[f"searched on {name}"] = search.with_at_most(steps, size).schedule
    return {
        row: {
            name: search.Evaluator(studied.params, studied.config, studied.base, search_experiment.batches(on)).loss(schedule)
            for name, on in held_out.items()
        }
        for row, schedule in rows.items()
    }


def load(checkpoint: str) -> Model:
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, base, stored = checkpoints_convert.load(checkpoint)
    if base.num_full != base.num_layers:
        raise ValueError(f"--checkpoint={checkpoint}: {base.pattern} lacks indexers; the tables start from all of them")
    context = options.CONTEXT.value
    if not config.index_topk < context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={context}: must be above index_topk = {config.index_topk}, up to which everything is selected, "
            f"and at most {config.max_position_embeddings}, the model's longest"
        )
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or dtype), stored, abstract(config, base))
    return Model(config, base, params, stored, text.tokenizer(checkpoint), search_experiment.separator(config), dtype)


def run(output_dir: str, seed: int) -> None:
    values = flags.FLAGS
    search_experiment.positive(
        batch_size=values.batch_size, held_out_sequences=values.held_out_sequences, sequences=values.sequences
    )
    checkpoint = options.CHECKPOINT.value or str(options.DEMO)
    studied, found = load(checkpoint), domains()
    output = Output.create(output_dir)
    print(f"{checkpoint}: {studied.base.num_layers} layers; {studied.dtype} on {device()['kind']}")
    free: Scores = {}
    trained: Scores = {}
    patterns: dict[str, list[str]] = {}
    matrices = []
    steps = values.warmup_steps + values.sparse_steps
    for current in range(seed, seed + _SEEDS.value):
        cuts = draw(studied, found["code"].train, "code", values.sequences, current)
        held_out = draw(studied, found["code"].held_out, "code", values.held_out_sequences, current)
        on = sample(held_out, studied.encoder, values.context, current)
        named = schedules(studied, cuts, output, current)
        named |= {name + OWN: schedule for name, schedule in named.items()}
        if unknown := [name for name in _DISTILLED.value if name and name not in named]:
            raise ValueError(f"--distilled: {unknown[0]!r} is not one of {', '.join(map(repr, named))}")
        for name, schedule in named.items():
            patterns.setdefault(name, []).append(schedule.pattern)
            if not name.endswith(OWN):
                free.setdefault(name, []).append(measure(studied.params, studied.config, studied.base, schedule, on))
                print(f"seed {current}, {name}: {free[name][-1]}", flush=True)
        tokens = data.pack(
            found["code"].train, studied.encoder, studied.separator, output.directory / f"tokens-{current}.bin", current
        )
        for name in _DISTILLED.value if steps else ():
            params = distilled(studied, name, named[name], tokens, output, current)
            trained.setdefault(name, []).append(measure(params, studied.config, studied.base, named[name], on))
            print(f"seed {current}, {name}, distilled: {trained[name][-1]}", flush=True)
        matrices.append(domain_matrix(studied, found, current, output))
    heat = overlap(studied.params, studied.config, studied.base, search_experiment.batches(cuts))
    search_experiment.plot_overlap(output, heat, studied.base, studied.base)
    finish(output, checkpoint, free, trained, patterns, matrices, heat)


def finish(
    output: Output,
    checkpoint: str,
    free: Scores,
    trained: Scores,
    patterns: dict[str, list[str]],
    matrices: list[dict[str, dict[str, float]]],
    heat: np.ndarray,
) -> None:
    tables: list[tuple[str, list[str], list[list[str]]]] = [("Training-free", *score_table(free, patterns, PAPER))]
    if trained:
        tables.append(("Distilled", *score_table(trained, patterns, PAPER_DISTILLED)))
    columns = list(matrices[0]["DSA"])
    matrix_rows = [[row, *(shown([m[row][column] for m in matrices]) for column in columns)] for row in matrices[0]]
    tables.append((f"Domains: held-out loss at {options.RETENTION.value}", ["", *(f"on {c}" for c in columns)], matrix_rows))
    adjacent = float(np.mean(np.diag(heat, 1)))
    pairs = float(np.mean(heat[np.triu_indices(len(heat), 1)]))
    able = [task for task in TASKS if np.mean([entry[task] for entry in free["DSA"]]) >= 0.5]
    lines = [
        f"Seeds: {_SEEDS.value}; intervals are 95 %, over seeds. Losses in nats per token at a context of",
        f"{options.CONTEXT.value}; long-range: the {_ORDER.value}-gram last occurred more than {_LONG.value} positions back;",
        f"retrieval: share of prompts answered; what all F answers at least half of: {', '.join(able) or 'nothing'}.",
        f"Overlap of selections: adjacent layers {adjacent:.3f} (paper 0.733), all pairs {pairs:.3f} (paper 0.622).",
    ]
    note = "\n".join(lines)
    metrics: dict[str, Any] = {
        "checkpoint": checkpoint,
        "training_free": free,
        "distilled": trained,
        "patterns": patterns,
        "domains": matrices,
        "overlap": {"matrix": heat.round(4).tolist(), "adjacent": adjacent, "all pairs": pairs},
    }
    sections = "\n\n".join(f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in tables)
    output.finish("quality", metrics, f"# Quality of {checkpoint}\n\n{sections}\n\n{note}\n\n![overlap](overlap.png)\n")
    for title, header, rows in tables:
        print(f"\n{title}\n{text_table(header, rows)}")
    print(f"\n{note}\n\nwritten to {output.directory}/")
