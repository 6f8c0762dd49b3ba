"""Trains the models that this repository studies: dense language modelling, indexer warm-up, sparse training.

All are GlmMoeDsas. "demo", the shipped checkpoint, has 12 layers and reads bytes of Python source; "medium", of 12 layers
too, reads tokens of whatever code and prose the machine's Python packages hold, in a vocabulary made from them, with
retrieval tasks woven in, at twice the context. "deep" reads the same and has 24 layers that select more alike, as those of
large models do: its layers' attention starts equal, and is drawn together while it trains (`Stage.neighbour_decay`).

The first stage runs on short, the second on full context without indexers; then the indexers alone learn the attention
distributions they will stand for; last, the model trains on what they select. Files are split by name, and the model card
beside the weights says how the result compares on the held-out side with its own dense form, with random selections and, for
bytes, with an n-gram model, and how much its layers' selections overlap.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import data, devices, inputs, journal, options, processes, runs, text
from experiments.common.report import Output, command, device, markdown_table, versions
from experiments.common.runs import Saving, TrainingRun
from experiments.reproduction import ngram, retrieval, scoring
from experiments.reproduction.scoring import Sample
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, init, shape_structs
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layer_overlap, layerwise
from indexcache_jax.sharding import TRAINING, to_host
from indexcache_jax.tensors import count
from indexcache_jax.training import Stage
from pallas_kernels.indexer_topk.reference import select

_RECIPE = flags.DEFINE_enum("recipe", "demo", ["demo", "medium", "deep"], "the model and how it is trained")
_SCALE = flags.DEFINE_float("steps_scale", 1.0, "multiplies every stage's number of steps", 0.0, 1000.0)
for _name in ("text", "woven", "resume", "time_limit", "mesh"):
    flags.declare_key_flag(_name)

PLAN = "plan.json"
NGRAM = 6  # order of the baseline
PROMPTS = 16  # of each retrieval task
OVERLAP_SEQUENCES = 4
PULL = 100.0  # Stage.neighbour_decay of the deep recipe


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model, its text and its stages; shares[i] of --time_limit go to stage i.

    alike: the attention and the indexers of all layers start as those of the first.
    """

    fields: dict[str, Any]
    stages: tuple[Stage, ...]
    shares: tuple[float, ...]
    separator: int
    corpus: str = "standard-library"
    vocabulary: int | None = None  # of a tokenizer made from the corpus; None: bytes
    woven: float = 0.0  # share of the text with retrieval tasks in it
    alike: bool = False
    held_out: int = 64  # sequences to evaluate on
    finish_seconds: float = 20.0  # of --time_limit, kept for evaluation and saving

    def shape(self) -> tuple[Config, Schedule]:
        """The model's; every layer is F."""
        return Config.from_hf(self.fields), Schedule.all_full(self.fields["num_hidden_layers"])


DEMO: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "vocab_size": 258,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 128,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


MEDIUM: dict[str, Any] = DEMO | {
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,  # with the 64 of rope what the GPU kernels are laid out for
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 12,  # no experts: at this size their products are too small for a GPU
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 512,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "max_position_embeddings": 8192,
    "eos_token_id": 0,
    "pad_token_id": None,
}

DEEP: dict[str, Any] = MEDIUM | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 24,
    "first_k_dense_replace": 24,
    "index_topk": 256,
    "max_position_embeddings": 4096,
}

RECIPES = {
    "demo": Recipe(
        DEMO,
        (
            Stage("dense, short context", "dense", 1600, 64, 1024, 3e-3, 0.0, final_lr_fraction=0.4, balance_speed=1e-3),
            Stage("dense, full context", "dense", 900, 16, 4096, 1.2e-3, 0.0, final_lr_fraction=0.15, balance_speed=1e-3),
            Stage("indexer warm-up", "warmup", 200, 8, 4096, 0.0, 3e-3, final_lr_fraction=0.1),
            Stage("sparse", "sparse", 250, 8, 4096, 2e-4, 1e-3, final_lr_fraction=0.05, balance_speed=1e-4),
        ),
        shares=(0.4, 0.3, 0.1, 0.2),
        separator=256,
    ),
    "medium": Recipe(
        MEDIUM,
        (
            Stage("dense, short context", "dense", 2800, 32, 1024, 2e-3, 0.0, final_lr_fraction=0.4),
            # Copying from far back is learned here: the loss was still falling after 640 steps.
            Stage("dense, full context", "dense", 3000, 4, 8192, 8e-4, 0.0, final_lr_fraction=0.1),
            Stage("indexer warm-up", "warmup", 300, 4, 8192, 0.0, 3e-3, final_lr_fraction=0.1),
            Stage("sparse", "sparse", 300, 4, 8192, 1e-4, 1e-3, final_lr_fraction=0.05),
        ),
        shares=(0.3, 0.46, 0.09, 0.15),
        separator=0,
        corpus="standard-library,installed-code,installed-prose",
        vocabulary=4096,
        woven=0.5,
        held_out=16,
    ),
    "deep": Recipe(
        DEEP,
        (
            Stage("dense, short context", "dense", 2000, 32, 1024, 2e-3, 0.0, final_lr_fraction=0.4, neighbour_decay=PULL),
            Stage("dense, full context", "dense", 2000, 8, 4096, 8e-4, 0.0, final_lr_fraction=0.1, neighbour_decay=PULL),
            Stage("indexer warm-up", "warmup", 200, 8, 4096, 0.0, 3e-3, final_lr_fraction=0.1, neighbour_decay=PULL),
            Stage("sparse", "sparse", 200, 8, 4096, 1e-4, 1e-3, final_lr_fraction=0.05, neighbour_decay=PULL),
        ),
        shares=(0.36, 0.44, 0.07, 0.13),
        separator=0,
        corpus="standard-library,installed-code,installed-prose",
        vocabulary=4096,
        woven=0.5,
        alike=True,
        held_out=32,
    ),
}


@jax.jit
def _random_indices(key: jax.Array, like: layerwise.State) -> jax.Array:
    """k visible positions drawn for every query: [1, S, k]."""
    _, s, k = like.indices.shape
    return select(jax.random.uniform(key, (s, s)), jnp.arange(1, s + 1), k)[None]


def random_selection_loss(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, key: jax.Array) -> jax.Array:
    """Mean losses [1] of tokens [1, S+1] when every layer attends to k visible positions drawn at random."""
    state = layerwise.start(params, tokens[:, :-1], config)
    for layer in range(config.num_layers):
        state = dataclasses.replace(state, indices=_random_indices(jax.random.fold_in(key, layer), state))
        state = layerwise.advance(params, state, jnp.int32(layer), jnp.array(False), config, schedule)
    return layerwise.finish(
        params, state, jnp.int32(config.num_layers), jnp.array(schedule.is_full), tokens[:, 1:], config, schedule
    )


def evaluate(params: Params, on: Sample, config: Config, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Held-out losses of a sample (sparse as trained, dense, and with random selections, of at most 4 cuts), the shares of
    its prompts that are solved, by task, and how much the layers' selections overlap."""
    cuts = on.cuts
    key = jax.random.key(seed)
    randomly = [
        random_selection_loss(params, jnp.asarray(cut[None]), config, schedule, jax.random.fold_in(key, i))
        for i, cut in enumerate(cuts[:4])
    ]
    scores = scoring.score(params, config, schedule, schedule, on).means
    losses = {
        "sparse": scores["loss"],
        "dense": runs.evaluate(params, cuts, config, schedule, "bfloat16", sparse=False).language,
        "random selection": float(np.mean(np.array(randomly))),
    }
    solved = {task: scores[task] for task in retrieval.TASKS}
    overlap = layer_overlap(params, config, schedule, [cut[None] for cut in cuts[:OVERLAP_SEQUENCES]])
    return {"held_out_loss": losses, "retrieval": solved, "overlap": scoring.neighbours_and_pairs(overlap)}


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens to train on, and cuts [N, S+1] to evaluate on."""

    encoder: text.Bytes | text.FromFile
    tokens: np.ndarray
    cuts: np.ndarray
    held_out_tokens: int


def prepare(recipe: Recipe, sides: inputs.Sides, config: Config, output: Output, seed: int) -> Data:
    """The corpus, encoded. What is made of it is kept in the output's folder."""
    train_files, held_out_files = sides.train, sides.held_out
    encoder: text.Bytes | text.FromFile = text.Bytes()
    if recipe.vocabulary is not None:
        path = output.directory / "tokenizer.json"
        if not options.RESUME.value:
            journal.remove(path)  # of a run that was given up, and might have read other text
        encoder = text.train_tokenizer(train_files, recipe.vocabulary, path, seed)
    woven = recipe.woven if options.WOVEN.value is None else options.WOVEN.value
    longest = max(stage.steps * stage.sequences * stage.context for stage in plan(recipe))
    limit = None if recipe.vocabulary is None else longest
    tokens = data.pack(train_files, encoder, recipe.separator, output.directory / "tokens.bin", seed, limit)
    if woven:
        tokens = retrieval.weave(tokens, encoder, woven, seed)
    shuffled = [held_out_files[i] for i in np.random.default_rng(seed).permutation(len(held_out_files))]
    context = config.max_position_embeddings
    enough = None if recipe.vocabulary is None else 4 * recipe.held_out * context
    held_out = text.stream(held_out_files if enough is None else shuffled, encoder, recipe.separator, enough)
    print(f"{len(train_files)} training files, {tokens.size:,} tokens; {len(held_out_files)} held out, {held_out.size:,}")
    if held_out.size <= context:
        raise ValueError(f"--text: {held_out.size} held-out tokens are less than a sequence of {context}; give more text")
    cuts = text.sequences(held_out, min(recipe.held_out, (held_out.size - 1) // context), context, seed)
    return Data(encoder, tokens, cuts, held_out.size)


def plan(recipe: Recipe) -> list[Stage]:
    """The stages at --steps_scale."""
    return [dataclasses.replace(s, steps=max(1, round(s.steps * _SCALE.value))) for s in recipe.stages]


def training_layout(recipe: Recipe) -> devices.Layout:
    """How devices share the training: --mesh, or rows over devices and the rest over a row's queries, with experts whole."""
    found = devices.layout(math.gcd(*(stage.rows for stage in recipe.stages)))
    return found if options.MESH.value else dataclasses.replace(found, expert=1)


def within_the_limit(
    recipe: Recipe, params: Params, config: Config, schedule: Schedule, output: Output, deadline: float
) -> list[Stage]:
    """The stages, cut by the speed of their steps to what ends before the deadline, if there is one.

    The numbers are kept in the output's folder: a resumed run takes them from there, and cuts nothing where the run that it
    goes on with did not, whatever time it is given itself.
    """
    stages, path = plan(recipe), output.directory / PLAN
    planned = processes.from_main(lambda: options.RESUME.value and path.exists())
    begun = processes.from_main(lambda: runs.begun(output.directory))
    if not planned and (not math.isfinite(deadline) or begun):
        journal.remove(path)  # of another run
        return stages
    if not planned:
        costs = [runs.seconds_per_step(params, stage, config, schedule) for stage in stages]
        left = deadline - recipe.finish_seconds - time.perf_counter()
        fitted = runs.fit(stages, costs, recipe.shares, left)
        entries = [{"stage": s.name, "steps": s.steps, "seconds_per_step": c} for s, c in zip(fitted, costs, strict=True)]
        shown = ", ".join(f"{entry['stage']} {entry['steps']} x {entry['seconds_per_step']:.3f} s" for entry in entries)
        print(f"{left:.0f} s for training: {shown}", flush=True)
        output.write(PLAN, json.dumps(entries, indent=1) + "\n")
    steps = processes.from_main(lambda: [entry["steps"] for entry in json.loads(path.read_text(encoding="utf-8"))])
    return [dataclasses.replace(stage, steps=n) for stage, n in zip(stages, steps, strict=True)]


def compile_evaluation(recipe: Recipe) -> None:
    """Compiles what `evaluate` runs and is not small, while something else goes on."""
    config, schedule = recipe.shape()
    params = shape_structs(config, schedule, jnp.bfloat16)
    s, layers = config.max_position_embeddings, config.num_layers
    tokens, number = jax.ShapeDtypeStruct((1, s), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    choice = jax.ShapeDtypeStruct((), bool)
    choices = jax.ShapeDtypeStruct((layers,), bool)
    state = jax.eval_shape(layerwise.start, params, tokens, config)
    cut = jax.ShapeDtypeStruct((1, s + 1), jnp.int32)
    for lowered in (
        layerwise.finish.lower(params, state, number, choices, tokens, config, schedule),
        layerwise.advance.lower(params, state, number, choice, config, schedule),
        runs.held_out.lower(params, cut, config, schedule, False, "bfloat16"),
        scoring.lower(params, config, schedule, recipe.held_out + PROMPTS * len(retrieval.TASKS), s, scoring.TAIL),
    ):
        lowered.compile()


def model_card(metrics: dict[str, Any], stages: list[Stage], found: Data, config: Config, schedule: Schedule) -> str:
    loss, unit = metrics["held_out_loss"], "byte" if isinstance(found.encoder, text.Bytes) else "token"
    rows = [[s.name, s.steps, s.rows, s.context, s.model_learning_rate or "-", s.indexer_learning_rate or "-"] for s in stages]
    losses = [
        ["this model, sparse (as trained)", f"{loss['sparse']:.4f}"],
        ["this model, dense attention", f"{loss['dense']:.4f}"],
        ["this model, random selections of the same size", f"{loss['random selection']:.4f}"],
    ]
    if metrics["ngram_loss"] is not None:
        losses.insert(0, [f"{NGRAM}-gram, Witten-Bell, same training files", f"{metrics['ngram_loss']:.4f}"])
    answered = ", ".join(f"{task} {share:.2f}" for task, share in metrics["retrieval"].items())
    adjacent, pairs = metrics["overlap"].values()
    context = config.max_position_embeddings
    reads = "byte-level (token = byte;" if unit == "byte" else f"{config.vocab_size} tokens (tokenizer.json;"
    return f"""# A small DSA model of Python {"source" if unit == "byte" else "packages, code and prose"}

{count(abstract(config, schedule)) / 1e6:.2f} M weights, {config.num_layers} layers, all F, {reads}
{config.eos_token_ids[0]} ends a file), context {context}, {config.index_topk} selected keys. GlmMoeDsa in Hugging Face format.
Made to search schedules on and to test with; it is no assistant.

Data: {metrics["corpus"]}: {found.tokens.size:,} training and {found.held_out_tokens:,} held-out tokens, split by file name.

{markdown_table(["stage", "steps", "rows", "context", "learning rate", "indexers' rate"], rows)}

Held-out loss, nats per {unit}, {len(found.cuts)} sequences of {context}:

{markdown_table(["", "loss"], losses)}

Sparse over dense: {100 * (loss["sparse"] / loss["dense"] - 1):+.2f} %. Share of {PROMPTS} retrieval prompts answered at the
full context, by task: {answered}. Overlap of the layers' selections: adjacent ones {adjacent:.3f}, all pairs {pairs:.3f}.
Seed {metrics["seed"]}; training took {metrics["seconds"]:.0f} s.

`{command()}`

{", ".join(f"{k} {v}" for k, v in versions().items())}; {device()["kind"]}
"""


def baseline(found: Data) -> float | None:
    """Nats per byte of an n-gram model of the same files on the held-out cuts; None where tokens are not bytes."""
    if not isinstance(found.encoder, text.Bytes):
        return None
    train_bytes, held_out_bytes = (t[t < 256].astype(np.uint8) for t in (found.tokens, found.cuts.reshape(-1)))
    return ngram.loss(train_bytes, held_out_bytes, NGRAM)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The recipe's model, its text, the n-gram's loss on that, and the weights that training starts from."""

    recipe: Recipe
    config: Config
    schedule: Schedule
    data: Data
    ngram_loss: float | None
    params: Params


def alike(params: Params) -> Params:
    """Params whose layers all have the first one's attention and indexer."""

    def first(stack: jax.Array) -> jax.Array:
        return jnp.broadcast_to(stack[:1], stack.shape)

    attention, indexer = (jax.tree.map(first, part) for part in (params.attention, params.indexer))
    return dataclasses.replace(params, attention=attention, indexer=indexer)


def read_inputs(recipe: Recipe, sides: inputs.Sides, output: Output, seed: int) -> Inputs:
    """Reads and encodes the text, and makes the weights."""
    config, schedule = recipe.shape()
    found = prepare(recipe, sides, config, output, seed)
    params = init(jax.random.key(seed), config, schedule, jnp.float32)
    if recipe.alike:
        params = alike(params)
    return Inputs(recipe, config, schedule, found, baseline(found), params)


@dataclasses.dataclass(frozen=True)
class Result:
    """The trained model as it is stored, and what was measured on held-out text."""

    stages: list[Stage]
    trained: runs.Trained
    stored: Params
    evaluated: dict[str, Any]  # as `evaluate` returns it


def pretrain(
    given: Inputs,
    evaluation: concurrent.futures.Future[None],
    output: Output,
    layout: devices.Layout,
    deadline: float,
    seed: int,
) -> Result:
    """Trains through all stages, writes the checkpoint and evaluates it. evaluation: done when its programs are compiled.

    Devices share the training. The models are small: every process evaluates on one device of its own.
    """
    config, schedule = given.config, given.schedule
    with devices.in_force(layout, TRAINING):
        stages = within_the_limit(given.recipe, given.params, config, schedule, output, deadline)
        training_run = TrainingRun(given.data.tokens, stages, config, schedule, seed)
        trained = runs.train(given.params, training_run, output, resume=options.RESUME.value, saving=Saving())
        whole = jax.tree.map(to_host, trained.params)
    evaluation.result()
    stored = jax.tree.map(lambda a, t: jnp.asarray(a, t.dtype or jnp.bfloat16), whole, abstract(config, schedule))
    target = output.directory / "checkpoint"
    journal.remove(target)  # of an earlier --resume
    checkpoints_convert.save(target, stored, config, schedule, companions_of=output.directory)
    asked = retrieval.prompts(given.data.cuts, given.data.encoder, config.max_position_embeddings, PROMPTS, seed)
    sample = Sample(given.data.cuts, np.zeros_like(given.data.cuts[:, 1:], bool), asked)
    return Result(stages, trained, stored, evaluate(stored, sample, config, schedule, seed))


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout, seed: int) -> None:
    """Writes the model card beside the weights, results.json and report.md, and prints the card."""
    metrics = {
        "recipe": _RECIPE.value,
        "corpus": options.TEXT.value or given.recipe.corpus,
        "stages": [dataclasses.asdict(stage) for stage in result.stages],
        "tokens_per_second": result.trained.tokens_per_second,
        **result.evaluated,
        "held_out_sequences": len(given.data.cuts),
        "ngram_loss": given.ngram_loss,
        "seconds": result.trained.seconds,
        "seed": seed,
    }
    card = model_card(metrics, result.stages, given.data, given.config, given.schedule)
    Output(output.directory / "checkpoint").write("README.md", card)
    output.finish("pretrain", metrics, card, layout)
    print(card)


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    deadline = began + options.seconds_to_spend(math.inf)
    output = Output.create(output_dir)
    runs.check_free(output.directory, options.RESUME.value)
    recipe = RECIPES[_RECIPE.value]
    sides = inputs.split(options.TEXT.value or recipe.corpus, None)  # before programs compile, which a thread ends with
    layout = training_layout(recipe)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # programs compile while the text is read
        with devices.in_force(layout, TRAINING):
            compile_steps = runs.in_a_thread(runs.compile_steps)
        steps = pool.submit(compile_steps, plan(recipe), *recipe.shape())
        evaluation = pool.submit(compile_evaluation, recipe)
        given = read_inputs(recipe, sides, output, seed)
        steps.result()
        print(f"text and programs ready after {time.perf_counter() - began:.0f} s")
        result = pretrain(given, evaluation, output, layout, deadline, seed)
    report(result, given, output, layout, seed)
