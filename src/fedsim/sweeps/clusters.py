"""Slurm, through submitit, and Ray: they start the processes that run cells, and know nothing of cells themselves."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim import stops
from fedsim.sweeps import folder
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell
from fedsim.sweeps.crew import Crew
from fedsim.sweeps.work import FREE, Work

HOURS = 4 * 60  # min of a job, unless said: submitit's own five would end it before its first cell
TIMEOUTS = 1000  # times that a job is queued again after its time is up
LOOK = 5.0  # s between two looks at whether jobs live
FRUITLESS = 3  # times that jobs are started without a cell being done
GRACE = 60.0  # s in which a job that is taken away may end its round
JOBS = "jobs.json"  # ids of the jobs that were submitted


class Task:
    """What a cluster runs: a process that runs cells, begun again if it dies, until there is none that nobody has.

    Args:
        where: the sweep's folder.
        which: its cells, or those of its tuning.
        cwd: the folder in which the sweep was started; relative paths of its options are found from there.
    """

    def __init__(self, where: Path, which: str, cwd: Path) -> None:
        self.where, self.which, self.cwd = where, which, cwd
        self._crew: Crew | None = None

    def __call__(self, number: int = 0) -> str:
        """Runs cells; `number` tells tasks of a job array apart.

        Raises:
            OSError: as `Crew.look`.
        """
        if self.cwd.is_dir():
            os.chdir(self.cwd)
        asked = folder.Asked(self.where)
        cells = asked.cells if self.which == folder.CELLS else asked.tuning
        self._crew = made = Crew(self.where / self.which, cells, 1, led=True)
        try:
            while made.look():
                time.sleep(0.2)
        except BaseException:
            made.stop(seconds=GRACE)
            raise
        return f"{len(cells) - len(made.left)} of {len(cells)} cells are over"

    def checkpoint(self, number: int = 0) -> Any:
        """Before the job is taken away (submitit calls it): stops after the round, and asks for the same task again."""
        if self._crew is not None:
            self._crew.stop(seconds=GRACE)
        return importlib.import_module("submitit").helpers.DelayedSubmission(
            Task(self.where, self.which, self.cwd), number
        )


# --- Slurm


def by_submitit(kind: str, jobs: int, options: Mapping[str, Any]) -> Work:
    """A job array of Slurm, or the same on this machine; jobs that are taken away are queued again and go on.

    Ctrl-C leaves the jobs of Slurm as they are: the same command looks at them again.

    Raises:
        ValueError: no Slurm on this machine, or options that it does not take.
    """
    with tempfile.TemporaryDirectory() as empty:
        executor(kind, Path(empty), options)

    def work(directory: Path, cells: Sequence[Cell], board: Board, blind: bool) -> None:
        logs = directory.parent / folder.LOGS / "submitit"
        logs.mkdir(parents=True, exist_ok=True)
        task = Task(directory.parent.absolute(), directory.name, Path.cwd())

        def started(wanted: int) -> list[Any]:
            alive = [job for job in submitted_before(kind, logs) if not job.done()]
            if len(alive) < wanted:
                alive += executor(kind, logs, options).map_array(task, range(wanted - len(alive)))
            (logs / JOBS).write_text(json.dumps([job.job_id for job in alive]))
            board.say(
                f"{len(alive)} jobs of {kind} ({', '.join(str(job.job_id) for job in alive[:3])}), logs in {logs}"
            )
            return alive

        made: list[Any] = []
        try:
            watch(board, directory, cells, jobs, started, lambda job: job.done(), why, made)
        except KeyboardInterrupt as stop:
            if kind == "slurm":
                ids = ", ".join(sorted({str(job.job_id).partition("_")[0] for job in made}))
                raise stops.reworded(
                    stop,
                    f"Stopped looking; the jobs of Slurm go on (scancel {ids} ends them), and the same command looks again.",
                ) from None
            for job in made:
                job.cancel()
            raise

    return work


def executor(kind: str, logs: Path, options: Mapping[str, Any]) -> Any:
    """Submitit's executor with its options.

    Raises:
        ValueError: there is no Slurm, or it does not take them.
    """
    submitit = importlib.import_module("submitit")

    cluster = "slurm" if kind == "slurm" else "local"
    given = {"timeout_min": HOURS, "name": "fedsim", **options}
    common = submitit.AutoExecutor._typed_parameters()
    try:
        made = submitit.AutoExecutor(logs, cluster=cluster, **{f"{cluster}_max_num_timeout": TIMEOUTS})
        made.update_parameters(**{n if n in common else f"{cluster}_{n}": v for n, v in given.items()})
    except RuntimeError as error:
        raise ValueError(
            f"Expected Slurm on this machine for launcher={kind} ({error}); start it where sbatch is."
        ) from None
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"Expected options of launcher={kind} that submitit takes ({str(error).partition(chr(10))[0]}); see its docs."
        ) from None
    return made


def submitted_before(kind: str, logs: Path) -> list[Any]:
    """The jobs of Slurm that an earlier command has left."""
    submitit = importlib.import_module("submitit")

    if kind != "slurm" or not (logs / JOBS).is_file():
        return []
    return [submitit.SlurmJob(logs, job_id) for job_id in json.loads((logs / JOBS).read_text())]


def why(job: Any) -> str:
    """What a job says of its end, in a line."""
    try:
        error = job.exception()
    except Exception as found:  # whatever the engine raises about a job that it has lost
        error = found
    return (str(error or "").strip().splitlines() or ["it said nothing"])[-1]


# --- Ray


def by_ray(jobs: int, options: Mapping[str, Any]) -> Work:
    """Tasks of Ray, on this machine or those of `address`; where a machine is gone, Ray runs its task elsewhere.

    Raises:
        ValueError: options that it does not take.
    """
    ray = importlib.import_module("ray")

    options = dict(options)
    address = options.pop("address", None)
    try:
        remote = ray.remote(**{"max_retries": -1, "num_cpus": 1, **options})(run_task)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected options of launcher=ray that ray.remote takes ({str(error).partition(chr(10))[0]}); correct them."
        ) from None

    def work(directory: Path, cells: Sequence[Cell], board: Board, blind: bool) -> None:
        ours = not ray.is_initialized()
        if ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        task = Task(directory.parent.absolute(), directory.name, Path.cwd())
        made: list[Any] = []

        def started(wanted: int) -> list[Any]:
            return [remote.remote(task, number) for number in range(wanted)]

        def said(reference: Any) -> str:
            try:
                return str(ray.get(reference))
            except Exception as error:  # whatever Ray raises about a task
                return str(error).strip().splitlines()[-1]

        def done(reference: Any) -> bool:
            return bool(ray.wait([reference], timeout=0)[0])

        try:
            watch(board, directory, cells, jobs, started, done, said, made)
        except KeyboardInterrupt:
            for reference in made:
                ray.cancel(reference)  # Ctrl-C in the task, which passes it on
            ray.wait(made, num_returns=len(made), timeout=GRACE)
            raise
        finally:
            if ours:
                ray.shutdown()

    return work


def run_task(task: Task, number: int) -> str:
    """A task of Ray."""
    return task(number)


# --- jobs that others start


def watch(
    board: Board,
    directory: Path,
    cells: Sequence[Cell],
    jobs: int,
    start: Callable[[int], list[Any]],
    done: Callable[[Any], bool],
    why: Callable[[Any], str],
    made: list[Any],
) -> None:
    """Waits until all cells are over, and starts jobs again where all have gone and left cells that nobody has.

    Args:
        jobs: at a time.
        start: (number) -> that many jobs.
        done: whether a job is over.
        why: what a job says of its end.
        made: filled with the jobs of now.

    Raises:
        OSError: jobs end again and again without a cell being done.
    """
    places, left, fruitless, looked = folder.places(directory, cells), None, 0, -LOOK
    while board.left:
        if time.monotonic() - looked >= LOOK and all(map(done, made)):
            free = sum(folder.state(places[key]) in FREE for key in board.left)
            fruitless = fruitless + 1 if left == len(board.left) else 0
            if fruitless >= FRUITLESS:
                raise OSError(
                    f"Expected jobs to run the cells, but {FRUITLESS} times they have ended without one, the last with: "
                    f"{why(made[-1])}; see {directory.parent / folder.LOGS}."
                )
            if free:
                left, made[:] = len(board.left), start(min(jobs, free))
            looked = time.monotonic()
        board.wait()
