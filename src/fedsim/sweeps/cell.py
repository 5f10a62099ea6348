"""One cell: what it shares with the cells before it, and its run from wherever its folder stands."""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim import record
from fedsim.config import Config
from fedsim.data.dataset import Source
from fedsim.record import Run
from fedsim.simulation import build, needs, simulate
from fedsim.simulation.build import Problem
from fedsim.simulation.trainers import shared_key
from fedsim.sweeps import folder
from fedsim.sweeps.cells import Cell

TRAINERS = 2  # kept at a time: the head's and that of the phase after it


class Recent(OrderedDict[Any, Any]):
    """A dict that forgets all but the `TRAINERS` entries that were used last: each holds programs, and arrays on the devices."""

    def __getitem__(self, key: Any) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > TRAINERS:
            self.popitem(last=False)


class Shared:
    """What cells that run one after another in this process share: examples, frozen features, compiled programs.

    Args:
        data: of cells with `dataset="arrays"`.
        blind: the test set is not read: validation stands in its place, as where options are chosen.
    """

    def __init__(self, data: Source | None = None, *, blind: bool = False) -> None:
        self.data, self.blind = data, blind
        self.last: Problem | None = None

    def problem(self, cell: Cell) -> Problem:
        """The cell's data and all that its run can take from the runs before; what it cannot is forgotten.

        Raises:
            ValueError: as `build.problem`.
        """
        build.check(cell.config, cell.speed)
        needs.fetch_missing(cell.config)
        made = build.problem(cell.config, cell.speed, self.data, self.last)
        if self.blind:
            made = made._replace(dataset=made.dataset._replace(test=made.dataset.validation))
        if made.trainers is None:
            made = made._replace(trainers=Recent())
        if self.last is not None and self.last.cache is not made.cache:
            gc.collect()  # features of before: gone before others are computed
        self.last = made
        return made


def run(cell: Cell, directory: Path, shared: Shared) -> Run:
    """The cell's run: made, gone on with, or as it is.

    Raises:
        ValueError: the folder holds another run; whatever a run raises.
    """
    problem = shared.problem(cell)
    if not (directory / record.CONFIG).is_file():
        return simulate.run(
            cell.config, cell.speed, out=directory, quiet=True, problem=problem, data=shared.data, pictures=False
        )
    found = record.load(directory)
    if found.config != cell.config:
        raise ValueError(f"Expected {directory} to hold the run of {cell.name}; take it away, and it is run anew.")
    if found.summary is not None:
        return Run(*found)
    if not goes_on_here(found):
        folder.clear(directory)
        return run(cell, directory, shared)
    return simulate.run(
        resume=directory, quiet=True, problem=problem, data=shared.data, pictures=False, trust_code=True
    )


def goes_on_here(found: record.Run) -> bool:
    """Whether this process may go on with a run: bit for bit is on devices of the same kind and number, with the same JAX.

    In a sweep another machine may take over; it starts the cell anew, as no result may depend on where a cell was stopped.
    """
    now, then = record.machine(), found.about
    same = all(now["versions"].get(name) == then["versions"].get(name) for name in ("jax", "jaxlib", "flax", "optax"))
    count = found.speed.devices is not None or now["device"]["count"] == then["device"]["count"]
    return same and count and now["device"]["kind"] == then["device"]["kind"]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in the order in which they share the most: by data, by frozen layers, by programs; else as they came."""
    ranks: list[dict[Any, int]] = [{}, {}, {}, {}]

    def place(cell: Cell) -> tuple[int, ...]:
        return tuple(rank.setdefault(key, len(rank)) for rank, key in zip(ranks, keys(cell.config), strict=True))

    return sorted(cells, key=lambda cell: (*place(cell), *(str(getattr(cell.speed, "lanes", "")),)))


@functools.lru_cache(2**14)
def keys(config: Config) -> tuple[Any, ...]:
    """What cells share, from the coarsest: examples, frozen features, the division of the examples, compiled programs."""
    *examples, _seed = read = build.read_by(config)
    return tuple(examples), build.frozen_by(config), read, shared_key(config)
