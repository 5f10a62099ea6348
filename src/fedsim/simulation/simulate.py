"""A run from top to bottom: prepare, then for every round select, train, reduce, evaluate, record, checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim import network, record, stops, units
from fedsim.config import Config, Speed, idle_alone, invited, main_job
from fedsim.core import Algorithm, Population
from fedsim.data import require_given
from fedsim.data.dataset import Source
from fedsim.engine import processes
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import OutOfMemoryError, most_memory, out_of_memory
from fedsim.engine.host import (
    CompileClock,
    compile_clock,
    divide_cpu,
    tune_host,
    warn_idle_accelerator,
    watched,
)
from fedsim.engine.keys import key_for
from fedsim.randomness import stream
from fedsim.record.shared_checkpoints import SharedCheckpoints
from fedsim.report.progress import Progress
from fedsim.simulation import build, inputs, needs, resuming
from fedsim.simulation.beginning import begin
from fedsim.simulation.build import Problem
from fedsim.simulation.current import Current, prepare
from fedsim.simulation.ending import finish
from fedsim.simulation.loaded import Run
from fedsim.simulation.rehearsal import refuse_lanes
from fedsim.simulation.rounds import Standing, Times, after, is_evaluated, judged, measured, round_line


def run(
    config: Config | None = None,
    speed: Speed | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    problem: Problem | None = None,
    data: Source | None = None,
    trust_code: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Run:
    """Simulates `config` (default: the main job) and gives the finished run as its folder tells it.

    Args:
        out: the run's folder; default `runs/<date-time>-<config hash>`.
        resume: folder of a stopped run to go on with, instead of `config`, `speed` and `out`.
        quiet: show no progress.
        problem: `build.problem` of a config with the same data and backbone, to share data and cached features.
        data: `fedsim.arrays(x, y)` for `dataset="arrays"`; on resuming the same again.
        trust_code: on resuming, the user's Python files may run though they are not where the run had them.
        about: further facts that `config.json` is to keep of a new run.

    Raises:
        ValueError: an impossible option, data or weights that cannot be used, a folder that holds another run.
    """
    by_first = processes.by_first  # of several processes, the first one reads and writes the folder
    processes.agree("what fedsim.run is given", (config, speed, out, resume))
    if resume is not None:
        if config is not None or speed is not None or out is not None:
            raise ValueError(
                "Expected resume alone; a resumed run takes config, speed and folder from what it resumes."
            )
        stopped = by_first(lambda: record.load(resume)._replace(trust_code=trust_code))
        if stopped.summary is not None and not by_first(lambda: has_checkpoints(stopped.directory)):
            return Run(*stopped)  # it is over, and keeps none (Speed.keep_checkpoints)
        divide_cpu(stopped.speed.devices or stopped.about.get("device", {}).get("count"))
        config, speed, directory = stopped.config, stopped.speed, stopped.directory
        found = processes.each(lambda: inputs.located(stopped, resumed=True))
    else:
        found = config = config or main_job()
        speed = speed or Speed()
        build.check(config, speed)
        if problem is None:
            require_given(config, data)
        by_first(lambda: record.refuse_used(out))
        needs.fetch_in_turn(config)
        directory = None  # made when there is something to write, so that bad data leave no empty folder behind
    tune_host(speed)
    warn_idle_accelerator()
    with ExitStack() as stack:
        stack.enter_context(stops.at_once(lambda: resuming.unbegun(directory)))
        quiet = quiet or not processes.is_first()
        progress = stack.enter_context(
            Progress(
                config.rounds, head_rounds=config.head_rounds * (config.peft != "head"), kind=config.peft, quiet=quiet
            )
        )
        stack.enter_context(watched(progress.far))
        if problem is None:
            for line in idle_alone(config, build.kind(config)) if resume is None else ():
                progress.message(line)
            progress.message("reading the data")
            problem = processes.each(lambda: build.problem(found, speed, data))
        problem = problem._replace(speed=speed, config=found)  # a shared one may have been made for another
        if resume is None:
            refuse_lanes(config, speed, problem)
        directory = directory or by_first(lambda: record.folder(out, config))
        by_first(lambda: stack.enter_context(record.lock(directory)))
        checkpoints = stack.enter_context(SharedCheckpoints(directory / record.CHECKPOINTS, speed.keep_checkpoints))
        fresh, fewer = resume is None, None
        while True:
            if fewer is not None:  # in a fresh program, of which nothing but the last checkpoint is known
                speed = dataclasses.replace(speed, lanes=fewer)
                problem, fresh = release(problem, speed), False
            try:
                simulate(
                    config, speed, problem, directory, checkpoints, progress, about,
                    fresh=fresh, reduced=fewer is not None,
                )  # fmt: skip
                break
            except OutOfMemoryError as error:
                fewer = error.lanes // 2
                progress.message(f"{error}; going on from the last checkpoint with lanes={fewer}")
        if speed.keep_checkpoints == 0:
            checkpoints.clear()
        return Run(*by_first(lambda: record.load(directory)._replace(trust_code=trust_code)))


def has_checkpoints(directory: Path) -> bool:
    """Whether a run's folder has a checkpoint to go on from."""
    return resuming.newest(directory) > 0


def simulate(
    config: Config,
    speed: Speed,
    problem: Problem,
    directory: Path,
    checkpoints: SharedCheckpoints,
    progress: Progress,
    about: Mapping[str, Any] | None = None,
    *,
    fresh: bool,
    reduced: bool = False,
) -> None:
    """The loop over rounds. Everything random derives from (seed, round), so a resumed run repeats what was lost.

    Args:
        about: of `run`.
        fresh: start anew; else go on from the last checkpoint, or from round 0 where there is none.
        reduced: memory ran out, and `speed` has fewer lanes than the checkpoint.

    Raises:
        OutOfMemoryError: more than one lane ran out of a device's memory.
    """
    began, clock = time.perf_counter(), compile_clock()
    identity = resuming.fingerprint(problem.config, problem)
    if fresh:
        begin(directory, config, speed, problem, identity, about or {})
    processes.agree("the data", identity)
    fleet = build.fleet(problem.config)

    def ready(round: int, overlay: dict[str, np.ndarray] | None = None) -> Current:
        progress.message("loading the weights")
        return prepare(problem, build.phase_at(problem.config, round), overlay, directory)

    # --- where to start: round 0, or after the last good checkpoint
    stand, now, compiled = Standing(np.zeros(problem.partition.clients, np.int32), bitwise=not reduced), None, None
    if not fresh:
        found = resuming.restore(checkpoints, config, speed, identity, ready, reduced=reduced)
        stand, now = found or (stand, now)
    lines = [] if fresh else processes.by_first(functools.partial(record.truncate, directory, stand.round))
    earlier = stand.elapsed
    progress.resume(lines)

    def seconds() -> float:
        return earlier + time.perf_counter() - began

    # --- the rounds
    with stops.after_round(stops.way_on(directory)) as interrupted:
        while stand.round < config.rounds and stand.stopped == "rounds":
            stand = stand._replace(round=stand.round + 1)
            if now is None or stand.round > now.phase.last:
                # The next phase starts from what the one before has trained, which is on the disk.
                with stops.at_once(lambda: resuming.unbegun(directory)):
                    now = ready(stand.round, None if now is None else now.parameters())
                    start = stand.start or {"validation": now.trainer.validate(now.server)}
                stand = stand._replace(start=start, stale=0)  # patience is with this phase
                progress.message("compiling")
            phase, trainer = now.phase, now.trainer
            first, compiled = phase is not compiled, phase
            with timed(clock) as times, resuming.compiling(directory) if first else nullcontext():
                cohort = select(config, fleet, now, stand)
                server, metrics = train(now, cohort)
                did = measured(cohort, stand.totals["simulated_seconds"])
            stand = after(stand, did)
            stand.met[cohort.ids[cohort.present]] = stand.round

            scores = None
            if is_evaluated(config, stand.round, phase.last):
                scores = trainer.validate(server)
                server = trainer.algorithm.observe(server, scores)
                stand = judged(config, stand, scores, patient=phase.last == config.rounds)
            now = now._replace(server=server)

            # As the record has it, so that a score that is no number is None here and after a resume alike.
            line = record.plain(round_line(
                stand, did, times[0], now.cost, phase=phase.name, metrics=metrics, scores=scores,
                simulates=not config.reliable, most_memory=most_memory(trainer.engine.own[0]),
            ))  # fmt: skip
            processes.by_first(functools.partial(record.append, directory, line))
            lines.append(line)
            tell(progress, line, changes_empty=trainer.algorithm.runs_empty)

            asked = processes.any_true(interrupted() is not None)
            ends = stand.stopped != "rounds" or stand.round == phase.last
            if asked or ends or stand.round % speed.checkpoint_every == 0:
                kept = stand._replace(elapsed=seconds())
                checkpoints.save(stand.round, *resuming.checkpoint(config, speed, identity, kept, now))
            if asked or ends:
                checkpoints.wait()
            if asked:
                raise resuming.stopped_after(stand.round, directory, interrupted())

        # --- the end
        if processes.any_true(interrupted() is not None):  # it came while the last checkpoint was written
            raise resuming.stopped_after(stand.round, directory, interrupted())
        if now is None:
            raise ValueError(f"Expected rounds={config.rounds} > 0; raise --rounds.")
        progress.message("reading the test set")
        with stops.at_once(lambda: f"Stopped in the final evaluation, nothing is lost; {stops.way_on(directory)}"):
            finish(config, problem, directory, lines, stand, now, seconds, progress.note)
        progress.message("done")


def select(config: Config, fleet: network.Fleet, now: Current, stand: Standing) -> Cohort:
    """The clients of this round, and what they meet in it."""
    engine, round = now.trainer.engine, stand.round
    population = Population(engine.population, invited(config), network.reachable(fleet, round))
    ids = now.trainer.algorithm.select(stream(config.seed, f"sample {round}"), now.server, population)
    conditions = network.conditions(fleet, ids, round)
    return Cohort(engine, ids, round, now.memory, conditions, met=stand.met, lr=now.trainer.lr(round))


def train(now: Current, cohort: Cohort) -> tuple[Any, dict[str, Any]]:
    """The server after this cohort's round, and the round's metrics on the host."""
    engine = cohort.engine
    key = key_for(engine.root, "server", cohort.round)
    with out_of_memory(cohort.round, engine, now.phase.config.batch_size):
        server, metrics = exchange_round(key, now.trainer.algorithm, now.server, cohort)
        jax.block_until_ready(server)
    return server, metrics


def exchange_round(key: jax.Array, algorithm: Algorithm, server: Any, cohort: Cohort) -> tuple[Any, dict[str, Any]]:
    """The algorithm's round: the new server, and metrics on the host. Where nobody reports, the server as it was."""
    if not cohort.present.any() and not algorithm.runs_empty:
        return server, {}
    new, metrics = algorithm.round(key, cohort.engine.held, server, cohort)
    if cohort.reports.any() or algorithm.runs_empty:
        return new, cohort.fetch(metrics)
    return server, {}


@contextmanager
def timed(clock: CompileClock) -> Iterator[list[Times]]:
    """Yields a list that holds the block's wall time, and what of it was compiling, once the block is left."""
    tick, compiled, times = time.perf_counter(), clock.seconds, []
    yield times
    seconds = time.perf_counter() - tick
    times.append(Times(seconds, min(clock.seconds - compiled, seconds)))


def tell(progress: Progress, line: record.Round, *, changes_empty: bool) -> None:
    """Shows a round, and says what is unusual about it."""
    progress.update(line)
    seen, number = line["validation"], line["round"]
    if line["compile_seconds"] > 0.1 * line["seconds"]:
        progress.message(f"round {number}: {units.duration(line['compile_seconds'])} of it compiling")
    if not line["reported"]:
        kept = "" if changes_empty else "; the server stays as it was"
        progress.message(f"round {number}: nobody reported{kept}")
    if line["nonfinite"]:
        left_out = f"{line['nonfinite']} of {line['reported']} replies left out, as they were not finite"
        progress.note(f"round {number}: {left_out}; a lower --lr may keep them so", once="replies")
    if seen is not None and seen["accuracy"] is None:
        said = "the model's outputs are not finite, so it has no scores; it has diverged, a lower --lr may help"
        progress.note(f"round {number}: {said}", once="outputs")


def release(problem: Problem, speed: Speed) -> Problem:
    """The problem for another speed, and nothing of the programs before it left on the devices."""
    if problem.trainers is not None:
        problem.trainers.clear()
    gc.collect()
    return problem._replace(speed=speed)
