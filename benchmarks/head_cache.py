"""Head-tuning with the frozen features computed once, against the whole backbone in every epoch.

    python benchmarks/head_cache.py             # MiniLM-L6 on 20 Newsgroups (fedsim data fetch brings both)
    python benchmarks/head_cache.py --small     # a tiny ViT on random images, to see that it works

Two whole runs of `fedsim run` that differ in `--cache` alone. Every client takes part in every round with one epoch, so
that a round is an epoch over the training set. Time of an epoch: the median of the rounds, compiling left out. Time of
a run: all of it, with loading, the features of the cached run, compiling, evaluations and checkpoints.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import report
import tyro

import fedsim
from fedsim import build
from fedsim.config import Config, Speed
from fedsim.record import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "minilm_l6"
    """Its head is trained."""
    dataset: str = "20newsgroups"
    """Texts or images that the backbone reads."""
    examples: int | None = 2000
    """Training examples to keep."""
    tokens: int = 32
    """Length of a text."""
    clients: int = 20
    """All of them take part in every round."""
    epochs: int = 20
    """Rounds of the run."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, weights = Path(scratch), None
        if o.small:
            rng = np.random.default_rng(0)
            x, y = rng.integers(0, 256, (200, 16, 16, 3)).astype(np.uint8), rng.integers(0, 4, 200)
            np.savez(folder / "images.npz", x=x, y=y)
            o = dataclasses.replace(
                o, backbone="vit_tiny", dataset=str(folder / "images.npz"), examples=100, clients=4, epochs=3
            )
            weights = "random"
        config = Config(
            dataset=o.dataset, backbone=o.backbone, weights=weights, examples=o.examples, tokens=o.tokens, peft="head",
            clients=o.clients, clients_per_round=o.clients, rounds=o.epochs, optimizer="sgd", lr=0.5, min_size=1,
            eval_every=o.epochs,
        )  # fmt: skip
        build.fetch_missing(config)
        runs: dict[str, Run] = {}
        for cache in ("on", "off"):
            speed = Speed(cache=cache, compilation_cache=False)
            runs[cache] = fedsim.run(config, speed, out=folder / cache, quiet=True)
        epochs = {k: [line["seconds"] - line["compile_seconds"] for line in r.rounds] for k, r in runs.items()}
        whole = {k: (r.summary or {})["seconds"] for k, r in runs.items()}
        loss = {k: [line["loss"] for line in r.rounds] for k, r in runs.items()}
    epoch = {k: float(np.median(v)) for k, v in epochs.items()}
    apart = max(abs(a - b) / b for a, b in zip(loss["on"], loss["off"], strict=True))
    print(f"{o.backbone} on {Path(o.dataset).name}: {o.epochs} epochs of head-tuning")
    print(
        f"an epoch  cached {epoch['on']:8.3f} s, not {epoch['off']:8.3f} s: {epoch['off'] / epoch['on']:6.1f} times faster"
    )
    print(
        f"a run     cached {whole['on']:8.3f} s, not {whole['off']:8.3f} s: {whole['off'] / whole['on']:6.1f} times faster"
    )
    print(f"losses differ by {apart:.1e} at most")
    if apart > 1e-3:
        raise SystemExit("the cached run gives another result")
    results = {
        "epoch_seconds": epochs, "run_seconds": whole, "epoch_ratio": epoch["off"] / epoch["on"],
        "run_ratio": whole["off"] / whole["on"], "relative_difference": apart,
    }  # fmt: skip
    report.write("head_cache", o, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
