"""One phase, ready to run: its models with their weights, its algorithm, and the engines that hold what it trains on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim import algorithms, peft, wire
from fedsim.config import Config, answering, groups_of
from fedsim.core import Algorithm, Average, Task
from fedsim.data import partition as partitions
from fedsim.engine import processes
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import Asked, evaluator
from fedsim.peft import flops, precision
from fedsim.simulation import groups, private, tasks
from fedsim.simulation.build import Phase, Problem, split_model
from fedsim.simulation.needs import weights
from fedsim.training import lengths
from fedsim.training.features import run_stages, use_cache
from fedsim.training.lengths import Lengths
from fedsim.training.optimizers import schedule

# Options that no compiled program of a phase depends on.
FREE = ("lr", "lr_schedule", "head_lr", "head_rounds", "rounds", "clients_per_round", "eval_every", "target")
FREE += ("patience",)


class Trainer(NamedTuple):
    """One phase, ready to run."""

    config: Config  # the phase's own
    model: peft.Model
    task: Task
    algorithm: Algorithm
    average: Average
    engine: Lanes
    validate: Callable[[Any], dict[str, float]]  # server -> its scores, by name
    test: Callable[[Any], dict[str, float]]
    lr: Callable[[int], float]  # round, from 1 -> the clients' learning rate
    start: dict[str, np.ndarray]  # the trained part before the first round
    cached: bool
    groups: Mapping[str, Lanes] = {}  # of several architectures each one's engine
    members: Mapping[str, np.ndarray] = {}  # and its clients
    frozen: Mapping[str, Any] = {}  # and the shapes of its frozen part
    privacy: private.Spending | None = None  # what the run spends


def features(problem: Problem, model: peft.Model, frozen: dict[str, np.ndarray]) -> Any:
    """The input of the first trained stage for every example, from the deepest cached one below it; (N, ...) arrays.

    Computed once per example instead of once per epoch, client and round; exact, since nothing below is trained.
    """
    kind, cache = problem.speed.precision, problem.cache
    for cut in (*(c for c in problem.cuts if c < model.cut), model.cut):
        if (kind, cut) in cache:
            continue
        below = max((c for k, c in cache if k == kind and c < cut), default=0)
        x = cache.get((kind, below), problem.dataset.x)
        devices = processes.devices(problem.speed.devices)
        cache[kind, cut] = run_stages(model, frozen, x, below, cut, problem.texts, devices)
    return cache[kind, model.cut]


class Side(NamedTuple):
    """One architecture of a phase: its model, and what lies on the devices for it."""

    config: Config
    model: peft.Model
    task: Task
    start: dict[str, np.ndarray]  # the trained part before the first round
    frozen: dict[str, np.ndarray]
    cached: bool
    texts: Lengths | None  # of the examples as they enter


def side(problem: Problem, config: Config, first: int, overlay: dict[str, np.ndarray]) -> Side:
    """Loads the weights of one architecture and makes its task; see `trainer`."""
    speed, dataset = problem.speed, problem.dataset
    model = split_model(config, dataset, speed)
    trained, frozen = peft.start(model, weights(config), config.seed)
    model = peft.fitted(model, trained, frozen)  # a checkpoint of another resolution has a grid of its own
    trained |= {name: value for name, value in overlay.items() if name in trained}
    cached = not problem.config.groups and use_cache(speed, model, dataset.x, config)  # groups share their examples
    texts = lengths.entering(problem.texts, model, model.cut if cached else 0)
    return Side(config, model, tasks.task(config, model, trained, cached, first), trained, frozen, cached, texts)


def trainer(problem: Problem, phase: Phase, overlay: dict[str, np.ndarray] | None = None) -> Trainer:
    """Loads the weights, caches what is frozen, constructs the algorithm and the engine of one phase.

    Args:
        overlay: trained values from the phase before, by path; they replace fresh ones.

    Raises:
        ValueError: weights that do not fit the backbone, or a PEFT kind that does not fit it.
    """
    config, speed, dataset = phase.config, problem.speed, problem.dataset
    rate = schedule(config.lr_schedule, "lr_schedule", config.lr)

    def lr(round: int) -> float:
        return float(rate(round - 1))

    key = (shared_key(config), speed, phase.first, digest(overlay or {}))
    if problem.trainers is not None and key in problem.trainers:
        return with_privacy(problem.trainers[key]._replace(lr=lr, config=config))
    sides = {group.name: side(problem, group.config, phase.first, {}) for group in groups_of(config)}
    main = next((s for s in sides.values() if s.config == answering(config)), None) or side(
        problem, config, phase.first, overlay or {}
    )
    algorithm = algorithms.find(config.algorithm)(main.task._replace(groups={n: s.task for n, s in sides.items()}))
    algorithm = private.guarded(config, algorithm)
    engines = {name: engine(problem, one, algorithm, name) for name, one in sides.items()}
    if engines:  # examples and frozen parts once on each device, whatever the number of groups
        whole = {name: one.held for name, one in engines.items()}
        shared = next(iter(engines.values()))
        on_all = engine(problem, main._replace(frozen=whole), algorithm, placed=shared)
        for one in engines.values():
            one.public, one.shard = on_all.public, on_all.shard
    else:
        on_all = engine(problem, main, algorithm)
    asked = Asked(main.task.score, main.task.classes > 0)
    made = Trainer(
        config=config,
        model=main.model,
        task=main.task,
        algorithm=algorithm,
        average=tasks.average(config, algorithm.releases),
        engine=on_all,
        validate=evaluator(on_all, algorithm.predict, dataset.validation, speed.eval_batch, main.texts, asked),
        test=evaluator(on_all, algorithm.predict, dataset.test, speed.eval_batch, main.texts, asked),
        lr=lr,
        start=main.start,
        cached=main.cached,
        groups=engines,
        members=groups.members(config, problem.partition.clients) if engines else {},
        frozen={name: one.model.frozen for name, one in sides.items()},
    )
    if problem.trainers is not None:
        problem.trainers[key] = made
    return with_privacy(made)


def with_privacy(made: Trainer) -> Trainer:
    """The trainer with what its run spends, and with the average whose noise follows from its rounds and its cohort."""
    spending = private.spending(made.config, made.algorithm.releases)
    if spending is None:
        return made
    return made._replace(privacy=spending, average=tasks.average(made.config, made.algorithm.releases))


def engine(problem: Problem, side: Side, algorithm: Algorithm, group: str = "", placed: Lanes | None = None) -> Lanes:
    """The engine of one architecture.

    Args:
        placed: one whose examples lie on the devices already.
    """
    config, speed, frozen = side.config, problem.speed, side.frozen
    if speed.precision != "float32" and placed is None:
        frozen = precision.held(frozen, speed.precision, written(algorithm, frozen) if not group else set())
    x: Any = problem.dataset.x if placed is None else placed.x
    if side.cached:
        x = features(problem, side.model, frozen)
        frozen = {name: leaf for name, leaf in frozen.items() if name not in side.model.below}
    elif side.texts is not None and placed is None:
        x = side.texts.cut(x, side.texts.longest)
    _, public, shard = partitions.held_apart(config, problem.dataset.train, problem.partition)
    return Lanes(
        frozen,
        x,
        problem.dataset.y if placed is None else placed.labels,
        problem.partition.rows,
        problem.partition.offsets,
        seed=config.seed,
        lanes=speed.lanes,
        devices=speed.devices,
        parallel=speed.parallel,
        segment_steps=speed.segment_steps,
        resident=speed.resident,
        up=private.up(config, algorithm.releases),
        down=wire.codec(config.codec_down, "codec_down"),
        group=group,
        public=None if group else public,  # of groups all take those of the engine that stands for them
        shard=None if group else shard,
    )


def example_flops(problem: Problem, trainer: Trainer) -> flops.Flops:
    """What one example costs in a training step of this phase, counted by `flops.training_flops`; traces, computes nothing."""
    return flops.training_flops(trainer.model, *example(problem), cached=trainer.cached)


def example(problem: Problem) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of one input as training reads it: texts are cut to the longest."""
    x = jax.tree.leaves(problem.dataset.x)[0]
    return x.shape[1:] if problem.texts is None else (problem.texts.longest,), x.dtype


def setup_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes that a client is given once, before its first round, by group; "" where there is one architecture."""
    return {
        name: sum(wire.price(jax.eval_shape(trainer.algorithm.setup, frozen)).values())
        for name, frozen in (trainer.frozen or {"": trainer.model.frozen}).items()
    }


def written(algorithm: Algorithm, frozen: Mapping[str, Any]) -> set[str]:
    """The frozen leaves that the algorithm writes into, as FLoRA does: it exports newer values of them."""
    exported = jax.eval_shape(lambda key, held: algorithm.params(algorithm.init(key, held)), jax.random.key(0), frozen)
    return set(exported) & set(frozen)


def shared_key(config: Config) -> tuple[tuple[str, Any], ...]:
    """The options of a phase that its programs depend on."""
    # Local and example-level noise, which follows from the rounds, is in the programs.
    free = FREE if config.dp in ("none", "central") else ()
    return tuple((f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in free)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of names and values."""
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()
