"""Small runs whose losses and bytes are kept in `golden_rounds.json`.

`python tests/simulation/golden_rounds.py` compares them with today's, `--write` renews the file.

A change that is not meant to change results must leave them alone; one that is says why in its commit (CONTRIBUTING.md).
They use SGD, whose rounding errors stay small, and public names alone, so that they outlive any move of the code.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fedsim

FILE = Path(__file__).with_name("golden_rounds.json")
SHARED: dict[str, Any] = {
    "dataset": "arrays",
    "clients": 8,
    "clients_per_round": 4,
    "rounds": 3,
    "min_size": 3,
    "optimizer": "sgd",
    "lr": 0.05,
}
POINTS: dict[str, Any] = {"backbone": "mlp", "rank": 2, "targets": ("layers/*",)}
CASES: dict[str, dict[str, Any]] = {
    "fed_avg": {**POINTS, "peft": "lora"},
    "fed_avg_of_tokens": {"backbone": "bert_tiny", "weights": "random", "peft": "lora+bias", "rank": 2},
    "flora": {**POINTS, "peft": "lora", "algorithm": "flora"},
    "drop_outs": {
        **POINTS,
        "peft": "full",
        "rounds": 4,
        "availability": "bernoulli(p=0.8)",
        "dropout": 0.3,
        "over_selection": 1.5,
        "compute": "lognormal(1, 1)",
        "download": "10",
        "deadline": 8.0,
        "late": "partial",
    },
    "two_phases": {**POINTS, "peft": "lora", "head_rounds": 2, "rounds": 4, "server_optimizer": "sgd(momentum=0.9)"},
    "codecs_and_own_tests": {
        **POINTS,
        "peft": "lora",
        "codec_up": "bfloat16",
        "codec_down": "float16",
        "local_test": 0.2,
        "personal_epochs": 1,
        "algorithm": "fed_prox(mu=0.1)",
    },
}
LOSSES = ("loss", "accuracy")
COUNTS = ("round", "bytes_up", "bytes_down", "bytes_up_leaves", "bytes_down_leaves", "setup_bytes", "clients")
COUNTS += ("reported", "examples", "phase")


def examples(backbone: str) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian points of three classes, or tokens of which each class has some more often than others."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    if backbone == "mlp":
        return (1.5 * rng.normal(size=(3, 6))[y] + rng.normal(size=(240, 6))).astype(np.float32), y
    return (1 + 30 * y[:, None] + rng.integers(0, 60, (240, 8))).astype(np.int32), y


def measured(case: str, folder: Path) -> dict[str, Any]:
    """The case's rounds and end, run in `folder`: what is counted, what is computed."""
    config = fedsim.Config(**{**SHARED, **CASES[case]})
    speed = fedsim.Speed(devices=1, lanes=2, compilation_cache=False)
    data = fedsim.arrays(*examples(config.backbone))
    run = fedsim.run(config, speed, out=folder / case, quiet=True, data=data)
    assert run.summary is not None
    rounds = [
        {name: line[name] for name in (*COUNTS, *LOSSES)}
        | {"validation": line["validation"], "simulated": line["simulated"]}
        for line in run.rounds
    ]
    return {"rounds": rounds, "final": run.summary["final"], "bytes": run.summary["bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew golden_rounds.json")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        now = json.loads(json.dumps({case: measured(case, Path(folder)) for case in CASES}))
    if write:
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        return
    kept = json.loads(FILE.read_text())
    for case in CASES:
        print(f"{case}: {'equal, bit for bit' if now[case] == kept.get(case) else 'other values'}")


if __name__ == "__main__":
    main()
