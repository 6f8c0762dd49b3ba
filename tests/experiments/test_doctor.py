"""The doctor: what it says of a machine, of kernels and of a model is what the functions say that experiments ask."""

import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags

import indexcache_jax
from experiments import doctor, run  # noqa: F401  `run` defines flags of every verb
from experiments.common import fit, implementations, topologies
from experiments.common.devices import Layout
from indexcache_jax import memory
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.serving.layer import layer
from indexcache_jax.serving.model import prefill_chunk, step
from indexcache_jax.sharding import SERVING
from pallas_kernels import device, dispatch
from tests.support.tiny_models import CASES


@pytest.fixture
def asked():
    """Parses the flags of a command; they are as they were afterwards."""

    def parse(*arguments):
        flags.FLAGS(["doctor", *arguments])

    yield parse
    for name in flags.FLAGS.get_key_flags_for_module(doctor):
        name.unparse()
    flags.FLAGS["output_dir"].unparse()


def gb(text):
    return [None if cell == "-" else float(cell) for cell in text.split()]


def rows_of(text):
    """The numbers of the table of needs by what they are for: weights, cache, temporaries, in all, there is."""
    line = re.compile(r"^(\S.*? tokens) +((?:[\d.]+|-)(?: +(?:[\d.]+|-)){4}) +(yes|no) +(.+)$", re.MULTILINE)
    return {m[1]: (gb(m[2]), m[3], m[4]) for m in line.finditer(text)}


@pytest.mark.parametrize("weights", [None, "fp8"])
def test_a_models_numbers_are_those_that_experiments_check(asked, weights):
    asked(
        *("--preset=glm-5.2", "--topology=h200:8", "--tokens=65536", "--context=8192", "--batch_size=2"),
        *([f"--weights={weights}"] if weights else []),
    )
    topology = topologies.topology("h200:8", compiling=False)
    with device.target(topology):
        question = doctor.read_question(topology)
        rows = rows_of(doctor.about_model(question))
        config, schedule = Config.from_hf(preset("glm-5.2")), Schedule.from_hf(preset("glm-5.2"))
        layout = Layout(data=2, context=4, expert=8)
        mesh, rules = memory.mesh_of(2, 4), layout.rules(SERVING)
        served = memory.serving_need(
            config,
            schedule,
            rows=2,
            length=65536,
            chunk=4 * 4096,
            dtype="bfloat16",
            form=CacheFormat(),
            mesh=mesh,
            rules=rules,
            weights=weights,
        )
        searched, streamed = (
            fit.search_need(config, schedule, rows=2, dtype="bfloat16", weights=weights, stream=stream)(8192, mesh, rules)
            for stream in (False, True)
        )
        fewest = fit.smallest(question.inference, 65536, 2, SERVING, topology.memory)
    there = topology.memory
    needs = {"inference, 65,536": served, "search, 8,192": searched, "search --stream, 8,192": streamed}
    assert rows.keys() == {f"{what} tokens" for what in needs}
    for what, need in needs.items():
        numbers, fits, _ = rows[f"{what} tokens"]
        stored = sum(size for name, size in need.parts.items() if name not in ("cache", "temporaries"))
        sizes = [stored, need.parts.get("cache"), need.parts["temporaries"], need.total, there]
        assert numbers == [None if size is None else round(size / 1e9, 2) for size in sizes]
        assert fits == ("yes" if need.total <= there else "no")
    assert rows["inference, 65,536 tokens"][2] == f"{fewest.num_devices}: --mesh={fit.mesh_flag(fewest)}"
    assert fewest.num_devices == (8 if weights else 16)


def test_a_streamed_layer_takes_what_it_has():
    """Of GLM-5 a layer with experts, twice: 256 experts of 3 x 6144 x 2048 are most of it."""
    config = Config.from_hf(preset("glm-5"))
    need = fit.search_need(config, Schedule.all_full(78), rows=1, dtype=jnp.bfloat16, weights=None, stream=True)
    experts, matrices = 2 * 256 * 3 * 6144 * 2048, 2 * 2 * 154880 * 6144
    parts = need(4096, memory.mesh_of(), SERVING).parts
    assert 2 * experts < parts["two layers"] < 2.1 * experts
    assert parts["embedding and head"] == matrices + 2 * 6144  # the final norm is there too


def test_what_a_device_at_hand_has_and_whether_a_checkpoint_fits_it(asked, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 12_345_000_000)
    asked("--checkpoint=experiments/assets/demo", "--tokens=1024")
    doctor.run("", 0)
    out = capsys.readouterr().out
    assert "12.35 GB for each" in out and jax.__version__ in out and indexcache_jax.__version__ in out
    (weights, cache, _, _, there), fits, fewest = rows_of(out)["inference, 1,024 tokens"]
    assert weights == 0.03 and fits == "yes" and fewest == "1" and there == 12.35
    assert "experiments/assets/demo: 12 layers, 7.5 million weights in float32, 12 indexers" in out
    assert "xla; mosaic_tpu: it needs a TPU; mosaic_gpu: it needs a Hopper GPU" in " ".join(out.split())


def test_without_a_model_it_says_how_to_name_one(asked, capsys):
    asked()
    doctor.run("", 0)
    out = capsys.readouterr().out
    assert "kernels for 30b" in out and "--preset=NAME or --checkpoint=DIR says" in out and "fewest such devices" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=demo", "--checkpoint=experiments/assets/demo"], "--preset=demo: counts for nothing beside --checkpoint="),
        (["--preset=demo", "--tokens=5000"], "--tokens=5000: demo has 4096 positions"),
        (["--preset=demo", "--mesh=data=3"], "--mesh=data=3: "),
        (["--preset=demo", "--topology=h100:8"], "--topology=h100:8: "),
        (["--checkpoint=/nowhere"], "/nowhere"),
        (["--output_dir=x"], "--output_dir=x: nothing is written"),
    ],
)
def test_what_cannot_be_is_named(asked, arguments, message):
    asked(*arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        doctor.run("", 0)


def test_a_context_that_selects_everything_is_no_search(asked):
    asked("--preset=demo", "--context=128")
    text = doctor.about_model(doctor.read_question(topologies.topology("local")))
    assert "no search: --context=128 is not above index_topk = 128" in text and "search --stream" not in text


def test_optional_packages_that_are_missing_are_said_with_how_to_install_them(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "nothing: pip install it", "numpy": "all"})
    text = doctor.about_installation()
    assert re.search(r"no-such-package +not installed +nothing: pip install it", text)
    assert re.search(r"numpy +\d+\.", text) and "torch and transformers are not needed" in text


def test_a_gpu_that_jax_does_not_use_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    assert "warning" not in doctor.about_devices()
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    local = topologies.topology("local")
    monkeypatch.setattr(topologies, "topology", lambda name: local)
    expected = local.platform != "gpu"
    assert ("warning: there is an NVIDIA GPU here that JAX does not use" in doctor.about_devices()) is expected


def test_where_programs_are_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        (tmp_path / "one").write_bytes(bytes(1_200_000))
        assert doctor.kept_programs() == f"compiled programs are kept in {tmp_path} (1 file(s), 1.2 MB)"
        jax.config.update("jax_compilation_cache_dir", None)
        assert "are not kept" in doctor.kept_programs()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ---- which implementation runs


@pytest.mark.parametrize("weights", [None, "fp8"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_choices_are_those_of_the_whole_model(platform, weights):
    """Of what prefill and a decode step ask `dispatch` for, all layers and the head included."""
    case = CASES["glm-mixed"]
    config, schedule = Config.from_hf(case.fields), case.schedule
    given = implementations.shapes(
        config, schedule, rows=2, length=48, dtype="float32", form=CacheFormat("float32", "float32"), weights=weights
    )
    struct = jax.ShapeDtypeStruct
    with (
        device.target(topologies.topology("v5p:2x2x1", compiling=False))
        if platform == "tpu"
        else device.target(jax.devices()[0])
    ):
        with dispatch.recorded() as prefill:
            jax.eval_shape(
                lambda w, t, n, c: prefill_chunk(w, t, n, c, config, layer=layer),
                *(given.weights, struct((2, 16), jnp.int32), struct((2,), jnp.int32), given.cache),
            )
        with dispatch.recorded() as decode:
            jax.eval_shape(lambda w, t, c: step(w, t, c, config), given.weights, struct((2,), jnp.int32), given.cache)
        found = implementations.of_model(given, 16)
    assert found["prefill"] == prefill and prefill
    assert {name: choice for name, choice in found["decode"].items() if name != "decode_layer"} == decode
    assert found["decode"]["decode_layer"].name == "xla"
    assert found["training"].keys() == {"selected_attention", "index_divergence"}


def test_a_line_says_what_runs_and_why_nothing_better():
    choice = dispatch.Choice("xla", {"mosaic_gpu": f"it needs a GPU, the device compiled for is a {device.platform()!r}"})
    other = dispatch.Choice("per_row", {})
    lines = implementations.sentences({"prefill": {"a": choice, "b": choice}, "decode": {"a": choice, "b": other}})
    assert lines == [
        "a, prefill and decode: xla; mosaic_gpu: it needs a GPU",
        "b, prefill: xla; mosaic_gpu: it needs a GPU",
        "b, decode: per_row",
    ]
