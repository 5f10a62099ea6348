"""What an algorithm is made for: the model's pure functions and the config's training as a `Task`; the run's average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import backbones, peft
from fedsim.backbones import images
from fedsim.config import SMALLER, Config, metric_of
from fedsim.core import Average, Passes, Task
from fedsim.evaluation import language
from fedsim.evaluation.evaluate import classification_criterion, classification_score, loss_of
from fedsim.folds import by_examples, plain, uniform
from fedsim.simulation import private
from fedsim.training import augment
from fedsim.training.optimizers import optimizer, schedule


def task(config: Config, model: peft.Model, start: dict[str, np.ndarray], cached: bool, first: int = 1) -> Task:
    """What an algorithm is constructed for; `first` is the round in which it starts, for schedules over rounds."""
    apply, entry = (model.suffix, model.cut) if cached else (model.apply, 0)
    criterion, score = classification_criterion, classification_score
    classes, real = model.classes, None
    if config.task == "language_model":  # whose `y` is the partition's label, and nothing reads it
        pad = backbones.row(config.backbone).config.pad
        criterion, score, classes = language.criterion(pad), language.score(pad), 0
        real = language.real(pad)

    def read_by_head(held: Any, params: Any, x: Any) -> Any:
        h = model.run({**held, **params}, x, entry, model.stages - 1)
        return h["x"] if isinstance(h, Mapping) else h

    changed = augment.make(config.augment)
    server_rate = schedule(config.server_lr_schedule, "server_lr_schedule", config.server_lr)
    return Task(
        init=lambda key: {name: jnp.asarray(leaf) for name, leaf in start.items()},
        loss=private.loss(config, loss_of(criterion, apply, changed)),
        logits=lambda held, params, x: apply(params, held, x),
        criterion=criterion,
        score=score,
        optimizer=optimizer(config.optimizer, "optimizer"),
        lr=lambda client, message: client.lr,
        server_optimizer=optimizer(config.server_optimizer, "server_optimizer")(
            lambda count: server_rate(count + first - 1)
        ),
        passes=Passes(config.epochs, config.steps, config.batch_size),
        weight=weighting(config),
        trained=frozenset(model.trained),
        factors=peft.factors(model),
        features=read_by_head,
        blocks=lambda path: model.blocks[path],
        classes=classes,
        metric=metric_of(config),
        larger=metric_of(config) not in SMALLER,
        augment=changed,
        inputs=inputs(config, cached),
        real=real,
    )


def inputs(config: Config, cached: bool) -> Callable[[Any], Any] | None:
    """A task's `inputs`; None where each of several encoders, or a user's own backbone, has a scale of images for itself."""
    row = backbones.backbone(config.backbone)
    if cached:  # what frozen stages gave
        return lambda x: x
    if isinstance(row, backbones.Backbone) or row.encoders:
        return None
    pixels = getattr(row.config, "pixels", None)
    return (lambda x: x) if pixels is None else lambda x: images.normalised(x, pixels)


def weighting(config: Config) -> Callable[[Any, Any], jax.Array]:
    """Weight of a reply in the run's average; under privacy a number of examples would tell."""
    return by_examples if config.weighting == "examples" and config.dp == "none" else uniform


def average(config: Config, releases: int = 1) -> Average:
    """The run's fold of replies.

    Args:
        releases: exchanges of a round, which privacy accounts for.
    """
    return plain(weighting(config)) if config.dp == "none" else private.average(config, releases)
