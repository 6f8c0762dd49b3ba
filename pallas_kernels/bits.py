"""A selection as bits: an int32 word holds 32 neighbouring keys of one query, [B, ceil(T / 32), S], queries innermost.

One bit a pair, S T / 8 bytes: less than the k int32 indices of every query as long as T < 32 k. Queries lie innermost
because a kernel's tile loads the words of many queries at once and shifts them by the key's position in the word.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

WORD_BITS = 32  # keys of a word
MAX_WORDS = 2**31 - 1  # that `pack` finds by one int32 index, which also stands for none


def num_words(keys: int) -> int:
    """How many words the bits of so many keys take."""
    return -(-keys // WORD_BITS)


DERIVED_SIZES = {"ceil(T / 32)": lambda sizes: num_words(sizes["T"])}  # for check_shapes


def check_dtype(operation: str, selection_bits: jax.Array) -> None:
    """Raises ValueError unless selection_bits, of any shape, are the int32 words that this module makes."""
    if selection_bits.dtype != jnp.int32:
        raise ValueError(f"{operation}: selection_bits must be int32, got {selection_bits.dtype}")


def pack(indices: jax.Array, keys: int) -> jax.Array:
    """Distinct selected positions [B, S, k] among `keys` keys, -1 where empty -> [B, ceil(keys / 32), S] int32.

    Raises ValueError where these are more words than 32 bits count.
    """
    b, s, _ = indices.shape
    count = num_words(keys)
    if b * count * s > MAX_WORDS:
        sizes = f"{b} x ceil({keys} / {WORD_BITS}) x {s} are {b * count * s}"
        raise ValueError(f"pack: a selection has at most {MAX_WORDS} words, {sizes}: give it fewer rows or queries at once")
    row_of_batch, row = (jax.lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1))
    word = (row_of_batch * count + indices // WORD_BITS) * s + row
    bit = jax.lax.shift_left(jnp.uint32(1), (indices % WORD_BITS).astype(jnp.uint32))
    nowhere = b * count * s
    words = jnp.zeros(nowhere, jnp.uint32).at[jnp.where(indices < 0, nowhere, word)].add(bit, mode="drop")
    words = words.reshape(b, count, s)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def causal(batch: int, queries: int, keys: int) -> jax.Array:
    """The bits [B, ceil(keys / 32), S] of queries at positions 0 .. S-1 that see all keys up to themselves."""
    return visible(jax.lax.broadcasted_iota(jnp.int32, (batch, queries), 1), keys)


def visible(positions: jax.Array, keys: int) -> jax.Array:
    """The bits [B, ceil(keys / 32), S] of queries at positions [B, S] that see all keys up to themselves; -1 sees none."""
    shape = (positions.shape[0], num_words(keys), positions.shape[1])
    word = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = jnp.clip(positions[:, None] + 1 - WORD_BITS * word, 0, WORD_BITS).astype(jnp.uint32)
    words = jnp.where(seen == WORD_BITS, jnp.uint32(0xFFFFFFFF), jax.lax.shift_left(jnp.uint32(1), seen % WORD_BITS) - 1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: jax.Array, keys: int) -> jax.Array:
    """Bits [B, ceil(keys / 32), S] -> the mask [B, S, keys] bool."""
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).swapaxes(1, 2)
    bits = (words[..., None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:2], -1)[..., :keys] != 0
