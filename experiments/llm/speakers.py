"""Federated LoRA of SmolLM2 on Shakespeare's speakers: FedIT, FFA-LoRA, FLoRA, FedSA-LoRA beside zero-shot and centralised.

Command:  python experiments/llm/speakers.py --out runs/speakers
          python experiments/llm/speakers.py --out runs/speakers --small    (two blocks of random weights: a minute)
          python benchmarks/tables.py llm                                   (the table, as it is kept)
Data:     Shakespeare by speaker (packaged): 12 drawn of those who speak 1,000 to 1,500 words in a play, each a client. Speeches are
          packed into windows of 64 tokens. A twentieth of them is validation and as much test, of all speakers together; a quarter
          of what is left is a client's own test, on which nobody trains.
Model:    SmolLM2-135M-Instruct (Q4_1, dequantised; packaged), LoRA of rank 8 on query and value of its upper ten blocks: 153,600
          trained parameters. So the lower twenty blocks run once for each window.
Start:    six rounds of four clients, three steps of four windows each, Adam. The rate is the best of three for FedIT on other
          speakers, by their own tests, and the same for all; two seeds, which draw cohorts, batches and own tests.
          "centralised" is one client with all speakers, which takes as many steps in a round as the cohort does together; its own
          test is a quarter of all windows.
Shows:    perplexity of clients' own tests (mean over clients, and the worst), of the global model; FedSA-LoRA's clients answer with
          their own B. Bytes both ways, of all clients and rounds, the model itself left out. The model has probably read these plays:
          only the gain over zero-shot says something.
Fails if: a federated method does not gain on zero-shot, or FedIT is more than a tenth above centralised.
Time:     12:27 min alone on 2 cores of a shared AMD EPYC; 2026-11-30.
Result:   zero-shot 179, FedIT 89, FLoRA 96, centralised 94, FFA-LoRA 112, FedSA-LoRA 113. docs/language_models.md has the table.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import methods

import fedsim
from fedsim import Config, Speed, Sweep
from fedsim.data import read
from fedsim.record import Run
from fedsim.report import plots
from fedsim.sweeps.study import Study

RATES = [1e-3, 3e-3, 1e-2]
SPEAKERS, WORDS = 12, (1000, 1500)
ROUNDS, COHORT, STEPS, BATCH = 6, 4, 3, 4
ZERO_SHOT = "zero-shot"
ONE = {"partition": "iid", "clients": 1, "clients_per_round": 1}  # client, who has all speakers
HEADS = ("query", "value")
BASE = Config(
    task="language_model", dataset="speakers.jsonl", client_column="who", packing=True, tokens=64, partition="natural",
    min_size=4, clients=SPEAKERS, clients_per_round=COHORT, local_test=0.25, backbone="smollm2_135m", peft="lora", rank=8,
    targets=tuple(f"blocks/2[0-9]/attention/{name}" for name in HEADS), algorithm="fed_it", optimizer="adam", rounds=ROUNDS,
    steps=STEPS, batch_size=BATCH, eval_every=ROUNDS,
)  # fmt: skip
SMALL: dict[str, Any] = {
    "backbone": "decoder_tiny", "targets": HEADS, "rounds": 2, "eval_every": 2, "steps": 1, "tokens": 32,
}  # fmt: skip


def spoken(file: Path, seed: int) -> Path:
    """Writes the speeches of some speakers, a client each, with their splits; the same seed draws the same."""
    if file.is_file():
        return file
    source = read(Config(dataset="shakespeare"))
    who = source.natural["client"]
    _, of = np.unique(who, return_inverse=True)
    words = np.bincount(of, weights=[len(text.split()) for text in source.x])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.flatnonzero((words >= WORDS[0]) & (words <= WORDS[1])), SPEAKERS, replace=False)
    rows = np.flatnonzero(np.isin(of, drawn))
    splits = rng.choice(["train", "validation", "test"], len(rows), p=[0.9, 0.05, 0.05])
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"text": source.x[row], "label": name, "who": name, "split": split})
        for row, name, split in zip(rows, who[rows].tolist(), splits.tolist(), strict=True)
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def compared(base: Config, rate: float) -> dict[str, dict[str, Any]]:
    """The methods, at one rate."""
    return {
        "FedIT": {"lr": rate},
        "FFA-LoRA": {"algorithm": "ffa_lora", "peft": "ffa_lora", "lr": rate},
        "FLoRA": {"algorithm": "flora", "lr": rate},
        "FedSA-LoRA": {"algorithm": "fed_sa_lora", "lr": rate},
        "centralised": {**ONE, "steps": base.clients_per_round * (base.steps or 1), "lr": rate},
        ZERO_SHOT: {"rounds": 1, "steps": 1, "eval_every": 1, "lr_schedule": "constant_schedule(0.0)"},
    }


def by_client(run: Run) -> list[float]:
    """Each client's perplexity on its own test: of what it keeps where it keeps something, else of the global model."""
    each = [client["perplexity"] for client in run.clients()]
    return [of["memory" if "memory" in of else "global"] for of in each]


def told(found: dict[str, Any], study: Study, rate: float, rates: Sequence[float]) -> dict[str, Any]:
    """The result with the clients' perplexities and the one rate; zero-shot and centralised send nothing."""
    runs: dict[str, list[Run]] = {}
    for cell, run in zip((row for row in study.rows() if row["state"] == "done"), study.runs(), strict=True):
        runs.setdefault(cell[methods.METHOD], []).append(run)
    for row in found["rows"]:
        own = [by_client(run) for run in runs[row[methods.METHOD]]]
        row["clients"] = own
        row["scores"] = [statistics.mean(each) for each in own]
        row["worst"] = statistics.mean(max(each) for each in own)
        row["rate"], row["at_the_edge"] = rate, rate in (min(rates), max(rates))
        if row[methods.METHOD] == ZERO_SHOT:
            row["bytes"], row["rate"], row["at_the_edge"] = 0, 0.0, False
        if row[methods.METHOD] == "centralised":
            row["bytes"] = 0
    return found


def draw(found: dict[str, Any], file: Path) -> Path:
    """Draws each client's perplexity under every method, clients from the lowest to the highest zero-shot, of the first seed."""
    rows = {row[methods.METHOD]: row["clients"][0] for row in found["rows"] if len(row["clients"][0]) > 1}
    order = np.argsort(rows[ZERO_SHOT])
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for at, (name, values) in enumerate(rows.items()):
        color = "0.45" if name == ZERO_SHOT else plots.COLORS[at % len(plots.COLORS)]
        marker = plots.MARKERS[at % len(plots.MARKERS)]
        axes.plot(
            range(len(order)),
            np.asarray(values)[order],
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1,
            label=name,
        )
    plots.style(axes)
    axes.set_xlabel("client, by its zero-shot perplexity")
    axes.set_ylabel("perplexity, own test")
    figure.legend(fontsize=8, loc="outside right upper", labelcolor=plots.INK, frameon=False)
    return plots.write(figure, file)


def main(out: Path, small: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Runs both studies, or what is missing of them; the table's result.

    Args:
        out: their folder.
        small: a tiny decoder of random weights, one rate and one seed, two rounds.
        keep: file of the result as JSON.
    """
    base = BASE.replace(**SMALL) if small else BASE
    speed = Speed(checkpoint_every=1000)
    rates = RATES[-1:] if small else RATES
    others = base.replace(dataset=str(spoken(out / "others.jsonl", 1)))
    tried = fedsim.sweep(Sweep(base=others, grid={"lr": rates}, seeds=[100], speed=speed), out=out / "rates")
    best = min(tried.runs(), key=methods.answering).config.lr
    ours = base.replace(dataset=str(spoken(out / "speakers.jsonl", 0)))
    grid = {methods.METHOD: compared(ours, best)}
    study = fedsim.sweep(Sweep(base=ours, grid=grid, seeds=1 if small else 2, speed=speed), out=out / "table")
    found = told(methods.result(study, rates=rates), study, best, rates)
    print(draw(found, out / "perplexity_speakers.png"))
    if keep is not None:
        methods.write(found, keep)
    return found


if __name__ == "__main__":
    print(methods.table(tyro.cli(main)))
