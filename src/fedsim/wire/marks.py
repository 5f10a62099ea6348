"""Marks: which parts of a message the run's codecs act on, which entries travel, what was sent before.

The engine turns a marked reply into decoded values and prices by `arrive`, a marked message by `depart`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs import Codec, Sent, closed, cost, linked, nbytes
from fedsim.wire.prices import Packet, PerClient, Tree, array_bytes, is_packet, unwrap


@partial(jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["change", "by"])
@dataclass(frozen=True)
class Coded:
    """Marks what codecs act on; see `coded`."""

    tree: Tree
    change: bool
    by: Codec | None = None


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


def coded(tree: Tree, change: bool = True, by: Codec | None = None) -> Coded:
    """A part of a reply or message on which the run's codecs act, or one that the algorithm brings.

    Args:
        change: it is a difference, which may be clipped, noised, thinned out and fed back; else values (factors,
            prototypes, images), which may only be cast or quantised.
        by: the method's own codec, made once, when the algorithm is constructed; the run's then leave this part alone.

    Raises:
        ValueError: a codec of the algorithm's that remembers or leaves entries out.
    """
    if by is not None and (by.thins or not by.on_values):
        raise ValueError(
            f"Expected the codec of wire.coded(..., by={by.name}) to keep nothing and to leave nothing out; take one that "
            "rounds (nnadq, qsgd(8)), and say by wire.kept what travels."
        )
    return Coded(tree, change, by)


def kept(tree: Tree, entries: Array | np.ndarray, axis: int | None = None) -> Tree:
    """Only these entries of every leaf travel for this client: ranks, blocks, classes, nothing at all.

    Args:
        tree: leaves at their full, padded size; what does not travel arrives as zero.
        entries: a mask of the leaf's shape, bool; or with `axis` how many travel along it, the first ones, (), int32.
            In a broadcast message the number may be (M,), one for each client, which then reads its own part itself.
    """

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Coded):
            return replace(leaf, tree=kept(leaf.tree, entries, axis))
        return Kept(leaf, entries, axis)

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
            return replace(node, tree=whole(node.tree))
        if isinstance(node, PerClient):
            return PerClient(whole(node.tree))
        return node.leaf if isinstance(node, Kept) else node

    return jax.tree.map(all_of, tree, is_leaf=is_mark)


def news(message: Tree) -> Tree:
    """The message without what was sent before, which costs nothing."""
    return jax.tree.map(lambda node: () if isinstance(node, Again) else node, message, is_leaf=is_mark)


def marks(tree: Tree) -> list[Coded]:
    """The marks of a message for codecs."""
    found: list[Coded] = []
    for _, node in named(tree):
        found += [node] if isinstance(node, Coded) else marks(node.tree) if isinstance(node, PerClient) else []
    return found


def is_coded(tree: Tree) -> bool:
    """Whether a part is marked for the run's codecs."""
    return any(mark.by is None for mark in marks(tree))


def brings(tree: Tree) -> bool:
    """Whether a part is marked for a codec of the algorithm's own."""
    return any(mark.by is not None for mark in marks(tree))


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
    """The changes of one reply that the run's codecs act on, by name: one vector to those that look at all of it."""
    found = {
        joined(name, inner): sent(leaf)
        for name, node in named(tree)
        if isinstance(node, Coded) and node.change and node.by is None
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
    by_kind: dict[
        tuple[bool, Codec | None], dict[str, Sent]
    ] = {}  # marked leaves: changes or not, and whose codec acts
    for name, node in named(tree):
        if isinstance(node, Coded):
            found = {joined(name, inner): sent(leaf) for inner, leaf in named(node.tree)}
            by_kind.setdefault((node.change, node.by), {}).update(found)
    for (change, own), leaves in by_kind.items():
        if codec is not None and codec.private and own is not None:
            raise ValueError(
                f"Expected no codec of the algorithm's own ({own.name}, by wire.coded(..., by=...)) with {codec.name}, as what it "
                "sends would go around the noise; choose another algorithm, or dp=central."
            )
        by, ordered = own or codec, dict(sorted(leaves.items()))  # the order on the wire
        if by is not None and ordered:
            refuse(by, ordered, change)
            remembers = change and own is None
            ordered, after = by.encode(ordered, key, common, state if remembers else ())
            state = after if remembers else state
        by_kind[change, own] = ordered

    def place(path: Any, node: Any) -> Any:
        name = path_name(path)
        if isinstance(node, Coded):
            own = by_kind[node.change, node.by]
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
    entries |= {name: (math.prod(one.value.shape) * most_bits(one) + 7) // 8 for name, one in leaves.items()}
    sparse = {name: one for name, one in leaves.items() if one.mask is not None}
    left = 0
    if sparse and codec is not None:
        bits = max(most_bits(one) for one in sparse.values())
        left = codec.most(sum(math.prod(one.value.shape) for one in sparse.values())) * bits // 8
        left += len(sparse) * (bits % 8 > 0)  # each is a whole number of bytes
    side = {name: one.side for name, one in leaves.items()}
    for name, more in beside(tree, codec, key, common).items():
        side[name] = more
    return Most(entries, side, dict.fromkeys(sparse, left))


def beside(tree: Tree, codec: Codec | None, key: Array, common: Array) -> dict[str, Array | int]:
    """Bytes beside the entries of every leaf, at most, of a chain that leaves entries out and has scales or rotations behind:
    what they would cost if all entries travelled, and what says which do. Elsewhere nothing."""
    links = codec.links if codec is not None else ()
    parts = [[link for link in links if link.thins == thins] for thins in (True, False)]
    if not all(parts):
        return {}
    found: dict[str, Array | int] = {}
    for part in parts:
        nodes, _ = on_the_way(whole(tree), closed(linked(part)), key, common, ())
        for path, node in jax.tree_util.tree_leaves_with_path(nodes, is_leaf=is_sent):
            if isinstance(node, Sent):
                name = path_name(path) or "message"
                found[name] = found.get(name, 0) + node.side
    return found


def most_bits(sent: Sent) -> int:
    """Bits of an entry, at most; no codec takes more than the leaf has."""
    return sent.bits if isinstance(sent.bits, int) else 8 * sent.value.dtype.itemsize


def packet(sent: Sent) -> Any:
    """A leaf with its price; one that travels whole and as it is stays an array, whose price needs no value."""
    if (
        sent.mask is None
        and isinstance(sent.side, int)
        and sent.side == 0
        and isinstance(sent.bits, int)
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


def refuse(codec: Codec, leaves: dict[str, Sent], changes: bool) -> None:
    """Raises `ValueError` for leaves, changes or values, that a codec cannot act on."""
    for name, one in leaves.items():
        if not jnp.issubdtype(one.value.dtype, jnp.floating):
            raise ValueError(
                f"Expected leaf {name!r}, marked by wire.coded, to hold floating-point numbers for codec {codec.name}, not "
                f"{one.value.dtype}; leave the mark away, or choose none."
            )
        wide = 8 * one.value.dtype.itemsize
        if codec.bits is not None and codec.bits > wide:
            raise ValueError(
                f"Expected leaf {name!r} to have at least the {codec.bits} bits of codec {codec.name}, not the {wide} of "
                f"{one.value.dtype}; choose one of fewer bits, or none."
            )
    if not changes and not codec.on_values:
        raise ValueError(
            f"Expected codec_up={codec.name!r} to get changes alone, but {next(iter(leaves))!r} is a value "
            f"(wire.coded(..., change=False)); {codec.instead}."
        )


def depart(codec: Codec | None, message: Tree, key: Array) -> Tree:
    """A message as its receivers decode it, marks turned into packets; inside jit. `Again` parts stay.

    Raises:
        ValueError: a marked leaf that the codec cannot act on; a codec that acts on changes, for which see `copies`.
    """
    if codec is not None and not codec.on_values:
        raise ValueError(
            f"Expected codec_down={codec.name!r} to act on values where clients hold no copy of the message before; choose "
            "bfloat16, quantise(8), qsgd(8), nf4 or eden(4)."
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
        return replace(node, change=False) if isinstance(node, Coded) else node

    return jax.tree.map(value, tree, is_leaf=is_mark)


def broadcast(part: Any, codec: Codec | None, key: Array) -> Any:
    """One part for all clients. Where a leaf's entries are a number for each, so is its price: values are the same."""

    def by_client(node: Any) -> bool:
        return isinstance(node, Kept) and node.axis is not None and node.entries.ndim == 1

    def all_of(tree: Tree) -> Tree:
        return jax.tree.map(lambda node: node.leaf if by_client(node) else node, tree, is_leaf=is_mark)

    inside = isinstance(part, Coded)
    tree = part.tree if inside else part
    found, _ = on_the_way(replace(part, tree=all_of(tree)) if inside else all_of(tree), codec, key, key, ())

    def priced(node: Any, leaf: Any) -> Any:
        if not by_client(node):
            return packet(leaf) if isinstance(leaf, Sent) else leaf
        whole = leaf if isinstance(leaf, Sent) else sent(leaf)
        entries = node.entries.astype(jnp.uint32) * jnp.uint32(whole.value.size // whole.value.shape[node.axis])
        return Packet(whole.value, cost(entries, whole.bits, whole.side))

    return jax.tree.map(priced, tree, found, is_leaf=is_mark)
