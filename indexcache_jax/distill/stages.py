"""What trains in a stage, and for which schedule: given as arrays, one program serves any."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.params import MoE, Params
from indexcache_jax.schedule import Schedule


@flax.struct.dataclass
class TracedSchedule:
    """A schedule as arrays, so that one program trains for any.

    full [L] bool: which layers are F. kl_weight [L] float32: what each layer's divergence counts in the indexer loss.
    """

    full: Any
    kl_weight: Any


def traced_schedule(schedule: Schedule, cross_layer: bool = True) -> TracedSchedule:
    """A schedule as arrays [L] of NumPy, with the weights of the multi-layer distillation (paper 3.2).

    A layer's divergence counts 1/(m+1) where its F layer serves m+1 layers. cross_layer False: 1 for F layers, 0 for S.
    """
    full = np.array(schedule.is_full)
    shares = [1.0 / len(schedule.serves(source)) for source in schedule.source]
    return TracedSchedule(full, np.where(cross_layer, shares, full).astype(np.float32))


def trainable(params: Params, stage: str) -> Any:
    """A label for every weight, for optax: "indexer", "model" or "frozen" in the stage "dense", "warmup" or "sparse".

    The router's bias is always frozen: it is set by `balance`. Raises ValueError for another stage.
    """
    if stage not in ("dense", "warmup", "sparse"):
        raise ValueError(f"stage: {stage!r} is not 'dense', 'warmup' or 'sparse'")
    model = "frozen" if stage == "warmup" else "model"
    labels = jax.tree.map(lambda _: model, params)
    labels = labels.replace(indexer=jax.tree.map(lambda _: "frozen" if stage == "dense" else "indexer", params.indexer))
    if isinstance(params.moe, MoE):
        labels = labels.replace(moe=labels.moe.replace(router_bias="frozen"))
    return labels


def balance(bias: jax.Array, tokens_per_expert: jax.Array, speed: float) -> jax.Array:
    """The router's biases [N, E] after a step of balancing without a loss (DeepSeek-V3).

    An expert's bias rises by `speed` where it got fewer tokens than the layer's mean, and falls where it got more.
    tokens_per_expert [N, E].
    """
    mean = jnp.mean(tokens_per_expert, axis=-1, keepdims=True)
    return bias + speed * jnp.sign(mean - tokens_per_expert)
