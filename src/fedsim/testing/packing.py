"""What the contract compares with: messages really packed, and an average that forbids what privacy would."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim import wire
from fedsim.core import Average, Averaged, Tree
from fedsim.folds import plain, uniform
from fedsim.testing.toys import Coding
from fedsim.wire.marks import as_value, is_sent, joined, on_the_way, path_name


def packet_bytes(name: str, packet: wire.Packet) -> int:
    """Length of an array from which the packet's value really comes back, and which has as many bytes as it claims.

    Of the packets that an algorithm makes by itself: the array in 32 or 16 bits, whole or its first entries along an
    axis where the others are zero. Another is refused.
    """
    value, claim = np.asarray(packet.value), int(packet.nbytes)
    for dtype in (value.dtype, jnp.bfloat16, jnp.float16):
        sent = value.astype(dtype)
        for axis in range(value.ndim):
            count, odd = divmod(claim, max(sent.nbytes // max(value.shape[axis], 1), 1))
            if odd or count > value.shape[axis]:
                continue
            back = np.zeros_like(value)
            first = (slice(None),) * axis + (slice(count),)
            back[first] = sent[first].astype(value.dtype)
            if np.array_equal(back, value):
                return len(wire.to_bytes(sent[first]))
    raise AssertionError(f"packet {name!r} claims {claim} bytes, from which its value does not come back")


def packed(tree: Tree, codec: wire.Codec | None, coding: Coding) -> int:
    """Length of one client's message or reply as really packed; from what is marked its values come back bit for bit."""
    after, before = (travelling(tree, c, coding) for c in (codec, None))
    kinds = {
        joined(name, inner): (node.change, node.by)
        for name, node in wire.named(tree)
        if isinstance(node, wire.Coded)
        for inner, _ in wire.named(node.tree)
    }
    length = 0
    for kind in (*sorted(set(kinds.values()), key=str), None):  # changes, values, and what no codec acts on
        by = (kind[1] or codec) if kind else None
        own = {n: leaf for n, leaf in after.items() if isinstance(leaf, wire.Sent) and kinds.get(n) == kind}
        if own:
            data = wire.pack(own, by)
            back = wire.unpack(data, {n: before[n] for n in own}, by)
            wrong = [n for n in own if not np.array_equal(back[n], np.asarray(own[n].value))]
            assert not wrong, f"{wrong[0]!r} does not come back from its {len(data)} bytes"
            length += len(data)
    for name, leaf in after.items():
        if not isinstance(leaf, wire.Sent):
            length += packet_bytes(name, leaf) if wire.is_packet(leaf) else len(wire.to_bytes(leaf))
    return length


def travelling(tree: Tree, codec: wire.Codec | None, coding: Coding) -> dict[str, Any]:
    """The leaves of a message on their way, by name: marked ones as the codec leaves them."""
    found, _ = on_the_way(tree, codec, *coding)
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found, is_leaf=is_sent)}


def packed_for_all(message: Tree, codec: wire.Codec | None, key: Array, members: int) -> int:
    """Length of a message to a whole cohort of `members` as really packed.

    Of a packet with a price per client only its sum and its bound, the whole leaf, can be checked here: what a client
    holds already is known to the algorithm alone, and to its own tests.
    """

    def part(node: Any, place: int) -> Any:
        if isinstance(node, wire.PerClient):
            return jax.tree.map(lambda a: a[place], node.tree)
        by_client = lambda n: isinstance(n, wire.Kept) and n.axis is not None and n.entries.ndim == 1  # noqa: E731 - one expression, named
        return jax.tree.map(
            lambda n: wire.Kept(n.leaf, n.entries[place], n.axis) if by_client(n) else n, node, is_leaf=by_client
        )

    length = 0
    for name, node in wire.named(message):
        if wire.is_packet(node) and np.ndim(node.nbytes):
            whole = wire.array_bytes(node.value)
            assert all(0 <= int(n) <= whole for n in node.nbytes), f"{name} costs more than its {whole} bytes"
            length += sum(int(n) for n in node.nbytes)
        else:
            coding = Coding(key, key, ())
            length += sum(packed(as_value(part(node, place)), codec, coding) for place in range(members))
    return length


def clipped() -> Average:
    """Changes cut to norm 1, their sum with noise over a fixed number of clients: what privacy asks of an algorithm."""
    plain_ = plain(uniform)

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Tree) -> Tree:
        leaves = jax.tree.leaves(replies)
        norm = jnp.sqrt(sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in leaves))
        return plain_.reduce.add(total, replies, weights / jnp.maximum(norm, 1.0), slots, args)

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        leaves, structure = jax.tree.flatten(total[0])
        keys = jax.random.split(key, len(leaves))
        noisy = [(leaf + 0.01 * jax.random.normal(k, leaf.shape)) / 6 for k, leaf in zip(keys, leaves, strict=True)]
        return Averaged(structure.unflatten(noisy), jnp.float32(6.0))

    return Average("clipped", plain_.reduce._replace(add=add, done=done), runs_empty=True)
