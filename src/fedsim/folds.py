"""Folds of replies: the weighted mean, all replies side by side, two folds of one reply; `core.Reduce` is their form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.core import Average, Averaged, Client, Reduce, Tree

Weight = Callable[[Client, Tree], Array]


def by_examples(client: Client, reply: Tree) -> Array:
    """Weight of a reply: the client's number of examples."""
    return client.n.astype(jnp.float32)


def uniform(client: Client, reply: Tree) -> Array:
    """Weight of a reply: one for every client that has examples."""
    return (client.n > 0).astype(jnp.float32)


def weighted_sum(weights: Array, values: Array) -> Array:
    """sum_l weights[l] values[l], in full precision: accelerators would otherwise round a product's inputs."""
    return jnp.tensordot(weights.astype(values.dtype), values, axes=1, precision=jax.lax.Precision.HIGHEST)


def mean(weight: Weight = by_examples) -> Reduce:
    """The weighted mean of the replies; zeros where the total weight is zero. Never holds more than one total."""

    def zero(reply: Tree, clients: int) -> Tree:
        return jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), reply), jnp.zeros((), jnp.float32)

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Tree) -> Tree:
        sums = jax.tree.map(lambda t, r: t + weighted_sum(weights, r), total[0], replies)
        return sums, total[1] + weights.sum()

    def done(total: Tree, args: Tree, key: Array) -> Tree:
        sums, weight = total
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return jax.tree.map(lambda s: s * scale.astype(s.dtype), sums)

    return Reduce(zero, add, done, weight)


def plain(weight: Weight = by_examples) -> Average:
    """The run's average where the config asks for nothing else: the weighted mean."""
    fold = mean(weight)

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        return Averaged(fold.done(total, args, key), total[1])

    return Average("mean", fold._replace(done=done), plain=True)


class Stacked(NamedTuple):
    """All replies side by side, in the cohort's order; `weight` 0 marks one that did not count."""

    replies: Tree  # (M, ...)
    weight: Array  # (M,), float32


def stack(weight: Weight = by_examples) -> Reduce:
    """Keeps every reply: for rules that are no mean (medians, stacking of LoRA factors). Memory grows with M."""

    def zero(reply: Tree, slots: int) -> Stacked:
        rows = jax.tree.map(lambda r: jnp.zeros((slots, *r.shape), r.dtype), reply)
        return Stacked(rows, jnp.zeros((slots,), jnp.float32))

    def add(total: Stacked, replies: Tree, weights: Array, slots: Array, args: Tree) -> Stacked:
        rows = jax.tree.map(lambda t, r: t.at[slots].add(r, mode="drop"), total.replies, replies)
        return Stacked(rows, total.weight.at[slots].add(weights, mode="drop"))

    return Reduce(zero, add, lambda total, args, key: total, weight, rows=True)


def both(a: Reduce, b: Reduce) -> Reduce:
    """Two folds of the same replies, weighted as `a` weighs them: the result is a pair, `args` too.

    Raises:
        ValueError: one keeps rows and the other does not, so that their totals lie in different orders.
    """
    if a.rows != b.rows:
        raise ValueError("Expected both folds to keep rows, or none; take stack() and compute the mean from its rows.")

    def zero(reply: Tree, clients: int) -> Tree:
        return a.zero(reply, clients), b.zero(reply, clients)

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Any) -> Tree:
        of_a, of_b = args or ((), ())
        return a.add(total[0], replies, weights, slots, of_a), b.add(total[1], replies, weights, slots, of_b)

    def done(total: Tree, args: Any, key: Array) -> Tree:
        of_a, of_b = args or ((), ())
        keys = jax.random.split(key)
        return a.done(total[0], of_a, keys[0]), b.done(total[1], of_b, keys[1])

    return Reduce(zero, add, done, a.weight)._replace(rows=a.rows)
