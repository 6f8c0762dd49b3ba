"""One description of every tensor of a model: shape, dtype, logical axes, initialiser and place in a checkpoint.

`abstract` builds the tree once; init, shardings, the converter's shape checks and the exporter all read it. Tensors of
equal layers are stacked on a leading axis, so the tree has some twenty leaves however many layers there are and
dispatching a step costs the same for 5 layers as for 78. S layers have no indexer: that stack is as long as the
schedule has F layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule


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


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint tensor, and which part of one layer's tensor it fills.

    The checkpoint tensor, of `shape`, is viewed as `view`, cut to `take` and transposed by `perm`; that is
    `tensor[at]`. `take` leaves the first axis of `view` whole, so a checkpoint tensor also travels in slabs along it.
    """

    name: str  # with {layer}
    shape: tuple[int, ...]
    view: tuple[int, ...]
    perm: tuple[int, ...]
    take: tuple[slice, ...] = ()
    at: tuple[int | slice, ...] = ()

    def part(self, tensor: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The view of `tensor[at]` that entries start to stop of the first axis of `view` fill."""
        return tensor[self.at][(slice(None),) * self.perm.index(0) + (slice(start, stop),)]

    def read(self, slab: np.ndarray) -> np.ndarray:
        """What `slab`, the checkpoint tensor or whole entries of its first view axis, puts into `part`."""
        return slab.reshape(-1, *self.view[1:])[self.take].transpose(self.perm)

    def write(self, slab: np.ndarray, part: np.ndarray) -> None:
        """The inverse of `read`: puts `part` into `slab`."""
        slab.reshape(-1, *self.view[1:])[self.take] = part.transpose(np.argsort(self.perm))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A leaf of the abstract tree. `shape` and `axes` include the stacked axis; `layers` says what it runs over."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # "normal" (fan-in scaled), "embedding", "ones" or "zeros"
    fan_in: int
    sources: tuple[Source, ...]
    layers: tuple[int, ...] | None = None
    dtype: str | None = None  # where it differs from the model's

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else self.shape[1:]


def abstract(config: Config, schedule: Schedule) -> Params:
    """The tree of `Tensor`s of a model under a schedule. ValueError where their numbers of layers differ."""
    if schedule.num_layers != config.num_layers:
        raise ValueError(
            f"schedule pattern: {schedule.pattern} has {schedule.num_layers} entries for {config.num_layers} layers"
        )
    c = config
    D, H, R, C = c.hidden_size, c.num_heads, c.q_lora_rank, c.kv_lora_rank
    dn, dr, dv, dq = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.qk_head_dim
    Hi, Di, E, I, V = c.index_n_heads, c.index_head_dim, c.n_routed_experts, c.moe_intermediate_size, c.vocab_size
    every = tuple(range(c.num_layers))
    dense = tuple(i for i in every if not c.moe_layers[i])
    moe = tuple(i for i in every if c.moe_layers[i])

    def tensor(layers, shape, axes, sources, init="normal", fan_in=1, dtype=None):
        if layers is not None:
            shape, axes = (len(layers), *shape), ("layer", *axes)
        return Tensor(shape, axes, init, fan_in, tuple(sources), layers, dtype)

    def plain(name, shape):  # stored as it is used
        return [Source(name, shape, shape, tuple(range(len(shape))))]

    def vector(layers, name, size, axis=None, init="ones", dtype=None):
        return tensor(layers, (size,), (axis,), plain(name, (size,)), init, dtype=dtype)

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
        embedding=tensor(None, (V, D), ("vocab", "embed"), plain("model.embed_tokens.weight", (V, D)), "embedding", D),
        input_norm=vector(every, f"{layer}.input_layernorm.weight", D, "embed"),
        mlp_norm=vector(every, f"{layer}.post_attention_layernorm.weight", D, "embed"),
        attention=attention,
        indexer=indexer,
        dense=swiglu(dense, mlp, c.intermediate_size, "mlp") if dense else None,
        moe=MoE(
            router=linear(moe, f"{mlp}.gate.weight", D, E, ("embed", None)),
            router_bias=vector(moe, f"{mlp}.gate.e_score_correction_bias", E, None, "zeros", "float32"),
            gate_up=tensor(moe, (E, D, 2, I), ("expert", "embed", None, "expert_mlp"), experts, fan_in=D),
            down=tensor(moe, (E, I, D), ("expert", "expert_mlp", "embed"), down, fan_in=I),
            shared=swiglu(moe, f"{mlp}.shared_experts", c.n_shared_experts * I, "mlp") if c.n_shared_experts else None,
        )
        if moe
        else None,
        final_norm=vector(None, "model.norm.weight", D, "embed"),
        head=None if c.tie_word_embeddings else linear(None, "lm_head.weight", D, V, ("embed", "vocab")),
        full_layers=full,
    )


def leaves(tree: Params) -> Iterator[tuple[str, Tensor]]:
    """The (path, Tensor) pairs of an abstract tree, such as ("attention.q_up", Tensor(...))."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield ".".join(str(key.name) for key in path), leaf


def shape_structs(config: Config, schedule: Schedule, dtype: Any, shardings: Params | None = None) -> Params:
    """The tree as ShapeDtypeStructs: to lower a program, or to restore into, without allocating a weight."""
    tree = abstract(config, schedule)
    structs = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, jnp.dtype(t.dtype or dtype)), tree)
    if shardings is None:
        return structs
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), structs, shardings)


def init(key: jax.Array, config: Config, schedule: Schedule, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with variance 1 / fan-in, embeddings with config.initializer_range, norms 1, biases 0."""
    tree = abstract(config, schedule)
    tensors, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(tensors))

    def one(key: jax.Array, t: Tensor) -> jax.Array:
        dt = jnp.dtype(t.dtype or dtype)
        if t.init == "ones":
            return jnp.ones(t.shape, dt)
        if t.init == "zeros":
            return jnp.zeros(t.shape, dt)
        scale = config.initializer_range if t.init == "embedding" else t.fan_in**-0.5
        return (scale * jax.random.normal(key, t.shape, jnp.float32)).astype(dt)

    return jax.tree.unflatten(treedef, [one(k, t) for k, t in zip(keys, tensors, strict=True)])


def at_layer(stack: Any, slot: int | jax.Array) -> Any:
    """One layer of a stacked subtree; a Python int is a static slice, a traced one a dynamic slice."""
    if isinstance(slot, int):
        return jax.tree.map(lambda a: jax.lax.index_in_dim(a, slot, keepdims=False), stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), stack)


def count(tree: Params) -> int:
    """Number of weights of an abstract tree."""
    return sum(math.prod(t.shape) for _, t in leaves(tree))


def slots(layers: tuple[int, ...]) -> Mapping[int, int]:
    """Where each layer of a stack is: layer -> position on the stacked axis."""
    return {layer: slot for slot, layer in enumerate(layers)}


def check_schedule(params: Params, schedule: Schedule) -> None:
    """ValueError where `params` have not the indexers of the F layers: another layer's would select in silence."""
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
    if new.num_layers != schedule.num_layers:
        raise ValueError(f"schedule pattern: {new.pattern} has {new.num_layers} entries for {schedule.num_layers} layers")
    if lacking := [layer for layer in new.full_layers if not schedule.is_full[layer]]:
        raise ValueError(f"schedule pattern: layer {lacking[0]} of {new.pattern} is F, but the params hold no indexer for it")
    kept = jnp.array([slots(schedule.full_layers)[layer] for layer in new.full_layers])
    indexer = jax.tree.map(lambda stack: stack[kept], params.indexer)
    return dataclasses.replace(params, indexer=indexer, full_layers=new.full_layers)
