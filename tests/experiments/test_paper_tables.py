"""`benchmarks/tables.py`: names, JSON, the numbers of FedPEFT's communication table, and the documents that print them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsim import own

ROOT = Path(__file__).parents[2]
COUNTS = {
    "full": (85_875_556, 85_833_261, 85_800_194),
    "head": (76_900, 34_605, 1_538),
    "bias": (179_812, 137_517, 104_450),
    "bias, patch bias frozen": (179_044, 136_749, 103_682),
    "adapter, width 8": (233_668, 191_373, 158_306),
    "prompt, deep, 10 tokens": (169_060, 126_765, 93_698),
    "LoRA, query and value, r = 4": (224_356, 182_061, 148_994),
    "ShuffleNet V2 0.5x, full": (444_292, 387_917, 343_842),
}


def command(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    file = str(ROOT / "benchmarks" / "tables.py")
    return subprocess.run(
        [sys.executable, file, *argv], env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_json_holds_the_table(environment: dict[str, str]) -> None:
    done = command(environment, "fedpeft", "--table", "communication", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    found = {(r["method"], r["dataset"]): r for r in rows}
    assert len(found) == len(rows) == 24
    for method, counts in COUNTS.items():
        for dataset, count in zip(("CIFAR-100", "Resisc45", "PCam"), counts, strict=True):
            row = found[method, dataset]
            assert row["trainable_parameters"] == count
            assert row["bytes_up"] == row["bytes_down"] == 4 * count
            assert row["mib_up"] == row["mib_down"] == 4 * count / 2**20
            assert row["round_bytes_up"] == row["round_bytes_down"] == 8 * 4 * count
            assert row["run_bytes_up"] == row["run_bytes_down"] == 50 * 8 * 4 * count
            ours = method.startswith(("adapter", "LoRA", "Shuffle"))
            assert (row["source"] == "ours") == ours and (not ours or row["choice"])
    assert [r for r in rows if r["paper"]] == [found["full", "CIFAR-100"]]


TRAINED = {
    "superior_soups": "few_rounds", "fed_ptr": "trajectories", "fed_obd": "communication", "dfed_salt": "gossip",
    "fed_res": "concept_shift", "fed_pcl": "domains",
    "fed_dm": "few_rounds", "fed_et": "architectures", "fed_sp": "speakers",
}  # fmt: skip
LISTED = {
    **TRAINED,
    "fed_pcl": "domains, downlink",
    "llm": "speakers",
    "survey": "front, counted",
}
PAPERS = (
    "fedpeft", "superior_soups", "fed_ptr", "fed_obd", "dfed_salt", "fed_res", "fed_dm", "fed_et", "fed_pcl", "fed_sp", "llm",
    "survey",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return own.execute(ROOT / "benchmarks" / "tables.py", "benchmark")


def test_names(environment: dict[str, str]) -> None:
    """All papers are listed, and a wrong name ends in one line."""
    listed = command(environment, "--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(PAPERS)
    assert listed.stdout.splitlines()[0].endswith(
        "communication, client_stability, data_distribution, data_scarcity, domain_gap, privacy"
    )
    for line in listed.stdout.splitlines()[1:]:
        assert line.endswith(f": {LISTED.get(line.split()[0], 'not yet')}")
    refused = command(environment, "fedpef")
    assert refused.returncode == 1 and "did you mean fedpeft" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("options", "further", "said"),
    [
        ({"table": "comunication"}, [], "did you mean communication"),
        ({"small": True, "full": True}, [], "not both"),
        ({"paper": "fed_res", "full": True}, [], "with --small alone"),
        ({}, ["--jobs", "2"], "--jobs with --small or --full"),
    ],
)
def test_what_is_refused(tables: ModuleType, options: dict[str, Any], further: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tables.main(tables.Options(**{"paper": "fedpeft", **options}), further)


def test_a_paper_without_tables_is_refused(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.PAPERS, "later", tables.Paper("Later", "0000.00000", {}))
    with pytest.raises(ValueError, match="paper='later' to be one that has tables: not yet"):
        tables.main(tables.Options("later"))


@pytest.mark.parametrize("axis", ["client_stability", "data_distribution", "data_scarcity", "domain_gap"])
def test_a_kept_table_says_its_commit(tables: ModuleType, axis: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(tables.Options("fedpeft", axis))
    head, _, rest = capsys.readouterr().out.partition("\n\n")
    kept = json.loads((ROOT / "experiments" / "results" / f"fedpeft_{axis}_small.json").read_text())
    commits = {
        of["git"]["commit"][:7] for methods in kept["cells"].values() for (of,) in map(dict.values, methods.values())
    }
    assert head == f"{axis}, fedpeft_{axis}_small.json, commit {', '.join(commits)}:"
    assert rest.split("\n\n")[0] in (ROOT / "docs" / "fedpeft.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("system", "table"), [*TRAINED.items(), ("fedpeft", "privacy"), ("llm", "speakers")])
def test_a_kept_table_of_a_system(
    tables: ModuleType, system: str, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method of the file has a row, and the page holds what is printed."""
    tables.main(tables.Options(system, table))
    head, _, rest = capsys.readouterr().out.partition("\n\n")
    kept = json.loads((ROOT / "experiments" / "results" / f"{system}_{table}_small.json").read_text())
    assert head == f"{table}, {system}_{table}_small.json, commit {', '.join(kept['git'])}:"
    page = {"fedpeft": "docs/fedpeft.md", "llm": "docs/language_models.md"}.get(system, f"docs/algorithms/{system}.md")
    assert rest.strip() in (ROOT / page).read_text(encoding="utf-8")
    module = own.execute(tables.PAPERS[system].tables[table], "table", beside=True)
    if hasattr(module, "sweep"):
        assert len(kept["rows"]) == math.prod(len(values) for values in module.sweep.grid.values())
    else:
        methods = module.compared(module.BASE, 1e-3) if system == "llm" else module.METHODS
        assert [row["method"] for row in kept["rows"]] == list(methods)


def test_the_summary_is_in_the_document(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(tables.Options(summary=True))
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 + len(TRAINED) + 2 == 13  # FedPEFT, ten related systems, two lines of a head
    page = (ROOT / "docs" / "algorithms" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(printed) in page, "a result, or the length of a system's file, is another: print the table again"


@pytest.mark.slow
def test_a_table_is_made_again_by_its_sweep(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The form that is asked for, with further options; the same command trains nothing more."""
    file = tmp_path / "axis.py"
    file.write_text(
        f"import fedsim\nbase = fedsim.Config(dataset={str(blobs(tmp_path))!r}, backbone='mlp', peft='head', clients=6,\n"
        "                      clients_per_round=2, min_size=2, rounds=2, steps=1, validation=0.2)\n"
        "grid = {'cell': {'all': {}}, 'method': {'head': {}}}\n"
        "sweep = full = fedsim.Sweep(base=base, grid=grid, tune={'lr': [1e-2]}, tune_by=['method'])\n"
    )
    monkeypatch.setitem(tables.PAPERS["fedpeft"].tables, "axis", file)
    monkeypatch.chdir(tmp_path)
    for size in ("small", "full"):
        tables.main(tables.Options("fedpeft", "axis", **{size: True}), ["--seeds", "0", "1", "--lanes", "2", "--quiet"])
        head, _, table = capsys.readouterr().out.partition("\n\n")
        assert head.startswith(f"axis, runs/fedpeft-{size}, commit ")
        assert table.splitlines()[2].startswith("| all | head | ") and " ± " in table
    done = [*(tmp_path / "runs" / "fedpeft-small" / "cells").iterdir()]
    before = {folder.name: (folder / "summary.json").stat().st_mtime_ns for folder in done}
    tables.main(tables.Options("fedpeft", "axis", small=True, json_=True), ["--seeds", "0", "1", "--lanes", "2"])
    assert [row["seeds"] for row in json.loads(capsys.readouterr().out)] == [2]
    assert before == {folder.name: (folder / "summary.json").stat().st_mtime_ns for folder in done} and len(done) == 2


@pytest.mark.slow
def test_fed_pcls_downlink_grows_with_its_clients(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """4 d C (m + 1) bytes and the flags; the page holds the rows."""
    tables.main(tables.Options("fed_pcl", "downlink", json_=True))
    page = (ROOT / "docs" / "algorithms" / "fed_pcl.md").read_text(encoding="utf-8")
    for row in json.loads(capsys.readouterr().out):
        assert row["up"] == 4 * 256 * 10 + 2 and row["fed_avg"] == 4 * 396_042
        assert row["down"] == (row["clients"] + 1) * row["up"]
        assert f"| {row['clients']} | {row['up']:,} | {row['down']:,} | {row['ratio']:.2f} |" in page


def test_images_that_may_not_be_shown_are_not_drawn(tmp_path: Path) -> None:
    pictures = own.execute(ROOT / "experiments" / "fed_dm" / "pictures.py", "experiment", beside=True)
    with pytest.raises(ValueError, match=r"dataset='elpv' to be one whose images may be shown"):
        pictures.main(tmp_path / "out", dataset="elpv")
    assert not (tmp_path / "out").exists()


def test_the_document_holds_what_is_printed(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(tables.Options("fedpeft", "communication"))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    document = [line.strip() for line in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8").splitlines()]
    missing = [line for line in lines if line and line not in document]
    assert len(lines) > 80 and not missing
