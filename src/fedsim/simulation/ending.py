"""The end of a run: the test set is read once, here, and the folder gets its summary, its parameters and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsim import record
from fedsim.config import Config
from fedsim.data.show import draw as draw_partition
from fedsim.engine import processes
from fedsim.record.shared_checkpoints import SharedCheckpoints
from fedsim.report import plots, summaries
from fedsim.simulation import build, personal
from fedsim.simulation.build import Problem
from fedsim.simulation.current import Current
from fedsim.simulation.rounds import Standing


def finish(
    config: Config,
    problem: Problem,
    directory: Path,
    checkpoints: SharedCheckpoints,
    lines: Sequence[record.Round],
    stand: Standing,
    now: Current,
    seconds: Callable[[], float],
) -> None:
    """Scores the final model, waits for the last checkpoint, and writes what a finished run leaves behind.

    Args:
        lines: of all rounds.
        stand: after the last round.
        seconds: the run's wall time so far, earlier processes included.
    """
    trainer = now.trainer
    final = {
        "validation": lines[-1]["validation"] or trainer.validate(now.server),
        "test": trainer.test(now.server),
    }
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
    )
    checkpoints.wait()
    trained, rows = now.parameters(), None if clients is None else clients.rows()

    def written() -> None:
        record.finish(directory, summary, trained, rows)
        plots.save([record.load(directory)], directory)
        draw_partition(config, problem.dataset, problem.partition, directory / "partition.png")

    processes.by_first(written)
