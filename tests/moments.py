"""`fedsim run` in a process of its own, to which something happens as it enters a function: a signal, a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# The first argument is JSON: a list of [place, n, what, number], at the n-th call of a place, "module:name" or "module:Class.name".
HOOKED = """
import importlib, json, os, resource, sys

def hooked(place, nth, what, number):
    module, _, name = place.partition(":")
    home = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        home = getattr(home, part)
    inner, calls = getattr(home, last), []

    def entered(*args, **named):
        calls.append(None)
        if len(calls) == nth and what == "signal":
            os.kill(os.getpid(), number)
        elif len(calls) == nth:  # no file grows beyond so many bytes, which answers as a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
        return inner(*args, **named)

    setattr(home, last, entered)

for hook in json.loads(sys.argv.pop(1)):
    hooked(*hook)
from fedsim.__main__ import main
sys.exit(main())
"""
Hook = tuple[str, int, str, int]


def signal_at(place: str, number: int, nth: int = 1) -> Hook:
    """The process sends itself a signal at the n-th call of a place."""
    return place, nth, "signal", number


def full_at(place: str, size: int, nth: int = 1) -> Hook:
    """From the n-th call of a place on, no file has room for more than so many bytes."""
    return place, nth, "limit", size


class Place(NamedTuple):
    """A working directory in which `fedsim run` is started."""

    folder: Path
    environment: dict[str, str]

    def start(self, *argv: str, hooks: tuple[Hook, ...] = ()) -> subprocess.Popen[str]:
        """`fedsim run ...`, with what happens to it."""
        how = ["-c", HOOKED, json.dumps(hooks)] if hooks else ["-m", "fedsim"]
        return subprocess.Popen(
            [sys.executable, *how, "run", *argv], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *argv: str, hooks: tuple[Hook, ...] = ()) -> tuple[int, str]:
        """Its exit status and standard error."""
        process = self.start(*argv, hooks=hooks)
        _, error = process.communicate(timeout=300)
        return process.returncode, error.strip()
