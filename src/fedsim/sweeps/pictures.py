"""The picture of a sweep: a score against rounds or bytes, a colour for each method, a band for the seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsim.report import plots
from fedsim.sweeps.cells import AGAIN
from fedsim.units import drawn

if TYPE_CHECKING:
    from fedsim.sweeps.study import Setting, Study

X = {"rounds": "round", "bytes": "sent so far, up and down (MiB)"}


def draw(study: Study, file: Path, x: str) -> Path:
    """Draws the settings that are done, or some of whose cells are, and gives the picture's file.

    Raises:
        ValueError: an unknown x, or no cell with a score.
    """
    if x not in X:
        raise ValueError(f"Expected x={x!r} to be one of {', '.join(X)}.")
    lines = [(setting, line) for setting in study.settings() if (line := mean_line(study, setting, x))]
    if not lines:
        raise ValueError(f"Expected a cell of {study.directory} with a validation {study.metric}; run one first.")
    by = study.method_columns()
    others = [name for name in study.columns if name not in (*by, *AGAIN)]
    methods = list(dict.fromkeys(study.name_of(setting, by) for setting, _ in lines))
    styles = list(dict.fromkeys(study.name_of(setting, others) for setting, _ in lines))
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for setting, line in lines:
        method, style = methods.index(study.name_of(setting, by)), styles.index(study.name_of(setting, others))
        color, dash = look(method, style)
        at, middle, low, high = zip(*line, strict=True)
        label = study.name_of(setting) or study.metric
        axes.plot(at, middle, color=color, linestyle=dash, linewidth=1.8, label=drawn(label),
                  marker=plots.MARKERS[method % len(plots.MARKERS)], markersize=4.5,
                  markevery=plots.marked(len(at), method, len(methods)))  # fmt: skip
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    plots.style(axes)
    axes.set_ylabel(f"validation {study.metric}")
    axes.set_xlabel(X[x])
    if x == "bytes":
        plots.bytes_axis(axes, [line[-1][0] for _, line in lines])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    figure.legend(fontsize=8, loc="outside right upper", labelcolor=plots.INK, frameon=False, handlelength=4)
    return plots.write(figure, file)


def look(method: int, style: int) -> tuple[str, Any]:
    """Colour and dashes of a line: a colour for each method, and other dashes where these have gone round."""
    return (
        plots.COLORS[method % len(plots.COLORS)],
        plots.DASHES[(style + method // len(plots.COLORS)) % len(plots.DASHES)],
    )


def mean_line(study: Study, setting: Setting, x: str) -> list[tuple[float, float, float, float]]:
    """(x, mean, mean - deviation, mean + deviation) at each round at which every one of the setting's cells has a score."""
    curves = [
        {round: (sent, value) for round, sent, value in study.curve(c)}
        for c in setting.cells
        if study.row(c)["state"] == "done"
    ]
    line = []
    for round in sorted(set.intersection(*(set(curve) for curve in curves)) if curves else ()):
        sent, values = zip(*(curve[round] for curve in curves), strict=True)
        middle = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        at = round if x == "rounds" else statistics.mean(sent) / 2**20
        line.append((float(at), middle, middle - spread, middle + spread))
    return line
