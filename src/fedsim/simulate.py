"""A run from top to bottom: prepare, then for every round select, train, reduce, evaluate, record, checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim import build, plots, record, report, wire
from fedsim.build import Phase, Problem, Trainer
from fedsim.checkpoint import Checkpoints
from fedsim.cohort import Cohort, Memory
from fedsim.config import Config, Speed
from fedsim.core import Population
from fedsim.data.dataset import stream
from fedsim.lanes import key_for
from fedsim.progress import Progress


def run(
    config: Config | None = None,
    speed: Speed | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> record.Run:
    """Simulates `config` and gives the finished run as its folder tells it.

    Args:
        out: the run's folder; default `runs/<date-time>-<config hash>`.
        resume: folder of a stopped run to go on with, instead of `config`, `speed` and `out`.

    Raises:
        ValueError: an impossible option, data or weights that cannot be used, a folder that holds another run.
    """
    if resume is not None:
        if config is not None or speed is not None or out is not None:
            raise ValueError(
                "Expected resume alone; a resumed run takes config, speed and folder from what it resumes."
            )
        stopped = record.load(resume)
        config, speed, directory = stopped.config, stopped.speed, stopped.directory
    else:
        config, speed = config or Config(), speed or Speed()
        build.check(config)
        directory = record.folder(out, config)
    with ExitStack() as stack:
        stack.enter_context(record.lock(directory))
        checkpoints = stack.enter_context(Checkpoints(directory / record.CHECKPOINTS))
        progress = stack.enter_context(Progress(config.rounds, head_rounds=config.head_rounds, quiet=quiet))
        simulate(config, speed, directory, checkpoints, progress, fresh=resume is None)
    return record.load(directory)


def simulate(
    config: Config, speed: Speed, directory: Path, checkpoints: Checkpoints, progress: Progress, *, fresh: bool
) -> None:
    """The loop over rounds. Everything random derives from (seed, round), so a resumed run repeats what was lost."""
    began = time.perf_counter()
    clock = CompileClock()
    saved = None if fresh else checkpoints.latest()
    if saved is not None:
        speed = resumed_speed(speed, saved[1])
    progress.message("reading the data")
    problem = build.problem(config, speed)
    if fresh:
        record.start(directory, config, speed)

    # --- where to start: round 0, or after the last good checkpoint
    phases = build.phases(config)
    round, totals, best, stale, seen = 0, {"up": 0, "down": 0}, -1.0, 0, np.zeros(0, np.int64)
    stopped, overlay, start_scores = "rounds", None, None
    trainer: Trainer | None = None
    server: Any = None
    memory: Memory | None = None
    if saved is not None:
        phase = next(p for p in phases if p.first <= saved[0] <= p.last)
        progress.message("loading the weights")
        trainer, server, memory = prepare(problem, phase, None)
        found = checkpoints.restore(template(server, memory, saved[1]), expect=expected(config, trainer, saved[1]))
        if found is not None:
            round, state, extra = found
            server = trainer.engine.put(state["server"])
            memory.restore(state["memory"], state["memory_ids"])
            seen, totals, best, stale = state["seen"], extra["totals"], extra["best"], extra["stale"]
            start_scores, stopped = extra["start"], extra["stopped"]
    lines = [] if fresh else record.truncate(directory, round)

    # --- the rounds
    with interruptible() as interrupted:
        while round < config.rounds and stopped == "rounds":
            round += 1
            phase = next(p for p in phases if p.first <= round <= p.last)
            if trainer is None or round == phase.first:
                progress.message(
                    "loading the weights" if trainer is None else "adding the PEFT part to the trained head"
                )
                if trainer is not None:
                    overlay = {k: np.asarray(v) for k, v in trainer.algorithm.params(server).items()}
                trainer, server, memory = prepare(problem, phase, overlay)
                if start_scores is None:
                    start_scores = {"validation": trainer.validate(server)}
                progress.message("compiling")
            tick = time.perf_counter()
            compiled = clock.seconds
            algorithm, engine = trainer.algorithm, trainer.engine
            ids = algorithm.select(
                stream(config.seed, f"sample {round}"), server, Population(engine.population, config.clients_per_round)
            )
            cohort = Cohort(engine, ids, round, memory)
            server, metrics = algorithm.round(key_for(engine.root, "server", round), engine.held, server, cohort)
            metrics = cohort.fetch(metrics)
            down, up = cohort.traffic()
            seconds = time.perf_counter() - tick
            compile_seconds = min(clock.seconds - compiled, seconds)
            newcomers = np.setdiff1d(ids, seen)
            seen = np.union1d(seen, ids)
            totals = {"up": totals["up"] + sum(up.values()), "down": totals["down"] + sum(down.values())}

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
            counted = cohort.fetch([(e.info.reported, e.info.nonfinite) for e in cohort.done])
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
                "setup_bytes": len(newcomers) * setup_price(trainer),
                "total_bytes_up": totals["up"],
                "total_bytes_down": totals["down"],
                "clients": len(ids),
                "reported": int(counted[-1][0]),
                "nonfinite": int(sum(n for _, n in counted)),
                "examples": examples,
                "seconds": seconds,
                "compile_seconds": compile_seconds,
                "clients_per_second": len(ids) / steady,
                "examples_per_second": examples / steady,
                "lane_occupancy": float(np.mean([e.occupancy[0] for e in cohort.done])),
                "row_occupancy": float(np.mean([e.occupancy[1] for e in cohort.done])),
            }
            record.append(directory, line)
            lines.append(line)
            progress.update(line)
            asked = interrupted()
            if asked or stopped != "rounds" or round == config.rounds or round % speed.checkpoint_every == 0:
                rows, memory_ids = memory.state()
                state = {"server": server, "memory": rows, "memory_ids": memory_ids, "seen": seen}
                extra = {
                    **expected(config, trainer, None),
                    "totals": totals,
                    "best": best,
                    "stale": stale,
                    "start": start_scores,
                    "stopped": stopped,
                    "memory_count": len(memory_ids),
                    "seen_count": len(seen),
                }
                checkpoints.save(round, state, extra)
            if asked:
                checkpoints.wait()
                raise KeyboardInterrupt(f"Stopped after round {round}; go on with: fedsim run --resume {directory}")

    # --- the end: the test set is read once, here
    if trainer is None or memory is None:
        raise ValueError(f"Expected {directory} to have a round to run; it is complete.")
    progress.message("reading the test set")
    final = {"validation": lines[-1]["validation"] or trainer.validate(server), "test": trainer.test(server)}
    whole = build.full_bytes(trainer.model)
    summary = report.summary(
        lines,
        start=start_scores or {},
        final=final,
        full={"bytes_up": whole, "bytes_down": whole},
        parameters={
            "trained": sum(int(np.prod(s.shape)) for s in trainer.model.trained.values()),
            "frozen": sum(int(np.prod(s.shape)) for s in trainer.model.frozen.values()),
        },
        seconds=time.perf_counter() - began,
        stopped=stopped,
    )
    checkpoints.wait()
    parameters = {k: np.asarray(v) for k, v in trainer.algorithm.params(server).items()}
    record.finish(directory, summary, parameters)
    plots.save([record.load(directory)], directory)
    progress.message("done")


def prepare(problem: Problem, phase: Phase, overlay: dict[str, np.ndarray] | None) -> tuple[Trainer, Any, Memory]:
    """Trainer, initial server state and empty memory of a phase."""
    trainer = build.trainer(problem, phase, overlay)
    engine = trainer.engine
    server = engine.put(trainer.algorithm.init(key_for(engine.root, "init"), engine.held))
    return trainer, server, Memory(trainer.algorithm.memory, engine.held)


def setup_price(trainer: Trainer) -> int:
    """Bytes that a client is given once, before its first round."""
    return sum(wire.price(trainer.algorithm.setup(trainer.model.frozen)).values())


def expected(config: Config, trainer: Trainer, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint must agree with, so that the resumed run is bit-identical: options, devices, what auto chose."""
    engine = trainer.engine
    chosen = {"lanes": engine.lanes, "segment_steps": engine.segment_steps}
    return {
        "config": config.hash(),
        "parallel": engine.parallel,
        "devices": len(engine.devices),
        "device": engine.devices[0].device_kind,
        "versions": {"jax": jax.__version__},
        "speed": chosen,
    }


def resumed_speed(speed: Speed, extra: dict[str, Any]) -> Speed:
    """The speed options with what `auto` chose in the run that goes on."""
    import dataclasses

    return dataclasses.replace(speed, devices=extra["devices"], **extra["speed"])


def template(server: Any, memory: Memory, extra: dict[str, Any]) -> dict[str, Any]:
    """Shapes of a checkpoint's arrays: the server's are known, the memory's rows are counted in `extra`."""
    count = extra["memory_count"]
    return {
        "server": server,
        "memory": jax.tree.map(lambda r: np.zeros((count, *r.shape[1:]), r.dtype), memory.rows),
        "memory_ids": np.zeros(count, np.int64),
        "seen": np.zeros(extra["seen_count"], np.int64),
    }


class CompileClock:
    """Seconds that JAX has spent compiling in this process since this clock was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


@contextmanager
def interruptible() -> Iterator[Any]:
    """Ctrl-C asks for a stop after the round; a second one stops at once. Yields a function: was it asked?"""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, as in some notebooks: Ctrl-C then stops at once
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
