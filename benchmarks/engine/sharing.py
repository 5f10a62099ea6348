"""What a sweep saves: 24 cells by one command, against 24 commands; and what planning of 10,000 cells takes.

    python benchmarks/engine/sharing.py                   # twenty minutes
    python benchmarks/engine/sharing.py --small           # four cells, to see that it works

The cells tune a head on frozen features of digits: six rates, four seeds. Both ways have the same options; programs that a
run keeps in its cache are compiled before, by a turn that does not count. Every turn starts in an empty folder. It stops if
both ways do not give the same scores. Wall time is taken apart by what the records say:

    rounds       training and evaluation in the rounds, without compiling
    compiling    in the rounds: tracing, lowering, XLA or reading its cache
    around them  of the runs' own seconds: weights, frozen features, first and last evaluation, files
    the rest     starting Python and JAX, reading the data; of single commands also their pictures, which cells do not draw
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

sys.path.append(str(Path(__file__).parents[1]))  # where `report` lies

RATES = ("0.01", "0.03", "0.1", "0.3", "1", "3")
SEEDS = ("0", "1", "2", "3")
OPTIONS = [
    "--dataset",
    "digits",
    "--backbone",
    "vit_tiny",
    "--weights",
    "random",
    "--peft",
    "head",
    "--optimizer",
    "sgd",
]
OPTIONS += ["--clients", "20", "--rounds", "20", "--eval-every", "5"]
LITTLE = ["--dataset", "digits", "--backbone", "mlp", "--peft", "head", "--optimizer", "sgd", "--clients", "20"]
LITTLE += ["--rounds", "3"]
PARTS = ("rounds", "compiling", "around them", "the rest")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 3
    """Turns that count: of the sweep, then of the single commands."""
    planned: int = 10_000
    """Cells of the sweep that is planned and not run."""
    small: bool = False
    """Little, to see that it works; no timing worth reporting."""


def fedsim(*arguments: str) -> None:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "fedsim", *arguments, "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_sweep(options: Sequence[str], rates: Sequence[str], seeds: Sequence[str], folder: Path) -> list[Path]:
    """All cells by one command; their folders."""
    fedsim("sweep", *options, "--lr", *rates, "--seeds", *seeds, "--out", str(folder))
    return sorted((folder / "cells").iterdir())


def by_commands(options: Sequence[str], rates: Sequence[str], seeds: Sequence[str], folder: Path) -> list[Path]:
    """Each cell by a command; their folders."""
    cells = [(rate, seed, folder / f"{rate}-{seed}") for rate in rates for seed in seeds]
    for rate, seed, out in cells:
        fedsim("run", *options, "--lr", rate, "--seed", seed, "--out", str(out))
    return [out for _, _, out in cells]


def turn(way: Callable[..., list[Path]], *asked: Sequence[str]) -> tuple[dict[str, float], dict[Any, Any]]:
    """Seconds of one turn, whole and in parts, and what each cell has scored."""
    import fedsim as library

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        places = way(*asked, Path(folder))
        wall = time.perf_counter() - began
        runs = [library.load(place) for place in places]
        lines = [line for run in runs for line in run.rounds]
        compiling = sum(line["compile_seconds"] for line in lines)
        rounds = sum(line["seconds"] for line in lines) - compiling
        own = sum(run.summary["seconds"] for run in runs if run.summary)
    parts = (rounds, compiling, own - rounds - compiling, wall - own)
    scores = {(run.config.lr, run.config.seed): run.summary["final"] for run in runs if run.summary}
    return {"wall": wall, **dict(zip(PARTS, parts, strict=True))}, scores


def planning(count: int) -> dict[str, float]:
    """Seconds of what a sweep of so many cells does before its first and after its last one."""
    from fedsim import Config, Sweep
    from fedsim.sweeps import cell, folder
    from fedsim.sweeps.study import load_sweep
    from fedsim.sweeps.sweep import plan

    seconds = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        seconds[what] = time.perf_counter() - began
        return found

    base = Config(dataset="digits", backbone="mlp", peft="head", clients=20, validation=0.2)
    made = Sweep(base=base, grid={"lr": [1e-5 * (1 + number) for number in range(count // 10)]}, seeds=10)
    with tempfile.TemporaryDirectory() as where:
        study = Path(where)
        _, cells = timed("cells are made and checked", lambda: plan(made, study))
        timed("sweep.json is written", lambda: folder.write(study, base, cells, [], {}))
        timed("their order is found", lambda: cell.in_order(cells))
        timed(
            "their states are read", lambda: [folder.state(p) for p in folder.places(study / "cells", cells).values()]
        )
        found = timed("the sweep is read again", lambda: load_sweep(study))
        timed("cells.csv is written", found.write)
    return seconds


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each entry, over the turns."""
    return {name: statistics.median(one[name] for one in turns) for name in turns[0]}


def main(o: Options) -> None:
    """Measures, prints medians, writes JSON."""
    import report

    if o.small:
        o = dataclasses.replace(o, repeats=1, planned=200)
    asked = (LITTLE, RATES[3:5], SEEDS[:2]) if o.small else (OPTIONS, RATES, SEEDS)
    ways = {"one sweep": by_sweep, f"{len(asked[1]) * len(asked[2])} commands": by_commands}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(o.repeats + 1):
        scores = []
        for name, way in ways.items():
            seconds, found = turn(way, *asked)
            scores.append(found)
            if number:  # the first turn fills the cache of compiled programs
                turns[name].append(seconds)
        if scores[0] != scores[1]:
            raise SystemExit(f"Expected the same scores both ways, got {scores[0]} and {scores[1]}.")
    print(f"{'s':12}" + "".join(f"{name:>14}" for name in ("wall", *PARTS)))
    for name, each in turns.items():
        print(f"{name:12}" + "".join(f"{value:14.2f}" for value in medians(each).values()))
    walls = [medians(each)["wall"] for each in turns.values()]
    print(f"The sweep takes {walls[0] / walls[1]:.2f} of the time of the commands.\n")
    plans = [planning(o.planned) for _ in range(o.repeats)]
    for what, seconds in medians(plans).items():
        print(f"{o.planned:,} cells: {what:28}{seconds:8.2f} s")
    report.write("sharing", o, {"turns": turns, "planning": plans})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
