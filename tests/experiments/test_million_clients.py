"""`experiments/million_clients.py`: which cells are measured again, and what the index may take. Nothing is measured here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsim import record

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.delitem(sys.modules, "million_clients", raising=False)
    return importlib.import_module("million_clients")


def few(script: Any, **changes: Any) -> Any:
    return script.Options(
        **{"cohorts": (10,), "populations": (100,), "vit_cohorts": (10,), "seen": (1000,), "turns": 1, **changes}
    )


def test_the_committed_file_is_that_of_the_defaults(script: Any) -> None:
    """Its keys do not say devices and seconds: they were one, and the default."""
    have = script.read(script.RESULTS / "client_count.json")
    assert set(have) == set(script.cells(script.Options()))
    found = script.chosen(script.Options(), have)
    assert script.tables(found) in (EXPERIMENTS.parent / "docs" / "scale.md").read_text()
    assert "12.0 B a client" in script.index(found)
    with pytest.raises(SystemExit, match=r"it has: perceptron / 10 / 10000 / 1 x 4 lanes / 4 s,"):
        script.chosen(script.Options(lanes=8), have)


def test_other_lanes_and_seconds_are_other_cells(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[2:])
        return SimpleNamespace(returncode=0, stdout=json.dumps({"seconds": 1.0}))

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(record, "machine", lambda: {"git": None})
    file = tmp_path / "cells.json"
    script.run(few(script), file)
    names = list(json.loads(file.read_text())["cells"])
    common = "1 x 4 lanes / 4 s"
    assert names == [f"perceptron / 10 / 100 / {common}", f"ViT, LoRA / 10 / 100 / {common}", "memory / 1000 / 1000"]
    asked.clear()
    script.run(few(script), file)
    assert not asked, "every cell is there"
    script.run(few(script, lanes=8), file)
    assert [(command[0], command[3]) for command in asked] == [("--lanes=8", "perceptron"), ("--lanes=8", "ViT, LoRA")]
    asked.clear()
    have = script.run(few(script, seconds=0.5), file)
    assert [command[1] for command in asked] == ["--seconds=0.5"] * 2
    assert len(have) == 7 and len(json.loads(file.read_text())["cells"]) == 7
    assert len(script.chosen(few(script), have)) == 3


def test_turns_go_round_all_cells_and_their_medians_count(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    figures = iter([1.0, 10.0, 100.0, 5.0, 50.0, 500.0, 3.0, 30.0, 300.0])

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[5])
        return SimpleNamespace(returncode=0, stdout=json.dumps({"seconds": next(figures)}))

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(record, "machine", lambda: {"git": None})
    file = tmp_path / "cells.json"
    script.run(few(script), file)
    script.run(few(script, turns=3), file)  # goes on after the first turn
    assert asked == ["perceptron", "ViT, LoRA", "memory"] * 3
    cells = script.read(file)
    assert [cell["seconds"] for cell in cells.values()] == [[1.0, 5.0, 3.0], [10.0, 50.0, 30.0], [100.0, 500.0, 300.0]]
    assert [cell["seconds"] for cell in script.chosen(few(script), cells)] == [3.0, 30.0, 300.0]
    monkeypatch.setattr(record, "machine", lambda: {"git": {"commit": "later"}})
    figures = iter([2.0] * 12)
    script.run(few(script, turns=4), file)  # one turn more is asked for, of other code: all four are measured
    assert [cell["seconds"] for cell in script.read(file).values()] == [[2.0] * 4] * 3
    single = {cell: {**found, "seconds": 7.0} for cell, found in cells.items()}  # as in a file without turns
    assert [script.turns_of(found) for found in single.values()] == [1] * 3
    assert [script.listed(found["seconds"]) for found in single.values()] == [[7.0]] * 3


def test_an_index_beyond_its_limit_is_an_error(script: Any) -> None:
    def of(client: float, store: float) -> list[dict[str, Any]]:
        rounds = {"form": "perceptron", "population": 100, "index_limit": 64 * 100 + 4 * 900}
        rounds |= {"index_bytes": client * 100 + 4 * 900}
        return [rounds, {"form": "memory", "index_bytes_client": store}]

    assert "12.0 B a client" in script.index(of(12, 20)) and "32.0 of 64 B" in script.index(of(12, 20))
    with pytest.raises(SystemExit, match=r"64\.5 of 64 B; and 4 B an example\. That is more than the limit"):
        script.index(of(12, 52.5))
