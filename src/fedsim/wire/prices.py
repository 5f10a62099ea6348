"""The price of every leaf of a message in bytes, and the marks by which a leaf may cost less than its array.

Bytes are the raw little-endian payload of all leaves and the codecs' side data: no names, framing, transport or
encryption. An array costs `size * itemsize`. Only a codec may claim less, by putting a `Packet` in the array's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
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
                raise ValueError(f"Expected packet {name!r} to have one price; `message_bytes` gives prices by client.")
            prices[name] = int(leaf.nbytes)
        else:
            prices[name] = array_bytes(leaf)
    return prices


def message_bytes(message: Tree, members: int) -> dict[str, np.ndarray]:
    """Bytes that each member of a cohort is sent, by leaf, (M,) int64: broadcast parts the same, own parts by client."""
    found = part_bytes(message, members)
    return {name: np.broadcast_to(np.asarray(each), members).astype(np.int64) for name, each in found.items()}


def part_bytes(message: Tree, members: int) -> dict[str, Any]:
    """As `message_bytes`, each a number or an array, () or (M,): of a message in a traced program, where they may be tracers."""
    prices: dict[str, Any] = {}
    for name, node in parts(message):
        if isinstance(node, PerClient):
            for leaf_name, leaf in named_leaves(node.tree):
                place = "/".join(filter(None, (name, leaf_name.removeprefix("message")))) or "message"
                prices[place] = leaf.nbytes if is_packet(leaf) else array_bytes(leaf) // max(members, 1)
        else:
            prices[name or "message"] = node.nbytes if is_packet(node) else array_bytes(node)
    return prices
