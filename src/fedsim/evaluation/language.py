"""What a language model is taught and scored by: the cross-entropy of every next token, over the tokens that count.

A text is its token ids (B, T), padded on either side, alone or in a dict as "ids"; "loss" (B, T) beside them, 1 or 0, says
which tokens the loss is about, such as those of an answer (default: all real ones). The labels `y` are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jax import Array

from fedsim.core import Batch, Metrics, Tree
from fedsim.evaluation.evaluate import means


def score(pad: int) -> Callable[[Array, Batch], Metrics]:
    """A `Task.score` of outputs (B, T, vocabulary): sums of loss (nats) and correct tokens, and `weight`, their number.

    Outputs that are not finite answer nothing: `correct` is NaN where a token that counts has some.
    """

    def sums(outputs: Array, batch: Batch) -> Metrics:
        ids, counts = targets(batch, pad)
        logits = outputs[:, :-1].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        right = (logits.argmax(axis=-1) == ids).astype(jnp.float32)
        right = jnp.where(jnp.isfinite(logits).all(axis=-1), right, jnp.nan)
        return {
            "loss": jnp.where(counts, losses, 0.0).sum(),
            "correct": jnp.where(counts, right, 0.0).sum(),
            "weight": counts.sum(dtype=jnp.float32),
        }

    return sums


def criterion(pad: int) -> Callable[[Array, Batch], tuple[Array, Metrics]]:
    """A `Task.criterion`: the mean loss of a token, and `weight`, by which the batches' means are to be averaged."""
    sums = score(pad)

    def loss(outputs: Array, batch: Batch) -> tuple[Array, Metrics]:
        found = sums(outputs, batch)
        metrics = means(found)
        return metrics["loss"], {**metrics, "weight": found["weight"]}

    return loss


def real(pad: int) -> Callable[[Tree], Array]:
    """A `Task.real`: x -> which of its places (B, T) hold a token."""
    return lambda x: (x["ids"] if isinstance(x, Mapping) else x) != pad


def targets(batch: Batch, pad: int) -> tuple[Array, Array]:
    """The next token of every place but the last, (B, T - 1) int32, and whether it counts, (B, T - 1) bool.

    It counts where it and the token before it are real, the loss is about it, and its text is no padding of the batch.
    """
    x: Tree = batch.x
    parts: Mapping[str, Array] = x if isinstance(x, Mapping) else {"ids": x}
    ids = parts["ids"]
    counts = (ids[:, :-1] != pad) & (ids[:, 1:] != pad) & (batch.mask[:, None] > 0)
    if "loss" in parts:
        counts &= parts["loss"][:, 1:] > 0
    return ids[:, 1:], counts
