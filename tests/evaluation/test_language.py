"""Loss, perplexity and token accuracy are those of NumPy over the tokens that count, whatever the padding around them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim.core import Batch
from fedsim.engine.lanes import Lanes
from fedsim.evaluation import language, metrics
from fedsim.evaluation.evaluate import Asked, evaluator, loss_of, whole_batch
from fedsim.training import lengths

ROWS, TOKENS, VOCABULARY, PAD = 37, 12, 23, 0


@pytest.fixture(scope="module")
def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids (N, T), padded behind or, every third, in front; a score of every next token by the token alone, (V, V)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
    for row, length in enumerate(rng.integers(1, TOKENS + 1, ROWS)):
        ids[row, length:] = PAD
        if row % 3 == 0:
            ids[row] = np.roll(ids[row], TOKENS - length)
    return ids, rng.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def by_hand(ids: np.ndarray, table: np.ndarray, asked: np.ndarray | None = None) -> tuple[list[float], list[bool]]:
    """Losses and hits of every next token that counts, one after the other."""
    losses, right = [], []
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            before, now = ids[row, t - 1], ids[row, t]
            if PAD in (before, now) or (asked is not None and not asked[row, t]):
                continue
            scores = table[before].astype(np.float64)
            losses.append(float(np.log(np.exp(scores).sum()) - scores[now]))
            right.append(bool(scores.argmax() == now))
    return losses, right


def batch(x: Any, mask: np.ndarray) -> Batch:
    return whole_batch(jax.tree.map(jnp.asarray, x), jnp.zeros(len(mask), jnp.int32), jnp.asarray(mask, jnp.float32))


def test_sums_are_those_of_the_next_tokens_that_count(texts: tuple[np.ndarray, np.ndarray]) -> None:
    ids, table = texts
    mask = np.arange(ROWS) % 5 > 0  # every fifth text is padding of the batch
    losses, right = by_hand(ids[mask], table)
    found = language.score(PAD)(jnp.asarray(table[ids]), batch(ids, mask))
    assert float(found["weight"]) == len(losses) and float(found["correct"]) == sum(right)
    np.testing.assert_allclose(found["loss"], np.sum(losses), rtol=1e-5)
    value, said = language.criterion(PAD)(jnp.asarray(table[ids]), batch(ids, mask))
    np.testing.assert_allclose([value, said["loss"]], [np.mean(losses)] * 2, rtol=1e-5)
    np.testing.assert_allclose(said["accuracy"], np.mean(right), rtol=1e-6)
    assert float(said["weight"]) == len(losses)


def test_a_loss_mask_asks_for_some_tokens_alone(texts: tuple[np.ndarray, np.ndarray]) -> None:
    ids, table = texts
    asked = np.random.default_rng(1).integers(0, 2, ids.shape)
    losses, right = by_hand(ids, table, asked)
    found = language.score(PAD)(jnp.asarray(table[ids]), batch({"ids": ids, "loss": asked}, np.ones(ROWS)))
    assert 0 < float(found["weight"]) == len(losses) < len(by_hand(ids, table)[0])
    assert float(found["correct"]) == sum(right)
    np.testing.assert_allclose(found["loss"], np.sum(losses), rtol=1e-5)


def test_padding_changes_no_gradient(texts: tuple[np.ndarray, np.ndarray]) -> None:
    """Neither padded tokens nor padded rows, not even with the largest outputs there."""
    ids, table = texts
    loss = loss_of(language.criterion(PAD), lambda params, held, x: params[x] + held[: x.shape[0], : x.shape[1]])
    row = next(i for i in range(ROWS) if i % 3 and 3 < (ids[i] > 0).sum() < TOKENS - 2)
    plain, none = ids[row : row + 1, : int((ids[row] > 0).sum())], np.zeros((8, TOKENS, 1), np.float32)
    wider = np.concatenate([ids[row : row + 1], ids[4:9]])
    broken = none.copy()
    broken[0, plain.shape[1] :] = 1e30
    grads = jax.grad(lambda p, held, b: loss(held, p, b)[0])
    expected = grads(jnp.asarray(table), jnp.asarray(none), batch(plain, np.ones(1)))
    found = grads(jnp.asarray(table), jnp.asarray(broken), batch(wider, np.arange(6) == 0))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_batch_without_tokens_has_loss_and_gradient_zero(texts: tuple[np.ndarray, np.ndarray]) -> None:
    ids, table = texts
    loss = loss_of(language.criterion(PAD), lambda params, held, x: params[x])
    for x, mask in ((ids[:3], np.zeros(3)), (np.full((2, 4), PAD, np.int32), np.ones(2)), (ids[:3, :1], np.ones(3))):
        value, said = loss({}, jnp.asarray(table), batch(x, mask))
        assert float(value) == float(said["weight"]) == float(said["accuracy"]) == 0
        assert not np.any(jax.grad(lambda p, x=x, mask=mask: loss({}, p, batch(x, mask))[0])(jnp.asarray(table)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [1, 10, 64])
@pytest.mark.parametrize("bucketed", [False, True])
def test_evaluation_equals_numpy(texts: tuple[np.ndarray, np.ndarray], devices: int, size: int, bucketed: bool) -> None:
    """Labels of one class and of many give the same: nothing reads them."""
    ids, table = texts
    rows = np.random.default_rng(2).permutation(ROWS)[:31]
    losses, right = by_hand(ids[rows], table)
    found = lengths.measure(ids, PAD, 4) if bucketed else None
    for y in (np.zeros(ROWS, np.int32), np.arange(ROWS, dtype=np.int32)):
        engine = Lanes({}, ids, y, np.arange(ROWS), np.array([0, ROWS]), devices=devices)
        evaluate = evaluator(
            engine, lambda held, server, memory, x: server[x], rows, size, found, Asked(language.score(PAD), False)
        )
        scores = evaluate(engine.put(table))
        assert list(scores) == ["loss", "accuracy", "perplexity"] and all(type(v) is float for v in scores.values())
        np.testing.assert_allclose(scores["loss"], np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(scores["perplexity"], np.exp(np.mean(losses)), rtol=1e-5)
        np.testing.assert_allclose(scores["accuracy"], np.mean(right), rtol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_have_no_scores(texts: tuple[np.ndarray, np.ndarray], bad: float) -> None:
    ids, table = texts
    table = table.copy()
    table[ids[1, 0], 3] = bad
    engine = Lanes({}, ids, np.zeros(ROWS, np.int32), np.arange(ROWS), np.array([0, ROWS]), devices=1)
    evaluate = evaluator(
        engine, lambda held, server, memory, x: server[x], np.arange(ROWS), 16, None, Asked(language.score(PAD), False)
    )
    assert all(np.isnan(value) for value in evaluate(engine.put(table)).values())


def test_perplexity_is_the_exponential_of_the_mean_loss_of_clients_too() -> None:
    sums = {"loss": np.array([6.0, 0.0, 5000.0]), "correct": np.array([1.0, 0.0, 2.0]), "weight": np.array([3, 0, 5])}
    found = metrics.from_sums(sums, language=True)
    np.testing.assert_allclose(found["perplexity"], [np.exp(2.0), np.nan, np.inf])
    np.testing.assert_allclose(found["accuracy"], [1 / 3, np.nan, 0.4])
    assert "perplexity" not in metrics.from_sums(sums)


def test_training_says_perplexity_of_its_mean_loss() -> None:
    assert metrics.of_training("language_model", {"loss": 2.0, "accuracy": 0.5, "weight": 7.0}) == {
        "loss": 2.0,
        "accuracy": 0.5,
        "perplexity": pytest.approx(np.exp(2.0)),
    }
    assert all(np.isnan(value) for value in metrics.of_training("language_model", {}).values())
