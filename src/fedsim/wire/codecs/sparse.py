"""Codecs that leave entries out: all but the largest, some at random, whole blocks. They write which; the entries go on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs.chains import closed
from fedsim.wire.codecs.form import (
    Codec,
    Coded,
    Read,
    Sent,
    Write,
    check,
    check_flag,
    cut,
    entries_of,
    key_read,
    key_written,
    known,
    levels_read,
    noted,
    written,
)
from fedsim.wire.prices import Tree


def topk(share: float, feedback: bool = True) -> Codec:
    """The largest share of all entries, with indices; the rest is kept for the next time.

    The k largest by absolute value over all leaves together, k = ceil(share * entries that would travel); equal ones in
    the leaves' order. Each travels with its place among all entries, ceil(log2(entries)) bits. Sparse updates with
    memory: Stich et al., arXiv 1809.07599, algorithm 1.

    Guarantees: |error|^2 <= (1 - share) |x|^2; what travels and what is kept add up to the change and what was kept before.
    """
    check_share(share, "topk(0.01)")
    check_flag("feedback", feedback, "topk(0.01, feedback=False)")

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        masks = known(coded)
        sizes = joined({name: jnp.where(mask, magnitude(coded[name].value), -1.0) for name, mask in masks.items()})
        count = count_of(share, joined(masks))
        wide = jnp.uint32(index_bits(entries_of(coded)))
        return thinned(coded, cut(ranks(-sizes) < count, coded), (count.astype(jnp.uint32) * wide + 7) // 8), state

    def pack(coded: Coded, write: Write) -> bytes:
        return written(np.flatnonzero(travels(coded)), index_bits(entries_of(coded))) + write(coded)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        wide, count = index_bits(entries_of(like)), share_of(share, int(travels(like).sum()))
        flat = np.zeros(entries_of(like), bool)
        flat[levels_read(data, count, wide)] = True
        return read(data[-(-count * wide // 8) :], masked(like, flat))

    name = f"topk({share})" if feedback else f"topk({share}, feedback=False)"
    return closed(Codec(name, encode, pack, unpack, most=partial(share_of, share), thins=True), feedback)


def randomk(share: float, feedback: bool = False) -> Codec:
    """A random share of all entries, scaled up to be unbiased; a seed in place of indices.

    k = ceil(share * n) of the n entries that would travel, drawn without replacement by the client's key. With feedback=True
    they are not scaled, and the rest is kept and added the next time: Stich et al., arXiv 1809.07599.

    Guarantees: unbiased, E|error|^2 = (n / k - 1) |x|^2; with feedback E|error|^2 = (1 - k / n) |x|^2 of what is sent.
    """
    check_share(share, "randomk(0.01)")
    check_flag("feedback", feedback, "randomk(0.01, feedback=True)")
    name = f"randomk({share}, feedback=True)" if feedback else f"randomk({share})"

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        flat = joined(known(coded))
        count = count_of(share, flat)
        entries, some = (each.astype(jnp.float32) for each in (flat.sum(dtype=jnp.int32), jnp.maximum(count, 1)))
        factor = jnp.float32(1.0) if feedback else entries / some
        # Whatever is not finite is told, even where it was not drawn.
        finite = jnp.stack([jnp.isfinite(sent.value).all() for sent in coded.values()]).all()
        scaled = {
            leaf: sent._replace(value=sent.value * jnp.where(finite, factor, jnp.nan).astype(sent.value.dtype))
            for leaf, sent in coded.items()
        }
        words = jax.random.key_data(key)
        sent = thinned(scaled, cut(drawn(key, flat) < count, coded), 4 * words.size)
        return with_first(sent, name, words), state

    def pack(coded: Coded, write: Write) -> bytes:
        return key_written(of_first(coded, name)) + write(coded)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        key, data = key_read(data)
        flat = travels(like)
        return read(data, masked(like, np.asarray(drawn(key, jnp.asarray(flat))) < share_of(share, int(flat.sum()))))

    made = Codec(
        name, encode, pack, unpack, most=partial(share_of, share), thins=True, overshoots=not feedback and share < 1
    )
    return closed(made, feedback)


def blocks(share: float, size: int = 256, feedback: bool = True) -> Codec:
    """The largest share of all blocks of entries, an index each; the rest is kept.

    Blocks are consecutive entries of all leaves together, the last one shorter; ceil(share * blocks) of them travel, those
    with the largest 2-norm, equal ones in order.

    Guarantees: |error|^2 <= (1 - share) |x|^2 where all blocks are whole.
    """
    check_share(share, "blocks(0.05)")
    check("size", size, int, 1, 2**30, "give blocks(0.05, 256)")
    check_flag("feedback", feedback, "blocks(0.05, feedback=False)")
    options = [str(share), *([str(size)] * (size != 256)), *(["feedback=False"] * (not feedback))]
    name = f"blocks({', '.join(options)})"

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        masks = known(coded)
        squares = joined(
            {leaf: jnp.where(mask, magnitude(coded[leaf].value) ** 2, 0.0) for leaf, mask in masks.items()}
        )
        count = number(len(squares))
        rows = jnp.pad(squares, (0, count * size - len(squares))).reshape(count, size)
        chosen = ranks(-rows.sum(axis=1)) < taken(count)
        flat = jnp.repeat(chosen, size)[: len(squares)]
        some = {leaf: mask & masks[leaf] for leaf, mask in cut(flat, coded).items()}
        return with_first(thinned(coded, some, length(count)), name, chosen), state

    def pack(coded: Coded, write: Write) -> bytes:
        chosen = of_first(coded, name)
        return written(np.flatnonzero(chosen), index_bits(len(chosen))) + write(coded)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        count = number(entries_of(like))
        chosen = np.zeros(count, bool)
        chosen[levels_read(data, taken(count), index_bits(count))] = True
        flat = np.repeat(chosen, size)[: entries_of(like)] & travels(like)
        return read(data[length(count) :], masked(like, flat))

    def number(entries: int) -> int:
        return max(-(-entries // size), 1)

    def taken(count: int) -> int:
        return math.ceil(share * count)

    def length(count: int) -> int:
        return -(-taken(count) * index_bits(count) // 8)

    def most(entries: int) -> int:
        return min(entries, taken(number(entries)) * size)

    return closed(Codec(name, encode, pack, unpack, most=most, thins=True), feedback)


def thinned(coded: Coded, masks: Mapping[str, Array], side: Array | int) -> dict[str, Sent]:
    """The leaves with these entries alone; what says which they are stands beside the first leaf."""
    sent = {}
    for number, (name, one) in enumerate(coded.items()):
        mask, value = masks[name], one.value
        paid = one.side + (side if number == 0 else 0)
        sent[name] = one._replace(value=jnp.where(mask, value, jnp.zeros_like(value)), mask=mask, side=paid)
    return sent


def with_first(coded: dict[str, Sent], name: str, own: Tree) -> dict[str, Sent]:
    """The leaves, the first of which says for the packer what belongs to all of them."""
    first, sent = next(iter(coded.items()))
    return coded | {first: sent._replace(aux=noted(sent, name, own))}


def of_first(coded: Coded, name: str) -> np.ndarray:
    """What `with_first` has said."""
    return np.asarray(dict(next(iter(coded.values())).aux)[name])


def joined(leaves: Mapping[str, Array]) -> Array:
    """All entries of all leaves, (N,)."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves.values()])


def travels(coded: Coded) -> np.ndarray:
    """Which of all entries travel, (N,)."""
    masks = [np.ones(np.shape(s.value), bool) if s.mask is None else np.asarray(s.mask) for s in coded.values()]
    return np.concatenate([mask.reshape(-1) for mask in masks])


def masked(like: Coded, flat: np.ndarray) -> dict[str, Sent]:
    """The leaves of which the receiver now knows what travels."""
    masks = cut(flat, like)
    return {name: sent._replace(mask=masks[name]) for name, sent in like.items()}


def magnitude(value: Array) -> Array:
    """Absolute values, float32; what is no number is the largest, so that it is sent, and the reply is left out."""
    size = jnp.abs(value.astype(jnp.float32))
    return jnp.where(jnp.isnan(size), jnp.inf, size)


def ranks(values: Array) -> Array:
    """The place of each in ascending order, (N,), int32; of equal ones in theirs."""
    order = jnp.argsort(values, stable=True)
    return jnp.zeros(values.shape, jnp.int32).at[order].set(jnp.arange(len(values)))


def drawn(key: Array, flat: Array) -> Array:
    """Places in a random order, (N,), int32, of entries of which those that may be drawn come first."""
    chance = jax.random.bits(key, flat.shape, jnp.uint32) >> 1
    return ranks(jnp.where(flat, chance, jnp.uint32(2**32 - 1)))


def count_of(share: float, flat: Array) -> Array:
    """ceil(share * entries that travel), (), int32."""
    return jnp.ceil(share * flat.sum(dtype=jnp.int32).astype(jnp.float32)).astype(jnp.int32)


def share_of(share: float, entries: int) -> int:
    """The same of so many, on the host, in the same float32."""
    return int(np.ceil(np.float32(share) * np.float32(entries)))


def index_bits(entries: int) -> int:
    """Bits of a place among so many."""
    return max(math.ceil(math.log2(max(entries, 1))), 1)


def check_share(share: float, remedy: str) -> None:
    """Raises `ValueError` for a share that is none."""
    check("share", share, float, 0, 1, f"of the entries; give {remedy}", open_=True)
