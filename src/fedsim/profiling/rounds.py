"""What `fedsim profile` measures of one setting: its rounds, their pieces, what lies on the device, how near its limits.

The pieces of a round are the round's own calls, each waited for; forward and backward are programs of their own over one
step of all lanes, since they cannot be told apart inside the compiled segment.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import peft, wire
from fedsim.config import invited
from fedsim.core import Batch, Population
from fedsim.engine import host, packing, peaks
from fedsim.engine import plan as planning
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.engine.state import State
from fedsim.peft.flops import Flops
from fedsim.randomness import stream
from fedsim.record.checkpoint import Checkpoints
from fedsim.simulation.build import Phase, Problem
from fedsim.simulation.current import Current, prepare
from fedsim.training import features, lengths


class Seen(NamedTuple):
    """What one timed round shows besides its seconds."""

    spent: dict[str, float]  # seconds by piece
    plans: list[planning.Plan]  # of its exchanges
    segment: Any  # the program that ran, and shapes of its arguments
    shapes: tuple[Any, ...]


def run_round(now: Current) -> tuple[Cohort, float, float]:
    """The phase's first round once more: the cohort, seconds until the host has nothing left to do, and then waits."""
    trainer, round = now.trainer, now.phase.first
    engine, algorithm = trainer.engine, trainer.algorithm
    population = Population(engine.population, invited(trainer.config), round=round)
    ids = algorithm.select(stream(trainer.config.seed, f"sample {round}"), now.server, population)
    key = jax.block_until_ready(key_for(engine.root, "server", round))
    start = time.perf_counter()
    cohort = Cohort(
        engine, ids, round, now.memory, lr=trainer.lr(round),
        average=trainer.average, averaging=now.averaging, releases=algorithm.releases,
    )  # fmt: skip
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
    clock = host.compile_clock()
    now, before = prepare(problem, phase, None, folder), clock.seconds
    run_round(now)
    compiled = clock.seconds - before
    rounds = [run_round(now) for _ in range(repeats)]
    cohort = rounds[-1][0]
    seconds = [busy + waiting for _, busy, waiting in rounds]
    steady, examples = statistics.median(seconds), sum(e.examples for e in cohort.done)
    rate = cohort.flops() / steady
    devices = now.trainer.engine.devices
    return {
        "lanes": now.trainer.engine.lanes,
        "devices": len(devices),
        "batch_size": phase.config.batch_size,
        "seconds": seconds,
        "waiting": [waiting for _, _, waiting in rounds],
        "clients_per_second": len(cohort.ids) / steady,
        "examples_per_second": examples / steady,
        "flops_per_second": rate,
        "mfu": rate / (len(devices) * peaks.share(devices).flops(problem.speed.precision)),
        "lane_occupancy": float(np.mean([e.occupancy[0] for e in cohort.done])),
        "row_occupancy": float(np.mean([e.occupancy[1] for e in cohort.done])),
        "examples": examples,
        "compile_seconds": compiled,
    }, now


# --- where the time of the base setting goes


def pieces(now: Current, counted: Flops, repeats: int) -> tuple[dict[str, float], Seen, list[dict[str, Any]]]:
    """Seconds of the pieces of a round, and the two programs of a step for the roofline.

    `segments` is what trains; of it `forward` and `backward` are one step of all lanes times the plan's steps, at each
    width of a batch that they have (the two programs are those of the width that takes most time), `update` is the rest:
    optimizer, masking, start and finish of clients. `host` is what is left of a round whose every piece is waited for:
    bytes, slots, keys, dispatch.

    Args:
        counted: FLOPs of an example.
    """
    spent: dict[str, list[float]] = {}
    for _ in range(repeats):
        with stopwatch(now.trainer.engine) as seen:
            _, busy, waiting = run_round(now)
        for name in ("plan", "gather", "begin", "segments", "fold"):
            spent.setdefault(name, []).append(seen.spent[name])
        spent.setdefault("host", []).append(busy + waiting - sum(seen.spent.values()))
    found = {name: statistics.median(values) for name, values in spent.items()}
    steps: Counter[int] = Counter()
    for plan in seen.plans:
        device = int(plan.length.argmax())  # the one that the others wait for
        steps.update(plan.width[device, : plan.length[device]].tolist())
    del steps[0]
    halves = {width: step_programs(now, counted, seen.plans[0], width, repeats) for width in steps}
    spans = {
        width: [statistics.median(half["seconds"]) * steps[width] for half in both] for width, both in halves.items()
    }
    forward, training = (sum(span[half] for span in spans.values()) for half in (0, 1))
    forward = min(forward, training)
    # A program of its own has a dispatch that a step within the segment has not: it may seem longer than all of it.
    scale = min(1.0, found["segments"] / training)
    found["forward"], found["backward"] = scale * forward, scale * (training - forward)
    found["update"] = found["segments"] - scale * training
    return found, Seen(seen.spent, seen.plans, *seen.segment), halves[max(spans, key=lambda width: spans[width][1])]


def step_programs(now: Current, counted: Flops, plan: planning.Plan, size: int, repeats: int) -> list[dict[str, Any]]:
    """The loss of one step of all lanes on `size` rows each, and with its gradients: seconds, FLOPs, bytes by XLA's count."""
    engine, task = now.trainer.engine, now.trainer.task
    devices, _, lanes, _ = plan.rows.shape
    x, y = engine.gather(plan.rows[:, 0, :, :size])
    params = {k: np.broadcast_to(v, (devices, lanes, *v.shape)) for k, v in now.trainer.start.items()}
    params = jax.device_put(params, engine.apart)

    def loss(held: Any, params: Any, x: Any, y: Any, key: Any) -> Any:
        batch = Batch(x, y, jnp.ones((size,)), key, jnp.int32(0), jnp.bool_(False))
        return task.loss(held, params, batch)[0]

    wanted = (
        ("forward", loss, counted.forward),
        ("training step", jax.value_and_grad(loss, 1), counted.total),
    )
    found, calls = [], []
    for name, fn, work in wanted:

        def lane_step(held: Any, params: Any, x: Any, y: Any, root: Any, fn: Any = fn) -> Any:
            return jax.vmap(partial(fn, held), in_axes=(0, 0, 0, None))(params, x, y, root)

        program: Any = engine.spread(lane_step, (False, True, True, True, False))
        args = (engine.held, params, x, y, engine.root)
        compiled = program.lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        cost = compiled.cost_analysis() or {}
        moved = float(cost.get("bytes accessed", 0.0))
        found.append({"name": name, "rows": size, "flops": work * lanes * size, "bytes": moved, "seconds": []})
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
        found["features, once"] = feature_seconds(problem, trainer.model, trainer.engine.own, repeats)
    return found


def feature_seconds(problem: Problem, model: peft.Model, devices: Sequence[jax.Device], repeats: int) -> float:
    """Seconds of the frozen stages on all examples: those of one batch of every length, times how many batches have it."""
    x, texts = problem.dataset.x, lengths.entering(problem.texts, model, 0)
    prefix, everywhere, split = features.program(model, 0, model.cut, devices)
    held = {k: np.full(s.shape, 0.01, s.dtype) for k, s in model.frozen.items() if k in model.below}
    held = jax.device_put(held, everywhere)
    size, rows = -(-features.FEATURE_BATCH // len(devices)) * len(devices), np.arange(len(problem.dataset.y))
    whole = 0.0
    for length, count in Counter(length for _, length in lengths.batches(rows, size, texts)).items():
        batch = jax.tree.map(lambda a: np.resize(a[:size], (size, *a.shape[1:])), x)
        batch = jax.device_put(batch if texts is None or length is None else texts.cut(batch, length), split)
        jax.block_until_ready(prefix(held, batch))
        whole += count * _median(lambda batch=batch: jax.block_until_ready(prefix(held, batch)), repeats)
    return whole


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


def step_rows(plans: Iterable[planning.Plan]) -> list[int]:
    """Rows that a device's lanes compute in one step, ascending: a number for each width that the plans have."""
    found = {(plan.rows.shape[2], width) for plan in plans for width in np.unique(plan.width).tolist()}
    return sorted({lanes * width for lanes, width in found if width})


def tile_notes(model: Any, *rows: int) -> list[str]:
    """What a TPU would pad: its tiles hold 8 x 128 numbers, rows by columns.

    Args:
        rows: of a step in a device's lanes, as `step_rows` gives them.
    """
    odd = ", ".join(str(n) for n in rows if n % packing.TILE)
    notes = [f"steps with {odd} rows in a device's lanes, no multiple of {packing.TILE}"] if odd else []
    widths = {s.shape[-1] for s in model.frozen.values() if len(s.shape) > 1 and s.shape[-1] % 128}
    return notes + ([f"frozen widths {', '.join(map(str, sorted(widths)))} are no multiples of 128"] if widths else [])
