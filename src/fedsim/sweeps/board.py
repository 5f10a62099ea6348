"""What people see of a sweep that goes on: a live table of cells on a terminal, a line for each cell elsewhere.

All of it is read from the folders of the cells, so that it is the same whoever runs them. It also writes the sweep's
tables anew as cells end.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedsim import record
from fedsim.sweeps import folder
from fedsim.sweeps.cells import Cell, words_of
from fedsim.sweeps.show import plain_console
from fedsim.sweeps.study import Study, is_sweep, load_sweep
from fedsim.units import duration, share, size, words

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

LOOK = 0.5  # s between two looks at what other processes do
SHARE = 10  # times as long as writing the tables has taken, or looking at cells, until it is done again
DONE_SHOWN = 8  # cells that have ended, in the live table


class Board:
    """Shows a sweep while it goes on.

    Args:
        where: the sweep's folder.
        quiet: show nothing.
        console: where to; standard output if left out.
    """

    def __init__(self, where: Path, *, quiet: bool = False, console: Console | None = None) -> None:
        self.where, self.quiet, self._console = where, quiet, console
        self._live: Live | None = None
        self._study: Study | None = None
        self.cells: list[Cell] = []
        self.left: dict[str, Cell] = {}  # that have not ended, as far as this board has seen
        self.places: Mapping[str, Path] = {}
        self.last: list[tuple[Cell, str]] = []  # ended most lately, with what is said of them
        self.title = ""
        self._began = self._written = time.monotonic()
        self._writing, self._looking = 0.0, 0.0  # seconds of the last write, and of the last look
        self._ended = 0  # cells that ended since `begin`
        self._busy: list[Cell] = []  # that somebody works on, when they were looked for
        self._next_look = 0.0

    def __enter__(self) -> Self:
        if self.quiet:
            return self
        from rich.live import Live

        self._console = self._console or plain_console()
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._shown, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            with contextlib.suppress(Exception):
                self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._console is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody looks any more
                self._console.print(words(text), soft_wrap=True)
                sys.stdout.flush()

    # --- what happens

    def begin(self, cells: Sequence[Cell], directory: Path, title: str = "") -> None:
        """These cells come now."""
        self.places = folder.places(directory, cells)
        self.cells, self.title, self.last = list(cells), title, []
        states = {cell.key: folder.state(self.places[cell.key]) for cell in cells}
        self.left = {cell.key: cell for cell in cells if states[cell.key] not in ("done", "failed")}
        self._study = load_sweep(self.where) if not title and is_sweep(self.where) else None
        self._began, self._ended = time.monotonic(), 0
        counts = [*states.values()]
        rest = ", ".join(f"{counts.count(s)} {s}" for s in ("done", "stopped", "running", "failed") if s in counts)
        self.say(f"{title or 'cells'}: {len(cells)}{f' ({rest})' if rest else ''} in {directory}")

    def started(self, cell: Cell) -> None:
        """This process begins with a cell; the live table finds it by its claim."""

    def ended(self, cell: Cell) -> None:
        """A cell is over, well or not."""
        if self.left.pop(cell.key, None) is None:
            return
        self._ended += 1
        told = self.told(cell)
        self.last = [*self.last, (cell, told)][-DONE_SHOWN:]
        count, left = len(self.cells) - len(self.left), self.remaining()
        if self._live is None or told.startswith("failed"):
            name = words_of(cell.varied) or cell.name
            self.say(
                f"{count:>{len(str(len(self.cells)))}}/{len(self.cells)}  {name}: {told}"
                + (f"; {left} left" if left else "")
            )
        self.write()

    def look(self) -> None:
        """Finds the cells that other processes have ended."""
        for cell in list(self.left.values()):
            if folder.over(self.places[cell.key]) and not folder.claimed(self.places[cell.key]):
                self.ended(cell)

    def wait(self) -> None:
        """Lets others work for a moment; a long one where looking takes long, as at many cells on a slow disk."""
        time.sleep(max(LOOK, SHARE * self._looking))
        began = time.monotonic()
        self.look()
        self._looking = time.monotonic() - began

    def chose(self, method: str, options: Mapping[str, Any], edges: Sequence[str], scores: Mapping[str, float]) -> None:
        """Says what was chosen, what each value scored, and which is at an edge of its values."""
        tried = ", ".join(f"{share(abs(value))} at {name}" for name, value in scores.items())
        which = f": {', '.join(edges)}" if len(options) > 1 else ""
        edge = f" (at the edge of its values{which}; a better one may lie beyond)" if edges else ""
        self.say(f"{method or 'all cells'}: {words_of(options)}{edge}; validation {tried}")

    def close(self, study: Study) -> None:
        """The end: the table over seeds."""
        self._stop()
        if not self.quiet:
            study.table(console=self._console)
            self.say(f"Folder: {study.directory} (cells.csv, rounds.csv)")

    # --- the tables

    def write(self) -> None:
        """Writes the sweep's tables, unless they were written so lately that it would take a tenth of the time."""
        now = time.monotonic()
        if self._study is None or now - self._written < SHARE * self._writing:
            return
        with contextlib.suppress(OSError, ValueError):  # they are written once more at the end, and that one speaks
            self._study.write()
        self._written = time.monotonic()
        self._writing = self._written - now

    # --- what it looks like

    def told(self, cell: Cell) -> str:
        """How a cell has ended, in words."""
        place = self.places[cell.key]
        if folder.state(place) == "failed":
            return f"failed: {folder.error_of(place)}"
        try:
            result = record.load(place).summary
        except ValueError as error:
            return f"failed: {error}"
        if result is None:
            return "stopped"
        metric = result["metric"]
        final = {split: (result["final"][split] or {}).get(metric) for split in ("validation", "test")}
        test = "" if self.title else f", test {share(final['test'])}"  # where options are chosen there is none
        return f"validation {share(final['validation'])}{test}, {size(result['bytes']['total'])}, {duration(result['seconds'])}"

    def remaining(self) -> str:
        """Time left, from the pace since the beginning; "" where it is not known."""
        if not self._ended or not self.left:
            return ""
        return duration((time.monotonic() - self._began) / self._ended * len(self.left))

    def running(self) -> list[tuple[Cell, str]]:
        """The cells that somebody works on, with their rounds; looked for so seldom that it takes a tenth of the time."""
        began = time.monotonic()
        if began >= self._next_look:
            claimed = (cell for cell in list(self.left.values()) if folder.claimed(self.places[cell.key]))
            self._busy = list(itertools.islice(claimed, DONE_SHOWN))
            now = time.monotonic()
            self._next_look = now + SHARE * (now - began)
        return [
            (cell, f"round {lines_in(self.places[cell.key] / record.ROUNDS)} of {cell.config.rounds}")
            for cell in self._busy
            if cell.key in self.left
        ]

    def _shown(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        made = Table.grid(padding=(0, 2))
        for cell, told in self.last:
            made.add_row(Text("failed" if told.startswith("failed") else "done", style="dim"),
                         Text(words(words_of(cell.varied) or cell.name)), Text(words(told), style="dim"))  # fmt: skip
        for cell, told in self.running():
            made.add_row(
                Text("running", style="bold green"), Text(words(words_of(cell.varied) or cell.name)), Text(told)
            )
        done, passed = len(self.cells) - len(self.left), duration(time.monotonic() - self._began)
        left = self.remaining()
        made.add_row(Text(self.title or "cells", style="bold"), Text(f"{done} of {len(self.cells)}", style="bold"),
                     Text(f"{passed}{f', {left} left' if left else ''}", style="cyan"))  # fmt: skip
        return made


def lines_in(file: Path) -> int:
    """Lines of a file; 0 where it is not there."""
    try:
        with file.open("rb") as opened:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: opened.read(2**20), b""))
    except OSError:
        return 0
