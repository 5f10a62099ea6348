"""Client-level privacy at the server: changes of bounded norm, their sum with Gaussian noise, over a fixed number of clients.

DP-FedAvg of McMahan et al., arXiv 1710.06963, with the estimator f~_f (algorithm 1): the denominator is the expected cohort, which
nobody's presence changes. Noise is drawn once an exchange, after the sum over all lanes and devices. The norm is fixed, or
follows a quantile of the changes' norms, of which the server sees a noisy count (Andrew et al., arXiv 1905.03871).
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

RATE = 0.2  # of the norm's logarithm, in its paper's section 3.1
COUNT_NOISE = 2.5  # noise of the count over the noise multiplier, at least: the changes' own noise is then 2 % larger
EXPECTED_SHARE = 1 / 20  # of the expected cohort, which the paper takes: less noise than that says little more


@functools.cache  # one fold for all numbers, which are data: other noise recompiles nothing
def fold(per_layer: bool, adaptive: bool = False, correlated: bool = False) -> Reduce:
    """The private mean; `args` are norm, standard deviation of the noise on the sum, and expected cohort, (), float32 each.

    Args:
        adaptive: `seen` is a noisy share of the changes that the norm does not cut; `args["count"]` is the standard deviation
            of the noise on their number.
        correlated: the noise of exchange t is the standard deviation times sum_s `args["inverse"][t - s]` z_s, with z_s normal and
            drawn once more from `args["key"]`; t is `args["count"]`. `seen` is that key.

    Guarantees:
        neighbouring cohorts: one client more, or less, moves the sum by at most the clipping norm.
        expected denominator: the sum is divided by the expected cohort, whoever came.
        neighbouring counts: one client more, or less, moves the count of short changes by at most 1/2.
        noise variance: each entry of the sum gets noise of that standard deviation, independent of all others.
        noise independence: of entries, leaves and the count.
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
        sums = jax.tree.map(lambda r: jnp.zeros(r.shape, jnp.float32), reply)
        return (sums, jnp.zeros(())) if adaptive else sums

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Tree) -> Tree:
        kept, norms = jax.vmap(cut, in_axes=(0, None))(replies, args["clip"])
        counts = (weights > 0).astype(jnp.float32)  # what does not count is cut first and left out then
        sums = jax.tree.map(lambda t, r: t + weighted_sum(counts, r), total[0] if adaptive else total, kept)
        # Half up, half down: whoever comes moves the count by no more than 1/2.
        return (sums, total[1] + (counts * jnp.where(norms <= args["clip"], 0.5, -0.5)).sum()) if adaptive else sums

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        sums, short = total if adaptive else (total, None)
        of_sum, of_count = jax.random.split(key)  # `fold_in(key, 1)` would be the key of the second leaf
        seen: Tree = ()
        if correlated:
            sums, seen = noisy_by_rows(sums, args, of_sum)
        else:
            sums = noisy(sums, args["noise"], of_sum)
        value = jax.tree.map(lambda leaf: leaf / args["expected"], sums)
        if short is not None:
            noise = jax.random.normal(of_count, (), jnp.float32)
            seen = (short + args["count"] * noise) / args["expected"] + 0.5
        return Averaged(value, args["expected"], seen, jnp.round(args["expected"]).astype(jnp.int32))

    return Reduce(zero, add, done, uniform)


def noisy(total: Tree, deviation: Array, key: Array) -> Tree:
    """The tree with Gaussian noise of that standard deviation on every entry, a key of its own for each leaf.

    Leaves of one shape draw together: XLA compiles each draw by itself, which takes minutes for a hundred leaves.
    """
    leaves, structure = jax.tree.flatten(total)
    keys = jax.random.split(key, max(len(leaves), 1))
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        alike.setdefault(leaf.shape, []).append(i)
    for shape, group in alike.items():
        draw = jax.vmap(lambda k, shape=shape: jax.random.normal(k, shape, jnp.float32))
        for i, noise in zip(group, draw(keys[jnp.array(group)]), strict=True):
            leaves[i] = leaves[i] + deviation * noise
    return structure.unflatten(leaves)


def noisy_by_rows(total: Tree, args: Tree, key: Array) -> tuple[Tree, Tree]:
    """The tree with noise that is correlated over exchanges, and the key that it is drawn from, of the first exchange, as words.

    Guarantees:
        noise covariance: over exchanges that of C^-1 Z, with Z independent.
    """
    words = jnp.where(args["count"] == 0, jax.random.key_data(key), args["key"])
    root = jax.random.wrap_key_data(words)

    def add(s: Array, total: Tree) -> Tree:
        return noisy(total, args["noise"] * args["inverse"][args["count"] - s], jax.random.fold_in(root, s))

    return jax.lax.fori_loop(jnp.int32(0), args["count"] + jnp.int32(1), add, total), words


def split(noise_multiplier: float, expected: float) -> tuple[float, float]:
    """Noise multiplier of the changes' sum, and standard deviation of the noise on the count: together they cost as much as
    one sum with the noise multiplier that is given (Andrew et al., theorem 1).

    The count moves by 1/2, so its noise multiplier is twice its deviation, and 1/z^2 = 1/z_sum^2 + 1/(2 count)^2.
    """
    count = max(EXPECTED_SHARE * expected, COUNT_NOISE * noise_multiplier)
    return (noise_multiplier**-2 - (2 * count) ** -2) ** -0.5, count


def central(
    clip_norm: float,
    noise_multiplier: float,
    expected: float,
    *,
    per_layer: bool = False,
    quantile: float | None = None,
    inverse: np.ndarray | None = None,
) -> Average:
    """The run's average under client-level privacy.

    Args:
        clip_norm: to which changes are cut; with a `quantile` in the first exchange.
        noise_multiplier: standard deviation of the noise on the sum over the norm.
        expected: clients of a round, in the mean.
        per_layer: clip leaf by leaf.
        quantile: the share of changes that the norm is to leave uncut: after every exchange it is multiplied by
            exp(-0.2 (share seen - quantile)). None for a fixed norm.
        inverse: (rounds,) the first column of C^-1, a Toeplitz matrix by which noise is correlated (`banded.py`); its state
            counts exchanges and holds the key of the first one. None for noise of its own in every exchange.

    Raises:
        ValueError: a number that is not above zero.
    """
    for name, value in {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "expected": expected}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"Expected {name}={value} > 0 for a private mean; give a positive number, or dp=none.")
    if quantile is None:
        numbers = {"clip": clip_norm, "noise": noise_multiplier * clip_norm, "expected": expected}
        args: dict[str, Any] = {name: np.float32(value) for name, value in numbers.items()}
        if inverse is not None:
            args["inverse"] = np.asarray(inverse, np.float32)
            return Average(
                "private mean",
                fold(per_layer, correlated=True),
                init=lambda: {"count": np.int32(0), "key": np.zeros_like(jax.random.key_data(jax.random.key(0)))},
                args=lambda state, members: {**args, **state},
                next=lambda state, words: {"count": state["count"] + np.int32(1), "key": words},
                runs_empty=True,
            )
        return Average("private mean", fold(per_layer), args=lambda state, members: args, runs_empty=True)

    multiplier, count = split(noise_multiplier, expected)
    fixed = {"count": np.float32(count), "expected": np.float32(expected)}

    def moved(norm: Array, seen: Array) -> Array:
        return jnp.clip(norm * jnp.exp(-RATE * (seen - quantile)), 1e-30, 1e30)

    return Average(
        "private mean",
        fold(per_layer, adaptive=True),
        init=lambda: np.float32(clip_norm),
        args=lambda norm, members: {**fixed, "clip": norm, "noise": norm * multiplier},
        next=moved,
        runs_empty=True,
    )
