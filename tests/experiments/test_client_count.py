"""`experiments/client_count.py`: each cell in a process of its own, and what is read from the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fedsim
from fedsim import own
from fedsim.cli import sweeping
from fedsim.sweeps.cells import cells

FILE = Path(__file__).parents[2] / "experiments" / "client_count.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return own.execute(FILE, "experiment")


def test_the_cells(script: ModuleType) -> None:
    """10 to 10,000 clients a round, both models, three turns; and `fedsim sweep` finds the same sweep."""
    found = cells(script.sweep)
    assert {(c.varied["model"], c.config.clients_per_round) for c in found} == {
        (model, m) for model in ("perceptron", "ViT, LoRA") for m in (10, 16, 100, 1000, 10_000)
    }
    assert len(found) == 30
    assert [c.key for c in cells(sweeping.read([str(FILE)])[1])] == [c.key for c in found]


def test_figures_of_a_turn(script: ModuleType) -> None:
    """Medians over the rounds behind the first, without compiling; bytes, memory and accuracy of the last."""

    def line(seconds: float, compiling: float = 0.0, **more: Any) -> dict[str, Any]:
        return {"seconds": seconds, "compile_seconds": compiling, "examples": 100, "lane_occupancy": 0.5,
                "row_occupancy": 0.9, "validation": None, "most_memory": 7, "bytes_up": 3, "bytes_down": 4, **more}  # fmt: skip

    lines = [line(9.0, 8.5), line(0.2), line(0.7, 0.3), line(1.0, 0.7, most_memory=8, validation={"accuracy": 0.25})]
    assert script.of_turn(lines) == pytest.approx(
        {"seconds": 0.3, "microseconds_row": 3000, "peak_bytes": 8, "lane_occupancy": 0.5, "row_occupancy": 0.9,
         "accuracy": 0.25, "down": 4, "up": 3, "compiled_later": 0.3}
    )  # fmt: skip


def test_the_table_compares_with_the_smallest_cohort_that_fills_the_lanes(script: ModuleType) -> None:
    row = {"model": "m", "turns": 1, "seconds": 1.0, "lane_occupancy": 1.0, "row_occupancy": 1.0, "accuracy": 0.5,
           "down": 1e6, "up": 2e6, "compiled_later": 0.0}  # fmt: skip
    rows = [
        row | {"clients_per_round": m, "microseconds_row": us, "peak_bytes": mib * 2**20}
        for m, us, mib in ((10, 50.0, 90), (16, 40.0, 100), (100, 10.0, 150))
    ]
    assert [line.split(" | ")[4:7:2] for line in script.table(rows).splitlines()[2:]] == [
        ["too few for the lanes", "too few for the lanes"], ["1.000", "1.000"], ["0.250", "1.500"]
    ]  # fmt: skip


@pytest.mark.slow
def test_each_cell_has_a_process_and_is_not_run_again(
    script: ModuleType,
    blobs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    base = fedsim.Config(dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=8, clients_per_round=2,
                         min_size=2, rounds=2, validation=0.2)  # fmt: skip
    asked = dataclasses.replace(
        script.sweep, base=base, grid={"model": {"perceptron": {}}, "clients_per_round": [2, 4]}, repeat=2
    )
    keys: list[str] = []

    def started(options: list[str]) -> int:
        keys.append(options[-1])
        script.run_one(asked, tmp_path / "study", options[-1])
        return 0

    monkeypatch.setattr(script, "started", started)
    study = script.run(asked, tmp_path / "study")
    order = [(c.repeat, c.config.clients_per_round) for key in keys for c in cells(asked) if c.key == key]
    assert order == [(1, 2), (1, 4), (2, 2), (2, 4)], "turn after turn"
    found = script.rows(study)
    assert [(r["clients_per_round"], r["turns"]) for r in found] == [(2, 2), (4, 2)]
    assert found[0]["down"] * 2 == found[1]["down"] and script.draw(found, tmp_path / "a.png").stat().st_size > 5000
    script.run(asked, tmp_path / "study")
    assert len(keys) == 4


def test_a_process_that_dies_is_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "started", lambda options: -9)
    with pytest.raises(ValueError, match=r"clients_per_round=10.* to end well, not by -9; the same command goes on"):
        script.run(script.small, tmp_path)
