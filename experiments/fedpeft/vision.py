"""ViT-S/14 on Fashion-MNIST and ELPV: what six ways of training it cost in bytes and give in accuracy.

Command:  fedsim sweep experiments/fedpeft/vision.py
          fedsim sweep experiments/fedpeft/vision.py:elpv --accept-licence CC-BY-NC-SA
          python experiments/fedpeft/vision.py experiments/results/vision_elpv.json     (Markdown of what is kept)
Every way trains the head alone for 60 rounds (from cached features, at the rate found for the row `head`), then for 8
rounds what it adds; the head alone trains for all 68. Every way gets the same grid of learning rates and takes the rate
of the best validation accuracy (seed 0). Runs of the grid do not see the test set.
Machine:  2 cores of a shared AMD EPYC, 23 GiB, JAX 0.10.2, CPU; 2026-11-23, much other work on the machine; by the scripts
          of the commits that the JSON files name.
Time:     39 min and 46 min, so loaded (the seconds of every row are in the JSON files; no measurement of speed).
Result:   test accuracy on Fashion-MNIST (2,000 training examples) LoRA 0.745, full 0.744, head 0.664, pixels 0.694; on ELPV
          LoRA 0.819, full 0.821, head 0.811: no difference beyond noise. All rows and bytes: docs/vision.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import tyro
from rows import header, rates_table

from fedsim import Config, Speed, Sweep
from fedsim.units import share

COMMON = Config(
    backbone="vit_s14", peft="head", clients=20, clients_per_round=5, rounds=68, head_rounds=60, steps=4, batch_size=16,
    optimizer="adam", eval_every=68,
)  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    **{name: options for name, options in common.METHODS.items() if "backbone" not in options},
    "no backbone: linear on pixels": {"backbone": "linear"},  # the pixels that the others see
}


def methods_of(base: Config, head_lr: float) -> Sweep:
    """All ways on one set.

    Args:
        head_lr: of the rounds of the head alone: the best rate of the row `head`, in experiments/results/vision_*.json.
    """
    methods = {name: ({"head_lr": head_lr} if "peft" in of else {}) | of for name, of in METHODS.items()}
    return Sweep(base=base, grid={"method": methods}, tune={"lr": common.RATES}, seeds=[0],
                 speed=Speed(lanes=base.clients_per_round, checkpoint_every=1000))  # fmt: skip


sweep = methods_of(
    COMMON.replace(
        dataset="fashion_mnist", image_size=42, examples=2000, validation=0.0085, partition="dirichlet", alpha=0.3
    ),
    head_lr=1e-2,
)
elpv = methods_of(COMMON.replace(dataset="elpv", image_size=56, validation=0.24, partition="domain"), head_lr=1e-3)


def table(result: dict[str, Any]) -> str:
    """A kept result as Markdown."""
    rows = result["rows"]
    domains = list(next(iter(rows.values()))["test_by_domain"])
    columns = ["trained", "parameters", "bytes: client, one way", "all, both ways", "once", "rate", "validation"]
    lines = header([*columns, "test", *domains])
    for name, r in rows.items():
        sent = r["bytes"]
        assert sent["client_up"] == sent["client_down"]  # FedAvg without codecs: the same leaves both ways
        counts = (r["parameters"]["trained"], sent["client_up"], sent["up"] + sent["down"], sent["setup"])
        scores = [r["validation"], r["test"]["accuracy"], *(r["test_by_domain"][d]["accuracy"] for d in domains)]
        cells = [name, *(f"{n:,}" for n in counts), f"{r['rate']:g}{' (edge)' if r['at_the_edge'] else ''}"]
        lines.append(f"| {' | '.join([*cells, *(share(accuracy) for accuracy in scores)])} |")
    return "\n".join([*lines, "", *rates_table(result["grid"], rows)])


def main(file: tyro.conf.Positional[Path]) -> None:
    """Prints the tables of a kept result.

    Args:
        file: a JSON file of experiments/results.
    """
    print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    tyro.cli(main)
