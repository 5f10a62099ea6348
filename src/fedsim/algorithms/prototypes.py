"""Class prototypes: how clients compute them, how they travel, and what the server makes of them.

A prototype is the mean of the features of a client's examples of one class, (d,). Sets of them are (C, d) beside (C,) flags that
say which classes there are; what a client has not got does not travel, and the flags travel as bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.parts import pick, start
from fedsim.core import Batch, Client, Local, Metrics, Params, Reduce, Task, Tree
from fedsim.folds import stack, uniform
from fedsim.wire import coded, kept

HEAD = "head/"
EMPTY = 1e-24  # squared length below which features are nothing

Features = Callable[[Tree, Params, Tree], Array]  # (held, params, x (B, ...)) -> (B, d)


class Own(NamedTuple):
    """What a client keeps."""

    params: Params
    prototypes: Array  # (C, d), of these parameters
    has: Array  # (C,), bool


def block(task: Task, algorithm: str) -> tuple[str, ...]:
    """Paths of the trained leaves that features depend on: all but the head.

    Raises:
        ValueError: there are none, no classes, or no features to speak of.
    """
    if not task.classes:
        raise ValueError(
            f"Expected classes for algorithm={algorithm!r}, which has a prototype of each; a language model has none."
        )
    if task.features is None:
        raise ValueError(f"Expected a model with features for algorithm={algorithm!r}; its head must be called head.")
    paths = tuple(sorted(path for path in task.trained if not path.startswith(HEAD)))
    if not paths or len(paths) == len(task.trained):
        raise ValueError(
            f"Expected more than the head to be trained, and a head, for algorithm={algorithm!r}, which learns what the head reads; "
            "take --peft last_k with a fused backbone, or another that trains a layer below it, and head_rounds=0."
        )
    return paths


def width(task: Task) -> int:
    """Length d of a prototype: what the head reads."""
    return jax.eval_shape(task.init, jax.random.key(0))[f"{HEAD}kernel"].shape[0]


def nothing(task: Task, params: Params) -> Own:
    """What a client that was never in a round has."""
    return Own(params, jnp.zeros((task.classes, width(task))), jnp.zeros(task.classes, bool))


def first(task: Task, paths: tuple[str, ...]) -> Params:
    """The block that every client starts from."""
    return pick(start(task), paths)


def unit(x: Array) -> Array:
    """Vectors (..., d) at length one; those of length zero stay zero, with a gradient of zero."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    there = squares > EMPTY
    return x * jnp.where(there, jax.lax.rsqrt(jnp.where(there, squares, 1.0)), 0.0)


def bits(has: Array) -> Array:
    """Flags (..., C) as they travel, (..., ceil(C / 8)) bytes."""
    return jnp.packbits(has, axis=-1)


def flags(packed: Array, classes: int) -> Array:
    """What `bits` packed, (..., C), bool."""
    return jnp.unpackbits(packed, axis=-1, count=classes).astype(bool)


def sent(prototypes: Array, has: Array) -> Tree:
    """Sets of prototypes (..., C, d) in a message or a reply: those of the classes there are, and a bit for each class."""
    entries = jnp.broadcast_to(has[..., None], prototypes.shape)
    return {"prototypes": coded(kept(prototypes, entries), change=False), "has": bits(has)}


def means(sets: Array, has: Array) -> tuple[Array, Array]:
    """Unweighted means over the clients that have a class, (C, d), and whether anybody has, (C,).

    Args:
        sets: (m, C, d).
        has: (m, C).
    """
    count = has.sum(axis=0)
    total = jnp.where(has[..., None], sets, 0.0).sum(axis=0)
    return total / jnp.maximum(count, 1)[:, None].astype(total.dtype), count > 0


def collecting(task: Task, features: Features, end: Callable[[Array, Array, Any], tuple[Tree, Tree]]) -> Local:
    """A pass over all of a client's examples, each once and in order, that makes its prototypes.

    Args:
        features: of the parameters in its memory, which has them as `params`.
        end: (prototypes (C, d), flags (C,), memory) -> reply, memory.
    """
    Carry = tuple[Array, Array, Any]

    def begin(held: Tree, message: Tree, client: Client, batch: Batch) -> Carry:
        return jnp.zeros((task.classes, width(task))), jnp.zeros(task.classes), client.memory

    def step(held: Tree, message: Tree, carry: Carry, batch: Batch) -> tuple[Carry, Metrics]:
        sums, count, own = carry
        z = features(held, own.params, batch.x)
        of = jax.nn.one_hot(batch.y, task.classes) * batch.mask[:, None]  # (B, C)
        sums = sums + jnp.matmul(of.T, z, precision=jax.lax.Precision.HIGHEST)
        return (sums, count + of.sum(axis=0), own), {}

    def finish(held: Tree, message: Tree, carry: Carry, client: Client) -> tuple[Tree, Tree, Metrics]:
        sums, count, own = carry
        return *end(sums / jnp.maximum(count, 1)[:, None], count > 0, own), {}

    passes = task.passes._replace(epochs=1, steps=None, rows=None, shuffle=False, stream="prototypes")
    return Local(begin, step, finish, passes)


def side_by_side() -> Reduce:
    """Keeps every client's prototypes apart."""
    return stack(uniform)


def unpacked(stacked: Tree, classes: int) -> tuple[Array, Array]:
    """What `side_by_side` gives, as sets (m, C, d) and flags (m, C); of who did not reply there is nothing."""
    has = flags(stacked.replies["has"], classes) & (stacked.weight > 0)[:, None]
    return stacked.replies["prototypes"], has


def nearest(z: Array, prototypes: Array, has: Array, tau: float) -> Array:
    """Logits (B, C): minus the squared distance to each prototype over 2 tau; a class without one is never the largest."""
    far = jnp.sum((z[:, None] - prototypes) ** 2, axis=-1) / (2 * tau)  # (B, C)
    worst = jnp.max(jnp.where(has, far, 0.0), axis=1, keepdims=True)
    return -jnp.where(has, far, worst + 100.0)
