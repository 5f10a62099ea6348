"""What the exchanges of a round sent and computed, added up on the host: exact bytes by leaf, and FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from fedsim import network
from fedsim.core import Info, Tree
from fedsim.engine.lanes import Lanes, Request


class Exchanged(NamedTuple):
    """What the record needs of one exchange; device values until `traffic` is asked."""

    request: Request
    down: dict[str, int]  # bytes, all clients together, by leaf
    up: dict[str, int]
    up_packets: dict[str, Array]  # (D, S) each, uint32: packets' prices, by client; 0 where none replied
    times: np.ndarray  # (D, S): how often each reply travels; more than once from peer to peer
    linked: bool  # from peer to peer
    once: int  # bytes of leaves without a packet, if each reply travelled once
    outcome: network.Outcome  # who reported, and when
    steps: int  # of the plan
    occupancy: tuple[float, float]  # of lanes, of rows computed
    examples: int
    live: int  # steps that clients took
    info: Info

    @property
    def stream(self) -> str:
        """Whose randomness it drew."""
        return self.request.local.passes.stream


def traffic(done: Sequence[Exchanged], fetch: Callable[[Tree], Tree]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes (down, up), all clients together, by leaf; Python integers."""
    down: Counter[str] = Counter()
    up: Counter[str] = Counter()
    for one in done:
        down.update(one.down)
        up.update(one.up)
        for name, each in fetch(one.up_packets).items():
            up[name] += int(np.sum(each * one.times.astype(np.uint64), dtype=np.uint64))
    return dict(down), dict(up)


def between_peers(done: Sequence[Exchanged], fetch: Callable[[Tree], Tree]) -> dict[str, int] | None:
    """Replies that went from peer to peer, and what they would cost if each was sent once to all; None for none.

    Their bytes are in `traffic`, up, once for each transmission.
    """
    linked = [one for one in done if one.linked]
    if not linked:
        return None
    packets = [
        int(np.sum(each[one.times > 0], dtype=np.uint64)) for one in linked for each in fetch(one.up_packets).values()
    ]
    return {
        "transmissions": int(sum(one.times.sum() for one in linked)),
        "broadcast_bytes": sum(one.once for one in linked) + sum(packets),
    }


def flops(done: Sequence[Exchanged], engine: Lanes) -> float:
    """FLOPs of the clients' steps, by what each exchange's `Local` does."""

    def of(one: Exchanged) -> float:
        by_step = one.request.local.passes.rows is not None
        return (one.live if by_step else one.examples) * engine.flops(one.request)

    return sum(map(of, done), 0.0)
