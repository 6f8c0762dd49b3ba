"""The weights of a model as training and conversion hold them: equal layers stacked on a leading axis.

The tree has some twenty leaves however many layers there are, so dispatching a step costs the same for 5 layers as for
78. S layers have no indexer: that stack is as long as the schedule has F layers. Matrices are [in, out]. Inference has a
tree of its own, `serving.Weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import tensors
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Source, Tensor, as_stored


@flax.struct.dataclass
class Attention:
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
    queries: Any  # [num_full, R, Hi, Di]
    keys: Any  # [num_full, D, Di]
    key_norm: Any  # [num_full, Di]
    key_norm_bias: Any  # [num_full, Di]
    head_weights: Any  # [num_full, D, Hi]


@flax.struct.dataclass
class MLP:
    gate_up: Any  # [N, D, 2, F]: gate first
    down: Any  # [N, F, D]


@flax.struct.dataclass
class MoE:
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


def abstract(config: Config, schedule: Schedule) -> Params:
    """The tree of `Tensor`s of a model under a schedule. ValueError where their numbers of layers differ."""
    schedule.check_layers(config.num_layers)
    c = config
    D, H, R, C = c.hidden_size, c.num_heads, c.q_lora_rank, c.kv_lora_rank
    dn, dr, dv, dq = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.qk_head_dim
    Hi, Di, E, I, V = c.index_n_heads, c.index_head_dim, c.n_routed_experts, c.moe_intermediate_size, c.vocab_size
    every, dense, moe = tuple(range(c.num_layers)), c.dense_layers, c.expert_layers

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

    def swiglu(layers, prefix, width, axis):
        def half(name, at):
            return Source(f"{prefix}.{name}.weight", (width, D), (width, D), (1, 0), at=(slice(None), at))

        return MLP(
            gate_up=tensor(layers, (D, 2, width), ("embed", None, axis), [half("gate_proj", 0), half("up_proj", 1)], fan_in=D),
            down=linear(layers, f"{prefix}.down_proj.weight", width, D, (axis, "embed")),
        )

    layer = "model.layers.{layer}"
    attn = f"{layer}.self_attn"

    def kv_b(perm, first, last):  # one tensor holds every head's key and value rows
        rows = (slice(None), slice(first, last))
        return [Source(f"{attn}.kv_b_proj.weight", (H * (dn + dv), C), (H, dn + dv, C), perm, take=rows)]

    attention = Attention(
        q_down=linear(every, f"{attn}.q_a_proj.weight", D, R, ("embed", "q_latent")),
        q_norm=vector(every, f"{attn}.q_a_layernorm.weight", R, "q_latent"),
        q_up=tensor(
            every,
            (R, H, dq),
            ("q_latent", "heads", None),
            [Source(f"{attn}.q_b_proj.weight", (H * dq, R), (H, dq, R), (2, 0, 1))],
            fan_in=R,
        ),
        kv_down=linear(every, f"{attn}.kv_a_proj_with_mqa.weight", D, C + dr, ("embed", None)),
        kv_norm=vector(every, f"{attn}.kv_a_layernorm.weight", C),
        k_up=tensor(
            every,
            (H, dn, C),
            ("heads", None, None),
            kv_b((0, 1, 2), 0, dn),
            fan_in=C,
        ),
        v_up=tensor(
            every,
            (H, C, dv),
            ("heads", None, None),
            kv_b((0, 2, 1), dn, dn + dv),
            fan_in=C,
        ),
        out=tensor(
            every,
            (H, dv, D),
            ("heads", None, "embed"),
            [Source(f"{attn}.o_proj.weight", (D, H * dv), (D, H, dv), (1, 2, 0))],
            fan_in=H * dv,
        ),
        q_down_bias=vector(every, f"{attn}.q_a_proj.bias", R, "q_latent", "zeros") if c.attention_bias else None,
        kv_down_bias=vector(every, f"{attn}.kv_a_proj_with_mqa.bias", C + dr, None, "zeros") if c.attention_bias else None,
        out_bias=vector(every, f"{attn}.o_proj.bias", D, "embed", "zeros") if c.attention_bias else None,
    )
    full = schedule.full_layers
    idx = f"{attn}.indexer"
    indexer = Indexer(
        queries=tensor(
            full,
            (R, Hi, Di),
            ("q_latent", "index_heads", None),
            [Source(f"{idx}.wq_b.weight", (Hi * Di, R), (Hi, Di, R), (2, 0, 1))],
            fan_in=R,
        ),
        keys=linear(full, f"{idx}.wk.weight", D, Di, ("embed", None)),
        key_norm=vector(full, f"{idx}.k_norm.weight", Di),
        key_norm_bias=vector(full, f"{idx}.k_norm.bias", Di, init="zeros"),
        head_weights=linear(full, f"{idx}.weights_proj.weight", D, Hi, ("embed", "index_heads")),
    )
    mlp = f"{layer}.mlp"
    experts = [
        Source(f"{mlp}.experts.{e}.{name}.weight", (I, D), (I, D), (1, 0), at=(e, slice(None), at))
        for e in range(E)
        for at, name in enumerate(("gate_proj", "up_proj"))
    ]
    down = [Source(f"{mlp}.experts.{e}.down_proj.weight", (D, I), (D, I), (1, 0), at=(e,)) for e in range(E)]
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
            gate_up=tensor(moe, (E, D, 2, I), ("expert", "expert_embed", None, "expert_mlp"), experts, fan_in=D),
            down=tensor(moe, (E, I, D), ("expert", "expert_mlp", "expert_embed"), down, fan_in=I),
            shared=swiglu(moe, f"{mlp}.shared_experts", c.n_shared_experts * I, "mlp") if c.n_shared_experts else None,
        )
        if moe
        else None,
        final_norm=vector(None, "model.norm.weight", D, "embed"),
        head=None if c.tie_word_embeddings else linear(None, "lm_head.weight", D, V, ("embed", "vocab")),
        full_layers=full,
    )


def shape_structs(config: Config, schedule: Schedule, dtype: Any, shardings: Params | None = None) -> Params:
    """The params of a model under a schedule as ShapeDtypeStructs; see `tensors.shape_structs`."""
    return tensors.shape_structs(abstract(config, schedule), dtype, shardings)


def init(key: jax.Array, config: Config, schedule: Schedule, dtype: Any = jnp.float32) -> Params:
    """Random params: normal with variance 1 / fan-in, embeddings with config.initializer_range, norms 1, biases 0."""
    return tensors.init(key, abstract(config, schedule), dtype)


def at_layer(stack: Any, slot: int | jax.Array) -> Any:
    """One layer of a stacked subtree; a Python int is a static slice, a traced one a dynamic slice."""
    if isinstance(slot, int):
        return jax.tree.map(lambda a: jax.lax.index_in_dim(a, slot, keepdims=False), stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), stack)


def slots(layers: tuple[int, ...]) -> Mapping[int, int]:
    """Where each layer of a stack is: layer -> position on the stacked axis."""
    return {layer: slot for slot, layer in enumerate(layers)}


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
    check_schedule(params, schedule)
    new.check_layers(schedule.num_layers)
    if lacking := [layer for layer in new.full_layers if not schedule.is_full[layer]]:
        raise ValueError(f"schedule pattern: layer {lacking[0]} of {new.pattern} is F, but the params hold no indexer for it")
    kept = jnp.array([slots(schedule.full_layers)[layer] for layer in new.full_layers])
    indexer = jax.tree.map(lambda stack: stack[kept], params.indexer)
    return dataclasses.replace(params, indexer=indexer, full_layers=new.full_layers)
