"""sparse_mla's attention kernels by themselves, in launches small enough for compute-sanitizer's racecheck, on a Hopper GPU.

Inputs are made and results compared on the host, so that next to the kernel the GPU runs copies only.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper import columns
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.sparse_mla import mosaic_gpu_attention as attention
from pallas_kernels.sparse_mla import mosaic_gpu_scaled as scaled
from pallas_kernels.sparse_mla import mosaic_gpu_scaled_tasks as scaled_tasks
from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import OWNER_SHIFT, PAIR, Tasks
from tests.support.attention_cases import numpy_attention, relative_error

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

SCALE, KEYS, SELECTED = 0.04, 1024, 512
BF16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Queries [b, s, heads, 576]; `packed` of them a tile, lists divided among the `splits` blocks of a cluster."""

    b: int
    s: int
    heads: int
    splits: int
    packed: int = 1


LAUNCHES = [
    Launch(2, 1, 64, 4),
    Launch(2, 1, 20, 4),
    Launch(1, 1, 128, 2),  # two pairs of key blocks a block of the cluster: slots are used again
    Launch(1, 5, 64, 1),  # persistent blocks: so are query tiles
    Launch(1, 5, 20, 1),
    Launch(1, 7, 20, 1, packed=3),
]


def united(lists: np.ndarray, pairs: int) -> tuple[np.ndarray, int]:
    """Keys [queries, k] -> entries key | owners << 24 [pairs * 128], zeros after the last, and how many pairs hold some."""
    keys, places = np.unique(lists, return_inverse=True)
    owners = np.zeros(len(keys), np.int64)
    np.bitwise_or.at(owners, places.reshape(lists.shape), 1 << np.arange(len(lists))[:, None])
    entries = np.zeros(pairs * PAIR, np.int32)
    entries[: len(keys)] = keys | owners << OWNER_SHIFT
    return entries, -(-len(keys) // PAIR)


def lists_of(indices: np.ndarray, tasks: Tasks) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices [b, s, k] as the kernel takes them: its lists, and how many pairs of key blocks each packed one has."""
    if tasks.packed == 1:
        return indices.reshape(-1, SELECTED), None
    tiles = [row[first : first + tasks.packed] for row in indices for first in range(0, tasks.queries, tasks.packed)]
    entries, counts = zip(*(united(tile, tasks.pairs) for tile in tiles), strict=True)
    return np.stack(entries), np.array(counts, np.int32)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_equals_numpy_and_repeats_itself(launch):
    rng, (b, s, heads) = np.random.default_rng(0), (launch.b, launch.s, launch.heads)
    queries = rng.normal(size=(b, s, heads, WIDTH)).astype(BF16)
    latents = rng.normal(size=(b, KEYS, WIDTH)).astype(BF16)
    indices = np.sort(rng.permuted(np.tile(np.arange(KEYS), (b, s, 1)), axis=-1)[..., :SELECTED]).astype(np.int32)
    if launch.packed == 1:  # lists of every length: the kernel visits no more than they have
        indices = np.where(np.arange(SELECTED) < np.resize([SELECTED, 300, 1, 0, 129], (b, s, 1)), indices, -1)
    pairs = launch.packed * SELECTED // PAIR
    tasks = Tasks(b, s, heads, KEYS, pairs=pairs, packed=launch.packed, splits=launch.splits)
    flat = queries.reshape(-1, WIDTH), latents.reshape(-1, WIDTH)
    given = jax.device_put((*flat, *lists_of(indices, tasks)))

    run = jax.jit(lambda *given: attention.attend(*given, tasks, scale=SCALE))
    with mock.patch.object(hopper, "NUM_SMS", 2):  # several tasks for each persistent block
        out, again = np.asarray(run(*given)), np.asarray(run(*given))
    expected = numpy_attention(queries, latents, indices, SCALE, VALUE_DIM)
    np.testing.assert_array_equal(out, again)
    assert relative_error(out.reshape(expected.shape), expected) < 1e-2


@pytest.mark.parametrize(
    "b, s, heads, splits", [(2, 1, 64, 4), (2, 1, 64, 3), (2, 1, 20, 4), (1, 5, 64, 1), (1, 5, 20, 1), (1, 2, 100, 1)]
)
def test_latents_in_8_bits(b, s, heads, splits):
    """Several tasks for each persistent block, more key blocks than slots, lists of every length."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(b, s, heads, WIDTH)).astype(BF16)
    codes = rng.normal(size=(b, KEYS, VALUE_DIM)).astype(jnp.float8_e4m3fn)
    rotary = rng.normal(size=(b, KEYS, ROTARY)).astype(BF16)
    scales = rng.uniform(0.5, 2, (b, KEYS)).astype(np.float32)
    exact = np.concatenate([codes.astype(np.float32), rotary.astype(np.float32)], -1) * scales[..., None]
    indices = np.sort(rng.permuted(np.tile(np.arange(KEYS), (b, s, 1)), axis=-1)[..., :SELECTED]).astype(np.int32)
    indices = np.where(np.arange(SELECTED) < np.resize([SELECTED, 300, 1, 0, 129], (b, s, 1)), indices, -1)
    lists = indices.reshape(b * s, SELECTED)
    counts = np.maximum(-(-(lists >= 0).sum(-1) // columns.KEYS), 1).astype(np.int32) if splits == 1 else None
    tasks = scaled_tasks.Tasks(b, s, heads, KEYS, SELECTED // columns.KEYS, splits)
    flat = [x.reshape(b * KEYS, *x.shape[2:]) for x in (codes, rotary, scales)]
    given = jax.device_put((queries.reshape(-1, WIDTH), *flat, lists, counts))

    run = jax.jit(lambda *given: scaled.attend(*given, tasks, scale=SCALE))
    with mock.patch.object(hopper, "NUM_SMS", 2):
        out, again = np.asarray(run(*given)), np.asarray(run(*given))
    expected = numpy_attention(queries, exact, indices, SCALE, VALUE_DIM)
    np.testing.assert_array_equal(out, again)
    assert relative_error(out.reshape(expected.shape), expected) < 1e-2
