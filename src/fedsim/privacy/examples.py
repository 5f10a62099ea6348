"""Example-level privacy on clients, DP-SGD: each example's gradient is cut, their sum noised, in every local step.

Abadi et al., arXiv 1607.00133, algorithm 1, with a fixed denominator. Per-example gradients are those of the trained part alone, by
vmap, so that a batch of B needs B times the trained part and not B times the model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.core import Batch, Metrics, Params, Tree
from fedsim.privacy.central import noisy
from fedsim.privacy.clipping import clip

Loss = Callable[[Tree, Params, Batch], tuple[Array, Metrics]]


def private_loss(loss: Loss, clip_norm: float, noise_multiplier: float, batch_size: int) -> Loss:
    """The same loss, whose gradient by the parameters is (sum of cut per-example gradients + noise) / `batch_size`.

    So whatever takes its gradient, once a step, trains privately. The value and the metrics are those of the batch, without noise.

    Guarantees:
        neighbouring batches: an example that is zeroed moves the gradient by at most `clip_norm` / `batch_size`.
        padding: what is no example adds nothing, whatever stands there; it is left out after the cut.
        noise variance: each entry gets noise of standard deviation `noise_multiplier` x `clip_norm` / `batch_size`.
        noise independence: of entries, leaves and the batch's key, which is another in each step of each client.
    """

    def private(held: Tree, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        fixed = jax.lax.stop_gradient(params)
        real = batch.mask > 0

        def of_one(x: Tree, y: Array, number: Array) -> tuple[Params, Array, Metrics]:
            alone = Batch(
                jax.tree.map(lambda a: a[None], x), y[None], jnp.ones((1,)), jax.random.fold_in(batch.key, number),
                batch.step, batch.last,
            )  # fmt: skip
            (value, metrics), gradient = jax.value_and_grad(lambda p: loss(held, p, alone), has_aux=True)(fixed)
            return clip(gradient, clip_norm)[0], value, metrics

        gradients, values, metrics = jax.vmap(of_one)(batch.x, batch.y, jnp.arange(1, len(batch.mask) + 1))
        sums = jax.tree.map(lambda g: jnp.where(real.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0).sum(axis=0), gradients)
        total = noisy(sums, jnp.float32(noise_multiplier * clip_norm), jax.random.fold_in(batch.key, 0))
        given = metrics.pop("weight", None)
        weights = jnp.where(real, 1.0 if given is None else given, 0.0)

        def mean(each: Array) -> Array:
            return (jnp.where(real, each, 0.0) * weights).sum() / jnp.maximum(weights.sum(), 1e-30)

        # Zero plus a slope: params - fixed is zero, and its gradient is one.
        slopes = jax.tree.map(lambda p, f, g: jnp.sum((p - f) * g / batch_size), params, fixed, total)
        value = mean(values) + sum(jax.tree.leaves(slopes), jnp.zeros(()))
        found = {name: mean(each) for name, each in metrics.items()}
        return value, found if given is None else {**found, "weight": weights.sum()}

    return private
