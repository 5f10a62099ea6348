"""Results for people: how numbers are written, the summary of a run, closing tables, two runs side by side.

No JAX here, and rich only where something is printed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.config import OF_PEFT, SCORES, SMALLER, USUAL, Config, metric_of, metric_of_clients
from fedsim.record import Run, load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

from fedsim.report.summaries import _sum, best_of, clients_seconds, has_diverged, judge
from fedsim.units import duration, exact_size, share, size, times, words

Compared = dict[str, dict[str, tuple[Any, ...]]]  # part -> name -> the value of each run

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


def rows(result: Mapping[str, Any], name: str = "this run", *, is_full: bool = False) -> list[Row]:
    """Lines from a summary: the start, the run itself, and the bytes of full fine-tuning unless the run `is_full`."""

    def value(when: str, split: str) -> float | None:
        return (result[when][split] or {}).get(judge(result))

    sent, whole, count = result["bytes"], result["full_fine_tuning_bytes"], result["rounds"]
    reached = value("final", "validation"), value("final", "test")
    found = [
        Row("start", value("start", "validation"), value("start", "test"), 0, 0, 0),
        Row(name, *reached, count, sent["up"], sent["down"], result["seconds"]),
    ]
    return found if is_full else [*found, Row(FULL, None, None, count, whole["up"], whole["down"])]


NAME, NARROW = 17, 12  # letters of a name before it is folded: as wide as can be, and on a narrow terminal
LESS = ("fewer", "rounds", "valid.")  # columns that a narrow terminal does without, the first ones first


def table(lines: Sequence[Row], title: str = "", reference: str | None = None, without: Sequence[str] = ()) -> Table:
    """The closing table, 80 columns wide for names of up to 18 letters.

    Args:
        lines: from top to bottom.
        title: above the table.
        reference: name of the line whose bytes the last column divides by those of each line of as many rounds.
        without: columns that are left out.
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.collapse_padding = True
    made.add_column("", overflow="fold", min_width=NARROW if without else NAME)
    base = next((row for row in lines if row.name == reference and total(row)), None)
    columns = [c for c in ("valid.", "test", "rounds", "up", "down", "time", "fewer") if c not in without]
    columns = [c for c in columns if base is not None or c != "fewer"]
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for row in lines:
        cells = written(row, base)
        made.add_row(plain_text(row.name), *(cells[column] for column in columns))
    return made


def written(row: Row, base: Row | None) -> dict[str, str]:
    """The cells of a line by column, but for its name; `base` is the line of the reference."""
    return {
        "valid.": share(row.validation),
        "test": share(row.test),
        "rounds": "–" if row.rounds is None else str(row.rounds),
        "up": "–" if row.up is None else size(row.up),
        "down": "–" if row.down is None else size(row.down),
        "time": "–" if row.seconds is None else duration(row.seconds),
        "fewer": times(fewer(row, base)),
    }


def fitting(lines: Sequence[Row], width: int, reference: str) -> tuple[str, ...]:
    """The columns to leave out of a table so that it fits into a width, its names folded to `NARROW` at least."""
    base = next((row for row in lines if row.name == reference and total(row)), None)
    cells = [written(row, base) for row in lines]
    most = {name: max(len(name), *(len(each[name]) for each in cells)) for name in cells[0]}
    for count in range(len(LESS) + 1):
        kept = [n for name, n in most.items() if name not in LESS[:count] and (base is not None or name != "fewer")]
        if sum(kept) + (NARROW if count else NAME) + 2 * (len(kept) + 1) <= width:
            return LESS[:count]
    return LESS


def fewer(row: Row, base: Row | None) -> float | None:
    """How many times the bytes of a line those of another are; None where their rounds, or what is known, differ."""
    if base is None or base is row or row.rounds != base.rounds or not total(row):
        return None
    return (total(base) or 0) / (total(row) or 1)


def plain_text(name: object) -> Text:
    """A name for rich, which neither it nor the terminal reads as a command."""
    from rich.text import Text

    return Text(words(name))


def total(row: Row) -> int | None:
    """Bytes both ways of a line without the one-off set-up, or None where they are not known."""
    return None if row.up is None or row.down is None else row.up + row.down


def print_summary(
    result: Mapping[str, Any],
    *,
    more: Sequence[Row] = (),
    name: str = "this run",
    is_full: bool = False,
    console: Console | None = None,
) -> None:
    """Prints the closing table of a run with the exact bytes below; `more` rows go between the start and the run.

    Args:
        is_full: the run is full fine-tuning itself, with which there is nothing to compare it.
    """
    start, *own = rows(result, name, is_full=is_full)
    out = console or _console()
    lines = [start, *more, *own]
    without = fitting(lines, out.width, FULL)
    title = "" if judge(result) == USUAL else judge(result)
    out.print(table(lines, title, reference=FULL, without=without))
    for text in said_of(result, is_full=is_full, without=without):
        out.print(plain_text(text), soft_wrap=out.width >= 80)  # a narrow terminal gets folded lines


def said_of(result: Mapping[str, Any], *, is_full: bool, without: Sequence[str]) -> list[str]:
    """The lines below the closing table."""
    sent, full = result["bytes"], result["full_fine_tuning_bytes"]
    said = []
    if without:
        said.append(f"Too narrow for {', '.join(without)}: 80 columns show all.")
    if not is_full:
        said += [
            f"* not run: what it would send in the same rounds to and from the same clients, {exact_size(full['total'])}",
            f"  against {exact_size(sent['total'])} here: {times(result['ratio'])}. The one-off set-up of the clients,",
            f"  {exact_size(sent['setup'])}, counted as well: {times(result['ratio_with_setup'])}.",
        ]
    said += [
        f"Exact bytes: up {sent['up']:,}, down {sent['down']:,}, set-up {sent['setup']:,}.",
        f"Time: {duration(result['seconds'])}, of which {duration(result['compile_seconds'])} went into compiling and "
        f"{duration(result['seconds_in_rounds'] - result['compile_seconds'])} into rounds.",
    ]
    metric = metric_of_clients(judge(result))
    said += [of_clients(kind, found, metric) for kind, found in (result["final"].get("clients") or {}).items()]
    if (seen := result.get("simulated")) is not None:
        took = "" if seen["seconds"] is None else f" Simulated time: {duration(seen['seconds'])}."
        lost = ", ".join(f"{seen[name]} {name}" for name in ("unavailable", "dropped", "late", "surplus"))
        said.append(f"Clients: {lost}; {seen['empty_rounds']} rounds without a reply.{took}")
    if (spent := result.get("privacy")) is not None:
        said.append(of_privacy(spent))
    if result["nonfinite"]:
        said.append(f"{result['nonfinite']} replies were left out because they were not finite.")
    for split in ("validation", "test"):
        final = result["final"].get(split)
        if has_diverged(final):
            said.append(f"The final model's outputs are not finite on the {split} set, so it has no scores there.")
    return [line for line in said if line]


def of_privacy(spent: Mapping[str, Any]) -> str:
    """What was spent, with all that it is of."""
    other = {"pld": "rdp", "rdp": "pld"}[spent["accountant"]]
    beside = "" if spent.get(f"epsilon_{other}") is None else f" ({spent[f'epsilon_{other}']:.4g} by {other.upper()})"
    at = f"epsilon {spent['epsilon']:.4g} at delta {spent['delta']:g} by {spent['accountant'].upper()}{beside}"
    return (
        f"Privacy, dp={spent['dp']}: {at}, of one {spent['unit']}; neighbours {spent['relation'].replace('_', ' ')}, sampling "
        f"{spent['sampling']}, noise multiplier {spent['noise_multiplier']:.4g}. Simulated noise. Counts, bytes, times and training "
        "scores are not private."
    )


def of_clients(kind: str, found: Mapping[str, Any], metric: str = USUAL) -> str:
    """A line on clients' own tests; nothing where none has one."""
    broken, count = found.get("nonfinite", 0), found["clients"]
    left_out = f"; {broken} more without finite outputs" if broken else ""
    clients = f"{count} client{'' if count == 1 else 's'}"
    if not count:
        return f"Own tests of {clients}, {kind} model{left_out}." if broken else ""
    tenth = (
        f"highest tenth {found['deciles'][-1]:.3f}" if metric in SMALLER else f"lowest tenth {found['deciles'][0]:.3f}"
    )
    name = "" if metric == USUAL else f"{metric} "
    spread = f"{name}mean {found['mean']:.3f}, {tenth}, worst {found['worst']:.3f}"
    return f"Own tests of {clients}, {kind} model: {spread}{left_out}."


# --- two runs side by side


def compare(a: Run | str | PathLike[str], b: Run | str | PathLike[str], *more: Run | str | PathLike[str]) -> Compared:
    """Runs, or their folders, side by side: `config`, `inputs`, `speed` and `machine` hold what differs, `results` every result.

    Options that mean nothing for a run's PEFT kind are None there, and left out where they mean nothing for any.
    """
    runs = [opened(run) for run in (a, b, *more)]
    configs = [meant(run.config) for run in runs]
    facts = [_facts(run.about) for run in runs]
    return {
        "config": different(configs),
        "inputs": different([_inputs(run.about) for run in runs]),
        "speed": different([dataclasses.asdict(run.speed) for run in runs]),
        "machine": different(facts),
        "results": together([results(run) for run in runs]),
    }


def opened(run: Run | str | PathLike[str]) -> Run:
    """The run, read where it is given by its folder."""
    return load(os.fspath(run)) if isinstance(run, (str, PathLike)) else run


def together(found: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Every name -> the value of each, None where one has none, as of a metric that is another run's."""
    names = dict.fromkeys(name for each in found for name in each)
    return {name: tuple(each.get(name) for each in found) for name in names}


def different(facts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What differs: name -> the value of each, None where one has none."""
    return {name: of for name, of in together(facts).items() if any(value != of[0] for value in of)}


def meant(config: Config) -> dict[str, Any]:
    """The options of a config that say something about its PEFT kind."""
    return {name: value for name, value in dataclasses.asdict(config).items() if matters(name, config.peft)}


def matters(name: str, peft: str) -> bool:
    """Whether an option says something about a PEFT kind, or several joined by `+`."""
    kinds = [part.strip() for part in peft.split("+")]
    if name in ("head_lr", "head_rounds"):  # rounds of the head alone come before another kind
        return kinds != ["head"]
    return name not in OF_PEFT or any(kind in OF_PEFT[name] for kind in kinds)


def results(run: Run) -> dict[str, Any]:
    """What a run reached and what it cost, from its summary, or from its rounds while it has none."""
    lines, metric = run.rounds, metric_of(run.config)
    best = best_of(lines, metric)
    seen = [line["validation"] for line in lines if line["validation"]]
    done = run.summary or {}
    final = done.get("final", {})
    up, down, setup = (_sum(lines, k) for k in ("bytes_up", "bytes_down", "setup_bytes"))
    steady = clients_seconds(lines)
    return {
        "rounds": len(lines),
        f"validation {metric}": (final.get("validation") or (seen[-1] if seen else {})).get(metric),
        f"best validation {metric}": best and best["validation"][metric],
        f"test {metric}": (final.get("test") or {}).get(metric),
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


def _inputs(about: Mapping[str, Any]) -> dict[str, str]:
    """First digits of the hashes of what a run was given: its data, and files that it read."""
    files = {name: file.get("sha256", "") for name, file in about.get("files", {}).items()}
    return {name: digest[:12] for name, digest in {"data": about.get("data_hash", ""), **files}.items() if digest}


def print_comparison(
    a: Run | str | PathLike[str],
    b: Run | str | PathLike[str],
    *more: Run | str | PathLike[str],
    console: Console | None = None,
) -> Compared:
    """Prints what differs between runs, config first, then their results; gives what `compare` gives."""
    from rich import box
    from rich.table import Table

    out = console or _console()
    runs = [opened(run) for run in (a, b, *more)]
    found = compare(*runs)
    for title, part in found.items():
        if not part and title != "config":
            continue
        if not part:
            out.print("The two runs have the same config." if len(runs) == 2 else "The runs have the same config.")
            continue
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("", overflow="fold")
        for run in runs:
            made.add_column(plain_text(run.directory.resolve().name), justify="right", overflow="fold")
        change = title == "results" and len(runs) == 2
        if change:
            made.add_column("difference", justify="right")
        for key, values in part.items():
            extra = [_change(key, *values)] if change else []
            made.add_row(key, *(plain_text(_cell(key, value)) for value in values), *extra)
        out.print(made)
    return found


def _cell(name: str, x: Any) -> str:
    if x is None:
        return "–"
    if isinstance(x, int) and name.startswith("bytes"):
        return f"{x:,} B"
    if name == "seconds":
        return duration(x)
    return f"{x:.4f}" if isinstance(x, float) and _is_score(name) else f"{x:.4g}" if isinstance(x, float) else str(x)


def _is_score(name: str) -> bool:
    return name.rpartition(" ")[2] in SCORES


def _change(name: str, x: Any, y: Any) -> str:
    """Scores differ by a signed number, costs by a factor."""
    if not isinstance(x, (int, float)) or not isinstance(y, (int, float)):
        return ""
    if _is_score(name):
        return f"{y - x:+.4f}"
    return f"×{y / x:.3g}" if x and x != y else ""


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
