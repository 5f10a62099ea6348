"""What privacy adds to a round: the same round of FedAvg under each mechanism, in turn.

python benchmarks/privacy/mechanisms.py            # MiniLM-L6 with LoRA in four lanes; ten minutes on 2 cores
python benchmarks/privacy/mechanisms.py --small    # to see that it works
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))

import variants

import report
from fedsim import Config

NOISE = {"noise_multiplier": 1.0, "delta": 1e-3}
MECHANISMS: dict[str, dict[str, Any]] = {
    "none": {},
    "central": {"dp": "central", **NOISE},
    "central, adaptive": {"dp": "central", "clip_quantile": 0.5, **NOISE},
    "local": {"dp": "local", **NOISE},
    "example": {"dp": "example", **NOISE},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 7
    """Rounds of each mechanism that count, after one that compiles."""
    lanes: int = 4
    small: bool = False
    """A perceptron and two repeats; no timing worth reporting."""


def base(small: bool) -> Config:
    """The round that is timed. All clients are in it, so that each mechanism has the same work."""
    if small:
        return Config(
            dataset="digits", backbone="mlp", peft="full", clients=4, clients_per_round=4, rounds=2, head_rounds=0
        )
    return Config(
        backbone="minilm_l6", dataset="20newsgroups", examples=400, tokens=64, peft="lora", head_rounds=0, clients=4,
        clients_per_round=4, partition="iid", batch_size=16, rounds=2,
    )  # fmt: skip


def main(o: Options) -> None:
    """Measures, prints, keeps."""
    configs = {name: base(o.small).replace(**options) for name, options in MECHANISMS.items()}
    rows = variants.measured(configs, o.lanes, 2 if o.small else o.repeats)
    print(variants.table(rows))
    report.write("mechanisms", o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
