"""Two results of one benchmark, figure by figure: medians, their ratio, and what moved by more than the repeats scatter.

    python benchmarks/compare.py OLD.json NEW.json
    python benchmarks/compare.py benchmarks/results/lanes.json --against HEAD~10    # the same file as that commit has it
    python benchmarks/compare.py v0.1.0:benchmarks/results/lanes.json benchmarks/results/lanes.json

A figure is every number, or list of repeats, in `results`. It moved where no repeat of the one lies within the repeats
of the other; a figure without repeats has no spread, so nothing is said of it but its ratio. Also compared are two files
of `experiments/million_clients.py`, and two `profile.json` of `fedsim profile`. Needs no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

MACHINE = ("processor", "cores", "device", "platform", "python", "versions")
ROWS = {
    "batch_shapes": ("work", "devices", "lanes", "widths"),
    "client_count": ("form", "members", "population", "devices", "lanes", "least_seconds"),
    "codecs": ("codec", "dimension", "vector"),
    "exchange": ("members", "heard"),
    "layers": ("backbone", "variant"),
    "peers": ("workload", "system"),
    "peers-gpu": ("workload", "system"),
    "population": ("clients", "examples"),
    "scaling": ("kind", "how", "devices", "processes"),
}
"""Benchmark -> what tells its rows apart, where they have no `name` and their first entry is not enough."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """OLD and NEW, or one file and --against. Each is a JSON file, or REV:PATH for a file as a commit has it."""
    against: str | None = None
    """A commit, branch or tag: the one file is NEW, and what that commit has under its name is OLD."""
    all: bool = False
    """Also show figures that are the same."""


class Row(NamedTuple):
    """One figure in both results."""

    name: str
    old: float  # medians
    new: float
    ratio: float | None  # new / old; None where old is 0
    moved: bool | None  # beyond the spread of the repeats; None where one of them has no repeats


def read(place: str) -> dict[str, Any]:
    """The result in a JSON file, or in a file of a commit, `REV:PATH`.

    Raises:
        ValueError: no such file, no such commit, or no result of a benchmark in it.
    """
    if not Path(place).is_file() and ":" in place:
        text = show(*place.split(":", 1))
    else:
        try:
            text = Path(place).read_text()
        except OSError as error:
            raise ValueError(
                f"Expected {place} to be a file ({error.strerror}); name a JSON file or REV:PATH."
            ) from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {place} to hold JSON ({error}); give what a benchmark has written.") from None
    found = adopted(found) if isinstance(found, dict) else {}
    if not {"benchmark", "results"} <= found.keys():
        raise ValueError(
            f"Expected {place} to have `benchmark` and `results`; give what a benchmark, experiments/million_clients.py or "
            "`fedsim profile` (its profile.json) has written."
        )
    return found


def adopted(found: dict[str, Any]) -> dict[str, Any]:
    """A file of `experiments/million_clients.py` or of `fedsim profile` in the form of a benchmark's; any other as it is."""
    if {"schema", "base", "sweep", "speed"} <= found.keys():
        kept = ("base", "flops", "seconds", "apart", "memory", "steps", "sweep")
        options = {**found["config"], **found["speed"], "phase": found["phase"]}
        return {
            **found,
            "benchmark": "profile",
            "options": options,
            "results": {k: found[k] for k in kept if k in found},
        }
    cells = found.get("cells")
    if found.keys() == {"cells"} and cells and all({"form", "population"} <= cell.keys() for cell in cells.values()):
        about = (*MACHINE, "git", "processes", "time")
        first = cells[next(iter(cells))]  # each cell says where it was measured; what differs is not looked for
        rows = [
            # Earlier files do not say these two, and give lanes to the store, which has none.
            {"devices": 1, "least_seconds": 4.0, **cell} if cell["form"] != "memory" else {**cell, "lanes": None}
            for cell in cells.values()
        ]
        results = [{k: v for k, v in row.items() if k not in about and v is not None} for row in rows]
        return {k: first[k] for k in about if k in first} | {"benchmark": "client_count", "results": results}
    return found


def show(revision: str, path: str) -> str:
    """A file as a commit has it; the path as seen from here, or from the root of the repository.

    Raises:
        ValueError: git does not find it; with git's own words.
    """
    file = Path(path).absolute()
    folder = next(p for p in file.parents if p.is_dir())
    tried = [(f"{revision}:./{file.relative_to(folder)}", folder), (f"{revision}:{path}", Path.cwd())]
    reason = ""
    for name, place in tried:
        done = subprocess.run(["git", "show", name], capture_output=True, text=True, cwd=place, check=False)
        if done.returncode == 0:
            return done.stdout
        reason = done.stderr.strip()
    raise ValueError(f"Expected commit {revision!r} to have {path}; {reason}.")


def figures(tree: Any, name: str = "", keys: Sequence[str] = ()) -> Iterator[tuple[str, list[float]]]:
    """Every number below `tree` as (path, repeats).

    Rows of a list are named by `name`, else by those of `keys` that they have, else by their first entry. Repeats may lie in
    lists of lists, as rounds within repeats.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from figures(value, joined(name, str(key)), keys)
    elif is_number(tree):
        yield name, [float(tree)]
    elif isinstance(tree, Sequence) and not isinstance(tree, str) and tree:
        if (flat := numbers(tree)) is not None:
            yield name, flat
            return
        for place, value in enumerate(tree):
            label = str(place)
            if isinstance(value, Mapping) and value:
                label, used = named(value, keys)
                value = {k: v for k, v in value.items() if k not in used}
            yield from figures(value, joined(name, label), keys)


def named(row: Mapping[str, Any], keys: Sequence[str] = ()) -> tuple[str, Sequence[str]]:
    """The label of a row, and the entries that it is made of."""
    if "name" in row:
        return str(row["name"]), ("name",)
    used = [key for key in keys if key in row] or [next(iter(row))]
    return ", ".join(f"{key} {plain(row[key])}" for key in used), used


def plain(value: Any) -> str:
    """A value within a label: lists and mappings as words."""
    if isinstance(value, Mapping):
        return " ".join(f"{k} {plain(v)}" for k, v in value.items())
    return " ".join(map(plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def joined(name: str, more: str) -> str:
    """A path one step further down."""
    return f"{name} / {more}" if name else more


def numbers(tree: Sequence[Any]) -> list[float] | None:
    """All numbers of a list, or of lists within it; None where it holds anything else."""
    found: list[float] = []
    for value in tree:
        if is_number(value):
            found.append(float(value))
        elif isinstance(value, Sequence) and not isinstance(value, str) and (below := numbers(value)) is not None:
            found += below
        else:
            return None
    return found


def by_path(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The figures of a result by path; what `benchmarks/peers/run.py --fresh` writes of each start is one figure's repeats.

    Raises:
        ValueError: two figures have the same path.
    """
    found: dict[str, list[float]] = {}
    keys = ROWS.get(result["benchmark"], ())
    for path, repeats in figures(result["results"], keys=keys):
        if path in found and not result["benchmark"].startswith("peers"):
            raise ValueError(
                f"Expected every figure of {result['benchmark']!r} to have a path of its own, but {path!r} is there twice; "
                "give its rows a `name`, or add what tells them apart to ROWS in benchmarks/compare.py."
            )
        found.setdefault(path, []).extend(repeats)
    return found


def is_number(value: Any) -> bool:
    """A number that is no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """The figures that both results have, in the order of the new one, and what else there is to know.

    Raises:
        ValueError: results of two different benchmarks, or figures that cannot be told apart.
    """
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(
            f"Expected two results of one benchmark, not of {old['benchmark']!r} and {new['benchmark']!r}; give the same "
            "file of two commits."
        )
    before, after = by_path(old), by_path(new)
    rows = []
    for name in (n for n in after if n in before):
        a, b = before[name], after[name]
        one, other = statistics.median(a), statistics.median(b)
        apart = max(a) < min(b) or max(b) < min(a) if min(len(a), len(b)) > 1 else None
        rows.append(Row(name, one, other, other / one if one else None, apart))
    notes = [
        f"{key} differs: {differing(old.get(key), new.get(key))}" for key in MACHINE if old.get(key) != new.get(key)
    ]
    if notes:
        notes.insert(0, "another machine or other versions: ratios say little about the code")
    if old.get("options") != new.get("options"):
        notes.insert(0, f"not the same work, options differ: {differing(old.get('options'), new.get('options'))}")
    for which, one, other in (("old", before, after), ("new", after, before)):
        if only := [n for n in one if n not in other]:
            notes.append(f"only in the {which} one: {', '.join(only)}")
    for which, result in (("old", old), ("new", new)):
        if (result.get("git") or {}).get("changed"):
            notes.append(f"the {which} one was measured with changes that its commit does not have")
    return rows, notes


def differing(old: Any, new: Any) -> str:
    """What differs, as `key old -> new` for mappings."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in keys)
    return f"{old} -> {new}"


def about(result: Mapping[str, Any]) -> str:
    """Commit, date and load of a result, in a line."""
    commit = str((result.get("git") or {}).get("commit") or "no commit")[:12]
    load = (result.get("load") or [None])[0]
    return f"{commit}  {result.get('time', '')}" + ("" if load is None else f"  load {load:.1f}")


def number(value: float) -> str:
    """Four digits, whole numbers whole."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def main(o: Options) -> None:
    """Prints the comparison.

    Raises:
        ValueError: files that cannot be compared.
    """
    from rich.console import Console
    from rich.table import Table

    if len(o.files) != (1 if o.against else 2):
        raise ValueError(f"Expected two files, or one with --against REV, not {len(o.files)}; see --help.")
    old, new = read(f"{o.against}:{o.files[0]}" if o.against else o.files[0]), read(o.files[-1])
    rows, notes = compare(old, new)
    shown = [row for row in rows if o.all or row.old != row.new]
    table = Table("figure", box=None, pad_edge=False)
    for title in ("old", "new", "new/old", ""):
        table.add_column(title, justify="right" if title else "left")
    for row in shown:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, number(row.old), number(row.new), ratio, "moved" if row.moved else "")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    print(f"{new['benchmark']}\n  old  {about(old)}\n  new  {about(new)}\n")
    console.print(table)
    moved = sum(bool(row.moved) for row in rows)
    print(f"\n{moved} of {sum(row.moved is not None for row in rows)} figures with repeats moved beyond their spread; "
          f"{len(rows) - len(shown)} equal figures are not shown.")  # fmt: skip
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(f"compare: {error}")
