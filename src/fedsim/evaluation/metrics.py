"""What is said of a classifier, from its confusion counts and scores, and of many clients, from a value of each. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def spread(values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """How a value is spread over clients: mean, mean by `weights`, worst, best, the nine deciles; (K,) each.

    Clients of weight zero, which have no value, are left out. Where a client's value is not finite, as of a model that
    diverged, `nonfinite` counts them, and the other numbers are those of the rest.
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
        "worst": float(values.min()),
        "best": float(values.max()),
        "deciles": np.quantile(values, np.arange(1, 10) / 10).tolist(),
    }
