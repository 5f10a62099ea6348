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
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from fedsim import load_sweep, own, record
from fedsim.cli import sweeping
from fedsim.config import one_of

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
RESULTS = EXPERIMENTS / "results"
PAGES = ROOT / "docs" / "algorithms"
DEPARTS = "Where it departs from the paper"  # heading of a page


class Paper(NamedTuple):
    """A paper, and its tables by name: the files that make them; none yet where there are none."""

    title: str
    arxiv: str
    tables: Mapping[str, Path]
    row: str = ""  # which stands for it in --summary
    oracles: str = ""  # those of its specification that are tests, by letter
    base: str = "FedAvg"  # the row that it is compared with
    table: str = ""  # of that row; the first one where it is not said
    page: str = ""  # where it is not docs/algorithms/NAME.md
    code: str = ""  # pattern of its files, where it is not algorithms/NAME.py


def files(folder: str, *names: str) -> dict[str, Path]:
    """The files of a paper's tables."""
    return {name: EXPERIMENTS / folder / f"{name}.py" for name in names}


FEDPEFT = ("communication", "client_stability", "data_distribution", "data_scarcity", "domain_gap", "privacy")
PAPERS = {
    "fedpeft": Paper(
        "FedPEFT",
        "2210.01708",
        files("fedpeft", *FEDPEFT),
        "none, LoRA q, v, r = 4",
        "–",
        base="none, full",
        table="privacy",
        page="docs/fedpeft.md",
        code="src/fedsim/algorithms/fed_avg.py",
    ),
    "superior_soups": Paper(
        "Local Superior Soups",
        "2410.23660",
        files("superior_soups", "few_rounds"),
        "LSS, code, 1 round",
        "a-f",
        base="FedAvg, equal rounds, 1 round",
    ),
    "fed_ptr": Paper("FedPTR", "2312.14380", files("fed_ptr", "trajectories"), "FedPTR 0.1", "a-f"),
    "fed_obd": Paper("FedOBD", "2208.05174", files("fed_obd", "communication"), "FedOBD", "a-f"),
    "dfed_salt": Paper("DFedAlt and DFedSalt", "2305.15157", files("dfed_salt", "gossip"), "DFedSalt, ring", "a-g"),
    "fed_res": Paper(
        "Federated Residual Learning", "2003.12880", files("fed_res", "concept_shift"), "FedRes avg", "a-g"
    ),
    "fed_dm": Paper("FedDM", "2207.09653", files("fed_dm", "few_rounds"), "FedDM", "a-g"),
    "fed_et": Paper("Fed-ET", "2204.12703", files("fed_et", "architectures"), "Fed-ET", "a-f", base="FedAvg, smallest"),
    "fed_pcl": Paper("FedPCL", "2209.10083", files("fed_pcl", "domains", "downlink"), "FedPCL", "a-f"),
    "fed_sp": Paper("FedSP", "2311.06805", files("fed_sp", "speakers"), "FedSP", "a-e", base="FedPrompt"),
    "llm": Paper("FedIT, FFA-LoRA, FLoRA and FedSA-LoRA on a decoder", "2305.05644", files("llm", "speakers")),
    "survey": Paper(
        "A Survey on Efficient Federated Learning Methods for Foundation Model Training",
        "2401.04472",
        files("survey", "front", "counted"),
        "LoRA, all blocks",
        "5.5",
        base="full",
        page="docs/efficiency.md",
        code="experiments/survey/*.py",
    ),
}
# Either reads a sweep's folder, and prints it as it does a kept result.
ROWS = EXPERIMENTS / "fedpeft" / "rows.py"  # of FedPEFT's axes, with accuracies at equal bytes
METHODS = EXPERIMENTS / "methods.py"
SURVEY = EXPERIMENTS / "survey" / "efficiency.py"  # of METHODS', with both axes


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
    summary: bool = False
    """Each system beside FedAvg in its own experiment, as kept: the table of docs/algorithms/README.md."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Name the papers and their tables."""


def main(o: Options, further: Sequence[str] = ()) -> None:
    """Prints what the options ask for.

    Args:
        further: options of `fedsim sweep`.

    Raises:
        ValueError: an unknown paper or table, one without tables, options that do not go together.
    """
    if o.summary:
        print(summary())
        return
    if o.list_ or o.paper is None:
        for name, of in PAPERS.items():
            print(f"{name:<14} {of.title} (arXiv {of.arxiv}): {', '.join(of.tables) or 'not yet'}")
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


def summary() -> str:
    """Markdown: a row for each system, of its kept result and of its file."""
    methods = own.execute(METHODS, "table", beside=True)
    columns = [
        "system",
        "oracles",
        "score",
        "FedAvg's",
        "bytes / FedAvg's",
        "seconds / FedAvg's",
        "lines",
        "departures",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * 6]
    for name, paper in PAPERS.items():
        if not paper.row:
            continue
        kept = json.loads((RESULTS / f"{name}_{paper.table or next(iter(paper.tables))}_small.json").read_text())
        rows = {row["method"]: row for row in kept["rows"]}
        one, base = rows[paper.row], rows[paper.base]
        scores = [methods.spread(row["scores"]) for row in (one, base)]
        ratios = [methods.ratio(one[key], base[key]) for key in ("bytes", "seconds")]
        code = ROOT.glob(paper.code or f"src/fedsim/algorithms/{name}.py")
        count = sum(file.read_text(encoding="utf-8").count("\n") for file in code)
        page = ROOT / (paper.page or f"docs/algorithms/{name}.md")
        link = f"[{departures(page.read_text(encoding='utf-8'))}]({os.path.relpath(page, PAGES)}#{DEPARTS.lower().replace(' ', '-')})"
        lines.append(f"| {' | '.join([f'`{name}`', paper.oracles, *scores, *ratios, str(count), link])} |")
    return "\n".join(lines)


def departures(page: str) -> int:
    """How many points a system's page has on where it departs from its paper."""
    section = page.partition(f"\n## {DEPARTS}\n")[2].partition("\n## ")[0]
    return len(re.findall(r"^- ", section, re.MULTILINE))


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
    reads = ROWS if paper == "fedpeft" and name != "privacy" else SURVEY if paper == "survey" else METHODS
    rows = own.execute(reads, "table", beside=True)
    file = PAPERS[paper].tables[name]
    module = own.execute(file, "table", beside=True)
    if size is None:
        file = RESULTS / f"{paper}_{name}_small.json"
        if not file.is_file():
            raise ValueError(f"Expected a kept result of {paper}'s {name}, {file.name}; --small computes it.")
        found: dict[str, Any] = json.loads(file.read_text())
        if "cells" in found:  # of the scripts that came before the sweeps
            runs = [seed for each in found["cells"].values() for seeds in each.values() for seed in seeds.values()]
            found["git"] = rows.commits([run["git"] for run in runs])
        source = file.name
    elif hasattr(module, "main"):  # two sweeps, of which the first chooses the rates of the second
        if further or size == "full":
            raise ValueError(f"Expected {paper}'s {name} with --small alone; it has one form, for 2 cores.")
        source = f"runs/{paper}-{size}"
        found = module.main(Path(source))
    else:
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
        target = {"target": module.TARGET} if hasattr(module, "TARGET") else {}
        source, found = str(where), rows.result(load_sweep(where), **target)
    if json_:
        print(json.dumps(record.plain(found["rows"]), indent=1))
    else:
        print(f"{name}, {source}, commit {', '.join(found['git']) or 'unknown'}:\n\n{rows.table(found)}\n")


if __name__ == "__main__":
    try:
        main(*tyro.cli(Options, return_unknown_args=True))
    except ValueError as error:
        sys.exit(f"tables: {error}")
