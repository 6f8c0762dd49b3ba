"""What inference runs, compiled for TPUs that are not at hand, and the command that does it for the 30B shape."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run  # noqa: F401  results record the flags that `run` defines
from experiments.benchmarks import compile
from experiments.common import topologies
from indexcache_jax import moe, serving
from indexcache_jax.params import at_layer
from indexcache_jax.serving import cache
from pallas_kernels import device, tpu
from tests.support.tiny_models import CASES

needs_libtpu = pytest.mark.skipif(
    topologies.why_not(compile.TOPOLOGIES[0]) is not None,
    reason=f"pip install 'indexcache-jax[tpu-aot]': {topologies.why_not(compile.TOPOLOGIES[0])}",
)


@pytest.fixture(autouse=True)
def products_as_users_have_them():
    with jax.default_matmul_precision("default"):
        yield


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", compile.TOPOLOGIES)
def test_both_programs_compile_and_fit(topology):
    device = compile.topology_device(topology)
    model = compile.Model(*compile.shape(2), device, 131_072)
    step = compile.compiled("decode", model.decode)
    assert step.refused is None
    assert set(step.kernels) == {"indexer_topk", "sparse_mla_rows"}
    assert step.kernels["indexer_topk"]["calls"] == 2
    # Nothing the size of a cache or of a layer's experts is copied.
    assert step.temporaries < 2**25
    for layer, kernels in ((0, set()), (1, {"gmm"})):
        chunk = compile.compiled("prefill", lambda layer=layer: model.prefill(layer, 2048))
        assert chunk.refused is None
        assert set(chunk.kernels) == {"indexer_topk", "sparse_mla_unite", "sparse_mla_pages"} | kernels
        assert step.arguments + chunk.temporaries < tpu.CHIPS[device.device_kind].hbm


@needs_libtpu
@pytest.mark.slow
def test_the_experiment(tmp_path, monkeypatch):
    from absl import flags

    flags.FLAGS(["test", "--topology=v5e:2x2", "--num_layers=1", "--tokens=8192", "--chunk=512"])
    compile.run(str(tmp_path), 0)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["layers"] == 1 and metrics["chip"]["name"] == "v5e"
    assert [p["refused"] for p in metrics["programs"]] == [None, None]
    assert all(p["fits"] for p in metrics["programs"])
    assert "v5e" in (tmp_path / "report.md").read_text()


@needs_libtpu
def test_a_program_that_does_not_fit_is_refused_with_the_reason():
    device = compile.topology_device("v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((20 * 2**30,), jnp.bfloat16, sharding=sharding)
    program = compile.compiled("huge", lambda: jax.jit(lambda x: x + 1).lower(huge))
    assert program.refused is not None and "memory" in program.refused


def test_how_many_layers_fit():
    assert compile.layers_that_fit(47, 95 * 2**30) == 47
    assert 1 <= compile.layers_that_fit(47, 16 * 2**30) < compile.layers_that_fit(47, 32 * 2**30) < 47


def test_kernels_are_read_from_a_programs_text():
    used = '{"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}'
    call = f'= f32[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={used}'
    text = "\n".join(
        ["HloModule x", f"  %gmm {call}", f"  ROOT %gmm.3 {call}", f"  %indexer_topk.12 {call}", "  %y = f32[8] add"]
    )
    assert compile.kernels_of(text) == {"gmm": {"calls": 2, "vmem": 4096}, "indexer_topk": {"calls": 1, "vmem": 4096}}


def test_a_few_rows_read_the_experts_one_by_one():
    case = CASES["deepseek-all-full"]
    layer = at_layer(case.params.moe, 0)
    tokens = jnp.asarray(np.random.RandomState(0).standard_normal((3, 64)), jnp.float32)
    routing = moe.route(layer, tokens, case.config)
    with jax.default_matmul_precision("highest"):
        one, other = moe._matrix_by_matrix(layer, tokens, *routing), moe._sorted_by_expert(layer, tokens, *routing)
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
def test_a_cache_is_row_major_before_and_after_every_program(topology):
    """By itself: the formats are the library's. Without them the compiler would turn latents of 576, and copy them."""
    device = compile.topology_device(topology)
    model = compile.Model(*compile.shape(2), device, 8192)
    for executable in (model.decode().compile(), model.prefill(0, 512).compile()):
        into = [f for f in jax.tree.leaves(executable.input_formats) if len(f.layout.major_to_minor) == 3]
        *_, outputs = executable.output_formats
        layouts = [f.layout.major_to_minor for f in jax.tree.leaves(outputs)]
        assert {layout for layout in layouts if len(layout) == 3} == {(0, 1, 2)}
        assert len(into) >= len([layout for layout in layouts if len(layout) == 3])
    left_alone = jax.jit(lambda x: x.at[0, 0].set(1), donate_argnums=0)
    latents = model.on_device(jax.ShapeDtypeStruct((1, 8192, 576), jnp.bfloat16))
    turned = left_alone.lower(latents).compile().output_formats
    assert turned.layout.major_to_minor != (0, 1, 2), "the compiler keeps it row-major by itself: formats are not needed"


def test_a_cache_made_for_a_tpu_says_that_it_is_row_major():
    class V5E:
        platform, device_kind = "tpu", "TPU v5 lite"

    case = CASES["glm-mixed"]
    assert cache.formats(serving.init_cache(case.config, case.schedule, 1, 64)) is None  # elsewhere nothing has to be said
    with device.target(V5E):
        formats = cache.formats(serving.init_cache(case.config, case.schedule, 1, 64, jnp.float8_e4m3fn))
    assert all(f.layout.major_to_minor == tuple(range(len(f.layout.major_to_minor))) for f in jax.tree.leaves(formats.layers))
