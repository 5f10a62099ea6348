"""Which clients are in which group, and how a round draws those whom it asks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedsim.config import Config, groups_of
from fedsim.randomness import stream


def members(config: Config, clients: int) -> dict[str, np.ndarray]:
    """The clients of each group, ascending ids, drawn by seed; an empty one where the server alone has the model.

    Raises:
        ValueError: a group whose share of the clients is none.
    """
    groups = groups_of(config)
    counts = shared(clients, {group.name: group.share or 0.0 for group in groups})
    for group in groups:
        if group.share is not None and counts[group.name] == 0:
            raise ValueError(
                f"Expected share={group.share} of {clients} clients to be at least one in group {group.name!r}; raise it, or add "
                "clients."
            )
    order, found, at = stream(config.seed, "groups").permutation(clients), {}, 0
    for name, count in counts.items():
        found[name], at = np.sort(order[at : at + count]), at + count
    return found


def shares(members: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of all clients that each group has, of those that have any."""
    clients = sum(map(len, members.values()))
    return {name: len(ids) / clients for name, ids in members.items() if len(ids)}


def chance(seed: int, round: int, group: str) -> np.random.Generator:
    """What a round draws its clients by, of a group or, by "", of all."""
    return stream(seed, " ".join(filter(None, (f"sample {round}", group))))


def asked(count: int, share: float) -> int:
    """How many of `count` clients a round asks a group for that has a share of all; at least one."""
    return max(1, math.floor(share * count + 0.5))


def shared(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """A whole number for each share, which sum to `total`: rounded down, the largest remainders rounded up."""
    exact = {name: total * share for name, share in shares.items()}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    by_rest = sorted((name for name in shares if shares[name] > 0), key=lambda name: found[name] - exact[name])
    for name in by_rest[: total - sum(found.values())]:
        found[name] += 1
    return found
