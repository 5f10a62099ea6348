"""Two checkouts of fedsim side by side: did a change cost time? Rounds of the peers' workloads, and whole commands.

    git worktree add ../before COMMIT
    python benchmarks/engine/versions.py --before ../before            # against this checkout; half an hour
    python benchmarks/engine/versions.py --before ../before --small    # to see that it works

Both run in the Python that runs this. Each workload is prepared by both, and then they take turns, a round each, the
other waiting. The benchmark of the lanes and whole commands are run in turn, from a start of the process to its end;
programs are compiled before. Medians and their ratio, after / before.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).resolve().parents[2]
sys.path += [str(HERE / "benchmarks"), str(HERE / "benchmarks" / "peers")]
from processes import System

import report

PATIENCE = 600.0  # s
TOY = ["run", "--backbone", "cnn", "--weights", "random", "--peft", "full", "--dataset", "digits", "--clients", "20"]
TOY += ["--rounds", "20", "--out", "{out}"]
COMMANDS = {"fedsim --help": ["--help"], "a toy run": TOY}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    before: str
    """The older checkout."""
    after: str = str(HERE)
    """The newer one."""
    workloads: tuple[str, ...] = ("W1", "W2")
    """Of benchmarks/peers/workloads.py; both checkouts have them."""
    lanes: tuple[int, ...] = (1, 16)
    """Numbers of lanes that benchmarks/engine/lanes.py of both measures; twice each, three rounds a time."""
    repeats: int = 9
    """Rounds of each workload that count, after two that compile; commands have as many runs."""
    small: bool = False
    """Tiny workloads and two repeats; no timing worth reporting."""


def rounds(o: Options, workload: str, logs: Path) -> dict[str, list[float]]:
    """Seconds of each round of both, in turn."""
    sides = {"before": Path(o.before), "after": Path(o.after)}
    systems = {}
    for name, checkout in sides.items():
        script = checkout.resolve() / "benchmarks" / "peers" / "with_fedsim.py"
        small = ["--small"] if o.small else []
        python = ["env", f"PYTHONPATH={checkout.resolve() / 'src'}", sys.executable, str(script)]
        systems[name] = System(
            [*python, workload, "--rounds", str(o.repeats + 2), *small], logs / f"{workload}-{name}.log", logs
        )
        systems[name].ready(PATIENCE)
    try:
        return in_turn({name: system_round(system) for name, system in systems.items()}, o.repeats, warm=2)
    finally:
        for system in systems.values():
            system.end()


def system_round(system: System) -> Callable[[], float]:
    """A call that runs one round and gives its seconds."""
    return lambda: system.round(PATIENCE)["seconds"]


def command(checkout: Path, arguments: Sequence[str], folder: Path) -> Callable[[], float]:
    """A call that runs the command and gives its seconds."""

    def once() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            filled = [a.format(out=out) for a in arguments]
            environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src"), "JAX_PLATFORMS": "cpu"}
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "fedsim", *filled], env=environment, check=True, capture_output=True, cwd=folder
            )
            return time.perf_counter() - began

    return once


def by_lanes(checkout: Path, lanes: Sequence[int], *, small: bool) -> dict[str, float]:
    """Seconds of a round of the checkout's own benchmarks/engine/lanes.py, by number of lanes."""
    script = checkout.resolve() / "benchmarks" / "engine" / "lanes.py"
    options = ["--skip-padded", "--repeats", "3", "--lanes", *map(str, lanes), *(["--small"] if small else [])]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script), *options], env=environment, check=True, capture_output=True, text=True
    )
    found = re.findall(r"^fedsim, (\d+) lanes +([\d.]+) s", done.stdout, re.MULTILINE)
    return {f"lanes.py, {count} lanes": float(seconds) for count, seconds in found}


def in_turn(calls: Mapping[str, Callable[[], float]], repeats: int, warm: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other; the first goes second in every other repeat."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warm):
        for name in list(calls)[:: 1 if repeat % 2 else -1]:
            seconds = calls[name]()
            if repeat >= warm:
                found[name].append(seconds)
    return found


def commit(checkout: Path) -> str:
    """Its short hash."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


def main(o: Options) -> None:
    """Measures, prints, keeps."""
    repeats = 2 if o.small else o.repeats
    o = dataclasses.replace(o, repeats=repeats)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for workload in o.workloads:
            rows.append({"what": workload, **rounds(o, workload, logs)})
            tell(rows[-1])
        sides = {"before": Path(o.before), "after": Path(o.after)}
        turns = [
            {side: by_lanes(checkout, o.lanes, small=o.small) for side, checkout in sides.items()} for _ in range(2)
        ]
        for name in turns[0]["after"]:
            rows.append({"what": name, **{side: [turn[side][name] for turn in turns] for side in sides}})
            tell(rows[-1])
        for name, arguments in COMMANDS.items():
            calls = {side: command(checkout, arguments, logs) for side, checkout in sides.items()}
            rows.append({"what": name, **in_turn(calls, o.repeats, warm=1)})
            tell(rows[-1])
    for row in rows:
        row["ratio"] = statistics.median(row["after"]) / statistics.median(row["before"])
    commits = {"before": commit(Path(o.before)), "after": commit(Path(o.after))}
    named = {o.before: commits["before"], o.after: commits["after"]}  # what is kept names commits, no folders
    sys.argv = [sys.argv[0], *(named.get(word, word) for word in sys.argv[1:])]
    report.write("versions", dataclasses.replace(o, **commits), rows, more=commits)


def tell(row: dict[str, Any]) -> None:
    """One line: both medians, their ratio, and the ratios of the quickest."""
    before, after = statistics.median(row["before"]), statistics.median(row["after"])
    quickest = min(row["after"]) / min(row["before"])
    print(
        f"{row['what']:24} before {before:7.3f} s   after {after:7.3f} s   after / before {after / before:.3f}"
        f"   of the quickest {quickest:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
