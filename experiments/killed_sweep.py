"""A sweep of 24 cells that is killed twice, beside the same sweep that nobody disturbs: what is different at the end?

Command:  python experiments/killed_sweep.py            (a minute on 2 cores)
          python experiments/killed_sweep.py --small    (four cells, to see that it works)
Data:     digits (packaged). Model: a perceptron whose head is tuned, six rates and four seeds.
Kills:    SIGKILL to the command, once a fifth of the cells is done, and once two thirds are.
Expected: every cell once, and all of cells.csv and rounds.csv the same but for times and the process's memory.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import tyro

from fedsim import Config, Speed, Sweep, record

base = Config(dataset="digits", backbone="mlp", peft="head", clients=20, rounds=20, eval_every=5, optimizer="sgd")
sweep = Sweep(base=base, grid={"lr": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]}, seeds=4, speed=Speed(checkpoint_every=5))
little = replace(sweep, base=base.replace(rounds=10), grid={"lr": [0.3, 1.0]}, seeds=2)

TIMES = {
    "seconds",
    "compile_seconds",
    "server_seconds",
    "clients_per_second",
    "examples_per_second",
    "flops_per_second",
}
TIMES |= {"mfu", "most_memory"}


def start(name: str, out: Path) -> subprocess.Popen[bytes]:
    """`fedsim sweep experiments/killed_sweep.py:NAME --out OUT`."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", "sweep", f"{__file__}:{name}", "--out", str(out), "--quiet"]
    )


def done(out: Path) -> int:
    """Cells that are done."""
    return len(list((out / "cells").glob(f"*/{record.SUMMARY}")))


def killed_at(name: str, out: Path, cells: int) -> int:
    """Starts the sweep, kills it once so many cells are done, and gives how many are.

    Raises:
        ValueError: it ended before.
    """
    process = start(name, out)
    while done(out) < cells:
        if process.poll() is not None:
            raise ValueError(
                f"Expected the sweep to live until {cells} cells are done; it ended with {process.returncode}."
            )
        time.sleep(0.02)
    process.kill()
    process.wait()
    return done(out)


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a table without what differs from run to run."""
    with file.open(newline="") as opened:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(opened)]


def main(small: bool = False) -> int:
    """Runs both, and says what differs.

    Args:
        small: four cells of ten rounds.
    """
    name, asked = ("little", little) if small else ("sweep", sweep)
    count = len(asked.axes[0].points) * len(asked.axes[1].points)
    with tempfile.TemporaryDirectory() as folder:
        alone, disturbed = Path(folder) / "alone", Path(folder) / "disturbed"
        kills = [killed_at(name, disturbed, share) for share in (max(1, count // 5), 2 * count // 3)]
        before = {p: p.stat().st_mtime_ns for p in (disturbed / "cells").glob(f"*/{record.SUMMARY}")}
        for out in (disturbed, alone):
            if status := start(name, out).wait():
                raise ValueError(f"Expected the sweep to end well, not by {status}.")
        again = sum(p.stat().st_mtime_ns != written for p, written in before.items())
        print(f"killed when {kills[0]} and {kills[1]} of {count} cells were done; {again} finished cells ran again")
        differs = 0
        for file in ("cells.csv", "rounds.csv"):
            mine, other = table(disturbed / file), table(alone / file)
            unequal = sum(a != b for a, b in zip(mine, other, strict=False)) + abs(len(mine) - len(other))
            print(f"{file}: {len(mine)} and {len(other)} rows, {unequal} of them differ in more than times")
            differs += unequal
        return 1 if differs or again else 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main, description=__doc__))
    except ValueError as error:
        sys.exit(str(error))
