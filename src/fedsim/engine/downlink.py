"""What leaves the server, compiled: values by codecs that keep nothing, or what has changed since all clients got the last."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from fedsim import wire
from fedsim.core import Tree
from fedsim.wire import copies


class Downlink:
    """The run's codec of messages.

    Args:
        codec: the run's; None for none.
        everywhere: the sharding of what all devices hold alike; None for one device.

    Raises:
        ValueError: a codec that acts on changes, and whose copies would not come near to the values.
    """

    def __init__(self, codec: wire.Codec | None, everywhere: Any = None) -> None:
        self.changes = wire.of_changes(codec)
        self.values = values = codec if self.changes is None else None
        self._depart = jax.jit(lambda message, key: wire.depart(values, message, key))
        if self.changes is not None:
            # With one sharding for all of them the second difference compiles nothing that the first one has.
            compiled = jax.jit if everywhere is None else partial(jax.jit, out_shardings=everywhere)
            self._first, self._change = (compiled(partial(fn, self.changes)) for fn in (copies.first, copies.change))
            self._received = compiled(copies.received)

    def depart(self, message: Tree, key: Array) -> Tree:
        """A message as its receivers decode it; without a codec, and where all entries travel, that is what was given."""
        if self.values is None and not wire.thins(message) and not wire.brings(message):
            return wire.unmarked(message)
        return self._depart(message, key)

    def renewed(self, nodes: list[Tree], key: Array, copy: wire.Copy | None) -> tuple[list[Tree], wire.Copy]:
        """A message, node by node, as its receivers decode it, and what all hold of it from then on.

        The first one travels whole, and so does one with other leaves than the copy's.

        Raises:
            ValueError: coded parts that are not the same for all clients.
        """
        leaves, others = copies.coded_leaves(nodes), self.depart(copies.without_coded(nodes), key)
        if not leaves or copy is None or not copies.same_leaves(leaves, copy):
            copy = self._first(leaves, key)
            return copies.with_coded(nodes, others, copy.values, {}), copy
        arrived, prices, state = self._change(leaves, key, copy)
        values, copy = self._received(copy, arrived, state)
        return copies.with_coded(nodes, others, values, prices), copy


def copy_name(stream: str, turn: int) -> str:
    """Of the copy of a round's message: by what its exchange's randomness is named, and which of these it is."""
    return "-".join(filter(None, (stream.replace("/", "-"), str(turn))))


def refuse_missing(complete: bool, linked: bool) -> None:
    """Raises `ValueError` where a client would not get a message of which all are to hold a copy.

    Args:
        complete: every client of the run is in the round and in the exchange.
        linked: replies go from peer to peer.
    """
    if linked or not complete:
        what = "no exchange whose replies go from peer to peer" if linked else "every client in every exchange"
        raise ValueError(
            f"Expected {what} for a codec_down that sends what has changed since the last message; choose one that acts on values: "
            "bfloat16, quantise(8), eden(4)."
        )
