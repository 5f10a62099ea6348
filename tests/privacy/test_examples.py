"""DP-SGD on clients: the gradient of a private loss against a loop over examples in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim.core import Batch
from fedsim.privacy.examples import private_loss
from fedsim.testing.tasks import FEATURES, tiny_task
from fedsim.testing.toys import tiny_problem

PROBLEM = tiny_problem()
TASK = tiny_task()
PARAMS = TASK.init(jax.random.key(3))
QUIET = 1e-9


def batch(rows: int = 6, real: int | None = None, key: int = 0, **changes: Any) -> Batch:
    """Rows of the toy, the first `real` of them examples."""
    mask = (np.arange(rows) < (rows if real is None else real)).astype(np.float32)
    return Batch(
        jnp.asarray(PROBLEM.x[1 : rows + 1]), jnp.asarray(PROBLEM.y[1 : rows + 1]), jnp.asarray(mask), jax.random.key(key),
        jnp.int32(0), jnp.asarray(False),
    )._replace(**changes)  # fmt: skip


def gradient(given: Batch, clip: float, noise: float, size: int = 8) -> np.ndarray:
    loss = private_loss(TASK.loss, clip, noise, size)
    found = jax.jit(jax.grad(lambda p: loss(PROBLEM.held, p, given)[0]))(PARAMS)
    return flat(found)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def one_by_one(given: Batch, clip: float, size: int = 8) -> np.ndarray:
    """The loop: each example's gradient, cut, summed, over a fixed number."""
    total = np.zeros_like(flat(PARAMS))
    for i in np.flatnonzero(np.asarray(given.mask)):
        alone = given._replace(x=given.x[i : i + 1], y=given.y[i : i + 1], mask=jnp.ones(1))
        own = flat(jax.grad(lambda p, alone=alone: TASK.loss(PROBLEM.held, p, alone)[0])(PARAMS))
        total += own * min(1.0, clip / np.linalg.norm(own))
    return total / size


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e3])
@pytest.mark.parametrize("real", [0, 1, 4, 6])
def test_gradient_is_that_of_a_loop_over_examples(clip: float, real: int) -> None:
    given = batch(real=real)
    np.testing.assert_allclose(gradient(given, clip, QUIET), one_by_one(given, clip), rtol=1e-3, atol=1e-6)


def test_a_large_norm_and_no_noise_are_plain_sgd() -> None:
    """The reduction: of a full batch, the mean gradient; value and metrics are the batch's own."""
    given = batch(rows=8)
    loss = private_loss(TASK.loss, 1e6, 1e-14, 8)
    plain, metrics = TASK.loss(PROBLEM.held, PARAMS, given)
    found, own = loss(PROBLEM.held, PARAMS, given)
    assert float(found) == pytest.approx(float(plain), rel=1e-6)
    for name, value in metrics.items():
        assert float(own[name]) == pytest.approx(float(value), rel=1e-6)
    plain_gradient = flat(jax.grad(lambda p: TASK.loss(PROBLEM.held, p, given)[0])(PARAMS))
    np.testing.assert_allclose(gradient(given, 1e6, 1e-14), plain_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", [1.0, 1e4, np.nan, np.inf])
def test_neighbouring_batches(broken: float) -> None:
    """An example that is zeroed, or anything else, moves the gradient by at most C / B: the noise is the same key's."""
    clip, size = 0.3, 8
    given = batch(x=jnp.asarray(PROBLEM.x[1:7]).at[2, 0].set(broken))
    without = given._replace(mask=given.mask.at[2].set(0.0))
    moved = np.linalg.norm(gradient(given, clip, 0.7) - gradient(without, clip, 0.7))
    assert moved <= clip / size * (1 + 1e-3)


@pytest.mark.parametrize("garbage", [0.0, 1e6, np.nan])
def test_padding(garbage: float) -> None:
    """What stands in rows that are no examples moves nothing, nor does how many there are."""
    given = batch(real=4)
    dirty = given._replace(x=given.x.at[4:].set(garbage))
    short = batch(rows=4)
    for other in (dirty, short):
        np.testing.assert_allclose(gradient(other, 0.3, 0.5), gradient(given, 0.3, 0.5), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_noise_variance() -> None:
    """z C / B on every entry of the gradient, whatever the number of examples, within five standard errors."""
    clip, noise, size = 0.4, 3.0, 8
    for real in (0, 6):
        draws = [gradient(batch(real=real, key=k), clip, noise, size) for k in range(60)]
        mean = one_by_one(batch(real=real), clip)
        entries = np.concatenate([(draw - mean) * size / (noise * clip) for draw in draws])
        assert entries.std() == pytest.approx(1.0, rel=5 / np.sqrt(2 * len(entries)))
        assert abs(np.corrcoef(draws[0] - mean, draws[1] - mean)[0, 1]) < 5 / np.sqrt(len(mean))


def test_noise_independence() -> None:
    """Of entries, leaves and keys: no two numbers of 400 gradients agree, within five standard errors; the same key repeats."""
    quiet = batch(real=0)
    loss = private_loss(TASK.loss, 1.0, 1.0, 1)

    @jax.jit
    @jax.vmap
    def drawn(key: jax.Array) -> Any:
        found = jax.grad(lambda p: loss(PROBLEM.held, p, quiet._replace(key=key))[0])(PARAMS)
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(found)])

    keys = jax.random.split(jax.random.key(1), 400)
    numbers = np.asarray(drawn(keys))
    for table in (numbers, numbers[: numbers.shape[1]].T):  # entries over keys, and keys over entries
        between = np.corrcoef(table.T) - np.eye(table.shape[1])
        assert np.abs(between).max() < 5 / np.sqrt(len(table))
    np.testing.assert_array_equal(numbers, drawn(keys))


@pytest.mark.slow
def test_tokens_weigh_as_they_did() -> None:
    """A task that says how much a batch weighs, as a language model's does, keeps its mean and its weight."""

    def loss(held: Any, params: Any, given: Batch) -> Any:
        counts = given.mask * (given.y + 1).astype(jnp.float32)
        each = ((given.x @ params["w"]) ** 2) * counts
        mean = each.sum() / jnp.maximum(counts.sum(), 1.0)
        return mean, {"loss": mean, "weight": counts.sum()}

    params = {"w": jnp.ones(FEATURES)}
    given = batch(real=4)
    plain, metrics = loss(None, params, given)
    found, own = private_loss(loss, 1.0, 1.0, 8)(None, params, given)
    assert float(found) == pytest.approx(float(plain), rel=1e-5)
    assert float(own["weight"]) == float(metrics["weight"]) and float(own["loss"]) == pytest.approx(
        float(plain), rel=1e-5
    )
