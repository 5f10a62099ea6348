"""What is said of a model, from its sums, of a classifier, from its confusion counts, and of many clients. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsim.config import TASKS, TRAINED

TOP = 5  # `top5`, where there are more classes than that


def scores(
    confusion: np.ndarray, loss: float, correct: float, top: int, margins: np.ndarray, positive: np.ndarray
) -> dict[str, float]:
    """All that is said of a classifier on a split; every value is NaN where an answer was no number, or nothing was asked.

    Args:
        confusion: (C, C), true classes down, answers across.
        loss: sum over the rows, nats.
        correct: sum over the rows, NaN where the model's outputs for one of them were not finite.
        top: rows whose class is among the `TOP` best.
        margins: (N,) output of class 1 minus that of class 0; of two classes.
        positive: (N,) bool, whether a row is of class 1; of two classes.
    """
    rows, classes = int(np.sum(confusion)), len(confusion)
    answered = rows > 0 and bool(np.isfinite(correct))
    found = {
        "loss": loss / max(rows, 1),
        "accuracy": int(np.trace(confusion)) / max(rows, 1),
        **from_counts(confusion),
    }
    if classes > TOP:
        found[f"top{TOP}"] = int(top) / max(rows, 1)
    if classes == 2:
        found["auroc"] = auroc(margins, positive)
    return found if answered else dict.fromkeys(found, float("nan"))


def from_sums(sums: Mapping[str, Any], *, language: bool = False) -> dict[str, Any]:
    """`loss` and `accuracy` of a task's sums, and of a language model `perplexity`, exp(loss), infinite where that overflows.

    Args:
        sums: `loss`, `correct`, `weight`; numbers, or arrays (K,) of many clients.

    Returns:
        float64 of the same shape; NaN where nothing was asked, or an answer was no number.
    """
    loss, correct, weight = (np.asarray(sums[name], np.float64) for name in ("loss", "correct", "weight"))
    answered = (weight > 0) & np.isfinite(correct)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"loss": loss / weight, "accuracy": correct / weight}
    if language:
        found["perplexity"] = perplexity(found["loss"])
    return {name: np.where(answered, value, np.nan) for name, value in found.items()}


def perplexity(loss: Any) -> Any:
    """exp of the mean loss of a token, nats."""
    with np.errstate(over="ignore"):
        return np.exp(loss)


def of_training(task: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The task's scores of a round's training batches, from the means of its criterion's metrics; NaN where there are none."""
    found = {name: float(metrics.get(name, np.nan)) for name in TRAINED[task]}
    return found | ({"perplexity": float(perplexity(found["loss"]))} if "perplexity" in found else {})


def require_classes(metric: str, classes: int) -> None:
    """Raises `ValueError` for a metric that is not defined for so many classes."""
    kept = {f"top{TOP}": classes > TOP, "auroc": classes == 2}
    if not kept.get(metric, True):
        rule = "two classes" if metric == "auroc" else f"more than {TOP} classes"
        others = [name for name in TASKS["classification"] if kept.get(name, True)]
        raise ValueError(f"Expected metric={metric!r} with {rule}, not {classes}; take one of {', '.join(others)}.")


def from_counts(confusion: np.ndarray) -> dict[str, float]:
    """Balanced accuracy and macro-F1 of confusion counts (C, C), true classes down, answers across.

    Balanced accuracy is the mean recall of the classes that occur. Macro-F1 is the mean of
    F1 = 2 TP / (2 TP + FP + FN) over the classes that occur or are answered.
    """
    table = np.asarray(confusion, np.float64)
    hits, true, answered = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    occurs, named = true > 0, true + answered > 0
    return {
        "balanced_accuracy": float((hits[occurs] / true[occurs]).mean()) if occurs.any() else float("nan"),
        "macro_f1": float((2 * hits[named] / (true + answered)[named]).mean()) if named.any() else float("nan"),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counted as one half.

    By ranks (Mann and Whitney 1947), so it is exact. NaN where one of the classes does not occur, or a score is NaN.

    Args:
        scores: (N,) larger for what looks positive.
        positive: (N,) bool.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; ties share the mean of theirs
    p = int(positive.sum())
    n = len(positive) - p
    if p == 0 or n == 0 or np.isnan(scores).any():
        return float("nan")
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def spread(values: np.ndarray, weights: np.ndarray, *, larger: bool = True) -> dict[str, Any]:
    """How a value is spread over clients: mean, mean by `weights`, worst, best, the nine deciles; (K,) each.

    Clients of weight zero, which have no value, are left out. Where a client's value is not finite, as of a model that
    diverged, `nonfinite` counts them, and the other numbers are those of the rest.

    Args:
        larger: whether a larger value is better.
    """
    asked = np.asarray(weights) > 0
    kept = asked & np.isfinite(values)
    broken = {"nonfinite": int((asked & ~kept).sum())} if (asked & ~kept).any() else {}
    values, weights = np.asarray(values, np.float64)[kept], np.asarray(weights, np.float64)[kept]
    if not len(values):
        return {"clients": 0, **broken}
    return {
        "clients": len(values),
        **broken,
        "mean": float(values.mean()),
        "weighted_mean": float(np.average(values, weights=weights)),
        "worst": float(values.min() if larger else values.max()),
        "best": float(values.max() if larger else values.min()),
        "deciles": np.quantile(values, np.arange(1, 10) / 10).tolist(),
    }
