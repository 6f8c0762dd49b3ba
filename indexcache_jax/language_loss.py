"""The language loss of training, whose gradient is made with it: no logit is computed twice.

The gradient with respect to a logit is softmax - 1 at the target and softmax elsewhere, whatever comes after: so the forward
pass, which has the logits of a block of tokens at hand, multiplies it by the head and by the hidden states at once, in the
arithmetic of these, and the backward pass scales both products. Where nothing before the loss trains, only the loss is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import block_rows, split

LOGIT_BYTES = 2**30  # of one block's float32 logits


def _rows(h: jax.Array, head: jax.Array) -> int:
    return block_rows(h.shape[0], 4 * head.shape[1], LOGIT_BYTES)


def _of_block(h: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss summed over the tokens of a block, their logits [N, V] and the log-sum-exp of these [N].

    A token whose target is -1 does not count.
    """
    logits = jnp.dot(h, head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0.0), axis=-1)
    return jnp.sum(jnp.where(targets < 0, 0.0, lse - picked)), logits, lse


def _is_target(targets: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]


@jax.custom_vjp
def summed_loss(h: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """The sum of -log softmax(h @ head) at the targets, a float32 scalar in nats.

    h [N, D], head [D, V], targets [N] int32. Differentiable in the first two.
    """
    rows = _rows(h, head)
    blocks = split(h, rows, 0), split(targets, rows, 0, fill=-1)
    return jnp.sum(jax.lax.map(lambda xs: _of_block(xs[0], head, xs[1])[0], blocks))


def _keep(h: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
    rows = _rows(h, head)

    def step(of_head: jax.Array | None, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h, targets = xs
        loss, logits, lse = _of_block(h, head, targets)
        gradient = jnp.exp(logits - lse[:, None]) - _is_target(targets, logits)
        gradient = jnp.where(targets[:, None] < 0, 0.0, gradient).astype(h.dtype)
        of_h = jnp.dot(gradient, head.T)
        found = jnp.dot(h.T, gradient, preferred_element_type=jnp.float32)
        return found if of_head is None else of_head + found, (loss, of_h)

    if rows >= h.shape[0]:
        of_head, (loss, of_h) = step(None, (h, targets))
        return loss, (of_h, of_head.astype(head.dtype))
    start = jnp.zeros(head.shape, jnp.float32)
    of_head, (losses, of_h) = jax.lax.scan(step, start, (split(h, rows, 0), split(targets, rows, 0, fill=-1)))
    return jnp.sum(losses), (of_h.reshape(-1, h.shape[1])[: h.shape[0]], of_head.astype(head.dtype))


def _pull(gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> Any:
    of_h, of_head = ((cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients)
    return of_h, of_head, None


summed_loss.defvjp(_keep, _pull)
