"""`fedsim profile`: how fast rounds are under which `Speed`, where their time and memory go, how near the device's limits.

Rounds of the last phase run with the data set's own partition and the config's own programs. What a run computes once
for every example (the frozen layers' output) is filled with random numbers instead: they change no time. The pieces of
a round are the round's own calls, each waited for; forward and backward are programs of their own over one step of all
lanes, since they cannot be told apart inside the compiled segment. docs/profile.md says how to read the result.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import build, peaks, profile_report, record, simulate, wire
from fedsim import plan as planning
from fedsim.build import Phase, Problem
from fedsim.checkpoint import Checkpoints
from fedsim.cohort import Cohort
from fedsim.config import Config, Speed, invited, require_known
from fedsim.core import Batch, Population
from fedsim.data.dataset import stream
from fedsim.programs import State, key_for
from fedsim.simulate import Current

WORTH = 0.05  # a setting is recommended where it gains more than this
BATCH = "batch_size"  # the one option of a sweep that is no `Speed`: it changes what is simulated
ERRORS = (ValueError, RuntimeError)  # what XLA raises where a setting does not fit is a RuntimeError


class Seen(NamedTuple):
    """What one timed round shows besides its seconds."""

    spent: dict[str, float]  # seconds by piece
    plans: list[planning.Plan]  # of its exchanges
    segment: Any  # the program that ran, and shapes of its arguments
    shapes: tuple[Any, ...]


# --- one setting


def run_round(now: Current) -> tuple[Cohort, float, float]:
    """The phase's first round once more: the cohort, seconds until the host has nothing left to do, and then waits."""
    engine, algorithm, round = now.trainer.engine, now.trainer.algorithm, now.phase.first
    population = Population(engine.population, invited(now.trainer.config))
    ids = algorithm.select(stream(now.trainer.config.seed, f"sample {round}"), now.server, population)
    key = jax.block_until_ready(key_for(engine.root, "server", round))
    start = time.perf_counter()
    cohort = Cohort(engine, ids, round, now.memory, lr=now.trainer.lr(round))
    result = algorithm.round(key, engine.held, now.server, cohort)
    dispatched = time.perf_counter()
    jax.block_until_ready(result)
    return cohort, dispatched - start, time.perf_counter() - dispatched


@contextmanager
def stopwatch(engine: Any) -> Iterator[Seen]:
    """While it is open, every piece of an exchange is waited for and timed; `Seen` is complete when it closes."""
    spent: dict[str, float] = defaultdict(float)
    plans: list[planning.Plan] = []
    last: list[Any] = []
    make, seen = planning.make, Seen(spent, plans, last, ())

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = jax.block_until_ready(call(*args, **options))
            spent[name] += time.perf_counter() - start
            return out

        return run

    def plan(*args: Any, **options: Any) -> planning.Plan:
        plans.append(timed("plan", make)(*args, **options))
        return plans[-1]

    def programs(*args: Any, **options: Any) -> Any:
        made = type(engine).programs(engine, *args, **options)
        run = timed("segments", made.segment)

        def segment(*arguments: Any) -> Any:
            last[:] = [made.segment, jax.tree.map(_shape, arguments)]
            return run(*arguments)

        return made._replace(begin=timed("begin", made.begin), segment=segment, end=timed("fold", made.end))

    planning.make, engine.programs, engine.gather = plan, programs, timed("gather", engine.gather)
    try:
        yield seen
    finally:
        planning.make = make
        del engine.programs, engine.gather


def _shape(a: Any) -> Any:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)


def throughput(
    problem: Problem, phase: Phase, repeats: int, folder: Path | None = None
) -> tuple[dict[str, Any], Current]:
    """Steady rounds of one setting: clients and examples a second, occupancy, compile seconds apart.

    Args:
        folder: for the clients' memory; kept in the process where there is none.
    """
    clock = simulate.compile_clock()
    now, before = simulate.prepare(problem, phase, None, folder), clock.seconds
    run_round(now)
    compiled = clock.seconds - before
    rounds = [run_round(now) for _ in range(repeats)]
    cohort = rounds[-1][0]
    seconds = [busy + waiting for _, busy, waiting in rounds]
    steady, examples = statistics.median(seconds), sum(e.examples for e in cohort.done)
    rate = examples * now.counted.total / steady
    peak = peaks.of(now.trainer.engine.devices[0])
    devices = len(now.trainer.engine.devices)
    return {
        "lanes": now.trainer.engine.lanes,
        "devices": devices,
        BATCH: phase.config.batch_size,
        "seconds": seconds,
        "waiting": [waiting for _, _, waiting in rounds],
        "clients_per_second": len(cohort.ids) / steady,
        "examples_per_second": examples / steady,
        "flops_per_second": rate,
        "mfu": rate / (devices * peak.flops(_precision(problem.speed))),
        "lane_occupancy": float(np.mean([e.occupancy[0] for e in cohort.done])),
        "row_occupancy": float(np.mean([e.occupancy[1] for e in cohort.done])),
        "examples": examples,
        "compile_seconds": compiled,
    }, now


def _precision(speed: Speed) -> str:
    return getattr(speed, "precision", "float32")


# --- where the time of the base setting goes


def pieces(now: Current, repeats: int) -> tuple[dict[str, float], Seen, list[dict[str, Any]]]:
    """Seconds of the pieces of a round, and the two programs of a step for the roofline.

    `segments` is what trains; of it `forward` and `backward` are one step of all lanes times the plan's steps, `update`
    is the rest: optimizer, masking, start and finish of clients. `host` is what is left of a round whose every piece is
    waited for: bytes, slots, keys, dispatch.
    """
    spent: dict[str, list[float]] = {}
    for _ in range(repeats):
        with stopwatch(now.trainer.engine) as seen:
            _, busy, waiting = run_round(now)
        for name in ("plan", "gather", "begin", "segments", "fold"):
            spent.setdefault(name, []).append(seen.spent[name])
        spent.setdefault("host", []).append(busy + waiting - sum(seen.spent.values()))
    found = {name: statistics.median(values) for name, values in spent.items()}
    steps = sum(int(plan.length.max()) for plan in seen.plans)
    halves = step_programs(now, seen.plans[0], repeats)
    forward, training = (statistics.median(half["seconds"]) * steps for half in halves)
    found["forward"], found["backward"] = forward, training - forward
    found["update"] = found["segments"] - training
    return found, Seen(seen.spent, seen.plans, *seen.segment), halves


def step_programs(now: Current, plan: planning.Plan, repeats: int) -> list[dict[str, Any]]:
    """The loss of one step of all lanes, and the loss with its gradients: seconds, FLOPs, bytes as XLA counts them."""
    engine, task = now.trainer.engine, now.trainer.task
    devices, _, lanes, size = plan.rows.shape
    x, y = engine.gather(plan.rows[:, 0])
    params = {k: np.broadcast_to(v, (devices, lanes, *v.shape)) for k, v in now.trainer.start.items()}
    params = jax.device_put(params, engine.apart)

    def loss(held: Any, params: Any, x: Any, y: Any, key: Any) -> Any:
        batch = Batch(x, y, jnp.ones((size,)), key, jnp.int32(0), jnp.bool_(False))
        return task.loss(held, params, batch)[0]

    wanted = (
        ("forward", loss, now.counted.forward),
        ("training step", jax.value_and_grad(loss, 1), now.counted.total),
    )
    found, calls = [], []
    for name, fn, work in wanted:

        def lane_step(held: Any, params: Any, x: Any, y: Any, root: Any, fn: Any = fn) -> Any:
            return jax.vmap(partial(fn, held), in_axes=(0, 0, 0, None))(params, x, y, root)

        program: Any = engine._spread(lane_step, (False, True, True, True, False))
        args = (engine.held, params, x, y, engine.root)
        compiled = program.lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        cost = compiled.cost_analysis() or {}
        moved = float(cost.get("bytes accessed", 0.0))
        found.append({"name": name, "flops": work * lanes * size, "bytes": moved, "seconds": []})
        calls.append(partial(compiled, *args))
    for _ in range(repeats):
        for half, call in zip(found, calls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            half["seconds"].append(time.perf_counter() - start)
    return found


def apart(problem: Problem, now: Current, repeats: int) -> dict[str, float]:
    """Seconds of what does not belong to every round: one evaluation, one checkpoint, the frozen features once."""
    trainer, found = now.trainer, {}
    trainer.validate(now.server)
    found["evaluate"] = _median(lambda: trainer.validate(now.server), repeats)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        waited = []
        for number in range(1, repeats + 1):
            start = time.perf_counter()
            checkpoints.save(number, {"server": now.server, "memory": now.memory.seal()}, {})
            waited.append(time.perf_counter() - start)
            checkpoints.wait()
        found["checkpoint"] = statistics.median(waited)
    if trainer.cached:
        model, x = trainer.model, problem.dataset.x
        held = {k: jnp.full(s.shape, 0.01, s.dtype) for k, s in model.frozen.items() if k in model.below}
        batch = jax.tree.map(lambda a: jnp.asarray(a[: build.FEATURE_BATCH]), x)
        prefix = jax.jit(lambda held, x: model.run(held, x, 0, model.cut))
        jax.block_until_ready(prefix(held, batch))
        batches = -(-len(problem.dataset.y) // build.FEATURE_BATCH)
        found["features, once"] = batches * _median(lambda: jax.block_until_ready(prefix(held, batch)), repeats)
    return found


def _median(call: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory(now: Current, seen: Seen) -> dict[str, int]:
    """Bytes by part, of one device but for the host's: what stays, what a segment is given, what it needs besides."""
    engine, program = now.trainer.engine, seen.segment
    place = next(i for i, a in enumerate(seen.shapes) if isinstance(a, State))
    state, devices = seen.shapes[place], len(engine.devices)
    compiled = program if hasattr(program, "memory_analysis") else program.lower(*seen.shapes).compile()
    resident = (engine.x, engine.y) if engine.resident else ()
    return {
        "backbone": nbytes(engine.held),
        "examples": nbytes(resident),
        "lanes (trained, optimizer)": nbytes(state.carry) // devices,
        "fold and clients": (nbytes(state) - nbytes(state.carry)) // devices,
        "batches": nbytes(seen.shapes[place + 1 : place + 3]) // devices,
        "temporaries": int(compiled.memory_analysis().temp_size_in_bytes),
        "host, resident at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def nbytes(tree: Any) -> int:
    """Bytes of all leaves; keys, which have no plain size, do not count."""
    keys = jax.dtypes.prng_key
    return sum(wire.array_bytes(a) for a in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(a.dtype, keys))


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
    try:
        row, _ = throughput(problem, phase, repeats)
    except ERRORS as error:
        row = {"error": str(error).partition("\n")[0]}
    return {"changes": dict(changes), **row}


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


def tile_notes(model: Any, rows: int) -> list[str]:
    """What a TPU would pad: its tiles hold 8 x 128 numbers, rows by columns."""
    notes = [] if rows % 8 == 0 else [f"a step has {rows} rows in a device's lanes, no multiple of 8"]
    widths = {s.shape[-1] for s in model.frozen.values() if len(s.shape) > 1 and s.shape[-1] % 128}
    return notes + ([f"frozen widths {', '.join(map(str, sorted(widths)))} are no multiples of 128"] if widths else [])


# --- the whole


def fill(problem: Problem, phase: Phase) -> Problem:
    """The problem with random features where the phase would read cached ones; values change no time."""
    model = build.split_model(phase.config, problem.dataset)
    if not build.use_cache(problem.speed, model, problem.dataset.x, phase.config):
        return problem
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), problem.dataset.x)
    rng, count = np.random.default_rng(0), len(problem.dataset.y)

    def drawn(s: Any) -> np.ndarray:
        return np.resize(rng.normal(size=(min(count, 256), *s.shape[1:])).astype(s.dtype), (count, *s.shape[1:]))

    features = jax.tree.map(drawn, jax.eval_shape(model.prefix, model.frozen, one))
    return problem._replace(cuts=(model.cut,), cache={model.cut: features})


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
) -> dict[str, Any]:
    """Measures, prints tables, writes `profile.json`, `profile.png`, `roofline.png` and a trace into a folder.

    Args:
        sweep: options to vary, as `lanes=1,2,4`; default: `default_sweep`.
        head: profile the phase of the head alone, not the last one.
        repeats: timed rounds of every setting, after one that compiles.
        trace: also record one round with `jax.profiler`.

    Raises:
        ValueError: as `build.check` and `parse_sweep`, before anything is measured.
    """
    asked = parse_sweep(sweep)
    build.check(config, speed)
    simulate.tune_host(speed)
    problem = problem or build.problem(config, speed)
    phase = build.phases(config)[0 if head else -1]
    problem = fill(problem._replace(speed=speed, trainers=None), phase)
    out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        base, now = throughput(problem, phase, repeats, Path(folder))
        engine = now.trainer.engine
        seconds, seen, halves = pieces(now, repeats)
        limits = peaks.of(engine.devices[0])
        if trace:
            with jax.profiler.trace(str(out / "trace"), create_perfetto_trace=True):
                run_round(now)
        result = {
            "schema": 1,
            **record.machine(),
            "config": dataclasses.asdict(phase.config),
            "speed": dataclasses.asdict(speed),
            "phase": phase.name,
            "peak": limits._asdict(),
            "base": base,
            "flops": now.counted._asdict(),
            "seconds": seconds,
            "apart": apart(problem, now, repeats),
            "memory": memory(now, seen),
            "steps": halves,
            "tiles": tile_notes(now.trainer.model, seen.plans[0].rows.shape[2] * phase.config.batch_size),
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
