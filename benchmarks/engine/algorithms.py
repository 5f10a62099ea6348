"""A round of each algorithm beside FedAvg's, with 100 clients in lanes: seconds, and what lies on a device.

    python benchmarks/engine/algorithms.py                     # a perceptron, trained whole; a few minutes on 2 cores
    python benchmarks/engine/algorithms.py --backbone vit_s14 --clients 8 --lanes 1 \\
        --only fed_avg superior_soups "superior_soups(form='code')"
    python benchmarks/engine/algorithms.py --small             # to see that it works

Each algorithm's programs are compiled first, and then all take turns, a round each; medians count.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))

import variants

import report
from fedsim import Config

# Without fed_ptr(where='client'), which learns examples for each client: --only has it.
ALGORITHMS = (
    "fed_avg", "fed_prox(mu=0.1)", "superior_soups", "superior_soups(form='code')", "fed_ptr",
    "fed_obd", "fed_paq", "fed_dropout_avg", "dfed_alt(graph='ring')", "dfed_salt(graph='ring')", "fed_res",
    "scaffold", "fed_dyn", "fed_rep", "ditto", "local_only",
)  # fmt: skip

NEEDS = {"fed_ptr": {"public_share": 0.05}}  # examples that tell the server what an input looks like


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    only: tuple[str, ...] = ALGORITHMS
    """These; the first one is what ratios are of."""
    backbone: Literal["mlp", "vit_s14"] = "mlp"
    """A perceptron trained whole, or ViT-S/14 with LoRA at 28 pixels."""
    repeats: int = 3
    """Rounds of each algorithm that count, after one that compiles."""
    clients: int = 100
    """Clients, all of them in the round."""
    lanes: int = 4
    small: bool = False
    """Eight clients and two repeats; no timing worth reporting."""


def base(o: Options) -> Config:
    """The round that is timed: a step of eight images each."""
    clients = 8 if o.small else o.clients
    fixed = Config(
        dataset="digits", head_rounds=0, clients=clients, clients_per_round=clients, partition="iid", min_size=2, steps=1,
        batch_size=8, weighting="uniform", optimizer="sgd", local_test=0.2, rounds=2,
    )  # fmt: skip
    if o.backbone == "mlp":
        return fixed.replace(backbone="mlp", peft="full")
    return fixed.replace(backbone="vit_s14", image_size=28, peft="lora")


def main(o: Options) -> None:
    """Measures, prints, keeps."""
    configs = {call: base(o).replace(algorithm=call, **NEEDS.get(call, {})) for call in o.only}
    rows = variants.measured(configs, o.lanes, 2 if o.small else o.repeats)
    print(variants.table(rows))
    report.write("algorithms" if o.backbone == "mlp" else f"algorithms_{o.backbone}", o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
