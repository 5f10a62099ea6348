"""A run from top to bottom: prepare, then for every round select, train, reduce, evaluate, record, checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim import network, record, units
from fedsim.backbones.own import identity
from fedsim.config import Config, Speed, invited, main_job
from fedsim.core import Algorithm, Population
from fedsim.data import require_given
from fedsim.data.dataset import Source
from fedsim.data.show import draw as draw_partition
from fedsim.engine import peaks, processes
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import OutOfMemoryError, most_memory, out_of_memory
from fedsim.engine.host import compile_clock, divide_cpu, interruptible, tune_host
from fedsim.engine.keys import key_for
from fedsim.peft.flops import Flops
from fedsim.randomness import stream
from fedsim.record.checkpoint import KEEP
from fedsim.record.shared_checkpoints import SharedCheckpoints
from fedsim.report import plots, summaries
from fedsim.report.progress import Progress
from fedsim.simulation import build, personal, resuming
from fedsim.simulation.build import Phase, Problem, Trainer
from fedsim.simulation.rehearsal import may_be_too_large, rehearse
from fedsim.training.features import use_cache

LONG = 1000  # examples whose frozen features take longer than tracing and compiling a phase's programs once more


def run(
    config: Config | None = None,
    speed: Speed | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    problem: Problem | None = None,
    data: Source | None = None,
) -> record.Run:
    """Simulates `config` (default: the main job) and gives the finished run as its folder tells it.

    Args:
        out: the run's folder; default `runs/<date-time>-<config hash>`.
        resume: folder of a stopped run to go on with, instead of `config`, `speed` and `out`.
        quiet: show no progress.
        problem: `build.problem` of a config with the same data and backbone, to share data and cached features.
        data: `fedsim.arrays(x, y)` for `dataset="arrays"`; on resuming the same again.

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
        stopped = by_first(lambda: record.load(resume))
        divide_cpu(stopped.speed.devices or stopped.about["device"]["count"])
        config, speed, directory = stopped.config, stopped.speed, stopped.directory
    else:
        config, speed = config or main_job(), speed or Speed()
        build.check(config, speed)
        if problem is None:
            require_given(config, data)
        by_first(lambda: record.refuse_used(out))
        build.fetch_in_turn(config)
        directory = None  # made when there is something to write, so that bad data leave no empty folder behind
    tune_host(speed)
    build.warn_idle_accelerator()
    with ExitStack() as stack:
        quiet = quiet or not processes.is_first()
        progress = stack.enter_context(
            Progress(config.rounds, head_rounds=config.head_rounds * (config.peft != "head"), quiet=quiet)
        )
        if problem is None:
            progress.message("reading the data")
            problem = processes.each(lambda: build.problem(config, speed, data))
        problem = problem._replace(speed=speed)  # a shared one may have been made for another
        if resume is None:
            refuse_lanes(config, speed, problem)
        directory = directory or by_first(lambda: record.folder(out, config))
        by_first(lambda: stack.enter_context(record.lock(directory)))
        checkpoints = stack.enter_context(SharedCheckpoints(directory / record.CHECKPOINTS))
        fresh, fewer = resume is None, None
        while True:
            if fewer is not None:  # in a fresh program, of which nothing but the last checkpoint is known
                speed = dataclasses.replace(speed, lanes=fewer)
                problem, fresh = release(problem, speed), False
            try:
                simulate(
                    config, speed, problem, directory, checkpoints, progress, fresh=fresh, reduced=fewer is not None
                )
                break
            except OutOfMemoryError as error:
                fewer = error.lanes // 2
                progress.message(f"{error}; going on from the last checkpoint with lanes={fewer}")
    return by_first(lambda: record.load(directory))


def simulate(
    config: Config,
    speed: Speed,
    problem: Problem,
    directory: Path,
    checkpoints: SharedCheckpoints,
    progress: Progress,
    *,
    fresh: bool,
    reduced: bool = False,
) -> None:
    """The loop over rounds. Everything random derives from (seed, round), so a resumed run repeats what was lost.

    Args:
        fresh: start anew; else go on from the last checkpoint, or from round 0 where there is none.
        reduced: memory ran out, and `speed` has fewer lanes than the checkpoint.

    Raises:
        OutOfMemoryError: more than one lane ran out of a device's memory.
    """
    began = time.perf_counter()
    clock = compile_clock()
    phases = build.phases(config)
    if fresh:
        shape = list(jax.tree.leaves(problem.dataset.x)[0].shape[1:])
        facts = {"classes": list(problem.dataset.classes), "input_shape": shape}
        own = identity(config.backbone)
        facts |= {"backbone_hash": own} if own else {}
        processes.by_first(lambda: record.start(directory, config, speed, facts))

    inputs = resuming.fingerprint(config, problem)
    processes.agree("the data", inputs)
    fleet = network.fleet(config)

    # --- where to start: round 0, or after the last good checkpoint
    round, stopped, elapsed = 0, "rounds", 0.0
    totals, best, stale = {"up": 0, "down": 0, "simulated_seconds": 0.0}, -1.0, 0
    met = np.zeros(problem.partition.clients, np.int32)  # (N,): the last round in which a client was in the cohort
    start_scores: dict[str, Any] | None = None
    now: Current | None = None
    bitwise = not reduced  # equal to a run that was never disturbed, bit for bit

    def ready(round: int, overlay: dict[str, np.ndarray] | None = None) -> Current:
        progress.message("loading the weights")
        return prepare(problem, next(p for p in phases if p.first <= round <= p.last), overlay, directory)

    if not fresh:
        tried: dict[str, Current] = {}

        def template(round: int, extra: dict[str, Any]) -> dict[str, Any]:
            # A damaged checkpoint makes `restore` go back to an older one, perhaps of the phase before.
            tried["now"] = ready(round)
            engine = tried["now"].trainer.engine
            engine.reuse(extra["lanes"], extra["segment_steps"])
            if not (extra.get("bitwise", True) or reduced):  # what an earlier process found to fit
                engine.lanes = extra["lanes"]
            return resuming.shapes(tried["now"].server, tried["now"].memory, engine.population, extra)

        def wanted(round: int, extra: dict[str, Any]) -> dict[str, Any]:
            ours = resuming.expected(config, speed, tried["now"].trainer, inputs)
            return ours | ({"lanes": extra["lanes"]} if reduced else {})

        found = checkpoints.restore(template, wanted, lambda state: tried["now"].memory.damage(state["memory"]))
        if found is not None:
            round, state, extra = found
            now = tried["now"]
            now = now._replace(server=now.trainer.engine.put(state["server"]))
            resuming.restore_memory(now.memory, state["memory"])
            met = np.array(state["met"])
            totals, best, stale = extra["totals"], extra["best"], extra["stale"]
            start_scores, stopped, elapsed = extra["start"], extra["stopped"], extra["elapsed"]
            bitwise = bitwise and extra.get("bitwise", True)
    lines = [] if fresh else processes.by_first(lambda: record.truncate(directory, round))

    # --- the rounds
    with interruptible() as interrupted:
        while round < config.rounds and stopped == "rounds":
            round += 1
            if now is None or round > now.phase.last:  # the next phase starts from what the one before has trained
                now = ready(round, None if now is None else now.parameters())
                stale = 0  # patience is with this phase
                if start_scores is None:
                    start_scores = {"validation": now.trainer.validate(now.server)}
                progress.message("compiling")
            phase, trainer, server, memory, counted, setup = now
            algorithm, engine = trainer.algorithm, trainer.engine
            tick, compiled = time.perf_counter(), clock.seconds
            population = Population(engine.population, invited(config), network.reachable(fleet, round))
            ids = algorithm.select(stream(config.seed, f"sample {round}"), server, population)
            conditions = network.conditions(fleet, ids, round)
            cohort = Cohort(engine, ids, round, memory, conditions, met=met, lr=trainer.lr(round))
            key = key_for(engine.root, "server", round)
            with out_of_memory(round, engine, phase.config.batch_size):
                server, metrics = exchange_round(key, algorithm, server, cohort)
                jax.block_until_ready(server)
            down, up = cohort.traffic()
            simulated = network.figures(conditions, [e.outcome for e in cohort.done], totals["simulated_seconds"])
            seconds = time.perf_counter() - tick
            compile_seconds = min(clock.seconds - compiled, seconds)
            newcomers = int((cohort.last[cohort.present] == 0).sum())
            met[cohort.ids[cohort.present]] = round
            totals = {
                "up": totals["up"] + sum(up.values()),
                "down": totals["down"] + sum(down.values()),
                "simulated_seconds": simulated["total_seconds"] or 0.0,
            }

            scores = None
            if round % config.eval_every == 0 or round in (config.rounds, phase.last):
                scores = trainer.validate(server)
                server = algorithm.observe(server, scores)
                stale = 0 if scores["accuracy"] > best else stale + 1
                best = max(best, scores["accuracy"])
                if config.target_accuracy is not None and scores["accuracy"] >= config.target_accuracy:
                    stopped = "target"
                elif config.patience is not None and stale >= config.patience and phase is phases[-1]:
                    stopped = "patience"
            now = now._replace(server=server)
            nonfinite = cohort.fetch([e.info.nonfinite for e in cohort.done])
            steady = max(seconds - compile_seconds, 1e-9)
            examples = sum(e.examples for e in cohort.done)
            line = {
                "round": round,
                "phase": phase.name,
                "loss": float(metrics.get("loss", np.nan)),
                "accuracy": float(metrics.get("accuracy", np.nan)),
                "metrics": {k: float(v) for k, v in metrics.items() if k not in ("loss", "accuracy")},
                "validation": scores,
                "bytes_up": sum(up.values()),
                "bytes_down": sum(down.values()),
                "bytes_up_leaves": up,
                "bytes_down_leaves": down,
                "setup_bytes": newcomers * setup,
                "total_bytes_up": totals["up"],
                "total_bytes_down": totals["down"],
                "clients": int(cohort.present.sum()),
                "reported": int(cohort.reports.sum()),
                "nonfinite": int(sum(nonfinite)),
                "examples": examples,
                "seconds": seconds,
                "compile_seconds": compile_seconds,
                "clients_per_second": int(cohort.present.sum()) / steady,
                "examples_per_second": examples / steady,
                "flops": examples * counted.total,
                "flops_per_second": examples * counted.total / steady,
                "mfu": utilisation(trainer, speed, examples * counted.total / steady),
                "lane_occupancy": float(np.mean([e.occupancy[0] for e in cohort.done] or [0.0])),
                "row_occupancy": float(np.mean([e.occupancy[1] for e in cohort.done] or [0.0])),
                "simulated": None if config.reliable else simulated,
                "most_memory": most_memory(engine.own[0]),
                "bitwise": bitwise,
            }
            processes.by_first(functools.partial(record.append, directory, line))
            lines.append(line)
            progress.update(line)
            if compile_seconds > 0.1 * seconds:
                progress.message(f"round {round}: {units.duration(compile_seconds)} of it compiling")
            if not line["reported"]:
                kept = "" if algorithm.runs_empty else "; the server stays as it was"
                progress.message(f"round {round}: nobody reported{kept}")
            asked = processes.any_true(interrupted())
            if asked or stopped != "rounds" or round == config.rounds or round % speed.checkpoint_every == 0:
                state = {"server": server, "memory": processes.by_first(memory.seal), "met": met}
                extra = {
                    **resuming.expected(config, speed, trainer, inputs),
                    "bitwise": bitwise,
                    "totals": totals,
                    "best": best,
                    "stale": stale,
                    "start": start_scores,
                    "stopped": stopped,
                    "elapsed": elapsed + time.perf_counter() - began,
                    "memory_count": memory.count,
                }
                checkpoints.save(round, state, extra)
            if asked:
                checkpoints.wait()
                raise KeyboardInterrupt(f"Stopped after round {round}; go on with: fedsim run --resume {directory}")

    # --- the end: the test set is read once, here
    if now is None:
        raise ValueError(f"Expected rounds={config.rounds} > 0; raise --rounds.")
    progress.message("reading the test set")
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
        start=start_scores or {},
        final=final,
        full={"bytes_up": whole, "bytes_down": whole},
        parameters={
            "trained": sum(math.prod(s.shape) for s in trainer.model.trained.values()),
            "frozen": sum(math.prod(s.shape) for s in trainer.model.frozen.values()),
        },
        seconds=elapsed + time.perf_counter() - began,
        stopped=stopped,
    )
    checkpoints.wait()
    trained, rows = now.parameters(), None if clients is None else clients.rows()

    def written() -> None:
        record.finish(directory, summary, trained, rows)
        plots.save([record.load(directory)], directory)
        draw_partition(config, problem.dataset, problem.partition, directory / "partition.png")

    processes.by_first(written)
    progress.message("done")


def refuse_lanes(config: Config, speed: Speed, problem: Problem) -> None:
    """Has lanes and batches refused that do not fit in one of the phases, before any of them begins.

    A first phase without many frozen features to compute is left out: before its first round, which refuses, nothing takes
    as long as looking would. Lanes that nobody asked for are halved until they fit, so that only a batch that may be too
    large for a single one is looked at.

    Raises:
        ValueError: see `rehearsal.rehearse`.
    """
    first, *later = build.phases(config)
    model = build.split_model(first.config, problem.dataset, speed)
    long = len(problem.dataset.y) > LONG and use_cache(speed, model, problem.dataset.x, first.config)
    for phase in [first, *later] if long else later:
        if speed.lanes == "auto" and not may_be_too_large(problem, phase):
            continue
        ids = np.arange(min(invited(config), problem.partition.clients))
        rehearse(problem._replace(trainers=None), phase, ids)
        gc.collect()  # its engine, which refers to itself, before the first phase needs the memory


def exchange_round(key: jax.Array, algorithm: Algorithm, server: Any, cohort: Cohort) -> tuple[Any, dict[str, Any]]:
    """The algorithm's round: the new server, and metrics on the host. Where nobody reports, the server as it was."""
    if not cohort.present.any() and not algorithm.runs_empty:
        return server, {}
    new, metrics = algorithm.round(key, cohort.engine.held, server, cohort)
    if cohort.reports.any() or algorithm.runs_empty:
        return new, cohort.fetch(metrics)
    return server, {}


def release(problem: Problem, speed: Speed) -> Problem:
    """The problem for another speed, and nothing of the programs before it left on the devices."""
    if problem.trainers is not None:
        problem.trainers.clear()
    gc.collect()
    return problem._replace(speed=speed)


class Current(NamedTuple):
    """The phase that runs, and its state."""

    phase: Phase
    trainer: Trainer
    server: Any
    memory: Memory
    counted: Flops  # of one example in a training step
    setup: int  # bytes that a client is given once, before its first round

    def parameters(self) -> dict[str, np.ndarray]:
        """The trained part, on the host."""
        return processes.fetch(self.trainer.algorithm.params(self.server))


def prepare(
    problem: Problem, phase: Phase, overlay: dict[str, np.ndarray] | None, directory: Path | None = None
) -> Current:
    """A phase with the server's initial state and nothing in the clients' memory, which will lie in the run's folder."""
    trainer = build.trainer(problem, phase, overlay)
    engine = trainer.engine
    server = engine.put(trainer.algorithm.init(key_for(engine.root, "init"), engine.held))
    counted = build.example_flops(problem, trainer)
    # Of several processes the first one has the folder; the others keep the same rows in main memory.
    file = directory / f"memory-{phase.name}.rows" if directory is not None and processes.is_first() else None
    memory = Memory(trainer.algorithm.memory, engine.held, file, KEEP)
    return Current(phase, trainer, server, memory, counted, build.setup_bytes(trainer))


def utilisation(trainer: Trainer, speed: Speed, rate: float) -> float | None:
    """Share of the devices' published peak that `rate` FLOP/s are; None where none is published, as of a CPU."""
    devices = trainer.engine.devices
    limit = peaks.known(devices[0].device_kind)
    return None if limit is None else rate / (len(devices) * limit.flops(speed.precision))
