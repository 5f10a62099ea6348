"""What an axis has found: a row for each cell and method over its seeds, and how the learning rates were chosen.

`result` reads the folder of a sweep; the JSON files of experiments/results have the same form, and `table` prints both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from common import TARGETS

from fedsim import record
from fedsim.sweeps import folder
from fedsim.sweeps.study import Setting, Spread, Study
from fedsim.units import share

Curve = Sequence[Sequence[Any]]
"""(round, bytes sent so far both ways, validation accuracy), in the order of rounds."""


def at_bytes(curve: Curve, budget: int) -> float | None:
    """Validation accuracy of the last evaluation at which no more than `budget` bytes were sent; None before the first."""
    within = [accuracy for _, total, accuracy in curve if total <= budget]  # None where the model had diverged
    return within[-1] if within else None


def curve_of(lines: Sequence[record.Round]) -> Curve:
    """The curve of a run; where the model had diverged the accuracy is None."""
    seen = [line for line in lines if line["validation"]]
    return [
        (line["round"], line["total_bytes_up"] + line["total_bytes_down"], line["validation"]["accuracy"])
        for line in seen
    ]


def result(study: Study) -> dict[str, Any]:
    """Rows, rates, the grid and the commits of a sweep."""
    rates = search(study)
    cells: dict[str, list[Setting]] = {}
    for setting in study.settings():
        if setting.rows:
            cells.setdefault(setting.varied["cell"], []).append(setting)
    grid = sorted({float(rate) for found in rates.values() for rate in found["validation_by_rate"]})
    rows = [row for settings in cells.values() for row in of_cell(study, settings, rates)]
    return {"grid": grid, "rates": rates, "rows": rows, "git": commits([run.about["git"] for run in study.runs()])}


def commits(found: Sequence[dict[str, Any] | None]) -> list[str]:
    """The commits that these runs are of, each once; with a plus where files were changed."""
    return list(dict.fromkeys(git["commit"][:7] + "+" * git["changed"] for git in found if git))


def search(study: Study) -> dict[str, dict[str, Any]]:
    """By method the rate, whether it is at the grid's edge, and what every rate gave and took in the default cell."""
    asked = folder.Asked(study.directory)
    places, found = folder.places(study.directory / folder.TUNING, asked.tuning), {}
    for cell in asked.tuning:
        if folder.state(places[cell.key]) != "done":
            continue
        of = found.setdefault(cell.varied["method"], {"validation_by_rate": {}, "seconds_by_rate": {}})
        summary = record.load(places[cell.key]).summary or {}
        rate = f"{cell.config.lr:g}"
        of["validation_by_rate"][rate] = summary["final"]["validation"]["accuracy"]
        of["seconds_by_rate"][rate] = round(summary["seconds"], 1)
    for method, of in found.items():
        tried = [float(rate) for rate in of["validation_by_rate"]]
        of["rate"] = study.chosen[method]["lr"]
        of["at_the_edge"] = of["rate"] in (min(tried), max(tried))
    return found


def of_cell(study: Study, settings: Sequence[Setting], rates: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cell: a method each.

    `at_equal_bytes` holds the validation accuracy at two budgets, the least and the second least total of the cell's
    methods: with the least one alone, most methods would have sent nothing but the rounds of the head.
    """
    budgets = sorted(max(row["bytes"] for row in s.rows) for s in settings)[:2]
    found = []
    for s in settings:
        done = [cell for cell in s.cells if study.row(cell)["state"] == "done"]
        lines = [record.rounds(study.places[cell.key]) for cell in done]
        last = lines[0][-1]
        reached, count = study.bytes_to(s, TARGETS.get(done[0].config.dataset))
        found.append(
            {
                "cell": s.varied["cell"],
                "method": s.varied["method"],
                "seeds": len(done),
                "parameters": s.rows[0]["parameters"],
                "client_up": last["bytes_up"] // last["clients"],
                "client_down": last["bytes_down"] // last["clients"],
                "total": max(row["bytes"] for row in s.rows),
                "setup": max(row["setup_bytes"] for row in s.rows),
                "rate": done[0].config.lr,
                "at_the_edge": rates[s.varied["method"]]["at_the_edge"],
                "validation": as_dict(s.over_seeds("validation")),
                "test": as_dict(s.over_seeds("test")),
                "budgets": budgets,
                "at_equal_bytes": [
                    as_dict(spread([at_bytes(curve_of(of), budget) for of in lines])) for budget in budgets
                ],
                "bytes_to_target": reached,
                "seeds_at_target": count,
                "paper": None,
                "seconds": round(sum(row["seconds"] for row in s.rows), 1),
            }
        )
    return found


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of a sample over seeds; None where a seed has no value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None


def as_dict(found: Spread | None) -> dict[str, float | None]:
    """A spread as JSON has it."""
    mean, sd = found or (None, None)
    return {"mean": mean, "sd": sd}


def header(columns: Sequence[str], text: int = 1) -> list[str]:
    """The first two lines of a Markdown table; all columns but the first `text` ones hold numbers."""
    return [f"| {' | '.join(columns)} |", "|---" * text + "|---:" * (len(columns) - text) + "|"]


def table(result: dict[str, Any]) -> str:
    """A result as Markdown: the rows of every cell, and below them the search for the rates."""
    columns = [
        "cell",
        "trained",
        "parameters",
        "bytes: client, one way",
        "all, both ways",
        "rate",
        "test",
        "validation",
    ]
    columns += ["at least bytes", "at second least", "bytes to target", "paper", "seconds"]
    lines = header(columns, text=2)
    for r in result["rows"]:
        assert r["client_up"] == r["client_down"]  # FedAvg without codecs: the same leaves both ways
        reached = "–" if r["bytes_to_target"] is None else f"{r['bytes_to_target']:,}"
        if 0 < r["seeds_at_target"] < r["seeds"]:
            reached += f" ({r['seeds_at_target']} of {r['seeds']} seeds)"
        scores = [said(s) for s in (r["test"], r["validation"], *r["at_equal_bytes"])]
        counts = [f"{n:,}" for n in (r["parameters"], r["client_up"], r["total"])]
        rate = f"{r['rate']:g}{' (edge)' if r['at_the_edge'] else ''}"
        cells = [r["cell"], r["method"], *counts, rate, *scores, reached, r["paper"] or "", f"{r['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *rates_table(result["grid"], result["rates"])])


def rates_table(grid: Sequence[float], rates: dict[str, Any]) -> list[str]:
    """Markdown lines: what every rate gave; empty where it was not tried."""
    names = [f"{rate:g}" for rate in grid]
    lines = header(["validation accuracy at rate", *names, "seconds"])
    for name, r in rates.items():
        found = [share(r["validation_by_rate"][rate]) if rate in r["validation_by_rate"] else "" for rate in names]
        lines.append(f"| {name} | {' | '.join(found)} | {sum(r['seconds_by_rate'].values()):.0f} |")
    return lines


def said(score: dict[str, float | None]) -> str:
    """`0.735 ± 0.010`, `0.735` for one seed, or a dash."""
    return share(score["mean"]) + ("" if score["sd"] is None else f" ± {share(score['sd'])}")
