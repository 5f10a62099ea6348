"""From options to values: the model, the task, the algorithm, the engine. What can be refused is refused here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim import algorithms, network, peft, wire
from fedsim.backbones import Backbone, backbone, load
from fedsim.config import OF_PEFT, Config, Data, Model, Speed, answering, groups_of, invited, metric_of, plan_fits
from fedsim.core import Algorithm, Task, draw
from fedsim.data import dataset as data_sets
from fedsim.data import partition as partitions
from fedsim.engine import processes
from fedsim.engine.host import divide_cpu
from fedsim.evaluation.metrics import require_classes
from fedsim.peft import precision
from fedsim.simulation import private, tasks
from fedsim.simulation.needs import learned, outside, packaged, tokenizer, vocabulary, weights
from fedsim.training import augment, lengths
from fedsim.training.features import use_cache
from fedsim.training.lengths import Lengths
from fedsim.training.optimizers import check_optimizer, check_schedule, optimizer

OF_VALUES = "a codec that acts on values: bfloat16, quantise(8), eden(4)"  # for codec_down
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
    trainers: dict[Any, Any] | None = None  # kept for runs that differ in `FREE` alone; None: each makes its own


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
        if (speed.devices or 1) > (available := jax.local_device_count()):
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
    if weights(config) is None and not isinstance(row, Backbone):
        for name, asset in packaged(row).items():
            if asset is None:
                load.packaged(name or config.backbone, None)  # refuses, and says what can be given
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
    check_feedback(config)
    check_everybody(config)
    optimizer(config.optimizer, "optimizer")
    optimizer(config.server_optimizer, "server_optimizer")
    check_schedule(config.lr_schedule, "lr_schedule", config.lr, config.rounds)
    check_schedule(config.server_lr_schedule, "server_lr_schedule", config.server_lr, config.rounds)
    private.check(config)
    if row.kind == "text":
        for phase in phases(config):
            peft.from_config(phase.config, classes=2, input_shape=(config.tokens,))
    return algorithms.find(config.algorithm)


def check_feedback(config: Config) -> None:
    """Refuses a codec that remembers where clients are not met again.

    Raises:
        ValueError: names what is lost, and what keeps nothing.
    """
    codec, visits = wire.codec(config.codec_up), config.rounds * config.clients_per_round
    if codec is not None and codec.remembers and visits <= config.clients:
        raise ValueError(
            f"Expected rounds={config.rounds} x clients_per_round={config.clients_per_round} > clients={config.clients} for "
            f"codec_up={config.codec_up!r}: what a client does not send it keeps until it is met again, and here it is met once on "
            "average, so that most is lost. Raise rounds, or choose a codec that keeps nothing: topk(..., feedback=False), "
            "randomk(...), eden(2)."
        )


def check_everybody(config: Config) -> None:
    """Refuses a codec of messages that sends what has changed where a client may miss a message, and has no copy to add to.

    With `over_selection` a round invites more than there are, which is refused before.

    Raises:
        ValueError: names the option that lets it miss one.
    """
    if wire.of_changes(wire.codec(config.codec_down, "codec_down")) is None:
        return
    every = config.clients
    rules = {
        "clients_per_round": (
            config.clients_per_round == every,
            f"to be clients={every}",
            f"Give clients_per_round={every}",
        ),
        "availability": (config.availability == "always", "to be 'always'", "Leave it out"),
        "dropout": (config.dropout == 0, "to be 0", "Leave it out"),
        "deadline": (config.deadline is None, "to be None", "Leave it out"),
        "sampling": (config.dp != "central" or config.sampling == "fixed", "to be 'fixed'", "Give sampling=fixed"),
        "groups": (not config.groups, "to be empty", "Leave it out"),
    }
    for name, (holds, rule, remedy) in rules.items():
        if not holds:
            raise ValueError(
                f"Expected {name}={getattr(config, name)!r} {rule} with codec_down={config.codec_down!r}, which sends what has "
                "changed since the message before: a client that misses one has nothing to add to. "
                f"{remedy}, or choose {OF_VALUES}."
            )


def refuse_missing(config: Config, algorithm: Algorithm) -> None:
    """As `check_everybody`, of an algorithm that selects clients by itself.

    Raises:
        ValueError: names the algorithm.
    """
    check_everybody(config)
    if wire.of_changes(wire.codec(config.codec_down, "codec_down")) is not None and algorithm.select is not draw:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} not to select clients by itself with codec_down={config.codec_down!r}, "
            "which sends what has changed since the message before: all clients must get every message. Choose another, or "
            f"{OF_VALUES}."
        )


def kind(config: Config) -> str:
    """What the config's backbone reads: text, image or array.

    Raises:
        ValueError: an unknown backbone.
    """
    return backbone(config.backbone).kind


def most_of_cpu() -> int:
    """The most devices into which a CPU is divided: each compiles and holds its own, so more than its cores gain nothing."""
    return max(MOST_OF_CPU, os.cpu_count() or 1)


def problem(
    config: Config, speed: Speed, given: data_sets.Source | None = None, like: Problem | None = None
) -> Problem:
    """Reads the data, or takes what is given for `dataset="arrays"`, and spreads it over the clients.

    Args:
        like: a problem of before, from the same files: what both have in common is taken from it. That are the data set where
            the same examples are read and divided alike; else the examples, if they are equal, and in both cases the outputs
            of frozen stages, if the frozen weights are the same.

    Raises:
        ValueError: data that cannot be used, named by file and row.
    """
    from fedsim import data

    words = given is None or isinstance(given.x, list)  # arrays of token ids need no tokenizer
    alike = like is not None and read_by(config) == read_by(like.config)
    dataset = like.dataset if like is not None and alike else data.load(
        config,
        tokenizer(config) if words else None,
        given,
        backbone=config.backbone,
        vocabulary=vocabulary(config),
        learn=learned(config),
        taught=config.task == "classification",
        outside=outside(config),
    )  # fmt: skip
    cache: dict[tuple[str, int], Any] = {}
    if (
        like is not None
        and (alike or same_examples(dataset, like.dataset))
        and frozen_by(config) == frozen_by(like.config)
    ):
        dataset, cache = dataset._replace(x=like.dataset.x), like.cache
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
    models = [split_model(answering(phase.config), dataset, speed) for phase in phases(config)]
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
        made = private.guarded(config, algorithms.find(config.algorithm)(whole._replace(groups=sides)))
        refuse_groups(config, made)
        refuse_missing(config, made)
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
    kept = None if like is None else like.trainers
    return Problem(config, speed, dataset, trained, tuple(cuts), cache, texts, local_test, kept)


# Options of `Data` that spread examples which are read and divided already.
SPREAD = ("clients", "partition", "alpha", "classes_per_client", "size_law", "min_size", "local_test")
SPREAD += ("public_share", "server_share")


def read_by(config: Config) -> tuple[Any, ...]:
    """The options on which the data set depends, and last the seed, by which it is divided into train, validation and test."""
    names = (f.name for f in dataclasses.fields(Data) if f.name not in (*SPREAD, "seed"))
    return tuple(getattr(config, name) for name in (*names, "backbone", "weights", "task", "groups", "seed"))


def frozen_by(config: Config) -> tuple[Any, ...]:
    """The options on which the outputs of frozen stages depend; random weights are drawn by the seed."""
    names = (f.name for f in dataclasses.fields(Model) if f.name not in (*OF_PEFT, "peft", "head_rounds"))
    drawn = config.seed if weights(config) == "random" else None
    return (*(getattr(config, name) for name in names), config.task, config.groups, drawn)


def same_examples(a: data_sets.Dataset, b: data_sets.Dataset) -> bool:
    """Whether two sets have the same inputs in the same order, however they are divided."""
    mine, theirs = jax.tree.leaves(a.x), jax.tree.leaves(b.x)
    return len(mine) == len(theirs) and all(
        x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(mine, theirs, strict=True)
    )


def refuse_groups(config: Config, algorithm: Algorithm) -> None:
    """Raises `ValueError` for several architectures where the algorithm trains one, or the other way round."""
    if algorithm.groups != bool(config.groups):
        what = "several architectures: describe them by --groups" if algorithm.groups else "one: leave out --groups"
        raise ValueError(f"Expected groups={config.groups} to fit algorithm={config.algorithm!r}, which trains {what}.")


def split_model(config: Config, dataset: data_sets.Dataset, speed: Speed | None = None) -> peft.Model:
    """The backbone split by the config's PEFT kind, for the data set's inputs and classes; shapes only.

    Args:
        speed: its precision and rematerialisation are those in which the model is computed (default: plain float32).
    """
    x, speed = jax.tree.leaves(dataset.x)[0], speed or Speed()
    model = peft.from_config(config, len(dataset.classes), x.shape[1:], x.dtype)
    return precision.computed(model, speed.precision, speed.remat)


def full_bytes(model: peft.Model) -> int:
    """Bytes of one message of full fine-tuning: all parameters of the backbone and the head, as float32."""
    return sum(wire.price(peft.parameters(model)).values())
