"""The end of a run: the test set is read once, here, and the folder gets its summary, its parameters and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim import record
from fedsim.config import Config, metric_of
from fedsim.data.show import draw as draw_partition
from fedsim.engine import processes
from fedsim.report import plots, summaries
from fedsim.simulation import build, memories, personal, private
from fedsim.simulation.build import Problem
from fedsim.simulation.current import Current
from fedsim.simulation.rounds import Standing
from fedsim.units import words


def finish(
    config: Config,
    problem: Problem,
    directory: Path,
    lines: Sequence[record.Round],
    stand: Standing,
    now: Current,
    seconds: Callable[[], float],
    note: Callable[[str], None],
    *,
    pictures: bool = True,
) -> None:
    """Scores the final model and writes what a finished run leaves behind.

    Args:
        lines: of all rounds.
        stand: after the last round.
        seconds: the run's wall time so far, earlier processes included.
        note: says what could not be drawn, and why, a line each: a picture never ends a run.
        pictures: draw them.
    """
    trainer = now.trainer
    validation = lines[-1]["validation"] or now.validate().scores
    # Where clients answer, their own tests are all the tests that there are.
    final = {"validation": validation, "test": validation if now.answering else trainer.test(now.server)}
    clients = personal.local_scores(problem, trainer, now.server, now.memory)
    if clients is not None:
        final["clients"] = clients.summary()
    whole = build.full_bytes(trainer.model)
    summary = summaries.summary(
        lines,
        start=stand.start or {},
        final=final,
        full={"bytes_up": whole, "bytes_down": whole},
        parameters={
            "trained": sum(math.prod(s.shape) for s in trainer.model.trained.values()),
            "frozen": sum(math.prod(s.shape) for s in trainer.model.frozen.values()),
        },
        seconds=seconds(),
        stopped=stand.stopped,
        metric=metric_of(config),
        privacy=private.summary(trainer.privacy, stand.round),
    )
    trained, rows = now.parameters(), None if clients is None else with_curves(clients.rows(), lines)

    def written() -> list[str]:
        record.finish(directory, summary, trained, rows, memories.table_of(now.memory, trainer.members))
        if not pictures:
            return []
        drawings: dict[str, Callable[[], object]] = {
            metric_of(config): lambda: plots.save([record.load(directory)], directory),
            "partition": lambda: draw_partition(
                config, problem.dataset, problem.partition, directory / "partition.png"
            ),
        }
        return [said for name, draw in drawings.items() if (said := undrawn(name, draw))]

    for said in processes.by_first(written):
        note(said)


def with_curves(rows: list[dict[str, Any]], lines: Sequence[record.Round]) -> list[dict[str, Any]]:
    """The clients' rows, each with its curve where clients' own models were validated: (round, value of the metric)."""
    seen = [(line["round"], line["validation_clients"]) for line in lines if line.get("validation_clients")]
    if not seen:
        return rows
    return [{**row, "curve": [[round, each[k]] for round, each in seen]} for k, row in enumerate(rows)]


def undrawn(name: str, draw: Callable[[], object]) -> str:
    """Draws a picture; what went wrong in one line, or nothing."""
    try:
        draw()
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"the picture of the {name} could not be drawn ({words(why)}); the run's numbers are complete without it"
    return ""
