"""Every TPU kernel through the real compiler, for chips that are not at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.benchmarks.compile import TOPOLOGIES, kernels_of, topology_device
from experiments.common import topologies
from pallas_kernels import grouped_matmul, grouped_mlp, indexer_topk, quant, scaled_matmul, sparse_mla, tpu
from pallas_kernels.device import target
from pallas_kernels.indexer_topk import mosaic_tpu as indexer_kernel

pytestmark = pytest.mark.skipif(
    topologies.why_not(TOPOLOGIES[0]) is not None,
    reason=f"pip install 'indexcache-jax[tpu-aot]': {topologies.why_not(TOPOLOGIES[0])}",
)


@pytest.fixture(autouse=True)
def products_as_users_have_them():
    """The tests' own setting asks more of bfloat16 than JAX's grouped product takes."""
    with jax.default_matmul_precision("default"):
        yield


BF16, F32 = jnp.bfloat16, jnp.float32


def compiled_kernels(topology, operation, *arrays, **named):
    """Calls and VMEM of the kernels of `operation` on arrays given as (shape, dtype), compiled for a chip of `topology`."""
    device = topology_device(topology)

    def struct(array):
        return jax.ShapeDtypeStruct(*array, sharding=SingleDeviceSharding(device))

    with target(device):
        lowered = jax.jit(operation).lower(*map(struct, arrays), **{name: struct(array) for name, array in named.items()})
        found = kernels_of(lowered.compile().as_text())
    chip = tpu.CHIPS[device.device_kind]
    assert all(0 < kernel["vmem"] < chip.vmem for kernel in found.values())
    return found


def compile_indexer(topology, b, s, heads, t, k, kind):
    arrays = [((b, s, heads, 128), kind), ((b, t, 128), kind), ((b, s, heads), F32)]
    named = {"q_positions": ((b, s), jnp.int32), "kv_lengths": ((b,), jnp.int32)}
    if kind == jnp.int8:
        named["key_scales"] = ((b, t), F32)
    return compiled_kernels(topology, functools.partial(indexer_topk, k_select=k), *arrays, **named)


def compile_attention(topology, b, s, heads, t, k, kind=BF16, in_8_bits=False):
    run = functools.partial(sparse_mla, scale=0.1, value_dim=512)
    queries, indices = ((b, s, heads, 576), kind), ((b, s, k), jnp.int32)
    if not in_8_bits:
        return compiled_kernels(topology, run, queries, ((b, t, 576), kind), indices)
    parts = ((b, t, 512), jnp.float8_e4m3fn), ((b, t, 64), BF16), ((b, t), F32)
    return compiled_kernels(topology, lambda q, i, *parts: run(q, quant.Latents(*parts), i), queries, indices, *parts)


def test_small_kernels_compile():
    assert set(compile_indexer("v5e:2x2", 1, 70, 5, 3000, 100, BF16)) == {"indexer_topk"}
    assert set(compile_attention("v5e:2x2", 2, 1, 20, 3001, 300)) == {"sparse_mla_rows"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "b, s, heads, t, kind",
    [
        (1, 4096, 32, 131_072, BF16),
        (1, 1024, 32, 131_072, F32),
        (1, 1024, 32, 131_072, jnp.int8),
        (1, 1024, 64, 204_800, BF16),
        (8, 1, 32, 131_072, BF16),
    ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_indexer_topk(topology, b, s, heads, t, kind):
    found = compile_indexer(topology, b, s, heads, t, 2048, kind)
    assert found["indexer_topk"]["calls"] == 1
    chip = tpu.CHIPS[topology_device(topology).device_kind]
    rows = indexer_kernel.rows_for(s, heads, t, 2048, chip.vmem)
    assert found["indexer_topk"]["vmem"] <= 1.1 * indexer_kernel.vmem_bytes(rows, heads, t, 2048)


@pytest.mark.slow
@pytest.mark.parametrize(
    "b, s, heads, t, kernels",
    [
        (1, 2048, 20, 131_072, {"sparse_mla_unite", "sparse_mla_pages"}),
        (1, 512, 64, 204_800, {"sparse_mla_unite", "sparse_mla_pages"}),
        (1, 512, 128, 8192, {"sparse_mla_unite", "sparse_mla_pages"}),
        (8, 1, 20, 131_072, {"sparse_mla_rows"}),
        (1, 1, 64, 204_801, {"sparse_mla_rows"}),
    ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sparse_mla(topology, b, s, heads, t, kernels):
    assert set(compile_attention(topology, b, s, heads, t, 2048)) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("s", [1, 256])
def test_sparse_mla_in_other_formats(s):
    compile_attention("v5e:2x2", 1, s, 20, 65_536, 2048, F32)
    compile_attention("v5e:2x2", 1, s, 20, 65_536, 2048, in_8_bits=True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8192])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_grouped_matmul(topology, rows):
    arrays = ((rows, 2048), BF16), ((64, 2048, 3072), BF16), ((64,), jnp.int32)
    assert set(compiled_kernels(topology, grouped_matmul, *arrays)) == {"gmm"}


def compile_products_of_codes(topology, experts, width, hidden, rows):
    """grouped_mlp and scaled_matmul of a layer whose matrices are in 8 bits, [hidden, width] each."""

    def mlp(rows, gate_up, gate_up_scales, down, down_scales, sizes):
        return grouped_mlp(rows, quant.Scaled(gate_up, gate_up_scales), quant.Scaled(down, down_scales), sizes)

    def product(rows, codes, scales):
        return scaled_matmul(rows, quant.Scaled(codes, scales))

    def in_codes(*shape):
        *stacked, n, k = shape
        return (shape, jnp.float8_e4m3fn), ((*stacked, -(-n // 128), -(-k // 128)), F32)

    matrices = *in_codes(experts, 2, width, hidden), *in_codes(experts, hidden, width)
    grouped = compiled_kernels(topology, mlp, ((rows, hidden), BF16), *matrices, ((experts,), jnp.int32))
    return grouped, compiled_kernels(topology, product, ((rows, hidden), BF16), *in_codes(width + 576, hidden))


def test_matrices_in_8_bits_are_decoded_inside_the_kernels():
    grouped, product = compile_products_of_codes("v5e:2x2", 8, 128, 256, 16)
    assert grouped["codes_matmul"]["calls"] == 2 and set(grouped) == {"codes_matmul"} == set(product)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 8192])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_matrices_in_8_bits_of_large_models(topology, rows):
    """The experts of GLM-5 on a device of sixteen."""
    grouped, product = compile_products_of_codes(topology, 16, 2048, 6144, rows)
    assert set(grouped) == {"codes_matmul"} == set(product)


@pytest.mark.slow
def test_kernels_compile_inside_shard_map():
    """Queries of one prompt over four chips, which all see the keys."""
    device = topology_device("v5e:2x2")
    mesh = Mesh(np.array(device.client.devices()), ("x",))
    over_queries, everywhere = PartitionSpec(None, "x"), PartitionSpec()

    def layer(queries, keys, weights, positions, lengths, absorbed, latents):
        chosen = indexer_topk(queries, keys, weights, k_select=256, q_positions=positions, kv_lengths=lengths)
        return sparse_mla(absorbed, latents, chosen, scale=0.1, value_dim=512)

    shapes = {
        "queries": ((1, 256, 8, 128), BF16, over_queries),
        "keys": ((1, 8192, 128), BF16, everywhere),
        "weights": ((1, 256, 8), F32, over_queries),
        "positions": ((1, 256), jnp.int32, over_queries),
        "lengths": ((1,), jnp.int32, everywhere),
        "absorbed": ((1, 256, 20, 576), BF16, over_queries),
        "latents": ((1, 8192, 576), BF16, everywhere),
    }
    specs = tuple(spec for _, _, spec in shapes.values())
    arrays = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in shapes.values()]
    with target(device):
        run = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=over_queries, check_vma=False))
        found = kernels_of(run.lower(*arrays).compile().as_text())
    assert set(found) == {"indexer_topk", "sparse_mla_unite", "sparse_mla_pages"}
