"""The weights of a model as training and conversion hold them: equal layers stacked on a leading axis.

The tree has some twenty leaves however many layers there are, so dispatching a step costs the same for 5 layers as for
78. S layers have no indexer: that stack is as long as the schedule has F layers. Matrices are [in, out]. Inference has a
tree of its own, `serving.Weights`.

With weights="fp8" every matrix that FP8 checkpoints hold in 8 bits is a `Scaled` of codes [..., out, in] and scales as they
are stored. `decoded` gives a layer's matrices [in, out] when it runs; the routed experts are multiplied as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import arguments, tensors
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule, check_is_schedule
from indexcache_jax.tensors import Source, Tensor, as_stored
from pallas_kernels.quant import Scaled, dequantise

FP8_BASE = "fp8 base"
DTYPES = ("float32", "bfloat16", "float16")


@flax.struct.dataclass
class Attention:
    """Stacks of attention weights over all L layers, or with at_layer those of one (docs/model.md, Attention)."""

    q_down: Any  # [L, D, R]
    q_norm: Any  # [L, R]
    q_up: Any  # [L, R, H, dn+dr]
    kv_down: Any  # [L, D, C+dr]
    kv_norm: Any  # [L, C]
    k_up: Any  # [L, H, dn, C]
    v_up: Any  # [L, H, C, dv]
    out: Any  # [L, H, dv, D]
    q_down_bias: Any = None  # [L, R]; the three biases only with attention_bias
    kv_down_bias: Any = None  # [L, C+dr]
    out_bias: Any = None  # [L, D]


@flax.struct.dataclass
class Indexer:
    """Stacks of indexer weights over the F layers (docs/model.md, Indexer)."""

    queries: Any  # [num_full, R, Hi, Di]
    keys: Any  # [num_full, D, Di]
    key_norm: Any  # [num_full, Di]
    key_norm_bias: Any  # [num_full, Di]
    head_weights: Any  # [num_full, D, Hi]


@flax.struct.dataclass
class MLP:
    """Stacks of MLP weights over N layers: dense ones, or the shared experts."""

    gate_up: Any  # [N, D, 2, F]: gate first
    down: Any  # [N, F, D]


@flax.struct.dataclass
class MoE:
    """Stacks of the weights of N layers with E routed experts."""

    router: Any  # [N, D, E]
    router_bias: Any  # [N, E] float32: for the choice of experts only
    gate_up: Any  # [N, E, D, 2, I]
    down: Any  # [N, E, I, D]
    shared: MLP | None


@flax.struct.dataclass
class Params:
    """All weights of a model. Stacks: one entry per layer, per F layer (`indexer`), per dense or per expert layer.

    full_layers: which layers the `indexer` stack runs over, static.
    """

    embedding: Any  # [V, D]
    input_norm: Any  # [L, D]
    mlp_norm: Any  # [L, D]
    attention: Attention
    indexer: Indexer
    dense: MLP | None
    moe: MoE | None
    final_norm: Any  # [D]
    head: Any  # [D, V]; None where embeddings are tied
    full_layers: tuple[int, ...] = flax.struct.field(pytree_node=False)


def abstract(config: Config, schedule: Schedule, weights: str | None = None) -> Params:
    """The tree of `Tensor`s of a model under a schedule. ValueError as for `check_model`, and for weights that are no form.

    weights: "fp8" for matrices in 8 bits, None for all in the model's dtype; "fp8 base" for those in 8 bits that are no
    indexer's, so that indexers can be trained on them.
    """
    check_model(config, schedule)
    if weights == FP8_BASE:
        indexers = abstract(config, schedule).indexer
        return dataclasses.replace(abstract(config, schedule, "fp8"), indexer=indexers)
    c = config
    D, H, R, C = c.hidden_size, c.num_heads, c.q_lora_rank, c.kv_lora_rank
    dn, dr, dv, dq = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.qk_head_dim
    Hi, Di, E, I, V = c.index_n_heads, c.index_head_dim, c.n_routed_experts, c.moe_intermediate_size, c.vocab_size
    every, dense, moe = tuple(range(c.num_layers)), c.dense_layers, c.expert_layers
    matrix = tensors.storing(weights)

    def tensor(layers, shape, axes, sources, init="normal", fan_in=1, dtype=None):
        if layers is not None:
            shape, axes = (len(layers), *shape), ("layer", *axes)
        scale = c.initializer_range if init == "embedding" else fan_in**-0.5
        return Tensor(shape, axes, init, scale, tuple(sources), layers, layers is not None, dtype)

    def vector(layers, name, size, axis=None, init="ones", dtype=None):
        return tensor(layers, (size,), (axis,), [as_stored(name, (size,))], init, dtype=dtype)

    def linear(layers, name, fan_in, fan_out, axes):  # stored [out, in], used [in, out]
        source = Source(name, (fan_out, fan_in), (fan_out, fan_in), (1, 0))
        return tensor(layers, (fan_in, fan_out), axes, [source], fan_in=fan_in)

    def projection(layers, name, inputs, outputs, axes):
        """A stored matrix [out, in] as [*inputs, *outputs], whose axes are given so; in 8 bits as it is stored."""
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        if weights is not None:
            first, second = axes[: len(inputs)], axes[len(inputs) :]
            stored = tensor(
                layers, (fan_out, fan_in), (second[0], first[0]), [as_stored(name, (fan_out, fan_in))], fan_in=fan_in
            )
            return matrix(stored)
        view = (*outputs, *inputs)
        perm = (*range(len(outputs), len(view)), *range(len(outputs)))
        return tensor(layers, (*inputs, *outputs), axes, [Source(name, (fan_out, fan_in), view, perm)], fan_in=fan_in)

    def swiglu(layers, prefix, width, axis):
        names = [(at, f"{prefix}.{name}.weight") for at, name in enumerate(("gate_proj", "up_proj"))]
        if weights is None:
            halves = [Source(name, (width, D), (width, D), (1, 0), at=(slice(None), at)) for at, name in names]
            gate_up = tensor(layers, (D, 2, width), ("embed", None, axis), halves, fan_in=D)
        else:
            halves = [as_stored(name, (width, D), (at,)) for at, name in names]
            gate_up = tensor(layers, (2, width, D), (None, axis, "embed"), halves, fan_in=D)
        return MLP(
            gate_up=matrix(gate_up),
            down=projection(layers, f"{prefix}.down_proj.weight", (width,), (D,), (axis, "embed")),
        )

    layer = "model.layers.{layer}"
    attn = f"{layer}.self_attn"

    def kv_b(first, last, transposed):  # one tensor holds every head's key and value rows
        perm, rows = (0, 2, 1) if transposed else (0, 1, 2), (slice(None), slice(first, last))
        source = Source(f"{attn}.kv_b_proj.weight", (H * (dn + dv), C), (H, dn + dv, C), perm, take=rows)
        shape = (H, C, last - first) if transposed else (H, last - first, C)
        return matrix(tensor(every, shape, ("heads", None, None), [source], fan_in=C))

    attention = Attention(
        q_down=projection(every, f"{attn}.q_a_proj.weight", (D,), (R,), ("embed", "q_latent")),
        q_norm=vector(every, f"{attn}.q_a_layernorm.weight", R, "q_latent"),
        q_up=projection(every, f"{attn}.q_b_proj.weight", (R,), (H, dq), ("q_latent", "heads", None)),
        kv_down=projection(every, f"{attn}.kv_a_proj_with_mqa.weight", (D,), (C + dr,), ("embed", None)),
        kv_norm=vector(every, f"{attn}.kv_a_layernorm.weight", C),
        k_up=kv_b(0, dn, False),
        v_up=kv_b(dn, dn + dv, weights is None),
        out=projection(every, f"{attn}.o_proj.weight", (H, dv), (D,), ("heads", None, "embed")),
        q_down_bias=vector(every, f"{attn}.q_a_proj.bias", R, "q_latent", "zeros") if c.attention_bias else None,
        kv_down_bias=vector(every, f"{attn}.kv_a_proj_with_mqa.bias", C + dr, None, "zeros") if c.attention_bias else None,
        out_bias=vector(every, f"{attn}.o_proj.bias", D, "embed", "zeros") if c.attention_bias else None,
    )
    full = schedule.full_layers
    idx = f"{attn}.indexer"
    indexer = Indexer(
        queries=projection(full, f"{idx}.wq_b.weight", (R,), (Hi, Di), ("q_latent", "index_heads", None)),
        keys=projection(full, f"{idx}.wk.weight", (D,), (Di,), ("embed", None)),
        key_norm=vector(full, f"{idx}.k_norm.weight", Di),
        key_norm_bias=vector(full, f"{idx}.k_norm.bias", Di, init="zeros"),
        head_weights=linear(full, f"{idx}.weights_proj.weight", D, Hi, ("embed", "index_heads")),
    )
    mlp = f"{layer}.mlp"
    gate_up, down = routed_experts(c, weights)
    return Params(
        embedding=tensor(None, (V, D), ("vocab", "embed"), [as_stored("model.embed_tokens.weight", (V, D))], "embedding"),
        input_norm=vector(every, f"{layer}.input_layernorm.weight", D, "embed"),
        mlp_norm=vector(every, f"{layer}.post_attention_layernorm.weight", D, "embed"),
        attention=attention,
        indexer=indexer,
        dense=swiglu(dense, mlp, c.intermediate_size, "mlp") if dense else None,
        moe=MoE(
            router=linear(moe, f"{mlp}.gate.weight", D, E, ("embed", None)),
            router_bias=vector(moe, f"{mlp}.gate.e_score_correction_bias", E, None, "zeros", "float32"),
            gate_up=matrix(tensor(moe, *gate_up, fan_in=D)),
            down=matrix(tensor(moe, *down, fan_in=I)),
            shared=swiglu(moe, f"{mlp}.shared_experts", c.n_shared_experts * I, "mlp") if c.n_shared_experts else None,
        )
        if moe
        else None,
        final_norm=vector(None, "model.norm.weight", D, "embed"),
        head=None if c.tie_word_embeddings else linear(None, "lm_head.weight", D, V, ("embed", "vocab")),
        full_layers=full,
    )


def weights_of(params: Params) -> str | None:
    """The value of `weights` for which `abstract` describes `params`, or a tree like them."""
    if not isinstance(params.attention.q_down, Scaled):
        return None
    return "fp8" if isinstance(params.indexer.queries, Scaled) else FP8_BASE


Description = tuple[tuple[int, ...], tuple[str | None, ...], list[Source]]  # shape, axes and sources of a tensor


def routed_experts(config: Config, weights: str | None) -> tuple[Description, Description]:
    """What one layer's matrices of routed experts are made of, gate_up and down: [in, out], or in 8 bits [out, in]."""
    D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    experts = "model.layers.{layer}.mlp.experts"

    def source(expert: int, name: str, shape: tuple[int, int], half: int | None = None) -> Source:
        stored = f"{experts}.{expert}.{name}.weight"
        if weights is None:
            return Source(stored, shape, shape, (1, 0), at=(expert,) if half is None else (expert, slice(None), half))
        return as_stored(stored, shape, (expert,) if half is None else (expert, half))

    halves = [source(e, name, (I, D), half) for e in range(E) for half, name in enumerate(("gate_proj", "up_proj"))]
    downs = [source(e, "down_proj", (D, I)) for e in range(E)]
    if weights is None:
        return (
            ((E, D, 2, I), ("expert", "expert_embed", None, "expert_mlp"), halves),
            ((E, I, D), ("expert", "expert_mlp", "expert_embed"), downs),
        )
    return (
        ((E, 2, I, D), ("expert", None, "expert_mlp", "expert_embed"), halves),
        ((E, D, I), ("expert", "expert_embed", "expert_mlp"), downs),
    )


def decoded(p: Any, config: Config, dtype: Any) -> Any:
    """Attention, indexer or MLP weights of one layer with the matrices [in, out] that formulas multiply, in `dtype`.

    What is not in 8 bits stays as it is, and so do the matrices of routed experts.
    """
    c = config

    def inputs_first(matrix: Any, *shape: int) -> Any:
        if not isinstance(matrix, Scaled):
            return matrix
        plain = jnp.moveaxis(dequantise(matrix, dtype), -1, 0)
        return plain.reshape(shape) if shape else plain

    if isinstance(p, Attention) and isinstance(p.q_up, Scaled):
        return dataclasses.replace(
            p,
            q_down=inputs_first(p.q_down),
            q_up=inputs_first(p.q_up, c.q_lora_rank, c.num_heads, c.qk_head_dim),
            kv_down=inputs_first(p.kv_down),
            k_up=dequantise(p.k_up, dtype),
            v_up=dequantise(p.v_up, dtype).swapaxes(1, 2),
            out=inputs_first(p.out, c.num_heads, c.v_head_dim, c.hidden_size),
        )
    if isinstance(p, Indexer):
        queries = inputs_first(p.queries, c.q_lora_rank, c.index_n_heads, c.index_head_dim)
        return dataclasses.replace(p, queries=queries, keys=inputs_first(p.keys))
    if isinstance(p, MLP):
        return MLP(inputs_first(p.gate_up), inputs_first(p.down))
    if isinstance(p, MoE) and p.shared is not None:
        return dataclasses.replace(p, shared=decoded(p.shared, config, dtype))
    return p


def shape_structs(
    config: Config, schedule: Schedule, dtype: Any, shardings: Params | None = None, weights: str | None = None
) -> Params:
    """The params of a model under a schedule as ShapeDtypeStructs; see `tensors.shape_structs` and `abstract`."""
    return tensors.shape_structs(abstract(config, schedule, weights), dtype, shardings)


def init(key: jax.Array, config: Config, schedule: Schedule, dtype: Any = jnp.float32) -> Params:
    """Random params: normal with variance 1 / fan-in, embeddings with config.initializer_range, norms 1, biases 0.

    ValueError for a key that is none (`jax.random.key`), a dtype of no weights, and as for `check_model`.
    """
    tree = abstract(config, schedule)
    check_key(key)
    return tensors.init(key, tree, arguments.dtype("dtype", dtype, DTYPES))


def check_key(key: jax.Array) -> None:
    """Raises ValueError for what is no array of a random key, such as the seed of one."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"key: {arguments.described(key)} is not a random key; jax.random.key makes one of a seed")


def at_layer(stack: Any, slot: int | jax.Array) -> Any:
    """One layer of a stacked subtree, arrays [N, ...] as [...]: a static slice for a Python int, else a dynamic one."""
    if isinstance(slot, int):
        return jax.tree.map(lambda a: jax.lax.index_in_dim(a, slot, keepdims=False), stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), stack)


def slots(layers: tuple[int, ...]) -> Mapping[int, int]:
    """Where each layer of a stack is: layer -> position on the stacked axis."""
    return {layer: slot for slot, layer in enumerate(layers)}


def check_config(config: Config) -> None:
    """Raises ValueError unless this is a Config."""
    if not isinstance(config, Config):
        raise ValueError(f"config: {arguments.described(config)} is not a Config; Config.from_hf reads one from config.json")


def check_model(config: Config, schedule: Schedule) -> None:
    """Raises ValueError unless these are a Config and a Schedule of as many layers."""
    check_config(config)
    check_is_schedule("schedule", schedule)
    schedule.check_layers(config.num_layers)


def _check_is_params(value: Any) -> None:
    if not isinstance(value, Params):
        raise ValueError(f"params: {arguments.described(value)} is not Params; checkpoints_convert.load and init give them")


def check_params(params: Params, config: Config, schedule: Schedule) -> None:
    """Raises ValueError unless `params` are those of this model under this schedule, by what they hold and some shapes."""
    check_model(config, schedule)
    _check_is_params(params)
    check_schedule(params, schedule)
    c = config
    for path, leaf, shape in (
        ("embedding", params.embedding, (c.vocab_size, c.hidden_size)),
        ("input_norm", params.input_norm, (c.num_layers, c.hidden_size)),
        ("attention.q_norm", params.attention.q_norm, (c.num_layers, c.q_lora_rank)),
        ("attention.kv_norm", params.attention.kv_norm, (c.num_layers, c.kv_lora_rank)),
        ("indexer.key_norm", params.indexer.key_norm, (schedule.num_full, c.index_head_dim)),
    ):
        if leaf.shape != shape:
            raise ValueError(f"params: {path} has shape {list(leaf.shape)}, but config and schedule make it {list(shape)}")


def check_schedule(params: Params, schedule: Schedule) -> None:
    """Raises ValueError unless `params` hold exactly the indexers of the schedule's F layers.

    Otherwise a layer would silently use another layer's indexer.
    """
    if params.full_layers != schedule.full_layers:
        raise ValueError(
            f"schedule pattern {schedule.pattern}: F are the layers {list(schedule.full_layers)}, but these params hold the "
            f"indexers of {list(params.full_layers)}; load them with this schedule, or see params.with_schedule"
        )


def with_schedule(params: Params, schedule: Schedule, new: Schedule) -> Params:
    """Params of `schedule` as `new` wants them: without the indexers of the layers that become S.

    ValueError where `params` are not those of `schedule`, and where `new` has another number of layers or an F layer that
    `schedule` has no indexer for.
    """
    _check_is_params(params)
    check_is_schedule("schedule", schedule)
    check_is_schedule("new", new)
    check_schedule(params, schedule)
    new.check_layers(schedule.num_layers)
    if lacking := [layer for layer in new.full_layers if not schedule.is_full[layer]]:
        raise ValueError(f"schedule pattern: layer {lacking[0]} of {new.pattern} is F, but the params hold no indexer for it")
    kept = jnp.array([slots(schedule.full_layers)[layer] for layer in new.full_layers])
    indexer = jax.tree.map(lambda stack: stack[kept], params.indexer)
    return dataclasses.replace(params, indexer=indexer, full_layers=new.full_layers)
