"""Clients: 10 to 10,000 of 10,000 a round. What a round costs in time, memory and bytes, and what ten rounds reach.

Command:  python experiments/client_count.py            (each cell in a process of its own; goes on where it stopped)
          fedsim sweep experiments/client_count.py      (the same cells in one process: its memory is then that of all cells)
          python experiments/client_count.py --small    (two cells, once, to see that it works)
Data:     Fashion-MNIST (`fedsim data fetch fashion_mnist`): 54,000 training images, sizes of clients log-normal, 2 at least.
Models:   a perceptron, all of it trained (109,386 parameters), and a ViT of two blocks, LoRA r=4 and head (1,354).
Memory:   the most that the process had, compiling included; so it tells cells apart only where each has a process.
Turns:    all cells three times in turn, since the machine's speed drifts; medians are shown.
Results:  docs/scale.md; populations to a million are in million_clients.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

import fedsim
from fedsim import Config, Speed, Sweep, record
from fedsim.report import plots
from fedsim.sweeps import cell, folder, work
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell, cells
from fedsim.sweeps.study import Study

LANES = 4
MODELS = {
    "perceptron": {"backbone": "mlp", "peft": "full", "lr": 0.1},
    "ViT, LoRA": {"backbone": "vit_tiny", "image_size": 28, "weights": "random", "peft": "lora", "rank": 4, "lr": 0.5},
}
sweep = Sweep(
    base=Config(
        dataset="fashion_mnist", clients=10_000, partition="quantity", size_law="lognormal(sigma=0.9)", min_size=2,
        rounds=10, batch_size=8, optimizer="sgd", eval_every=10,
    ),
    grid={"model": MODELS, "clients_per_round": [10, 16, 100, 1000, 10_000]},
    repeat=3,
    speed=Speed(lanes=LANES, devices=1, compilation_cache=False, cache="off"),
)  # fmt: skip
small = dataclasses.replace(
    sweep,
    base=sweep.base.replace(rounds=3),
    grid={"model": {"perceptron": MODELS["perceptron"]}, "clients_per_round": [10, 100]},
    repeat=1,
)


def run(asked: Sweep, where: Path) -> Study:
    """Runs what is not done, turn after turn, each cell in a process of its own.

    Raises:
        ValueError: a process that was ended, or cells that failed.
    """
    found = sorted(cells(asked), key=lambda c: c.repeat)
    places = folder.places(where / folder.CELLS, found)
    for number, c in enumerate(found, 1):
        if not folder.over(places[c.key]):
            size = ["--small"] if asked is small else []
            if code := started([*size, "--out", str(where), "--cell", c.key]):
                raise ValueError(
                    f"Expected the process of {c.name} to end well, not by {code}; the same command goes on."
                )
        print(f"{number}/{len(found)}  {c.name}: {folder.state(places[c.key])}", flush=True)
    study = fedsim.sweep(asked, out=where, quiet=True)  # runs nothing more: writes what was asked, and the tables
    if failed := [row for row in study.rows() if row["state"] == "failed"]:
        raise ValueError(f"Expected {failed[0]['name']} to end well; {failed[0]['error']}")
    return study


def started(options: Sequence[str]) -> int:
    """The exit code of this script with these options, in a process of its own."""
    return subprocess.run([sys.executable, __file__, *options], check=False).returncode


def run_one(asked: Sweep, where: Path, key: str) -> None:
    """Runs one cell, in this process."""
    found: Cell = next(c for c in cells(asked) if c.key == key)
    place = folder.places(where / folder.CELLS, [found])[key]
    work.attempt(found, place, cell.Shared(), Board(where, quiet=True))


def rows(study: Study) -> list[dict[str, Any]]:
    """A row for each model and cohort: medians over turns, and in each turn over the rounds behind the first."""
    found = []
    for setting in study.settings():
        turns = [of_turn(record.rounds(study.places[c.key])) for c in setting.cells if study.row(c)["state"] == "done"]
        if turns:
            medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            found.append({**setting.varied, "turns": len(turns), **medians})
    return found


def of_turn(lines: Sequence[record.Round]) -> dict[str, float]:
    """The figures of a run; programs are compiled in the first round, which is left out of the times."""
    later, last = lines[1:], lines[-1]

    def median(value: Callable[[record.Round], float]) -> float:
        return statistics.median(map(value, later))

    return {
        "seconds": median(lambda line: line["seconds"] - line["compile_seconds"]),
        "microseconds_row": median(lambda line: 1e6 * (line["seconds"] - line["compile_seconds"]) / line["examples"]),
        "peak_bytes": last["most_memory"],
        "lane_occupancy": median(lambda line: line["lane_occupancy"]),
        "row_occupancy": median(lambda line: line["row_occupancy"]),
        "accuracy": last["validation"]["accuracy"],
        "down": last["bytes_down"],
        "up": last["bytes_up"],
        "compiled_later": sum(line["compile_seconds"] for line in later[:-1]),  # the last one compiles the evaluation
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: times and memory also against the smallest cohort that fills the lanes, with four clients a lane."""
    lines = [
        "| model | clients a round | round, s | row, us | to full lanes | peak, MiB | to full lanes | lanes in use "
        "| rows in use | accuracy | MB down + up | compiling after round 1, s |",
        "|---" + "|---:" * 11 + "|",
    ]
    for r in found:
        full = [o for o in found if o["model"] == r["model"] and o["clients_per_round"] >= 4 * LANES]
        row = peak = "too few for the lanes"
        if full and r["clients_per_round"] >= full[0]["clients_per_round"]:
            row = f"{r['microseconds_row'] / full[0]['microseconds_row']:.3f}"
            peak = f"{r['peak_bytes'] / full[0]['peak_bytes']:.3f}"
        lines.append(
            f"| {r['model']} | {r['clients_per_round']:,} | {r['seconds']:.3f} | {r['microseconds_row']:.1f} | {row} | "
            f"{r['peak_bytes'] / 2**20:.0f} | {peak} | {r['lane_occupancy']:.2f} | {r['row_occupancy']:.2f} | "
            f"{r['accuracy']:.3f} | {r['down'] / 1e6:.1f} + {r['up'] / 1e6:.1f} | {r['compiled_later']:.1f} |"
        )
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], file: Path) -> Path:
    """Draws time of a row, peak of memory and accuracy against clients a round."""
    panels = {
        "time of a trained row, us": lambda r: r["microseconds_row"],
        "peak memory of the process, MiB": lambda r: r["peak_bytes"] / 2**20,
        f"validation accuracy after {sweep.base.rounds} rounds": lambda r: r["accuracy"],
    }
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for color, model in zip(plots.COLORS, dict.fromkeys(r["model"] for r in found), strict=False):
            points = [(r["clients_per_round"], value(r)) for r in found if r["model"] == model]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=model)
        axes.set(xscale="log", xlabel="clients a round", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(color=plots.GRID)
    figure.axes[0].legend(fontsize=7)
    return plots.write(figure, file)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    small: bool = False
    """Two small cells, once; no figure worth reporting."""
    out: Path | None = None
    """The sweep's folder (default: runs/client_count, runs/client_count-small)."""
    cell: str | None = None
    """Internal: run the cell with this key in this process."""


def main(o: Options) -> None:
    """Measures, prints the table, draws the picture into the folder."""
    asked = small if o.small else sweep
    where = o.out or Path("runs") / f"client_count{'-small' if o.small else ''}"
    if o.cell is not None:
        run_one(asked, where, o.cell)
        return
    found = rows(run(asked, where))
    print(f"{table(found)}\n\ndrawn: {draw(found, where / 'client_count.png')}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(f"client_count: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is lost, the same command goes on.")
