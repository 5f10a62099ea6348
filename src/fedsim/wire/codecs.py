"""Codecs, which make marked leaves cost less: `encode` inside jit, `pack` and `unpack` for real.

A codec maps a flat dict of `Sent`, all marked leaves of one message by name, to another, so that codecs compose:
`"topk(0.01)+quantise(8)"`. The price is computed once, at the end: ceil(kept entries * bits / 8) + side, for each leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedsim.config.calls import parse_call
from fedsim.config.words import nearest
from fedsim.wire.prices import Tree

CALL = "none, or codecs with + between them, like bfloat16 or topk(0.01)+quantise(8)"


class Sent(NamedTuple):
    """One leaf on its way: what the receiver decodes, and what that costs."""

    value: Array  # decoded; zero where nothing travels
    mask: Array | None = None  # bool, shape of `value`: the entries that travel; None for all
    bits: int = 32  # of each of them
    side: Array | int = 0  # bytes beside them: scales, indices
    aux: Tree = ()  # what of them does not follow from the values, for the packer


Coded = Mapping[str, Sent]
Write = Callable[[Coded], bytes]  # of the entries that travel
Read = Callable[[bytes, Coded], dict[str, np.ndarray]]


class Codec(NamedTuple):
    """Statistics are taken over the entries that travel. On the wire, `name` by `name`: side data, then entries.

    `pack(coded, write)` gives the bytes of what `encode` gave, `unpack(data, like, read)` the decoded values: `like` has
    zeros, and the masks that the receiver knows by itself. `write` and `read` are those of the codecs behind this one,
    at the end of which entries are written as they are.
    """

    name: str
    encode: Callable[[Coded, Array, Array, Tree], tuple[dict[str, Sent], Tree]]
    """(leaves, key of the client, common key of the exchange, state) -> leaves, state."""
    pack: Callable[[Coded, Write], bytes]
    unpack: Callable[[bytes, Coded, Read], dict[str, np.ndarray]]
    init: Callable[[Array, Mapping[str, Any]], Tree] = lambda key, shapes: ()
    """(key, shapes of the marked changes) -> what ONE client keeps for it; () for most."""
    on_values: bool = False  # whether it may act on what is no change: entry by entry, without state
    most: Callable[[int], int] = lambda entries: entries
    """(entries that would travel) -> entries that do, at most, all leaves together."""


def nbytes(sent: Sent) -> Array | int:
    """Bytes of one leaf: a Python integer where they follow from shapes, else (), uint32."""
    if sent.mask is None:
        return (math.prod(sent.value.shape) * sent.bits + 7) // 8 + sent.side
    return cost(sent.mask.sum(dtype=jnp.uint32), sent.bits, sent.side)


def cost(entries: Array, bits: int, side: Array | int) -> Array:
    """ceil(entries * bits / 8) + side, uint32; in bytes, as the bits of a large leaf do not fit into 32 of them."""
    whole, part = divmod(bits, 8)
    total = entries * jnp.uint32(whole) + jnp.asarray(side).astype(jnp.uint32)
    return total + entries // 8 * jnp.uint32(part) + (entries % 8 * jnp.uint32(part) + 7) // 8 if part else total


def travelling(sent: Sent) -> np.ndarray:
    """The entries that travel, (k,), in the leaf's order."""
    value = np.asarray(sent.value)
    return value.reshape(-1) if sent.mask is None else value[np.asarray(sent.mask)]


def filled(entries: np.ndarray, like: Sent) -> np.ndarray:
    """The leaf whose travelling entries these are; zeros elsewhere."""
    value = np.zeros(np.shape(like.value), np.asarray(like.value).dtype)
    value[np.ones(value.shape, bool) if like.mask is None else np.asarray(like.mask)] = entries
    return value


def write(coded: Coded) -> bytes:
    """Entries as they are, little-endian."""
    entries = [travelling(sent) for sent in coded.values()]
    return b"".join(np.ascontiguousarray(e, e.dtype.newbyteorder("<")).tobytes() for e in entries)


def read(data: bytes, like: Coded) -> dict[str, np.ndarray]:
    """The inverse of `write`."""
    found, at = {}, 0
    for name, sent in like.items():
        dtype, count = np.asarray(sent.value).dtype, len(travelling(sent))
        found[name] = filled(np.frombuffer(data, dtype.newbyteorder("<"), count, at), sent)
        at += count * dtype.itemsize
    return found


def cast(dtype: str) -> Codec:
    """Sends floating-point leaves as `dtype` ("bfloat16", "float16"); the receiver decodes them back.

    Guarantees: relative error at most half a unit in the last place of `dtype`, in its range.
    """
    wire = jnp.dtype(dtype)

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        def one(sent: Sent) -> Sent:
            return sent._replace(value=sent.value.astype(wire).astype(sent.value.dtype), bits=8 * wire.itemsize)

        return {name: one(sent) for name, sent in coded.items()}, state

    def pack(coded: Coded, write: Write) -> bytes:
        return b"".join(travelling(sent).astype(wire).tobytes() for sent in coded.values())

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for name, sent in like.items():
            entries = np.frombuffer(data, wire, len(travelling(sent)), at)
            found[name], at = filled(entries.astype(np.asarray(sent.value).dtype), sent), at + entries.nbytes
        return found

    return Codec(dtype, encode, pack, unpack, on_values=True)


def quantise(bits: int = 8) -> Codec:
    """Sends every entry as one of 2^bits equal steps between the leaf's least and largest, which travel as float32.

    Guarantees: an error of at most half a step, beside float32's own rounding.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"Expected 1 <= bits={bits} <= 16, a whole number; give quantise(8).")
    top = 2**bits - 1

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        return {name: one(sent) for name, sent in coded.items()}, state

    def one(sent: Sent) -> Sent:
        value, all_ = sent.value, sent.mask is None
        low = jnp.min(value, initial=jnp.inf, where=True if all_ else sent.mask)
        high = jnp.max(value, initial=-jnp.inf, where=True if all_ else sent.mask)
        low, high = (jnp.where(jnp.isfinite(end), end, 0.0) for end in (low, high))  # nothing travels
        step = (high - low) / top
        level = jnp.clip(jnp.round((value - low) / jnp.where(step > 0, step, 1.0)), 0, top)
        # Behind a barrier: a product and a sum rounded once, on one machine and not on the next, would not be equal.
        decoded = low + lax.optimization_barrier(level * step)
        value = decoded if sent.mask is None else jnp.where(sent.mask, decoded, 0.0)
        return Sent(value, sent.mask, bits, sent.side + 8, (low, step))

    def pack(coded: Coded, write: Write) -> bytes:
        parts = []
        for sent in coded.values():
            low, step = (np.float32(number) for number in sent.aux)
            level = np.rint((travelling(sent) - low) / (step or np.float32(1))).astype(np.int64)
            lines = (level[:, None] >> np.arange(bits - 1, -1, -1)) & 1
            parts += [np.array([low, step], "<f4").tobytes(), np.packbits(lines.astype(np.uint8)).tobytes()]
        return b"".join(parts)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for name, sent in like.items():
            low, step = np.frombuffer(data, "<f4", 2, at)
            count = len(travelling(sent))
            length = -(-count * bits // 8)
            lines = np.unpackbits(np.frombuffer(data, np.uint8, length, at + 8))[: count * bits].reshape(count, bits)
            level = lines.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))
            found[name], at = filled(low + level.astype(np.float32) * step, sent), at + 8 + length
        return found

    return Codec(f"quantise({bits})", encode, pack, unpack, on_values=True)


def topk(share: float) -> Codec:
    """Sends the largest `share` of all entries of a message, and keeps the rest for the next time (error feedback).

    The k largest by absolute value over all leaves together, k = ceil(share * entries that would travel); equal ones in
    the leaves' order. Each travels with its place among all entries, ceil(log2(entries)) bits. Sparse updates with
    memory: Stich et al., arXiv 1809.07599, algorithm 1.

    Guarantees: what travels and what is kept add up to the change and what was kept before.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"Expected 0 < share={share} <= 1, of the entries; give topk(0.01).")

    def init(key: Array, shapes: Mapping[str, Any]) -> dict[str, Array]:
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        whole = {name: sent.value + state[name] for name, sent in coded.items()} if state else unmasked(coded)
        known = {name: jnp.ones(s.value.shape, bool) if s.mask is None else s.mask for name, s in coded.items()}
        size = jnp.concatenate([jnp.where(known[n], jnp.abs(v), -1.0).reshape(-1) for n, v in whole.items()])
        entries = sum((mask.sum(dtype=jnp.int32) for mask in known.values()), jnp.int32(0))
        count = jnp.ceil(share * entries.astype(jnp.float32)).astype(jnp.int32)
        place = jnp.zeros(size.shape, jnp.int32).at[jnp.argsort(-size, stable=True)].set(jnp.arange(len(size)))
        taken, sent, rest, at = place < count, {}, {}, 0
        for number, (name, value) in enumerate(whole.items()):
            mask = taken[at : at + value.size].reshape(value.shape)
            at += value.size
            indices = (count * index_bits(coded) + 7) // 8 if number == 0 else 0
            sent[name] = coded[name]._replace(
                value=jnp.where(mask, value, 0.0), mask=mask, side=coded[name].side + indices
            )
            rest[name] = jnp.where(mask, 0.0, value)
        return sent, rest if state else state

    def pack(coded: Coded, write: Write) -> bytes:
        taken = np.concatenate([np.asarray(sent.mask).reshape(-1) for sent in coded.values()])
        wide = index_bits(coded)
        lines = (np.flatnonzero(taken)[:, None] >> np.arange(wide - 1, -1, -1)) & 1
        return np.packbits(lines.astype(np.uint8)).tobytes() + write(coded)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        known = [np.ones(np.shape(s.value), bool) if s.mask is None else np.asarray(s.mask) for s in like.values()]
        entries, wide = sum(int(mask.sum()) for mask in known), index_bits(like)
        count = int(np.ceil(np.float32(share) * np.float32(entries)))
        length = -(-count * wide // 8)
        lines = np.unpackbits(np.frombuffer(data, np.uint8, length))[: count * wide].reshape(count, wide)
        taken, masks, at = np.zeros(sum(mask.size for mask in known), bool), {}, 0
        taken[lines.astype(np.int64) @ (1 << np.arange(wide - 1, -1, -1))] = True
        for name, mask in zip(like, known, strict=True):
            masks[name], at = taken[at : at + mask.size].reshape(mask.shape), at + mask.size
        return read(data[length:], {name: sent._replace(mask=masks[name]) for name, sent in like.items()})

    def most(entries: int) -> int:
        return int(np.ceil(np.float32(share) * np.float32(entries)))  # as `encode` computes it

    return Codec(f"topk({share})", encode, pack, unpack, init, most=most)


def unmasked(coded: Coded) -> dict[str, Array]:
    """The values alone."""
    return {name: sent.value for name, sent in coded.items()}


def index_bits(coded: Coded) -> int:
    """Bits of a place among all entries of these leaves."""
    return max(math.ceil(math.log2(max(sum(math.prod(sent.value.shape) for sent in coded.values()), 1))), 1)


def chain(*codecs: Codec) -> Codec:
    """One codec after the other: each gets what the one before gave, and writes only what is its own."""
    first, *others = codecs
    if not others:
        return first
    rest = chain(*others)

    def init(key: Array, shapes: Mapping[str, Any]) -> Tree:
        states = first.init(key, shapes), rest.init(key, shapes)
        return states if jax.tree.leaves(states) else ()

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        of_first, of_rest = state or ((), ())
        keys = (jax.random.fold_in(key, 0), jax.random.fold_in(common, 0))
        coded, of_first = first.encode(coded, *keys, of_first)
        keys = (jax.random.fold_in(key, 1), jax.random.fold_in(common, 1))
        sent, of_rest = rest.encode(coded, *keys, of_rest)
        return sent, (of_first, of_rest) if state else state

    def pack(coded: Coded, write: Write) -> bytes:
        return first.pack(coded, lambda coded: rest.pack(coded, write))

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        return first.unpack(data, like, lambda data, like: rest.unpack(data, like, read))

    stateless, names = all(codec.on_values for codec in codecs), "+".join(codec.name for codec in codecs)
    return Codec(names, encode, pack, unpack, init, stateless, lambda entries: rest.most(first.most(entries)))


CODECS: dict[str, Callable[..., Codec]] = {
    "bfloat16": lambda: cast("bfloat16"),
    "float16": lambda: cast("float16"),
    "quantise": quantise,
    "topk": topk,
}


def codec(text: str, option: str = "codec") -> Codec | None:
    """The codec of a config's `codec_up` or `codec_down`; None for "none".

    Raises:
        ValueError: an unknown codec, or arguments that it does not take.
    """
    if text == "none":
        return None
    made = []
    for call in text.split("+"):
        name, args, options = parse_call(call.strip(), option)
        if name not in CODECS:
            raise ValueError(f"Expected {option}={text!r} to be {CALL}{nearest(name, CODECS)}.")
        try:
            made.append(CODECS[name](*args, **options))
        except TypeError as error:
            raise ValueError(f"Expected {option}={text!r} to be a call that {name} takes; {error}.") from None
    return chain(*made)
