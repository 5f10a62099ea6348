"""Metrics of a model on rows of the data set: mask-aware, sharded over devices, read on the host once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.core import Batch, Metrics, Params, Tree
from fedsim.lanes import Lanes

Predict = Callable[[Tree, Tree, Tree, Tree], Array]


def classification_loss(
    apply: Callable[[Params, Tree, Tree], Array],
) -> Callable[[Tree, Params, Batch], tuple[Array, Metrics]]:
    """Mean cross-entropy over a batch's real rows, with `loss` and `accuracy` as metrics.

    Args:
        apply: (trained, frozen, x (B, ...)) -> logits (B, classes).
    """

    def loss(held: Tree, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        sums = masked_sums(apply(params, held, batch.x), batch.y, batch.mask)
        rows = jnp.maximum(batch.mask.sum(), 1.0)
        return sums["loss"] / rows, {"loss": sums["loss"] / rows, "accuracy": sums["correct"] / rows}

    return loss


def masked_sums(logits: Array, y: Array, mask: Array) -> dict[str, Array]:
    """Sums over the real rows of a batch: loss (nats), correct answers, rows. logits (B, C), y (B,), mask (B,)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
    right = (logits.argmax(axis=-1) == y).astype(jnp.float32)
    real = mask > 0
    return {
        "loss": jnp.where(real, losses, 0.0).sum(),
        "correct": jnp.where(real, right, 0.0).sum(),
        "rows": mask.sum(),
    }


def evaluator(engine: Lanes, predict: Predict, rows: np.ndarray, batch: int) -> Callable[[Tree], dict[str, float]]:
    """A function server -> {"loss", "accuracy"} over these rows of the engine's examples.

    One compiled step over batches of equal shape; each batch is split over the devices. Sums are float32 per batch and
    added on the host in float64.
    """
    devices = len(engine.devices)
    size = -(-min(batch, max(len(rows), 1)) // devices) * devices
    count = -(-len(rows) // size)
    padded = np.zeros(count * size, np.int32)
    padded[: len(rows)] = rows
    mask = (np.arange(count * size) < len(rows)).astype(np.float32)
    index = padded.reshape(count, devices, size // devices)
    masks = jax.device_put(mask.reshape(count, size), engine.everywhere)

    @jax.jit
    def step(held: Tree, server: Tree, x: Tree, y: Array, mask: Array) -> Any:
        x, y = jax.tree.map(lambda a: a.reshape(size, *a.shape[2:]), (x, y))
        return masked_sums(predict(held, server, (), x), y, mask)

    def evaluate(server: Tree) -> dict[str, float]:
        parts: list[dict[str, Array]] = []
        for rows, mask in zip(index, masks, strict=True):
            x, y = engine.gather(rows)
            if parts and not engine.resident:
                jax.block_until_ready(parts[-1])  # so that two batches at most lie on the devices
            parts.append(step(engine.held, server, x, y, mask))
        sums = {
            name: float(np.sum([np.float64(p[name]) for p in jax.device_get(parts)]))
            for name in ("loss", "correct", "rows")
        }
        return {"loss": sums["loss"] / sums["rows"], "accuracy": sums["correct"] / sums["rows"]}

    return evaluate
