"""`fedsim sweep --dry-run`: the cells, what they send and need, and what they share. Compiles programs, trains nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fedsim.cli.estimate import PhaseEstimate, estimate, matmul_speed
from fedsim.config import Speed
from fedsim.engine.host import tune_host
from fedsim.simulation import build, needs
from fedsim.simulation.build import Problem
from fedsim.sweeps import cell as one
from fedsim.sweeps import folder
from fedsim.sweeps.cells import Cell, Sweep, words_of
from fedsim.sweeps.show import plain_console
from fedsim.sweeps.sweep import plan
from fedsim.units import duration, size, words

SHOWN = 40  # cells that are named one by one
FREE = ("lr", "lr_schedule", "head_lr", "seed", "target", "patience")  # options that change neither bytes nor time


class Forecast(NamedTuple):
    """What a cell would do."""

    bytes: float  # both ways
    certainty: str  # "exact", or what else holds of the bytes
    seconds: float  # of arithmetic
    memory: int  # bytes, of each device


def forecast(sweep: Sweep, where: Path, *, yes: bool = False) -> None:
    """Prints the cells with bytes, memory and time, and what they share.

    Raises:
        ValueError: whatever the sweep would refuse.
    """
    from rich import box
    from rich.table import Table

    planned, cells = plan(sweep, where, yes=yes)
    tuning = [c for of in planned.values() for c in of]
    found = forecasts([*tuning, *cells])
    out = plain_console()
    for title, of, directory in (("tuning", tuning, folder.TUNING), ("cells", cells, folder.CELLS)):
        if not of:
            continue
        places = folder.places(where / directory, of)
        made = Table(
            title=f"{title}: {len(of)}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        made.add_column("cell", overflow="fold")
        for name in ("state", "bytes", "memory", "time"):
            made.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        for c in of[:SHOWN]:
            each = found[c.key]
            made.add_row(words(words_of(c.varied) or c.name), folder.state(places[c.key]), size(round(each.bytes)),
                         size(each.memory), duration(each.seconds))  # fmt: skip
        out.print(made)
        if len(of) > SHOWN:
            out.print(f"and {len(of) - SHOWN} more.")
    for line in said(cells, tuning, found):
        out.print(line, soft_wrap=True)


def said(cells: Sequence[Cell], tuning: Sequence[Cell], found: dict[str, Forecast]) -> list[str]:
    """The lines below the tables."""
    every = [*tuning, *cells]
    shared = [len({key[level] for key in map(one.keys, (c.config for c in every))}) for level in range(4)]
    certain = "" if all(found[c.key].certainty == "exact" for c in every) else "about "
    lines = [
        f"In all {certain}{size(round(sum(found[c.key].bytes for c in every)))} both ways, about "
        f"{duration(sum(found[c.key].seconds for c in every))} of arithmetic; compiling comes on top. Nothing was trained.",
        f"Shared: {len(every)} runs read {shared[0]} set{'s' * (shared[0] > 1)} of examples, compute {shared[1]} "
        f"set{'s' * (shared[1] > 1)} of frozen features, divide the examples {shared[2]} time{'s' * (shared[2] > 1)}, and "
        f"make {shared[3]} set{'s' * (shared[3] > 1)} of programs, where one process runs them.",
    ]
    if tuning:
        lines.append("What tuning will choose is not known: the first of its values stands for it.")
    return lines


def forecasts(cells: Sequence[Cell]) -> dict[str, Forecast]:
    """Each cell by its key. Cells that differ in what changes neither bytes nor time are looked at once."""
    tune_host(cells[0].speed)
    rate = matmul_speed(cells[0].speed.precision)
    found: dict[Any, Forecast] = {}
    by_cell, last = {}, None
    for c in one.in_order(cells):
        kind = (c.config.replace(**{name: getattr(cells[0].config, name) for name in FREE}), alike(c.speed))
        if kind not in found:
            needs.fetch_missing(c.config)
            last = build.problem(c.config, c.speed, like=last)
            found[kind] = of_cell(last, rate)
        by_cell[c.key] = found[kind]
    return by_cell


def alike(speed: Speed) -> tuple[Any, ...]:
    """What of a speed changes time or memory."""
    return (speed.lanes, speed.precision, speed.remat, speed.segment_steps, speed.resident, speed.cache)


def of_cell(problem: Problem, rate: float) -> Forecast:
    """One cell, phase by phase."""
    config = problem.config
    phases: list[PhaseEstimate] = [estimate(problem, phase) for phase in build.phases(config)]
    sent, seconds = 0.0, 0.0
    for e in phases:
        rounds = e.phase.last - e.phase.first + 1
        looked = math.ceil(rounds / config.eval_every) * len(problem.dataset.validation)
        rows = rounds * e.examples / max(e.row_occupancy, 1e-9)
        flops_a_second = rate * (1 if jax.default_backend() == "cpu" else e.devices)
        seconds += (rows * e.flops + looked * e.forward) / flops_a_second
        sent += e.up.over(rounds) + e.down.over(rounds)
    certainty = next((w.certainty for e in phases for w in (e.up, e.down) if w.certainty != "exact"), "exact")
    return Forecast(sent, certainty, seconds, max(sum(e.memory.values()) for e in phases))
