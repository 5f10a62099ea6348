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
from fedsim.config import Config, Speed, idle_alone, invited, main_job, metric_of
from fedsim.core import Population
from fedsim.data import require_given
from fedsim.data.dataset import Source
from fedsim.engine import processes
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import OutOfMemoryError, most_memory, out_of_memory
from fedsim.engine.groups import GroupedCohort
from fedsim.engine.host import (
    CompileClock,
    compile_clock,
    divide_cpu,
    tune_host,
    warn_idle_accelerator,
    watched,
)
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.record.shared_checkpoints import SharedCheckpoints
from fedsim.report.progress import Progress
from fedsim.report.summaries import has_diverged
from fedsim.simulation import build, groups, inputs, memories, needs, private, resuming
from fedsim.simulation.beginning import begin
from fedsim.simulation.build import Problem
from fedsim.simulation.current import Current, prepare
from fedsim.simulation.ending import finish
from fedsim.simulation.loaded import Run
from fedsim.simulation.rehearsal import refuse_lanes
from fedsim.simulation.rounds import Standing, Times, after, is_evaluated, judged, measured, round_line, unread
from fedsim.simulation.trainers import Trainer
from fedsim.training import server as server_training


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
    pictures: bool = True,
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
        pictures: draw the run's pictures into its folder once it is over.

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
                config.rounds,
                head_rounds=config.head_rounds * (config.peft != "head"),
                kind=config.peft,
                quiet=quiet,
                metric=metric_of(config),
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
            for line in private.doubts(config, len(problem.partition.rows)):
                progress.note(line)
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
                    fresh=fresh, reduced=fewer is not None, pictures=pictures,
                )  # fmt: skip
                break
            except OutOfMemoryError as error:
                fewer = error.lanes // 2
                progress.message(f"{error}; going on from the last checkpoint with lanes={fewer}")
        if speed.keep_checkpoints == 0:
            checkpoints.clear(lambda: memories.rows_of(directory))
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
    pictures: bool = True,
) -> None:
    """The loop over rounds. Everything random derives from (seed, round), so a resumed run repeats what was lost.

    Args:
        about, pictures: of `run`.
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
                    start = stand.start or {"validation": now.validate().scores}
                stand = stand._replace(start=start, stale=0)  # patience is with this phase
                announce(progress, config, now.trainer, stand.round)
            phase, trainer = now.phase, now.trainer
            first, compiled = phase is not compiled, phase
            stopping = resuming.compiling(directory) if first else nullcontext()
            with timed(clock) as times, server_training.watched() as own, stopping:
                cohort = select(config, fleet, now, stand)
                server, averaging, metrics = train(now, cohort)
                did = measured(cohort, stand.totals["simulated_seconds"])
            stand = after(stand, did)
            stand.met[cohort.ids[cohort.present]] = stand.round

            now = now._replace(server=server, averaging=averaging, copies=cohort.copies)
            stand, now, scores, each = looked_at(config, stand, now)

            # As the record has it, so that a score that is no number is None here and after a resume alike.
            line = record.plain(round_line(
                stand, did, times[0]._replace(server=own.seconds), now.cost, phase=phase.name, metrics=metrics, scores=scores,
                each=each, simulates=not config.reliable, most_memory=most_memory(trainer.engine.own[0]), task=config.task,
                server_flops=own.flops, privacy=private.line(trainer.privacy, stand.round, now.averaging, phase.first),
            ))  # fmt: skip
            processes.by_first(functools.partial(record.append, directory, line))
            lines.append(line)
            tell_all(progress, line, config, trainer, cohort)

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
            finish(config, problem, directory, lines, stand, now, seconds, progress.note, pictures=pictures)
        progress.message("done")


def announce(progress: Progress, config: Config, trainer: Trainer, round: int) -> None:
    """Says what is known before a phase's first round, and in the run's first what privacy it has."""
    if round == 1 and trainer.privacy is not None:
        progress.note(private.promise(trainer.privacy, config))
    progress.message("compiling")


def looked_at(
    config: Config, stand: Standing, now: Current
) -> tuple[Standing, Current, dict[str, float] | None, list[float | None]]:
    """Where the run stands after a look at the server, if this round ends with one: its scores, and those of clients."""
    algorithm, final, privacy = now.trainer.algorithm, now.phase.last == config.rounds, now.trainer.privacy
    if privacy is not None and stand.round < config.rounds and privacy.is_spent(stand.round):
        stand = stand._replace(stopped="epsilon")
    if final and algorithm.finished(now.server):
        stand = stand._replace(stopped="finished")
    if not is_evaluated(config, stand.round, now.phase.last) and stand.stopped == "rounds":
        return stand, now, None, []
    scores, each = now.validate()
    now = now._replace(server=algorithm.observe(now.server, scores))
    return judged(config, stand, scores, patient=final), now, scores, each


def select(config: Config, fleet: network.Fleet, now: Current, stand: Standing) -> Cohort | GroupedCohort:
    """The clients of this round, and what they meet in it; of several groups each draws its share of them."""
    trainer, round = now.trainer, stand.round
    if not trainer.groups:
        return drawn(config, fleet, now, stand, trainer.engine, np.arange(trainer.engine.population), "", 1.0)
    return GroupedCohort(
        trainer.engine,
        round,
        {
            name: drawn(config, fleet, now, stand, trainer.groups[name], trainer.members[name], name, share)
            for name, share in groups.shares(trainer.members).items()
        },
    )


def drawn(
    config: Config, fleet: network.Fleet, now: Current, stand: Standing, engine: Lanes, members: np.ndarray, group: str,
    share: float,
) -> Cohort:  # fmt: skip
    """The cohort of one group, drawn from its `members` (K,), of which a round asks for `share` of the run's."""
    trainer, round, available = now.trainer, stand.round, network.reachable(fleet, stand.round)
    asked, wanted = (groups.asked(n, share) for n in (invited(config), config.clients_per_round))
    there = available if available is None or not group else lambda places: available(members[places])
    population = Population(len(members), min(asked, len(members)), there, round)
    places = np.asarray(trainer.algorithm.select(groups.chance(config.seed, round, group), now.server, population))
    ids = np.where(places >= 0, members[places], -1) if group else places
    conditions = network.conditions(fleet, ids, round, asked, wanted)
    return Cohort(
        engine, ids, round, now.memory.beside[group] if group else now.memory, conditions,
        met=stand.met, lr=trainer.lr(round), average=trainer.average,
        averaging=now.averaging[group] if group else now.averaging,
        releases=trainer.algorithm.releases, stores=now.memory, copies=now.copies,
    )  # fmt: skip


def train(now: Current, cohort: Cohort | GroupedCohort) -> tuple[Any, Any, dict[str, Any]]:
    """The server and the average's state after this cohort's round, and the round's metrics on the host."""
    engine = cohort.engine
    key = key_for(engine.root, "server", cohort.round)
    with out_of_memory(cohort.round, engine, now.phase.config.batch_size):
        server, averaging, metrics = exchange_round(key, now.trainer, now.server, cohort)
        jax.block_until_ready(server)
    return server, averaging, metrics


def runs_empty(trainer: Trainer) -> bool:
    """Whether a round without a reply changes the server."""
    return trainer.algorithm.runs_empty or trainer.average.runs_empty


def exchange_round(
    key: jax.Array, trainer: Trainer, server: Any, cohort: Cohort | GroupedCohort
) -> tuple[Any, Any, dict[str, Any]]:
    """The algorithm's round: new server, new state of the average, metrics on the host. Where nobody reports, both as they
    were."""
    before = server, cohort.averaging, {}
    if not cohort.present.any() and not runs_empty(trainer):
        return before
    new, metrics = trainer.algorithm.round(key, cohort.engine.held, server, cohort)
    cohort.settle()
    private.refuse_uncounted(trainer.config, cohort.done)
    if cohort.reports.any() or runs_empty(trainer):
        return new, cohort.averaging, cohort.fetch(metrics)
    return before


@contextmanager
def timed(clock: CompileClock) -> Iterator[list[Times]]:
    """Yields a list that holds the block's wall time, and what of it was compiling, once the block is left."""
    tick, compiled, times = time.perf_counter(), clock.seconds, []
    yield times
    seconds = time.perf_counter() - tick
    times.append(Times(seconds, min(clock.seconds - compiled, seconds)))


def tell_all(
    progress: Progress, line: record.Round, config: Config, trainer: Trainer, cohort: Cohort | GroupedCohort
) -> None:
    """Shows a round, and says what is to be known of it."""
    tell(progress, line, changes_empty=runs_empty(trainer))
    tell_unread(progress, config, cohort)
    if trainer.privacy is not None:
        for said in private.unusual(trainer.privacy, config, cohort.round, len(cohort.ids)):
            progress.note(said)


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
    if has_diverged(seen):
        said = "the model's outputs are not finite, so it has no scores; it has diverged, a lower --lr may help"
        progress.note(f"round {number}: {said}", once="outputs")


def tell_unread(progress: Progress, config: Config, cohort: Cohort | GroupedCohort) -> None:
    """Says in the first round which of the server's examples nothing reads."""
    for option in unread(config, cohort) if cohort.round == 1 else ():
        progress.note(
            f"{option} of the training examples lie with the server, and {config.algorithm} does not read them"
        )


def release(problem: Problem, speed: Speed) -> Problem:
    """The problem for another speed, and nothing of the programs before it left on the devices."""
    if problem.trainers is not None:
        problem.trainers.clear()
    gc.collect()
    return problem._replace(speed=speed)
