"""Accelerator-hours that the full form of an axis would take, from counted FLOPs: shapes alone, no weights, no data.

Command:  python experiments/fedpeft/hours.py client_stability     (or several; default: all four)

    hours = FLOPs / (UTILISATION * PEAK) / 3600
    FLOPs = rounds * examples a round * F_train + evaluations * validation examples * F + test examples * F

An example in training costs its forward pass, the gradients of activations down to the first trained leaf, and the
gradients of trained weights; `fedsim.peft.flops` counts all three. A head alone costs F once for every example (its features
are kept), then next to nothing. A sweep's option --dry-run says more, but needs the sets and the machine.
The peak and the share of it that a run reaches are assumptions: say better ones where you know them.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import NamedTuple

import jax.numpy as jnp
import tyro
from rows import header

from fedsim import Config, Sweep, peft
from fedsim.peft.flops import forward_flops, training_flops
from fedsim.simulation import build
from fedsim.sweeps.cells import cells, tuning

AXES = ("client_stability", "data_distribution", "data_scarcity", "domain_gap")
DEVICE, PEAK, UTILISATION = "A100", 312e12, 0.30  # bfloat16 without sparsity, NVIDIA's data sheet; the share is assumed


class Facts(NamedTuple):
    """Examples and shape of a set, for what needs no data."""

    train: int
    validation: int
    test: int
    classes: int
    shape: tuple[int, ...]


SETS = {  # sizes as TFDS' catalogue has them, after our split of validation, and of test where a set has none
    "tfds:cifar100": Facts(45_000, 5_000, 10_000, 100, (32, 32, 3)),
    "tfds:resisc45": Facts(22_680, 2_520, 6_300, 45, (256, 256, 3)),
    "tfds:patch_camelyon": Facts(262_144, 32_768, 32_768, 2, (96, 96, 3)),
}


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


def plan(sweep: Sweep) -> str:
    """Expected hours of every cell and method, of the search, and of all, as Markdown."""
    searched = tuning(sweep)
    first = {method: {"lr": of[0].config.lr} for method, of in searched.items()}  # a rate changes no FLOPs
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells(sweep, first):
        of = found.setdefault(cell.varied["cell"], {}).setdefault(cell.varied["method"], [])
        of.append(hours(cell.config, SETS[cell.config.dataset]))
    rates, seeds = len(sweep.tune["lr"]), len(next(iter(next(iter(found.values())).values())))
    search = {method: [hours(c.config, SETS[c.config.dataset]) for c in of] for method, of in searched.items()}
    lines = header(["accelerator-hours, one seed", *searched, "all methods"])
    for name, each in {
        **{name: [of[0] for of in methods.values()] for name, methods in found.items()},
        f"search, {rates} rates": [sum(of) for of in search.values()],
    }.items():
        lines.append(f"| {name} | {' | '.join(f'{h:.2f}' for h in [*each, sum(each)])} |")
    total = sum(sum(of) for methods in (*found.values(), search) for of in methods.values())
    lines += [
        "",
        f"In all {total:,.0f} hours of one {DEVICE}: {seeds} seeds of every cell, and the search with {rates} rates, at "
        f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (assumed, not measured).",
    ]
    return "\n".join(lines)


def main(axes: tyro.conf.Positional[tuple[str, ...]] = AXES) -> None:
    """Prints the hours of the full form of each axis.

    Args:
        axes: client_stability, data_distribution, data_scarcity, domain_gap (default: all).
    """
    for axis in axes:
        print(f"{axis}\n\n{plan(importlib.import_module(axis).full)}\n")


if __name__ == "__main__":
    tyro.cli(main)
