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
    """The command line: workload, small, rounds, out, processes, lanes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="where the trained parameters go after round JUDGED, .npz")
    parser.add_argument("--processes", type=int, default=1, help="pfl: processes that share a round's clients")
    parser.add_argument("--lanes", default="auto", help="fedsim: Speed.lanes")
    parser.add_argument("--devices", type=int, help="fedsim: devices that the host is divided into (default: as a run)")
    parser.add_argument("--free", action="store_true", help="wait for nobody: to try a script by hand")
    return parser.parse_args()


class Stopwatch:
    """Times rounds between run.py's leave and the system's word that the new parameters are there."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.free, self.out, self.rounds = o.free, o.out, 0
        self.began = time.perf_counter()

    def say(self, event: str, **more: object) -> None:
        """Sends a message."""
        print(MARK + json.dumps({"event": event, **more}), flush=True)

    def ready(self) -> None:
        """Everything before the first round is done."""
        self.say("ready")

    def begin(self) -> None:
        """Waits for leave to run a round."""
        if not self.free and not sys.stdin.readline():
            raise SystemExit("The benchmark has gone away.")
        self.began = time.perf_counter()

    def end(self, trained: Callable[[], workloads.Arrays]) -> None:
        """The round's parameters are there; `trained` gives them under the names of `workloads.weights`."""
        self.say("round", seconds=time.perf_counter() - self.began)
        self.rounds += 1
        if self.rounds == JUDGED and self.out:
            arrays: dict[str, Any] = {**trained()}
            np.savez(self.out, **arrays)
            self.say("judged")


def loop(o: argparse.Namespace, round: Callable[[int], object], trained: Callable[[], workloads.Arrays]) -> None:
    """The rounds of a system that leaves the loop to us; `round` returns when the parameters are there."""
    watch = Stopwatch(o)
    watch.ready()
    for number in range(1, o.rounds + 1):
        watch.begin()
        round(number)
        watch.end(trained)
