"""Rows of the survey's table: those of `methods.py`, and what the two axes ask beside them; its picture.

    python experiments/survey/efficiency.py runs/front                              (the tables of a sweep's folder)
    python experiments/survey/efficiency.py runs/front --keep experiments/results/survey_front_small.json
    python experiments/survey/efficiency.py experiments/results/survey_front_small.json --picture docs/images/survey_front.png

What is measured or counted is in the rows; what is given (`PLACES`) comes in when the table is printed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import axes
import front
import methods
from axes import Place, Work

from fedsim import load_sweep
from fedsim.engine import peaks
from fedsim.report import plots
from fedsim.sweeps.study import Setting, Study
from fedsim.units import short, size, times

PLACES = {  # examples of a client's device and network: all given
    "phone": Place(download=20, upload=5, latency=50, peak=100e9, reached=0.3, computing=5, sending=1),
    "thin network": Place(download=0.5, upload=0.1, latency=200, peak=100e9, reached=0.3, computing=5, sending=1),
    "slow device": Place(download=200, upload=200, latency=10, peak=2e9, reached=0.3, computing=2, sending=1),
}
NAMES = ("selective", "reparametrised", "additive", "quantised", "sparse", "seeds", "full model")
COLOURS = dict(zip(NAMES, plots.COLORS, strict=True))


def result(study: Study, target: float | None = None, peak: float | None = None) -> dict[str, Any]:
    """A row for each method, and what it was run on.

    Args:
        target: score on validation, for bytes, rounds and steps until it is reached.
        peak: FLOP/s that this machine reaches at most, for MFU (default: measured now, by a matrix product).
    """
    found = methods.result(study, target)
    settings = [setting for setting in study.settings() if setting.rows]
    found["rows"] = [row | of_axes(study, one, target) for row, one in zip(found["rows"], settings, strict=True)]
    found["peak"] = peak or peaks.of(jax.devices()[0]).flops()
    for row in found["rows"]:
        row["mfu"] = axes.mfu(row["flops_per_second"], 1.0, found["peak"])
    return found


def of_axes(study: Study, setting: Setting, target: float | None) -> dict[str, Any]:
    """What the axes ask of a method: means over its seeds and rounds, of one client and round where nothing else is said."""
    runs = [run for run in study.runs() if run.directory in {study.places[cell.key] for cell in setting.cells}]
    lines = [line for run in runs for line in run.rounds]
    config, classes, clients = runs[0].config, len(runs[0].about["classes"]), sum(line["clients"] for line in lines)
    whole = axes.cost.count(axes.peft.parameters(axes.cost.split(config, classes, None)))
    steady = sum(line["seconds"] - line["compile_seconds"] for line in lines)
    held = axes.memory(config, classes, gradients=not config.algorithm.startswith("fed_kseed"))
    rounds = [reached[0] for cell in setting.cells if (reached := rounds_to(study.curve(cell), target))]
    return {
        "family": front.FAMILIES[setting.varied["method"]],
        "total": whole,
        **{way: sum(line[f"bytes_{way}"] for line in lines) / clients for way in ("up", "down")},
        "flops": sum(line["flops"] for line in lines) / clients,
        "steps": config.steps,
        "memory": held._asdict(),
        "examples_per_second": sum(line["examples"] for line in lines) / steady,
        "flops_per_second": sum(line["flops"] for line in lines) / steady,
        "rounds_to_target": statistics.mean(rounds) if rounds else None,
    }


def rounds_to(curve: Sequence[tuple[int, int, float]], target: float | None) -> list[int]:
    """Rounds of the evaluations that reach the target."""
    return [round for round, _, score in curve if target is not None and score >= target]


def work(row: Mapping[str, Any]) -> Work:
    """What a client does in a round of this method."""
    return Work(row["down"], row["up"], row["flops"], row["steps"])


def table(found: Mapping[str, Any]) -> str:
    """Both tables as Markdown: what is measured, and what follows from it on the given places."""
    return f"{measured(found)}\n\n{given(found)}"


def measured(found: Mapping[str, Any]) -> str:
    """Accuracy, and both axes by what was counted and measured."""
    target = found["target"]
    lines = head(
        "method", "family", "accuracy", "rate", "trained", "up", "down", "less than full", "GFLOP", "memory", "steps",
        "MFU", f"rounds to {target:g}", f"bytes to {target:g}", f"steps to {target:g}",
    )  # fmt: skip
    for row in found["rows"]:
        rounds, sent = row["rounds_to_target"], row["bytes_to_target"]
        rate = f"{row['rate']:g}{' (edge)' if row['at_the_edge'] else ''}"
        reached = ["–"] * 3 if rounds is None else [f"{rounds:.3g}", size(sent), f"{rounds * row['steps']:,.0f}"]
        lines.append(
            line(
                row["method"], row["family"], methods.spread(row["scores"]), rate,
                f"{row['parameters'] / row['total']:.3%}", size(round(row["up"])), size(round(row["down"])),
                times(2 * 4 * row["total"] / (row["up"] + row["down"])), f"{row['flops'] / 1e9:.3g}",
                size(sum(row["memory"].values())), row["steps"], f"{row['mfu']:.2g}", *reached,
            )
        )  # fmt: skip
    return "\n".join(lines)


def given(found: Mapping[str, Any]) -> str:
    """T_comm, T_comp, G and energy of a client and round on each place."""
    lines = head("method", *(f"{name}: {what}" for name in PLACES for what in ("T_comm", "T_comp", "G", "J")))
    for row in found["rows"]:
        cells: list[str] = []
        for place in PLACES.values():
            one = axes.times(work(row), place)
            cells += [short(one.communication), short(one.computation), number(one.granularity), number(one.energy)]
        lines.append(line(row["method"], *cells))
    return "\n".join(lines)


def head(*columns: str) -> list[str]:
    """The head of a Markdown table, names to the left and all else to the right."""
    return [line(*columns), "".join("|---" if name in ("method", "family") else "|---:" for name in columns) + "|"]


def number(x: float) -> str:
    """Two digits, all that stand before the point: `0.0079`, `2.5`, `177`."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def draw(found: Mapping[str, Any], file: Path) -> Path:
    """Test accuracy against the bytes of all clients and rounds, and against FLOPs; the Pareto fronts as steps."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = found["rows"]
    sides = (
        (left, "sent by all clients, both ways, MiB", [row["bytes"] / 2**20 for row in rows]),
        (right, "FLOPs of a client and round, $10^9$", [row["flops"] / 1e9 for row in rows]),
    )
    scores = [statistics.mean(row["scores"]) for row in rows]
    for axis, name, costs in sides:
        plots.style(axis)
        axis.set_xscale("log")
        axis.set_xlabel(name)
        best = axes.front(list(zip(costs, scores, strict=True)))
        axis.step(
            [costs[i] for i in best], [scores[i] for i in best], where="post", color="#999999", linewidth=1.2, zorder=1
        )
        for family, colour in COLOURS.items():
            own = [i for i, row in enumerate(rows) if row["family"] == family]
            marker = "*" if family == "seeds" else "o"
            axis.scatter(
                [costs[i] for i in own],
                [scores[i] for i in own],
                s=90 if marker == "*" else 42,
                marker=marker,
                color=colour,
                label=family,
                zorder=2,
            )
        axis.margins(x=0.3, y=0.1)
        label(figure, axis, [(costs[i], scores[i], rows[i]["method"]) for i in best])
    left.set_ylabel("test accuracy")
    left.set_title("communication: the grey line is the front", fontsize=10, loc="left")
    right.set_title("computation", fontsize=10, loc="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return plots.write(figure, file)


def label(figure: Figure, axis: Axes, points: Sequence[tuple[float, float, str]], line: float = 10) -> None:
    """Names to the left of points (x, y, name), none on another: each at least `line` points of height above the one below it."""
    figure.draw_without_rendering()  # before that there is no place on the page
    lowest = -float("inf")
    for x, y, name in sorted(points, key=lambda point: point[1]):
        height = axis.transData.transform((x, y))[1] * 72 / figure.dpi
        lowest = max(height + 3, lowest + line)
        axis.annotate(name, (x, y), xytext=(-7, lowest - height), textcoords="offset points", ha="right", fontsize=8)


def main(
    source: tyro.conf.Positional[Path], keep: Path | None = None, picture: Path | None = None, peak: float | None = None
) -> None:
    """Prints the tables of a sweep's folder, or of a result that is kept.

    Args:
        source: the folder of the sweep, or the file of a result.
        keep: file of the result as JSON.
        picture: file of the picture.
        peak: FLOP/s that the machine of the sweep reaches at most (default: measured now).
    """
    found = json.loads(source.read_text()) if source.is_file() else result(load_sweep(source), front.TARGET, peak)
    if keep is not None:
        methods.write(found, keep)
    if picture is not None:
        draw(found, picture)
    print(table(found))


if __name__ == "__main__":
    tyro.cli(main)
