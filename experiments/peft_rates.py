"""Learning rates of the PEFT kinds in the main job, chosen on validation: one grid, the same rounds, the same head first.

Command:  python experiments/peft_rates.py                  (what is in the results file is not run again)
          python experiments/peft_rates.py --kinds bias --rates 5e-4 2e-3 8e-3
Data:     as experiments/main_job.py; the test set is never read for the choice.
Rounds:   400 of the head, then 10 of the kind, the rate falling to a tenth over them; the main job has 40.
Choice:   the rate with the best validation accuracy at the end; one at the edge of the grid is marked.
          `fedsim.config.RATES` holds the chosen ones.
Results:  experiments/results/peft_rates.json, with machine, versions, commit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import fedsim
from fedsim import record
from fedsim.simulation import build, needs
from fedsim.simulation.current import Current, prepare
from fedsim.simulation.rounds import Standing
from fedsim.simulation.simulate import select, train

FILE = Path(__file__).parent / "results" / "peft_rates.json"
HEAD, ROUNDS = 400, 10
SCHEDULE = f"linear_schedule(1.0, 0.1, {ROUNDS}, {HEAD})"


@dataclass(frozen=True)
class Options:
    """Which kinds, at which rates."""

    kinds: tuple[str, ...] = ("bias", "norm", "adapter", "prompt", "prefix", "ia3", "last_k", "full")
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3, 8e-3, 3.2e-2)


def trained(problem: build.Problem, config: fedsim.Config, overlay: Any = None) -> tuple[Current, float | None]:
    """The config's last phase after its rounds, from what the phase before has trained, and its validation accuracy."""
    phase = build.phases(config)[-1]
    now, fleet = prepare(problem, phase, overlay), build.fleet(config)
    stand = Standing(np.zeros(problem.partition.clients, np.int32))
    for round in range(phase.first, phase.last + 1):
        stand = stand._replace(round=round)
        server, averaging, _ = train(now, select(config, fleet, now, stand))
        now = now._replace(server=server, averaging=averaging)
    found = now.validate().scores["accuracy"]
    return now, found if math.isfinite(found) else None


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
    alone = config.replace(
        peft="head", head_rounds=0, rounds=HEAD, lr=config.head_lr, lr_schedule="constant_schedule(1.0)"
    )
    now, found["head"] = trained(problem, alone)
    head = now.parameters()
    print(f"head after {HEAD} rounds: {found['head']}", flush=True)
    for kind in o.kinds:
        for rate in o.rates:
            cells = found["cells"].setdefault(kind, {})
            if f"{rate:g}" in cells:
                continue
            config = fedsim.main_job(
                peft=kind, lr=rate, rounds=HEAD + ROUNDS, lr_schedule=SCHEDULE, targets=fedsim.Config().targets
            )
            cells[f"{rate:g}"] = trained(problem, config, head)[1]
            print(f"{kind} at {rate:g}: {cells[f'{rate:g}']}", flush=True)
            FILE.write_text(json.dumps({**record.machine(), **found}, indent=1) + "\n")
    for kind, cells in found["cells"].items():
        best, edge = chosen(cells)
        print(f"{kind}: {best}{' (at the edge of the grid)' if edge else ''} of {cells}")


if __name__ == "__main__":
    main(tyro.cli(Options))
