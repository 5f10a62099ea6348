"""A process that runs cells: `python -m fedsim.sweeps.worker STUDY cells`. It needs the sweep's folder and nothing else.

It takes cells that nobody has until there is none, says on its output which one it begins and ends, and goes. Ctrl-C or
SIGTERM stops it after its round, with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim import stops

BEGINS, ENDED = "begins", "ended"
FAULT = 2  # exit status where not a cell has failed, but all would


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cells; the exit status is 0, 130 after Ctrl-C, 143 after SIGTERM, `FAULT` where the work cannot go on."""
    asked = argparse.ArgumentParser(prog="python -m fedsim.sweeps.worker", description=__doc__)
    asked.add_argument("study", type=Path, help="the sweep's folder")
    asked.add_argument("which", choices=("cells", "tuning"), help="which of its cells")
    asked.add_argument("--cores", type=int, nargs="*", default=(), help="cores of the CPU that it keeps to")
    asked.add_argument("--led", action="store_true", help="only Ctrl-C stops it: a parent sees to other signals")
    options = asked.parse_args(argv)
    if options.led:  # a cluster sends its signals to all processes of a job
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    if options.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options.cores)
    try:
        with stops.at_once(lambda: "Stopped.", last=argv is None):
            run(options.study, options.which)
        return 0
    except (ValueError, OSError) as error:
        print(f"fedsim: {error}", flush=True)
        return FAULT
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):
            say(str(stop) or "Stopped.")
        if getattr(stop, "hard", False):
            os._exit(stops.status(stop))
        return stops.status(stop)


def run(study: Path, which: str) -> None:
    """Runs the cells of a sweep that nobody has, until there is none.

    Args:
        which: its "cells", or those of its "tuning", which do not read the test set.

    Raises:
        ValueError: the folder holds no sweep.
        OSError: it cannot be written.
    """
    from fedsim.sweeps import folder
    from fedsim.sweeps.board import Board
    from fedsim.sweeps.cells import Cell
    from fedsim.sweeps.work import work_here

    class Lines(Board):
        """Says what happens in lines, for whoever has started the process, and for people who look into its log."""

        def started(self, cell: Cell) -> None:
            say(f"{BEGINS} {cell.name}")

        def ended(self, cell: Cell) -> None:
            say(f"{ENDED} {cell.name}")

    found = folder.Asked(study)
    directory, cells = (
        (study / folder.CELLS, found.cells) if which == "cells" else (study / folder.TUNING, found.tuning)
    )
    work_here(stays=False)(directory, cells, Lines(study, quiet=True), which == "tuning")


def say(text: str) -> None:
    """A line of the log, with its time."""
    print(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {text}", flush=True)


def begun(log: str) -> str:
    """The cell that a process had begun and not ended when its log breaks off; "" where there is none."""
    name = ""
    for line in log.splitlines():
        _, _, said = line.partition(" ")
        word, _, rest = said.partition(" ")
        if word in (BEGINS, ENDED):
            name = rest if word == BEGINS else ""
    return name


if __name__ == "__main__":
    sys.exit(main())
