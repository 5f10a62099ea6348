"""FedPEFT's experiments by config (Sun et al., arXiv 2210.01708): the default cell, the methods, the command line.

An axis is a file beside this one (client_stability.py and others) that says in what its cells differ from the default
cell. Every method gets the same grid of learning rates and keeps, on all axes, the one with the best validation accuracy
in the default cell, found with seed 0 by runs that do not see the test set. docs/fedpeft.md has what was run and where it
departs from the paper.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro
from hours import Facts, plan
from rows import draw, table
from running import Experiment, run

from fedsim.config import Config, Speed, require_known
from fedsim.data import assets

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "experiments" / "results", ROOT / "docs" / "images"

METHODS: dict[str, dict[str, Any]] = {
    "head": {},
    "bias": {"peft": "bias"},
    "adapter 8": {"peft": "adapter", "adapter_width": 8},
    "prompt, deep 10": {"peft": "prompt", "prompt_tokens": 10},
    "LoRA q, v, r = 4": {"peft": "lora", "rank": 4, "lora_alpha": 8.0},
    "full": {"peft": "full"},
    # From random weights, so its head is not trained first. Group norm: a client has too few examples for batch norm.
    "ShuffleNet V2 0.5x, full": {
        "backbone": "shufflenet_v2_x0_5_gn", "weights": "random", "peft": "full", "head_rounds": 0, "head_lr": None
    },
}  # fmt: skip
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

# What the paper leaves open to us, or what 2 cores cannot do, is our choice: docs/fedpeft.md.
COMMON: dict[str, Any] = {
    "clients": 64, "clients_per_round": 8, "partition": "dirichlet", "alpha": 0.1, "optimizer": "adam"
}  # fmt: skip
SMALL = Config(
    **COMMON, dataset="fashion_mnist", image_size=28, examples=2000, validation=0.0085, backbone="vit_s14", peft="head",
    head_rounds=300, rounds=310, steps=4, batch_size=8, eval_every=5,
)  # fmt: skip
SMALL_METHODS: dict[str, dict[str, Any]] = {"ShuffleNet V2 0.5x, full": {"rounds": 48}}  # no cheap rounds of a head
FULL = Config(
    **COMMON, dataset="tfds:cifar100", image_size=224, validation=0.1, backbone="vit_b16", peft="head",
    rounds=50, epochs=10, batch_size=32, eval_every=1,
)  # fmt: skip
FULL_SETS = {  # sizes as TFDS' catalogue has them, after our split of validation, and of test where a set has none
    "tfds:cifar100": Facts(45_000, 5_000, 10_000, 100, (32, 32, 3)),
    "tfds:resisc45": Facts(22_680, 2_520, 6_300, 45, (256, 256, 3)),
    "tfds:patch_camelyon": Facts(262_144, 32_768, 32_768, 2, (96, 96, 3)),
}
TARGETS = {"fashion_mnist": 0.65, "elpv": 0.75, "digits": 0.6}
TARGETS |= {"tfds:cifar100": 0.8, "tfds:resisc45": 0.8, "tfds:patch_camelyon": 0.8}
TEST_EXAMPLES = 1000  # of --small


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    small: bool = False
    """Packaged sets and a small model, for 2 cores; so it is where nothing is said."""
    full: bool = False
    """ViT-B/16 on the paper's sets, for an accelerator: says the hours that it expects, then starts."""
    plan: bool = False
    """With --full: say the hours, and start nothing."""
    seeds: tuple[int, ...] | None = None
    """Seeds (default: 0 of --small, 0 1 2 of --full)."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which rows."""
    weights: Path | None = None
    """With --full: the checkpoint of ViT-B/16."""
    data_dir: Path | None = None
    """With --full: where TFDS has the prepared sets."""
    accept_licence: str | None = None
    """ELPV's licence: CC-BY-NC-SA; without it the axis runs without that set."""
    runs: Path = Path("runs/fedpeft")
    """Folder of the runs, for all axes; they hold trained weights, which for ELPV are not to be published."""
    out: Path | None = None
    """The JSON file (default: in experiments/results)."""
    table: bool = False
    """Print the table of the JSON file, draw its picture, and train nothing."""


Cells = dict[str, dict[str, Any]]


def experiment(axis: str, small: Cells, full: Cells, o: Options) -> Experiment:
    """What the options ask for.

    Raises:
        ValueError: both sizes at once, an unknown method.
    """
    if o.small and o.full:
        raise ValueError("Expected small or full, not both; leave one out.")
    if o.plan and not o.full:
        raise ValueError("Expected --plan with --full; the time of --small is in the file's docstring.")
    require_known(o.methods, list(METHODS), "method")
    methods = {name: METHODS[name] for name in METHODS if name in o.methods}
    if o.full:
        methods = {name: {**of, "weights": of.get("weights", str(o.weights))} for name, of in methods.items()}
        default = FULL.replace(data_dir=str(o.data_dir) if o.data_dir else None)
        return Experiment(axis, default, full, methods, o.seeds or (0, 1, 2), RATES, TARGETS, None, Speed())
    cells = {}
    for name, of in small.items():
        asset = assets.ASSETS.get(of.get("dataset", SMALL.dataset))
        if asset is None or not asset.accept:
            cells[name] = of
        elif asset.accept == o.accept_licence:
            cells[name] = {**of, "accept_licence": o.accept_licence}
        else:
            print(f"{name} is left out: its licence is not accepted (--accept-licence {asset.accept}).")
    methods = {name: {**of, **SMALL_METHODS.get(name, {})} for name, of in methods.items()}
    speed = Speed(lanes=4, checkpoint_every=1000)
    return Experiment(axis, SMALL, cells, methods, o.seeds or (0,), RATES, TARGETS, TEST_EXAMPLES, speed)


def main(axis: str, small: Cells, full: Cells, document: str | None) -> None:
    """The command line of an axis."""
    o = tyro.cli(Options, description=document)
    try:
        e = experiment(axis, small, full, o)
        name = f"fedpeft_{axis}_{'full' if o.full else 'small'}"
        out = o.out or RESULTS / f"{name}.json"
        if o.table:
            result = json.loads(out.read_text())
        else:
            if o.full:
                print(plan(e, FULL_SETS), flush=True)
                if o.plan:
                    return
                if o.weights is None:
                    raise ValueError("Expected --full with the weights of ViT-B/16; give --weights FILE.")
            result = run(e, o.runs / ("full" if o.full else "small"), out)
        print(table(result))
        draw(result, IMAGES / f"{name}.png" if o.out is None else out.with_suffix(".png"))
    except ValueError as error:
        sys.exit(f"{axis}: {error}")
