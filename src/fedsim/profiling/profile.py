"""`fedsim profile`: how fast rounds are under which `Speed`, where their time and memory go, how near the device's limits.

Rounds of the last phase run with the data set's own partition and the config's own programs. What a run computes once
for every example (the frozen layers' output) is filled with random numbers instead: they change no time. docs/profile.md
says how to read the result.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim import record
from fedsim.config import Config, Speed, require_known
from fedsim.engine import peaks
from fedsim.engine.host import cpu_devices, divide_cpu, tune_host
from fedsim.profiling import report as profile_report
from fedsim.profiling.rounds import apart, memory, pieces, run_round, step_rows, throughput, tile_notes
from fedsim.simulation import build, needs, trainers
from fedsim.simulation.build import Phase, Problem
from fedsim.simulation.rehearsal import stand_in

WORTH = 0.05  # a setting is recommended where it gains more than this
BATCH = "batch_size"  # the one option of a sweep that is no `Speed`: it changes what is simulated
ERRORS = (ValueError, RuntimeError)  # what XLA raises where a setting does not fit is a RuntimeError


# --- settings against each other


def default_sweep(config: Config, lanes: int) -> dict[str, tuple[Any, ...]]:
    """What is varied if nothing is said, one option at a time: lanes, batch, devices, precision."""
    cohort, available = config.clients_per_round, jax.local_device_count()
    powers = [2**k for k in range(12)]
    found: dict[str, tuple[Any, ...]] = {
        "lanes": tuple(sorted({*(n for n in powers if n <= min(cohort, 4 * lanes)), lanes})),
        BATCH: tuple(sorted({max(1, config.batch_size // 2), config.batch_size, 2 * config.batch_size})),
        "devices": tuple(n for n in powers if n <= available),
        "precision": ("float32", "bfloat16"),
    }
    return {k: v for k, v in found.items() if len(v) > 1 and (k == BATCH or hasattr(Speed(), k))}


def parse_sweep(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`lanes=1,2,4` for every option that is varied.

    Raises:
        ValueError: no option of `Speed` nor the batch size, or a value that it does not take.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        require_known([name], [*(f.name for f in dataclasses.fields(Speed)), BATCH], "option of a sweep")
        if not values:
            raise ValueError(f"Expected sweep={text!r} to have values; write {name}=1,2,4.")
        found[name] = tuple(_literal(value) for value in values.split(","))
        for value in found[name]:
            (Config if name == BATCH else Speed)(**{name: value})
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def vary(problem: Problem, phase: Phase, name: str, value: Any) -> tuple[Problem, Phase]:
    """The same work with one option changed."""
    if name == BATCH:
        return problem, phase._replace(config=phase.config.replace(batch_size=value))
    return problem._replace(speed=dataclasses.replace(problem.speed, **{name: value})), phase


def measure(problem: Problem, phase: Phase, changes: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """One row of a sweep; with `error` instead of figures where the setting cannot run."""
    for name, value in changes.items():
        problem, phase = vary(problem, phase, name, value)
    said(", ".join(f"{name}={value}" for name, value in changes.items()))
    try:
        row, _ = throughput(fill(problem, phase), phase, repeats)
    except ERRORS as error:
        row = {"error": str(error).partition("\n")[0]}
    return {"changes": dict(changes), **row}


def said(what: str) -> None:
    """Says on the error stream what is being measured, since minutes pass before the tables."""
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def recommend(
    base: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], confirm: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Options of `Speed` that gain more than `WORTH`; several of them together only where measuring confirms it.

    Args:
        confirm: options -> the row of a measurement with all of them.
    """
    best: dict[str, tuple[float, Any]] = {}
    for row in rows:
        ((name, value),) = row["changes"].items()
        rate = row.get("examples_per_second", 0.0)
        if name != BATCH and rate > best.get(name, ((1 + WORTH) * base["examples_per_second"], None))[0]:
            best[name] = rate, value
    if len(best) > 1:
        together = confirm({name: value for name, (_, value) in best.items()})
        if together.get("examples_per_second", 0.0) <= max(rate for rate, _ in best.values()):
            name = max(best, key=lambda n: best[n][0])
            best = {name: best[name]}
    return {name: value for name, (_, value) in best.items()}


# --- the whole


def fill(problem: Problem, phase: Phase) -> Problem:
    """The problem with random features where the phase would read cached ones; values change no time."""
    rng = np.random.default_rng(0)

    def drawn(count: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.resize(rng.normal(size=(min(count, 256), *shape)).astype(dtype), (count, *shape))

    return stand_in(problem, phase, drawn)


def divided(speed: Speed, asked: Mapping[str, Sequence[Any]]) -> Speed:
    """The speed, a CPU being divided into as many devices as any setting takes; as set, it has no more of them than usual."""
    usual = cpu_devices()
    most = max(usual, *(n or 1 for n in (speed.devices, *asked.get("devices", ()))))
    if divide_cpu(most) and most > usual and speed.devices is None and jax.default_backend() == "cpu":
        return dataclasses.replace(speed, devices=usual)
    return speed


def profile(
    config: Config,
    speed: Speed,
    out: Path,
    *,
    sweep: Sequence[str] = (),
    head: bool = False,
    repeats: int = 5,
    trace: bool = True,
    problem: Problem | None = None,
    start: str = "",
) -> dict[str, Any]:
    """Measures, prints tables, writes `profile.json`, `profile.png`, `roofline.png` and a trace into a folder.

    Args:
        sweep: options to vary, as `lanes=1,2,4`; default: `default_sweep`.
        head: profile the phase of the head alone, not the last one.
        repeats: timed rounds of every setting, after one that compiles.
        trace: also record one round with `jax.profiler`.
        start: what the options start from, printed before anything is measured.

    Raises:
        ValueError: as `build.check` and `parse_sweep`, before anything is measured.
    """
    asked = parse_sweep(sweep)
    speed = divided(speed, asked)
    build.check(config, speed)
    tune_host(speed)
    if problem is None:
        needs.fetch_missing(config)
        problem = build.problem(config, speed)
    phase = build.phases(config)[0 if head else -1]
    problem = problem._replace(speed=speed, trainers=None)
    out.mkdir(parents=True, exist_ok=True)
    if start:
        print(start, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        said("rounds as set")
        base, now = throughput(fill(problem, phase), phase, repeats, Path(folder))
        engine = now.trainer.engine
        said("the pieces of a round")
        counted = trainers.example_flops(problem, now.trainer)
        seconds, seen, halves = pieces(now, counted, repeats)
        limits = peaks.share(engine.devices)
        if trace:
            with jax.profiler.trace(str(out / "trace"), create_perfetto_trace=True):
                run_round(now)
        result = {
            "schema": 1,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            **record.machine(),
            "config": dataclasses.asdict(phase.config),
            "speed": dataclasses.asdict(speed),
            "phase": phase.name,
            "peak": limits._asdict(),
            "base": base,
            "flops": counted._asdict(),
            "seconds": seconds,
            "apart": apart(problem, now, repeats),
            "memory": memory(now, seen),
            "steps": halves,
            "tiles": tile_notes(now.trainer.model, *step_rows(seen.plans)),
        }
    lanes = int(engine.lanes)
    del now, engine, seen  # the next engine needs the memory
    varied = asked or default_sweep(phase.config, lanes)
    run = partial(measure, problem, phase, repeats=repeats)
    rows = [run({name: value}) for name, values in varied.items() for value in values]
    chosen = recommend(base, rows, lambda changes: run(changes))
    result |= {"sweep": rows, "recommended": chosen}
    (out / "profile.json").write_text(json.dumps(record.plain(result), indent=1) + "\n")
    profile_report.draw(result, out)
    profile_report.show(result, out)
    return result
