"""From options to values: the model, the task, the algorithm, the engine. What can be refused is refused here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim import algorithms, network, peft, wire
from fedsim.backbones import Backbone, backbone, load
from fedsim.config import Config, Speed, answering, groups_of, invited, metric_of, plan_fits
from fedsim.core import Algorithm, Average, Task
from fedsim.data import dataset as data_sets
from fedsim.data import partition as partitions
from fedsim.engine import processes
from fedsim.engine.host import divide_cpu
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import Asked, evaluator
from fedsim.evaluation.metrics import require_classes
from fedsim.peft import flops, precision
from fedsim.simulation import groups, tasks
from fedsim.simulation.needs import learned, tokenizer, vocabulary, weights
from fedsim.training import augment, lengths
from fedsim.training.features import run_stages, use_cache
from fedsim.training.lengths import Lengths
from fedsim.training.optimizers import check_optimizer, check_schedule, optimizer, schedule

# Options that no compiled program of a phase depends on.
FREE = ("lr", "lr_schedule", "head_lr", "head_rounds", "rounds", "clients_per_round", "eval_every", "target")
FREE += ("patience",)

MOST_OF_CPU = 8  # devices that a CPU of fewer cores may still show, to try what several devices do


class Phase(NamedTuple):
    """A stretch of rounds with one trained part: `first`..`last`, both included."""

    name: str  # "head" or "peft"
    config: Config
    first: int
    last: int


class Problem(NamedTuple):
    """What all phases share: the data, who owns it, and the outputs of frozen stages computed so far."""

    config: Config
    speed: Speed
    dataset: data_sets.Dataset
    partition: partitions.Partition  # what the clients train on
    cuts: tuple[int, ...]  # stages whose input is worth caching, ascending
    cache: dict[tuple[str, int], Any]  # (precision, stage) -> its input for every example, host arrays (N, ...)
    texts: Lengths | None = None  # of the examples, where they are texts whose padding is known
    local_test: partitions.Partition | None = None  # clients' own test sets, aligned with `partition`; None without
    trainers: dict[Any, Trainer] | None = None  # kept for runs that differ in `FREE` alone; None: each makes its own


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


def phases(config: Config) -> list[Phase]:
    """The head alone for `head_rounds`, then the PEFT part with the head."""
    head = config.replace(peft="head", head_rounds=0, lr=config.head_lr or config.lr)
    if config.peft == "head" or config.head_rounds == 0:
        alone = config.peft == "head"
        return [Phase("head", head, 1, config.rounds) if alone else Phase("peft", config, 1, config.rounds)]
    return [
        Phase("head", head, 1, config.head_rounds),
        Phase("peft", config, config.head_rounds + 1, config.rounds),
    ]


def phase_at(config: Config, round: int) -> Phase:
    """The phase that a round belongs to."""
    return next(phase for phase in phases(config) if phase.first <= round <= phase.last)


def fleet(config: Config) -> network.Fleet:
    """The clients that the config describes; reads the network's files.

    Raises:
        ValueError: see `network.fleet`.
    """
    return network.fleet(
        config,
        clients=config.clients,
        rounds=config.rounds,
        wanted=config.clients_per_round,
        seed=config.seed,
    )


def check(config: Config, speed: Speed | None = None) -> Callable[[Task], Algorithm]:
    """Refuses unknown optimizers, schedules, laws, algorithms, backbones, PEFT kinds before any data is touched.

    Returns:
        The algorithm's constructor.

    Raises:
        ValueError: names the option, its value, the rule and the remedy.
    """
    if speed is not None:  # a CPU is divided into a few devices; of other kinds there are as many as there are
        divide_cpu(speed.devices if (speed.devices or 1) <= most_of_cpu() else None)
    available = jax.local_device_count()
    if speed is not None and (speed.devices or 1) > available:
        raise ValueError(
            f"Expected devices={speed.devices} <= {available}, the devices that JAX sees; lower --devices (a CPU is "
            "divided before JAX computes for the first time, later it is too late)."
        )
    if speed is not None and speed.parallel == "pmap" and processes.several():
        raise ValueError(
            f"Expected parallel={speed.parallel!r} to be shard_map with {jax.process_count()} processes; leave it out."
        )
    fleet(config)
    for group in groups_of(config):
        check(group.config)
    row = backbone(config.backbone, image_size=config.image_size, interpolation=config.interpolation, task=config.task)
    if weights(config) is None and row.asset is None and not isinstance(row, Backbone):
        load.packaged(config.backbone, None)  # refuses, and says what can be given
    peft.parse(config.peft)
    augment.make(config.augment)
    if config.augment and row.kind == "text":
        raise ValueError(
            f"Expected augment={config.augment} to be empty for backbone={config.backbone!r}; it reads texts: leave it out."
        )
    if config.augment and speed is not None and speed.cache == "on":
        raise ValueError(
            f"Expected cache=on without augment={config.augment}: a changed image has other features in every step; leave "
            "out --cache."
        )
    for name in ("codec_up", "codec_down"):
        wire.codec(getattr(config, name), name)
    optimizer(config.optimizer, "optimizer")
    optimizer(config.server_optimizer, "server_optimizer")
    check_schedule(config.lr_schedule, "lr_schedule", config.lr, config.rounds)
    check_schedule(config.server_lr_schedule, "server_lr_schedule", config.server_lr, config.rounds)
    if row.kind == "text":
        for phase in phases(config):
            peft.from_config(phase.config, classes=2, input_shape=(config.tokens,))
    return algorithms.find(config.algorithm)


def kind(config: Config) -> str:
    """What the config's backbone reads: text, image or array.

    Raises:
        ValueError: an unknown backbone.
    """
    return backbone(config.backbone).kind


def most_of_cpu() -> int:
    """The most devices into which a CPU is divided: each compiles and holds its own, so more than its cores gain nothing."""
    return max(MOST_OF_CPU, os.cpu_count() or 1)


def problem(config: Config, speed: Speed, given: data_sets.Source | None = None) -> Problem:
    """Reads the data, or takes what is given for `dataset="arrays"`, and spreads it over the clients.

    Raises:
        ValueError: data that cannot be used, named by file and row.
    """
    from fedsim import data

    words = given is None or isinstance(given.x, list)  # arrays of token ids need no tokenizer
    dataset = data.load(
        config,
        tokenizer(config) if words else None,
        given,
        backbone=config.backbone,
        vocabulary=vocabulary(config),
        learn=learned(config),
        taught=config.task == "classification",
    )
    if config.task == "classification":
        require_classes(metric_of(config), len(dataset.classes))
    row = backbone(config.backbone)
    if row.kind == "text" and dataset.kind != "text":
        raise ValueError(
            f"Expected dataset={config.dataset!r} to hold text for backbone={config.backbone!r}, not {dataset.kind}; "
            "choose another backbone, such as mlp."
        )
    for group in groups_of(config):
        kind_of = backbone(group.config.backbone).kind
        if kind_of != row.kind and "array" not in (kind_of, row.kind):
            raise ValueError(
                f"Expected group {group.name!r} to read what backbone={config.backbone!r} reads, {row.kind}, not {kind_of}: all "
                "groups have the same examples; choose another backbone for one of them."
            )
    if config.augment and dataset.kind != "image":
        raise ValueError(
            f"Expected dataset={config.dataset!r} to hold images for augment={config.augment}, not {dataset.kind}; leave it "
            "out."
        )
    trained, local_test = partitions.split_local(partitions.make(config, dataset), config.local_test)
    if config.steps is None and len(trained.sizes):  # the largest cohort that can be drawn
        largest = np.partition(trained.sizes, -min(invited(config), trained.clients))[-invited(config) :]
        most = int(-(-largest // config.batch_size).sum())
        plan_fits(1, config.epochs * most, config.batch_size, "epochs x batches")
    models = [split_model(phase.config, dataset, speed) for phase in phases(config)]
    for phase, model in zip(phases(config), models, strict=True):  # an algorithm that cannot run refuses here
        for name in ("optimizer", "server_optimizer"):
            check_optimizer(getattr(config, name), name, model.trained)
        sides = {
            group.name: tasks.task(group.config, split_model(group.config, dataset, speed), {}, cached=False)
            for group in groups_of(phase.config)
        }
        whole = tasks.task(
            answering(phase.config), split_model(answering(phase.config), dataset, speed), {}, cached=False
        )
        made = algorithms.find(config.algorithm)(whole._replace(groups=sides))
        if made.groups != bool(sides):
            what = "several architectures: describe them by --groups" if made.groups else "one: leave out --groups"
            raise ValueError(
                f"Expected groups={config.groups} to fit algorithm={config.algorithm!r}, which trains {what}."
            )
        if sides and made.answers == "client":
            raise ValueError(
                f"Expected algorithm={config.algorithm!r} to answer by its server with groups; leave out --groups."
            )
        if made.answers == "client" and local_test is None:
            raise ValueError(
                f"Expected local_test={config.local_test} > 0 for algorithm={config.algorithm!r}, whose clients' own models answer; "
                "give --local-test 0.2."
            )
        if config.patience is not None and made.finished is not Algorithm._field_defaults["finished"]:
            raise ValueError(
                f"Expected no patience={config.patience} for algorithm={config.algorithm!r}, which has stages and ends by itself; "
                "a stage may look worse before it is better: leave out --patience."
            )
    cuts = sorted({model.cut for model in models if use_cache(speed, model, dataset.x, config)})
    pad = getattr(row, "pad", None)  # unknown of a user's own backbone
    texts = None
    if dataset.kind == "text" and pad is not None and speed.length_buckets > 1:
        texts = lengths.measure(dataset.x, pad, speed.length_buckets)
    return Problem(config, speed, dataset, trained, tuple(cuts), {}, texts, local_test)


def split_model(config: Config, dataset: data_sets.Dataset, speed: Speed | None = None) -> peft.Model:
    """The backbone split by the config's PEFT kind, for the data set's inputs and classes; shapes only.

    Args:
        speed: its precision and rematerialisation are those in which the model is computed (default: plain float32).
    """
    x, speed = jax.tree.leaves(dataset.x)[0], speed or Speed()
    model = peft.from_config(config, len(dataset.classes), x.shape[1:], x.dtype)
    return precision.computed(model, speed.precision, speed.remat)


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
        return problem.trainers[key]._replace(lr=lr, config=config)
    sides = {group.name: side(problem, group.config, phase.first, {}) for group in groups_of(config)}
    main = next((s for s in sides.values() if s.config == answering(config)), None) or side(
        problem, config, phase.first, overlay or {}
    )
    algorithm = algorithms.find(config.algorithm)(main.task._replace(groups={n: s.task for n, s in sides.items()}))
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
        average=tasks.average(config),
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
    return made


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
        up=wire.codec(config.codec_up, "codec_up"),
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
    return tuple((f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in FREE)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of names and values."""
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def full_bytes(model: peft.Model) -> int:
    """Bytes of one message of full fine-tuning: all parameters of the backbone and the head, as float32."""
    return sum(wire.price(peft.parameters(model)).values())
