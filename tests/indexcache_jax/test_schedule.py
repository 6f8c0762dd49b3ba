"""Schedule: the freq rule, the precedence of a config's fields, what is refused, and what engines are told."""

import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import ENGINES, Schedule


def fields(num_layers, **schedule_fields):
    return {"num_hidden_layers": num_layers} | schedule_fields


# The released rule.


@pytest.mark.parametrize(
    ("layers", "freq", "offset", "full"),
    [(78, 4, 2, 21), (78, 4, 3, 21), (78, 2, 2, 40), (61, 4, 2, 16), (47, 4, 2, 13), (47, 4, 1, 12), (5, 1, 2, 5)],
)
def test_freq_counts(layers, freq, offset, full):
    schedule = Schedule.from_freq(layers, freq, offset)
    assert (schedule.num_layers, schedule.num_full) == (layers, full)


def test_the_first_layers_up_to_the_offset_are_full():
    assert Schedule.from_freq(10, 4).pattern == "FFSSSFSSSF"
    assert Schedule.from_freq(11, 4, 3).pattern == "FFFSSSFSSSF"
    assert Schedule.from_freq(9, 4, 1).pattern == "FSSSFSSSF"


def test_glm_5_2_ships_with_21_full_layers():
    assert Schedule.from_hf(preset("glm-5.2")).full_layers == (0, 1, *range(2, 75, 4))


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5", "30b"])
def test_a_model_that_says_nothing_runs_every_indexer(name):
    layers = Config.from_hf(preset(name)).num_layers
    assert Schedule.from_hf(preset(name)) == Schedule.all_full(layers) == Schedule("F" * layers)


@pytest.mark.parametrize(("layers", "full"), [(12, 6), (12, 3), (12, 5), (47, 12), (3, 3), (3, 1)])
def test_uniform_spreads_any_number_of_full_layers(layers, full):
    schedule = Schedule.uniform(layers, full)
    assert (schedule.num_layers, schedule.num_full) == (layers, full)
    gaps = [b - a for a, b in zip(schedule.full_layers, (*schedule.full_layers[1:], layers), strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_of_gaps_that_differ_the_shorter_come_first():
    assert Schedule.uniform(5, 3).pattern == "FFSFS"


# Who reads whose indices.


def test_sources_and_served_layers():
    schedule = Schedule("FSSFFS")
    assert schedule.is_full == (True, False, False, True, True, False)
    assert schedule.full_layers == (0, 3, 4)
    assert schedule.num_full == 3
    assert schedule.source == (0, 0, 0, 3, 4, 4)
    assert [schedule.serves(layer) for layer in schedule.full_layers] == [(0, 1, 2), (3,), (4, 5)]
    assert str(schedule) == "FSSFFS"


@pytest.mark.parametrize("layer", [1, -1, 6])
def test_only_full_layers_serve(layer):
    with pytest.raises(ValueError, match=f"layer {layer} of FSSFSF is not an F layer"):
        Schedule("FSSFSF").serves(layer)


def test_a_flip_shares_one_more_layer_but_never_the_first():
    assert Schedule("FFFF").with_shared(2) == Schedule("FFSF")
    with pytest.raises(ValueError, match="starts with S"):
        Schedule("FFFF").with_shared(0)


# Reading a pattern.


@pytest.mark.parametrize(
    "text", ["FSSF", "fssf", ["full", "shared", "shared", "full"], ("F", "S", "S", "F"), ["Full", "s", "S", "f"]]
)
def test_patterns_are_strings_or_lists(text):
    assert Schedule.parse(text) == Schedule("FSSF")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SFFF", r"index_topk_pattern: 'SFFF' starts with a shared layer"),
        (["shared", "full", "full", "full"], r"index_topk_pattern: \['shared'.*starts with a shared layer"),
        ("FSF", r"index_topk_pattern: 'FSF' has 3 entries for 4 layers"),
        ("FSFSF", r"index_topk_pattern: 'FSFSF' has 5 entries for 4 layers"),
        ("FSXF", r"index_topk_pattern: 'FSXF' holds 'X'"),
        ("FS F", r"index_topk_pattern: 'FS F' holds ' '"),
        (["full", "half", "full", "full"], r"index_topk_pattern: .* holds 'half'"),
        (["full", None, "full", "full"], r"index_topk_pattern: .* holds None"),
        ("", r"index_topk_pattern: '' is neither"),
        ([], r"index_topk_pattern: \[\] is neither"),
        (4, r"index_topk_pattern: 4 is neither"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_field_and_value(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text, 4, "index_topk_pattern")
    with pytest.raises(ValueError, match=message):
        Schedule.from_hf(fields(4, index_topk_pattern=text))


def test_a_long_value_is_cut_but_says_how_long_it_is():
    with pytest.raises(ValueError, match=r"\.\.\. \(1000 entries\) has 1000 entries for 4 layers") as error:
        Schedule.parse("F" * 1000, 4)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"index_topk_freq": 0}, r"index_topk_freq: 0 is not an integer of at least 1"),
        ({"index_topk_freq": -4}, r"index_topk_freq: -4"),
        ({"index_topk_freq": "4"}, r"index_topk_freq: '4'"),
        ({"index_topk_freq": 4.0}, r"index_topk_freq: 4.0"),
        ({"index_topk_freq": True}, r"index_topk_freq: True"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 0}, r"index_skip_topk_offset: 0 is not an integer of at least 1"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": -1}, r"index_skip_topk_offset: -1"),
        ({"indexer_types": "FSSF"[::-1] + "F"}, r"indexer_types: 'FSSFF' has 5 entries for 4 layers"),
        ({"num_hidden_layers": None}, r"num_hidden_layers: None"),
        ({"num_hidden_layers": "4"}, r"num_hidden_layers: '4'"),
    ],
)
def test_a_config_that_makes_no_schedule_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_hf(fields(4) | given)


@pytest.mark.parametrize("pattern", ["", "S", "SF", "FX", "fs", 3])
def test_no_schedule_is_ever_built_from_a_bad_pattern(pattern):
    with pytest.raises(ValueError, match="schedule pattern: "):
        Schedule(pattern)


@pytest.mark.parametrize("num_full", [0, 5])
def test_uniform_needs_between_one_and_all_layers(num_full):
    with pytest.raises(ValueError, match=f"num_full: {num_full} is not between 1 and 4"):
        Schedule.uniform(4, num_full)


# Precedence: indexer_types, then the pattern, then freq and offset, then all full.


def test_indexer_types_win_with_a_warning():
    given = fields(4, indexer_types=["full", "shared", "full", "full"], index_topk_pattern="FSSS", index_topk_freq=2)
    with pytest.warns(UserWarning) as caught:
        assert Schedule.from_hf(given) == Schedule("FSFF")
    assert [str(warning.message) for warning in caught] == [
        "index_topk_pattern gives FSSS, but indexer_types gives FSFF and wins",
        "index_topk_freq gives FFSF, but indexer_types gives FSFF and wins",
    ]


def test_the_pattern_wins_over_freq_with_a_warning():
    with pytest.warns(UserWarning, match="index_topk_freq gives FFSF, but index_topk_pattern gives FSSS and wins"):
        assert Schedule.from_hf(fields(4, index_topk_pattern="FSSS", index_topk_freq=2)) == Schedule("FSSS")


@pytest.mark.parametrize(
    "given",
    [
        {"indexer_types": ["full", "shared"] * 2, "index_topk_pattern": "FSFS"},
        {"index_topk_pattern": "FSFS", "index_topk_freq": 2, "index_skip_topk_offset": 1},
        {"index_topk_pattern": "FSFS", "index_topk_freq": 1},  # 1 is the config class's default, not a statement
        {"index_topk_freq": 2, "index_skip_topk_offset": 1, "index_topk_pattern": None, "indexer_types": None},
    ],
)
def test_fields_that_agree_do_not_warn(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Schedule.from_hf(fields(4) | given) == Schedule("FSFS")


def test_null_means_absent():
    nulls = dict.fromkeys(["indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"])
    assert Schedule.from_hf(fields(4) | nulls) == Schedule("FFFF")
    assert Schedule.from_hf(fields(4) | nulls | {"index_topk_freq": 2}) == Schedule("FFSF")  # offset 2
    assert Schedule.from_hf(fields(4) | nulls | {"index_skip_topk_offset": 1}) == Schedule("FFFF")  # no freq, no rule


# What other programs are told.


def test_to_hf_round_trips():
    schedule = Schedule("FSSFFS")
    assert Schedule.from_hf(json.loads(json.dumps(fields(6) | schedule.to_hf()))) == schedule


def test_to_hf_overrides_a_freq_that_the_config_already_has():
    """Engines prefer the list or the pattern to the rule, so a pasted setting holds on a checkpoint with a rule."""
    with pytest.warns(UserWarning, match="wins"):
        assert Schedule.from_hf(fields(6, index_topk_freq=4) | Schedule("FSSFFS").to_hf()) == Schedule("FSSFFS")


def test_each_engine_gets_the_fields_it_reads():
    schedule = Schedule("FSF")
    types = ["full", "shared", "full"]
    assert schedule.to_engine("transformers") == {"indexer_types": types}
    assert schedule.to_engine("sglang") == {"indexer_types": types, "index_topk_pattern": "FSF"}
    assert schedule.to_engine("vllm") == {"use_index_cache": True, "index_topk_pattern": "FSF"}
    assert schedule.to_engine("tensorrt-llm") == {"index_topk_pattern": "FSF"}
    for engine in ENGINES:
        assert Schedule.from_hf(fields(3) | json.loads(json.dumps(schedule.to_engine(engine)))) == schedule


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"engine: 'llama\.cpp' is not one of"):
        Schedule("F").to_engine("llama.cpp")


# What jit sees.


def test_a_schedule_is_static_and_compiles_once_each():
    traced = []

    @jax.jit
    def count_full(x, schedule):
        traced.append(schedule.pattern)
        return x + schedule.num_full

    assert jax.tree.leaves(Schedule("FSF")) == []
    assert len({Schedule("FSF"), Schedule.parse("fsf"), Schedule.from_hf(fields(3, index_topk_pattern="FSF"))}) == 1
    results = [int(count_full(jnp.int32(0), Schedule(pattern))) for pattern in ("FSF", "FFF", "FSF", "FFF")]
    assert results == [2, 3, 2, 3]
    assert traced == ["FSF", "FFF"]
