"""The form of a codec, and the price of what it sends.

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
from jax import Array

from fedsim.wire.prices import Tree


class Sent(NamedTuple):
    """One leaf on its way: what the receiver decodes, and what that costs."""

    value: Array  # decoded; zero where nothing travels
    mask: Array | None = None  # bool, shape of `value`: the entries that travel; None for all
    bits: Array | int = 32  # of each of them; (), uint32, where it follows from values
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

    What is not finite arrives as not finite, somewhere in the message, so that whoever folds it can leave it out.
    """

    name: str
    encode: Callable[[Coded, Array, Array, Tree], tuple[dict[str, Sent], Tree]]
    """(leaves, key of the client, common key of the exchange, state) -> leaves, state."""
    pack: Callable[[Coded, Write], bytes]
    unpack: Callable[[bytes, Coded, Read], dict[str, np.ndarray]]
    init: Callable[[Array, Mapping[str, Any]], Tree] = lambda key, shapes: ()
    """(key, shapes of the marked changes) -> what ONE client keeps for it; () for most."""
    on_values: bool = False  # whether it may act on what is no change: without state, and leaving nothing out
    instead: str = "choose one that acts on values: bfloat16, quantise(8), qsgd(8), nf4, eden(4)"  # where it may not
    most: Callable[[int], int] = lambda entries: entries
    """(entries that would travel) -> entries that do, at most, all leaves together."""
    thins: bool = False  # whether it leaves entries out
    last: bool = False  # whether it writes the entries itself, so that no codec can stand behind it
    bits: int | None = None  # of an entry on the wire, at most, where they are known
    back: Callable[[Coded, Coded], dict[str, Sent]] | None = None
    """Of a codec that sends other leaves in place of those that it is given: (what it was given, its leaves as they leave
    the codecs behind it) -> what it was given as decoded, with the price of all that was sent for it."""
    adapts: bool = False  # whether the bits of an entry follow from values
    links: tuple[Codec, ...] = ()  # of which a chain is made
    link: Codec | None = None  # what a chain takes of it, which decodes and remembers for all its links together
    remembers: bool = False  # whether what did not arrive is kept and added the next time (error feedback)
    overshoots: bool = (
        False  # whether its error may be longer than what it is given, as of what is scaled up to be unbiased
    )
    private: bool = False  # whether it is to act on all that leaves a client: no part may go around it


def nbytes(sent: Sent) -> Array | int:
    """Bytes of one leaf: a Python integer where they follow from shapes, else (), uint32."""
    if sent.mask is None and isinstance(sent.bits, int):
        return (math.prod(sent.value.shape) * sent.bits + 7) // 8 + sent.side
    return cost(travelling_count(sent), sent.bits, sent.side)


def travelling_count(sent: Sent) -> Array:
    """How many entries travel, (), uint32."""
    if sent.mask is None:
        return jnp.uint32(math.prod(sent.value.shape))
    return sent.mask.sum(dtype=jnp.uint32)


def cost(entries: Array, bits: Array | int, side: Array | int) -> Array:
    """ceil(entries * bits / 8) + side, uint32; in bytes, as the bits of a large leaf do not fit into 32 of them."""
    whole, part = jnp.asarray(bits, jnp.uint32) // 8, jnp.asarray(bits, jnp.uint32) % 8
    total = entries * whole + jnp.asarray(side).astype(jnp.uint32)
    return total + entries // 8 * part + (entries % 8 * part + 7) // 8


def travelling(sent: Sent, array: Any = None) -> np.ndarray:
    """The entries that travel, (k,), in the leaf's order; of another array of its shape where one is given."""
    value = np.asarray(sent.value if array is None else array)
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


def written(levels: np.ndarray, bits: int) -> bytes:
    """Whole numbers below 2^bits, one behind the other, the highest bit first; ceil(k * bits / 8) bytes."""
    lines = (np.asarray(levels, np.int64)[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(lines.astype(np.uint8)).tobytes()


def levels_read(data: bytes, count: int, bits: int, at: int = 0) -> np.ndarray:
    """The inverse of `written`, (count,), int64, of a buffer from byte `at` on."""
    lines = np.unpackbits(np.frombuffer(data, np.uint8, -(-count * bits // 8), at))[: count * bits]
    return lines.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def check(name: str, value: Any, kind: type, low: float, high: float, remedy: str, open_: bool = False) -> None:
    """Raises `ValueError` unless low <= value <= high, or low < value where it is `open_`; a number of that kind."""
    right = (int,) if kind is int else (int, float)
    inside = isinstance(value, right) and not isinstance(value, bool) and low <= value <= high
    if not inside or (open_ and value == low):
        rule, what = "<" if open_ else "<=", ", a whole number" if kind is int else ""
        raise ValueError(f"Expected {low} {rule} {name}={value} <= {high}{what}; {remedy}.")


def check_flag(name: str, value: Any, remedy: str) -> None:
    """Raises `ValueError` unless a value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"Expected {name}={value} to be True or False; give {remedy}.")


def key_written(words: np.ndarray) -> bytes:
    """A key's words."""
    return np.asarray(words).astype("<u4").tobytes()


def key_read(data: bytes) -> tuple[Array, bytes]:
    """The key in front of a buffer, and what stands behind it."""
    count = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size
    words = np.frombuffer(data, "<u4", count).astype(np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words)), data[4 * count :]


def random_signs(key: Array, shape: tuple[int, ...]) -> Array:
    """1 or -1 with equal chance, float32."""
    return 1.0 - 2.0 * (jax.random.bits(key, shape, jnp.uint8) & 1).astype(jnp.float32)


def noted(sent: Sent, name: str, own: Tree) -> dict[str, Tree]:
    """The leaf's `aux` with what the codec of that name adds."""
    return {**dict(sent.aux), name: own}


def known(coded: Coded) -> dict[str, Array]:
    """Which entries travel, by leaf."""
    return {n: jnp.ones(s.value.shape, bool) if s.mask is None else s.mask for n, s in coded.items()}


def entries_of(coded: Coded) -> int:
    """Entries of all leaves together, travelling or not."""
    return sum(math.prod(np.shape(sent.value)) for sent in coded.values())


def cut(flat: Any, coded: Coded) -> dict[str, Any]:
    """A vector over all entries, leaf by leaf in their shapes."""
    found, at = {}, 0
    for name, sent in coded.items():
        count = math.prod(np.shape(sent.value))
        found[name], at = flat[at : at + count].reshape(np.shape(sent.value)), at + count
    return found
