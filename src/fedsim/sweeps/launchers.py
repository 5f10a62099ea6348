"""Who runs the cells: this process, several processes of this machine, or a cluster. All share nothing but the folder.

Whoever is started only takes cells that nobody has and runs them (`work`), until there is none; it may die at any moment.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from fedsim.config import one_of, parse_call
from fedsim.data.dataset import Source
from fedsim.engine.host import keep_to_cpu
from fedsim.sweeps import crew
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell
from fedsim.sweeps.clusters import by_ray, by_submitit
from fedsim.sweeps.crew import Crew
from fedsim.sweeps.work import Work, work_here

LAUNCHERS = ("local", "slurm", "submitit_local", "ray")
PACKAGES = {"slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
EXTRAS = {"submitit": "slurm", "ray": "ray"}  # of this package


def find(name: str, jobs: int, data: Source | None = None) -> Work:
    """The work of a launcher by its name: `local`, `slurm(partition='gpu', timeout_min=60)`, `ray(num_gpus=1)`.

    Raises:
        ValueError: an unknown one, one that is not installed or does not take its options, or arrays in memory for other
            processes.
    """
    kind, args, options = parse_call(name, "launcher")
    one_of(LAUNCHERS, launcher=kind)
    if args or (kind == "local" and options):
        raise ValueError(
            f"Expected launcher={name} with {'no options' if kind == 'local' else 'options by their names'}; write "
            f"{kind if kind == 'local' else f'{kind}(OPTION=VALUE)'}."
        )
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"Expected jobs={jobs} >= 1; it is how many processes share the cells.")
    if kind == "local" and jobs == 1:
        return work_here(data)
    if data is not None:
        raise ValueError(
            f"Expected no arrays in memory with {f'jobs={jobs}' if kind == 'local' else f'launcher={kind}'}: other processes "
            "cannot read them; save them by numpy.savez and give the file as dataset, or run with jobs=1."
        )
    if kind == "local":
        if crew.has_tpu(os.environ):
            raise ValueError(f"Expected jobs={jobs} = 1 on TPUs, all of which one process takes; leave --jobs out.")
        keep_to_cpu()
        return by_crew(jobs)
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"Expected {package} to be installed for launcher={kind}; pip install 'fedsim-jax[{EXTRAS[package]}]'."
        )
    keep_to_cpu()
    return by_ray(jobs, options) if kind == "ray" else by_submitit(kind, jobs, options)


def by_crew(jobs: int) -> Work:
    """Several processes of this machine; a stop is passed on to them and waits for their rounds."""

    def work(directory: Path, cells: Sequence[Cell], board: Board, blind: bool) -> None:
        made = Crew(directory, cells, jobs)
        try:
            while board.left:
                made.look()
                board.wait()
            made.join()
        except KeyboardInterrupt as stop:
            if made.workers and not getattr(stop, "hard", False):
                board.say("Stopping: the processes end their rounds; another Ctrl-C or SIGTERM stops at once.")
            made.stop(getattr(stop, "number", signal.SIGINT))
            raise
        except BaseException:
            made.stop(signal.SIGTERM)
            raise

    return work
