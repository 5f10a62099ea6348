"""Ctrl-C and SIGTERM: when they end a process, what it says then, and its exit status.

No JAX here: a stop may come while it is imported.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}  # the second one is what clusters send
ANEW = "Stopped while preparing; nothing is lost, the same command starts again."
LATER = 0.02  # seconds until a stop that was swallowed is asked for again

_words: list[str] = []  # of the stop by which this process is ending; a second one says the same
_depth: list[None] = []  # one entry for each context that is open


class Stop(KeyboardInterrupt):
    """A stop with its words.

    Args:
        words: where it stopped, and how to go on.
        number: the signal; None: SIGINT, as where another of several processes was asked.
        shared: all processes of the run stop here, after a round; else this one alone.
        hard: it was the second signal: nothing is waited for.
    """

    def __init__(self, words: str, number: int | None = None, *, shared: bool = False, hard: bool = False) -> None:
        super().__init__(words)
        self.number, self.shared, self.hard = int(number or signal.SIGINT), shared, hard
        if _depth and not _words:
            _words.append(words)


def way_on(directory: Path | str) -> str:
    """How to go on with a run."""
    return f"go on with: fedsim run --resume {shlex.quote(str(directory))}"


def reworded(stop: KeyboardInterrupt, words: str) -> Stop:
    """The same stop, told by those who know more of what it stopped."""
    number, shared, hard = (getattr(stop, name, None) for name in ("number", "shared", "hard"))
    return Stop(words, number, shared=bool(shared), hard=bool(hard))


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


@contextmanager
def at_once(words: Callable[[], str], *, last: bool = False) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends what is inside at once, by a `Stop` with these words.

    A second one, while files are being closed, ends that too.

    Args:
        last: the process ends behind it: a signal then ends it as it ends any other, without a traceback of Python's.
    """

    def stop(number: int, frame: Any) -> None:
        again = bool(_words)
        raise Stop(_words[0] if again else words(), number, hard=again)

    with _handled(stop, last):
        yield


@contextmanager
def after_round(words: str) -> Iterator[Callable[[], int | None]]:
    """Ctrl-C or SIGTERM asks for a stop after the round; a second one stops at once. Yields a function: which one came?

    Args:
        words: how to go on later, which the second one says.
    """
    asked: int | None = None

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked is not None:
            raise Stop(f"Stopped at once; {words}", number, hard=True)
        asked = number
        # Not by print: a signal may come while the same buffer is written to, which Python refuses.
        name = SIGNALS[signal.Signals(number)]
        said = f"\nStopping after this round ({name}); another Ctrl-C or SIGTERM stops at once.\n"
        with suppress(OSError):
            os.write(2, said.encode())

    with _handled(ask):
        yield lambda: asked


@contextmanager
def _handled(handler: Callable[[int, Any], None], last: bool = False) -> Iterator[None]:
    """Has both signals handled so; not outside the main thread, as in some notebooks: Ctrl-C then stops at once."""
    before: dict[signal.Signals, Any] = {}
    hook = sys.unraisablehook

    def asked_again(found: Any) -> None:
        """A stop that fell into a callback of C, where Python drops it, as at JAX' end of a garbage collection."""
        if isinstance(found.exc_value, Stop):
            if not found.exc_value.hard:
                _words.clear()
            threading.Timer(LATER, os.kill, (os.getpid(), found.exc_value.number)).start()
        else:
            hook(found)

    try:
        for number in SIGNALS:
            before[number] = signal.signal(number, handler)
    except ValueError:
        yield
        return
    sys.unraisablehook = asked_again
    _depth.append(None)
    try:
        yield
    finally:
        _depth.pop()
        if not _depth:
            _words.clear()
        sys.unraisablehook = hook
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if last or old is None else old)  # None: not set from Python
