"""All clients of a run as laws, and what one cohort of them meets in a round: who is absent, drops out, is slow.

A `Fleet` holds laws, not clients: whether client i is there in round t, and how fast it is, follow from hashes of
(seed, purpose, t, i), so that nothing grows with the population and a resumed run meets the same clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.config import Network
from fedsim.network.laws import Law, availability, law
from fedsim.network.traces import read_devices
from fedsim.randomness import chance

UNITS = {"download": 1e6, "upload": 1e6, "latency": 1e-3, "compute": 1.0}  # an option's unit in bit/s, s, steps/s
FREE = {"download": np.inf, "upload": np.inf, "latency": 0.0, "compute": np.inf}  # where nothing is said


class Fleet(NamedTuple):
    """All clients of a run, as laws."""

    seed: int
    wanted: int  # replies that a round waits for
    available: Callable[[np.ndarray, int], np.ndarray] | None  # (ids (K,), round) -> (K,) bool; None: always
    dropout: float
    laws: Mapping[str, Law]  # of download, upload (bit/s), latency (s), compute (steps/s), where they are given
    deadline: float  # s; inf for none
    partial: bool  # late clients report what they have


class Conditions(NamedTuple):
    """What one cohort meets in one round."""

    present: np.ndarray  # (M,), bool: can be reached
    drops: np.ndarray  # (M,), bool: gets the message and never replies
    download: np.ndarray  # (M,), bit/s
    upload: np.ndarray  # (M,), bit/s
    latency: np.ndarray  # (M,), s, each way
    compute: np.ndarray  # (M,), local steps/s
    wanted: int  # replies that the round waits for
    deadline: float  # s
    partial: bool
    timed: bool  # whether anything takes time
    unavailable: int  # clients that were selected and cannot be reached


def fleet(options: Network, *, clients: int, rounds: int, wanted: int, seed: int) -> Fleet:
    """The clients that the options describe; reads their files.

    Args:
        clients: how many there are, N.
        rounds: of the run, which a trace must cover.
        wanted: replies that a round waits for.

    Raises:
        ValueError: an unknown law or impossible values; a file with holes, which is named with line or client.
    """
    laws = {name: law(text, name, seed) for name in UNITS if (text := getattr(options, name)) is not None}
    if options.device_table is not None:
        for name, values in read_devices(Path(options.device_table), clients).items():
            if name in laws:
                raise ValueError(
                    f"Expected {name}={getattr(options, name)!r} or a column {name} in {options.device_table}, not both; "
                    "leave one out."
                )
            laws[name] = values.__getitem__
    return Fleet(
        seed=seed,
        wanted=wanted,
        available=availability(options, clients, rounds, seed),
        dropout=options.dropout,
        laws={name: _scaled(found, UNITS[name]) for name, found in laws.items()},
        deadline=math.inf if options.deadline is None else options.deadline,
        partial=options.late == "partial",
    )


def reachable(fleet: Fleet, round: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Who can be reached in this round, for `Population.available`."""
    available = fleet.available
    return None if available is None else lambda ids: available(ids, round)


def conditions(
    fleet: Fleet, ids: np.ndarray, round: int, invited: int | None = None, wanted: int | None = None
) -> Conditions:
    """What these clients (M,), -1 for nobody, meet in this round (from 1).

    Args:
        invited, wanted: how many a round asks for where it waits for only so many of them (default: `fleet.wanted`); of
            another number all are waited for.
    """
    ids = np.asarray(ids, np.int64)
    somebody = ids >= 0
    selected = int(somebody.sum())
    ids = np.maximum(ids, 0)  # who is nobody is absent, whatever client 0 does
    present = somebody if fleet.available is None else somebody & fleet.available(ids, round)
    values = {name: fleet.laws[name](ids) if name in fleet.laws else np.full(len(ids), FREE[name]) for name in UNITS}
    return Conditions(
        present=present,
        drops=present & (chance(fleet.seed, "dropout", round, ids) < fleet.dropout),
        **values,
        wanted=(wanted or fleet.wanted) if selected == invited else selected,
        deadline=fleet.deadline,
        partial=fleet.partial,
        timed=bool(fleet.laws),
        unavailable=int((somebody & ~present).sum()),
    )


def reliable(ids: np.ndarray) -> Conditions:
    """Everybody is there, reports, and takes no time; ids (M,), -1 for nobody."""
    somebody, members = np.asarray(ids) >= 0, len(ids)
    values = {name: np.full(members, FREE[name]) for name in UNITS}
    nobody = np.zeros(members, bool)
    return Conditions(
        somebody, nobody, **values, wanted=members, deadline=np.inf, partial=False, timed=False, unavailable=0
    )


def _scaled(values: Law, unit: float) -> Law:
    return lambda ids: unit * values(ids)


def files(options: Network) -> list[Path]:
    """Files that the network is read from."""
    named = (options.availability if options.traced else None, options.device_table)
    return [Path(name) for name in named if name is not None]
