"""`fedsim run --dry-run`: what a run would do, send and need. Reads the data, compiles the programs, trains nothing."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import peft
from fedsim.backbones.load import draw
from fedsim.config import Config, Speed
from fedsim.core import Passes
from fedsim.data.partition import holders
from fedsim.engine import plan
from fedsim.engine.host import tune_host
from fedsim.peft import flops
from fedsim.randomness import stream
from fedsim.simulation import build, needs, trainers
from fedsim.simulation.build import Phase, Problem
from fedsim.simulation.rehearsal import rehearse
from fedsim.training.features import use_cache
from fedsim.units import duration, exact_size, size

SAMPLED_ROUNDS = 5  # cohorts drawn to know what an average round does


class PhaseEstimate(NamedTuple):
    """What one phase would do."""

    phase: Phase
    trained: int  # parameters
    frozen: int
    up: int  # bytes of one client in a round, the mean over the first cohort; see `rehearsal`
    down: int
    setup: int  # bytes, one client, once
    full: int  # bytes of one message of full fine-tuning
    steps: float  # local steps of a round, all clients together
    examples: float  # of a round
    devices: int
    lanes: int  # of each device
    occupancy: float  # of lanes
    row_occupancy: float
    flops: float  # of one example, forward and backward
    prefix_flops: float  # of one example through the cached stages, once; 0 without a cache
    cached: bool
    memory: dict[str, int]  # bytes by part, of each device


def dry_run(config: Config, speed: Speed, start: str = "") -> list[PhaseEstimate]:
    """Estimates every phase and prints plan, bytes, memory and time; before them `start`, what the options start from."""
    tune_host(speed)
    problem = build.problem(config, speed)
    found = [estimate(problem, phase) for phase in build.phases(config)]
    if start:
        print(start)
    print_estimate(problem, found, matmul_speed(speed.precision))
    return found


def estimate(problem: Problem, phase: Phase) -> PhaseEstimate:
    """One phase from its programs, which are compiled, the partition and drawn cohorts.

    Raises:
        ValueError: lanes that were asked for and do not fit into the memory.
    """
    config, dataset, parts = phase.config, problem.dataset, problem.partition
    passes = Passes(config.epochs, config.steps, config.batch_size)
    devices = problem.speed.devices or jax.local_device_count()
    cohorts = [
        stream(config.seed, f"sample {round}").choice(parts.clients, config.clients_per_round, replace=False)
        for round in range(1, SAMPLED_ROUNDS + 1)
    ]
    rehearsed = rehearse(problem, phase, cohorts[0])
    lanes, widths = rehearsed.lanes, rehearsed.widths
    weights = needs.weights(config)  # which the rehearsal has read, and downloaded before where they are the hub's
    model = peft.fitted_to(build.split_model(config, dataset, problem.speed), weights)
    plain = peft.fitted_to(build.split_model(config, dataset), weights)  # without what is computed twice to save memory
    cached = use_cache(problem.speed, model, dataset.x, config)
    plans = [
        plan.make(ids, parts.rows, parts.offsets, passes, config.seed, round, devices, lanes, widths=widths)
        for round, ids in enumerate(cohorts, 1)
    ]
    shape, dtype = trainers.example(problem)
    return PhaseEstimate(
        phase=phase,
        trained=_count(model.trained),
        frozen=_count(model.frozen),
        up=round(rehearsed.up),
        down=round(rehearsed.down),
        setup=rehearsed.setup,
        full=build.full_bytes(model),
        steps=float(np.mean([(p.count > 0).sum() for p in plans])),
        examples=float(np.mean([p.count.sum() for p in plans])),
        devices=devices,
        lanes=lanes,
        occupancy=float(np.mean([p.occupancy[0] for p in plans])),
        row_occupancy=float(np.mean([p.occupancy[1] for p in plans])),
        flops=flops.training_flops(plain, shape, dtype, cached=cached).total,
        prefix_flops=flops.forward_flops(plain, shape, dtype, stop=plain.cut) if cached else 0.0,
        cached=cached,
        memory={
            "backbone and examples": rehearsed.need.there,
            f"{lanes} lane{'s' * (lanes > 1)} with activations, batches, parameters and optimizers": int(
                rehearsed.need.lanes
            ),
        },
    )


def matmul_speed(precision: str = "float32") -> float:
    """FLOP/s of a matrix product in that precision on this device, the median of a few; takes a fraction of a second."""
    a, b = (
        draw(jax.random.key(0), {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)})["kernel"].astype(precision)
        for s in ((2048, 384), (384, 1536))
    )
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 384 * 1536 / float(np.median(times[1:]))


def print_estimate(problem: Problem, found: list[PhaseEstimate], flops_per_second: float) -> None:
    """Prints the estimate for people."""
    config = problem.config
    if jax.default_backend() != "cpu":  # host devices share what was measured, others have as much each
        flops_per_second *= found[0].devices
    print(
        f"{config.dataset}: {len(problem.dataset.train)} training, {len(problem.dataset.validation)} validation, "
        f"{len(problem.dataset.test)} test examples, {len(problem.dataset.classes)} classes; "
        f"{config.clients} clients of {problem.partition.sizes.min()} to {problem.partition.sizes.max()}."
    )
    held = holders(config, problem.dataset.train)
    if len(held.clients) < len(problem.dataset.train):
        print(f"The server holds {len(held.public)} of the training examples without labels, {len(held.shard)} with.")
    # Phases share what is cached: the deepest frozen prefix is computed once, the others on the way.
    once = len(problem.dataset.y) * max(e.prefix_flops for e in found) / flops_per_second
    total_bytes, total_seconds = 0.0, once
    for e in found:
        rounds = e.phase.last - e.phase.first + 1
        evaluations = rounds // config.eval_every + 1
        rows = rounds * e.examples / max(e.row_occupancy, 1e-9)
        # Evaluation needs the forward pass only, about a third of a training step.
        looked = evaluations * len(problem.dataset.validation) + len(problem.dataset.test) * (e is found[-1])
        seconds = (rows * e.flops + looked * e.flops / 3) / flops_per_second
        sent = rounds * config.clients_per_round * (e.up + e.down)
        total_bytes, total_seconds = total_bytes + sent, total_seconds + seconds
        print(f"\nrounds {e.phase.first} to {e.phase.last}: {e.phase.config.peft} on {config.backbone}")
        print(
            f"  trained      {e.trained:,} of {e.trained + e.frozen:,} parameters ({e.trained / (e.trained + e.frozen):.2%})"
        )
        print(
            f"  plan         {config.clients_per_round} clients, {e.steps:.0f} steps and {e.examples:.0f} examples a round; "
            f"{'' if e.devices == 1 else f'{e.devices} devices x '}{e.lanes} lanes {e.occupancy:.0%} full, rows {e.row_occupancy:.0%}"
        )
        print(
            f"  one client   up {exact_size(e.up)}, down {exact_size(e.down)} a round; full fine-tuning {exact_size(e.full)}"
        )
        print(f"  all rounds   {exact_size(sent)} both ways; once per client the backbone, {exact_size(e.setup)}")
        each = "" if e.devices == 1 else "each device: "
        print(f"  memory       {each}{', '.join(f'{name} {size(n)}' for name, n in e.memory.items())}")
        print(f"  time         about {duration(seconds)}{' from cached features' if e.cached else ''}")
    if once:
        print(f"\nfrozen layers, once per example: about {duration(once)}")
    print(
        f"\nin all {size(int(total_bytes))}, about {duration(total_seconds)} of arithmetic at the "
        f"{flops_per_second / 1e9:.0f} GFLOP/s that a matrix product reaches here now; compiling comes on top. "
        "Nothing was trained."
    )


def _count(shapes: dict[str, Any]) -> int:
    return sum(int(np.prod(s.shape, dtype=np.int64)) for s in shapes.values())
