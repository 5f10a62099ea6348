"""What a message costs: the price of every leaf in bytes, codecs that lower it, and real packers as their oracle.

Bytes are the raw little-endian payload of all leaves and the codecs' side data: no names, framing, transport or
encryption. An array costs `size * itemsize`. Only a codec may claim less, by putting a `Packet` in the array's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any


class Packet(NamedTuple):
    """A leaf that travels encoded: what the receiver decodes, and the exact size of what was sent."""

    value: Array  # decoded
    nbytes: Array  # (), uint32: bytes on the wire; (M,) in a broadcast message, where it differs by client


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerClient:
    """Marks a part of a message that differs by client: leaves have a leading axis M, in the cohort's order."""

    tree: Tree


def parts(message: Tree) -> list[tuple[str, Any]]:
    """A message's named nodes: arrays, packets, and per-client parts, each whole."""
    nodes = jax.tree_util.tree_leaves_with_path(message, is_leaf=lambda n: is_packet(n) or isinstance(n, PerClient))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), node) for path, node in nodes]


def for_client(message: Tree, place: int) -> Tree:
    """The message as the cohort's client at `place` reads it: own parts picked, packets decoded."""

    def own(node: Any) -> Any:
        return jax.tree.map(lambda a: a[place], unwrap(node.tree)) if isinstance(node, PerClient) else node

    return unwrap(jax.tree.map(own, message, is_leaf=lambda n: is_packet(n) or isinstance(n, PerClient)))


class Codec(NamedTuple):
    """`encode` maps a tree of arrays to a tree of packets inside jit; `pack`/`unpack` do it for real, on one leaf."""

    encode: Callable[[Tree], Tree]
    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, tuple[int, ...]], np.ndarray]


def is_packet(node: object) -> bool:
    """For `is_leaf`: packets stay whole."""
    return isinstance(node, Packet)


def unwrap(tree: Tree) -> Tree:
    """The tree that the receiver sees: packets replaced by their decoded values."""
    return jax.tree.map(lambda node: node.value if is_packet(node) else node, tree, is_leaf=is_packet)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves (packets whole) with their paths; a bare array is called `message`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packet)
    return [(jax.tree_util.keystr(path, simple=True, separator="/") or "message", leaf) for path, leaf in leaves]


def array_bytes(leaf: Any) -> int:
    """Bytes of an array or of its shape: size times itemsize; typed PRNG keys cost their words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def price(tree: Tree) -> dict[str, int]:
    """Bytes of one message, per leaf. Needs shapes only, unless a packet's price is data.

    Raises:
        ValueError: a packet whose price is not known yet (inside jit, or a bare shape).
    """
    prices = {}
    for name, leaf in named_leaves(tree):
        if is_packet(leaf):
            if isinstance(leaf.nbytes, (jax.ShapeDtypeStruct, jax.core.Tracer)):
                raise ValueError(f"Expected the price of packet {name!r} to be a value; price it after it was made.")
            if np.ndim(leaf.nbytes):
                raise ValueError(f"Expected packet {name!r} to have one price; `for_each` gives prices by client.")
            prices[name] = int(leaf.nbytes)
        else:
            prices[name] = array_bytes(leaf)
    return prices


def price_shapes(shapes: Tree, codec: Codec | None = None) -> dict[str, int]:
    """What `price` gives for a message of these shapes after `codec`, before there is one: no array is made.

    Raises:
        ValueError: a packet's price depends on the values.
    """
    if codec is None:
        return price(shapes)
    prices: dict[str, int] = {}

    def trace(tree: Tree) -> None:
        # A price that follows from shapes is a number here; one that follows from values stays a tracer, and is refused.
        with jax.ensure_compile_time_eval():
            prices.update(price(codec.encode(tree)))

    jax.eval_shape(trace, shapes)
    return prices


def for_each(leaf: Any, members: int) -> np.ndarray:
    """Bytes of broadcasting one leaf to so many clients, (M,) int64: the same for each, or as a packet's prices say."""
    own = np.asarray(leaf.nbytes) if is_packet(leaf) and np.ndim(leaf.nbytes) else sum(price(leaf).values())
    return np.broadcast_to(own, members).astype(np.int64)


def to_bytes(leaf: Any) -> bytes:
    """The little-endian payload of one array."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def serialise(tree: Tree, codec: Codec | None = None) -> bytes:
    """The payload of one message as it would really be sent; the tests compare its length with `price`."""
    pack = to_bytes if codec is None else lambda leaf: codec.pack(np.asarray(leaf))
    return b"".join(pack(leaf.value) if is_packet(leaf) else to_bytes(leaf) for _, leaf in named_leaves(tree))


def cast(dtype: str) -> Codec:
    """Sends floating-point leaves as `dtype` ("bfloat16", "float16"); the receiver decodes them back.

    Guarantees: relative error at most half a unit in the last place of `dtype`, in its range.
    """
    wire = jnp.dtype(dtype)

    def encode_leaf(leaf: Any) -> Any:
        if is_packet(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return Packet(leaf.astype(wire).astype(leaf.dtype), jnp.uint32(leaf.size * wire.itemsize))

    def encode(tree: Tree) -> Tree:
        return jax.tree.map(encode_leaf, tree, is_leaf=is_packet)

    def pack(leaf: np.ndarray) -> bytes:
        return to_bytes(leaf.astype(wire))

    def unpack(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(data, wire).reshape(shape).astype(np.float32)

    return Codec(encode, pack, unpack)


def codec(name: str) -> Codec | None:
    """The codec of a config's `codec_up` or `codec_down`; None for "none"."""
    return None if name == "none" else cast(name)


def ranked(tree: Tree, ranks: Array, axis: int) -> Tree:
    """Prices padded factors by what is really sent: only the first `ranks` entries along `axis` of every leaf.

    Args:
        tree: leaves padded with zeros to the largest rank along `axis`, as arrays or cast.
        ranks: (), int32: this client's own rank; (M,) in a broadcast message, of which each client reads its own part.
        axis: which axis of each leaf is the rank.
    """

    def packet(leaf: Any) -> Packet:
        value = unwrap(leaf)
        nbytes = leaf.nbytes if is_packet(leaf) else jnp.uint32(array_bytes(leaf))
        return Packet(value, jnp.asarray(ranks).astype(jnp.uint32) * (nbytes // jnp.uint32(value.shape[axis])))

    return jax.tree.map(packet, tree, is_leaf=is_packet)
