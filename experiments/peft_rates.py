"""Learning rates of the PEFT kinds in the main job, chosen on validation: one grid, the same rounds, the same head first.

Command:  python experiments/peft_rates.py                  (what is in the results file is not run again)
          python experiments/peft_rates.py --kinds bias --rates 5e-4 2e-3 8e-3
Data:     as experiments/main_job.py; the test set is never read for the choice.
Rounds:   400 of the head, then 15 of the kind, the rate falling to a tenth over them; the main job has 40.
Choice:   the rate with the best validation accuracy at the end; one at the edge of the grid is marked.
          `fedsim.config.RATES` holds the chosen ones.
Results:  experiments/results/peft_rates.json, with machine, versions, commit.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import fedsim
from fedsim import record
from fedsim.simulation import build, needs

FILE = Path(__file__).parent / "results" / "peft_rates.json"
HEAD, ROUNDS = 400, 15
SCHEDULE = f"linear_schedule(1.0, 0.1, {ROUNDS}, {HEAD})"


@dataclass(frozen=True)
class Options:
    """Which kinds, at which rates."""

    kinds: tuple[str, ...] = ("bias", "norm", "adapter", "prompt", "prefix", "ia3", "last_k", "full")
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3, 8e-3)


def accuracy(problem: build.Problem, kind: str, rate: float, folder: Path) -> float | None:
    """Validation accuracy at the end of the shortened main job."""
    config = fedsim.main_job(peft=kind, lr=rate, rounds=HEAD + ROUNDS, lr_schedule=SCHEDULE)
    config = config.replace(targets=fedsim.Config().targets)  # read by LoRA alone
    run = fedsim.run(config, fedsim.Speed(checkpoint_every=1000), out=folder, quiet=True, problem=problem)
    assert run.summary is not None
    return run.summary["final"]["validation"]["accuracy"]


def chosen(cells: dict[str, float | None]) -> tuple[str, bool]:
    """The rate with the best score, and whether it is at the edge of those tried."""
    scored = {rate: score for rate, score in cells.items() if score is not None}
    best = max(scored, key=lambda rate: scored[rate])
    ordered = sorted(cells, key=float)
    return best, best in (ordered[0], ordered[-1])


def main(o: Options) -> None:
    """Runs what is missing, and prints the table."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    config = fedsim.main_job()
    needs.fetch_missing(config)
    problem = build.problem(config, fedsim.Speed())._replace(trainers={})
    for kind in o.kinds:
        for rate in o.rates:
            cells = found["cells"].setdefault(kind, {})
            if f"{rate:g}" in cells:
                continue
            with tempfile.TemporaryDirectory() as folder:
                cells[f"{rate:g}"] = accuracy(problem, kind, rate, Path(folder) / "run")
            print(f"{kind} at {rate:g}: {cells[f'{rate:g}']}", flush=True)
            FILE.write_text(json.dumps({**record.machine(), **found}, indent=1) + "\n")
    for kind, cells in found["cells"].items():
        best, edge = chosen(cells)
        print(f"{kind}: {best}{' (at the edge of the grid)' if edge else ''} of {cells}")


if __name__ == "__main__":
    main(tyro.cli(Options))
