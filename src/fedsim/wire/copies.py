"""What all clients hold of a message, alike, and what is sent of what has changed since.

The server has x, all hold a copy w. C(x - w) is sent, and everybody adds what arrives to w. What did not arrive is in the next
difference by itself: the error feedback of EF21-P (Gruntkowska et al., arXiv 2209.15218, algorithm 1), so that a codec keeps no
rest of its own there. It needs every client in every round: who missed one would have another w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.wire.codecs import Codec, Sent, closed, nbytes
from fedsim.wire.marks import Coded, is_coded, is_mark, joined, named, path_name, refuse, sent
from fedsim.wire.prices import Packet, PerClient, Tree


class Copy(NamedTuple):
    """What the server and all clients hold of one message."""

    values: dict[str, Array]  # its coded leaves as decoded, by name
    state: Tree = ()  # what the codec keeps beside a rest: powersgd's factors


def of_changes(codec: Codec | None) -> Codec | None:
    """The codec as it acts on what has changed, without a rest of its own; None for one that acts on values, or none.

    Raises:
        ValueError: a codec whose copies would not come near to the values.
    """
    if codec is None or codec.on_values:
        return None
    if codec.overshoots:
        raise ValueError(
            f"Expected codec_down={codec.name!r} to err by less than what it is given, so that copies come near to the values; what "
            "is unbiased errs by more. Choose topk(0.1), powersgd(4), randomk(0.1, feedback=True) or sketch(4, feedback=True), and "
            "quantise(8) behind it."
        )
    return closed(codec.link) if codec.remembers and codec.link else codec


def first(codec: Codec, leaves: Mapping[str, Array], key: Array) -> Copy:
    """What all hold after a message that travels whole; inside jit.

    Raises:
        ValueError: a leaf that the codec cannot act on.
    """
    refuse(codec, on_their_way(leaves), changes=True)
    return Copy(dict(leaves), codec.init(key, dict(leaves)))


def change(
    codec: Codec, leaves: Mapping[str, Array], key: Array, copy: Copy
) -> tuple[dict[str, Array], dict[str, Array], Tree]:
    """What has changed since the copy, as it arrives; the bytes of it, uint32, by leaf; the codec's state. Inside jit."""
    differences = on_their_way({name: leaf - copy.values[name] for name, leaf in leaves.items()})
    found, state = codec.encode(differences, key, key, copy.state)
    prices = {name: jnp.asarray(nbytes(one), jnp.uint32) for name, one in found.items()}
    return {name: one.value for name, one in found.items()}, prices, state


def received(copy: Copy, arrived: Mapping[str, Array], state: Tree) -> tuple[dict[str, Array], Copy]:
    """The values that clients read, and what all hold from now on: as before, where a value is not finite. Inside jit.

    A program of its own, not that of `change`: there a product and this sum might be rounded as one, here and not by who unpacks.
    """
    values = {name: copy.values[name] + each for name, each in arrived.items()}
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in values.values()]).all()
    return values, jax.tree.map(lambda new, old: jnp.where(finite, new, old), Copy(values, state), copy)


def on_their_way(leaves: Mapping[str, Array]) -> dict[str, Sent]:
    """The leaves before any codec, in the order on the wire."""
    return {name: sent(leaf) for name, leaf in sorted(leaves.items())}


def coded_leaves(nodes: Sequence[Tree]) -> dict[str, Array]:
    """The leaves of a message, node by node, that the run's codec acts on, by number of the node and path in it.

    Raises:
        ValueError: parts that are not the same for all clients.
    """
    found: dict[str, Array] = {}
    for number, node in enumerate(nodes):
        if not is_coded(node):
            continue
        inside = named(node.tree)
        if isinstance(node, PerClient) or any(is_mark(leaf) for _, leaf in inside):
            raise ValueError(
                "Expected every part of a message on which codec_down acts to be one for all clients and whole, as all hold the same "
                "copy of it, not marked by wire.PerClient or wire.kept; choose a codec that acts on values: bfloat16, quantise(8), "
                "eden(4)."
            )
        found |= {joined(str(number), inner): jnp.asarray(leaf) for inner, leaf in inside}
    return found


def same_leaves(leaves: Mapping[str, Array], copy: Copy | None) -> bool:
    """Whether a copy is of a message with these leaves."""
    shapes = [
        {name: (leaf.shape, leaf.dtype) for name, leaf in each.items()}
        for each in (leaves, copy.values if copy else {})
    ]
    return shapes[0] == shapes[1]


def without_coded(nodes: Sequence[Tree]) -> list[Tree]:
    """The message with nothing in place of what the run's codec acts on."""
    return [() if is_coded(node) else node for node in nodes]


def with_coded(
    nodes: Sequence[Tree], others: Sequence[Tree], values: Mapping[str, Array], prices: Mapping[str, Array]
) -> list[Tree]:
    """The message as it is sent: `others`, and packets in place of what the codec acts on, arrays where there is no price."""

    def place(number: int, node: Coded) -> Tree:
        def leaf(path: Any, _: Any) -> Any:
            name = joined(str(number), path_name(path))
            return Packet(values[name], prices[name]) if name in prices else values[name]

        return jax.tree_util.tree_map_with_path(leaf, node.tree)

    return [
        place(number, node) if is_coded(node) else other
        for number, (node, other) in enumerate(zip(nodes, others, strict=True))
    ]


def as_changes(message: Tree) -> Tree:
    """The message marked like a reply of changes, of which `most` knows bounds."""

    def change(node: Any) -> Any:
        return replace(node, change=True) if isinstance(node, Coded) and node.by is None else node

    return jax.tree.map(change, message, is_leaf=is_mark)
