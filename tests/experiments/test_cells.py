"""The cells of FedPEFT's experiments: rates chosen on validation, figures from runs, folders that are gone on with."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.config import Config, Speed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "fedpeft"
AXES = ("client_stability", "data_distribution", "data_scarcity", "domain_gap")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a file of the experiment's folder, as its scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def toy(tmp_path: Path) -> Config:
    """Blobs in two classes that a linear layer separates."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 120)
    np.savez(tmp_path / "toy.npz", x=(rng.normal(size=(120, 4)) + 3 * y[:, None]).astype(np.float32), y=y)
    return Config(dataset=str(tmp_path / "toy.npz"), backbone="mlp", peft="head", clients=4, clients_per_round=2, rounds=3,
                  head_rounds=1, min_size=2, steps=2, validation=0.2, alpha=0.5)  # fmt: skip


CURVE = [[2, 100, 0.3], [4, 200, 0.5], [6, 300, 0.4], [8, 400, 0.6]]


@pytest.mark.parametrize(("budget", "accuracy"), [(99, None), (100, 0.3), (299, 0.5), (300, 0.4), (9999, 0.6)])
def test_at_bytes_takes_the_last_evaluation_within_the_budget(here: Any, budget: int, accuracy: float | None) -> None:
    assert here("rows").at_bytes(CURVE, budget) == accuracy


@pytest.mark.parametrize(
    ("target", "total"), [(0.1, 100), (0.45, 200), (0.5, 200), (0.55, 400), (0.61, None), (None, None)]
)
def test_bytes_to_takes_the_first_evaluation_at_the_target(here: Any, target: float | None, total: int | None) -> None:
    assert here("rows").bytes_to(CURVE, target) == total


def seed(total: int, curve: list[list[Any]], test: float) -> dict[str, Any]:
    return {"total": total, "curve": curve, "test": test, "validation": curve[-1][2], "parameters": 5, "client_up": 20,
            "client_down": 20, "setup": 0, "seconds": 1.0}  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """Two seeds of three methods in one cell."""
    rate = {"rate": 0.1, "at_the_edge": True, "validation_by_rate": {"0.1": 0.5}, "seconds_by_rate": {"0.1": 1.0}}
    methods = {
        "cheap": {"0": seed(200, [[1, 100, 0.2], [2, 200, 0.4]], 0.4), "1": seed(200, [[1, 100, 0.3], [2, 200, 0.6]], 0.6)},
        "middle": {"0": seed(500, [[1, 200, 0.5], [2, 500, 0.7]], 0.7), "1": seed(500, [[1, 200, 0.3], [2, 500, 0.5]], 0.5)},
        "dear": {"0": seed(9000, [[1, 4000, 0.6], [2, 9000, 0.8]], 0.8), "1": seed(9000, [[1, 4000, 0.7], [2, 9000, 0.9]], 0.9)},
    }  # fmt: skip
    return {
        "cells": {"c": methods},
        "sets": {"c": {"target": 0.6}},
        "rates": dict.fromkeys(methods, rate),
        "grid": [0.1],
    }


def test_rows_compare_at_the_two_least_totals(here: Any, result: dict[str, Any]) -> None:
    """By hand, over two seeds; a method that has sent nothing within a budget has no accuracy there."""
    rows = here("rows").rows(result)
    cheap, middle, dear = rows
    assert cheap["budgets"] == [200, 500]
    assert [s["mean"] for s in cheap["at_equal_bytes"]] == [0.5, 0.5], "it had sent no more than the least budget"
    assert [s["mean"] for s in middle["at_equal_bytes"]] == [0.4, pytest.approx(0.6)]
    assert [s["mean"] for s in dear["at_equal_bytes"]] == [None, None]
    assert cheap["test"] == {"mean": 0.5, "sd": pytest.approx(0.1 * 2**0.5)}
    assert (cheap["bytes_to_target"], cheap["seeds_at_target"]) == (200, 1)
    assert (middle["bytes_to_target"], middle["seeds_at_target"]) == (500, 1)
    assert (dear["bytes_to_target"], dear["seeds_at_target"]) == (4000, 2)


def test_the_table_and_the_picture_have_every_row(here: Any, result: dict[str, Any], tmp_path: Path) -> None:
    of = here("rows")
    result["rows"] = of.rows(result)
    lines = of.table(result).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["cheap", "middle", "dear"]
    assert "0.500 ± 0.141" in lines[2] and "200 (1 of 2 seeds)" in lines[2] and "0.1 (edge)" in lines[2]
    assert lines[4].split(" | ")[8:10] == ["–", "–"]
    assert len({line.count("|") for line in lines[:5]}) == 1 and len({line.count("|") for line in lines[6:]}) == 1
    assert of.draw(result, tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        ([0.6, 0.7, 0.1, 0.1, 0.1], 3),  # diverges, and so would larger rates
        ([0.1, 0.09, 0.3, 0.5, 0.1], 5),  # too small to learn anything, which says nothing of larger ones
        ([0.1, 0.3, 0.2, 0.15, 0.4], 5),
    ],
)
def test_a_search_ends_where_a_rate_diverges(here: Any, scores: list[float], tried: int) -> None:
    grid = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    of = dict(zip(grid, scores, strict=True))
    found = here("running").upwards(of.__getitem__, grid, chance=0.1)
    assert found == {rate: of[rate] for rate in grid[:tried]}


@pytest.mark.slow
def test_a_small_pass(here: Any, toy: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate with the best validation is taken, test rows are drawn and unseen in the search, no run is repeated.

    The default cell's run is the search's, tested afterwards: its test accuracy is that of a run that sees the test rows.
    """
    running = here("running")
    experiment = running.Experiment(
        "toy", toy, {"M = 2": {}, "M = 3": {"clients_per_round": 3}}, {"full": {"peft": "full"}, "head": {}},
        seeds=(0,), grid=(1e-7, 1e-2), targets={toy.dataset: 0.6}, test_examples=10, speed=Speed(lanes=2),
    )  # fmt: skip
    result = running.run(experiment, tmp_path / "runs", tmp_path / "out.json")
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert [(r["cell"], r["method"]) for r in result["rows"]] == [
        (c, m) for c in experiment.cells for m in experiment.methods
    ]
    assert result["sets"]["M = 2"]["test"] == 10
    for name, found in result["rates"].items():
        assert found["validation_by_rate"][f"{found['rate']:g}"] == max(found["validation_by_rate"].values())
        assert found["at_the_edge"], f"{name}: both rates of the grid are at its edge"
    assert result["rates"]["full"]["rate"] == 1e-2
    searched = [fedsim.load(folder) for folder in (tmp_path / "runs" / "rates").iterdir()]
    assert len(searched) == 4
    for run in searched:
        assert run.summary is not None and run.summary["final"]["test"] == run.summary["final"]["validation"]
    # A shared trainer changes nothing: the default cell's run is the search's, and a run made anew is the same.
    for name, seeds in result["cells"]["M = 2"].items():
        rate = result["rates"][name]["rate"]
        assert seeds["0"]["validation"] == result["rates"][name]["validation_by_rate"][f"{rate:g}"]
        assert [line[0] for line in seeds["0"]["curve"]] == [1, 2, 3]
        anew = fedsim.run(
            toy.replace(**seeds["0"]["options"]), Speed(lanes=2), out=tmp_path / name, quiet=True,
            problem=running.problem_of(toy, Speed(lanes=2), 10)._replace(trainers=None),
        )  # fmt: skip
        assert seeds["0"]["test"] == (anew.summary or {})["final"]["test"]["accuracy"]
    assert len(list((tmp_path / "runs" / "cells").iterdir())) == 2, (
        "only the other cell's two runs are made after the search"
    )
    full = result["cells"]["M = 3"]["full"]["0"]
    run = fedsim.load(tmp_path / "runs" / "cells" / running.name_of(toy.replace(**full["options"])))
    assert run.config.head_lr == result["rates"]["head"]["rate"] and run.config.lr == result["rates"]["full"]["rate"]
    assert full["total"] == sum(line["bytes_up"] + line["bytes_down"] for line in run.rounds) == full["curve"][-1][1]

    monkeypatch.setattr(fedsim, "run", lambda *_, **__: pytest.fail("a finished run was repeated"))
    assert running.run(experiment, tmp_path / "runs", tmp_path / "out.json")["rows"] == result["rows"]


def test_a_stopped_run_is_gone_on_with(here: Any, toy: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = here("running")
    problem = running.problem_of(toy, Speed(lanes=2), None)
    whole = running.finished(toy, Speed(lanes=2), tmp_path / "run", problem)
    (tmp_path / "run" / "summary.json").unlink()
    asked: list[Any] = []
    monkeypatch.setattr(fedsim, "run", lambda *_, resume=None, **__: asked.append(resume) or whole)
    assert running.finished(toy, Speed(lanes=2), tmp_path / "run", problem) is whole
    assert asked == [tmp_path / "run"]
    with pytest.raises(ValueError, match="same config"):
        running.finished(toy.replace(lr=0.5), Speed(), tmp_path / "run", problem)


def test_thinned_keeps_train_and_validation_and_the_same_test_rows(here: Any, toy: Config) -> None:
    from fedsim import data

    running = here("running")
    whole = data.load(toy, None)
    some = running.thinned(whole, 10)
    assert len(some.test) == 10 and len(some.x) == len(whole.x) - len(whole.test) + 10
    for split in ("train", "validation"):
        np.testing.assert_array_equal(some.x[getattr(some, split)], whole.x[getattr(whole, split)])
    drawn = {row.tobytes() for row in some.x[some.test]}
    assert drawn < {row.tobytes() for row in whole.x[whole.test]}
    assert running.thinned(whole, 10**6) is whole
    np.testing.assert_array_equal(running.thinned(whole, 10).x, some.x)


def test_flops_of_a_linear_model_are_the_closed_form(here: Any) -> None:
    """784 x 10: forward 2dc, and in training 2dc more for the weights' gradient; no gradient of the inputs."""
    hours = here("hours")
    facts = hours.Facts(100, 10, 10, 10, (784,))
    of = hours.flops(Config(backbone="linear", peft="full"), facts)
    assert of.forward == 2 * 784 * 10
    assert of.train == 4 * 784 * 10
    assert of.features == 0


def test_flops_of_a_transformer_follow_what_is_trained(here: Any) -> None:
    """Full: forward, and about twice as much backward; LoRA saves the weights' gradients; the head alone nearly all."""
    hours = here("hours")
    facts = hours.Facts(100, 10, 10, 10, (16, 16, 3))
    full, lora, head = (hours.flops(Config(backbone="vit_tiny", peft=p), facts) for p in ("full", "lora", "head"))
    tokens, width, hidden, depth = 17, 32, 64, 2
    # A token's query, output, MLP, scores and mixed values; keys and values. In the last block only the class token asks.
    one, keys = 2 * width * width + 2 * width * hidden + 2 * tokens * width, tokens * 2 * width * width
    forward = 2 * ((depth - 1) * tokens * one + one + depth * keys + (tokens - 1) * 4 * 4 * 3 * width + width * 10)
    assert full.forward == forward
    assert 2.5 * full.forward < full.train < 3.3 * full.forward
    assert 0.6 * full.train < lora.train < 0.85 * full.train
    assert head.features == pytest.approx(full.forward, rel=0.05) and head.train < 0.02 * full.forward


def test_hours_are_flops_over_peak(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = here("hours")
    monkeypatch.setattr(hours, "flops", lambda config, facts: hours.Flops(forward=1.0, train=10.0, features=0.0))
    config = Config(clients=10, clients_per_round=5, rounds=4, epochs=2, eval_every=2, peft="full")
    found = hours.hours(config, hours.Facts(100, 7, 11, 2, (4,)))
    examples = 4 * 5 * (2 * 100 / 10)  # rounds, clients, epochs over ten examples each
    assert found == pytest.approx((examples * 10 + 2 * 7 + 11) / (hours.PEAK * hours.UTILISATION) / 3600)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_has_cells_and_states_hours(
    here: Any, axis: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least two cells in both sizes; `--full --plan` needs no data and no weights; both sizes at once are refused."""
    cells, script = here("cells"), here(axis)
    assert len(script.SMALL) >= 2 and len(script.FULL) >= 2
    monkeypatch.setattr(sys, "argv", [axis, "--full", "--plan", "--methods", "head", "--seeds", "0"])
    cells.main(axis, script.SMALL, script.FULL, "")
    said = capsys.readouterr().out
    assert all(f"| {cell} |" in said for cell in script.FULL) and "hours of one A100" in said
    monkeypatch.setattr(sys, "argv", [axis, "--full", "--small"])
    with pytest.raises(SystemExit, match="not both"):
        cells.main(axis, script.SMALL, script.FULL, "")
    monkeypatch.setattr(sys, "argv", [axis, "--full", "--methods", "head"])
    with pytest.raises(SystemExit, match="--weights"):
        cells.main(axis, script.SMALL, script.FULL, "")


def test_a_set_whose_licence_is_not_accepted_is_left_out(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cells, gap = here("cells"), here("domain_gap")
    found = cells.experiment("domain_gap", gap.SMALL, gap.FULL, cells.Options())
    assert "ELPV" not in found.cells and "ELPV is left out" in capsys.readouterr().out
    found = cells.experiment("domain_gap", gap.SMALL, gap.FULL, cells.Options(accept_licence="CC-BY-NC-SA"))
    assert found.cells["ELPV"]["accept_licence"] == "CC-BY-NC-SA" and "accept_licence" not in found.cells["digits"]


@pytest.mark.parametrize("axis", AXES)
def test_the_files_of_results_are_of_these_scripts(here: Any, axis: str) -> None:
    """Every figure in docs/fedpeft.md is that of the JSON file, whose runs have the configs that the script has now."""
    file = ROOT / "experiments" / "results" / f"fedpeft_{axis}_small.json"
    if not file.is_file():
        pytest.skip(f"{axis} has not been run")
    cells, rows, running, script = here("cells"), here("rows"), here("running"), here(axis)
    result = json.loads(file.read_text())
    document = (ROOT / "docs" / "fedpeft.md").read_text()
    cells_table, rates_table = rows.table(result).split("\n\n")
    assert cells_table in document
    assert axis != AXES[0] or rates_table in document, "the search stands there once: the other axes take its rates"
    assert result["rows"] == json.loads(json.dumps(rows.rows(result)))
    licence = cells.Options(accept_licence="CC-BY-NC-SA")
    experiment = cells.experiment(axis, script.SMALL, script.FULL, licence)
    for cell, methods in result["cells"].items():
        for name, seeds in methods.items():
            for number, of in seeds.items():
                config = running.run_config(experiment, cell, name, int(number), result["rates"])
                assert json.loads(json.dumps(running.changed(config))) == of["options"]
