"""Results for people: how numbers are written, the summary of a run, closing tables, two runs side by side.

No JAX here, and rich only where something is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.config import differences
from fedsim.record import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

from fedsim.report.summaries import _sum
from fedsim.units import duration, exact_size, share, size, times

# --- closing table


FULL = "full fine-tuning*"


class Row(NamedTuple):
    """A line of the closing table: a method with its results; what is None shows as a dash."""

    name: str
    validation: float | None = None
    test: float | None = None
    rounds: int | None = None
    up: int | None = None
    down: int | None = None
    seconds: float | None = None


def rows(result: Mapping[str, Any], name: str = "this run") -> list[Row]:
    """Three lines from a summary: the start, the run itself, and the bytes of full fine-tuning."""

    def accuracy(when: str, split: str) -> float | None:
        return (result[when][split] or {}).get("accuracy")

    sent, whole, count = result["bytes"], result["full_fine_tuning_bytes"], result["rounds"]
    reached = accuracy("final", "validation"), accuracy("final", "test")
    return [
        Row("start", accuracy("start", "validation"), accuracy("start", "test"), 0, 0, 0),
        Row(name, *reached, count, sent["up"], sent["down"], result["seconds"]),
        Row(FULL, None, None, count, whole["up"], whole["down"]),
    ]


def table(lines: Sequence[Row], title: str = "", reference: str | None = None) -> Table:
    """The closing table, 80 columns wide for names of up to 18 letters.

    Args:
        lines: from top to bottom.
        title: above the table.
        reference: name of the line whose bytes the last column divides by each line's bytes.
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.collapse_padding = True
    made.add_column("", overflow="fold", min_width=17)
    for column in ("valid.", "test", "rounds", "up", "down", "time"):
        made.add_column(column, justify="right", no_wrap=True)
    base = next((total(row) for row in lines if row.name == reference), None)
    if base:
        made.add_column("fewer", justify="right", no_wrap=True)
    for row in lines:
        sent = total(row)
        cells = [
            share(row.validation),
            share(row.test),
            "–" if row.rounds is None else str(row.rounds),
            "–" if row.up is None else size(row.up),
            "–" if row.down is None else size(row.down),
            "–" if row.seconds is None else duration(row.seconds),
        ]
        if base:
            cells.append("–" if not sent or row.name == reference else times(base / sent))
        made.add_row(row.name, *cells)
    return made


def total(row: Row) -> int | None:
    """Bytes both ways of a line without the one-off set-up, or None where they are not known."""
    return None if row.up is None or row.down is None else row.up + row.down


def print_summary(
    result: Mapping[str, Any], *, more: Sequence[Row] = (), name: str = "this run", console: Console | None = None
) -> None:
    """Prints the closing table of a run with the exact bytes below; `more` rows go between the start and the run."""
    start, this, whole = rows(result, name)
    out = console or _console()
    out.print(table([start, *more, this, whole], reference=whole.name))
    sent, full = result["bytes"], result["full_fine_tuning_bytes"]
    said = (
        f"* not run: what it would send in the same rounds to and from the same clients, {exact_size(full['total'])}",
        f"  against {exact_size(sent['total'])} here: {times(result['ratio'])}. The one-off set-up of the clients,",
        f"  {exact_size(sent['setup'])}, counted as well: {times(result['ratio_with_setup'])}.",
        f"Exact bytes: up {sent['up']:,}, down {sent['down']:,}, set-up {sent['setup']:,}.",
        f"Time: {duration(result['seconds'])}, of which {duration(result['compile_seconds'])} went into compiling and "
        f"{duration(result['seconds_in_rounds'] - result['compile_seconds'])} into rounds.",
    )
    for text in said:
        out.print(text, soft_wrap=True)
    for kind, found in (result["final"].get("clients") or {}).items():
        if found["clients"]:
            said_of = f"mean {found['mean']:.3f}, lowest tenth {found['deciles'][0]:.3f}, worst {found['worst']:.3f}"
            clients = f"{found['clients']} client{'s' if found['clients'] > 1 else ''}"
            out.print(f"Own tests of {clients}, {kind} model: {said_of}.", soft_wrap=True)
    if (seen := result.get("simulated")) is not None:
        took = "" if seen["seconds"] is None else f" Simulated time: {duration(seen['seconds'])}."
        lost = ", ".join(f"{seen[name]} {name}" for name in ("unavailable", "dropped", "late", "surplus"))
        out.print(f"Clients: {lost}; {seen['empty_rounds']} rounds without a reply.{took}", soft_wrap=True)
    if result["nonfinite"]:
        out.print(f"[yellow]{result['nonfinite']} replies were left out because they were not finite.[/yellow]")


# --- two runs side by side


def compare(a: Run, b: Run) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Two runs side by side: `config`, `speed` and `machine` hold what differs, `results` holds every result."""
    speeds = [f.name for f in dataclasses.fields(a.speed)]
    facts = [_facts(run.about) for run in (a, b)]
    return {
        "config": differences(a.config, b.config),
        "speed": {k: (getattr(a.speed, k), getattr(b.speed, k)) for k in speeds if _differ(a.speed, b.speed, k)},
        "machine": {k: (facts[0].get(k), facts[1].get(k)) for k in facts[0] | facts[1] if _other(facts, k)},
        "results": {k: (x, y) for (k, x), y in zip(results(a).items(), results(b).values(), strict=True)},
    }


def results(run: Run) -> dict[str, Any]:
    """What a run reached and what it cost, from its summary, or from its rounds while it has none."""
    lines = run.rounds
    seen = [line["validation"] for line in lines if line["validation"]]
    done = run.summary or {}
    final = done.get("final", {})
    up, down, setup = (_sum(lines, k) for k in ("bytes_up", "bytes_down", "setup_bytes"))
    steady = _sum(lines, "seconds") - _sum(lines, "compile_seconds")
    return {
        "rounds": len(lines),
        "validation accuracy": (final.get("validation") or (seen[-1] if seen else {})).get("accuracy"),
        "best validation accuracy": max((v["accuracy"] for v in seen if v["accuracy"] is not None), default=None),
        "test accuracy": (final.get("test") or {}).get("accuracy"),
        "bytes up": up,
        "bytes down": down,
        "bytes up + down": up + down,
        "bytes with set-up": up + down + setup,
        "seconds": done.get("seconds", _sum(lines, "seconds")),
        "clients/s": _sum(lines, "clients") / steady if steady > 0 else None,
        "ended": done.get("stopped", "not yet"),
    }


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, device and commit in one flat dict."""
    device = {f"device {k}": v for k, v in about.get("device", {}).items()}
    rest = {k: about.get(k) for k in ("python", "platform")} | {"commit": (about.get("git") or {}).get("commit")}
    return about.get("versions", {}) | device | rest


def _differ(a: object, b: object, name: str) -> bool:
    return getattr(a, name) != getattr(b, name)


def _other(pair: Sequence[Mapping[str, Any]], name: str) -> bool:
    return pair[0].get(name) != pair[1].get(name)


def print_comparison(a: Run, b: Run, console: Console | None = None) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Prints what differs between two runs, config first, then their results; gives what `compare` gives."""
    from rich import box
    from rich.table import Table

    out = console or _console()
    found = compare(a, b)
    names = [run.directory.resolve().name for run in (a, b)]
    for title, part in found.items():
        if not part and title != "config":
            continue
        if not part:
            out.print("The two runs have the same config.")
            continue
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("")
        for name in names:
            made.add_column(name, justify="right", overflow="fold")
        if title == "results":
            made.add_column("difference", justify="right")
        for key, (x, y) in part.items():
            extra = [_change(key, x, y)] if title == "results" else []
            made.add_row(key, _cell(key, x), _cell(key, y), *extra)
        out.print(made)
    return found


def _cell(name: str, x: Any) -> str:
    if x is None:
        return "–"
    if isinstance(x, int) and name.startswith("bytes"):
        return f"{x:,} B"
    if name == "seconds":
        return duration(x)
    return f"{x:.4f}" if isinstance(x, float) and "accuracy" in name else f"{x:.4g}" if isinstance(x, float) else str(x)


def _change(name: str, x: Any, y: Any) -> str:
    """Accuracies differ by a signed number, costs by a factor."""
    if not isinstance(x, (int, float)) or not isinstance(y, (int, float)):
        return ""
    if "accuracy" in name:
        return f"{y - x:+.4f}"
    return f"×{y / x:.3g}" if x and x != y else ""


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
