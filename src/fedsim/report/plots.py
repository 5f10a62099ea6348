"""Pictures of runs: their metric against rounds and against bytes, one line a run, drawn without a display."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedsim.config import SMALLER, USUAL, metric_of, metric_of_clients
from fedsim.record import Round, Run
from fedsim.report.summaries import is_number, scored
from fedsim.report.tables import matters
from fedsim.units import drawn, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito, 2008
MARKERS, DASHES = "os^DvPX", ("-", "--", "-.", ":", (0, (8, 2)))  # so that lines are told apart without colour
MARKED = 7  # points of a line that carry its marker
INK, GRID = "#333333", "#E3E3E3"
LOG_FROM = 20  # bytes are drawn on a log axis where the dearest run sends this many times more than the cheapest


def save(runs: Sequence[Run], directory: str | PathLike[str], labels: Sequence[str] | None = None) -> list[Path]:
    """Draws `METRIC_rounds.png`, `METRIC_bytes.png` and, of runs on a simulated clock, `METRIC_time.png` into a folder.

    The metric is that of the first run, whose clients' own tests are in `METRIC_clients.png`, where they have any.

    Raises:
        ValueError: no run has an evaluated round.
    """
    metric = metric_of(runs[0].config)
    lines, names, directory = [run.rounds for run in runs], list(labels or label(runs)), Path(directory)
    written = []
    for against in ("rounds", "bytes", "time") if timed(lines) else ("rounds", "bytes"):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        draw(figure.add_subplot(), lines, names, against, methods(runs), metric)
        written.append(write(figure, directory / f"{metric}_{against}.png"))
    if tests := runs[0].clients():
        figure, score = Figure(figsize=(6.4, 4.2), layout="constrained"), metric_of_clients(metric)
        draw_clients(figure.add_subplot(), tests, score)
        written.append(write(figure, directory / f"{score}_clients.png"))
    return written


CLIENT_MODELS = {"global": "the global model", "memory": "with what the client keeps", "tuned": "tuned on its own data"}


def draw_clients(axes: Axes, tests: Sequence[Mapping[str, Any]], metric: str = USUAL) -> None:
    """Draws which share of the clients stays below a score on its own test, for each kind of model.

    Args:
        tests: of `Run.clients`.
    """
    tested = [row[metric] for row in tests if row["test"]]
    for i, kind in enumerate(tested[0] if tested else {}):
        values = sorted(score[kind] for score in tested if is_number(score[kind]))
        if not values:
            continue
        shares = [(k + 1) / len(values) for k in range(len(values))]
        mean = sum(values) / len(values)
        axes.step([values[0], *values], [0, *shares], where="post", color=COLORS[i], linewidth=2.0, zorder=3,
                  label=f"{CLIENT_MODELS[kind]}: mean {mean:.3f}, worst {values[-1 if metric in SMALLER else 0]:.3f}")  # fmt: skip
    axes.set_xlabel(f"{metric} on a client's own test", color=INK)
    axes.set_ylabel("share of clients at or below it", color=INK)
    if metric not in SMALLER:
        axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{len(tested)} clients", fontsize=11, color=INK, loc="left")
    if tested:
        axes.legend(frameon=False, fontsize=9, loc="upper left")


def overview(
    runs: Sequence[Run], path: str | PathLike[str], labels: Sequence[str] | None = None, title: str = ""
) -> Path:
    """Draws runs as one picture, the first one's metric against rounds, bytes and, if they have it, simulated time.

    The names stand below the panels. More runs than there are colours share one where they share a PEFT kind.
    """
    lines, names = [run.rounds for run in runs], list(labels or label(runs))
    panels = ("rounds", "bytes", "time") if timed(lines) else ("rounds", "bytes")
    columns = min(len(runs), 4)
    figure = Figure(figsize=(5.3 * len(panels), 4.2 + 0.25 * -(-(len(runs) + 1) // columns)), layout="constrained")
    if title:
        figure.suptitle(drawn(title), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    for axes, against in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        draw(axes, lines, names, against, methods(runs), metric_of(runs[0].config))
        axes.get_legend().remove()
        if against != "rounds":  # once is enough
            axes.set_ylabel("")
    lines_drawn, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        lines_drawn,
        texts,
        loc="outside lower left",
        ncols=columns,
        fontsize=9,
        labelcolor=INK,
        handlelength=3.0,
        frameon=False,
    )
    return write(figure, Path(path))


def methods(runs: Sequence[Run]) -> list[int] | None:
    """A number for each run, the same for those of one PEFT kind, where there are more runs than colours; else None."""
    if len(runs) <= len(COLORS):
        return None
    kinds = list(dict.fromkeys(run.config.peft for run in runs))
    return [kinds.index(run.config.peft) for run in runs]


def draw(
    axes: Axes,
    runs: Sequence[Sequence[Round]],
    names: Sequence[str],
    against: str,
    colors: Sequence[int] | None = None,
    metric: str = USUAL,
) -> None:
    """Draws a score of each run on validation on one axes; a single run shows that of its training batches too.

    A hollow point is the last round of the head alone, before the PEFT part joins.

    Args:
        axes: where to.
        runs: the rounds of each run.
        names: one for each run.
        against: "rounds"; "bytes": MiB sent both ways so far, without the one-off set-up; or "time": simulated seconds.
        colors: a number for each run; runs of one number share a colour. Left out, each has its own.
        metric: the score.

    Raises:
        ValueError: no run has an evaluated round.
    """
    if not any(scored(lines, metric) for lines in runs):
        raise ValueError(
            f"Expected a validation {metric} in the rounds of {', '.join(map(words, names))}; run at least one round, "
            "with a rate at which the model stays finite."
        )
    place = {"rounds": _number, "bytes": sent, "time": clock}[against]
    joined = False
    for i, (lines, name) in enumerate(zip(runs, names, strict=True)):
        color = COLORS[(i if colors is None else colors[i]) % len(COLORS)]
        style_of = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5.5}
        seen = scored(lines, metric)
        x, y = [place(line) for line in seen], [line["validation"][metric] for line in seen]
        called = drawn(name) if len(runs) > 1 else f"{drawn(name)}, on the validation set"
        axes.plot(x, y, color=color, linestyle=DASHES[i % len(DASHES)], linewidth=1.8, label=called, zorder=3,
                  markevery=marked(len(x), i, len(runs)), **style_of)  # fmt: skip
        if len(runs) == 1:
            train = [line for line in lines if is_number(line.get(metric))]  # not every score is one of training
            axes.plot(
                [place(line) for line in train],
                [line[metric] for line in train],
                color=color,
                linewidth=1.2,
                alpha=0.4,
                label="on its training batches",
                zorder=2,
            )
        for at, height in joins(seen, place, metric):
            axes.plot(
                at, height, "o", color=color, markerfacecolor="white", markersize=7, markeredgewidth=1.8, zorder=4
            )
            joined = True
    if joined:
        hollow = {"color": "#777777", "markerfacecolor": "white", "markersize": 7, "markeredgewidth": 1.8}
        axes.plot([], [], "o", label="PEFT joins the head", **hollow)
    style(axes)
    axes.set_ylabel(metric if len(runs) == 1 else f"validation {metric}")
    if against == "rounds":
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    elif against == "time":
        axes.set_xlabel("simulated time (s)")
        axes.set_xlim(left=0)
    else:
        axes.set_xlabel("sent so far, up and down (MiB)")
        bytes_axis(axes, [sent(lines[-1]) for lines in runs if lines])
    # a frame without a line keeps the grid from crossing the names
    axes.legend(fontsize=9, loc="best", labelcolor=INK, handlelength=3.0, edgecolor="none", framealpha=0.9)


def marked(points: int, line: int, lines: int) -> list[int]:
    """Which of a line's points carry its marker: some, each line's in other places, and the last one."""
    step = max(points // MARKED, 1)
    return sorted({*range(line * step // lines, points, step), max(points - 1, 0)})


def joins(seen: Sequence[Round], place: Callable[[Round], float], metric: str) -> list[tuple[float, float]]:
    """Points on the curve where the phase changes: the last evaluated round before each change."""
    return [
        (place(before), before["validation"][metric])
        for before, after in pairwise(seen)
        if before["phase"] != after["phase"]
    ]


def bytes_axis(axes: Axes, ends: Sequence[float]) -> None:
    """Ticks for MiB on the x axis, logarithmic where the runs' totals `ends` differ much."""
    positive = [n for n in ends if n > 0]
    if positive and max(positive) > LOG_FROM * min(positive):
        axes.set_xscale("log", base=10)
        axes.xaxis.set_major_locator(LogLocator(base=10, numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.10g}"))


def style(axes: Axes) -> None:
    """Quiet axes: no box, a light horizontal grid."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.tick_params(axis="x", length=3, color="#999999")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def label(runs: Sequence[Run]) -> list[str]:
    """A short name for each run from the options in which they differ: `lora, rank=4`; the seed comes last.

    Runs of one config get their folder's name; a single run gets its PEFT kind.
    """
    configs = [dataclasses.asdict(run.config) for run in runs]
    if len(runs) == 1:
        return [configs[0]["peft"]]
    differing = [k for k in configs[0] if any(c[k] != configs[0][k] for c in configs)]
    differing.sort(key=lambda k: (k != "peft", k == "seed"))
    names = [", ".join(_option(k, c[k]) for k in differing if matters(k, c["peft"])) for c in configs]
    if len(set(names)) < len(names) or "" in names:
        folders = [run.directory.resolve().name for run in runs]
        names = [f"{n} ({f})" if n else f for n, f in zip(names, folders, strict=True)]
    return names


def _option(name: str, value: Any) -> str:
    if name in ("peft", "algorithm", "dataset", "backbone"):
        return str(value)
    return f"{name}={'+'.join(value) if isinstance(value, (tuple, list)) else value}"


def sent(line: Round) -> float:
    """MiB both ways up to and with this round, without the one-off set-up."""
    return (line["total_bytes_up"] + line["total_bytes_down"]) / 2**20


def clock(line: Round) -> float:
    """Simulated seconds up to and with this round."""
    return line["simulated"]["total_seconds"]


def timed(runs: Sequence[Sequence[Round]]) -> bool:
    """Whether every round of every run has a simulated time."""
    return all((line.get("simulated") or {}).get("total_seconds") is not None for lines in runs for line in lines)


def _number(line: Round) -> float:
    return line["round"]


def write(figure: Figure, path: Path) -> Path:
    """Writes a PNG of twice the screen's density, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # a name in a script that the font lacks: boxes
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": "fedsim"})
    return path
