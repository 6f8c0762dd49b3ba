"""Rotary frequencies and layouts."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.rope import cos_sin, frequencies, rotate
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS


def test_plain_frequencies_fall_geometrically():
    f = frequencies(Config.from_hf(preset("glm-5")))
    assert f.shape == (32,)
    assert f[0] == 1.0
    np.testing.assert_allclose(f[1:] / f[:-1], 1e6 ** (-2 / 64))


def test_deepseeks_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """With its 4096 positions and theta 10000 the blend runs from pair 10 to pair 23."""
    f = frequencies(Config.from_hf(preset("deepseek-v3.2")))
    plain = 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(f[:11], plain[:11])
    np.testing.assert_allclose(f[23:], plain[23:] / 40)
    np.testing.assert_allclose(f[11:23], plain[11:23] * (1 - np.arange(1, 13) / 13 * (1 - 1 / 40)))


@pytest.mark.parametrize("interleaved", [True, False])
def test_dot_products_depend_on_the_distance_only(interleaved):
    config = Config.from_hf(preset("deepseek-v3.2"))
    q, k = np.random.RandomState(0).standard_normal((2, 64)).astype(np.float32)

    def product(position, other):
        cos, sin = cos_sin(jnp.array([[position, other]]), config)
        turned = rotate(jnp.array([[q, k]]), cos, sin, interleaved=interleaved)[0]
        return float(turned[0] @ turned[1])

    assert product(700, 100) == pytest.approx(product(600, 0), abs=1e-3)
    assert abs(product(700, 100) - product(700, 699)) > 0.1


def test_layouts_pair_neighbours_or_halves():
    quarter = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)))  # cos, sin of a right angle: (a, b) becomes (-b, a)
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    assert rotate(x, *quarter, interleaved=True)[0, 0].tolist() == [-2.0, 1.0, -4.0, 3.0]
    assert rotate(x, *quarter, interleaved=False)[0, 0].tolist() == [-3.0, -4.0, 1.0, 2.0]


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": YARN, "original_max_position_embeddings": 32},
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": None},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": {}, "rope_parameters": YARN},
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"rope_scaling": YARN | {"rope_theta": 500.0}, "rope_theta": 7.0},
        {"rope_parameters": YARN, "rope_theta": 77.0},
        {"rope_parameters": {"rope_type": "yarn", "type": "default", "factor": 4}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2}},
        {"rope_scaling": YARN | {"partial_rotary_factor": 1.0, "truncate": True}},
        {"rope_parameters": {"rope_type": "default"}, "original_max_position_embeddings": 32},
        {"rope_theta": 9.0},
        {},
    ],
)
@pytest.mark.parametrize("of", [GLM_FIELDS, DEEPSEEK_FIELDS], ids=["glm", "deepseek"])
def test_rotary_fields_mean_what_transformers_makes_of_them(fields, of):
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    fields = {k: v for k, v in ({k: v for k, v in of.items() if k not in rotary} | fields).items() if v is not None}
    config = Config.from_hf(copy.deepcopy(fields))
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(fields))
    settings = theirs.rope_parameters
    if settings["rope_type"] == "default":
        expected, factor = settings["rope_theta"] ** (-np.arange(0, 16, 2) / 16), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](theirs)
    np.testing.assert_allclose(frequencies(config), np.asarray(expected), rtol=1e-6)
    assert config.rope.attention_factor == pytest.approx(factor)
    assert Config.from_hf(config.to_hf()).rope == config.rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"indexed_attention": YARN}}, r"rope_parameters\.indexed_attention: .* is an object in"),
        ({"rope_scaling": {"rope_parameters": YARN}}, r"rope_scaling\.rope_parameters: .* is an object in rope_scaling"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, r"rope_scaling\.long_factor: \[1\.0\] is not understood"),
        ({"rope_scaling": YARN | {"\x1b[31m": 1}}, r"rope_scaling\.\\x1b\[31m: 1 is not understood"),
        ({"rope_parameters": {"factor": 4.0}}, r"rope_parameters\.factor: 4\.0 has no meaning for rope_type 'default'"),
        ({"rope_scaling": {"type": "deepseek_yarn", "factor": 4}}, r"rope_type: 'deepseek_yarn' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type: \['yarn'\] is not supported"),
        ({"partial_rotary_factor": 0.5}, r"^partial_rotary_factor: 0\.5 is not supported"),
        ({"rope_interleave": False}, r"rope_interleave: False is not supported"),
        ({"rope_scaling": YARN | {"truncate": None}}, r"rope_scaling\.truncate: None is not supported, only true"),
        ({"rope_ratio": 16}, r"rope_ratio: 16 is a rotary setting that is not understood"),
        ({"rotary_emb_base": 16}, r"rotary_emb_base: 16 is a rotary setting"),
        ({"original_max_position_embeddings": "x", "rope_scaling": YARN}, r"^original_max_position_embeddings: 'x' is not"),
    ],
)
def test_rotary_fields_that_would_count_for_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(GLM_FIELDS | fields)


def test_rotary_settings_that_change_nothing_are_read():
    fields = GLM_FIELDS | {"rope_interleave": True, "rope_parameters": {"rope_theta": 5.0, "factor": 1.0, "mscale": None}}
    assert Config.from_hf(fields).rope.theta == 5.0
