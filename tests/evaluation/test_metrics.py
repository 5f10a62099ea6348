"""Metrics against loops written out, and values worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.evaluation import metrics
from fedsim.evaluation.evaluate import Counts, counted, masked_sums


def loops(y: list[int], answer: list[int], classes: int) -> dict[str, float]:
    """Recall and F1 of one class after the other, from the labels."""
    pairs = list(zip(y, answer, strict=True))
    recalls = [np.mean([a == c for t, a in pairs if t == c]) for c in range(classes) if c in y]
    f1 = []
    for c in set(y) | set(answer):
        hits = sum(t == a == c for t, a in pairs)
        precision = hits / answer.count(c) if c in answer else 0.0
        recall = hits / y.count(c) if c in y else 0.0
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return {"balanced_accuracy": float(np.mean(recalls)), "macro_f1": float(np.mean(f1))}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_metrics_of_counts_equal_loops(pairs: list[tuple[int, int]]) -> None:
    y, answer = map(list, zip(*pairs, strict=True))
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (y, answer), 1)
    assert metrics.from_counts(confusion) == pytest.approx(loops(y, answer, 4))


def test_metrics_of_counts_by_hand() -> None:
    """Recalls 3/4 and 1/2 (the third class does not occur); F1 6/8, 2/5 and 0 of the third, which is answered once."""
    found = metrics.from_counts(np.array([[3, 1, 0], [0, 1, 1], [0, 0, 0]]))
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((6 / 7 + 2 / 4 + 0) / 3)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=25))
def test_auroc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([r[0] for r in rows], np.float32), np.array([r[1] for r in rows])
    pairs = [float(p > n) + 0.5 * float(p == n) for p in scores[positive] for n in scores[~positive]]
    assert metrics.auroc(scores, positive) == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_spread_leaves_out_clients_without_tests() -> None:
    values, weights = np.array([0.0, np.nan, 1.0, 0.5, 0.5]), np.array([1, 0, 3, 2, 2])
    found = metrics.spread(values, weights)
    assert (found["clients"], found["worst"], found["best"]) == (4, 0.0, 1.0)
    assert found["mean"] == 0.5 and found["weighted_mean"] == pytest.approx(5 / 8)
    assert len(found["deciles"]) == 9 and found["deciles"][4] == 0.5
    assert metrics.spread(np.array([np.nan]), np.array([0])) == {"clients": 0}


def test_auroc_of_scores_that_are_no_numbers_is_none() -> None:
    assert np.isnan(metrics.auroc(np.array([0.1, np.nan, 0.3]), np.array([False, True, True])))


def of_logits(logits: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All scores of these outputs, by the formulas and sums that an evaluation uses."""
    sums = masked_sums(jnp.asarray(logits), jnp.asarray(y), jnp.ones(len(y)))
    classes = logits.shape[1]
    zero = Counts(jnp.zeros((classes, classes), jnp.int32), jnp.zeros((), jnp.int32))
    counts = counted(zero, jnp.asarray(logits), jnp.asarray(y), jnp.ones(len(y)))
    with np.errstate(invalid="ignore"):
        margins = logits[:, 1] - logits[:, 0]
    return metrics.scores(
        np.asarray(counts.confusion), float(sums["loss"]), float(sums["correct"]), int(counts.top), margins, y == 1
    )


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one output", "a row", "everything"])
def test_no_metric_scores_outputs_that_are_not_finite(classes: int, bad: float, where: str) -> None:
    """NaN names class 0 by argmax, which would be its share of the data, and a top-5 of 1."""
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(12, classes)).astype(np.float32), np.arange(12) % classes
    finite = of_logits(logits, y)
    assert all(np.isfinite(value) for value in finite.values())
    places = {"one output": (3, 1), "a row": (3, slice(None)), "everything": (slice(None), slice(None))}
    logits[places[where]] = bad
    broken = of_logits(logits, y)
    assert list(broken) == list(finite) and all(np.isnan(value) for value in broken.values())


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_no_metric_scores_an_empty_set(classes: int) -> None:
    empty = np.zeros((0, classes), np.float32)
    assert all(np.isnan(value) for value in of_logits(empty, np.zeros(0, np.int32)).values())
    assert all(np.isnan(value) for value in metrics.from_counts(np.zeros((classes, classes))).values())
    assert np.isnan(metrics.auroc(np.zeros(0), np.zeros(0, bool)))
    assert metrics.spread(np.zeros(0), np.zeros(0)) == {"clients": 0}


def test_spread_counts_values_that_are_not_finite() -> None:
    found = metrics.spread(np.array([0.5, np.nan, 1.0]), np.array([2, 2, 2]))
    assert (found["clients"], found["nonfinite"], found["mean"], found["worst"]) == (2, 1, 0.75, 0.5)
    assert metrics.spread(np.array([np.nan]), np.array([1])) == {"clients": 0, "nonfinite": 1}
