"""Trains the shipped demo checkpoint: dense language modelling, indexer warm-up, sparse training.

The model is a GlmMoeDsa of 12 layers on bytes of Python source. Its first stage runs on short, its second on full
context without indexers; then the indexers alone learn the attention distributions they will stand for; last, the
model trains on what they select. Files are split by name, and the model card beside the weights says how the result
compares on the held-out side with an n-gram model, with its own dense form and with random selections.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments import data, ngram, options, text, training
from experiments.report import Output, command, device, markdown_table, versions
from experiments.training import Stage
from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, count, init
from indexcache_jax.schedule import Schedule
from pallas_kernels.indexer_topk.reference import select

SEPARATOR = 256

_CORPUS = flags.DEFINE_string("corpus", "", "folder of .py files, or a glob, to train on; default the standard library")
_SCALE = flags.DEFINE_float("steps_scale", 1.0, "multiplies every stage's number of steps")
flags.declare_key_flag("resume")

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


STAGES = (
    Stage("dense, short context", "dense", 1600, 64, 1024, 3e-3, 0.0, final=0.4, balance_speed=1e-3),
    Stage("dense, full context", "dense", 900, 16, 4096, 1.2e-3, 0.0, final=0.15, balance_speed=1e-3),
    Stage("indexer warm-up", "warmup", 200, 8, 4096, 0.0, 3e-3, final=0.1),
    Stage("sparse", "sparse", 250, 8, 4096, 2e-4, 1e-3, final=0.05, balance_speed=1e-4),
)


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


def evaluate(params: Params, cuts: np.ndarray, config: Config, schedule: Schedule, seed: int) -> dict[str, float]:
    """Mean held-out losses of cuts [N, S+1]: sparse as trained, dense, and with random selections."""
    key = jax.random.key(seed)
    randomly = [
        random_selection_loss(params, jnp.asarray(cut[None]), config, schedule, jax.random.fold_in(key, i))
        for i, cut in enumerate(cuts)
    ]
    return {
        "sparse": training.evaluate(params, cuts, config, schedule, "bfloat16").language,
        "dense": training.evaluate(params, cuts, config, schedule, "bfloat16", sparse=False).language,
        "random selection": float(np.mean(np.array(randomly))),
    }


def plan() -> list[Stage]:
    """The stages at --steps_scale."""
    return [dataclasses.replace(s, steps=max(1, round(s.steps * _SCALE.value))) for s in STAGES]


def model_card(metrics: dict[str, Any], tokens: int, held_out: int, config: Config, schedule: Schedule) -> str:
    loss = metrics["held_out_loss"]
    rows = [[s.name, s.steps, s.rows, s.context, s.model_rate or "-", s.indexer_rate or "-"] for s in plan()]
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

Data: {metrics["corpus"]}: {tokens:,} training and {held_out:,} held-out tokens, split by file name.

{markdown_table(["stage", "steps", "rows", "context", "learning rate", "indexers' rate"], rows)}

Held-out loss, nats per byte, {metrics["held_out_sequences"]} sequences of {config.max_position_embeddings}:

{markdown_table(["", "loss"], losses)}

Sparse over dense: {100 * (loss["sparse"] / loss["dense"] - 1):+.2f} %. Seed {metrics["seed"]}; training took
{metrics["seconds"]:.0f} s.

`{command()}`

{", ".join(f"{k} {v}" for k, v in versions().items())}; {device()["kind"]}
"""


def run(output_dir: str, seed: int) -> None:
    output = Output.create(output_dir)
    config, schedule = Config.from_hf(DEMO), Schedule.all_full(DEMO["num_hidden_layers"])
    found = text.documents(_CORPUS.value)
    train_files, held_out_files = [d for d in found if not d.held_out], [d for d in found if d.held_out]
    train_tokens = data.pack(train_files, text.Bytes(), SEPARATOR, output.directory / "tokens.bin", seed)
    held_out = text.stream(held_out_files, text.Bytes(), SEPARATOR)
    print(f"{len(train_files)} training files, {train_tokens.size:,} tokens; {len(held_out_files)} held out, {held_out.size:,}")
    context = config.max_position_embeddings
    cuts = text.sequences(held_out, min(64, (held_out.size - 1) // context), context, seed)
    order = 6
    train_bytes, held_out_bytes = (t[t < SEPARATOR].astype(np.uint8) for t in (train_tokens, cuts.reshape(-1)))
    ngram_loss = ngram.loss(train_bytes, held_out_bytes, order)
    print(f"{order}-gram baseline on the held-out sequences: {ngram_loss:.4f} nats per byte")
    params = init(jax.random.key(seed), config, schedule, jnp.float32)
    started = time.perf_counter()
    saving = training.Saving()
    resume = options.RESUME.value
    trained = training.train(params, train_tokens, plan(), config, schedule, output, seed=seed, resume=resume, saving=saving)
    params = trained.params
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
