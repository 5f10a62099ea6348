"""What FedDM's clients learn from and with: rows by class, inputs as numbers, models in a ball, gradients that are cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from optax.tree_utils import tree_norm

from fedsim.core import Params, Tree
from fedsim.privacy.central import noisy
from fedsim.privacy.clipping import clip as clipped

RHO, RHO_SIZE = 5.0, 320_010  # of the paper's network of three convolutions: rho, and its parameters

# --- what a client draws


def enough(labels: np.ndarray, classes: int, least: int) -> np.ndarray:
    """Which classes have that many of these labels, (C,), bool."""
    return np.bincount(labels, minlength=classes)[:classes] >= least


def steps_of(classes: int, steps: int, least: int) -> Callable[[np.ndarray], int]:
    """Steps of a client with these labels: one, in which nothing is learnt, where it has enough of no class."""
    return lambda labels: min(len(labels), 1) * (steps if enough(labels, classes, least).any() else 1)


def chosen(classes: int, real: int, least: int) -> Callable[[np.ndarray, np.random.Generator], Iterator[np.ndarray]]:
    """Rows of steps, (1, C * R) each, class by class; of few examples some come again, of too few none does."""

    def rows(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        owned = [np.flatnonzero(labels == c) for c in range(classes)]
        there = enough(labels, classes, least)
        while True:
            block = np.full((classes, real), -1)
            for c in np.flatnonzero(there):
                own = rng.permutation(owned[c])[:real]
                block[c] = np.concatenate([own, rng.choice(owned[c], real - len(own))])
            yield block.reshape(1, -1)

    return rows


# --- what examples are made of


def is_number(leaf: Any) -> bool:
    """Whether a leaf can be learnt."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def numbers(x: Tree) -> Tree:
    """Inputs as numbers that can be learnt: bytes of images as intensities, 0 to 1. Masks stay as they are.

    Raises:
        ValueError: whole numbers, as of tokens.
    """

    def one(leaf: Array) -> Array:
        if leaf.dtype == jnp.uint8:
            return leaf.astype(jnp.float32) / 255
        if not (is_number(leaf) or leaf.dtype == jnp.bool_):
            raise ValueError(
                f"Expected inputs of algorithm='fed_dm' to be images or numbers, not {leaf.dtype}; of texts train what stands above "
                "a frozen part, whose output is kept (--peft head, or lora in upper blocks)."
            )
        return leaf

    return jax.tree.map(one, x)


def learnt(x: Tree) -> Tree:
    """The leaves that are learnt; None in place of masks."""
    return jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, x)


def whole(moving: Tree, x: Tree) -> Tree:
    """x with other values of what is learnt."""
    return jax.tree.map(lambda new, old: old if new is None else new, moving, x, is_leaf=lambda node: node is None)


def perturbed(key: Array, params: Params, rho: float) -> Params:
    """A model at random in the ball: a Gaussian direction, cut to rho where it is longer; one norm over all leaves."""
    drawn = noisy(jax.tree.map(jnp.zeros_like, params), jnp.float32(1), key)
    scale = jnp.minimum(1.0, rho / (tree_norm(drawn) + 1e-12))
    return jax.tree.map(lambda leaf, g: leaf + scale * g, params, drawn)


def radius(params: Params) -> float:
    """rho of the paper's network, or for a smaller model what moves each entry as far on average."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return RHO * min(1.0, math.sqrt(size / RHO_SIZE))


def cut(grads: Tree, key: Array, clip: float, noise: float) -> Tree:
    """A gradient of at most that length, all leaves together, with Gaussian noise of standard deviation noise * clip."""
    return noisy(clipped(grads, clip)[0], jnp.float32(noise * clip), key)
