"""The progress of a run: a live display on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from fedsim.config import USUAL
from fedsim.record import Round
from fedsim.units import duration, share, size, words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

REMEMBERED = 5  # rounds over which time left is estimated
EVERY = 10.0  # seconds of silence after which a line without a terminal says what goes on
WIDE = 76  # columns from which the live display shows all its figures; below, loss, metric and bytes
KIND = 12  # letters of a PEFT kind in a round's line, at most


class Progress:
    """Shows a run while it goes on. It never ends the run: where nothing can be shown, it says so once and is quiet.

    Example:
        with Progress(config.rounds, head_rounds=config.head_rounds) as progress:
            progress.message("compiling")
            progress.update(line)

    Args:
        rounds: communication rounds in all.
        head_rounds: how many of them train the head alone; their speed says nothing about the others.
        kind: what the rounds after them train, the PEFT kind.
        metric: the score to show of training and of validation.
        quiet: show nothing.
        console: where to; standard output if left out. Its `is_terminal` decides between live and plain.
        clock: seconds that only grow.
        every: seconds of silence, without a terminal, after which a line says what goes on.
    """

    def __init__(
        self,
        rounds: int,
        *,
        head_rounds: int = 0,
        kind: str = "peft",
        metric: str = USUAL,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        from rich.console import Console

        self._rounds, self._head_rounds, self._quiet, self._metric = rounds, head_rounds, quiet, metric
        self._kind = kind if len(kind) <= KIND else f"{kind[: KIND - 1]}…"
        self._console = console or Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._clock, self._every = clock, every
        self._line: Round | None = None
        self._validation: Round | None = None  # the last one: not every round is evaluated
        self._message, self._far = "", ""
        self._said: set[str] = set()  # notes that are said once
        self._spent: deque[float] = deque(maxlen=REMEMBERED)  # seconds of the last rounds of this phase
        self._fresh = True  # loading came before the next round: only the round itself counts
        self._since = clock()
        self._began = self._heard = self._since
        self._live: Any = None
        self._ticks = threading.Event()  # set at the end
        self._headed = False

    def __enter__(self) -> Self:
        self._since = self._began = self._heard = self._clock()
        if self._quiet:
            return self
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(self, console=self._console, refresh_per_second=4, redirect_stderr=False)
            self._show(self._live.start)
        else:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ticks.set()
        if self._live is not None:
            self._show(self._live.stop)  # leaves the last state on the screen
            self._live = None

    def message(self, text: str) -> None:
        """Says what goes on now: loading, compiling, saving. The next round takes its place."""
        self._message, self._far = words(text), ""
        self._since_heard()
        if self._live is not None:
            self._show(self._live.refresh)
        else:
            self._print(self._message)

    def note(self, text: str, once: str = "") -> None:
        """Says what stays true after the round, above the live display; what has a name `once` is said once a run."""
        if once and once in self._said:
            return
        self._said.add(once)
        self._since_heard()
        if self._live is not None:
            from rich.text import Text

            self._show(lambda: self._console.print(Text(words(text))))
        else:
            self._print(words(text))

    def far(self, what: str, done: int, of: int) -> None:
        """How far something long is; shown live, and without a terminal in the next line after some seconds of silence."""
        self._far = f"{what}: {done:,} of {of:,}" if done < of else ""

    def resume(self, lines: Sequence[Round]) -> None:
        """Goes on after these rounds, if there are any, whose pace is known; says from where."""
        if not lines:
            return
        last = lines[-1]
        self._line = last
        self._validation = next((line["validation"] for line in reversed(lines) if line["validation"]), None)
        same = [line for line in lines if line["phase"] == last["phase"]][-REMEMBERED:]
        self._spent.extend(max(line["seconds"] - line["compile_seconds"], 0.0) for line in same)
        self.message(f"going on after round {last['round']} of {self._rounds}")

    def update(self, line: Round) -> None:
        """Shows a round that ended; `line` is the one that goes to `rounds.jsonl`."""
        now = self._clock()
        # evaluation and saving count, compiling does not: it will not come again
        spent = now - self._since - line["compile_seconds"]
        if self._line is None or self._line["phase"] != line["phase"]:
            self._spent.clear()
            self._fresh = True
        if self._fresh:  # loading came before: only the round itself counts
            spent, self._fresh = line["seconds"] - line["compile_seconds"], False
        self._spent.append(max(spent, 0.0))
        self._since = now
        self._line = line
        self._validation = line["validation"] or self._validation
        self._message = self._far = ""
        self._since_heard()
        if self._live is not None:
            self._show(self._live.refresh)
        else:
            if not self._headed:
                self._print(header(self._rounds, self._kind, self._metric))
                self._headed = True
            self._print(plain_line(line, self._rounds, self.left(), self._kind, self._metric))

    def left(self) -> float | None:
        """Seconds to the last round at the pace of the last ones; None where nothing can be said."""
        if self._line is None:
            return None
        if self._line["phase"] == "head" and self._head_rounds < self._rounds:
            return None  # rounds of another kind follow
        pace = sorted(self._spent)[(len(self._spent) - 1) // 2]  # the median: one slow save does not count
        return pace * (self._rounds - self._line["round"])

    def _since_heard(self) -> None:
        self._heard = self._clock()

    def _tick(self) -> None:
        """Breaks the silence of something long, in a thread of its own, where there is no terminal."""
        while not self._ticks.wait(self._every / 10):
            if self._clock() - self._heard >= self._every:
                done = self._line["round"] if self._line else 0
                doing = self._far or self._message or f"round {done + 1} of {self._rounds}"
                self._since_heard()
                self._print(f"{doing}, after {duration(self._clock() - self._began)}")

    def _print(self, text: str) -> None:
        # not through rich, which would wrap and interpret brackets
        self._show(lambda: print(text, file=self._console.file, flush=True))

    def _show(self, show: Callable[[], object]) -> None:
        """Shows something; a pipe that was closed, or a terminal that cannot write a letter, ends the display, not the run."""
        if self._quiet:
            return
        try:
            show()
        except (OSError, ValueError) as error:  # a UnicodeEncodeError is a ValueError
            self._quiet, self._live = True, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(f"The progress cannot be shown ({error}); the run goes on.", file=sys.stderr, flush=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The live display: a bar and lines of figures; of a narrow terminal those that matter most."""
        from rich.text import Text

        line, seen, wide = self._line, self._validation, options.max_width >= WIDE
        yield self._bar(options.max_width)
        if line:
            yield (figures if wide else few_figures)(line, seen, self._metric)
        if said := self._far or self._message:
            yield Text(said, style="dim", no_wrap=True, overflow="ellipsis")

    def _bar(self, width: int) -> RenderableType:
        """Rounds, the share of the time that has passed, the phase, times; a bar that moves where nothing is known of it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done, left = (self._line["round"] if self._line else 0), self.left()
        passed = self._clock() - self._began
        cells = [
            Text(f"round {done}/{self._rounds}", style="bold"),
            Text(phase_of(self._line, self._kind) if self._line else "", style="magenta"),
            Text(duration(passed), style="dim"),
            Text(f"{duration(left)} left" if left else "", style="cyan"),
        ]
        room = width - sum(len(cell) for cell in cells) - 2 * len(cells)
        # By time, not by rounds: those of the head alone take a small part of it.
        whole = None if left is None else max(passed + left, 1e-9)
        bar = ProgressBar(
            total=whole or 1.0, completed=passed if whole else 0.0, width=max(min(room, 30), 4), pulse=whole is None
        )
        made = Table.grid(padding=(0, 1))
        made.add_row(cells[0], bar, *cells[1:])
        return made


def figures(line: Round, seen: Round | None, metric: str = USUAL) -> Table:
    """All figures of a round, side by side."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    for _ in range(6):
        made.add_column(no_wrap=True)
    made.add_row(
        Text("train", style="dim"),
        f"loss {share(line['loss'])}",
        f"{metric} {share(line.get(metric))}",
        Text("sent", style="dim"),
        f"up {size(line['total_bytes_up'])}",
        f"down {size(line['total_bytes_down'])}",
    )
    made.add_row(
        Text("validation", style="dim"),
        f"loss {share(seen['loss'])}" if seen else "–",
        Text(f"{metric} {share(seen.get(metric))}", style="bold green") if seen else "–",
        Text("speed", style="dim"),
        f"{speed(line['clients_per_second'])} clients/s",
        f"{speed(line.get('examples_per_second'))} examples/s",
    )
    made.add_row(
        Text("engine", style="dim"),
        work(line),
        f"lanes {line['lane_occupancy']:.0%} full",
        Text("memory", style="dim"),
        size(line["most_memory"]) if "most_memory" in line else "–",
        f"rows {line['row_occupancy']:.0%} real" if "row_occupancy" in line else "",
    )
    return made


def few_figures(line: Round, seen: Round | None, metric: str = USUAL) -> Table:
    """Loss, metric and bytes of a round, one below the other."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_row(Text("train", style="dim"), f"loss {share(line['loss'])}", f"{metric} {share(line.get(metric))}")
    made.add_row(
        Text("validation", style="dim"),
        f"loss {share(seen['loss'])}" if seen else "–",
        Text(f"{metric} {share(seen.get(metric))}", style="bold green") if seen else "–",
    )
    sent = f"up {size(line['total_bytes_up'])}", f"down {size(line['total_bytes_down'])}"
    made.add_row(Text("sent", style="dim"), *sent)
    return made


def phase_of(line: Round, kind: str) -> str:
    """What a round trained: the head alone, or the PEFT kind."""
    return line["phase"] if line["phase"] == "head" else kind


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


def aligned(first: str, cells: Sequence[str], rounds: int, kind: str) -> str:
    """Cells under their columns; 88 characters wide for runs of fewer than 1,000 rounds of a short kind."""
    width = max(len("round"), 2 * len(str(rounds)) + 1)
    widths = [max(n, len(kind)) if name == "phase" else n for name, n in COLUMNS]
    return "  ".join([f"{first:>{width}}", *(f"{x:>{n}}" for x, n in zip(cells, widths, strict=True))])


def header(rounds: int, kind: str = "peft", metric: str = USUAL) -> str:
    """The line above the plain lines of a run; above it another metric than the usual one is named."""
    said = (
        "" if metric == USUAL else f"train and valid are the {metric} on training batches and on the validation set\n"
    )
    return said + aligned("round", [name for name, _ in COLUMNS], rounds, kind)


def plain_line(line: Round, rounds: int, left: float | None, kind: str = "peft", metric: str = USUAL) -> str:
    """One round in one aligned line of plain text; bytes are the totals so far."""
    seen, rate = line["validation"] or {}, line["clients_per_second"]
    cells = (
        phase_of(line, kind),
        share(line["loss"]),
        share(line.get(metric)),
        share(seen.get(metric)),
        size(line["total_bytes_up"]),
        size(line["total_bytes_down"]),
        speed(rate),
        work(line).removesuffix(" GFLOP/s").removeprefix("MFU "),
        "–" if left is None else duration(left),
    )
    return aligned(f"{line['round']}/{rounds}", cells, rounds, kind)


def work(line: Round) -> str:
    """MFU where the device's peak is known, else the counted FLOP/s; a dash where nothing was counted."""
    if line.get("mfu") is not None:
        return f"MFU {line['mfu']:.1%}"
    rate = line.get("flops_per_second")
    return "–" if rate is None else f"{speed(rate / 1e9)} GFLOP/s"


def speed(rate: float | None) -> str:
    """Clients per second with three digits, never in powers of ten; a dash where not known."""
    return "–" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
