"""Sweeps whose cells are over at once, and processes that end such cells as a crew's processes do: without JAX, so in no time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fedsim import record
from fedsim.config import Config
from fedsim.sweeps import folder
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell, Sweep, cells

BASE = Config(backbone="mlp", peft="full", rounds=3)


def planned(study: Path, **grid: list[Any]) -> list[Cell]:
    """The cells of a sweep that nobody has begun."""
    made = cells(Sweep(base=BASE, grid=grid or {"lr": [1e-3, 2e-3, 3e-3, 4e-3]}))
    folder.write(study, BASE, made, [], {})
    return made


def board_of(study: Path, made: list[Cell]) -> Board:
    """A board that shows nothing."""
    board = Board(study, quiet=True)
    board.begin(made, study / folder.CELLS, "test")
    return board


def ends(cell: Cell, place: Path, shared: object = None) -> None:
    """A cell that is over at once: it says who ran it, as often as it is run."""
    with (place / "ran").open("a") as file:
        file.write(f"{threading.get_ident()}\n")
    (place / record.SUMMARY).touch()


def states(study: Path, made: list[Cell]) -> list[str]:
    """How the cells stand."""
    return [folder.state(place) for place in folder.places(study / folder.CELLS, made).values()]


# --- processes

WORKER = """
import os, signal, sys, time
from pathlib import Path
from fedsim import record
from fedsim.sweeps import folder, worker

study, which = Path(sys.argv[1]), sys.argv[2]
asked = folder.Asked(study)
for cell in asked.cells:
    place = study / which / cell.name
    if folder.state(place) not in ("waiting", "stopped"):
        continue
    with folder.claim(place) as is_mine:
        if is_mine and not folder.over(place):
            worker.say(f"{worker.BEGINS} {cell.name}")
            ACTION
            (place / "ran").open("a").write(f"{os.getpid()} {os.environ.get('JAX_NUM_CPU_DEVICES')} {sys.argv[3:]}\\n")
            (place / record.SUMMARY).touch()
            worker.say(f"{worker.ENDED} {cell.name}")
"""

# In the processes of submitit, where a test cannot patch: the crew of this file's processes.
PATCHED = """
import sys
if any("submitit" in word for word in sys.orig_argv):
    from fedsim.sweeps import crew
    inner = crew.command_of
    crew.command_of = lambda *args, **named: [sys.executable, {worker!r}, *inner(*args, **named)[3:]]
"""
