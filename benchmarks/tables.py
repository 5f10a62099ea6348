"""Tables of papers, computed here: `python benchmarks/tables.py fedpeft --table communication`.

    python benchmarks/tables.py --list
    python benchmarks/tables.py fedpeft --table communication --json

Each table is a file of `experiments/` with two functions: `rows()` gives the numbers, `tables(rows)` prints them for people.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fedsim import own, record
from fedsim.config import one_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TABLES: dict[str, dict[str, Path]] = {
    "fedpeft": {"communication": EXPERIMENTS / "fedpeft" / "communication.py"},
}


def main(
    paper: Annotated[str | None, tyro.conf.Positional] = None,
    table: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> None:
    """Prints a paper's tables.

    Args:
        paper: name of the paper, as --list gives it.
        table: one of its tables (default: all).
        json_: print JSON: a list with an object for each row.
        list_: name the papers and their tables.
    """
    if list_ or paper is None:
        for name, there in TABLES.items():
            print(f"{name}: {', '.join(there)}")
        return
    one_of(tuple(TABLES), paper=paper)
    if table is not None:
        one_of(tuple(TABLES[paper]), table=table)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    for name in [table] if table is not None else TABLES[paper]:
        module = own.execute(TABLES[paper][name], "table")
        rows = module.rows()
        if json_:
            print(json.dumps(record.plain(rows), indent=1))
            continue
        for part in module.tables(rows):
            out.print(part)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"tables: {error}")
