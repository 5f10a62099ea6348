"""What leaves the server: marks turned into packets, prices by member, and what a member is asked to read once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from fedsim import wire
from fedsim.core import Tree


class Outbox:
    """The messages of one round, so that `wire.again` can be checked.

    Args:
        price: (message with packets, cohort size) -> bytes by leaf.
    """

    def __init__(self, price: Callable[[Tree, int], dict[str, Any]] = wire.message_bytes) -> None:
        self.price = price
        self.before: dict[
            int, tuple[Any, Any]
        ] = {}  # by identity: an array as given, which stays alive, and as decoded
        self.coded = False  # whether a part was marked for the codec

    def sent(
        self, message: Tree, depart: Callable[[Tree, Array], Tree], key: Array, members: int
    ) -> tuple[Tree, dict[str, Any]]:
        """The message as its receivers decode it, per-client parts marked, and what it costs each, (M,) int64 by leaf.

        Args:
            depart: (message, key) -> the same with packets in place of marks; compiled.

        Raises:
            ValueError: a part that is said to have been sent before was not; one by client without a row for each.
        """
        nodes, structure = jax.tree.flatten(message, is_leaf=wire.is_mark)
        fresh = [() if isinstance(node, wire.Again) else node for node in nodes]
        bare = wire.unmarked(fresh)
        marked = jax.tree.structure(bare) != jax.tree.structure(fresh)
        decoded = depart(fresh, key) if marked else fresh
        self.coded |= wire.is_coded(fresh)
        new = structure.unflatten(decoded)
        check_rows(new, members)
        for given, read in zip(jax.tree.leaves(wire.unwrap(bare)), jax.tree.leaves(wire.unwrap(decoded)), strict=True):
            self.before[id(given)] = given, read
        whole = [
            self.again(node.tree) if isinstance(node, wire.Again) else part
            for node, part in zip(nodes, decoded, strict=True)
        ]
        return wire.unwrap(structure.unflatten(whole)), self.price(new, members)

    def again(self, tree: Tree) -> Tree:
        """What was sent before, as it was decoded."""

        def read(leaf: Any) -> Any:
            if id(leaf) not in self.before:
                raise ValueError(
                    "Expected every array of wire.again to be one that this round has sent, the same object, not one of shape "
                    f"{np.shape(leaf)} that it has not; send it without wire.again, which costs its bytes."
                )
            return self.before[id(leaf)][1]

        return jax.tree.map(read, wire.unwrap(wire.unmarked(tree)))


def check_rows(message: Tree, members: int) -> None:
    """Raises `ValueError` unless every per-client part of the message has a row for each member."""
    for name, node in wire.parts(message):
        own = node.tree if isinstance(node, wire.PerClient) else ()
        if wire.is_packet(node) and np.ndim(node.nbytes):
            own = node.nbytes
        rows = {leaf.shape[0] for leaf in jax.tree.leaves(own)} or {members}
        if rows != {members}:
            raise ValueError(
                f"Expected the leading axis of per-client part {name!r} to be {members}, the cohort, not {rows}; "
                "order it like cohort.ids."
            )
