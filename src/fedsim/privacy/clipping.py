"""Vectors of bounded norm, whatever came in: what all mechanisms rest on."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.core import Tree

BLOCK = 256  # entries that are summed in one go: an error of a sum grows with its length
SLACK = 1e-4  # of a norm, above the rounding of sums of 256**4 entries in float32


def total(values: Array) -> Array:
    """The sum of all entries in float32, block by block, so that small ones are not lost in a long sum."""
    flat = values.astype(jnp.float32).reshape(-1)
    while flat.size > BLOCK:
        flat = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK).sum(axis=1)
    return flat.sum()


def direction(tree: Tree) -> tuple[Tree, Array, Array]:
    """The tree over its largest entry, in float32; that entry, (), and the norm of what was divided by it, (), at least 1 or 0.

    So neither 1e30 nor 1e-30 is lost when entries are squared. Where an entry is not finite, the tree is zeros and the
    largest entry infinite.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [leaf.astype(jnp.float32) for leaf in leaves]
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves), jnp.float32(0))
    known = jnp.isfinite(largest)
    unit = jnp.where(known & (largest > 0), largest, 1.0)
    once = jax.lax.rsqrt(unit)  # twice, as 1 / 1e38 is no normal float32, and flushed to zero
    scaled = [jnp.where(known, leaf * once * once, 0.0) for leaf in leaves]
    length = jnp.sqrt(sum((total(leaf**2) for leaf in scaled), jnp.float32(0)))
    return structure.unflatten(scaled), jnp.where(known, largest, jnp.inf), length


def norm(tree: Tree) -> Array:
    """The Euclidean norm of all leaves as one vector, (), float32; infinite where an entry is not finite."""
    _, largest, length = direction(tree)
    return jnp.where(jnp.isfinite(largest), largest * length, jnp.inf)


def clip(tree: Tree, bound: Array | float) -> tuple[Tree, Array]:
    """The tree scaled down to a norm of at most `bound`, in float32, and the norm that it had, (), float32.

    Guarantees:
        bounded norm whatever the reply: also of infinite, huge and NaN entries, of which nothing is kept.
        direction: what is finite keeps it.
    """
    scaled, largest, length = direction(tree)
    size = jnp.where(jnp.isfinite(largest), largest * length, jnp.inf)
    short = (size * (1 + SLACK) <= bound) & ((length > 0.5) | (largest == 0))
    scale = bound / (jnp.maximum(length, 1.0) * (1 + SLACK))
    kept = jax.tree.map(lambda leaf, s: jnp.where(short, leaf.astype(jnp.float32), s * scale), tree, scaled)
    return kept, size


def clip_layers(tree: Tree, bound: Array | float) -> tuple[Tree, Array]:
    """Each of K leaves scaled down to `bound` / sqrt(K), so that all together have a norm of at most `bound`.

    Per-layer clipping of McMahan et al., arXiv 1710.06963, section 3.1, with equal parts.

    Guarantees: as `clip`.
    """
    leaves, structure = jax.tree.flatten(tree)
    own = bound / jnp.sqrt(jnp.float32(max(len(leaves), 1)))
    return structure.unflatten([clip(leaf, own)[0] for leaf in leaves]), norm(tree)
