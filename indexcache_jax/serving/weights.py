"""The weights of a model as inference runs them: one set of buffers a layer, matrices [out, in] as checkpoints store them.

Params stack equal layers, which is what training and conversion want. Inference wants other things:

- A layer by itself is one program for prefill, compiled once for each kind of layer (F or S, dense or experts).
- Replicated projections of the same input are one matrix, `down`: query latent, key-value latent, index key and index head
  weights. A decode step then has fewer kernels. What would be split over devices differently has a leaf of its own: query
  heads and index query heads, router and shared experts.
- A matrix is [outputs, inputs]. For one token a product then is a sum along contiguous memory, which XLA fuses with what
  stands before and after it, where [inputs, outputs] would be a product written to memory and a second pass over it. The
  routed experts are [in, out] as in Params, since that is what `grouped_matmul` multiplies.

With weights="fp8" the matrices that a released model spends its bytes on are `Scaled`, codes and scales as an FP8 checkpoint
stores them: `up`, `index_up`, `out` and those of the MLPs, routed experts being [out, in] too. The others are in the model's
dtype: `down` joins stored matrices whose blocks do not line up, those of `k_up` and `v_up` run across heads, and the rest
no checkpoint has in 8 bits.

`abstract` describes the tree, so that `checkpoints_convert.load(directory, form="serving")` fills it straight from the
files and `sharding.shardings` places it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import arguments, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.params import (
    LAYER,
    MLP,
    MoE,
    Params,
    at_layer,
    check_config,
    check_key,
    check_model,
    check_params,
    decoded,
    routed_experts,
    slots,
)
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Axes, Source, Tensor, as_stored
from pallas_kernels.quant import BLOCK, Scaled


@flax.struct.dataclass
class Dense:
    """The weights of a dense MLP."""

    gate_up: Any  # [2 F, D]: gate first
    down: Any  # [D, F]


@flax.struct.dataclass
class Experts:
    """The weights of a layer with routed experts; the two shared matrices are None without shared experts."""

    router: Any  # [E, D]
    router_bias: Any  # [E] float32: for the choice of experts only
    gate_up: Any  # [E, D, 2, I]; Scaled [E, 2, I, D]
    down: Any  # [E, I, D]; Scaled [E, D, I]
    shared_gate_up: Any  # [2 Is, D]: gate first
    shared_down: Any  # [D, Is]


@flax.struct.dataclass
class Layer:
    """One layer. An S layer has no `index_up`, no key norm, and no rows of the indexer in `down`."""

    norm: Any  # [D]
    down: Any  # [R + C + dr (+ Di + Hi), D]: query latent, key-value latent, index key, index head weights
    down_bias: Any  # [R + C + dr]; the two biases only with attention_bias
    q_norm: Any  # [R]
    kv_norm: Any  # [C]
    key_norm: Any  # [Di]
    key_norm_bias: Any  # [Di]
    up: Any  # [H (dn + dr), R]
    index_up: Any  # [Hi Di, R]
    k_up: Any  # [H, C, dn]
    v_up: Any  # [H, dv, C]
    out: Any  # [D, H dv]
    out_bias: Any  # [D]
    mlp_norm: Any  # [D]
    mlp: Dense | Experts

    @property
    def full(self) -> bool:
        return self.key_norm is not None


@flax.struct.dataclass
class Weights:
    """All weights of a model under a schedule, for inference."""

    embedding: Any  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: Any  # [D]
    head: Any  # [V, D]; None where embeddings are tied

    @property
    def pattern(self) -> str:
        """The schedule that the layers were made for, as a string of F and S."""
        return "".join("F" if layer.full else "S" for layer in self.layers)

    @property
    def format(self) -> str | None:
        """The value of `weights` for which `abstract` describes them: "fp8" for matrices in 8 bits, else None."""
        return "fp8" if isinstance(self.layers[0].out, Scaled) else None

    @property
    def ends(self) -> Weights:
        """The weights without the layers: embedding, final norm and head."""
        return dataclasses.replace(self, layers=())


def abstract(config: Config, schedule: Schedule, weights: str | None = None) -> Weights:
    """The tree of `Tensor`s of a model under a schedule. ValueError as for `params.check_model`, and for weights of no form.

    weights: "fp8" for matrices in 8 bits, None for all in the model's dtype.
    """
    check_model(config, schedule)
    return _abstract(config, schedule, weights)


@functools.lru_cache(maxsize=2)  # a second's work for a large model, and the search for a mesh that holds one asks for it often
def _abstract(config: Config, schedule: Schedule, weights: str | None) -> Weights:
    c = config
    shape = (c.vocab_size, c.hidden_size)
    embedding = _tensor(None, shape, ("vocab", "embed"), [as_stored("model.embed_tokens.weight", shape)])
    head = _tensor(None, shape, ("vocab", "embed"), [as_stored("lm_head.weight", shape)], scale=c.hidden_size**-0.5)
    return Weights(
        embedding=dataclasses.replace(embedding, init="embedding", scale=c.initializer_range),
        layers=tuple(_layer(c, layer, full, weights) for layer, full in enumerate(schedule.is_full)),
        final_norm=_vector(None, "model.norm.weight", c.hidden_size, "embed"),
        head=None if c.tie_word_embeddings else head,
    )


def _tensor(
    layer: int | None,
    shape: tuple[int, ...],
    axes: Axes,
    sources: list[Source],
    scale: float = 1.0,
    init: str = "normal",
    dtype: str | None = None,
) -> Tensor:
    layers = None if layer is None else (layer,)
    return Tensor(shape, axes, init, scale, tuple(sources), layers, dtype=dtype)


def _vector(
    layer: int | None, name: str, size: int, axis: str | None = None, init: str = "ones", dtype: str | None = None
) -> Tensor:
    return _tensor(layer, (size,), (axis,), [as_stored(name, (size,))], init=init, dtype=dtype)


def _rows(layer: int, parts: list[tuple[str, int]], *inputs: int, axes: Axes, init: str = "normal") -> Tensor:
    """Stored tensors [out, *inputs], given as (name, out), one below the other."""
    sources, start = [], 0
    for name, out in parts:
        sources.append(as_stored(name, (out, *inputs), (slice(start, start + out),)))
        start += out
    return _tensor(layer, (start, *inputs), axes, sources, inputs[0] ** -0.5 if inputs else 1.0, init)


def _layer(config: Config, layer: int, full: bool, weights: str | None) -> Layer:
    c, matrix = config, tensors.storing(weights)
    D, H, R, C = c.hidden_size, c.num_heads, c.q_lora_rank, c.kv_lora_rank
    dn, dr, dv, dq, Hi, Di = (
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.qk_head_dim,
        c.index_n_heads,
        c.index_head_dim,
    )
    attn, idx = f"{LAYER}.self_attn", f"{LAYER}.self_attn.indexer"
    down = [(f"{attn}.q_a_proj.weight", R), (f"{attn}.kv_a_proj_with_mqa.weight", C + dr)]
    if full:
        down += [(f"{idx}.wk.weight", Di), (f"{idx}.weights_proj.weight", Hi)]
    bias = [(f"{attn}.q_a_proj.bias", R), (f"{attn}.kv_a_proj_with_mqa.bias", C + dr)]

    def kv_b(perm: tuple[int, ...], first: int, last: int) -> list[Source]:  # every head's key rows, then its value rows
        rows = (slice(None), slice(first, last))
        return [Source(f"{attn}.kv_b_proj.weight", (H * (dn + dv), C), (H, dn + dv, C), perm, take=rows)]

    return Layer(
        norm=_vector(layer, f"{LAYER}.input_layernorm.weight", D, "embed"),
        down=_rows(layer, down, D, axes=(None, "embed")),
        down_bias=_rows(layer, bias, axes=(None,), init="zeros") if c.attention_bias else None,
        q_norm=_vector(layer, f"{attn}.q_a_layernorm.weight", R, "q_latent"),
        kv_norm=_vector(layer, f"{attn}.kv_a_layernorm.weight", C),
        key_norm=_vector(layer, f"{idx}.k_norm.weight", Di) if full else None,
        key_norm_bias=_vector(layer, f"{idx}.k_norm.bias", Di, init="zeros") if full else None,
        up=matrix(_rows(layer, [(f"{attn}.q_b_proj.weight", H * dq)], R, axes=("heads", "q_latent"))),
        index_up=matrix(_rows(layer, [(f"{idx}.wq_b.weight", Hi * Di)], R, axes=("index_heads", "q_latent"))) if full else None,
        k_up=_tensor(layer, (H, C, dn), ("heads", None, None), kv_b((0, 2, 1), 0, dn), C**-0.5),
        v_up=_tensor(layer, (H, dv, C), ("heads", None, None), kv_b((0, 1, 2), dn, dn + dv), C**-0.5),
        out=matrix(_rows(layer, [(f"{attn}.o_proj.weight", D)], H * dv, axes=("embed", "heads"))),
        out_bias=_vector(layer, f"{attn}.o_proj.bias", D, "embed", "zeros") if c.attention_bias else None,
        mlp_norm=_vector(layer, f"{LAYER}.post_attention_layernorm.weight", D, "embed"),
        mlp=_experts(c, layer, weights)
        if c.moe_layers[layer]
        else Dense(*map(matrix, _swiglu(c, layer, "", c.intermediate_size))),
    )


def _swiglu(config: Config, layer: int, prefix: str, width: int) -> tuple[Tensor, Tensor]:
    """Gate and up in one matrix, and down."""
    mlp, D = f"{LAYER}.mlp{prefix}", config.hidden_size
    gate_up = _rows(layer, [(f"{mlp}.gate_proj.weight", width), (f"{mlp}.up_proj.weight", width)], D, axes=("mlp", "embed"))
    return gate_up, _rows(layer, [(f"{mlp}.down_proj.weight", D)], width, axes=("embed", "mlp"))


def _experts(config: Config, layer: int, weights: str | None) -> Experts:
    c, mlp, matrix = config, f"{LAYER}.mlp", tensors.storing(weights)
    D, E, I = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    gate_up, down = routed_experts(c, weights)
    shared = c.n_shared_experts * I
    shared_gate_up, shared_down = map(matrix, _swiglu(c, layer, ".shared_experts", shared)) if shared else (None, None)
    return Experts(
        router=_rows(layer, [(f"{mlp}.gate.weight", E)], D, axes=(None, "embed")),
        router_bias=_vector(layer, f"{mlp}.gate.e_score_correction_bias", E, None, "zeros", "float32"),
        gate_up=matrix(_tensor(layer, *gate_up, D**-0.5)),
        down=matrix(_tensor(layer, *down, I**-0.5)),
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
    )


def layer_of(params: Params, layer: Any, indexer_slot: Any, mlp_slot: Any, config: Config, full: bool, experts: bool) -> Layer:
    """A layer of `params`. Its places in the stacks may be traced; `full` and `experts` say which stacks it is in."""
    c, dtype, coded = config, params.embedding.dtype, at_layer(params.attention, layer)
    p = decoded(coded, c, dtype)
    down, bias, coded_index, index = [p.q_down.T, p.kv_down.T], None, None, None
    if full:
        coded_index = at_layer(params.indexer, indexer_slot)
        index = decoded(coded_index, c, dtype)
        down += [index.keys.T, index.head_weights.T]
    if p.q_down_bias is not None:
        bias = jnp.concatenate([p.q_down_bias, p.kv_down_bias])
    mlp: Dense | Experts
    if experts:
        m: MoE = at_layer(params.moe, mlp_slot)
        shared = (None, None) if m.shared is None else _swiglu_of(m.shared)
        mlp = Experts(m.router.T, m.router_bias, m.gate_up, m.down, *shared)
    else:
        mlp = Dense(*_swiglu_of(at_layer(params.dense, mlp_slot)))
    return Layer(
        norm=at_layer(params.input_norm, layer),
        down=jnp.concatenate(down),
        down_bias=bias,
        q_norm=p.q_norm,
        kv_norm=p.kv_norm,
        key_norm=None if index is None else index.key_norm,
        key_norm_bias=None if index is None else index.key_norm_bias,
        up=_rows_of(coded.q_up, c.q_lora_rank),
        index_up=None if coded_index is None else _rows_of(coded_index.queries, c.q_lora_rank),
        k_up=p.k_up.swapaxes(1, 2),
        v_up=p.v_up.swapaxes(1, 2),
        out=coded.out if isinstance(coded.out, Scaled) else p.out.reshape(-1, c.hidden_size).T,
        out_bias=p.out_bias,
        mlp_norm=at_layer(params.mlp_norm, layer),
        mlp=mlp,
    )


def _rows_of(matrix: Any, inputs: int) -> Any:
    """A matrix [inputs, ...] of params as [outputs, inputs], which a `Scaled` one is already."""
    return matrix if isinstance(matrix, Scaled) else matrix.reshape(inputs, -1).T


def _swiglu_of(p: MLP) -> tuple[Any, Any]:
    """The two matrices of an MLP of `params` as those of `Dense`."""
    if not isinstance(p.gate_up, Scaled):
        return _rows_of(p.gate_up, p.gate_up.shape[0]), p.down.T
    two, width, hidden = p.gate_up.shape
    scales = p.gate_up.scales
    if width % BLOCK:  # blocks of the up rows begin within one of the gate rows
        scales = jnp.repeat(scales, BLOCK, axis=1)[:, :width]
    return Scaled(p.gate_up.codes.reshape(two * width, hidden), scales.reshape(-1, scales.shape[-1])), p.down


_layer_of = jax.jit(layer_of, static_argnames=("full", "experts"))


def from_params(params: Params, config: Config, schedule: Schedule) -> Weights:
    """The serving weights of `params` of a model under `schedule`, as copies: both exist until the caller drops `params`.

    A checkpoint is loaded into serving weights directly, without such a copy, by `load(directory, form="serving")`.
    Raises ValueError unless `params` are those of the model and hold exactly the indexers of the schedule's F layers.
    """
    check_params(params, config, schedule)
    full_slots, mlp_slots = slots(schedule.full_layers), {**slots(config.dense_layers), **slots(config.expert_layers)}
    layers = tuple(
        _layer_of(params, i, full_slots.get(i, 0), mlp_slots[i], config, full=full, experts=config.moe_layers[i])
        for i, full in enumerate(schedule.is_full)
    )
    return Weights(params.embedding, layers, params.final_norm, None if params.head is None else params.head.T)


def weights_for(params: Params | Weights, config: Config, schedule: Schedule) -> Weights:
    """Serving weights of a schedule, from either form; errors as of `check_weights`."""
    check_weights(params, config, schedule)
    return from_params(params, config, schedule) if isinstance(params, Params) else params


def check_weights(params: Params | Weights, config: Config, schedule: Schedule) -> None:
    """ValueError unless these are the weights, in either form, of this model under this schedule."""
    if not isinstance(params, Weights):
        check_params(params, config, schedule)
        return
    check_model(config, schedule)
    if params.pattern != schedule.pattern:
        raise ValueError(
            f"schedule pattern {schedule.pattern}: these weights are those of {params.pattern}; see serving.restrict"
        )
    if params.embedding.shape != (config.vocab_size, config.hidden_size):
        shapes = f"{list(params.embedding.shape)}, but config makes it {[config.vocab_size, config.hidden_size]}"
        raise ValueError(f"params: embedding has shape {shapes}")


@functools.partial(jax.jit, static_argnames=("experts", "dtype", "weights"))
def _random_layer(key: jax.Array, config: Config, experts: bool, dtype: Any, weights: str | None) -> Layer:
    one = dataclasses.replace(config, num_layers=1, moe_layers=(experts,))
    return _random(key, _layer(one, 0, True, weights), dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _random_ends(key: jax.Array, config: Config, dtype: Any) -> Weights:
    return _random(key, abstract(config, Schedule("F" * config.num_layers)).ends, dtype)


def _random(key: jax.Array, tree: Any, dtype: Any) -> Any:
    """Random arrays for an abstract tree, where the rules in force put them."""
    return jax.tree.map(lambda x, t: sharding.constrain(x, *t.axes), tensors.init(key, tree, dtype), tree)


def random_weights(key: jax.Array, config: Config, dtype: Any = jnp.bfloat16, weights: str | None = None) -> Weights:
    """Random weights with an indexer in every layer, made on the devices layer by layer: for measuring speed.

    weights: as of `abstract`; in 8 bits the codes themselves are drawn. ValueError for a key or config that is none.
    """
    check_key(key)
    check_config(config)
    keys = jax.random.split(key, config.num_layers + 1)
    layers = [_random_layer(k, config, experts, dtype, weights) for k, experts in zip(keys[1:], config.moe_layers, strict=True)]
    return dataclasses.replace(_random_ends(keys[0], config, dtype), layers=tuple(layers))


def restrict(weights: Weights, config: Config, schedule: Schedule) -> Weights:
    """The same model with fewer F layers. What an S layer keeps is shared with `weights`, but for `down`, which is cut.

    Raises ValueError where `schedule` has another number of layers, or an F layer whose indexer `weights` lack.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"weights: {arguments.described(weights)} is not Weights; from_params makes them of Params")
    check_model(config, schedule)
    schedule.check_layers(len(weights.layers))

    def without_indexer(layer: Layer) -> Layer:
        if not layer.full:
            return layer
        down = layer.down[: config.q_lora_rank + config.latent_dim]
        return dataclasses.replace(layer, down=down, index_up=None, key_norm=None, key_norm_bias=None)

    if lacking := [i for i in schedule.full_layers if not weights.layers[i].full]:
        raise ValueError(f"schedule pattern: layer {lacking[0]} is F, but these weights have no indexer there")
    layers = (p if full else without_indexer(p) for p, full in zip(weights.layers, schedule.is_full, strict=True))
    return dataclasses.replace(weights, layers=tuple(layers))
