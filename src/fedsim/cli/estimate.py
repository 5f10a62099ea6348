"""`fedsim run --dry-run`: what a run would do, send and need. Reads the data, compiles the programs, trains nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import peft
from fedsim.backbones.load import draw
from fedsim.config import Config, Speed, answering, groups_of, scored
from fedsim.core import Passes
from fedsim.data.partition import holders
from fedsim.engine import plan
from fedsim.engine.host import tune_host
from fedsim.peft import flops
from fedsim.simulation import build, needs, prices, private, trainers
from fedsim.simulation.build import Phase, Problem
from fedsim.simulation.rehearsal import Rehearsal, rehearse
from fedsim.training.features import use_cache
from fedsim.units import duration, exact_size, size

SAMPLED_ROUNDS = 5  # cohorts drawn to know what an average round does


class PhaseEstimate(NamedTuple):
    """What one phase would do."""

    phase: Phase
    trained: int  # parameters; of several architectures of the one that is scored, as `frozen`, `full` and `forward`
    frozen: int
    members: int  # of a cohort
    up: prices.Each  # bytes of a round, of the first cohort where it meets for the second time
    down: prices.Each
    setup: int  # bytes, one client, once
    full: int  # bytes of one message of full fine-tuning
    steps: float  # local steps of a round, all clients together
    examples: float  # of a round
    devices: int
    lanes: dict[str, int]  # of each device, by group
    occupancy: float  # of lanes
    row_occupancy: float
    flops: float  # of one example of a round's plan, all that the algorithm's clients do with it
    forward: float  # of one example in evaluation
    prefix_flops: float  # of one example through the cached stages, once; 0 without a cache
    cached: bool
    memory: dict[str, int]  # bytes by part, of each device
    privacy: str = ""  # noise multiplier and epsilon; empty without


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
    devices = problem.speed.devices or jax.local_device_count()
    unread = prices.models_of(config, lambda one: build.split_model(one, dataset))
    algorithm = prices.made(phase, unread, {})
    first = range(phase.first, phase.first + SAMPLED_ROUNDS)
    drawn = [prices.cohorts(config, algorithm, round, parts.clients) for round in first]
    cohorts = [{name: ids[ids >= 0] for name, ids in each.items()} for each in drawn]
    rehearsed = rehearse(problem, phase, cohorts[0] if config.groups else cohorts[0][""])
    weights = needs.weights  # which the rehearsal has read, and downloaded before where they are the hub's
    models = prices.models_of(
        config, lambda one: peft.fitted_to(build.split_model(one, dataset, problem.speed), weights(one))
    )
    main = answering(config)
    # Without what is computed twice to save memory.
    plain = peft.fitted_to(build.split_model(main, dataset), weights(main))
    model = prices.scored_of(config, models)
    cached = not config.groups and use_cache(problem.speed, model, dataset.x, config)
    passes = Passes(config.epochs, config.steps, config.batch_size)
    plans = [
        [
            plan.make(
                ids, parts.rows, parts.offsets, passes, config.seed, round, devices, rehearsed.lanes[name],
                widths=rehearsed.widths[name],
            )
            for name, ids in each.items()
            if name in rehearsed.widths
        ]
        for round, each in zip(first, cohorts, strict=True)
    ]  # fmt: skip
    shape, dtype = trainers.example(problem)
    members = sum(map(len, cohorts[0].values()))
    up, down = sent(problem, phase, models, rehearsed, members)
    seen, spent = sum(p.examples for p in plans[0]), private.spending(config, algorithm.releases)
    return PhaseEstimate(
        phase=phase,
        trained=_count(model.trained),
        frozen=_count(model.frozen),
        members=members,
        up=up,
        down=down,
        setup=rehearsed.setup,
        full=build.full_bytes(model),
        steps=float(np.mean([sum((p.count > 0).sum() for p in each) for each in plans])),
        examples=float(np.mean([sum(p.count.sum() for p in each) for each in plans])),
        devices=devices,
        lanes=rehearsed.lanes,
        occupancy=float(np.mean([share([((p.count > 0).sum(), p.occupancy[0]) for p in each]) for each in plans])),
        row_occupancy=float(np.mean([share([(p.count.sum(), p.occupancy[1]) for p in each]) for each in plans])),
        flops=rehearsed.flops / seen if seen else flops.training_flops(plain, shape, dtype, cached=cached).total,
        forward=flops.forward_flops(plain, shape, dtype, start=plain.cut if cached else 0),
        prefix_flops=flops.forward_flops(plain, shape, dtype, stop=plain.cut) if cached else 0.0,
        cached=cached,
        privacy=private.promise(spent, problem.config) if spent else "",
        memory={
            "backbone and examples": rehearsed.need.there,
            f"{lanes_of(rehearsed.lanes)} with activations, batches, parameters and optimizers": int(
                rehearsed.need.lanes
            ),
        },
    )


def share(parts: Sequence[tuple[float, float]]) -> float:
    """The share of all places that is taken, of plans that follow one another: (taken, share of its own places) each."""
    taken = sum(count for count, _ in parts)
    return float(taken / sum(count / max(of, 1e-9) for count, of in parts)) if taken else 0.0


def lanes_of(lanes: dict[str, int]) -> str:
    """How many lanes, in words; of groups each one's."""
    most = max(lanes.values())
    return f"{' or '.join(map(str, dict.fromkeys(lanes.values())))} lane{'s' * (most > 1)}"


def sent(
    problem: Problem, phase: Phase, models: prices.Models, rehearsed: Rehearsal, members: int
) -> tuple[prices.Each, prices.Each]:
    """Bytes of a round, up and down; of an algorithm that cannot be priced by shapes what the rehearsal has seen."""
    held = holders(phase.config, problem.dataset.train)
    shape, dtype = trainers.example(problem)
    try:
        found = prices.of_phase(
            phase,
            models,
            jax.ShapeDtypeStruct(shape, dtype),
            problem.partition.sizes,
            (len(held.public), len(held.shard)),
        )
    except ValueError:
        means = (rehearsed.up, rehearsed.down)
        up, down = (prices.Each(n, round(n), round(n), round(n * members), "about") for n in means)
        return up, down
    return found.up, found.down


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
        looked = evaluations * len(problem.dataset.validation) + len(problem.dataset.test) * (e is found[-1])
        seconds = (rows * e.flops + looked * e.forward) / flops_per_second
        nbytes = e.up.over(rounds) + e.down.over(rounds)
        total_bytes, total_seconds = total_bytes + nbytes, total_seconds + seconds
        print(f"\nrounds {e.phase.first} to {e.phase.last}: {' and '.join(said(e.phase.config))}")
        whose = f" of {scored(config)!r}" if config.groups else ""
        print(
            f"  trained      {e.trained:,} of {e.trained + e.frozen:,} parameters ({e.trained / (e.trained + e.frozen):.2%}){whose}"
        )
        print(
            f"  plan         {e.members} clients, {e.steps:.0f} steps and {e.examples:.0f} examples a round; "
            f"{'' if e.devices == 1 else f'{e.devices} devices x '}{lanes_of(e.lanes)} {e.occupancy:.0%} full, "
            f"rows {e.row_occupancy:.0%}"
        )
        print(f"  one client   up {e.up.words()}, down {e.down.words()} a round; full fine-tuning {exact_size(e.full)}")
        certainty = next((f"{way.certainty} " for way in (e.up, e.down) if way.certainty != "exact"), "")
        print(
            f"  all rounds   {certainty}{exact_size(nbytes)} both ways; once per client the backbone, {exact_size(e.setup)}"
        )
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
    if found[-1].privacy:
        print("\n".join([found[-1].privacy, *private.doubts(config, len(problem.partition.rows))]))


def said(config: Config) -> list[str]:
    """What of which backbone is trained; of several architectures each group's, and its share of the clients."""
    groups = [f"{g.name}: {g.config.peft} on {g.config.backbone} ({share_of(g.share)})" for g in groups_of(config)]
    return groups or [f"{config.peft} on {config.backbone}"]


def share_of(share: float | None) -> str:
    """A group's share of the clients, in words."""
    return "the server's" if share is None else f"{share:.0%} of the clients"


def _count(shapes: dict[str, Any]) -> int:
    return sum(int(np.prod(s.shape, dtype=np.int64)) for s in shapes.values())
