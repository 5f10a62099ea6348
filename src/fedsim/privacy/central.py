"""Client-level privacy at the server: changes of bounded norm, their sum with Gaussian noise, over a fixed number of clients.

DP-FedAvg of McMahan et al., arXiv 1710.06963, with the estimator f~_f (algorithm 1): the denominator is the expected cohort, which
nobody's presence changes. Noise is drawn once an exchange, after the sum over all lanes and devices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.core import Average, Averaged, Reduce, Tree
from fedsim.folds import uniform, weighted_sum
from fedsim.privacy.clipping import clip, clip_layers


@functools.cache  # one fold for all numbers, which are data: other noise recompiles nothing
def fold(per_layer: bool) -> Reduce:
    """The private mean; `args` are norm, standard deviation of the noise on the sum, and expected cohort, (), float32 each.

    Guarantees:
        neighbouring cohorts: one client more, or less, moves the sum by at most the clipping norm.
        expected denominator: the sum is divided by the expected cohort, whoever came.
        noise variance: each entry of the sum gets noise of that standard deviation, independent of all others.
    """
    cut = clip_layers if per_layer else clip

    def zero(reply: Tree, clients: int) -> Tree:
        for path, leaf in jax.tree_util.tree_leaves_with_path(reply):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"Expected leaf {name!r} of a reply to hold floating-point numbers for dp=central, not {leaf.dtype}; noise "
                    "cannot be added to it: send it as float32, or choose dp=none."
                )
        return jax.tree.map(lambda r: jnp.zeros(r.shape, jnp.float32), reply)

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Tree) -> Tree:
        kept, _ = jax.vmap(cut, in_axes=(0, None))(replies, args["clip"])
        counts = (weights > 0).astype(jnp.float32)  # what does not count is cut first and left out then
        return jax.tree.map(lambda t, r: t + weighted_sum(counts, r), total, kept)

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        value = jax.tree.map(lambda leaf: leaf / args["expected"], noisy(total, args["noise"], key))
        return Averaged(value, args["expected"], reported=jnp.round(args["expected"]).astype(jnp.int32))

    return Reduce(zero, add, done, uniform)


def noisy(total: Tree, deviation: Array, key: Array) -> Tree:
    """The tree with Gaussian noise of that standard deviation on every entry, a key of its own for each leaf."""
    leaves, structure = jax.tree.flatten(total)
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten(
        [
            leaf + deviation * jax.random.normal(k, leaf.shape, jnp.float32)
            for leaf, k in zip(leaves, keys, strict=False)
        ]
    )


def central(clip_norm: float, noise_multiplier: float, expected: float, *, per_layer: bool = False) -> Average:
    """The run's average under client-level privacy with a fixed norm.

    Args:
        noise_multiplier: standard deviation of the noise on the sum over `clip_norm`.
        expected: clients of a round, in the mean.
        per_layer: clip leaf by leaf.

    Raises:
        ValueError: a number that is not above zero.
    """
    for name, value in {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "expected": expected}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"Expected {name}={value} > 0 for a private mean; give a positive number, or dp=none.")
    numbers = {"clip": clip_norm, "noise": noise_multiplier * clip_norm, "expected": expected}
    args: dict[str, Any] = {name: np.float32(value) for name, value in numbers.items()}
    return Average("private mean", fold(per_layer), args=lambda state, members: args, runs_empty=True)
