"""Tiny models with ragged prompts, the tokens that repeated full forwards give for them, and layers in 8 bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import forward, generate, serving
from pallas_kernels import quant
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, UNUSUAL, Case

LENGTHS = (37, 5, 60)
NEW = 6
CHUNK = 16  # so that prompts take several, and all tests share their programs
MODELS = {"glm": GLM_FIELDS, "deepseek": DEEPSEEK_FIELDS, "unusual": GLM_FIELDS | UNUSUAL}


@functools.cache
def model(fields, pattern, seed=7):
    return Case(MODELS[fields], pattern, seed, LENGTHS)


def prompts_of(case):
    return [row[:length].tolist() for row, length in zip(case.tokens, case.lengths, strict=True)]


def run(case, prompts=None, new=NEW, **options):
    prompts = prompts_of(case) if prompts is None else prompts
    return generate(case.params, prompts, case.config, case.schedule, new, **{"chunk": CHUNK} | options)


def greedy_by_forwards(case, prompts, new=NEW, width=72):
    """Every token from a forward over everything before it. [rows][new], and by how much each one was the best."""
    rows, gaps = [list(p) for p in prompts], []
    for _ in range(new):
        tokens = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        lengths = jnp.array([len(row) for row in rows])
        logits = np.asarray(forward(case.params, tokens, case.config, case.schedule, lengths))
        for i, row in enumerate(rows):
            ordered = np.sort(logits[i, len(row) - 1])
            gaps.append(ordered[-1] - ordered[-2])
            row.append(int(logits[i, len(row) - 1].argmax()))
    return [row[-new:] for row in rows], min(gaps)


def experts_by_bias(weights):
    """Serving weights whose experts are chosen by the router's bias alone.

    A random router has near-ties, which fall either way with the rounding of a product; a token whose expert falls the
    other way ends elsewhere altogether.
    """

    def decided(layer):
        if not isinstance(layer.mlp, serving.Experts):
            return layer
        bias = 2.0 * jnp.arange(layer.mlp.router_bias.size, dtype=jnp.float32)
        return layer.replace(mlp=layer.mlp.replace(router_bias=bias))

    return weights.replace(layers=tuple(map(decided, weights.layers)))


@jax.jit
def in_codes(layer):
    """The layer with the matrices in 8 bits that the kernels read so, and one with the same numbers in bfloat16.

    Scales are powers of two, so that these are the same.
    """

    def quantised(w, *order):
        scaled = quant.quantise_matrix(jnp.transpose(w, order) if order else w)
        scaled = dataclasses.replace(scaled, scales=jnp.exp2(jnp.round(jnp.log2(scaled.scales))))
        back = np.argsort(order) if order else range(w.ndim)
        return scaled, quant.dequantise(scaled, jnp.bfloat16).transpose(*back)

    mlp = layer.mlp
    if isinstance(mlp, serving.Experts):
        changed = {"gate_up": quantised(mlp.gate_up, 0, 2, 3, 1), "down": quantised(mlp.down, 0, 2, 1)}
        if mlp.shared_down is not None:
            changed |= {"shared_gate_up": quantised(mlp.shared_gate_up), "shared_down": quantised(mlp.shared_down)}
    else:
        changed = {"gate_up": quantised(mlp.gate_up), "down": quantised(mlp.down)}
    attention = {
        name: quantised(getattr(layer, name)) for name in ("up", "index_up", "out") if getattr(layer, name) is not None
    }
    return tuple(
        dataclasses.replace(
            layer,
            mlp=dataclasses.replace(mlp, **{name: both[i] for name, both in changed.items()}),
            **{name: both[i] for name, both in attention.items()},
        )
        for i in range(2)
    )
