"""A cohort of several groups: each has an engine of its own, for its architecture; ids, bytes and time are one cohort's.

An algorithm asks each group by itself: `cohort.groups["small"].exchange(...)`. The groups' exchanges of a round happen
side by side: the round's first ones of all groups at the same time, then the second ones, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from fedsim import network, wire
from fedsim.core import Tree
from fedsim.engine import processes
from fedsim.engine.cohort import Cohort
from fedsim.engine.lanes import Lanes
from fedsim.engine.traffic import Exchanged
from fedsim.randomness import stream


class GroupedCohort:
    """The clients of one round, by group.

    Args:
        engine: of what all groups share; its `held` has the groups' by name.
        groups: name -> the group's cohort.
    """

    def __init__(self, engine: Lanes, round: int, groups: Mapping[str, Cohort]) -> None:
        self.engine, self.round, self.groups = engine, round, groups
        self.own_read: set[str] = set()
        self.ids = self._joined("ids")
        self.sizes, self.last = self._joined("sizes"), self._joined("last")

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(cohort, name) for cohort in self.groups.values()])

    @property
    def population(self) -> int:
        """Number of clients N, of all groups."""
        return self.engine.population

    @property
    def present(self) -> np.ndarray:
        """(M,) bool: can be reached."""
        return self._joined("present")

    @property
    def reports(self) -> np.ndarray:
        """(M,) bool: still in the round."""
        return self._joined("reports")

    @property
    def done(self) -> list[Exchanged]:
        """All exchanges of all groups."""
        return [one for cohort in self.groups.values() for one in cohort.done]

    @property
    def averaging(self) -> Tree:
        """The state of the run's average, by group."""
        return {name: cohort.averaging for name, cohort in self.groups.items()}

    @property
    def copies(self) -> dict[str, wire.Copy]:
        """As `Cohort.copies`: none, as not every client gets a group's message."""
        return {}

    @property
    def conditions(self) -> network.Conditions:
        """What the clients meet, all groups' in a row."""
        each = [cohort.conditions for cohort in self.groups.values()]
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(c, name) for c in each])
            for name in each[0]._fields
            if isinstance(getattr(each[0], name), np.ndarray)
        }
        return each[0]._replace(
            **columns, wanted=sum(c.wanted for c in each), unavailable=sum(c.unavailable for c in each)
        )

    @property
    def read(self) -> set[str]:
        """Options whose examples of the server the algorithm has read."""
        return self.own_read.union(*(cohort.read for cohort in self.groups.values()))

    @property
    def public(self) -> dict[str, Tree] | None:
        """As `Cohort.public`, by group, the server's own model included."""
        self.own_read.add("public_share")
        x = self.engine.public
        return None if x is None else dict.fromkeys(self.engine.held, x)

    @property
    def shard(self) -> dict[str, Any] | None:
        """As `Cohort.shard`, by group, the server's own model included."""
        self.own_read.add("server_share")
        pair = self.engine.shard
        return None if pair is None else dict.fromkeys(self.engine.held, pair)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator on the host, of (seed, round, purpose)."""
        return stream(self.engine.seed, f"round {self.round} {purpose}")

    def fetch(self, tree: Tree) -> Tree:
        """Device values as NumPy, the same in every process."""
        return processes.fetch(tree)

    def exchange(self, *args: Any, **options: Any) -> Any:
        """Refused: a message is for one architecture."""
        raise refused(self.groups)

    def settle(self) -> None:
        """Ends the round; see `Cohort.settle`."""
        for cohort in self.groups.values():
            cohort.settle()

    def traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes (down, up) of the round so far, by group and leaf."""
        totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for name, cohort in self.groups.items():
            for total, each in zip(totals, cohort.traffic(), strict=True):
                total.update({f"{name}/{leaf}": nbytes for leaf, nbytes in each.items()})
        return dict(totals[0]), dict(totals[1])

    def peers(self) -> dict[str, int] | None:
        """As `Cohort.peers`, summed."""
        found = [each for cohort in self.groups.values() if (each := cohort.peers())]
        return {name: sum(each[name] for each in found) for name in found[0]} if found else None

    def flops(self) -> float:
        """As `Cohort.flops`, summed."""
        return sum(cohort.flops() for cohort in self.groups.values())

    def outcomes(self) -> list[network.Outcome]:
        """Who reported, and when: the groups' exchanges side by side."""
        members = [len(cohort.ids) for cohort in self.groups.values()]
        return [
            joined([one or nothing(count) for one, count in zip(turn, members, strict=True)])
            for turn in zip_longest(*(cohort.outcomes() for cohort in self.groups.values()))
        ]


def refused(groups: Iterable[str]) -> ValueError:
    """What is said of an exchange with all groups."""
    return ValueError(
        f"Expected an exchange with one of the groups, {', '.join(groups)}, as each has a model of its own; call "
        "cohort.groups[name].exchange."
    )


def joined(outcomes: list[network.Outcome]) -> network.Outcome:
    """Outcomes that happen at the same time, members in a row."""
    columns = {
        name: np.concatenate([getattr(one, name) for one in outcomes])
        for name in network.Outcome._fields
        if name != "seconds"
    }
    return network.Outcome(**columns, seconds=max(one.seconds for one in outcomes))


def nothing(members: int) -> network.Outcome:
    """Of a group that is not asked."""
    nobody, zeros = np.zeros(members, bool), np.zeros(members)
    return network.Outcome(nobody, np.zeros(members, np.int64), nobody, nobody, zeros, zeros, 0.0)
