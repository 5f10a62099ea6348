"""A model on rows of the data set: mask-aware, sharded over devices, read on the host once. `metrics.py` has the formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.core import Batch, Metrics, Params, Tree
from fedsim.engine import processes
from fedsim.engine.device_memory import ExhaustedError, all_fit, all_know
from fedsim.engine.host import went
from fedsim.engine.lanes import Lanes
from fedsim.evaluation import metrics
from fedsim.training import lengths
from fedsim.training.lengths import Lengths

Predict = Callable[[Tree, Tree, Tree, Tree], Array]
Score = Callable[[Array, Batch], Metrics]

CPU_BATCH, ACCELERATOR_BATCH = 64, 256  # examples of a step; the first measured, the second a choice


def loss_of(
    criterion: Callable[[Array, Batch], tuple[Array, Metrics]],
    apply: Callable[[Params, Tree, Tree], Array],
    augment: Callable[[Array, Tree], Tree] = lambda key, x: x,
) -> Callable[[Tree, Params, Batch], tuple[Array, Metrics]]:
    """A `Task.loss`: what the criterion says of the model's outputs for a batch.

    Args:
        apply: (trained, frozen, x (B, ...)) -> outputs (B, ...).
        augment: (batch's key, x) -> x, before it; in training only.
    """

    def loss(held: Tree, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        return criterion(apply(params, held, augment(batch.key, batch.x)), batch)

    return loss


def classification_loss(
    apply: Callable[[Params, Tree, Tree], Array],
    augment: Callable[[Array, Tree], Tree] = lambda key, x: x,
) -> Callable[[Tree, Params, Batch], tuple[Array, Metrics]]:
    """Mean cross-entropy over a batch's real rows, with `loss` and `accuracy` as metrics; `loss_of` has the arguments."""
    return loss_of(classification_criterion, apply, augment)


def classification_criterion(logits: Array, batch: Batch) -> tuple[Array, Metrics]:
    """A `Task.criterion`: the mean loss of a batch's real rows, and its metrics. logits (B, C)."""
    metrics = means(classification_score(logits, batch))
    return metrics["loss"], metrics


def classification_score(logits: Array, batch: Batch) -> Metrics:
    """A `Task.score`: `masked_sums` of a batch. logits (B, C)."""
    return masked_sums(logits, batch.y, batch.mask)


def means(sums: Metrics) -> Metrics:
    """`loss` and `accuracy` of a batch from a task's sums; 0 where nothing counts."""
    weight = jnp.maximum(sums["weight"], 1.0)
    return {"loss": sums["loss"] / weight, "accuracy": sums["correct"] / weight}


def masked_sums(logits: Array, y: Array, mask: Array) -> dict[str, Array]:
    """Sums over the real rows of a batch: loss (nats), correct answers, their weight. logits (B, C), y (B,), mask (B,).

    Outputs that are not finite answer nothing, though argmax names a class: `correct` is NaN where a real row has some.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
    right = (logits.argmax(axis=-1) == y).astype(jnp.float32)
    right = jnp.where(jnp.isfinite(logits).all(axis=-1), right, jnp.nan)
    real = mask > 0
    return {
        "loss": jnp.where(real, losses, 0.0).sum(),
        "correct": jnp.where(real, right, 0.0).sum(),
        "weight": mask.sum(),
    }


def whole_batch(x: Tree, y: Array, mask: Array) -> Batch:
    """Rows (B, ...) as a task's score takes them, which reads no key and no step."""
    return Batch(x, y, mask, jax.random.key(0), jnp.zeros((), jnp.int32), jnp.ones((), bool))


class Counts(NamedTuple):
    """What one pass over a split collects beside the sums of each batch."""

    confusion: Array  # (C, C), int32: rows by true class and answer
    top: Array  # (), int32: rows whose class is among the `metrics.TOP` best


def counted(before: Counts, logits: Array, y: Array, mask: Array) -> Counts:
    """The counts with a batch's real rows added. logits (B, C), y (B,), mask (B,)."""
    real = mask > 0
    confusion = before.confusion.at[y, logits.argmax(axis=-1)].add(real.astype(jnp.int32))
    # Ties count for the lower class, as in argmax.
    own = jnp.take_along_axis(logits, y[:, None], axis=1)
    ahead = (logits > own) | ((logits == own) & (jnp.arange(logits.shape[1]) < y[:, None]))
    return Counts(confusion, before.top + (real & (ahead.sum(axis=1) < metrics.TOP)).sum(dtype=jnp.int32))


class Asked(NamedTuple):
    """What an evaluation asks of a task."""

    score: Score = classification_score  # `Task.score`
    classes: bool = True  # `y` is the class of a row, so that confusion is counted; else outputs are next tokens


def evaluator(
    engine: Lanes,
    predict: Predict,
    rows: np.ndarray,
    batch: int | str = "auto",
    texts: Lengths | None = None,
    asked: Asked = Asked(),  # noqa: B008 - a value that nobody changes
) -> Callable[[Tree], dict[str, float]]:
    """A function server -> metrics over these rows of the engine's examples (docs/evaluation.md defines them).

    Where a device's memory runs out, it warns and halves the batch until it fits; nothing of the server is lost by that.
    Of classes `loss`, `accuracy`, `balanced_accuracy`, `macro_f1`, and `top5` of more than five classes or `auroc` of two;
    of a language model `loss`, `accuracy` and `perplexity`; all NaN where the model's outputs for a row are not finite. One
    compiled step over batches of equal shape; each batch is split over the devices. Sums of losses are float32 per batch and
    device, and added on the host in float64; counts are whole numbers.

    Args:
        batch: examples of a step; "auto" as `Speed.eval_batch` says.
        texts: lengths of the engine's examples, where they are texts: one step is compiled for each bucket in use.
        asked: of the task (default: classification).

    Raises, of the function:
        ValueError: not even one example of each device fits.
    """
    devices, rows = len(engine.devices), np.asarray(rows, np.int32)
    if isinstance(batch, str):
        batch = CPU_BATCH if engine.devices[0].platform == "cpu" else ACCELERATOR_BATCH
    size = -(-min(batch, max(len(rows), 1)) // devices) * devices
    whole = one_pass(engine, predict, rows, size, texts, asked)

    def evaluate(server: Tree) -> dict[str, float]:
        nonlocal size, whole
        while True:
            try:
                return whole(server)
            except (jax.errors.JaxRuntimeError, ExhaustedError) as error:
                if not all_know(error):
                    raise
                if size == devices:
                    raise ValueError(
                        "Expected a single example of each device to fit into its memory in evaluation; lower --lanes, or take "
                        "--precision bfloat16."
                    ) from error
            half = -(-size // (2 * devices)) * devices
            if processes.is_first():
                warnings.warn(
                    f"Expected batches of {size} examples to fit into the device's memory in evaluation; going on with {half}. "
                    f"--eval-batch {half} starts with that.",
                    stacklevel=2,
                )
            size, whole = half, one_pass(engine, predict, rows, half, texts, asked)

    return evaluate


def one_pass(
    engine: Lanes, predict: Predict, rows: np.ndarray, size: int, texts: Lengths | None, asked: Asked
) -> Callable[[Tree], dict[str, float]]:
    """What `evaluator` does, in batches of `size` examples, a multiple of the devices' number."""
    devices = len(engine.devices)
    batches = lengths.batches(rows, size, texts)
    index = [np.pad(part, (0, size - len(part))).reshape(devices, size // devices) for part, _ in batches]
    masks = engine.split([(np.arange(size) < len(part)).astype(np.float32).reshape(devices, -1) for part, _ in batches])

    def scored(length: int | None) -> Callable[..., tuple[Counts, dict[str, Array]]]:
        """The program of one length: each device counts and sums its own rows, and none waits for another."""

        def step(held: Tree, server: Tree, before: Counts | None, x: Tree, y: Array, mask: Array) -> Any:
            if texts is not None and length is not None:
                x = texts.cut(x, length)
            logits = predict(held, server, (), x)
            sums = asked.score(logits, whole_batch(x, y, mask))
            if before is None:
                return None, sums
            if logits.shape[1] == 2:
                sums["margin"] = logits[:, 1] - logits[:, 0]
            return counted(before, logits, y, mask), sums

        return engine.spread(step, (False, False, True, True, True, True))

    steps = {length: scored(length) for length in {length for _, length in batches}}

    def classes(server: Tree) -> int:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), engine.x)
        return jax.eval_shape(lambda server, x: predict(engine.held, server, (), x), server, one).shape[1]

    zero: list[Counts | None] = [] if asked.classes else [None]  # made by the first call, which knows the server

    def evaluate(server: Tree) -> dict[str, float]:
        if not zero:
            count = classes(server)
            none = np.zeros((devices, count, count), np.int32), np.zeros(devices, np.int32)
            zero.append(Counts(*engine.split(none)))

        def answered() -> tuple[Counts | None, list[dict[str, Array]]]:
            counts, parts = zero[0], []
            for rows, mask, (_, length) in zip(index, masks, batches, strict=True):
                jax.block_until_ready(parts[-2:-1])  # so that two batches at most lie on the devices
                x, y = engine.gather(rows)
                counts, sums = steps[length](engine.held, server, counts, x, y, mask)
                parts.append(sums)
                went("evaluating", len(parts), len(batches))
            return counts, parts

        split, host = processes.fetch(all_fit(answered))
        names = ("loss", "correct", "weight")
        loss, correct, weight = (float(np.sum([p[name] for p in host], dtype=np.float64)) for name in names)
        if split is None:
            found = metrics.from_sums({"loss": loss, "correct": correct, "weight": weight}, language=True)
            return {name: float(value) for name, value in found.items()}
        confusion, top = split.confusion.sum(axis=0), split.top.sum(axis=0)
        margins, labels = np.zeros(0), np.zeros(0)
        if len(confusion) == 2 and host:
            parts = [p["margin"].reshape(-1)[: len(part)] for p, (part, _) in zip(host, batches, strict=True)]
            margins, labels = np.concatenate(parts), np.asarray(engine.y)[np.concatenate([p for p, _ in batches])]
        return metrics.scores(confusion, loss, correct, top, margins, labels == 1)

    return evaluate
