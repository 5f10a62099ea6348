"""ViT-S/14 on Fashion-MNIST and ELPV: what six ways of training it cost in bytes and give in accuracy.

Command:  python experiments/fedpeft/vision.py fashion_mnist
          python experiments/fedpeft/vision.py elpv --accept-licence CC-BY-NC-SA
          python experiments/fedpeft/vision.py elpv --table    (Markdown from the JSON file; trains nothing)
Every way trains the head alone for 60 rounds (from cached features, at the rate found for the row `head`), then for 8
rounds what it adds; the head alone trains for all 68. Every way gets the same grid of learning rates and takes the rate
of the best validation accuracy (seed 0). Runs of the grid do not see the test set, which is read once, for the chosen
rate. A stopped search goes on where it stopped.
Machine:  2 cores of a shared AMD EPYC, 23 GiB, JAX 0.10.2, CPU; 2026-11-23, much other work on the machine.
Time:     39 min and 46 min, so loaded (the seconds of every row are in the JSON files; no measurement of speed).
Result:   test accuracy on Fashion-MNIST (2,000 training examples) LoRA 0.745, full 0.744, head 0.664, pixels 0.694; on ELPV
          LoRA 0.819, full 0.821, head 0.811: no difference beyond noise. All rows and bytes: docs/vision.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import cells
import numpy as np
import tyro
from rows import header
from running import finished, search

from fedsim import record
from fedsim.config import Config, Speed
from fedsim.engine.host import tune_host
from fedsim.evaluation.evaluate import evaluator
from fedsim.simulation import build, current, needs
from fedsim.simulation.build import Problem
from fedsim.units import share

RESULTS = Path(__file__).parents[1] / "results"

COMMON = Config(
    backbone="vit_s14", peft="head", clients=20, clients_per_round=5, rounds=68, head_rounds=60, steps=4, batch_size=16,
    optimizer="adam", eval_every=68,
)  # fmt: skip
SETS: dict[str, Config] = {
    "fashion_mnist": COMMON.replace(
        dataset="fashion_mnist", image_size=42, examples=2000, validation=0.0085, partition="dirichlet", alpha=0.3
    ),
    "elpv": COMMON.replace(dataset="elpv", image_size=56, validation=0.24, partition="domain"),
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: options for name, options in cells.METHODS.items() if "backbone" not in options},
    "no backbone: linear on pixels": {"backbone": "linear"},  # the pixels that the others see
}
RATES = cells.RATES


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    dataset: Annotated[Literal["fashion_mnist", "elpv"], tyro.conf.Positional]
    """Which of the two sets."""
    accept_licence: str | None = None
    """ELPV's licence: CC-BY-NC-SA."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which rows."""
    runs: Path = Path("runs/vision")
    """Folder of the runs; they hold trained weights, which for ELPV are not to be published."""
    out: Path | None = None
    """The JSON file (default: in experiments/results)."""
    table: bool = False
    """Print the table of the JSON file and train nothing."""


def row(name: str, config: Config, speed: Speed, problem: Problem, folder: Path) -> dict[str, Any]:
    """One line of the table: the search for a rate, and the test set at the chosen one."""
    data = problem.dataset
    blind = problem._replace(dataset=data._replace(test=data.validation))  # a run reads its test set at the end
    runs: dict[float, record.Run] = {}

    def score(rate: float) -> float:
        runs[rate] = finished(config.replace(lr=rate), speed, folder / f"{rate:g}", blind)
        found = (runs[rate].summary or {})["final"]["validation"]["accuracy"]
        print(f"{config.dataset}, {name}, rate {rate:g}: validation {share(found, 4)}", flush=True)
        return -math.inf if found is None else found  # a model that diverged is worse than any other

    tried, best = search(score, RATES)
    chosen = runs[best]
    now = current.prepare(problem, build.phases(chosen.config)[-1], chosen.parameters)
    test = now.trainer.test(now.server)
    domains = {}
    for value in np.unique(data.natural.get("domain", [])):
        rows = data.test[data.natural["domain"][data.test] == value]
        score_of = evaluator(now.trainer.engine, now.trainer.algorithm.predict, rows, speed.eval_batch)
        domains[str(value)] = {"examples": len(rows), **score_of(now.server)}
    last, summary = chosen.rounds[-1], chosen.summary or {}
    return {
        "config": dataclasses.asdict(chosen.config),
        "config_hash": chosen.config.hash(),
        "validation_after_head_rounds": chosen.rounds[config.head_rounds - 1]["validation"],
        "validation_by_rate": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
        "seconds_by_rate": {f"{rate:g}": round((runs[rate].summary or {})["seconds"], 1) for rate in tried},
        "rate": best,
        "at_the_edge": best in (RATES[0], RATES[-1]),
        "validation": tried[best],
        "test": test,
        "test_by_domain": domains,
        "parameters": summary["parameters"],
        "bytes": {
            "client_up": last["bytes_up"] // last["clients"],
            "client_down": last["bytes_down"] // last["clients"],
            "up": last["total_bytes_up"],
            "down": last["total_bytes_down"],
            "setup": sum(line["setup_bytes"] for line in chosen.rounds),
        },
        "started": chosen.about["started"],
        "git": chosen.about["git"],
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
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
    rates = [f"{rate:g}" for rate in RATES]
    lines += ["", *header(["validation accuracy at rate", *rates, "seconds"])]
    for name, r in rows.items():
        found = [share(r["validation_by_rate"][rate]) if rate in r["validation_by_rate"] else "" for rate in rates]
        lines.append(f"| {name} | {' | '.join(found)} | {sum(r['seconds_by_rate'].values()):.0f} |")
    return "\n".join(lines)


def main(o: Options) -> None:
    """Runs what is missing and writes the JSON file after each row."""
    out = o.out or RESULTS / f"vision_{o.dataset}.json"
    if o.table:
        print(table(json.loads(out.read_text())))
        return
    base = SETS[o.dataset].replace(accept_licence=o.accept_licence)
    configs = {name: base.replace(**METHODS[name]) for name in o.methods}
    needs.fetch_missing(base)
    tune_host(speed := Speed(lanes=base.clients_per_round, checkpoint_every=1000))
    problem = build.problem(base, speed)  # whose frozen features are cached; those of the other kinds cannot be
    data = problem.dataset
    result: dict[str, Any] = {
        "examples": {split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        "chance": float(np.bincount(data.y[data.test]).max() / len(data.test)),
        "licence": data.licence,
        "grid": RATES,
        "rows": json.loads(out.read_text())["rows"] if out.is_file() else {},
        **{key: value for key, value in record.machine().items() if key != "platform"},  # the kernel
    }
    for name, config in configs.items():
        folder = o.runs / o.dataset / "".join(c for c in name.replace(" ", "-") if c not in ",:=")
        if config.peft != "head":
            config = config.replace(head_lr=result["rows"]["head"]["rate"])
        result["rows"][name] = row(name, config, speed, problem, folder)
        result["rows"] = {n: result["rows"][n] for n in METHODS if n in result["rows"]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
