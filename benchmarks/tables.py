"""Tables of papers, computed here: `python benchmarks/tables.py fedpeft --table communication`.

    python benchmarks/tables.py --list
    python benchmarks/tables.py fedpeft --table communication --json
    python benchmarks/tables.py fedpeft --table client_stability               # what is kept, and of which commit it is
    python benchmarks/tables.py fedpeft --table client_stability --small       # made again, or gone on with; on 2 cores
    python benchmarks/tables.py fedpeft --table client_stability --full --weights ViT-B_16.npz --data-dir TFDS

Each table is a file of `experiments/`. One that is counted has two functions: `rows()` gives the numbers, `tables(rows)` prints
them for people. One that is trained is a sweep file, `sweep` its small form and `full` its full one: all further options go to
`fedsim sweep`, as --out, --seeds and --jobs, and a stopped command goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from fedsim import load_sweep, own, record
from fedsim.cli import sweeping
from fedsim.config import one_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"


class Paper(NamedTuple):
    """A paper, and its tables by name: the files that make them; none yet where there are none."""

    title: str
    arxiv: str
    tables: dict[str, Path]


FEDPEFT = ("communication", "client_stability", "data_distribution", "data_scarcity", "domain_gap")
PAPERS = {
    "fedpeft": Paper("FedPEFT", "2210.01708", {name: EXPERIMENTS / "fedpeft" / f"{name}.py" for name in FEDPEFT}),
    "dfedalt": Paper("DFedAlt and DFedSalt", "2305.15157", {}),
    "feddm": Paper("FedDM", "2207.09653", {}),
    "fedet": Paper("Fed-ET", "2204.12703", {}),
    "fedobd": Paper("FedOBD", "2208.05174", {}),
    "fedpcl": Paper("FedPCL", "2209.10083", {}),
    "fedptr": Paper("FedPTR", "2312.14380", {}),
    "fedres": Paper("FedRes", "2003.12880", {}),
    "fedsp": Paper("FedSP", "2311.06805", {}),
    "lss": Paper("Local Superior Soups", "2410.23660", {}),
    "survey": Paper("A Survey on Efficient Federated Learning Methods for Foundation Model Training", "2401.04472", {}),
}
ROWS = EXPERIMENTS / "fedpeft" / "rows.py"  # reads a sweep's folder, and prints it as it does a kept result


@dataclass(frozen=True)
class Options:
    """Prints a paper's tables. Options that are not named here go to `fedsim sweep`, with --small or --full."""

    paper: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the paper, as --list gives it."""
    table: str | None = None
    """One of its tables (default: all)."""
    small: bool = False
    """Train the small form where it is not done, and print that instead of what is kept."""
    full: bool = False
    """The same for the full form, for an accelerator."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON: a list with an object for each row."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Name the papers and their tables."""


def main(o: Options, further: Sequence[str] = ()) -> None:
    """Prints what the options ask for.

    Args:
        further: options of `fedsim sweep`.

    Raises:
        ValueError: an unknown paper or table, one without tables, options that do not go together.
    """
    if o.list_ or o.paper is None:
        for name, of in PAPERS.items():
            print(f"{name:<8} {of.title} (arXiv {of.arxiv}): {', '.join(of.tables) or 'not yet'}")
        return
    one_of(tuple(PAPERS), paper=o.paper)
    files = PAPERS[o.paper].tables
    if not files:
        raise ValueError(
            f"Expected paper={o.paper!r} to be one that has tables: not yet. --list names those that have."
        )
    if o.small and o.full:
        raise ValueError("Expected --small or --full, not both; leave one out.")
    if further and not (o.small or o.full):
        raise ValueError(f"Expected {further[0]} with --small or --full, whose sweep takes it; add one of them.")
    if o.table is not None:
        one_of(tuple(files), table=o.table)
    size = "small" if o.small else "full" if o.full else None
    for name in [o.table] if o.table is not None else files:
        module = own.execute(files[name], "table", beside=True)
        if hasattr(module, "rows"):
            counted(module, o.json_)
        else:
            trained(o.paper, name, size, o.json_, further)


def counted(module: ModuleType, json_: bool) -> None:
    """Prints a table that needs no training."""
    rows = module.rows()
    if json_:
        print(json.dumps(record.plain(rows), indent=1))
        return
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    for part in module.tables(rows):
        out.print(part)


def trained(paper: str, name: str, size: str | None, json_: bool, further: Sequence[str]) -> None:
    """Prints a table of trained cells: the kept one, or that of its sweep, which is run as far as it is not done.

    Args:
        size: "small" or "full"; None for what is kept.
        further: options of `fedsim sweep`.

    Raises:
        ValueError: cells that failed; whatever the sweep refuses.
    """
    rows = own.execute(ROWS, "table", beside=True)
    if size is None:
        file = RESULTS / f"{paper}_{name}_small.json"
        found: dict[str, Any] = json.loads(file.read_text())
        runs = [seed for methods in found["cells"].values() for seeds in methods.values() for seed in seeds.values()]
        source, found["git"] = file.name, rows.commits([run["git"] for run in runs])
    else:
        file = PAPERS[paper].tables[name]
        # One folder for all tables: what cells have in common, as the search for rates, is run once.
        place = [] if any(word.startswith("--out") for word in further) else ["--out", f"runs/{paper}-{size}"]
        argv = [f"{file}:full" if size == "full" else str(file), *further, *place, *(["--quiet"] if json_ else [])]
        options, _, where = sweeping.read(argv)
        if sweeping.sweep(argv):
            raise ValueError(
                f"Expected every cell in {where} to end well; `fedsim compare {where}` says which did not."
            )
        if options.list or options.dry_run:
            return
        source, found = str(where), rows.result(load_sweep(where))
    if json_:
        print(json.dumps(record.plain(found["rows"]), indent=1))
    else:
        print(f"{name}, {source}, commit {', '.join(found['git']) or 'unknown'}:\n\n{rows.table(found)}\n")


if __name__ == "__main__":
    try:
        main(*tyro.cli(Options, return_unknown_args=True))
    except ValueError as error:
        sys.exit(f"tables: {error}")
