"""Rotations: a random orthogonal matrix, which makes all entries of a message alike before they are rounded.

R = H D / sqrt(B): random signs D, then a Hadamard matrix H, in blocks of B entries of all leaves together. Only the seed of D
travels. Ailon and Chazelle 2009; for federated learning Suresh et al., arXiv 1611.00429.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs.chains import closed, linked
from fedsim.wire.codecs.form import (
    Codec,
    Coded,
    Read,
    Sent,
    Write,
    check,
    cut,
    entries_of,
    filled,
    key_read,
    key_written,
    known,
    nbytes,
    noted,
    random_signs,
)
from fedsim.wire.codecs.levels import rounded
from fedsim.wire.codecs.quantisers import lloyd, norm, signs
from fedsim.wire.codecs.sparse import joined, of_first, travels
from fedsim.wire.prices import Tree

LEAST = 128  # entries of a block, where a message has as many: below, the bias of a Hadamard rotation shows
LEAF = "rotated"  # the one leaf that travels in place of all


def rotate(block: int = 4096) -> Codec:
    """A random rotation of the message, for a codec behind it: rotate+quantise(4).

    All entries that travel are one vector, rotated by blocks of up to `block`, padded once; its bytes stand under the first leaf.
    The padding is charged.

    Guarantees: alone, what arrives is what was sent up to float32's rounding.
    """
    check_rotation(block, "rotate(4096)")
    name = "rotate" if block == 4096 else f"rotate({block})"

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        width = width_of(entries_of(coded), block)
        rows, there = gathered(coded, width)
        turned = hadamard(jnp, rows * random_signs(key, rows.shape)) * jnp.float32(width**-0.5)
        turned = jnp.where(jnp.isfinite(turned), turned, jnp.nan)
        mask = None
        if there is not None:
            blocks = (there + width - 1) // width
            mask = jnp.arange(rows.size) < blocks * width
            turned = jnp.where(mask.reshape(rows.shape), turned, 0.0)
        return {LEAF: Sent(turned.reshape(-1), mask, 32, 0, {name: jax.random.key_data(key)})}, state

    def back(given: Coded, after: Coded) -> dict[str, Sent]:
        inner, (first, *_) = after[LEAF], given
        width = width_of(entries_of(given), block)
        words = dict(inner.aux)[name]
        rows = rounded(jnp, inner.value).reshape(-1, width)  # what was decoded may be a product
        rows = (
            hadamard(jnp, rows) * jnp.float32(width**-0.5) * random_signs(jax.random.wrap_key_data(words), rows.shape)
        )
        values = spread(rows, given)
        found = {leaf: sent._replace(value=values[leaf], bits=0) for leaf, sent in given.items()}
        one, paid = found[first], nbytes(inner) + 4 * words.size
        return found | {first: one._replace(side=one.side + paid, aux=noted(one, name, inner))}

    def pack(coded: Coded, write: Write) -> bytes:
        inner: Sent = dict(next(iter(coded.values())).aux)[name]
        return key_written(of_first({LEAF: inner}, name)) + write({LEAF: inner})

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        key, data = key_read(data)
        width, flat = width_of(entries_of(like), block), travels(like)
        shape = -(-entries_of(like) // width), width
        mask = None if flat.all() else np.arange(math.prod(shape)) < -(-int(flat.sum()) // width) * width
        inner = Sent(np.zeros(math.prod(shape), np.float32), mask)  # type: ignore[arg-type] - an array of NumPy's
        rows = rounded(np, read(data, {LEAF: inner})[LEAF]).reshape(shape)
        rows = hadamard(np, rows) * np.float32(width**-0.5) * np.asarray(random_signs(key, shape))
        found, at = {}, 0
        for leaf, sent in like.items():
            count = math.prod(np.shape(sent.value)) if sent.mask is None else int(np.asarray(sent.mask).sum())
            entries = rows.reshape(-1)[at : at + count].astype(np.asarray(sent.value).dtype)
            found[leaf], at = filled(entries, sent), at + count
        return found

    return closed(Codec(name, encode, pack, unpack, on_values=True, back=back))


def drive(block: int = 4096) -> Codec:
    """One bit: the signs of the rotated message, scaled to be nearly unbiased.

    Vargaftik et al., arXiv 2105.08339, with the scale of their unbiased form, |Rx|^2 / |Rx|_1: a float32 for each block.

    Guarantees: E|error|^2 / |x|^2 near pi / 2 - 1 = 0.571. Unbiased under uniform rotations; the bias of this one falls with
    the dimension (docs/codecs.md).
    """
    check_rotation(block, "drive(4096)")

    def scale(rows: Array, live: Array) -> Array:
        along = jnp.sum(jnp.abs(rows), axis=1, keepdims=True, where=live)
        return norm(rows, live) ** 2 / jnp.where(along > 0, along, 1.0)

    name = "drive" if block == 4096 else f"drive({block})"
    return turned(name, block, lambda width: signs("signs", scale, width))


def eden(bits: int = 4, block: int = 4096) -> Codec:
    """1 to 6 bits: the rotated message at the best levels of a normal, scaled alike.

    Vargaftik et al., arXiv 2108.08842, algorithm 1 with Lloyd-Max centroids; scale |x|^2 / <centroids, Rx>, a float32 for each
    block. With one bit it is DRIVE.

    Guarantees: E|error|^2 / |x|^2 near 0.571, 0.133, 0.036, 0.0096 for 1 to 4 bits; unbiased as `drive`.
    """
    check("bits", bits, int, 1, 6, "give eden(4)")
    check_rotation(block, "eden(4, 4096)")
    name = f"eden({bits})" if block == 4096 else f"eden({bits}, {block})"
    return turned(name, block, lambda width: lloyd("levels", bits, width))


def turned(name: str, block: int, inner: Callable[[int], Codec]) -> Codec:
    """A rotation with the codec behind it whose rows are the blocks: (entries of a block) -> codec."""
    turn = rotate(block).link
    assert turn is not None

    def made(coded: Coded) -> Codec:
        return linked([turn, inner(width_of(entries_of(coded), block))])

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        return made(coded).encode(coded, key, common, ())[0], state

    def pack(coded: Coded, write: Write) -> bytes:
        return made(coded).pack(coded, write)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        return made(like).unpack(data, like, read)

    bits = inner(LEAST).bits
    return Codec(name, encode, pack, unpack, on_values=True, last=True, bits=bits)


def hadamard(xp: Any, rows: Any) -> Any:
    """Each row (R, B) times the Hadamard matrix of B, a power of two, by B log2(B) additions in one order."""
    count, width = rows.shape
    step = 1
    while step < width:
        pairs = rows.reshape(count, width // (2 * step), 2, step)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        rows = xp.stack([a + b, a - b], axis=2).reshape(count, width)
        step *= 2
    return rows


def width_of(entries: int, most: int) -> int:
    """Entries of a block, a power of two: the largest up to `most` that adds an eighth of padding at most, else the one
    that adds the least."""
    if entries <= LEAST:
        return 2 ** max(math.ceil(math.log2(max(entries, 1))), 3)
    widths = [2**n for n in range(int(math.log2(LEAST)), int(math.log2(most)) + 1)]
    padded = {width: -(-entries // width) * width for width in widths}
    fitting = [width for width in widths if padded[width] * 8 <= entries * 9]
    return max(fitting) if fitting else min(widths, key=lambda width: (padded[width], -width))


def gathered(coded: Coded, width: int) -> tuple[Array, Array | None]:
    """The entries that travel in front of rows (R, B), float32, and how many they are; None for all."""
    flat = joined({name: sent.value.astype(jnp.float32) for name, sent in coded.items()})
    padded = -(-len(flat) // width) * width
    if all(sent.mask is None for sent in coded.values()):
        return jnp.pad(flat, (0, padded - len(flat))).reshape(-1, width), None
    mask = joined(known(coded))
    place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, padded)
    return jnp.zeros(padded).at[place].set(flat, mode="drop").reshape(-1, width), mask.sum(dtype=jnp.int32)


def spread(rows: Array, coded: Coded) -> dict[str, Array]:
    """The inverse of `gathered`, in the leaves' types; zeros elsewhere."""
    flat = rows.reshape(-1)
    if all(sent.mask is None for sent in coded.values()):
        values = cut(flat, coded)
    else:
        mask = joined(known(coded))
        place = jnp.maximum(jnp.cumsum(mask, dtype=jnp.int32) - 1, 0)
        values = cut(jnp.where(mask, flat[place], 0.0), coded)
    return {name: values[name].astype(sent.value.dtype) for name, sent in coded.items()}


def check_rotation(block: int, remedy: str) -> None:
    """Raises `ValueError` unless a block may have so many entries."""
    check("block", block, int, LEAST, 2**20, f"give {remedy}")
    if block & (block - 1):
        raise ValueError(f"Expected block={block} to be a power of two, for a Hadamard matrix; give {remedy}.")
