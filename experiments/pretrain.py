"""Trains the shipped demo checkpoint: dense language modelling, indexer warm-up, sparse training.

The model is a GlmMoeDsa of 12 layers on bytes of Python source. Its first stage runs on short, its second on full
context without indexers; then the indexers alone learn the attention distributions they will stand for; last, the
model trains on what they select. Files are split by name, and the model card beside the weights says how the result
compares on the held-out side with an n-gram model, with its own dense form and with random selections.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags

import checkpoints_convert
from experiments import ngram, text
from experiments.report import Output, command, device, markdown_table, versions
from indexcache_jax import distill, model
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, count, init
from indexcache_jax.schedule import Schedule
from pallas_kernels.indexer_topk.reference import select

SEPARATOR = 256

_CORPUS = flags.DEFINE_string("corpus", "", "folder of .py files, or a glob, to train on; default the standard library")
_SCALE = flags.DEFINE_float("steps_scale", 1.0, "multiplies every stage's number of steps")
_RESUME = flags.DEFINE_bool("resume_training", False, "go on from the last checkpoint in --output_dir")

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
    "eos_token_id": SEPARATOR,
    "pad_token_id": SEPARATOR + 1,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One phase: what trains ("dense", "warmup" or "sparse"), on how many rows of which context, at which rates."""

    name: str
    kind: str
    steps: int
    rows: int
    context: int
    model_rate: float
    indexer_rate: float
    final: float  # share of the peak rate at the end of the cosine
    balance_speed: float


STAGES = (
    Stage("dense, short context", "dense", 1600, 64, 1024, 3e-3, 0.0, 0.4, 1e-3),
    Stage("dense, full context", "dense", 900, 16, 4096, 1.2e-3, 0.0, 0.15, 1e-3),
    Stage("indexer warm-up", "warmup", 200, 8, 4096, 0.0, 3e-3, 0.1, 0.0),
    Stage("sparse", "sparse", 250, 8, 4096, 2e-4, 1e-3, 0.05, 1e-4),
)


def optimiser(stage: Stage, config: Config, schedule: Schedule, params: Params) -> optax.GradientTransformation:
    decayed = jax.tree.map(lambda t: t.init == "normal", abstract(config, schedule))

    def adamw(rate: float) -> optax.GradientTransformation:
        warm = max(1, min(100, stage.steps // 5))
        cosine = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(stage.steps, warm + 1), rate * stage.final)
        return optax.adamw(cosine, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed)

    rules = {"model": adamw(stage.model_rate), "indexer": adamw(stage.indexer_rate), "frozen": optax.set_to_zero()}
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.multi_transform(rules, distill.trainable(params, stage.kind))
    )


def batch(tokens: np.ndarray, stage: Stage, stage_index: int, step: int, seed: int) -> np.ndarray:
    """Random cuts [rows, context + 1]: a function of (seed, stage, step) alone, so a resumed run sees the same ones."""
    starts = np.random.default_rng((seed, stage_index, step)).integers(0, tokens.size - stage.context - 1, stage.rows)
    return np.stack([tokens[s : s + stage.context + 1] for s in starts])


@functools.partial(jax.jit, static_argnames=("stage", "optimizer"), donate_argnames=("params", "state"))
def train_step(params, state, tokens, config, schedule, stage, optimizer):  # type: ignore[no-untyped-def]
    def objective(params: Params) -> tuple[jax.Array, distill.Losses]:
        sparse = stage.kind == "sparse"
        found = distill.losses(params, tokens, config, schedule, indexers=stage.kind != "dense", sparse=sparse)
        total = found.language if stage.kind == "dense" else found.indexer
        return total + found.language if sparse else total, found

    grads, found = jax.grad(objective, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if params.moe is not None and stage.balance_speed:
        params = params.replace(
            moe=params.moe.replace(router_bias=distill.balance(params.moe.router_bias, found.loads, stage.balance_speed))
        )
    share = jnp.max(found.loads / jnp.sum(found.loads, axis=-1, keepdims=True))
    return params, state, jnp.stack([found.language, found.indexer, share, optax.global_norm(grads)])


def train(params: Params, tokens: np.ndarray, config: Config, schedule: Schedule, output: Output, seed: int) -> Params:
    """All stages, with a checkpoint at every stage's end and every 500 steps; metrics go to train.jsonl."""
    stages = [dataclasses.replace(s, steps=max(1, round(s.steps * _SCALE.value))) for s in STAGES]
    folder = (output.directory / "training").absolute()
    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first, done = 0, 0
    state = None
    if _RESUME.value and (latest := manager.latest_step()) is not None:
        first, done = divmod(latest, 10**6)
        state = optimiser(stages[first], config, schedule, params).init(params)
        restored = manager.restore(latest, args=ocp.args.StandardRestore({"params": params, "state": state}))
        params, state = restored["params"], restored["state"]
    elif manager.latest_step() is not None:
        raise ValueError(f"{folder}: holds an earlier run; --resume_training goes on with it, or choose another --output_dir")
    log = open(output.directory / "train.jsonl", "a", encoding="utf-8")
    for i in range(first, len(stages)):
        stage = stages[i]
        optimizer = optimiser(stage, config, schedule, params)
        if state is None:
            state = optimizer.init(params)
        pending: list[Any] = []
        started, last = time.perf_counter(), done
        for step in range(done, stage.steps):
            data = jnp.asarray(batch(tokens, stage, i, step, seed))
            params, state, metrics = train_step(params, state, data, config, schedule, stage, optimizer)
            pending.append((step, metrics))
            if step + 1 == stage.steps or (step + 1) % 50 == 0:
                values = np.array([m for _, m in pending])
                rate = (step + 1 - last) * stage.rows * stage.context / (time.perf_counter() - started)
                for (at, _), row in zip(pending, values.tolist(), strict=True):
                    entry = dict(zip(("language", "indexer", "largest_load", "gradient_norm"), row, strict=True))
                    log.write(json.dumps({"stage": stage.name, "step": at, **entry}) + "\n")
                log.flush()
                mean = values.mean(axis=0)
                print(
                    f"{stage.name}: step {step + 1}/{stage.steps}, loss {mean[0]:.4f}, indexer {mean[1]:.4f}, "
                    f"largest expert share {mean[2]:.2f}, {rate:,.0f} tokens/s",
                    flush=True,
                )
                if not np.isfinite(values).all():
                    raise ValueError(f"{stage.name}: the loss is not finite by step {step + 1}; {folder} keeps the last good state")
                pending, started, last = [], time.perf_counter(), step + 1
            if (step + 1) % 500 == 0 and step + 1 < stage.steps:
                manager.save(i * 10**6 + step + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
        state, done = None, 0
        if i + 1 < len(stages):
            fresh = optimiser(stages[i + 1], config, schedule, params).init(params)
            manager.save((i + 1) * 10**6, args=ocp.args.StandardSave({"params": params, "state": fresh}))
    manager.wait_until_finished()
    manager.close()
    log.close()
    return params


@jax.jit
def random_selection_loss(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, key: jax.Array) -> jax.Array:
    """Mean loss of tokens [1, S+1] when every layer attends to k visible positions drawn at random."""
    x = model.embed(params, tokens[:, :-1])
    s = x.shape[1]
    positions = model.place(jnp.zeros(1, jnp.int32), jnp.full(1, s), s, config)
    dense, sparse = model.mlp_layers(config)
    for layer in range(config.num_layers):
        draw = jax.random.uniform(jax.random.fold_in(key, layer), (s, s))
        indices = select(draw, positions.queries[0] + 1, min(config.index_topk, s))[None]
        x, _ = model.attention_block(model.attention_layer(params, layer, None), x, indices, positions, config, False)
        stack, of = (params.moe, sparse) if config.moe_layers[layer] else (params.dense, dense)
        mlp = model.at_layer(stack, of.index(layer))
        x = model.mlp_block(mlp, model.at_layer(params.mlp_norm, layer), x, config)
    return jnp.mean(model.token_losses(params, x, tokens[:, 1:], config))


@functools.partial(jax.jit, static_argnames="sparse")
def held_out_loss(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, sparse: bool) -> jax.Array:
    return distill.losses(params, tokens, config, schedule, indexers=sparse, sparse=sparse).language


def evaluate(params: Params, cuts: np.ndarray, config: Config, schedule: Schedule, seed: int) -> dict[str, float]:
    """Mean held-out losses of cuts [N, S+1]: sparse as trained, dense, and with random selections."""
    key = jax.random.key(seed)
    found: dict[str, list[Any]] = {"sparse": [], "dense": [], "random selection": []}
    for i, cut in enumerate(cuts):
        tokens = jnp.asarray(cut[None])
        found["sparse"].append(held_out_loss(params, tokens, config, schedule, True))
        found["dense"].append(held_out_loss(params, tokens, config, schedule, False))
        found["random selection"].append(random_selection_loss(params, tokens, config, schedule, jax.random.fold_in(key, i)))
    return {name: float(np.mean(np.array(values))) for name, values in found.items()}


def model_card(metrics: dict[str, Any], tokens: int, held_out: int, config: Config, schedule: Schedule) -> str:
    loss = metrics["held_out_loss"]
    rows = [[s.name, round(s.steps * _SCALE.value), s.rows, s.context, s.model_rate or "-", s.indexer_rate or "-"] for s in STAGES]
    losses = [
        [f"{metrics['ngram_order']}-gram, Witten-Bell, same training files", f"{metrics['ngram_loss']:.4f}"],
        ["this model, sparse (as trained)", f"{loss['sparse']:.4f}"],
        ["this model, dense attention", f"{loss['dense']:.4f}"],
        ["this model, random selections of the same size", f"{loss['random selection']:.4f}"],
    ]
    return f"""# A small DSA model of Python source

{count(abstract(config, schedule)) / 1e6:.2f} M weights, {config.num_layers} layers, all F, byte-level (token = byte;
{SEPARATOR} ends a file), context {config.max_position_embeddings}, {config.index_topk} selected keys. GlmMoeDsa in Hugging Face
format. Made to search schedules on and to test with; it is no assistant.

Data: {metrics["corpus"]}: {tokens:,} training and {held_out:,} held-out tokens, split by file name. License of the text:
PSF License Version 2.

{markdown_table(["stage", "steps", "rows", "context", "learning rate", "indexers' rate"], rows)}

Held-out loss, nats per byte, {metrics["held_out_sequences"]} sequences of {config.max_position_embeddings}:

{markdown_table(["", "loss"], losses)}

Sparse over dense: {100 * (loss["sparse"] / loss["dense"] - 1):+.2f} %. Seed {metrics["seed"]}, {metrics["seconds"]:.0f} s of training.

`{command()}`

{", ".join(f"{k} {v}" for k, v in versions().items())}; {device()["kind"]}
"""


def run(output_dir: str, seed: int) -> None:
    output = Output.create(output_dir)
    config, schedule = Config.from_hf(DEMO), Schedule.all_full(DEMO["num_hidden_layers"])
    found = text.documents(_CORPUS.value)
    train_files, held_out_files = [d for d in found if not d.held_out], [d for d in found if d.held_out]
    train_tokens = text.stream(train_files, text.Bytes(), SEPARATOR)
    held_out = text.stream(held_out_files, text.Bytes(), SEPARATOR)
    print(f"{len(train_files)} training files, {train_tokens.size:,} tokens; {len(held_out_files)} held out, {held_out.size:,}")
    cuts = text.sequences(held_out, min(64, (held_out.size - 1) // config.max_position_embeddings), config.max_position_embeddings, seed)
    order = 6
    raw = [t[t < SEPARATOR].astype(np.uint8) for t in (train_tokens, cuts.reshape(-1))]
    ngram_loss = ngram.loss(*raw, order)
    print(f"{order}-gram baseline on the held-out sequences: {ngram_loss:.4f} nats per byte")
    params = init(jax.random.key(seed), config, schedule, jnp.float32)
    started = time.perf_counter()
    params = train(params, train_tokens, config, schedule, output, seed)
    seconds = time.perf_counter() - started
    stored = jax.tree.map(lambda a, t: a.astype(t.dtype or jnp.bfloat16), params, abstract(config, schedule))
    losses = evaluate(stored, cuts, config, schedule, seed)
    metrics = {
        "corpus": _CORPUS.value or "the standard library",
        "held_out_loss": losses,
        "held_out_sequences": len(cuts),
        "ngram_loss": ngram_loss,
        "ngram_order": order,
        "seconds": seconds,
        "seed": seed,
    }
    print(losses)
    target = pathlib.Path(output_dir) / "checkpoint"
    checkpoints_convert.save(target, stored, config, schedule)
    card = model_card(metrics, train_tokens.size, held_out.size, config, schedule)
    (target / "README.md").write_text(card, encoding="utf-8")
    output.finish("pretrain", metrics, card)
    print(card)
