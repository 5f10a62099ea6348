"""Marks: which parts of a message the run's codecs act on, which entries travel, what was sent before.

The engine turns a marked reply into decoded values and prices by `arrive`, a marked message by `depart`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs import Codec, Sent, cost, nbytes
from fedsim.wire.prices import Packet, PerClient, Tree, array_bytes, is_packet, unwrap


@partial(jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["change"])
@dataclass(frozen=True)
class Coded:
    """Marks what the run's codecs act on; see `coded`."""

    tree: Tree
    change: bool


@partial(jax.tree_util.register_dataclass, data_fields=["leaf", "entries"], meta_fields=["axis"])
@dataclass(frozen=True)
class Kept:
    """Marks the entries of a leaf that travel; see `kept`."""

    leaf: Array
    entries: Array | np.ndarray
    axis: int | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Again:
    """Marks what was sent before; see `again`."""

    tree: Tree


def coded(tree: Tree, change: bool = True) -> Coded:
    """A part of a reply or message on which the run's codecs act.

    Args:
        change: it is a difference, which may be clipped, noised, thinned out and fed back; else values (factors,
            prototypes, images), which may only be cast or quantised.
    """
    return Coded(tree, change)


def kept(tree: Tree, entries: Array | np.ndarray, axis: int | None = None) -> Tree:
    """Only these entries of every leaf travel for this client: ranks, blocks, classes, nothing at all.

    Args:
        tree: leaves at their full, padded size; what does not travel arrives as zero.
        entries: a mask of the leaf's shape, bool; or with `axis` how many travel along it, the first ones, (), int32.
            In a broadcast message the number may be (M,), one for each client, which then reads its own part itself.
    """

    def mark(leaf: Any) -> Any:
        return (
            Coded(kept(leaf.tree, entries, axis), leaf.change) if isinstance(leaf, Coded) else Kept(leaf, entries, axis)
        )

    return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, Coded))


def again(tree: Tree) -> Again:
    """What every member still in the round was sent earlier in it: read once more, at no cost.

    The same arrays as in the earlier message, broadcast or per client; anything else is refused.
    """
    return Again(tree)


def is_mark(node: object) -> bool:
    """For `is_leaf`: marked parts, packets and per-client parts stay whole."""
    return isinstance(node, (Coded, Kept, Again, PerClient)) or is_packet(node)


def thins(tree: Tree) -> bool:
    """Whether a part is marked of which only some entries travel."""
    kept = [
        isinstance(node, Kept) or (isinstance(node, (Coded, PerClient)) and thins(node.tree)) for _, node in named(tree)
    ]
    return any(kept)


def unmarked(tree: Tree) -> Tree:
    """The values alone, as the algorithm gave them."""

    def bare(node: Any) -> Any:
        if isinstance(node, (Coded, Again)):
            return unmarked(node.tree)
        if isinstance(node, PerClient):
            return PerClient(unmarked(node.tree))
        return node.leaf if isinstance(node, Kept) else node

    return jax.tree.map(bare, tree, is_leaf=is_mark)


def whole(tree: Tree) -> Tree:
    """The tree as if every entry of its leaves travelled; codecs' marks stay."""

    def all_of(node: Any) -> Any:
        if isinstance(node, Coded):
            return Coded(whole(node.tree), node.change)
        if isinstance(node, PerClient):
            return PerClient(whole(node.tree))
        return node.leaf if isinstance(node, Kept) else node

    return jax.tree.map(all_of, tree, is_leaf=is_mark)


def news(message: Tree) -> Tree:
    """The message without what was sent before, which costs nothing."""
    return jax.tree.map(lambda node: () if isinstance(node, Again) else node, message, is_leaf=is_mark)


def is_coded(tree: Tree) -> bool:
    """Whether a part is marked for the codecs."""
    nodes = [node for _, node in named(tree)]
    return any(isinstance(node, Coded) or (isinstance(node, PerClient) and is_coded(node.tree)) for node in nodes)


def named(tree: Tree) -> list[tuple[str, Any]]:
    """The nodes of a tree with their names, marked ones whole."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_mark)
    return [(path_name(path), node) for path, node in nodes]


def sent(leaf: Array | Kept) -> Sent:
    """A leaf on its way, before any codec."""
    value = leaf.leaf if isinstance(leaf, Kept) else leaf
    bits = 8 * array_bytes(jax.ShapeDtypeStruct((), value.dtype))
    if not isinstance(leaf, Kept):
        return Sent(value, None, bits)
    mask = jnp.asarray(leaf.entries)
    if leaf.axis is not None:
        first = jnp.arange(value.shape[leaf.axis]) < leaf.entries
        mask = jnp.broadcast_to(
            jnp.expand_dims(first, [a for a in range(value.ndim) if a != leaf.axis % value.ndim]), value.shape
        )
    return Sent(jnp.where(mask, value, jnp.zeros((), value.dtype)), mask, bits)


def changes(tree: Tree) -> dict[str, Sent]:
    """The marked changes of one reply by name, before any codec: one vector to codecs that look at all of it."""
    found = {
        joined(name, inner): sent(leaf)
        for name, node in named(tree)
        if isinstance(node, Coded) and node.change
        for inner, leaf in named(node.tree)
    }
    return dict(sorted(found.items()))


def unmarked_leaves(tree: Tree) -> list[str]:
    """Names of the parts of a reply that are not marked as changes."""
    return [name or "message" for name, node in named(tree) if not (isinstance(node, Coded) and node.change)]


def arrive(tree: Tree, codec: Codec | None, key: Array, common: Array, state: Tree = ()) -> tuple[Tree, Tree]:
    """One client's reply as the server decodes it: marks become packets, which say what was sent; inside jit.

    Args:
        key, common: of this client, and of all clients of the exchange.
        state: what the client keeps for the codec.

    Raises:
        ValueError: a marked leaf that the codec cannot act on.
    """
    found, state = on_the_way(tree, codec, key, common, state)
    return jax.tree.map(lambda node: packet(node) if isinstance(node, Sent) else node, found, is_leaf=is_sent), state


def on_the_way(tree: Tree, codec: Codec | None, key: Array, common: Array, state: Tree) -> tuple[Tree, Tree]:
    """The tree with a `Sent` for every marked leaf, and the codec's state."""
    by_kind: dict[bool, dict[str, Sent]] = {True: {}, False: {}}  # marked leaves, by whether they are changes
    for name, node in named(tree):
        if isinstance(node, Coded):
            by_kind[node.change] |= {joined(name, inner): sent(leaf) for inner, leaf in named(node.tree)}
    by_kind = {change: dict(sorted(leaves.items())) for change, leaves in by_kind.items()}  # the order on the wire
    if codec is not None:
        refuse(codec, by_kind)
        if by_kind[True]:
            by_kind[True], state = codec.encode(by_kind[True], key, common, state)
        if by_kind[False]:
            by_kind[False] = codec.encode(by_kind[False], key, common, ())[0]

    def place(path: Any, node: Any) -> Any:
        name = path_name(path)
        if isinstance(node, Coded):
            own = by_kind[node.change]
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: own[joined(name, path_name(path))], node.tree, is_leaf=is_mark
            )
        return sent(node) if isinstance(node, Kept) else node

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_mark), state


class Most(NamedTuple):
    """What the leaves of a reply cost at most, whatever their values."""

    entries: dict[str, int]  # bytes of all of a leaf's entries
    side: dict[str, Array | int]  # beside them
    sparse: dict[str, int]  # leaves of which a codec leaves entries out -> bytes of what it leaves in, all together


def most(tree: Tree, codec: Codec | None, key: Array, common: Array, state: Tree = ()) -> Most:
    """Bounds of a reply whose prices depend on values, from shapes; arguments as of `arrive`.

    What is a packet already costs as much as its array.
    """
    found, _ = on_the_way(whole(tree), codec, key, common, state)
    nodes = {
        path_name(path) or "message": node for path, node in jax.tree_util.tree_leaves_with_path(found, is_leaf=is_sent)
    }
    leaves = {name: node for name, node in nodes.items() if isinstance(node, Sent)}
    entries = {name: array_bytes(unwrap(node)) for name, node in nodes.items() if name not in leaves}
    entries |= {name: (math.prod(one.value.shape) * one.bits + 7) // 8 for name, one in leaves.items()}
    sparse = {name: one for name, one in leaves.items() if one.mask is not None}
    left = 0
    if sparse and codec is not None:
        bits = max(one.bits for one in sparse.values())
        left = codec.most(sum(math.prod(one.value.shape) for one in sparse.values())) * bits // 8
        left += len(sparse) * (bits % 8 > 0)  # each is a whole number of bytes
    return Most(entries, {name: one.side for name, one in leaves.items()}, dict.fromkeys(sparse, left))


def packet(sent: Sent) -> Any:
    """A leaf with its price; one that travels whole and as it is stays an array, whose price needs no value."""
    if (
        sent.mask is None
        and isinstance(sent.side, int)
        and sent.side == 0
        and sent.bits == 8 * sent.value.dtype.itemsize
    ):
        return sent.value
    return Packet(sent.value, jnp.asarray(nbytes(sent), jnp.uint32))


def path_name(path: Any) -> str:
    """A path as the record writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def joined(*names: str) -> str:
    """Names of a node and of a leaf in it; a bare one has none."""
    return "/".join(filter(None, names))


def is_sent(node: object) -> bool:
    """For `is_leaf`: leaves on their way, and packets, stay whole."""
    return isinstance(node, Sent) or is_packet(node)


def refuse(codec: Codec, by_kind: dict[bool, dict[str, Sent]]) -> None:
    """Raises `ValueError` for leaves that a codec cannot act on."""
    for name, one in {**by_kind[True], **by_kind[False]}.items():
        if not jnp.issubdtype(one.value.dtype, jnp.floating):
            raise ValueError(
                f"Expected leaf {name!r}, marked by wire.coded, to hold floating-point numbers for codec {codec.name}, not "
                f"{one.value.dtype}; leave the mark away, or choose none."
            )
    if by_kind[False] and not codec.on_values:
        raise ValueError(
            f"Expected codec {codec.name} to get changes alone, but {next(iter(by_kind[False]))!r} is a value "
            "(wire.coded(..., change=False)); choose one that acts on values: bfloat16, float16, quantise(8)."
        )


def depart(codec: Codec | None, message: Tree, key: Array) -> Tree:
    """A message as its receivers decode it, marks turned into packets; inside jit. `Again` parts stay.

    Raises:
        ValueError: a marked leaf that the codec cannot act on; a codec with a state, or one that thins out.
    """
    if codec is not None and not codec.on_values:
        raise ValueError(
            f"Expected codec_down={codec.name!r} to act on values, as a client that misses a round misses what was sent; "
            "choose bfloat16, float16 or quantise(8)."
        )

    def one(tree: Tree, key: Array) -> Tree:
        return arrive(as_value(tree), codec, key, key)[0]

    def node(number: int, part: Any) -> Any:
        own = jax.random.fold_in(key, number)
        if isinstance(part, PerClient):
            members = min((leaf.shape[0] for leaf in jax.tree.leaves(part.tree)), default=0)
            return PerClient(jax.vmap(one)(part.tree, jax.random.split(own, members)))
        return part if isinstance(part, Again) else broadcast(as_value(part), codec, own)

    nodes, structure = jax.tree.flatten(message, is_leaf=is_mark)
    return structure.unflatten([node(number, part) for number, part in enumerate(nodes)])


def as_value(tree: Tree) -> Tree:
    """Of a message every marked part is a value: nothing is fed back."""

    def value(node: Any) -> Any:
        return Coded(node.tree, change=False) if isinstance(node, Coded) else node

    return jax.tree.map(value, tree, is_leaf=is_mark)


def broadcast(part: Any, codec: Codec | None, key: Array) -> Any:
    """One part for all clients. Where a leaf's entries are a number for each, so is its price: values are the same."""

    def by_client(node: Any) -> bool:
        return isinstance(node, Kept) and node.axis is not None and node.entries.ndim == 1

    def all_of(tree: Tree) -> Tree:
        return jax.tree.map(lambda node: node.leaf if by_client(node) else node, tree, is_leaf=is_mark)

    inside = isinstance(part, Coded)
    tree = part.tree if inside else part
    found, _ = on_the_way(Coded(all_of(tree), part.change) if inside else all_of(tree), codec, key, key, ())

    def priced(node: Any, leaf: Any) -> Any:
        if not by_client(node):
            return packet(leaf) if isinstance(leaf, Sent) else leaf
        whole = leaf if isinstance(leaf, Sent) else sent(leaf)
        entries = node.entries.astype(jnp.uint32) * jnp.uint32(whole.value.size // whole.value.shape[node.axis])
        return Packet(whole.value, cost(entries, whole.bits, whole.side))

    return jax.tree.map(priced, tree, found, is_leaf=is_mark)
