"""Checkpoints with faults made on purpose: each loads, or is refused in one printable sentence, soon and in little memory."""

import copy
import json
import os
import random
import shutil
import time
import warnings

import numpy as np
import pytest

from checkpoints_convert import load
from checkpoints_convert.tokenizer_files import read_tokenizer
from tests.checkpoints_convert import files
from tests.checkpoints_convert.test_tokenizer_files import begin, save_tokenizer, token
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]
CASES_IN_ALL, CASES_AT_ONCE = 500, 50
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.0, 0.5, -1.5, 1e308, float("nan"), float("inf")),
    *("", "F", "yarn", "float32", "x" * 5000, "\x1b]0;owned\x07\n", "../../etc/passwd", "\ud800", "a\u202eb"),
    *([], [1], [[]], {}, {"a": {}}, ["full"] * 5, [True] * 5, ["F"] * 20_000, {"type": "yarn", "factor": 4}),
)
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")


def paths(value, at=()):
    """Every place in a JSON value."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from paths(entry, (*at, key))


def mutate_json(rng, value):
    """A JSON value with one to three places changed, removed, or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(paths(value))
        if not places:
            return value
        *way, last = rng.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        action = rng.random()
        if action < 0.6:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.8:
            del holder[last]
        elif isinstance(holder, dict):
            holder[rng.choice([f"{last}x", "\x1b[31m", "", *ROTARY])] = holder.pop(last)
    return value


def mutate_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not content:
            break
        at, action = rng.randrange(len(content)), rng.random()
        if action < 0.5:
            content[at] = rng.randrange(256)
        elif action < 0.7:
            del content[at : at + rng.randint(1, 50)]
        elif action < 0.9:
            content[at:at] = rng.randbytes(rng.randint(1, 50))
        else:
            del content[at:]
    return bytes(content)


def mutate_header(rng, content):
    """A safetensors file whose header, not its data, is changed, in JSON that stays valid."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(mutate_json(rng, json.loads(content[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mutate_file(rng, path):
    content, action = path.read_bytes(), rng.random()
    if action < 0.08:
        path.unlink()
        [lambda: None, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir][rng.randrange(4)]()
    elif action < 0.12:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    elif action < 0.3:
        path.write_bytes(mutate_bytes(rng, content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutate_json(rng, json.loads(content))), errors="surrogatepass")
    else:
        path.write_bytes(mutate_header(rng, content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with everything that is read: shards, FP8, a tokenizer and what lies beside it."""
    name = "model.layers.3.self_attn.o_proj.weight"
    codes, scale = files.quantise(MIXED.state[name])
    fields = files.config_fields(MIXED, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    fields["eos_token_id"] = 3
    directory = files.write_checkpoint(
        tmp_path_factory.mktemp("whole") / "model", fields, MIXED.state | {name: codes, f"{name}_scale_inv": scale}, shards=2
    )
    save_tokenizer(directory, begin)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "added_tokens_decoder": {"260": token("<think>"), "261": token("<user>")}})
    )
    load(directory)
    return directory


def check(seed, whole, directory):
    """That one mutated copy is read, or refused as it should be."""
    rng = random.Random(seed)
    shutil.copytree(whole, directory)
    names = sorted(path.name for path in directory.iterdir())
    for name in rng.sample(names, rng.choice([1, 1, 2])):
        mutate_file(rng, directory / name)
    began = time.perf_counter()
    for read in (load, read_tokenizer):
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = read(directory)
            if read is load:
                np.asarray(found[2].embedding)
            messages = [str(warning.message) for warning in warned]
        except ValueError as error:
            messages = [str(error)]
        for message in messages:
            assert message.isprintable() and len(message) < 3000, (seed, message[:500])
    assert time.perf_counter() - began < 20, seed
    shutil.rmtree(directory)


@pytest.mark.parametrize("first", range(0, 20, 20))
def test_some_faults_are_refused_in_one_sentence(whole, tmp_path, first):
    for seed in range(first, first + 20):
        check(seed, whole, tmp_path / "mutated")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES_IN_ALL, CASES_AT_ONCE))
def test_every_fault_is_refused_in_one_sentence(whole, tmp_path, first):
    for seed in range(1000 + first, 1000 + first + CASES_AT_ONCE):
        check(seed, whole, tmp_path / "mutated")
