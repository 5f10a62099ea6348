"""Running the cells that are not done, one after another in this process, beside others that may work on the same folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedsim.data.dataset import Source
from fedsim.sweeps import cell as one
from fedsim.sweeps import folder
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell

Work = Callable[[Path, Sequence[Cell], Board, bool], None]
"""(folder of the cells, cells, board, whether the test set stays unread): runs what is not done, and returns when all is."""


def work_here(data: Source | None = None) -> Work:
    """Runs the cells one after another in this process, beside others who may work on the same folder."""

    def work(directory: Path, cells: Sequence[Cell], board: Board, blind: bool) -> None:
        places = folder.places(directory, cells)
        shared = one.Shared(data, blind=blind)
        left = one.in_order(cells)
        while left:
            mine = [c for c in left if attempt(c, places[c.key], shared, board)]
            left = [c for c in left if folder.state(places[c.key]) in ("waiting", "running", "stopped")]
            if left and not mine:
                board.wait()  # others run what is left

    return work


def attempt(cell: Cell, place: Path, shared: one.Shared, board: Board) -> bool:
    """Runs a cell unless it is over, or another process has it; its error is kept, and ends nothing else."""
    if folder.state(place) in ("done", "failed", "running"):
        return False
    with folder.claim(place) as is_mine:
        if not is_mine or folder.over(place):  # another has been quicker
            return False
        board.started(cell)
        try:
            one.run(cell, place, shared)
        except Exception as error:
            folder.fail(place, error)
    board.ended(cell)
    return True
