"""Head-tuning with the frozen features computed once, against the whole backbone in every epoch.

    python benchmarks/engine/head_cache.py             # MiniLM-L6 on 20 Newsgroups (fedsim data fetch brings both)
    python benchmarks/engine/head_cache.py --whole     # a federated run: 50 rounds x 10 epochs, 10 of 100 clients
    python benchmarks/engine/head_cache.py --small     # a tiny ViT on random images, to see that it works (also with --whole)

Two whole runs of `fedsim run` that differ in `--cache` alone. Every client takes part in every round with one epoch, so
that a round is an epoch over the training set. Time of an epoch: the median of the rounds, compiling left out. Time of
a run: all of it, with loading, the features of the cached run, compiling, evaluations and checkpoints.

With `--whole` the cached run is measured whole, evaluations apart. Without the cache it would take hours on a CPU: a few
of its rounds are measured, and the others are taken to cost as much an example; the output says so.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import tyro

import fedsim
from fedsim.config import Config, Speed
from fedsim.evaluation.evaluate import evaluator
from fedsim.record import Run
from fedsim.simulation import build, needs

sys.path.append(str(Path(__file__).parents[1]))
import report


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
    whole: bool = False
    """Measure a federated run instead of epochs; the options below are for it, `clients` and `epochs` above are not."""
    population: int = 100
    """Clients, of which some take part in a round."""
    clients_per_round: int = 10
    """Clients of a round."""
    rounds: int = 50
    """Rounds of the cached run."""
    local_epochs: int = 10
    """Epochs of a client in a round."""
    uncached_rounds: int = 3
    """Rounds that are measured without the cache, the first of which compiles."""
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
                o, backbone="vit_tiny", dataset=str(folder / "images.npz"), examples=100, clients=4, epochs=3,
                population=8, clients_per_round=4, rounds=6, local_epochs=2,
            )  # fmt: skip
            weights = "random"
        if o.whole:
            whole_run(o, folder, weights)
            return
        config = Config(
            dataset=o.dataset, backbone=o.backbone, weights=weights, examples=o.examples, tokens=o.tokens, peft="head",
            clients=o.clients, clients_per_round=o.clients, rounds=o.epochs, optimizer="sgd", lr=0.5, min_size=1,
            eval_every=o.epochs,
        )  # fmt: skip
        needs.fetch_missing(config)
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


def whole_run(o: Options, folder: Path, weights: str | None) -> None:
    """The cached run whole, a few rounds of the other, evaluations apart; prints, writes JSON."""
    rounds: dict[Literal["on", "off"], int] = {"on": o.rounds, "off": min(o.uncached_rounds, o.rounds)}
    wall: dict[str, float] = {}
    runs: dict[str, Run] = {}
    evaluations = {"on": 0.0, "off": 0.0}
    for cache, count in rounds.items():
        config = Config(
            dataset=o.dataset, backbone=o.backbone, weights=weights, examples=o.examples, tokens=o.tokens, peft="head",
            clients=o.population, clients_per_round=o.clients_per_round, rounds=count, epochs=o.local_epochs,
            optimizer="sgd", lr=0.5, min_size=1, eval_every=count,
        )  # fmt: skip
        needs.fetch_missing(config)

        def timed(*args: Any, cache: str = cache) -> Callable[..., Any]:
            evaluate = evaluator(*args)

            def run(*args: Any) -> Any:
                start = time.perf_counter()
                scores = evaluate(*args)
                evaluations[cache] += time.perf_counter() - start
                return scores

            return run

        with mock.patch.object(build, "evaluator", timed):
            start = time.perf_counter()
            runs[cache] = fedsim.run(
                config, Speed(cache=cache, compilation_cache=False), out=folder / f"whole-{cache}", quiet=True
            )
            wall[cache] = time.perf_counter() - start - evaluations[cache]
    lines = {k: run.rounds for k, run in runs.items()}
    steady = {k: [line["seconds"] - line["compile_seconds"] for line in v] for k, v in lines.items()}
    examples = {k: [line["examples"] for line in v] for k, v in lines.items()}
    # Both runs invite the same clients in the same rounds, so that the cached run says how many examples would follow.
    rate = float(np.median([s / n for s, n in zip(steady["off"], examples["off"], strict=True)]))
    uncached = wall["off"] + rate * sum(examples["on"][rounds["off"] :])
    ratio = uncached / wall["on"]
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines["on"], lines["off"], strict=False))
    in_rounds, compiling = sum(steady["on"]), sum(line["compile_seconds"] for line in lines["on"])
    print(f"{o.backbone} on {Path(o.dataset).name}: {o.rounds} rounds x {o.local_epochs} epochs of head-tuning")
    print(f"cached      {wall['on']:8.1f} s, measured whole, evaluations ({evaluations['on']:.1f} s) apart")
    print(
        f"  of which  {in_rounds:8.1f} s in rounds ({in_rounds / o.rounds * 1e3:.1f} ms each), {compiling:.1f} s compiling, "
        f"{wall['on'] - in_rounds - compiling:.1f} s loading, features, records, checkpoints, pictures"
    )
    print(
        f"not cached  {uncached:8.1f} s, EXTRAPOLATED from {rounds['off']} of {o.rounds} rounds ({wall['off']:.1f} s "
        f"measured) at {rate * 1e3:.3f} ms an example"
    )
    print(f"{ratio:.1f} times faster; losses of the common rounds differ by {apart:.1e} at most")
    if apart > 1e-3:
        raise SystemExit("the cached run gives another result")
    results = {
        "cached_seconds": wall["on"], "uncached_seconds_extrapolated": uncached, "ratio": ratio,
        "uncached_rounds_measured": rounds["off"], "uncached_seconds_measured": wall["off"],
        "uncached_seconds_per_example": rate, "evaluation_seconds": evaluations, "round_seconds": steady,
        "compile_seconds": {k: sum(line["compile_seconds"] for line in v) for k, v in lines.items()},
        "examples": examples, "relative_difference": apart,
    }  # fmt: skip
    report.write("head_cache_run", o, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
