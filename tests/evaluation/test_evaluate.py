"""Metrics count real rows only, and are those of NumPy whatever the batches and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim.core import Batch
from fedsim.engine.lanes import Lanes
from fedsim.evaluation import metrics
from fedsim.evaluation.evaluate import classification_loss, evaluator, masked_sums

ROWS, FEATURES, CLASSES = 57, 5, 4


def linear(params: dict, held: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"] + held["b"]


@pytest.fixture(scope="module")
def problem() -> dict:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    w = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    b = rng.normal(size=CLASSES).astype(np.float32)
    logits = (x @ w + b).astype(np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(ROWS), y]
    return {"x": x, "y": y, "w": w, "b": b, "losses": losses, "right": logits.argmax(axis=1) == y}


def batch(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> Batch:
    zero = jnp.zeros((), jnp.int32)
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(mask), jax.random.key(0), zero, jnp.array(False))


@pytest.mark.slow
def test_loss_is_the_mean_over_real_rows(problem: dict) -> None:
    """Padding changes neither value nor gradient, not even padding with the largest floats."""
    loss = classification_loss(linear)
    params, held = {"w": jnp.asarray(problem["w"])}, {"b": jnp.asarray(problem["b"])}
    x, y = problem["x"][:8].copy(), problem["y"][:8].copy()
    x[5:], y[5:] = 1e30, 0
    padded = batch(x, y, (np.arange(8) < 5).astype(np.float32))
    plain = batch(problem["x"][:5], problem["y"][:5], np.ones(5, np.float32))
    grads = jax.grad(lambda p, b: loss(held, p, b)[0])
    np.testing.assert_allclose(loss(held, params, padded)[0], problem["losses"][:5].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(held, params, padded)[1]["accuracy"], problem["right"][:5].mean())
    np.testing.assert_allclose(grads(params, padded)["w"], grads(params, plain)["w"], rtol=1e-5, atol=1e-7)


def test_an_empty_batch_has_loss_and_gradient_zero(problem: dict) -> None:
    loss = classification_loss(linear)
    params, held = {"w": jnp.asarray(problem["w"])}, {"b": jnp.asarray(problem["b"])}
    empty = batch(problem["x"][:3], problem["y"][:3], np.zeros(3, np.float32))
    value, metrics = loss(held, params, empty)
    assert float(value) == float(metrics["loss"]) == float(metrics["accuracy"]) == 0
    assert not np.any(jax.grad(lambda p: loss(held, p, empty)[0])(params)["w"])


def test_sums_leave_out_what_is_not_a_number_beside_the_mask() -> None:
    logits = jnp.array([[2.0, 0.0], [jnp.nan, jnp.inf], [0.0, 1.0]])
    sums = masked_sums(logits, jnp.array([0, 1, 0], jnp.int32), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(-2)) + np.log1p(np.exp(1)), rtol=1e-6)
    assert (float(sums["correct"]), float(sums["weight"])) == (1, 2)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [1, 10, 57, 1000])
@pytest.mark.parametrize("count", [1, 31, 57])
def test_evaluator_equals_numpy(problem: dict, devices: int, size: int, count: int) -> None:
    rows = np.random.default_rng(count).permutation(ROWS)[:count]
    engine = Lanes(
        {"b": problem["b"]}, problem["x"], problem["y"], np.arange(ROWS), np.array([0, ROWS]), devices=devices
    )
    evaluate = evaluator(engine, lambda held, server, memory, x: linear(server, held, x), rows, size)
    scores = evaluate(engine.put({"w": problem["w"]}))
    assert set(scores) == {"loss", "accuracy", "balanced_accuracy", "macro_f1"}
    assert all(type(v) is float for v in scores.values())
    np.testing.assert_allclose(scores["loss"], problem["losses"][rows].mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["accuracy"], problem["right"][rows].mean(), rtol=1e-7)


def test_examples_on_the_host_give_the_same_scores(problem: dict) -> None:
    def scores(where: str) -> dict[str, float]:
        offsets = np.array([0, ROWS])
        engine = Lanes({"b": problem["b"]}, problem["x"], problem["y"], np.arange(ROWS), offsets, resident=where)
        evaluate = evaluator(engine, lambda held, server, memory, x: linear(server, held, x), np.arange(ROWS), 16)
        return evaluate(engine.put({"w": problem["w"]}))

    assert scores("on") == scores("off")


def scarce(spread: Callable[..., Any], most: int, tried: list[int]) -> Callable[..., Any]:
    """`Lanes.spread` with programs of evaluation that run out of memory with more than `most` rows a device."""

    def programs(*args: Any) -> Callable[..., Any]:
        program = spread(*args)

        def run(*given: Any) -> Any:
            tried.append(given[-1].shape[1])
            if tried[-1] > most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
            return program(*given)

        return run

    return programs


def test_memory_that_runs_out_costs_half_the_batch(problem: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    held, offsets, tried = {"b": problem["b"]}, np.array([0, ROWS]), []
    engine = Lanes(held, problem["x"], problem["y"], np.arange(ROWS), offsets, devices=2)
    server = engine.put({"w": problem["w"]})

    def made(size: int) -> Callable[[Any], dict[str, float]]:
        return evaluator(engine, lambda held, server, memory, x: linear(server, held, x), np.arange(ROWS), size)

    fits = made(16)(server)
    monkeypatch.setattr(engine, "spread", scarce(engine.spread, 8, tried))
    evaluate = made(50)
    with pytest.warns(UserWarning, match=r"batches of \d+ examples .* --eval-batch") as warned:
        assert evaluate(server) == pytest.approx(fits, rel=1e-6)
    assert [int(str(w.message).split()[3]) for w in warned] == [50, 26]
    assert tried == [25, 13, *[7] * 5]
    assert evaluate(server) == pytest.approx(fits, rel=1e-6)
    assert tried[7:] == [7] * 5, "what fitted is kept"

    monkeypatch.setattr(engine, "spread", scarce(Lanes.spread.__get__(engine), 0, tried))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"a single example of each device .* lower --lanes"),
    ):
        made(4)(server)


@pytest.mark.parametrize(("classes", "extra"), [(2, "auroc"), (8, "top5")])
@pytest.mark.parametrize("devices", [1, 8])
def test_all_metrics_equal_numpy(classes: int, extra: str, devices: int) -> None:
    """Over padded batches, whose rows count nowhere, and a split in an order of its own."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(90, FEATURES)).astype(np.float32), rng.integers(0, classes, 90).astype(np.int32)
    w = rng.normal(size=(FEATURES, classes)).astype(np.float32)
    rows = rng.permutation(90)[:77]
    engine = Lanes({}, x, y, np.arange(90), np.array([0, 90]), devices=devices)
    scores = evaluator(engine, lambda held, server, memory, x: x @ server, rows, 16)(engine.put(w))
    logits, true = x[rows] @ w, y[rows]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (true, logits.argmax(axis=1)), 1)
    assert {k: scores[k] for k in ("balanced_accuracy", "macro_f1")} == pytest.approx(metrics.from_counts(confusion))
    best = np.argsort(-logits, axis=1)[:, :5]
    expected = {
        "auroc": metrics.auroc(logits[:, 1] - logits[:, 0], true == 1),
        "top5": (best == true[:, None]).any(axis=1).mean(),
    }
    assert scores[extra] == pytest.approx(expected[extra])
    assert ({"auroc", "top5"} & set(scores)) == {extra}
