"""What a model needs of every device's memory, from abstract trees alone, before anything is allocated.

Weights, caches and what training keeps for every weight are sums over the leaves of abstract trees: exact, as placed by a
mesh and rules. What a program holds beside them is an estimate, held against compiled programs in results/plan.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from indexcache_jax import distill, host_memory, moe, ops, params, serving, sharding, tensors, training
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving.cache import CacheFormat
from indexcache_jax.sharding import AXES, Axes, Rules

Devices = Mesh | AbstractMesh

# Of float32 index scores, which exist for a block of queries at a time: the most on GPUs, where it is the most.
SCORE_BYTES, SCORED_QUERIES = 2**30, 1024

LANES = 128  # numbers of a TPU's row in memory, or a multiple of it


def mesh_of(data: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of devices that need not be there, with the axes of `sharding.make_mesh`."""
    return AbstractMesh((data, context, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device, by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def tree_bytes(tree: Any, dtype: Any, mesh: Devices, rules: Rules) -> int:
    """Bytes of one device for an abstract tree of weights: the sum over its leaves of the size of a shard.

    dtype: of every tensor that has none of its own. ValueError where an axis cannot be divided evenly, as of
    `sharding.shardings`.
    """
    return sum(size for _, size in _leaf_bytes(tree, dtype, mesh, rules))


def layer_bytes(tree: params.Params, dtype: Any, mesh: Devices, rules: Rules) -> tuple[int, int]:
    """Bytes of one device for the largest layer of a model, and for what is no layer's: embedding, final norm and head.

    tree: of `params.abstract`; the other arguments as of `tree_bytes`.
    """
    ends, by_layer = 0, collections.Counter[int]()
    for tensor, size in _leaf_bytes(tree, dtype, mesh, rules):
        if tensor.layers is None:
            ends += size
        else:
            by_layer.update({layer: size // len(tensor.layers) for layer in tensor.layers})
    return max(by_layer.values()), ends


def _leaf_bytes(tree: Any, dtype: Any, mesh: Devices, rules: Rules) -> Iterator[tuple[tensors.Tensor, int]]:
    """Every leaf of an abstract tree with the bytes of one device for it."""
    placed = jax.tree.leaves(sharding.shardings(tree, mesh, rules))
    for (_, tensor), place in zip(tensors.leaves(tree), placed, strict=True):
        yield tensor, math.prod(place.shard_shape(tensor.shape)) * jnp.dtype(tensor.dtype or dtype).itemsize


def cache_bytes(
    config: Config, schedule: Schedule, rows: int, length: int, form: CacheFormat, mesh: Devices, rules: Rules
) -> int:
    """Bytes of one device for a cache of `rows` rows of `length` tokens; rows that cannot be divided are whole on each.

    A TPU keeps rows of whole lanes: a latent of 576 numbers takes the room of 640.

    ValueError for tokens that the devices which split them do not divide, as of `serving.init_cache`.
    """
    if length % (devices := _devices(("tokens",), (length,), rules, mesh, fitting=False)):
        raise ValueError(f"cache of {length} tokens: cannot be divided over the {devices} devices that split it")
    total = 0
    for _, tensor in tensors.leaves(serving.cache.abstract(config, schedule, rows, length, form)):
        share, (*others, width) = _devices(tensor.axes, tensor.shape, rules, mesh), tensor.shape
        if others and ops.platform() == "tpu":
            width = -(-width // LANES) * LANES
        total += math.prod(others) * width // share * jnp.dtype(tensor.dtype).itemsize
    return total


def _devices(axes: Axes, shape: tuple[int, ...], rules: Rules, mesh: Devices, fitting: bool = True) -> int:
    """Over how many devices an array with these logical axes is split; `fitting`: where they divide it."""
    entries = sharding.fitting_spec(shape, axes, rules, mesh) if fitting else sharding.spec(axes, rules, mesh)
    return math.prod(mesh.shape[name] for entry in entries for name in sharding.names_of(entry))


def prefill_temporaries(
    config: Config, schedule: Schedule, rows: int, chunk: int, length: int, dtype: Any, mesh: Devices, rules: Rules
) -> int:
    """An estimate of what a layer's program holds beside weights and cache, for a chunk of `chunk` tokens a row.

    With t the device's own tokens (rows and queries divided) and G' those of its rows, h its heads, T the cached tokens and s
    bytes a number, it is

        4 t D s + 4 t k'                              hidden states in and around the layer; k' selected indices a token
        + the largest of
          t (h (C + dr) + Hi Di) s + scores           absorbed and index queries; scores of 1024 queries, at most 1 GiB
            + G' (C + dr + Di) s                      and the chunk's latents and index keys, gathered
          t h (2 C + dr) s                            absorbed queries and what they attend to
          3 t F s                                     gate, up and product of a dense MLP
          p (2 D + I) s                               whole experts: rows and results of p = t k pairs of token and expert
          G D (s + 4) + p (D + I) s                   experts split over devices: the G tokens gathered and their float32
            + G k D (s + 4) but on GPUs               sums, p pairs at a time; what XLA does not fuse elsewhere

    where p is what `moe` makes room for: an even share of the G k pairs and a quarter more.
    """
    c, s = config, jnp.dtype(dtype).itemsize
    own = rows * chunk // _devices(("batch", "queries"), (rows, chunk), rules, mesh)
    of_rows = rows * chunk // _devices(("batch",), (rows,), rules, mesh)
    heads = c.num_heads // _devices(("heads",), (c.num_heads,), rules, mesh)
    select = own * (heads * c.latent_dim + c.index_n_heads * c.index_head_dim) * s
    select += min(SCORE_BYTES, 4 * length * min(own, SCORED_QUERIES)) + of_rows * (c.latent_dim + c.index_head_dim) * s
    phases = [select, own * heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) * s]
    if c.dense_layers:
        phases.append(3 * own * c.intermediate_size * s)
    if c.expert_layers:
        phases.append(_expert_temporaries(c, rows, chunk, own, s, mesh, rules))
    return 4 * own * c.hidden_size * s + 4 * own * min(c.index_topk, length) + max(phases)


def _expert_temporaries(c: Config, rows: int, chunk: int, own: int, s: int, mesh: Devices, rules: Rules) -> int:
    """The routed experts' part of `prefill_temporaries` for `own` tokens of a device."""
    split = tuple(name for name in sharding.names_of(rules.expert) if mesh.shape[name] > 1)
    if not split:
        return own * c.num_experts_per_tok * (2 * c.hidden_size + c.moe_intermediate_size) * s
    entries = sharding.fitting_spec((rows, chunk), ("batch", "queries"), rules, mesh)
    shared = math.prod(mesh.shape[name] for entry in entries for name in sharding.names_of(entry) if name in split)
    gathered, devices = own * shared, math.prod(mesh.shape[name] for name in split)
    pairs = gathered * c.num_experts_per_tok
    room = moe.room_for(pairs, devices)
    total = gathered * c.hidden_size * (s + 4) + room * (c.hidden_size + c.moe_intermediate_size) * s
    return total if ops.platform() == "gpu" else total + pairs * c.hidden_size * (s + 4)


def decoded_layer(config: Config, schedule: Schedule, dtype: Any) -> int:
    """Bytes of the matrices that the forward pass of params in 8 bits decodes for one layer, whole on each device."""
    tree = params.abstract(config, schedule, "fp8")
    mlps = [tree.dense, None if tree.moe is None else tree.moe.shared]

    def numbers(part: Any) -> int:
        return sum(math.prod(matrix.codes.layer_shape) for _, matrix in tensors.matrices(part))

    most = numbers(tree.attention) + numbers(tree.indexer) + max(map(numbers, mlps))
    return most * jnp.dtype(dtype).itemsize


def serving_need(
    config: Config,
    schedule: Schedule,
    *,
    rows: int,
    length: int,
    chunk: int,
    dtype: Any,
    form: CacheFormat,
    mesh: Devices,
    rules: Rules,
    weights: str | None = None,
) -> Need:
    """What inference needs of one device: weights in `dtype`, a cache of [rows, length] in `form`, a chunk's temporaries.

    weights: "fp8" for matrices in 8 bits.
    """
    return Need(
        {
            "weights": tree_bytes(serving.weights.abstract(config, schedule, weights), dtype, mesh, rules),
            "cache": cache_bytes(config, schedule, rows, length, form, mesh, rules),
            "temporaries": prefill_temporaries(config, schedule, rows, min(chunk, length), length, dtype, mesh, rules),
        }
    )


def training_need(
    config: Config, schedule: Schedule, kinds: list[str], mesh: Devices, rules: Rules, weights: str | None = None
) -> Need:
    """What training keeps on one device: float32 weights and, for what trains, gradients and Adam's two moments.

    kinds: of the stages; the one that trains most counts. weights: as of `params.abstract`. Activations come on top.
    """
    tree = params.abstract(config, schedule, weights)

    def trained(kind: str) -> int:
        leaves, _ = training.split(tree, distill.trainable(tree, kind))
        return tree_bytes(leaves, jnp.float32, mesh, rules)

    most = max(map(trained, kinds))
    return Need({"weights": tree_bytes(tree, jnp.float32, mesh, rules), "gradients": most, "moments": 2 * most})


ROW_TARGET_BYTES = 8 * 2**30  # of one sequence's float32 targets on the device; of longer ones only a block's are there


def streamed_indexers_need(
    config: Config,
    schedule: Schedule,
    *,
    group: int,
    rows: int,
    length: int,
    dtype: Any,
    keeps_targets: bool,
    weights: str | None = None,
    mesh: Devices | None = None,
    rules: Rules = sharding.SERVING,
) -> Need:
    """What `indexer_training` needs of one device for a model of `schedule` whose weights are read layer by layer.

    group: layers of the largest group. rows, length: a step's sequences, and their tokens, which run one after the other.
    keeps_targets: a step reads its targets. weights: as of `params.abstract`. mesh: of the axis data alone, whose devices take
    a sequence each through a layer; by default there is one device.

    Weights are exact: two layers, of which one is read while the other runs; the attention weights of the group; its indexer,
    in float32 with gradient and moments. Temporaries are an estimate: the largest of what a layer's program holds, what a
    sequence's target takes, and what a step does.
    """
    c, s = config, jnp.dtype(dtype).itemsize
    tree = params.abstract(config, schedule, weights)

    def size(part: Any, layer: int) -> int:
        in_it = [tensor for _, tensor in tensors.leaves(part) if layer in (tensor.layers or ())]
        return sum(math.prod(tensor.layer_shape) * jnp.dtype(tensor.dtype or dtype).itemsize for tensor in in_it)

    every = range(c.num_layers)
    indexer = sum(math.prod(tensor.layer_shape) for _, tensor in tensors.leaves(tree.indexer))
    attention = max(size((tree.attention, tree.input_norm), layer) for layer in every)
    mesh = mesh or mesh_of()
    layer = prefill_temporaries(config, schedule, mesh.size, length, length, dtype, mesh, rules)
    if jax.process_count() > 1:  # all devices' sequences are gathered on each, on their way to all processes
        layer += mesh.size * length * c.hidden_size * s
    heads = length * c.num_heads * (2 * c.qk_head_dim + c.v_head_dim) * s
    if weights is not None:
        layer += decoded_layer(config, schedule, dtype)
        heads += decoded_layer(config, schedule, dtype)
    scores = min(distill.SCORE_BYTES, 4 * length**2 * max(c.num_heads, c.index_n_heads + 1))
    target = (8 * length**2 if keeps_targets else 0) + heads + scores
    factors = length * c.index_n_heads * c.index_head_dim * (s + 4)
    if keeps_targets:
        step = rows * length * (length + c.hidden_size) * s + factors + 2 * scores
    else:
        step = group * rows * length * (c.hidden_size * s + 4 * c.num_heads) + heads + factors + 2 * scores
        step += 10 * length**2 if 4 * length**2 <= ROW_TARGET_BYTES else 0
    return Need(
        {
            "layers": 2 * layer_bytes(tree, dtype, mesh, rules)[0],
            "group": group * attention + 16 * indexer,
            "temporaries": max(layer, target, step),
        }
    )


def longest(fits: Callable[[int], bool], multiple: int, most: int) -> int:
    """The largest multiple of `multiple` up to `most` that fits, where whatever is smaller fits too; 0 where none does."""
    low, high = 0, most // multiple
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * multiple) else (low, middle - 1)
    return low * multiple


def available() -> int:
    """Bytes that each of this process's devices may hold.

    Of CPUs, which share the host's memory, an even share of what is left of it.
    """
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if devices[0].platform != "cpu" and None not in limits:
        return min(limit for limit in limits if limit is not None)
    return host_memory.available() // len(devices)
