"""What each system's script shares: it says when it is ready, waits for leave before every round, and hands in its result.

`run.py` starts a script as `python with_NAME.py W2 --rounds 8 --out FILE`. Messages are lines of JSON on standard output
behind `MARK`; whatever else a system prints is kept as its log. Leave is a line on standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import workloads

MARK = "peers-benchmark "
JUDGED = 3  # the round after which every system hands in its parameters


def options() -> argparse.Namespace:
    """The command line of every system's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="where the trained parameters go after round JUDGED, .npz")
    parser.add_argument("--processes", type=int, default=1, help="pfl: processes that share a round's clients")
    parser.add_argument(
        "--gpu-share", type=float, default=1.0, help="Flower on a GPU: the fraction that an actor takes"
    )
    parser.add_argument("--lanes", default="auto", help="fedsim: Speed.lanes")
    parser.add_argument(
        "--devices", type=int, help="JAX: devices that the host is divided into (default: fedsim as a run, others one)"
    )
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="where it computes")
    parser.add_argument("--free", action="store_true", help="wait for nobody: to try a script by hand")
    return parser.parse_args()


class CompileClock:
    """Seconds that JAX has spent tracing, lowering and compiling in this process since this clock was made.

    Tracing a function traces the compiled functions that it calls, and JAX reports both; threads may compile side
    by side. So it is the length of the union of all spans that counts.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []  # (from, until), apart, ascending
        monitoring: Any = sys.modules["jax"].monitoring
        monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event: str, duration: float, **_: Any) -> None:
        """A span that ends now."""
        if not event.startswith("/jax/core/compile/"):
            return
        until = time.perf_counter()
        start = until - duration
        while self.spans and self.spans[-1][1] > start:
            start = min(start, self.spans.pop()[0])
        self.spans.append((start, until))

    @property
    def seconds(self) -> float:
        """Of all spans."""
        return sum(until - start for start, until in self.spans)


class Stopwatch:
    """Times rounds between run.py's leave and the system's word that the new parameters are there."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.free, self.out, self.rounds = o.free, o.out, 0
        self.began = time.perf_counter()
        self.clock = CompileClock() if "jax" in sys.modules else None
        self.compiled = 0.0  # s, when the round began

    def say(self, event: str, **more: object) -> None:
        """Sends a message."""
        print(MARK + json.dumps({"event": event, **more}), flush=True)

    def ready(self, **about: object) -> None:
        """Everything before the first round is done; `about` goes into the record."""
        self.say("ready", **about)

    def begin(self) -> None:
        """Waits for leave to run a round."""
        if not self.free and not sys.stdin.readline():
            raise SystemExit("The benchmark has gone away.")
        self.compiled = self.clock.seconds if self.clock else 0.0
        self.began = time.perf_counter()

    def end(self, trained: Callable[[], workloads.Arrays]) -> None:
        """The round's parameters are there; `trained` gives them under the names of `workloads.weights`."""
        seconds = time.perf_counter() - self.began
        compiling = self.clock.seconds - self.compiled if self.clock else None
        self.say("round", seconds=seconds, compiling=compiling)
        self.rounds += 1
        if self.rounds == JUDGED and self.out:
            arrays: dict[str, Any] = {**trained()}
            np.savez(self.out, **arrays)
            self.say("judged")


def loop(
    o: argparse.Namespace, round: Callable[[int], object], trained: Callable[[], workloads.Arrays], **about: object
) -> None:
    """The rounds of a system that leaves the loop to us; `round` returns when the parameters are there."""
    watch = Stopwatch(o)
    watch.ready(**about)
    for number in range(1, o.rounds + 1):
        watch.begin()
        round(number)
        watch.end(trained)
