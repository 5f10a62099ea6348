"""Codecs that send every entry as one of a few levels, with scales for every row of entries: what they have in common.

A row is a leaf, or `block` entries of it, counted among those that travel. Decoding is written once and runs in JAX, where
it is simulated, and in NumPy, where packed bytes are read: same operations, same order, same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedsim.wire.codecs.form import (
    Codec,
    Coded,
    Read,
    Sent,
    Write,
    filled,
    levels_read,
    noted,
    travelling,
    travelling_count,
    written,
)
from fedsim.wire.prices import Tree

TINY = 2.0**-100  # a scale below it is zero: machines differ in what becomes of numbers near the least that there is

Choose = Callable[[Array, Array, Array], tuple[tuple[Array, ...], Array]]
"""(rows (R, B), float32; which entries are there (R, B), bool; key) -> scales, (R, 1) each, and levels (R, B)."""
Decode = Callable[..., Any]
"""(jnp or np, levels, *scales) -> values, float32."""


class Levels(NamedTuple):
    """What travels of a leaf."""

    scales: Array  # (R, c), float32
    level: Array  # shape of the leaf, int32, from 0
    bits: Array | int  # of a level


def rounded(xp: Any, product: Any) -> Any:
    """A product before it is added to, float32, without its last bit: half to even.

    Compilers may round a product and a sum once instead of twice, and do so on one machine and not on the next, whatever
    barrier stands between. A rounding of its own, by whole numbers, is the same everywhere.
    """
    if xp is jnp:
        return lax.reduce_precision(product, 8, 22)
    words = np.asarray(product, np.float32).view(np.uint32)
    words = (words + ((words >> np.uint32(1)) & np.uint32(1))) & np.uint32(0xFFFFFFFE)
    return np.where(np.isfinite(product), words.view(np.float32), product)


def table(xp: Any, values: np.ndarray, level: Any) -> Any:
    """`values[level]`, float32."""
    return xp.asarray(values.astype(np.float32))[level]


def by_levels(
    name: str,
    bits: int | Callable[..., Any],
    choose: Choose,
    decode: Decode,
    scales: int = 1,
    block: int = 0,
    on_values: bool = True,
) -> Codec:
    """A codec of levels.

    Args:
        bits: of a level; or (jnp or np, *scales) -> bits, 16 at most, of a codec whose rows are whole leaves.
        scales: how many a row has.
        block: entries of a row; 0 for the whole leaf.
    """

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        keys = [jax.random.fold_in(key, number) for number in range(len(coded))]
        return {leaf: one(sent, key) for (leaf, sent), key in zip(coded.items(), keys, strict=True)}, state

    def one(sent: Sent, key: Array) -> Sent:
        rows, live = in_rows(sent, block)
        found, level = choose(rows, live, key)
        finite = (jnp.isfinite(rows) | ~live).all(axis=1, keepdims=True)  # least and largest may hide what is no number
        found = tuple(jnp.where(finite, tidy(scale.astype(jnp.float32)), jnp.nan) for scale in found)
        # Levels of what is not finite are of no use, but have to be levels.
        level = jnp.clip(level.astype(jnp.int32), 0, 2 ** (bits if isinstance(bits, int) else 16) - 1)
        value = from_rows(decode(jnp, level, *found), sent, block).astype(sent.value.dtype)
        value = value if sent.mask is None else jnp.where(sent.mask, value, jnp.zeros_like(value))
        each = bits if isinstance(bits, int) else bits(jnp, *(scale[0, 0] for scale in found)).astype(jnp.uint32)
        own = Levels(jnp.concatenate([jnp.zeros((len(rows), 0)), *found], axis=1), from_rows(level, sent, block), each)
        side = sent.side + 4 * scales * rows_there(sent, block)
        return Sent(value, sent.mask, each, side, noted(sent, name, own))

    def pack(coded: Coded, write: Write) -> bytes:
        parts = []
        for sent in coded.values():
            own: Levels = dict(sent.aux)[name]
            level = travelling(sent, own.level)
            there = np.asarray(own.scales, np.float32)[: _rows(len(level), sent, block)]
            wide = bits if isinstance(bits, int) else int(bits(np, *there[0])) if len(there) else 0
            parts += [there.astype("<f4").tobytes(), written(level, wide)]
        return b"".join(parts)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for leaf, sent in like.items():
            count = len(travelling(sent))
            rows = _rows(count, sent, block)
            there = np.frombuffer(data, "<f4", rows * scales, at).reshape(rows, scales).astype(np.float32)
            wide = bits if isinstance(bits, int) else int(bits(np, *there[0])) if rows else 0
            level = levels_read(data, count, wide, at + there.nbytes)
            row = np.arange(count) // block if rows > 1 else np.zeros(count, np.int64)
            value = decode(np, level, *(there[row, number] for number in range(scales)))
            found[leaf] = filled(value.astype(np.asarray(sent.value).dtype), sent)
            at += there.nbytes + -(-count * wide // 8)
        return found

    most = bits if isinstance(bits, int) else 16
    adapts = not isinstance(bits, int)
    return Codec(name, encode, pack, unpack, on_values=on_values, last=True, bits=most, adapts=adapts)


def power_above(size: Array) -> Array:
    """A power of two above `size`, and at most twice it: to divide by it rounds nothing."""
    _, exponent = jnp.frexp(size)
    return lax.bitcast_convert_type((jnp.clip(exponent, -99, 127).astype(jnp.int32) + 127) << 23, jnp.float32)


def tidy(scale: Array) -> Array:
    """Zero where it is tiny, and no number where it is not finite, so that whatever it scales is none."""
    return jnp.where(jnp.isfinite(scale), jnp.where(jnp.abs(scale) < TINY, 0.0, scale), jnp.nan)


def in_rows(sent: Sent, block: int) -> tuple[Array, Array]:
    """Entries as float32 in rows, (R, B), those that travel in front; and which of them there are."""
    flat, count = sent.value.reshape(-1).astype(jnp.float32), math.prod(sent.value.shape)
    if _single(count, block):
        return flat[None], (jnp.ones(count, bool) if sent.mask is None else sent.mask.reshape(-1))[None]
    padded = -(-count // block) * block
    if sent.mask is None:
        rows = jnp.pad(flat, (0, padded - count))
        return rows.reshape(-1, block), (jnp.arange(padded) < count).reshape(-1, block)
    mask = sent.mask.reshape(-1)
    rows = jnp.zeros(padded).at[jnp.where(mask, _place(mask), padded)].set(flat, mode="drop")
    return rows.reshape(-1, block), (jnp.arange(padded) < mask.sum()).reshape(-1, block)


def from_rows(rows: Array, sent: Sent, block: int) -> Array:
    """The inverse of `in_rows`; anything where nothing travels."""
    shape, flat = sent.value.shape, rows.reshape(-1)
    count = math.prod(shape)
    if sent.mask is None or _single(count, block):
        return flat[:count].reshape(shape)
    return flat[_place(sent.mask.reshape(-1))].reshape(shape)


def rows_there(sent: Sent, block: int) -> Array | int:
    """Rows with an entry that travels: of a leaf of which nothing does, none."""
    count = math.prod(sent.value.shape)
    if sent.mask is None:
        return _rows(count, sent, block)
    if _single(count, block):
        return sent.mask.any().astype(jnp.uint32)
    return (travelling_count(sent) + jnp.uint32(block - 1)) // jnp.uint32(block)


def _place(mask: Array) -> Array:
    return jnp.maximum(jnp.cumsum(mask, dtype=jnp.int32) - 1, 0)


def _single(count: int, block: int) -> bool:
    return not block or count <= block


def _rows(there: int, sent: Sent, block: int) -> int:
    if sent.mask is not None and not there:
        return 0
    return 1 if _single(math.prod(np.shape(sent.value)), block) else -(-there // block)
