"""The result of `fedsim profile` for people: tables on the terminal, two pictures. docs/profile.md explains them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report.progress import speed
from fedsim.units import drawn, duration, short, size, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Result = Mapping[str, Any]

ROUND = (
    "plan",
    "gather",
    "begin",
    "forward",
    "backward",
    "update",
    "fold",
    "host",
)  # the pieces that add up to a round
ABOUT = {
    "plan": "which lane runs which batch (host)",
    "gather": "batches out of the examples",
    "begin": "clients' memory, lanes, totals",
    "forward": "to the loss",
    "backward": "its gradients",
    "update": "optimizer, masks, clients' start and finish",
    "fold": "sum over devices, end of the mean",
    "host": "bytes, keys, dispatch, the server's step",
}


def show(result: Result, out: Path) -> None:
    """Prints where time and memory go, the sweep, and the recommended `Speed`."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    base, peak = result["base"], result["peak"]
    console.print(
        f"{result['config']['peft']} on {result['config']['backbone']}: {base['lanes']} lane{'s' * (base['lanes'] > 1)} "
        f"on {base['devices']} device{'s' if base['devices'] > 1 else ''}, {speed(base['clients_per_second'])} clients/s, "
        f"{speed(base['examples_per_second'])} examples/s"
    )
    counted = result["flops"]
    each = ", ".join(
        f"{name} {speed(counted[key] / 1e6)}"
        for name, key in (
            ("forward", "forward"),
            ("gradients of activations", "activations"),
            ("of weights", "weights"),
        )
    )
    console.print(f"{speed(sum(counted.values()) / 1e6)} MFLOP an example: {each}")
    console.print(
        f"{speed(base['flops_per_second'] / 1e9)} GFLOP/s, {base['mfu']:.1%} of {peak['name']} ({peak['source']})\n"
    )
    for part in (time_table(result), apart_table(result), memory_table(result), sweep_table(result)):
        console.print(part)
    for note in result["tiles"] if result["device"]["platform"] != "cpu" else ():  # of no use on a CPU
        console.print(f"on a TPU: {note}")
    options = ", ".join(f"{name}={value!r}" for name, value in result["recommended"].items())
    found = "what was measured here" if options else "no setting was clearly faster than what is set"
    console.print(f"\nrecommended, from {found}:\n\n    Speed({options})\n" if options else f"\nrecommended: {found}\n")
    console.print(f"written: {out}/profile.json, profile.png, roofline.png")


def plain_table(title: str, *columns: str) -> Table:
    """A table without lines; the first column is text, the others are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def time_table(result: Result) -> Table:
    """A round whose every piece is waited for; beside it, the round as it runs."""
    seconds = result["seconds"]
    whole = sum(seconds[name] for name in ROUND)
    table = plain_table("a round, piece by piece", "", "time", "share", "")
    for name in ROUND:
        table.add_row(name, short(seconds[name]), f"{seconds[name] / whole:.1%}", ABOUT[name])
    table.columns[-1].justify = "left"
    base = result["base"]
    free, waiting = statistics.median(base["seconds"]), statistics.median(base["waiting"])
    table.add_row("sum", short(whole), "", "each piece waited for")
    table.add_row("as it runs", short(free), f"{free / whole:.1%}", f"the host waits {waiting / free:.0%} of it")
    return table


def apart_table(result: Result) -> Table:
    """What does not belong to every round."""
    table = plain_table("\nbeside the rounds", "", "")
    table.add_row("compiling", duration(result["base"]["compile_seconds"]))
    for name, value in result["apart"].items():
        table.add_row(name, short(value))
    return table


def memory_table(result: Result) -> Table:
    """Bytes by part."""
    table = plain_table("\nmemory of a device", "", "")
    for name, value in result["memory"].items():
        table.add_row(name, size(value))
    return table


def sweep_table(result: Result) -> Table:
    """One line a setting, beside the base."""
    table = plain_table(
        "\none option at a time",
        "",
        "clients/s",
        "examples/s",
        "GFLOP/s",
        "of peak",
        "lanes",
        "rows",
        "compiling",
    )
    rows: list[dict[str, Any]] = [{"changes": {}, **result["base"]}, *result["sweep"]]
    for row in rows:
        name = ", ".join(f"{k}={v}" for k, v in row["changes"].items()) or "as set"
        if "error" in row:
            table.add_row(words(name), words(row["error"]))
            continue
        table.add_row(
            name,
            speed(row["clients_per_second"]),
            speed(row["examples_per_second"]),
            speed(row["flops_per_second"] / 1e9),
            f"{row['mfu']:.1%}",
            f"{row['lane_occupancy']:.0%}",
            f"{row['row_occupancy']:.0%}",
            duration(row["compile_seconds"]),
        )
    return table


def draw(result: Result, out: Path) -> list[Path]:
    """Draws `profile.png` and `roofline.png` into a folder."""
    from matplotlib.figure import Figure

    from fedsim.report import plots

    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    lanes, times, parts = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    draw_sweep(lanes, result)
    pieces = {name: result["seconds"][name] for name in ROUND}
    draw_bars(times, pieces, "time of a round", [short(v) for v in pieces.values()])
    memory = {name: value for name, value in result["memory"].items() if not name.startswith("host")}
    draw_bars(parts, {k: v / 2**20 for k, v in memory.items()}, "MiB of a device", [size(v) for v in memory.values()])
    roof = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw_roofline(roof.add_subplot(), result)
    return [plots.write(figure, out / "profile.png"), plots.write(roof, out / "roofline.png")]


def draw_sweep(axes: Axes, result: Result) -> None:
    """Examples a second against lanes, where lanes were varied, and as set."""
    from fedsim.report.plots import COLORS, INK, style

    rows = [row for row in result["sweep"] if set(row["changes"]) == {"lanes"} and "error" not in row]
    x, y = [row["lanes"] for row in rows], [row["examples_per_second"] for row in rows]
    low = [row["examples"] / max(row["seconds"]) for row in rows]
    high = [row["examples"] / min(row["seconds"]) for row in rows]
    axes.fill_between(x, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
    axes.plot(x, y, "o-", color=COLORS[0], linewidth=2.0, markersize=4)
    axes.plot(
        result["base"]["lanes"], result["base"]["examples_per_second"], "o", color=COLORS[1], markersize=7, zorder=4
    )
    axes.annotate("as set", (result["base"]["lanes"], result["base"]["examples_per_second"]), (6, -12),
                  textcoords="offset points", fontsize=9, color=COLORS[1])  # fmt: skip
    style(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({*x, result["base"]["lanes"]}), [str(n) for n in sorted({*x, result["base"]["lanes"]})])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("lanes")
    axes.set_title("examples/s", fontsize=11, color=INK, loc="left")


def draw_bars(axes: Axes, values: Mapping[str, float], title: str, labels: list[str]) -> None:
    """Horizontal bars from the top, each with its number."""
    from fedsim.report.plots import COLORS, INK

    names = list(values)
    axes.barh(names, list(values.values()), color=COLORS[0], height=0.62)
    for i, (value, text) in enumerate(zip(values.values(), labels, strict=True)):
        axes.annotate(
            text, (max(value, 0.0), i), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#999999")
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.set_xticks([])
    axes.margins(x=0.22)
    axes.set_title(title, fontsize=11, color=INK, loc="left")


def draw_roofline(axes: Axes, result: Result) -> None:
    """FLOP/s against FLOPs a byte of memory traffic, below what the device can do at most."""
    from fedsim.report.plots import COLORS, GRID, INK

    peak = result["peak"]
    precision = result["speed"].get("precision", "float32")
    top, bandwidth = peak["bfloat16" if precision == "bfloat16" else "float32"], peak["bandwidth"]
    points = [
        (s["name"], s["flops"] / s["bytes"], s["flops"] / statistics.median(s["seconds"]))
        for s in result["steps"]
        if s["bytes"] and s["flops"]
    ]
    ridge = top / bandwidth
    left = min([ridge, *(x for _, x, _ in points)]) / 8
    right = max([ridge, *(x for _, x, _ in points)]) * 8
    axes.plot([left, ridge, right], [left * bandwidth / 1e9, top / 1e9, top / 1e9], color=INK, linewidth=1.6)
    axes.annotate(f"{speed(top / 1e9)} GFLOP/s, {precision}", (right, top / 1e9), (0, 5), textcoords="offset points",
                  ha="right", fontsize=9, color=INK)  # fmt: skip
    middle = math.sqrt(left * ridge)
    axes.annotate(f"{speed(bandwidth / 1e9)} GB/s", (middle, middle * bandwidth / 1e9), (-6, 6), textcoords="offset points",
                  ha="right", fontsize=9, color=INK)  # fmt: skip
    for i, (name, x, y) in enumerate(points):
        limit = min(top, x * bandwidth)
        axes.plot([x, x], [y / 1e9, limit / 1e9], ":", color=COLORS[i], linewidth=1.2)
        axes.plot(
            x, y / 1e9, "o", color=COLORS[i], markersize=8, zorder=3, label=f"{name}: {y / limit:.0%} of its roof"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_xlabel("FLOPs a byte of memory traffic (as compiled)", color=INK)
    axes.set_ylabel("GFLOP/s", color=INK)
    work = f"{result['config']['peft']} on {result['config']['backbone']}"
    axes.set_title(drawn(f"{work}, {peak['name']}"), fontsize=11, color=INK, loc="left")
    axes.legend(fontsize=9, loc="lower right", edgecolor="none", framealpha=0.9, labelcolor=INK)
