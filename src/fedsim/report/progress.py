"""The progress of a run: a live display on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from fedsim.record import Round
from fedsim.units import duration, share, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REMEMBERED = 5  # rounds over which time left is estimated


class Progress:
    """Shows a run while it goes on.

    Example:
        with Progress(config.rounds, head_rounds=config.head_rounds) as progress:
            progress.message("compiling")
            progress.update(line)

    Args:
        rounds: communication rounds in all.
        head_rounds: how many of them train the head alone; their speed says nothing about the others.
        quiet: show nothing.
        console: where to; standard output if left out. Its `is_terminal` decides between live and plain.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        rounds: int,
        *,
        head_rounds: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._rounds, self._head_rounds, self._quiet = rounds, head_rounds, quiet
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._clock = clock
        self._line: Round | None = None
        self._validation: Round | None = None  # the last one: not every round is evaluated
        self._message = ""
        self._spent: deque[float] = deque(maxlen=REMEMBERED)  # seconds of the last rounds of this phase
        self._since = clock()
        self._began = self._since
        self._live: Any = None
        self._headed = False

    def __enter__(self) -> Self:
        self._since = self._began = self._clock()
        if self._console.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(self, console=self._console, refresh_per_second=4, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()  # leaves the last state on the screen
            self._live = None

    def message(self, text: str) -> None:
        """Says what goes on beside the rounds: loading, compiling, saving."""
        self._message = text
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet:
            self._print(text)

    def update(self, line: Round) -> None:
        """Shows a round that ended; `line` is the one that goes to `rounds.jsonl`."""
        now = self._clock()
        # evaluation and saving count, compiling does not: it will not come again
        spent = now - self._since - line["compile_seconds"]
        if self._line is None or self._line["phase"] != line["phase"]:
            self._spent.clear()
            spent = line["seconds"] - line["compile_seconds"]  # loading came before: only the round itself counts
        self._spent.append(max(spent, 0.0))
        self._since = now
        self._line = line
        self._validation = line["validation"] or self._validation
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet:
            if not self._headed:
                self._print(header(self._rounds))
                self._headed = True
            self._print(plain_line(line, self._rounds, self.left()))

    def left(self) -> float | None:
        """Seconds to the last round at the pace of the last ones; None where nothing can be said."""
        if self._line is None:
            return None
        if self._line["phase"] == "head" and self._head_rounds < self._rounds:
            return None  # rounds of another kind follow
        pace = sorted(self._spent)[len(self._spent) // 2]  # the median: one slow save does not count
        return pace * (self._rounds - self._line["round"])

    def _print(self, text: str) -> None:
        # not through rich, which would wrap and interpret brackets
        print(text, file=self._console.file, flush=True)

    def __rich__(self) -> RenderableType:
        """The live display: a bar and three lines of figures."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line, seen = self._line, self._validation
        done = line["round"] if line else 0
        bar = Table.grid(padding=(0, 1))
        left = self.left()
        elapsed = duration(self._clock() - self._began)
        bar.add_row(
            Text(f"round {done}/{self._rounds}", style="bold"),
            ProgressBar(total=self._rounds, completed=done, width=30),
            Text(line["phase"] if line else "", style="magenta"),
            Text(elapsed, style="dim"),
            Text(f"{duration(left)} left" if left else "", style="cyan"),
        )
        parts: list[RenderableType] = [bar]
        if line:
            figures = Table.grid(padding=(0, 2))
            for _ in range(6):
                figures.add_column(no_wrap=True)
            figures.add_row(
                Text("train", style="dim"),
                f"loss {share(line['loss'])}",
                f"accuracy {share(line['accuracy'])}",
                Text("sent", style="dim"),
                f"up {size(line['total_bytes_up'])}",
                f"down {size(line['total_bytes_down'])}",
            )
            figures.add_row(
                Text("validation", style="dim"),
                f"loss {share(seen['loss'])}" if seen else "–",
                Text(f"accuracy {share(seen['accuracy'])}", style="bold green") if seen else "–",
                Text("speed", style="dim"),
                f"{speed(line['clients_per_second'])} clients/s",
                f"{speed(line.get('examples_per_second'))} examples/s",
            )
            figures.add_row(
                Text("engine", style="dim"),
                work(line),
                f"lanes {line['lane_occupancy']:.0%} full",
                Text("memory", style="dim"),
                size(line["most_memory"]) if "most_memory" in line else "–",
                f"rows {line['row_occupancy']:.0%} real" if "row_occupancy" in line else "",
            )
            parts.append(figures)
        if self._message:
            parts.append(Text(self._message, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)


COLUMNS = (
    ("phase", 5),
    ("loss", 6),
    ("train", 5),
    ("valid", 5),
    ("up", 8),
    ("down", 8),
    ("clients/s", 9),
    ("GFLOP/s", 7),  # or MFU, with a percent sign
    ("left", 10),
)


def aligned(first: str, cells: Sequence[str], rounds: int) -> str:
    """Cells under their columns; 88 characters wide for runs of fewer than 1,000 rounds."""
    width = max(len("round"), 2 * len(str(rounds)) + 1)
    return "  ".join([f"{first:>{width}}", *(f"{x:>{n}}" for x, (_, n) in zip(cells, COLUMNS, strict=True))])


def header(rounds: int) -> str:
    """The line above the plain lines of a run."""
    return aligned("round", [name for name, _ in COLUMNS], rounds)


def plain_line(line: Round, rounds: int, left: float | None) -> str:
    """One round in one aligned line of plain text; bytes are the totals so far."""
    seen, rate = line["validation"] or {}, line["clients_per_second"]
    cells = (
        line["phase"],
        share(line["loss"]),
        share(line["accuracy"]),
        share(seen.get("accuracy")),
        size(line["total_bytes_up"]),
        size(line["total_bytes_down"]),
        speed(rate),
        work(line).removesuffix(" GFLOP/s").removeprefix("MFU "),
        "–" if left is None else duration(left),
    )
    return aligned(f"{line['round']}/{rounds}", cells, rounds)


def work(line: Round) -> str:
    """MFU where the device's peak is known, else the counted FLOP/s; a dash where nothing was counted."""
    if line.get("mfu") is not None:
        return f"MFU {line['mfu']:.1%}"
    rate = line.get("flops_per_second")
    return "–" if rate is None else f"{speed(rate / 1e9)} GFLOP/s"


def speed(rate: float | None) -> str:
    """Clients per second with three digits, never in powers of ten; a dash where not known."""
    return "–" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
