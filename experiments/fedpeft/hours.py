"""Accelerator-hours that an experiment would take, from counted FLOPs: shapes alone, no weights, no data.

    hours = FLOPs / (UTILISATION * PEAK) / 3600
    FLOPs = rounds * examples a round * F_train + evaluations * validation examples * F + test examples * F

An example in training costs its forward pass, the gradients of activations down to the first trained leaf, and the
gradients of trained weights; `fedsim.peft.flops` counts all three. A head alone costs F once for every example (its features
are kept), then next to nothing.
The peak and the share of it that a run reaches are assumptions: say better ones where you know them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from rows import header
from running import Experiment, method_config

from fedsim import peft
from fedsim.config import Config
from fedsim.peft.flops import forward_flops, training_flops
from fedsim.simulation import build

DEVICE, PEAK, UTILISATION = "A100", 312e12, 0.30  # bfloat16 without sparsity, NVIDIA's data sheet; the share is assumed


class Facts(NamedTuple):
    """Examples and shape of a set, for what needs no data."""

    train: int
    validation: int
    test: int
    classes: int
    shape: tuple[int, ...]


class Flops(NamedTuple):
    """Of one example."""

    forward: float
    """From the inputs to the logits."""
    train: float
    """One training step: from the kept features where nothing but the head is trained."""
    features: float
    """What is computed once for every example; 0 where nothing is kept."""


def flops(config: Config, facts: Facts) -> Flops:
    """FLOPs of one example in the config's last phase."""
    options = {f: getattr(config, f) for f in peft.Options.__dataclass_fields__}
    return _flops(peft.Options(**options), facts.classes, facts.shape)


@functools.cache
def _flops(options: peft.Options, classes: int, shape: tuple[int, ...]) -> Flops:
    model = peft.from_config(options, classes, shape, jnp.uint8)
    kept = model.cut == model.stages - 1 and model.cut > 0
    return Flops(
        forward_flops(model, shape),
        training_flops(model, shape, cached=kept).total,
        forward_flops(model, shape, stop=model.cut) if kept else 0.0,
    )


def hours(config: Config, facts: Facts) -> float:
    """Accelerator-hours of one run."""
    phase = build.phases(config)[-1].config
    of, train = flops(phase, facts), min(facts.train, config.examples or facts.train)
    client = config.steps * config.batch_size if config.steps is not None else config.epochs * train / config.clients
    trained = config.rounds * config.clients_per_round * client
    seen = math.ceil(config.rounds / config.eval_every) * facts.validation + facts.test
    total = trained * of.train
    total += (train + facts.validation + facts.test) * of.features if of.features else seen * of.forward
    return total / (UTILISATION * PEAK) / 3600


def plan(experiment: Experiment, facts: dict[str, Facts]) -> str:
    """Expected hours of every cell and method, of the search, and of all, as Markdown.

    Args:
        facts: data set's name in the config -> its sizes.
    """
    e = experiment
    lines = header(["accelerator-hours, one seed", *e.methods, "all methods"])
    total = 0.0

    def line(name: str, each: list[float]) -> str:
        return f"| {name} | {' | '.join(f'{h:.2f}' for h in [*each, sum(each)])} |"

    for cell in e.cells:
        configs = [method_config(e, name, e.cells[cell], {}) for name in e.methods]
        each = [hours(config, facts[config.dataset]) for config in configs]
        total += len(e.seeds) * sum(each)
        lines.append(line(cell, each))
    default = [method_config(e, name, {}, {}) for name in e.methods]
    each = [len(e.grid) * hours(config, facts[config.dataset]) for config in default]
    lines.append(line(f"search, {len(e.grid)} rates", each))
    total += sum(each)
    lines += [
        "",
        f"In all {total:,.0f} hours of one {DEVICE}: {len(e.seeds)} seeds of every cell, and the search with at most "
        f"{len(e.grid)} rates, at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (assumed, not measured).",
    ]
    return "\n".join(lines)
