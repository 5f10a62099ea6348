"""What is said of a classifier, from its confusion counts and scores, and of many clients, from a value of each. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

TOP = 5  # `top5`, where there are more classes than that


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

    Clients of weight zero, which have no value, are left out.
    """
    kept = weights > 0
    values, weights = np.asarray(values, np.float64)[kept], np.asarray(weights, np.float64)[kept]
    if not len(values):
        return {"clients": 0}
    return {
        "clients": len(values),
        "mean": float(values.mean()),
        "weighted_mean": float(np.average(values, weights=weights)),
        "worst": float(values.min()),
        "best": float(values.max()),
        "deciles": np.quantile(values, np.arange(1, 10) / 10).tolist(),
    }
