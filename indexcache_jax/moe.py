"""SwiGLU layers, dense and routed: sigmoid scores, groups, a bias for the choice only, shared experts.

The formulas are those of docs/model.md, Experts. Where a mesh splits the experts, every device gathers the tokens of all,
multiplies those that chose one of its own experts, and the weighted sums go back to the tokens' devices, added up. However
the tokens choose, all of them to the experts of one device too, every choice is computed.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.params import MLP, MoE
from pallas_kernels.quant import Scaled, dequantise

SMALL_BUFFER = 4096  # pairs of a token and an expert that a device has room for, whatever its share of them
SPARE = 1.25  # times a device's even share of more pairs: what it has room for at once


class HasMatrices(Protocol):
    """What holds the routed experts' weights: gate_up [E, D, 2, I] and down [E, I, D], or in 8 bits [E, 2, I, D], [E, D, I]."""

    @property
    def gate_up(self) -> jax.Array | Scaled: ...
    @property
    def down(self) -> jax.Array | Scaled: ...


@flax.struct.dataclass
class Matrices:
    """The routed experts' weights alone, of all experts or of a device's own."""

    gate_up: jax.Array | Scaled  # [E, D, 2, I], in 8 bits [E, 2, I, D]
    down: jax.Array | Scaled  # [E, I, D], in 8 bits [E, D, I]


def _decoded(p: HasMatrices, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """gate_up [..., D, 2, I] and down [..., I, D] as arrays; in `dtype` what is in 8 bits."""

    def inputs_first(matrix: jax.Array | Scaled, axis: int) -> jax.Array:
        return jnp.moveaxis(dequantise(matrix, dtype), -1, axis) if isinstance(matrix, Scaled) else matrix

    return inputs_first(p.gate_up, -3), inputs_first(p.down, -2)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


def mlp(p: MLP, x: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x): [..., D] -> [..., D]."""
    gate_up = jnp.einsum("...d,dgf->...gf", x, p.gate_up)
    return swiglu(gate_up[..., 0, :], gate_up[..., 1, :]) @ p.down


def route(p: MoE, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """The experts [..., k] of tokens x [..., D] and their weights [..., k] float32.

    The bias counts when choosing, not in the weights. With groups, only experts of the topk_group best groups can be
    chosen; a group is as good as its two best experts together.
    """
    logits = jnp.dot(x.astype(jnp.float32), p.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return choose(logits, p.router_bias, config)


def choose(logits: jax.Array, bias: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """`route` from the router's logits [..., E] float32 on, of [B, S] or [N] tokens: experts and weights [..., k]."""
    axes = ("batch", "queries")[: logits.ndim - 1]
    # XLA would gather the logits of all tokens for a top-k.
    on_each = sharding.on_each_device(functools.partial(ops.choose, config=config), inputs=(axes, ()), outputs=(axes, axes))
    experts, weights = on_each(logits, bias)
    return experts, weights


def tokens_per_expert(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens each expert got, [E] int32; a sum, since a histogram by scatter serialises on a GPU."""
    return jnp.sum(jax.nn.one_hot(experts.reshape(-1), num_experts, dtype=jnp.int32), axis=0)


def moe(p: MoE, x: jax.Array, config: Config) -> jax.Array:
    """Routed and shared experts of x [B, S, D], summed in float32."""
    out = routed(p, x, *route(p, x, config), config).astype(x.dtype)
    return out if p.shared is None else out + mlp(p.shared, x)


def routed(
    p: HasMatrices,
    tokens: jax.Array | Scaled,
    experts: jax.Array,
    weights: jax.Array,
    config: Config,
    added: tuple[jax.Array, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The weighted sum over the experts [..., k] of tokens [B, S, D] or [N, D], plus arrays of their shape, in `dtype`.

    Everything is added up in float32. experts, weights: both as `choose` gives them. Tokens are in 8 bits only where the
    matrices are. Where devices exchange sums, they do so in the dtype of the tokens.
    """
    axes = ("batch", "queries")[: tokens.ndim - 1]
    exchange = sharding.exchange(tokens.shape, axes, "expert", p.gate_up.shape[0])
    on_each = sharding.on_each_device(
        functools.partial(_on_each_device, config=config, exchange=exchange, dtype=dtype),
        inputs=(("expert",), axes, axes, axes, axes),
        outputs=axes,
    )
    return on_each(Matrices(p.gate_up, p.down), tokens, experts, weights, added)


def _on_each_device(
    p: Matrices,
    tokens: jax.Array | Scaled,
    experts: jax.Array,
    weights: jax.Array,
    added: tuple[jax.Array, ...],
    config: Config,
    exchange: sharding.Exchange | None,
    dtype: Any,
) -> jax.Array:
    """`routed` for a device's own tokens, with its own experts and, where there is an exchange, those of the others."""
    shape = tokens.shape
    tokens, experts, weights, added = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (tokens, experts, weights, added))
    if exchange is None:
        return _multiply(p, tokens, experts, weights, config, added, dtype).reshape(shape)
    tokens, experts, weights = jax.tree.map(exchange.gather, (tokens, experts, weights))
    own = experts - exchange.index() * p.gate_up.shape[0]
    # A choice that is no expert of this device's counts as one after the last: it sorts behind all others.
    own = jnp.where((own >= 0) & (own < p.gate_up.shape[0]), own, p.gate_up.shape[0])
    exchanged = jnp.bfloat16 if isinstance(tokens, Scaled) else tokens.dtype
    if not isinstance(tokens, Scaled) and _few(p, experts, config):
        sums = _multiply(p, tokens, own, weights, config, (), exchanged)
    else:
        sums = _pieces_sorted_by_expert(p, tokens, own, weights, exchange.devices, exchanged)
    return _added_up(exchange.add_up(sums), added, dtype).reshape(shape)


def _added_up(sums: jax.Array, added: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
    for other in added:
        sums = sums.astype(jnp.float32) + other.astype(jnp.float32)
    return sums.astype(dtype)


def _few(p: Matrices, experts: jax.Array, config: Config) -> bool:
    return _few_experts(config) or _few_rows(p, experts)


def _multiply(
    p: Matrices,
    tokens: jax.Array | Scaled,
    experts: jax.Array,
    weights: jax.Array,
    config: Config,
    added: tuple[jax.Array, ...],
    dtype: Any,
) -> jax.Array:
    """The weighted sum [N, D] over those experts [N, k] of tokens [N, D] that are below E, of `p`'s E experts, plus `added`.

    Where sorting pays, all experts have to be below E.
    """
    if isinstance(tokens, Scaled) or not _few(p, experts, config):
        return _sorted_by_expert(p, tokens, experts, weights, added, dtype)
    few = _every_expert if _few_experts(config) else _matrix_by_matrix
    return _added_up(few(p, tokens, experts, weights), added, dtype)


def _few_experts(config: Config) -> bool:
    # An accelerator multiplies a small model's tokens by every expert faster than it sorts them.
    return ops.platform() != "cpu" and config.n_routed_experts <= 4 * config.num_experts_per_tok


def _few_rows(p: Matrices, experts: jax.Array) -> bool:
    # Then a matrix for every row is less than what a TPU's grouped product reads. Hopper's reads the chosen ones alone, and so
    # does that of matrices in 8 bits.
    return ops.platform() == "tpu" and not isinstance(p.gate_up, Scaled) and 4 * experts.size <= p.gate_up.shape[0]


def _every_expert(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """All experts of tokens [N, D], those not chosen with weight 0 -> [N, D] float32."""
    gates = jnp.sum(jax.nn.one_hot(experts, p.gate_up.shape[0]) * weights[..., None], axis=1)
    matrices, down = _decoded(p, tokens.dtype)
    gate_up = jnp.einsum("nd,edgi->negi", tokens, matrices)
    hidden = swiglu(gate_up[:, :, 0], gate_up[:, :, 1])
    hidden = (hidden.astype(jnp.float32) * gates[..., None]).astype(tokens.dtype)
    return jnp.einsum("nei,eid->nd", hidden, down, preferred_element_type=jnp.float32)


def _matrix_by_matrix(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """The chosen experts of a few tokens [N, D], one after the other -> [N, D] float32. The matrices are not in 8 bits.

    On a TPU XLA reads one slice of a stack in place but copies what a gather or a reshape of it makes.
    """
    weights = jnp.where(experts < p.gate_up.shape[0], weights, 0.0)  # beyond, a slice is that of the last expert

    def apply(token: jax.Array, expert: jax.Array) -> jax.Array:  # [D] -> [D]
        stacks = p.gate_up, p.down
        matrix, down = (jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False) for stack in stacks)
        gate_up = jnp.einsum("d,dgi->gi", token, matrix)
        return jnp.einsum("i,id->d", swiglu(gate_up[0], gate_up[1]), down)

    n, k = experts.shape
    rows = jnp.stack([jnp.stack([apply(tokens[i], experts[i, j]) for j in range(k)]) for i in range(n)])  # [N, k, D]
    return jnp.sum(rows * weights[..., None], axis=1)


def _sorted_by_expert(
    p: Matrices,
    tokens: jax.Array | Scaled,
    experts: jax.Array,
    weights: jax.Array,
    added: tuple[jax.Array, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The chosen experts of tokens [N, D], plus `added`: pairs sorted by expert, two grouped products -> [N, D] in `dtype`."""
    order, back, sizes = ops.sort_by_group(experts.reshape(-1), p.gate_up.shape[0])
    products = ops.grouped_mlp(ops.gather_rows(tokens, order // experts.shape[1]), p.gate_up, p.down, sizes)
    return ops.sum_rows(products, back.reshape(experts.shape), weights, added, dtype)


def _pieces_sorted_by_expert(
    p: Matrices, tokens: jax.Array | Scaled, experts: jax.Array, weights: jax.Array, devices: int, dtype: Any
) -> jax.Array:
    """As `_sorted_by_expert` on a device that shares the experts with others: choices that are not its own are E.

    It makes room for somewhat more pairs than its even share, SPARE times as many, and where more are its own, it multiplies
    them in further pieces of the same size.
    """
    n, k = experts.shape
    order, back, sizes = ops.sort_by_group(experts.reshape(-1), p.gate_up.shape[0])
    room = room_for(n * k, devices)
    pieces = -(-n * k // room)
    order = jnp.pad(order, (0, pieces * room - n * k))
    ends = jnp.cumsum(sizes)
    total = ends[-1]

    def piece(first: jax.Array | int) -> jax.Array:
        """The part of the sum that the pairs first .. first + room - 1 make, [N, D]."""
        pairs = jax.lax.dynamic_slice(order, (first,), (room,))
        filled = jnp.clip(ends - first, 0, room)
        rows = ops.gather_rows(tokens, pairs // k)
        products = ops.grouped_mlp(rows, p.gate_up, p.down, jnp.diff(filled, prepend=0))
        row = back.reshape(n, k) - first
        here = (row >= 0) & (row < jnp.minimum(total - first, room))
        rows = jnp.where(here[..., None], products[jnp.clip(row, 0, room - 1)], 0).astype(jnp.float32)
        return jnp.sum(rows * weights[..., None], axis=1)

    def pieces_in_turn() -> jax.Array:
        # Recomputed in a backward pass: what it would keep would be kept room for, although it is hardly ever needed.
        def add(sums: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
            return sums + jax.checkpoint(piece)(first), None

        return jax.lax.scan(add, jnp.zeros(tokens.shape, jnp.float32), jnp.arange(pieces) * room)[0].astype(dtype)

    def single_piece() -> jax.Array:
        return piece(0).astype(dtype)

    return single_piece() if pieces == 1 else jax.lax.cond(total > room, pieces_in_turn, single_piece)


def room_for(pairs: int, devices: int) -> int:
    """How many of so many pairs of a token and an expert a device that shares the experts multiplies at a time."""
    return pairs if pairs <= SMALL_BUFFER else min(pairs, -(-int(SPARE * pairs) // devices // 128) * 128)
