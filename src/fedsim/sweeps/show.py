"""A sweep's tables for people: what is done, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedsim.sweeps import folder
from fedsim.sweeps.cells import said, words_of
from fedsim.units import duration, share, size, words

if TYPE_CHECKING:
    from rich.console import Console

    from fedsim.sweeps.study import Setting, Spread, Study


def print_study(study: Study, target: float | None, console: Console | None = None) -> None:
    """Prints a line for each setting: scores over seeds, bytes, bytes to the target score, seconds; the best one is marked."""
    from rich import box
    from rich.table import Table

    out = console or plain_console()
    settings = study.settings()
    best = best_setting(study, settings)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    axes = study.shown()
    counts = {(len(setting.rows), len(setting.cells)) for setting in settings}
    uneven = len(counts) > 1 or any(done != asked for done, asked in counts)
    for name in axes or [""]:  # with spaces, where a narrow terminal breaks it
        made.add_column(words(name).replace("_", " "), overflow="fold", min_width=max(map(len, name.split("_"))))
    for name in (*["cells"] * uneven, "validation", "test", "sent", *["to target"] * (target is not None), "time"):
        made.add_column(name, justify="right", no_wrap=True)
    for setting in settings:
        done, asked = len(setting.rows), len(setting.cells)
        reached, count = study.bytes_to(setting, target)
        to_target = "–" if reached is None else size(reached) + (f"\n({count} of {done})" if count < done else "")
        sent, took = setting.over_seeds("bytes"), setting.over_seeds("seconds")
        made.add_row(
            *([words(said(setting.varied.get(name))) for name in axes] or [""]),
            *[str(done) if done == asked else f"{done} of {asked}"] * uneven,
            mean(setting.over_seeds("validation")) + ("*" if setting is best else ""),
            mean(setting.over_seeds("test")),
            "–" if sent is None else size(round(sent[0])),
            *[to_target] * (target is not None),
            "–" if took is None else duration(took[0]),
        )
    out.print(made)
    for line in said_below(study, target, counts, best is not None):
        out.print(line, soft_wrap=True)


def said_below(study: Study, target: float | None, counts: set[tuple[int, int]], marked: bool) -> list[str]:
    """The lines below the table; `counts` are the numbers of cells, done and asked for, that its lines have."""
    over = f"the {max(counts)[1]} cells" if len(counts) == 1 else "the cells"
    said_ = [
        f"Scores are {study.metric}; bytes go both ways."
        if counts == {(1, 1)}
        else f"Scores are {study.metric}: mean ± deviation over {over} of a line. Bytes and times are means; bytes go both ways."
    ]
    if marked:
        said_.append("* the best on validation, which alone chooses.")
    if target is not None:
        said_.append(
            f"To target: bytes sent until the validation {study.metric} reaches {share(target)}; of the cells that reach it."
        )
    for method, options in study.chosen.items():
        edge = " (at the edge of its values)" if study.edges[method] else ""
        said_.append(f"Chosen on validation{f' for {method}' if method else ''}: {words_of(options)}{edge}")
    failed = [row for row in study.rows() if row["state"] == "failed"]
    said_ += [f"Failed: {row['name']}: {words(row['error'])}" for row in failed[:5]]
    if failed:
        said_.append(f"{len(failed)} cells failed; the same command with --retry runs them again.")
    return said_


def best_setting(study: Study, settings: Sequence[Setting]) -> Setting | None:
    """The setting with the best mean score on validation among those that are done; None of one alone."""
    from fedsim.config import SMALLER

    means = [(spread[0], number) for number, s in enumerate(settings) if (spread := s.over_seeds("validation"))]
    if len(means) < 2:
        return None
    return settings[(min if study.metric in SMALLER else max)(means)[1]]


def mean(found: Spread | None) -> str:
    """`0.735 ± 0.010`, `0.735` of one cell, or a dash."""
    if found is None:
        return "–"
    return share(found[0]) + ("" if found[1] is None else f" ± {share(found[1])}")


def print_cells(study: Study, console: Console | None = None) -> None:
    """Prints how every cell stands, as `fedsim sweep --list` does, and how many stand so."""
    from rich import box
    from rich.table import Table

    out = console or plain_console()
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    made.add_column("cell", overflow="fold")
    for name in ("state", "validation", "test", "sent", "time"):
        made.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    rows = study.rows()
    for row in rows:
        made.add_row(words(row["name"]), state_of(study, row), *figures(row))
    out.print(made)
    for row in rows:
        if row["error"]:
            out.print(f"{words(row['name'])}: {words(row['error'])}", soft_wrap=True)
    if study.tuning:
        places = folder.places(study.directory / folder.TUNING, study.tuning)
        out.print(counted([folder.state(place) for place in places.values()], "runs of tuning"))
    out.print(counted([row["state"] for row in rows], "cells") if rows else "The cells come once tuning is over.")


def counted(states: Sequence[str], what: str) -> str:
    """`3 done, 1 running of 8 cells.`"""
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) + f" of {len(states)} {what}."


def state_of(study: Study, row: dict[str, Any]) -> str:
    """The state of a cell; of one that runs, by whom."""
    by = folder.holder(study.directory / folder.CELLS / row["name"]) if row["state"] == "running" else ""
    return f"{row['state']} ({by})" if by else row["state"]


def figures(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Validation, test, bytes and time of a cell."""
    sent, took = row["bytes"], row["seconds"]
    return (
        share(row["validation"]),
        share(row["test"]),
        "–" if sent is None else size(sent),
        "–" if took is None else duration(took),
    )


def plain_console() -> Console:
    """A console that takes names as they are; wide where nobody looks."""
    import sys

    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)
