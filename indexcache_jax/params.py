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
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import arguments, tensors
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule, check_is_schedule
from indexcache_jax.tensors import Axes, Source, Tensor, as_stored
from pallas_kernels.quant import Scaled, dequantise

FP8_BASE = "fp8 base"
DTYPES = ("float32", "bfloat16", "float16")
LAYER = "model.layers.{layer}"  # what the names of a layer's stored tensors begin with


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
    c, stacks = config, _Stacks(config, weights)
    D, V, every = c.hidden_size, c.vocab_size, tuple(range(c.num_layers))
    embedding = stacks.tensor(None, (V, D), ("vocab", "embed"), [as_stored("model.embed_tokens.weight", (V, D))])
    return Params(
        embedding=dataclasses.replace(embedding, init="embedding", scale=c.initializer_range),
        input_norm=stacks.vector(every, f"{LAYER}.input_layernorm.weight", D, "embed"),
        mlp_norm=stacks.vector(every, f"{LAYER}.post_attention_layernorm.weight", D, "embed"),
        attention=stacks.attention(every),
        indexer=stacks.indexer(schedule.full_layers),
        dense=stacks.swiglu(c.dense_layers, f"{LAYER}.mlp", c.intermediate_size) if c.dense_layers else None,
        moe=stacks.moe(c.expert_layers) if c.expert_layers else None,
        final_norm=stacks.vector(None, "model.norm.weight", D, "embed"),
        head=None if c.tie_word_embeddings else stacks.linear(None, "lm_head.weight", D, V, ("embed", "vocab")),
        full_layers=schedule.full_layers,
    )


@dataclasses.dataclass(frozen=True)
class _Stacks:
    """The stacked tensors of a model, as `abstract` describes them, with matrices in the form that `weights` names.

    layers: those that a stack runs over, None for a tensor that belongs to none. Names are stored ones, shapes and axes of one
    layer.
    """

    config: Config
    weights: str | None

    def tensor(
        self,
        layers: tuple[int, ...] | None,
        shape: tuple[int, ...],
        axes: Axes,
        sources: Sequence[Source],
        init: str = "normal",
        fan_in: int = 1,
        dtype: str | None = None,
    ) -> Tensor:
        if layers is not None:
            shape, axes = (len(layers), *shape), ("layer", *axes)
        return Tensor(shape, axes, init, fan_in**-0.5, tuple(sources), layers, layers is not None, dtype)

    def vector(
        self,
        layers: tuple[int, ...] | None,
        name: str,
        size: int,
        axis: str | None = None,
        init: str = "ones",
        dtype: str | None = None,
    ) -> Tensor:
        return self.tensor(layers, (size,), (axis,), [as_stored(name, (size,))], init, dtype=dtype)

    def linear(self, layers: tuple[int, ...] | None, name: str, fan_in: int, fan_out: int, axes: Axes) -> Tensor:
        """A stored matrix [out, in] as [in, out], in 8 bits nowhere."""
        source = Source(name, (fan_out, fan_in), (fan_out, fan_in), (1, 0))
        return self.tensor(layers, (fan_in, fan_out), axes, [source], fan_in=fan_in)

    def matrix(self, tensor: Tensor) -> Any:
        """A matrix that FP8 checkpoints hold in 8 bits."""
        return tensors.storing(self.weights)(tensor)

    def projection(
        self, layers: tuple[int, ...], name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], axes: Axes
    ) -> Any:
        """A stored matrix [out, in] as [*inputs, *outputs], whose axes are given so; in 8 bits as it is stored."""
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        if self.weights is not None:
            of_stored, source = (axes[len(inputs)], axes[0]), as_stored(name, (fan_out, fan_in))
            return self.matrix(self.tensor(layers, (fan_out, fan_in), of_stored, [source], fan_in=fan_in))
        view = (*outputs, *inputs)
        perm = (*range(len(outputs), len(view)), *range(len(outputs)))
        return self.tensor(layers, (*inputs, *outputs), axes, [Source(name, (fan_out, fan_in), view, perm)], fan_in=fan_in)

    def attention(self, layers: tuple[int, ...]) -> Attention:
        c, name = self.config, f"{LAYER}.self_attn"
        D, H, R, C = c.hidden_size, c.num_heads, c.q_lora_rank, c.kv_lora_rank
        dn, dr, dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

        def of_heads(first: int, last: int, transposed: bool) -> Any:
            """Rows of every head in kv_b_proj, which holds a head's key rows and then its value rows."""
            perm, rows = (0, 2, 1) if transposed else (0, 1, 2), (slice(None), slice(first, last))
            source = Source(f"{name}.kv_b_proj.weight", (H * (dn + dv), C), (H, dn + dv, C), perm, take=rows)
            shape = (H, C, last - first) if transposed else (H, last - first, C)
            return self.matrix(self.tensor(layers, shape, ("heads", None, None), [source], fan_in=C))

        def bias(of: str, size: int, axis: str | None) -> Tensor | None:
            return self.vector(layers, f"{name}.{of}.bias", size, axis, "zeros") if c.attention_bias else None

        return Attention(
            q_down=self.projection(layers, f"{name}.q_a_proj.weight", (D,), (R,), ("embed", "q_latent")),
            q_norm=self.vector(layers, f"{name}.q_a_layernorm.weight", R, "q_latent"),
            q_up=self.projection(layers, f"{name}.q_b_proj.weight", (R,), (H, dn + dr), ("q_latent", "heads", None)),
            kv_down=self.projection(layers, f"{name}.kv_a_proj_with_mqa.weight", (D,), (C + dr,), ("embed", None)),
            kv_norm=self.vector(layers, f"{name}.kv_a_layernorm.weight", C),
            k_up=of_heads(0, dn, transposed=False),
            v_up=of_heads(dn, dn + dv, transposed=self.weights is None),
            out=self.projection(layers, f"{name}.o_proj.weight", (H, dv), (D,), ("heads", None, "embed")),
            q_down_bias=bias("q_a_proj", R, "q_latent"),
            kv_down_bias=bias("kv_a_proj_with_mqa", C + dr, None),
            out_bias=bias("o_proj", D, "embed"),
        )

    def indexer(self, layers: tuple[int, ...]) -> Indexer:
        c, name = self.config, f"{LAYER}.self_attn.indexer"
        D, R, Hi, Di = c.hidden_size, c.q_lora_rank, c.index_n_heads, c.index_head_dim
        return Indexer(
            queries=self.projection(layers, f"{name}.wq_b.weight", (R,), (Hi, Di), ("q_latent", "index_heads", None)),
            keys=self.projection(layers, f"{name}.wk.weight", (D,), (Di,), ("embed", None)),
            key_norm=self.vector(layers, f"{name}.k_norm.weight", Di),
            key_norm_bias=self.vector(layers, f"{name}.k_norm.bias", Di, init="zeros"),
            head_weights=self.linear(layers, f"{name}.weights_proj.weight", D, Hi, ("embed", "index_heads")),
        )

    def swiglu(self, layers: tuple[int, ...], name: str, width: int) -> MLP:
        """A dense MLP, or the shared experts, of this width."""
        D = self.config.hidden_size
        halves = [(half, f"{name}.{of}.weight") for half, of in enumerate(("gate_proj", "up_proj"))]
        if self.weights is None:
            sources = [Source(of, (width, D), (width, D), (1, 0), at=(slice(None), half)) for half, of in halves]
            gate_up = self.tensor(layers, (D, 2, width), ("embed", None, "mlp"), sources, fan_in=D)
        else:
            sources = [as_stored(of, (width, D), (half,)) for half, of in halves]
            gate_up = self.tensor(layers, (2, width, D), (None, "mlp", "embed"), sources, fan_in=D)
        down = self.projection(layers, f"{name}.down_proj.weight", (width,), (D,), ("mlp", "embed"))
        return MLP(gate_up=self.matrix(gate_up), down=down)

    def moe(self, layers: tuple[int, ...]) -> MoE:
        c, name = self.config, f"{LAYER}.mlp"
        D, E, I = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
        gate_up, down = routed_experts(c, self.weights)
        return MoE(
            router=self.linear(layers, f"{name}.gate.weight", D, E, ("embed", None)),
            router_bias=self.vector(layers, f"{name}.gate.e_score_correction_bias", E, None, "zeros", "float32"),
            gate_up=self.matrix(self.tensor(layers, *gate_up, fan_in=D)),
            down=self.matrix(self.tensor(layers, *down, fan_in=I)),
            shared=self.swiglu(layers, f"{name}.shared_experts", c.n_shared_experts * I) if c.n_shared_experts else None,
        )


def weights_of(params: Params) -> str | None:
    """The value of `weights` for which `abstract` describes `params`, or a tree like them."""
    if not isinstance(params.attention.q_down, Scaled):
        return None
    return "fp8" if isinstance(params.indexer.queries, Scaled) else FP8_BASE


Description = tuple[tuple[int, ...], Axes, list[Source]]  # shape, axes and sources of a tensor


def routed_experts(config: Config, weights: str | None) -> tuple[Description, Description]:
    """What one layer's matrices of routed experts are made of, gate_up and down: [in, out], or in 8 bits [out, in]."""
    D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    experts = f"{LAYER}.mlp.experts"

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
