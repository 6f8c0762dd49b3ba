"""--mesh: what it may say, what stands for it where it is not given, and the rules and the mesh that follow."""

import types

import jax
import pytest

from experiments.common import devices
from experiments.common.devices import Layout, parse, suited
from indexcache_jax import sharding
from indexcache_jax.sharding import AXES, SERVING, TRAINING

# ---- what --mesh says


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("context=4,data=2", Layout(data=2, context=4, expert=8)),
        ("data=8", Layout(data=8, expert=8)),
        ("tensor=2, context=2, data=2", Layout(data=2, context=2, tensor=2, expert=8)),
        ("data=8,expert=1", Layout(data=8, expert=1)),
        ("context=8,expert=8,cache=8", Layout(context=8, expert=8, cache=8)),
        ("context=4,data=2,cache=1", Layout(data=2, context=4, expert=8)),
    ],
)
def test_axes_that_are_not_named_are_1_experts_are_over_all_devices_and_the_cache_is_whole(text, layout):
    assert parse(text, 8) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=8", "'rows=8' is not one of data, context, tensor, expert, cache"),
        ("8", "'8' is not one of"),
        ("data=8,", "'' is not one of"),
        ("data", "data= is not a number of devices"),
        ("data=two", "data=two is not a number of devices"),
        ("data=0", "data=0 is not a number of devices"),
        ("data=-8", "data=-8 is not a number of devices"),
        ("data=2,data=4", "data is given twice"),
        ("data=2,context=2", "data x context x tensor = 2 x 2 x 1 is not the number of devices, 8"),
        ("expert=8", "data x context x tensor = 1 x 1 x 1 is not the number of devices, 8"),
        ("data=8,expert=4", "expert=4 is neither 1, experts whole, nor 8, all devices"),
        ("data=2,context=4,cache=2", "cache=2 is neither 1, cached tokens whole, nor 4, the size of context"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_shows_the_flag(text, message):
    with pytest.raises(ValueError) as error:
        parse(text, 8)
    assert str(error.value).startswith(f"--mesh={text}: ") and message in str(error.value)


# ---- what suits the work


@pytest.mark.parametrize(
    ("rows", "num_devices", "data", "context"),
    [(1, 8, 1, 8), (8, 8, 8, 1), (2, 8, 2, 4), (6, 8, 2, 4), (16, 8, 8, 1), (3, 8, 1, 8), (4, 6, 2, 3), (5, 1, 1, 1)],
)
def test_rows_are_split_as_far_as_devices_divide_them_and_queries_over_the_rest(rows, num_devices, data, context):
    assert suited(rows, num_devices) == Layout(data=data, context=context, expert=num_devices)


def test_the_flag_decides_where_it_is_given(monkeypatch):
    monkeypatch.setattr(devices.jax, "device_count", lambda: 8)
    for text, wanted in (("", suited(2, 8)), ("tensor=8,expert=1", Layout(tensor=8))):
        monkeypatch.setattr(devices.options, "MESH", types.SimpleNamespace(value=text))
        assert devices.layout(2) == wanted


# ---- what follows from it


def test_rules_hold_what_the_layout_says_of_experts_and_cached_tokens():
    assert Layout(data=2, context=4, expert=8).rules(SERVING) == SERVING
    assert Layout(data=8, expert=1).rules(TRAINING) == TRAINING.whole_experts()
    assert Layout(context=8, expert=8, cache=8).rules(SERVING) == SERVING.split_cache()


def test_the_mesh_has_the_layouts_sizes():
    layout = Layout(context=jax.device_count(), expert=jax.device_count())
    assert dict(layout.mesh().shape) == {"data": 1, "context": jax.device_count(), "tensor": 1}
    with pytest.raises(ValueError, match="data=99"):
        Layout(data=99).mesh()


def test_nothing_is_in_force_for_one_device():
    with devices.in_force(Layout(), TRAINING):
        assert jax.sharding.get_abstract_mesh().empty and sharding.current() == (None, SERVING)


def test_a_report_shows_sizes_experts_cache_and_devices(monkeypatch):
    monkeypatch.setattr(devices.jax, "devices", lambda: [types.SimpleNamespace(device_kind="NVIDIA H200")])
    assert Layout(data=2, context=4, expert=8).text == "context=4, data=2, experts over 8, of 8 NVIDIA H200"
    assert Layout(tensor=2).text == "tensor=2, experts whole, of 2 NVIDIA H200"
    assert Layout(context=2, expert=2, cache=2).text == "context=2, experts over 2, cached tokens over 2, of 2 NVIDIA H200"
    assert Layout().text == "1 NVIDIA H200"
    assert set(AXES) < set(vars(Layout()))
