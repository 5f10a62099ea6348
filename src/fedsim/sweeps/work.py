"""Running the cells that are not done, one after another in this process, beside others that may work on the same folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim import stops
from fedsim.data.dataset import Source
from fedsim.disk import is_full
from fedsim.engine.host import tune_host
from fedsim.sweeps import cell as one
from fedsim.sweeps import folder
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell

Work = Callable[[Path, Sequence[Cell], Board, bool], None]
"""(folder of the cells, cells, board, whether the test set stays unread): runs what is not done, and returns when all is."""

FREE = ("waiting", "stopped")  # states of cells that anybody may take
AGAIN = 0.01  # s until a process whom another has forestalled looks again


def work_here(data: Source | None = None, *, stays: bool = True) -> Work:
    """Runs the cells one after another in this process, beside others who may work on the same folder.

    Args:
        data: of cells with `dataset="arrays"`.
        stays: waits for cells that others run, and takes over those of who dies; else returns when there is none to take.
    """

    def work(directory: Path, cells: Sequence[Cell], board: Board, blind: bool) -> None:
        if cells:
            tune_host(cells[0].speed)  # before JAX starts: a cell has as many devices as in a command of its own
        shared = one.Shared(data, blind=blind)
        queue = Queue(one.in_order(cells), folder.places(directory, cells))
        while True:
            cell = queue.take()
            if cell is not None:
                queue.tried(attempt(cell, queue.places[cell.key], shared, board))
            elif stays and queue.left:
                board.wait()  # others run what is left
            else:
                return

    return work


def attempt(cell: Cell, place: Path, shared: one.Shared, board: Board) -> bool:
    """Runs a cell unless it is over, or another process has it; its error is kept, and ends nothing else.

    Raises:
        OSError: the disk is full: every other cell would meet that too.
        KeyboardInterrupt: stopped; the cell goes on from its checkpoint another time.
    """
    with folder.claim(place) as is_mine:
        if not is_mine or folder.over(place):  # another has been quicker
            return False
        board.started(cell)
        try:
            one.run(cell, place, shared)
        except KeyboardInterrupt as stop:
            words = str(stop).partition(";")[0] or "Stopped"
            raise stops.reworded(stop, f"{words} of {cell.name}; nothing is lost, the same command goes on.") from None
        except Exception as error:
            if is_full(error):
                raise
            folder.fail(place, error)
    board.ended(cell)
    return True


class Queue:
    """Which cell a process takes next: the one behind its last, with which it shares the most, while that is free.

    Where it is not, as at the beginning, the process looks at all that are left and begins where the others are not. So
    each cell is looked at a few times by each process, however many there are.

    Args:
        cells: in the order in which they share the most.
        places: their folders by key.
    """

    def __init__(self, cells: Sequence[Cell], places: dict[str, Path]) -> None:
        self.places = places
        self.left = list(cells)  # not over, as far as this process has seen
        self._at: int | None = None  # in `left`: the next one, unless somebody else has it
        self._groups = {cell.key: one.keys(cell.config)[:2] for cell in cells}

    def take(self) -> Cell | None:
        """The next cell to try; None where none is free."""
        if self._at is None or self._at >= len(self.left) or self.state(self.left[self._at]) not in FREE:
            self._look()
        return None if self._at is None else self.left[self._at]

    def tried(self, ran: bool) -> None:
        """What came of the cell that was taken last; one that another has taken is not forgotten, as that one may die."""
        if ran and self._at is not None:
            self.left.pop(self._at)
        else:
            self._at = None
            time.sleep(AGAIN)

    def state(self, cell: Cell) -> folder.State:
        """How a cell stands now."""
        return folder.state(self.places[cell.key])

    def _look(self) -> None:
        """Forgets what is over, and finds where to begin."""
        states = [(cell, self.state(cell)) for cell in self.left]
        states = [(cell, state) for cell, state in states if state not in ("done", "failed")]
        self.left = [cell for cell, _ in states]
        self._at = begin_at([state in FREE for _, state in states], [self._groups[cell.key] for cell in self.left])


def begin_at(free: Sequence[bool], groups: Sequence[Any]) -> int | None:
    """Where to begin among cells in order, beside others: None where none is free.

    It is in the longest row of free cells: at its first cell if nobody works right before it, else, as that one comes this
    way, where a group begins nearest to the middle of the row, or in the middle itself where the row is one group.

    Args:
        free: of each cell.
        groups: what each cell shares with its neighbours.
    """
    rows, start = [(0, 0)], 0
    for place, is_free in enumerate([*free, False]):
        if not is_free:
            rows.append((start, place))
            start = place + 1
    start, end = max(rows, key=lambda row: row[1] - row[0])
    if start == end:
        return None
    if start == 0:
        return start
    middle = (start + end) // 2
    borders = [place for place in range(start, end) if groups[place] != groups[place - 1]]
    return min(borders, key=lambda place: abs(place - middle), default=middle)
