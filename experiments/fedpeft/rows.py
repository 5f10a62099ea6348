"""What the runs of an experiment say: a row for each cell and method over its seeds, the table, the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedsim.report import plots
from fedsim.units import share


def at_bytes(curve: Sequence[Sequence[Any]], budget: int) -> float | None:
    """Validation accuracy of the last evaluation at which no more than `budget` bytes were sent; None before the first.

    Args:
        curve: (round, bytes sent so far, accuracy), in the order of rounds.
    """
    within = [accuracy for _, total, accuracy in curve if total <= budget]  # None where the model had diverged
    return within[-1] if within else None


def bytes_to(curve: Sequence[Sequence[Any]], target: float | None) -> int | None:
    """Bytes sent at the first evaluation with at least this accuracy; None where there is none."""
    known = [(total, accuracy) for _, total, accuracy in curve if accuracy is not None]
    reached = [total for total, accuracy in known if target is not None and accuracy >= target]
    return reached[0] if reached else None


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each cell and method, over its seeds.

    `at_equal_bytes` holds the validation accuracy at two budgets, the least and the second least total of the cell's
    methods: with the least one alone, most methods would have sent nothing but the rounds of the head.
    """
    found = []
    for cell, methods in result["cells"].items():
        totals = {name: max(seed["total"] for seed in seeds.values()) for name, seeds in methods.items()}
        budgets = sorted(totals.values())[:2]
        for name, seeds in methods.items():
            of = list(seeds.values())
            reached = [b for b in (bytes_to(s["curve"], result["sets"][cell]["target"]) for s in of) if b is not None]
            found.append(
                {
                    "cell": cell,
                    "method": name,
                    "seeds": len(of),
                    "parameters": of[0]["parameters"],
                    "client_up": of[0]["client_up"],
                    "client_down": of[0]["client_down"],
                    "total": totals[name],
                    "setup": max(s["setup"] for s in of),
                    "rate": result["rates"][name]["rate"],
                    "at_the_edge": result["rates"][name]["at_the_edge"],
                    "validation": spread([s["validation"] for s in of]),
                    "test": spread([s["test"] for s in of]),
                    "budgets": budgets,
                    "at_equal_bytes": [spread([at_bytes(s["curve"], budget) for s in of]) for budget in budgets],
                    "bytes_to_target": round(statistics.mean(reached)) if reached else None,
                    "seeds_at_target": len(reached),
                    "paper": None,
                    "seconds": round(sum(s["seconds"] for s in of), 1),
                }
            )
    return found


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (of a sample; None for one value) over seeds; no mean where a seed has no value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.mean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def header(columns: Sequence[str], text: int = 1) -> list[str]:
    """The first two lines of a Markdown table; all columns but the first `text` ones hold numbers."""
    return [f"| {' | '.join(columns)} |", "|---" * text + "|---:" * (len(columns) - text) + "|"]


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: the rows of every cell, and below them the search for the rates."""
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
    rates = [f"{rate:g}" for rate in result["grid"]]
    lines += ["", *header(["validation accuracy at rate", *rates, "seconds"])]
    for name, r in result["rates"].items():
        found = [share(r["validation_by_rate"][rate]) if rate in r["validation_by_rate"] else "" for rate in rates]
        lines.append(f"| {name} | {' | '.join(found)} | {sum(r['seconds_by_rate'].values()):.0f} |")
    return "\n".join(lines)


def said(score: dict[str, float | None]) -> str:
    """`0.735 ± 0.010`, `0.735` for one seed, or a dash."""
    if score["mean"] is None:
        return "–"
    return f"{score['mean']:.3f}" + ("" if score["sd"] is None else f" ± {score['sd']:.3f}")


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws test accuracy by cell, one line a method with the deviation over seeds, and gives the picture's path."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    cells = list(result["cells"])
    for i, name in enumerate(result["rates"]):
        of = {r["cell"]: r["test"] for r in result["rows"] if r["method"] == name}
        at = [k + (i - (len(result["rates"]) - 1) / 2) * 0.04 for k, cell in enumerate(cells) if cell in of]
        high = [math.nan if of[cell]["mean"] is None else of[cell]["mean"] for cell in cells if cell in of]
        errors = [of[cell]["sd"] or 0.0 for cell in cells if cell in of]
        color = plots.COLORS[i % len(plots.COLORS)]
        axes.errorbar(at, high, errors, color=color, marker="o", markersize=5, linewidth=1.6, capsize=3, label=name)
    axes.set_xticks(range(len(cells)), cells)
    axes.set_xlim(-0.4, len(cells) - 0.6)
    axes.set_ylabel("test accuracy")
    plots.style(axes)
    figure.legend(fontsize=9, loc="outside right center", labelcolor=plots.INK, frameon=False)
    return plots.write(figure, path)
