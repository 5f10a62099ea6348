"""FedPEFT's experiments by config (Sun et al., arXiv 2210.01708): what the axes have in common.

An axis is a sweep file beside this one (client_stability.py and others) that says in what its cells differ from the default
cell, which is its first. Every method has the same grid of learning rates and keeps, in all cells, the one with the best
validation accuracy in the default cell with seed 0. docs/fedpeft.md has what was run and where it departs from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim import Config, Speed, Sweep

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
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TARGETS = {"fashion_mnist": 0.65, "elpv": 0.75, "digits": 0.6}  # validation accuracy, for the bytes to it
TARGETS |= {"tfds:cifar100": 0.8, "tfds:resisc45": 0.8, "tfds:patch_camelyon": 0.8}

# What the paper leaves open to us, or what 2 cores cannot do, is our choice: docs/fedpeft.md.
COMMON: dict[str, Any] = {
    "clients": 64, "clients_per_round": 8, "partition": "dirichlet", "alpha": 0.1, "optimizer": "adam"
}  # fmt: skip
SMALL = Config(
    **COMMON, dataset="fashion_mnist", image_size=28, examples=2000, validation=0.0085, backbone="vit_s14", peft="head",
    head_rounds=300, rounds=310, steps=4, batch_size=8, eval_every=5,
)  # fmt: skip
FULL = Config(
    **COMMON, dataset="tfds:cifar100", image_size=224, validation=0.1, backbone="vit_b16", peft="head",
    rounds=50, epochs=10, batch_size=32, eval_every=1,
)  # fmt: skip
# Of the rounds of the head alone, before a method's own: the best rate of the row `head` in the default cell, as
# experiments/results/fedpeft_client_stability_small.json has it (validation accuracy 0.610).
HEAD_LR = 1e-3

Cells = Mapping[str, Mapping[str, Any]]


def small(cells: Cells) -> Sweep:
    """Packaged sets and a small model, for 2 cores.

    Args:
        cells: name -> options in which the cell differs from the default one, which is the first.
    """
    methods = {name: ({} if name == "head" else {"head_lr": HEAD_LR}) | of for name, of in METHODS.items()}
    methods["ShuffleNet V2 0.5x, full"]["rounds"] = 48  # it has no cheap rounds of a head
    return axis(SMALL, cells, methods, [0], Speed(lanes=4, checkpoint_every=1000))


def full(cells: Cells) -> Sweep:
    """ViT-B/16 on the paper's sets, for an accelerator: give the command its checkpoint, and where TFDS has the sets."""
    return axis(FULL, cells, METHODS, [0, 1, 2], Speed())


def axis(default: Config, cells: Cells, methods: Cells, seeds: list[int], speed: Speed) -> Sweep:
    """Every method in every cell; a method's options win over the default cell's."""
    grid = {"cell": cells, "method": methods}
    return Sweep(base=default, grid=grid, tune={"lr": RATES}, tune_by=["method"], seeds=seeds, speed=speed)
