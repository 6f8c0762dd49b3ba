"""What is asked for is held against the memory of the devices before anything is allocated."""

import importlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
from experiments.common import fit, options, runs
from experiments.common.devices import Layout, parse
from indexcache_jax import host_memory, memory, serving
from indexcache_jax.config import Config
from indexcache_jax.indexer_training import Run
from indexcache_jax.memory import Need
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.sharding import SERVING
from indexcache_jax.training import Stage
from pallas_kernels import device

CONFIG, SCHEDULE = Config.from_hf(preset("glm-5.2")), Schedule.from_hf(preset("glm-5.2"))
H200 = 143_000_000_000
ASKED = {"chunk": 8192, "dtype": jnp.bfloat16, "form": CacheFormat(), "flag": "prompts"}


@pytest.fixture
def there(monkeypatch):
    """Sets how many bytes every device, a GPU, has."""
    with device.target(types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")):
        yield lambda size: monkeypatch.setattr(memory, "available", lambda: size)


def test_one_line_says_what_is_needed_and_what_there_is(there, capsys):
    there(2_000 * 10**9)
    fit.serving(CONFIG, SCHEDULE, rows=1, length=131_072, **ASKED)
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"memory of each device: [\d.]+ GB \(weights [\d.]+, cache [\d.]+, temporaries [\d.]+\), of 2000.00 GB\n", line
    )
    fit.serving(CONFIG, SCHEDULE, rows=1, length=131_072, document=1000, **ASKED)
    assert "document 0.10" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_told_the_smallest_mesh_that_does(there):
    there(H200)
    with pytest.raises(ValueError) as error:
        fit.serving(CONFIG, SCHEDULE, rows=1, length=131_072, **ASKED)
    assert re.fullmatch(
        r"--prompts: 1 x 131,072 tokens: needs [\d,.]+ GB \(.*\) of each device, there are 143.00 GB; "
        r"the smallest mesh that fits it has 16 such devices: --mesh=context=16",
        str(error.value),
    )
    layout = Layout(context=16, expert=16)
    arguments = {name: ASKED[name] for name in ("chunk", "dtype", "form")}
    need = memory.serving_need(
        CONFIG, SCHEDULE, rows=1, length=131_072, mesh=memory.mesh_of(context=16), rules=layout.rules(SERVING), **arguments
    )
    assert need.total <= H200


def test_a_cache_that_does_not_fit_is_told_the_longest_that_does(there):
    config = Config.from_hf(preset("30b"))
    schedule = Schedule.uniform(config.num_layers, 12)
    there(80_000_000_000)
    with pytest.raises(
        ValueError, match="the longest that fits is [0-9,]+ tokens, the smallest mesh .* --mesh=data=2$"
    ) as error:
        fit.serving(config, schedule, rows=2, length=200_000, **ASKED)
    longest = int(re.search(r"fits is ([\d,]+) tokens", str(error.value))[1].replace(",", ""))
    fit.serving(config, schedule, rows=2, length=longest, **ASKED)
    with pytest.raises(ValueError, match="the longest that fits"):
        fit.serving(config, schedule, rows=2, length=longest + 64, **ASKED)


def test_a_search_is_told_that_weights_can_be_streamed(there):
    there(H200)
    fit.search(Config.from_hf(preset("30b")), Schedule.all_full(47), rows=1, context=4096, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="--context=4096: needs .*; --stream reads the weights layer by layer"):
        fit.search(CONFIG, SCHEDULE, rows=1, context=4096, dtype=jnp.bfloat16)


def test_indexers_of_streamed_layers_are_told_the_longest_context(there, capsys):
    layers = types.SimpleNamespace(config=CONFIG, schedule=SCHEDULE, weights=None)
    stage = Stage("indexers", "warmup", 1, 1, 65536, 0.0, 1e-3)
    run = Run(layers, SCHEDULE, np.zeros((1, 65536), np.int32), stage, keeps_targets=False)
    there(H200)
    fit.indexers(run)
    assert re.search(r"GB \(layers [\d.]+, group [\d.]+, temporaries [\d.]+\)", capsys.readouterr().out)
    there(50 * 10**9)
    with pytest.raises(ValueError, match=r"--context=65536: needs .*; the longest that fits is [\d,]+ tokens"):
        fit.indexers(run)


def test_training_is_told_the_smallest_mesh(there, capsys):
    there(H200)
    config = Config.from_hf(preset("30b"))
    schedule = Schedule.uniform(config.num_layers, 12)
    warmup, sparse = (Stage(kind, kind, 1, 8, 4096, 1e-4, 1e-4) for kind in ("warmup", "sparse"))
    with pytest.raises(ValueError, match="training, without activations: needs .* --mesh=data=4"):
        fit.training(config, schedule, [warmup, sparse])
    fit.training(config, schedule, [warmup])  # the indexers alone
    assert "gradients" in capsys.readouterr().out
    with pytest.raises(ValueError, match="checkpoint"):  # whose copy is one too many
        fit.training(config, schedule, [warmup], checkpoint=schedule)


def test_what_no_mesh_holds_is_said(there):
    there(10**9)
    with pytest.raises(ValueError, match=f"no mesh of up to {fit.MOST_DEVICES} such devices fits it"):
        fit.serving(CONFIG, SCHEDULE, rows=1, length=1024, **ASKED)


def test_the_fewest_devices_split_the_cache_where_that_is_needed():
    def need(length, mesh, rules):
        return Need({"cache": length // (mesh.shape["context"] if rules.tokens else 1)})

    assert fit.smallest(need, 1000, 1, SERVING, 1000) == Layout(expert=1)
    found = fit.smallest(need, 1000, 1, SERVING, 300)
    assert found == Layout(context=4, expert=4, cache=4) and fit.mesh_flag(found) == "context=4,cache=4"


@pytest.mark.parametrize(
    ("layout", "flag"),
    [
        (Layout(), "data=1"),
        (Layout(data=2, context=4, expert=8), "data=2,context=4"),
        (Layout(context=4, expert=1, cache=4), "context=4,cache=4,expert=1"),
    ],
)
def test_a_layout_as_the_flag_says_it(layout, flag):
    assert fit.mesh_flag(layout) == flag
    assert parse(flag, layout.num_devices) == layout


def test_a_streamed_model_takes_two_layers_and_what_the_host_keeps(there, monkeypatch, capsys):
    asked = {"rows": 1, "context": 4096, "dtype": "bfloat16", "smaller": "a smaller --context"}
    there(100_000_000_000)
    monkeypatch.setattr(host_memory, "available", lambda: 5 * 10**9)
    fit.streamed(CONFIG, SCHEDULE, host={"hidden states": 4 * 10**9}, **asked)
    assert re.match(r"memory of each device: 4\d.\d\d GB \(two layers 3\d", capsys.readouterr().out)
    message = (
        r"--context=4096: needs 6.00 GB \(hidden states 6.00\) of the host's memory, 5.00 GB are left; a smaller --context"
    )
    with pytest.raises(ValueError, match=message):
        fit.streamed(CONFIG, SCHEDULE, host={"hidden states": 6 * 10**9}, **asked)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Sets how many bytes are left of the host's memory, which is its devices' too."""

    def set_to(size):
        monkeypatch.setattr(host_memory, "available", lambda: size)
        monkeypatch.setattr(memory, "available", lambda: size)

    return set_to


def test_on_a_cpu_the_hosts_memory_is_the_devices_and_flags_are_named_instead_of_meshes(on_a_cpu):
    asked = {"rows": 1, "context": 4096, "dtype": "bfloat16", "smaller": "a smaller --context"}
    on_a_cpu(45 * 10**9)
    fit.streamed(CONFIG, SCHEDULE, host={"hidden states": 10**8}, **asked)
    with pytest.raises(
        ValueError, match=r"hidden states 6.00\) of each device, there are 45.00 GB.*; a smaller --context makes it"
    ):
        fit.streamed(CONFIG, SCHEDULE, host={"hidden states": 6 * 10**9}, **asked)
    with pytest.raises(ValueError) as error:
        fit.serving(CONFIG, SCHEDULE, rows=1, length=131_072, **ASKED, smaller="--num_layers")
    assert "--mesh" not in str(error.value) and str(error.value).endswith("; --num_layers makes it smaller")


def test_a_program_is_held_against_the_host_before_it_runs(on_a_cpu):
    compiled = jax.jit(lambda x: jnp.sort(x @ x.T, axis=1) @ x).lower(jax.ShapeDtypeStruct((256, 8), jnp.float32)).compile()
    on_a_cpu(10**6)
    fit.program(compiled, "--train_context=256: a step", "--num_layers")
    on_a_cpu(10**5)
    with pytest.raises(ValueError, match="--train_context=256: a step: needs .* GB beside .* 0.00 GB; --num_layers makes it"):
        fit.program(compiled, "--train_context=256: a step", "--num_layers")
    with device.target(types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")):
        fit.program(compiled, "", "")


def test_benchmarks_refuse_before_they_allocate(on_a_cpu, monkeypatch, tmp_path):
    on_a_cpu(10**6)
    modules = {name: importlib.import_module(module) for name, module in options.EXPERIMENTS.items()}
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    for module, name in ((serving, "random_weights"), (runs, "random_params"), (checkpoints_convert, "load")):
        monkeypatch.setattr(module, name, None)
    settings = {
        "speed": (
            {"preset": "30b", "lengths": ["20480"], "weights": None},
            "--lengths: .*; a smaller --num_layers or --lengths",
        ),
        "train_speed": ({}, "training, without activations: needs .*; a smaller --num_layers makes it smaller"),
        "indexer_speed": (
            {"preset": "30b"},
            "needs .*two layers.*targets.*; a smaller --context, --sequences or --stream_memory",
        ),
        "precision": (
            {"checkpoint": "", "context": 1536},
            "--context=1536: needs .*weights in 8 bits.*; a smaller one or --dtype",
        ),
    }
    for name, (flags_, message) in settings.items():
        with flagsaver.flagsaver(**flags_), pytest.raises(ValueError, match=message):
            modules[name].run(str(tmp_path / name), 0)
