"""The cache of one batch: latents of every layer, index keys of F layers alone (docs/model.md, Cache)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from indexcache_jax import arguments, ops, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.params import check_model
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor
from pallas_kernels import quant

FP8 = jnp.dtype(jnp.float8_e4m3fn)
DTYPES = ("bfloat16", "float32", "float16", FP8.name)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """The dtypes that a cache keeps its two parts in.

    float8_e4m3fn has a float32 scale a token and layer beside it, and a latent's rotary numbers are bfloat16 then. At
    C + dr = 576 and Di = 128 a token's latent takes 1152 bytes in bfloat16 and 644 in 8 bits, its index key 256 and 132.

    Raises ValueError, naming the field, for other dtypes than these, float32 and float16.
    """

    latent_dtype: Any = jnp.bfloat16
    index_dtype: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        for field in ("latent_dtype", "index_dtype"):
            object.__setattr__(self, field, arguments.dtype(field, getattr(self, field), DTYPES))

    @classmethod
    def of(cls, dtype: Any) -> CacheFormat:
        """A format as it is, or the format that keeps both parts in one dtype."""
        return dtype if isinstance(dtype, CacheFormat) else cls(dtype, dtype)


@flax.struct.dataclass
class LayerCache:
    """One layer's tokens, [B, T, ...]."""

    latents: Any  # [B, T, C + dr]; in 8 bits `quant.Latents`
    index_keys: Any  # [B, T, Di]; None on S layers
    index_scales: Any  # [B, T] float32, of index keys in float8_e4m3fn


@flax.struct.dataclass
class Cache:
    """A row's position t holds token t of that row; only the first lengths[b] positions count."""

    layers: tuple[LayerCache, ...]
    lengths: Any  # [B] int32

    @property
    def max_len(self) -> int:
        """T, the tokens that a row has room for."""
        return self.layers[0].latents.shape[1]

    @property
    def format(self) -> CacheFormat:
        """The dtypes that it is kept in."""
        return CacheFormat(self.layers[0].latents.dtype, self.layers[0].index_keys.dtype)  # layer 0 is F


def abstract(config: Config, schedule: Schedule, batch: int, max_len: int, dtype: Any | CacheFormat = jnp.bfloat16) -> Cache:
    """The tree of `Tensor`s of a cache, with axes "batch", "tokens", "latent" and "index"; arguments as of `init_cache`."""
    check_model(config, schedule)
    arguments.integer("batch", batch, 1)
    arguments.integer("max_len", max_len, 1)
    form = CacheFormat.of(dtype)
    if form.index_dtype == FP8 and config.index_head_dim > quant.INDEX_GROUP:
        most = f"at most {quant.INDEX_GROUP} numbers share a scale, config.index_head_dim is {config.index_head_dim}"
        raise ValueError(f"index_dtype: index keys in {jnp.dtype(FP8).name} need a scale each, but {most}")

    def zeros(kind: Any, *width: tuple[int, str]) -> Tensor:
        sizes, names = zip((batch, "batch"), (max_len, "tokens"), *width, strict=True)
        return Tensor(sizes, names, "zeros", 0.0, (), dtype=jnp.dtype(kind).name)

    def latents() -> Any:
        if form.latent_dtype != FP8:
            return zeros(form.latent_dtype, (config.latent_dim, "latent"))
        codes, rotary = zeros(FP8, (config.kv_lora_rank, "latent")), zeros(jnp.bfloat16, (config.qk_rope_head_dim, "latent"))
        return quant.Latents(codes, rotary, zeros(jnp.float32))

    def layer(full: bool) -> LayerCache:
        return LayerCache(
            latents=latents(),
            index_keys=zeros(form.index_dtype, (config.index_head_dim, "index")) if full else None,
            index_scales=zeros(jnp.float32) if full and form.index_dtype == FP8 else None,
        )

    lengths = Tensor((batch,), ("batch",), "zeros", 0.0, (), dtype="int32")
    return Cache(tuple(layer(full) for full in schedule.is_full), lengths)


def init_cache(config: Config, schedule: Schedule, batch: int, max_len: int, dtype: Any | CacheFormat = jnp.bfloat16) -> Cache:
    """An empty cache for `batch` rows of at most `max_len` tokens, row-major on every device.

    `dtype` is that of the whole cache, or a `CacheFormat`. Under a mesh, rows that its devices do not divide are whole on
    each of them. Raises ValueError for sizes below 1, a dtype that no cache has or the model's index keys cannot have, a config
    and a schedule that do not fit, and for tokens that the devices which split them do not divide.
    """
    tree = abstract(config, schedule, batch, max_len, dtype)
    _check_divided("init_cache", max_len)
    return jax.tree.map(lambda t: row_major(jnp.zeros(t.shape, t.dtype, device=sharding.fitting(t.shape, t.axes))), tree)


def _check_is_cache(value: Any) -> None:
    if not isinstance(value, Cache):
        raise ValueError(f"cache: {arguments.described(value)} is not a Cache; init_cache makes one")


def check_cache(cache: Cache, rows: int, config: Config, schedule: Schedule) -> None:
    """ValueError unless a cache is one of so many rows of this model under this schedule."""
    _check_is_cache(cache)
    if cache.lengths.shape != (rows,):
        raise ValueError(f"cache: has {cache.lengths.shape[0]} rows for {rows} rows of tokens")
    pattern = "".join("S" if layer.index_keys is None else "F" for layer in cache.layers)
    if pattern != schedule.pattern:
        raise ValueError(f"cache: holds the index keys of schedule {pattern}, not of {schedule.pattern}")
    if (width := cache.layers[0].latents.shape[-1]) != config.latent_dim:
        raise ValueError(f"cache: its latents have {width} numbers, but config makes them {config.latent_dim}")


def _check_divided(name: str, max_len: int) -> None:
    if max_len % (devices := sharding.devices_along("tokens")):
        raise ValueError(f"{name}: max_len {max_len} cannot be divided over the {devices} devices that split the cache")


def shape_structs(cache: Cache, device: jax.sharding.Sharding | None = None) -> Cache:
    """An abstract cache as ShapeDtypeStructs: to compile a program without one.

    device: for a device that is not at hand, on which it is row-major; else it is as `init_cache` makes it.
    """

    def struct(t: Tensor) -> jax.ShapeDtypeStruct:
        where = sharding.fitting(t.shape, t.axes) if device is None else Format(_row_major(len(t.shape)), device)
        return jax.ShapeDtypeStruct(t.shape, jnp.dtype(t.dtype), sharding=where)

    return jax.tree.map(struct, cache)


def _row_major(axes: int) -> Layout:
    return Layout(tuple(range(axes)))


def row_major(x: jax.Array) -> jax.Array:
    """`x` with its last axis minor in memory.

    Only a TPU does it otherwise: it lays [..., T, 576] out with T minor, as 576 is no multiple of 128, and would turn the
    buffer for every kernel. While a program is traced, layouts are the compiler's business.
    """
    if ops.platform() != "tpu" or isinstance(x, jax.core.Tracer):
        return x
    return jax.device_put(x, Format(_row_major(x.ndim), x.sharding))


def formats(cache: Any) -> Any:
    """The layouts of a cache's buffers for `out_shardings`, so that a program gives back a row-major cache.

    None where a program keeps them by itself, which is everywhere but on TPUs.
    """
    if ops.platform() != "tpu" or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(cache)):
        return None
    return jax.tree.map(lambda x: x.format, cache)


def bytes_per_token(config: Config, schedule: Schedule, dtype: Any | CacheFormat) -> int:
    """Bytes that one token takes in the cache, all layers together."""
    cache = abstract(config, schedule, 1, 1, dtype)
    return sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for _, t in tensors.leaves(cache.layers))


def fork(cache: Cache, copies: int, max_len: int | None = None) -> Cache:
    """Every row `copies` times, next to each other: one prefilled document, many questions. `cache` stays as it is.

    `max_len`: tokens that a row has room for, at least those it holds; default as in `cache`. Raises ValueError for
    fewer than one copy, for less room than a row needs, and for tokens that the devices which split them do not divide.
    """
    _check_is_cache(cache)
    arguments.integer("copies", copies, 1)
    max_len = cache.max_len if max_len is None else arguments.integer("max_len", max_len, 1)
    if max_len < cache.max_len and (lengths := arguments.numbers_of(cache.lengths)) is not None and lengths.max() > max_len:
        raise ValueError(f"max_len: {max_len} is below the {lengths.max()} tokens of row {lengths.argmax()}")
    _check_divided("fork", max_len)
    layers = jax.tree.map(lambda x: row_major(_repeat(x, copies, max_len)), cache.layers)
    return Cache(layers, jnp.repeat(cache.lengths, copies))


@functools.partial(jax.jit, static_argnames=("copies", "max_len"))
def _repeat(x: jax.Array, copies: int, max_len: int) -> jax.Array:
    x = jnp.repeat(x[:, :max_len], copies, axis=0)
    x = jnp.pad(x, [(0, 0), (0, max_len - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return sharding.constrain(x, "batch", "tokens", *(None,) * (x.ndim - 2))


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts new [B, S, ...] at positions [B, S] of buffer [B, T, ...]; those outside 0 .. T-1 are dropped.

    A negative position marks padding, so what stands there never reaches the cache. A device's single token is never dropped,
    which would need another kernel: it takes the last position if it has one past the end, and may not be padding. Every
    device that holds a row is given all of the row's new tokens, and keeps those of its part of the T positions.
    """
    part = sharding.exchange(buffer.shape, ("batch",), "tokens", buffer.shape[1])
    inputs = ("batch", "tokens"), ("batch",), ("batch",)
    return sharding.on_each_device(functools.partial(_write, part=part), inputs, ("batch", "tokens"))(buffer, new, positions)


def _write(buffer: jax.Array, new: jax.Array, positions: jax.Array, part: sharding.Exchange | None) -> jax.Array:
    """`write` into all positions of a row, or into the part of them that this device holds."""
    if part is not None:
        positions = jnp.where(positions < 0, positions, positions - part.index() * buffer.shape[1])
    elif positions.shape == (1, 1):
        start = (0, positions[0, 0]) + (0,) * (buffer.ndim - 2)
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), start)
    rows = jnp.arange(new.shape[0])[:, None]
    columns = jnp.where(positions < 0, buffer.shape[1], positions)
    return buffer.at[rows, columns].set(new.astype(buffer.dtype), mode="drop")


def append(cache: LayerCache, latents: jax.Array | None, keys: jax.Array | None, positions: jax.Array) -> LayerCache:
    """The cache with new latents [B, S, C + dr] and index keys [B, S, Di] at positions [B, S]; None for what is not written."""
    kept, index_keys, index_scales = cache.latents, cache.index_keys, cache.index_scales
    if latents is not None:
        new: jax.Array | quant.Latents = latents
        if isinstance(kept, quant.Latents):
            new = ops.quantise_latents(latents, kept.codes.shape[-1])
        kept = jax.tree.map(lambda buffer, x: write(buffer, x, positions), kept, new)
    if keys is not None and index_keys is not None:
        if index_scales is not None:
            keys, scales = ops.quantise_index(keys)
            index_scales = write(index_scales, scales, positions)
        index_keys = write(index_keys, keys, positions)
    return LayerCache(kept, index_keys, index_scales)
