"""Clients in float64 NumPy: softmax regression over the tiny problem's frozen map, its gradient written out, plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsim.core import Passes, Task
from fedsim.folds import uniform
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import Problem, visits

Leaves = dict[str, np.ndarray]
PASSES = Passes(2, None, 4)


def sgd_task(rate: float = 0.3, passes: Passes = PASSES, seed: int = 5, **changes: Any) -> Task:
    """The tiny task with plain SGD, uniform weights, and one start whatever the key, as a run has it."""
    start = tiny_task().init(jax.random.key(seed))
    options: dict[str, Any] = {
        "init": lambda key: start,
        "optimizer": optax.sgd,
        "lr": lambda client, message: jnp.float32(rate),
        "passes": passes,
        "weight": uniform,
    }
    return tiny_task(**{**options, **changes})


def start_of(task: Task) -> Leaves:
    """The task's first parameters."""
    return doubles(task.init(jax.random.key(0)))


def doubles(tree: Any) -> Leaves:
    """Leaves by path in float64."""
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.items()}


def outputs(problem: Problem, rows: np.ndarray, w: Leaves) -> tuple[np.ndarray, np.ndarray]:
    """What the head reads (B, F) and the logits (B, C)."""
    x = np.tanh(problem.x[rows].astype(np.float64) @ problem.held["frozen"])
    return x, x @ w["kernel"] + w["bias"]


def gradient(problem: Problem, rows: np.ndarray, w: Leaves, beside: Leaves | None = None) -> Leaves:
    """Of the mean cross-entropy over these rows; `beside` is a model whose logits are added."""
    x, z = outputs(problem, rows, w)
    if beside is not None:
        z = z + outputs(problem, rows, beside)[1]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = (p - np.eye(p.shape[1])[problem.y[rows]]) / len(rows)
    return {"kernel": x.T @ g, "bias": g.sum(0)}


def batches(problem: Problem, passes: Passes, id: int, round: int, exchange: int = 0) -> Iterator[np.ndarray]:
    """The rows of a client's batches in this round."""
    for rows in visits(problem, passes, id, round, exchange=exchange):
        yield rows[rows >= 0]


def trained(
    problem: Problem,
    w: Leaves,
    id: int,
    round: int,
    passes: Passes = PASSES,
    rate: float = 0.3,
    slope: Callable[[np.ndarray, Leaves], Leaves] | None = None,
    moves: tuple[str, ...] = ("kernel", "bias"),
) -> Leaves:
    """The client's parameters after its local steps; `slope(rows, w)` is what it descends, default: `gradient`."""
    slope = slope or (lambda rows, w: gradient(problem, rows, w))
    for rows in batches(problem, passes, id, round):
        g = slope(rows, w)
        w = {path: leaf - rate * g[path] if path in moves else leaf for path, leaf in w.items()}
    return w


def mean(each: list[Leaves]) -> Leaves:
    """The plain mean of some clients' leaves."""
    return {path: np.mean([one[path] for one in each], axis=0) for path in each[0]}


def close(found: Any, expected: Leaves, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    """Raises `AssertionError` unless float32 leaves equal these."""
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=rtol, atol=atol, err_msg=path)


def kept(memory: Any, id: int) -> Any:
    """What this client keeps."""
    rows, ids = memory.state()
    place = list(ids).index(id)
    return jax.tree.map(lambda leaf: leaf[place], rows)
