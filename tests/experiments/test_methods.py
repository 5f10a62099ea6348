"""`experiments/methods.py`: what answers for a client, rows of a sweep, and the table."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fedsim

FOLDER = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported as the experiments do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import methods

    yield methods
    sys.modules.pop("methods")


def test_the_servers_model_answers_where_it_is_asked_and_else_the_clients(methods: Any) -> None:
    """FedSA-LoRA and SCAFFOLD keep something at clients, but what they are compared by is the server's model."""
    run = lambda **kinds: SimpleNamespace(summary={"final": {"clients": {k: {"mean": v} for k, v in kinds.items()}}})  # noqa: E731 - one expression, named
    assert methods.answering(run(memory=0.5)) == 0.5
    assert methods.answering(run(memory=0.5, **{"global": 0.7})) == 0.7
    without = {"final": {"test": {"accuracy": 0.8}, "clients": None}, "metric": "accuracy"}
    assert methods.answering(SimpleNamespace(summary=without)) == 0.8


def test_seconds_are_of_the_last_phase_without_compiling(methods: Any) -> None:
    line = lambda phase, seconds, compiling: {"phase": phase, "seconds": seconds, "compile_seconds": compiling}  # noqa: E731 - one expression, named
    rounds = [line("head", 0.5, 0.25), line("head", 0.25, 0.0), line("lora", 8.0, 4.0), line("lora", 3.0, 0.0)]
    assert methods.last_phase(rounds) == [4.0, 3.0]
    assert methods.last_phase(rounds[:2]) == [0.25, 0.25]


@pytest.mark.slow
def test_a_row_has_the_figures_of_its_runs(methods: Any, blobs: Callable[..., Path], tmp_path: Path) -> None:
    """Of a tuned sweep: scores by seed, the chosen rate and whether it is at the edge, bytes both ways, bytes to a target."""
    base = fedsim.Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="head", clients=6, clients_per_round=2, min_size=2, rounds=3,
        steps=2, validation=0.2, optimizer="sgd", eval_every=1,
    )  # fmt: skip
    grid = {"method": {"FedAvg": {}, "FedProx": {"algorithm": "fed_prox(mu=0.1)"}}}
    asked = fedsim.Sweep(base=base, grid=grid, tune={"lr": [1e-4, 1e-1]}, tune_by=["method"], seeds=2)
    study = fedsim.sweep(asked, out=tmp_path / "study")
    found = methods.result(study, target=0.0)
    assert [row["method"] for row in found["rows"]] == ["FedAvg", "FedProx"]
    for row, setting in zip(found["rows"], study.settings(), strict=True):
        runs = [fedsim.load(study.places[cell.key]) for cell in setting.cells]
        assert row["seeds"] == len(runs) == 2
        assert row["scores"] == [run.summary["final"]["test"]["accuracy"] for run in runs]
        assert row["rate"] == runs[0].config.lr and row["at_the_edge"]
        assert row["bytes"] == statistics.mean(sum(run.summary["bytes"][way] for way in ("up", "down")) for run in runs)
        first = runs[0].rounds[0]
        assert row["bytes_to_target"] == first["total_bytes_up"] + first["total_bytes_down"]
        assert row["seeds_at_target"] == 2
    assert not any(row["at_the_edge"] for row in methods.result(study, rates=[1e-5, 1e-4, 1e-1, 1.0])["rows"])
    assert found["cores"] and found["date"] and found["versions"]["jax"]


def test_the_table_says_means_deviations_and_rates_at_the_edge(methods: Any) -> None:
    one = {
        "method": "FedAvg", "scores": [0.5, 0.6, 0.7], "seeds": 3, "rate": 0.1, "at_the_edge": False, "bytes": 2048.0,
        "bytes_to_target": 1024, "seeds_at_target": 2, "seconds": 0.5,
    }  # fmt: skip
    other = one | {
        "method": "other", "scores": [0.5], "seeds": 1, "rate": 1.0, "at_the_edge": True, "bytes": 512.0,
        "bytes_to_target": None, "seeds_at_target": 0, "seconds": 1.0,
    }  # fmt: skip
    assert methods.table({"rows": [one, other], "target": 0.9}).splitlines() == [
        "| method | score | rate | bytes | / FedAvg | bytes to 0.9 | seconds a round | / FedAvg |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| FedAvg | 0.600 ± 0.100 | 0.1 | 2.00 KiB | 1.00 | 1.00 KiB (2 of 3) | 0.50 | 1.00 |",
        "| other | 0.500 | 1 (edge) | 512 B | 0.25 | – | 1.00 | 2.00 |",
    ]
