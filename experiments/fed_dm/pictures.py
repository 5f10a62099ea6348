"""What FedDM's synthetic images look like, round after round: one of each class of a few clients, as the server gets them.

Command:  python experiments/fed_dm/pictures.py --out runs/pictures
Writes:   round_1.png, round_2.png, ...: a row for each client, a column for each class; white where it has too few examples.
Data:     Fashion-MNIST (packaged), which may be shown. A set whose licence must be accepted by name is refused: its images, and what
          is learnt from them, are not shown.
Time:     a minute.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

import fedsim
from fedsim import Config, Speed
from fedsim.algorithms.fed_dm import fed_dm
from fedsim.data import assets

CLIENTS, CLASSES = 4, 10
OPTIONS: dict[str, Any] = {"per_class": 4, "real": 32, "steps": 60, "rho": 1.0, "server_epochs": 50}


def drawn(out: Path, round: int, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
    """Writes the first image of each client and class: x (clients * classes * images, ...), in that order."""
    x = np.asarray(x).reshape(-1, CLASSES, OPTIONS["per_class"], *x.shape[1:])
    there = weight.reshape(x.shape[:3])[:, :, 0] > 0
    figure = Figure(figsize=(CLASSES * 0.7, CLIENTS * 0.7), layout="constrained")
    for row, axes in enumerate(np.atleast_2d(figure.subplots(CLIENTS, CLASSES))):
        for column, place in enumerate(axes):
            place.axis("off")
            if there[row, column]:
                place.imshow(x[row, column, 0].squeeze(), cmap="gray", vmin=0, vmax=1)
    figure.savefig(out / f"round_{round}.png", dpi=150)


def main(out: Path, dataset: str = "fashion_mnist", rounds: int = 3, init: str = "real") -> None:
    """Runs a few rounds and draws.

    Args:
        out: folder of the pictures.
        dataset: packaged set of images.
        init: examples at the start, "real" or "noise".

    Raises:
        ValueError: a set whose images may not be shown.
    """
    if dataset in assets.ASSETS and assets.ASSETS[dataset].accept:
        raise ValueError(
            f"Expected dataset={dataset!r} to be one whose images may be shown; its licence allows numbers only."
        )
    out.mkdir(parents=True, exist_ok=True)
    watch = functools.partial(drawn, out)
    fedsim.algorithms.ALGORITHMS["fed_dm_drawn"] = lambda task: fed_dm(task, init=init, watch=watch, **OPTIONS)
    config = Config(
        dataset=dataset, examples=2000, backbone="mlp", peft="full", clients=CLIENTS, clients_per_round=CLIENTS, alpha=0.5,
        algorithm="fed_dm_drawn", optimizer="sgd(momentum=0.5)", lr=0.3, rounds=rounds,
    )  # fmt: skip
    fedsim.run(config, Speed(keep_checkpoints=0), out=out / "run", quiet=True)


if __name__ == "__main__":
    tyro.cli(main)
