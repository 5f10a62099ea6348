"""A sweep from top to bottom: choose what is tuned, then run every cell that is not done, and write the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim import record, stops
from fedsim.config import SMALLER, Config, metric_of
from fedsim.data import require_given, require_there
from fedsim.data.dataset import Source
from fedsim.engine.host import divide_cpu
from fedsim.sweeps import cells as asked
from fedsim.sweeps import folder, launchers
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell, Sweep
from fedsim.sweeps.study import Study, load_sweep
from fedsim.sweeps.work import Work

# Options by whose values cells are looked at before a run; what others refuse is a failed cell.
ROUGH = ("dataset", "backbone", "peft", "algorithm", "optimizer")

READ = (
    "dataset",
    "weights",
    "backbone",
    "groups",
)  # options that decide which files are read, beside those that name one


def sweep(
    sweep: Sweep | None = None,
    *,
    out: str | Path,
    data: Source | None = None,
    jobs: int = 1,
    launcher: str = "local",
    retry: bool = False,
    quiet: bool = False,
    yes: bool = False,
    **axes: Any,
) -> Study:
    """Runs all cells of a sweep that are not done yet, and gives its results; the same call goes on after any stop.

    Args:
        sweep: what is run; or its fields one by one: `sweep(base=..., grid={"peft": ["lora", "bias"]}, seeds=3, out="study")`.
        out: the sweep's folder.
        data: `fedsim.arrays(x, y)` for `dataset="arrays"`.
        jobs: processes that share the cells, on the devices of this machine. With several of them, or another launcher,
            this process leaves accelerators to them: it keeps to the CPU for as long as it lives, unless JAX has started.
        launcher: "local", or who starts the processes elsewhere (`launchers.py`).
        retry: run failed cells again.
        quiet: show nothing.
        yes: run more than 10,000 cells.

    Raises:
        ValueError: impossible axes or options, a folder that holds something else; before anything is run.
        KeyboardInterrupt: stopped; what is done stays.
    """
    made = sweep if sweep is not None else Sweep(**axes)
    if sweep is not None and axes:
        raise ValueError(f"Expected a Sweep without {next(iter(axes))}=...; change it by dataclasses.replace.")
    where = Path(out)
    work = launchers.find(launcher, jobs, data)
    divide_cpu(made.speed.devices)  # as a run of its own has it, before JAX starts
    planned, cells = plan(made, where, data=data, yes=yes)
    tuned = [c for of in planned.values() for c in of]
    with Board(where, quiet=quiet) as board:
        with stops.at_once(lambda: f"Stopped; nothing is lost, the same command goes on with {where}."):
            if retry:
                forgive(where / folder.TUNING, tuned)
            chosen = tune(made, planned, where, work, board)
            cells = asked.cells(made, chosen) if chosen else cells
            told = {method: {"options": options, "edges": at_edge(made, options)} for method, options in chosen.items()}
            folder.write(where, made.base, cells, tuned, told)
            if retry:
                forgive(where / folder.CELLS, cells)
            board.begin(cells, where / folder.CELLS)
            work(where / folder.CELLS, cells, board, False)
        study = load_sweep(where)
        study.write()
        board.close(study)
    return study


def plan(
    made: Sweep, where: Path, *, data: Source | None = None, yes: bool = False
) -> tuple[dict[str, list[Cell]], list[Cell]]:
    """`cells.foreseen`, after everything was refused that can be refused before a run.

    Raises:
        ValueError: as `sweep`.
    """
    asked.refuse_many(made, yes=yes)
    planned, cells = asked.foreseen(made)
    every = [*cells, *(c for of in planned.values() for c in of)]
    seen: set[Any] = set()
    for c in every:
        rough = tuple(getattr(c.config, name) for name in ROUGH)
        if rough not in seen:
            seen.add(rough)
            refuse(c, data)
    varied = {name for a in made.axes for p in a.points for name in p.options} | {*made.tune}
    folder.refuse_another(where, made.base, varied)
    refuse_changed(where / folder.TUNING, [c for of in planned.values() for c in of])
    refuse_changed(where / folder.CELLS, cells)
    return planned, cells


def refuse_changed(directory: Path, cells: Sequence[Cell]) -> None:
    """Raises `ValueError` where a file that a finished cell has read is another now: the tables would mix both.

    Of the cells that read the same files one is looked at.
    """
    from fedsim.simulation import inputs

    seen: set[Any] = set()
    places = folder.places(directory, cells)
    for cell in cells:
        if not (places[cell.key] / record.SUMMARY).is_file():
            continue
        files = tuple(sorted(inputs.named(cell.config).items())), *(getattr(cell.config, name) for name in READ)
        if files not in seen:
            seen.add(files)
            inputs.located(record.load(places[cell.key]), resumed=True)


def refuse(cell: Cell, data: Source | None) -> None:
    """Raises `ValueError` for what a cell's run would refuse before it reads its data."""
    from fedsim.simulation import build

    try:
        require_given(cell.config, data)
        require_there(cell.config)
        build.check(cell.config)
    except ValueError as error:
        raise ValueError(f"{error} (In the cell {asked.words_of(cell.varied) or cell.name}.)") from None


def forgive(directory: Path, cells: Sequence[Cell]) -> None:
    """Lets the failed ones among the cells run again."""
    for place in folder.places(directory, cells).values():
        if folder.state(place) == "failed":
            folder.forgive(place)


# --- tuning


def tune(
    made: Sweep, planned: Mapping[str, Sequence[Cell]], where: Path, work: Work, board: Board
) -> dict[str, dict[str, Any]]:
    """The options that were chosen, by method; runs what is missing for it.

    Raises:
        ValueError: no run of a method has a score.
    """
    if not planned:
        return {}
    cells = [c for of in planned.values() for c in of]
    folder.write(where, made.base, [], cells, {})
    board.begin(cells, where / folder.TUNING, "choosing " + ", ".join(made.tune))
    work(where / folder.TUNING, cells, board, True)
    places, chosen = folder.places(where / folder.TUNING, cells), {}
    for method, of in planned.items():
        scores = {c.key: score(places[c.key], c.config) for c in of}
        if all(math.isinf(value) for value in scores.values()):
            why = next(filter(None, (folder.error_of(places[c.key]) for c in of)), "all models have diverged")
            raise ValueError(
                f"Expected a run of {method or 'the sweep'} in {where / folder.TUNING} to end with a score, but {why}; mend "
                "that, or give tune other values, and start the same command with --retry."
            )
        best = max(of, key=lambda c: scores[c.key])
        chosen[method] = {name: getattr(best.config, name) for name in made.tune}
        board.chose(method, chosen[method], at_edge(made, chosen[method]), {words(c, made): scores[c.key] for c in of})
    return chosen


def score(directory: Path, config: Config) -> float:
    """The metric on validation at a run's end, turned so that more is better; -inf where there is none."""
    if not (directory / record.SUMMARY).is_file():
        return -math.inf
    metric = metric_of(config)
    value = ((record.load(directory).summary or {})["final"]["validation"] or {}).get(metric)
    return -math.inf if value is None else -value if metric in SMALLER else value


def at_edge(made: Sweep, chosen: Mapping[str, Any]) -> list[str]:
    """Chosen options that are the least or the largest of their values: a better one may lie beyond."""
    edges = []
    for name, value in chosen.items():
        numbers = [v for v in made.tune[name] if isinstance(v, (int, float))]
        if len(numbers) > 1 and value in (min(numbers), max(numbers)):
            edges.append(name)
    return edges


def words(cell: Cell, made: Sweep) -> str:
    """The values of the tuned options of a cell."""
    return asked.words_of({name: getattr(cell.config, name) for name in made.tune})
