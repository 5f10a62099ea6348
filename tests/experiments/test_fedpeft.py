"""FedPEFT's axes and the vision experiment: sweep files, rows from their folders, kept results, expected hours."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import Config, Speed, Sweep
from fedsim.cli import sweeping
from fedsim.config.older import today
from fedsim.sweeps import folder
from fedsim.sweeps.cells import Cell, cells, tuning
from fedsim.sweeps.sweep import plan

ROOT = Path(__file__).parents[2]
FOLDER, RESULTS = ROOT / "experiments" / "fedpeft", ROOT / "experiments" / "results"
pytestmark = pytest.mark.usefixtures("compile_once")
AXES = ("client_stability", "data_distribution", "data_scarcity", "domain_gap")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a file of the experiments' folder, as its scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def asked(file: str, *argv: str) -> Sweep:
    """The sweep that `fedsim sweep FILE` would run."""
    return sweeping.read([str(FOLDER / file), *argv])[1]


def small(axis: str) -> Sweep:
    """The small form of an axis, of the domain gap with all three sets."""
    more = ("--accept-licence", "CC-BY-NC-SA")
    return asked(f"{axis}.py:elpv", *more) if axis == "domain_gap" else asked(f"{axis}.py")


def at_rates(sweep: Sweep, rates: dict[str, float]) -> list[Cell]:
    """The cells at these rates of the methods."""
    return cells(sweep, {method: {"lr": rate} for method, rate in rates.items()})


def changed(config: Config) -> dict[str, Any]:
    """The options that are not the default, as JSON has them."""
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return json.loads(
        json.dumps({f.name: found[f.name] for f in dataclasses.fields(config) if found[f.name] != f.default})
    )


# --- the sweeps


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_begins_at_the_default_cell_with_every_method(here: Any, axis: str) -> None:
    """So rates are chosen there, and are the same in all axes; every method has the whole grid, down to 1e-6."""
    common = here("common")
    for sweep, default in ((small(axis), common.SMALL), (asked(f"{axis}.py:full"), common.FULL)):
        searched = tuning(sweep)
        assert list(searched) == list(common.METHODS)
        for method, of in searched.items():
            assert [c.config.lr for c in of] == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
            assert len({c.config.replace(lr=1.0) for c in of}) == 1, "nothing else differs"
            if method == "head":
                few = 2000 if axis == "data_scarcity" else default.examples  # the full form's first cell has few, too
                assert of[0].config == default.replace(lr=1e-6, examples=few, seed=0), "with the rate of all its rounds"
        names = [c.varied["cell"] for c in at_rates(sweep, dict.fromkeys(searched, 1e-3))]
        assert len(set(names)) >= 2 and len(names) == len(set(names)) * len(searched) * len(sweep.seeds)


def test_axes_share_the_search_and_the_default_cell(here: Any, tmp_path: Path) -> None:
    """With one folder for all, a run of one axis is the same run of another."""
    runs = [{c.key for of in tuning(small(axis)).values() for c in of} for axis in AXES]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    rates = dict.fromkeys(here("common").METHODS, 1e-3)
    shared = set.intersection(*({c.key for c in at_rates(small(axis), rates)} for axis in AXES))
    assert len(shared) == len(rates)
    first = small(AXES[0])
    folder.write(tmp_path, first.base, at_rates(first, rates), [], {})
    for axis in AXES[1:]:
        assert list(plan(small(axis), tmp_path)[0]) == list(rates), "the folder takes the other axes"


def test_a_licence_is_accepted_for_its_set_alone(here: Any) -> None:
    assert [*asked("domain_gap.py").grid["cell"]] == ["Fashion-MNIST", "digits"]
    found = at_rates(small("domain_gap"), dict.fromkeys(here("common").METHODS, 1e-3))
    licences = {c.varied["cell"]: c.config.accept_licence for c in found}
    assert licences == {"Fashion-MNIST": None, "digits": None, "ELPV": "CC-BY-NC-SA"}


def test_the_full_form_takes_weights_and_sets_from_the_command() -> None:
    sweep = asked("client_stability.py:full", "--weights", "ViT-B_16.npz", "--data-dir", "sets", "--seeds", "0")
    first = {method: of[0].config for method, of in tuning(sweep).items()}
    assert {(c.weights, c.data_dir) for name, c in first.items() if "Shuffle" not in name} == {("ViT-B_16.npz", "sets")}
    assert first["ShuffleNet V2 0.5x, full"].weights == "random"


# --- what they find


@pytest.mark.parametrize(
    ("budget", "accuracy"), [(99, None), (100, 0.3), (299, 0.5), (300, 0.4), (400, None), (9999, None)]
)
def test_at_bytes_takes_the_last_evaluation_within_the_budget(here: Any, budget: int, accuracy: float | None) -> None:
    """The last one has diverged."""
    curve = [[2, 100, 0.3], [4, 200, 0.5], [6, 300, 0.4], [8, 400, None]]
    assert here("rows").at_bytes(curve, budget) == accuracy


@pytest.mark.slow
def test_rows_of_a_sweep(here: Any, blobs: Callable[..., Path], tmp_path: Path) -> None:
    """Against loops over the records; two axes in one folder repeat nothing; a kept result of the same form prints alike."""
    rows = here("rows")
    base = Config(dataset=str(blobs(tmp_path)), backbone="mlp", clients=6, clients_per_round=2, min_size=2, rounds=3,
                  steps=2, validation=0.2, peft="head", eval_every=1)  # fmt: skip
    grid = {"cell": {"M = 2": {}, "M = 3": {"clients_per_round": 3}}, "method": {"head": {}, "full": {"peft": "full"}}}
    sweep = Sweep(
        base=base, grid=grid, tune={"lr": [1e-7, 1e-2]}, tune_by=["method"], seeds=2, speed=Speed(lanes=2, devices=1)
    )
    study = fedsim.sweep(sweep, out=tmp_path / "study", quiet=True)
    result = rows.result(study)
    assert [(r["cell"], r["method"], r["seeds"]) for r in result["rows"]] == [
        ("M = 2", "head", 2), ("M = 2", "full", 2), ("M = 3", "head", 2), ("M = 3", "full", 2)
    ]  # fmt: skip
    for method, found in result["rates"].items():
        assert found["validation_by_rate"][f"{found['rate']:g}"] == max(found["validation_by_rate"].values())
        assert found["at_the_edge"], f"{method}: both rates are at the edge"
    runs = {(r.config.clients_per_round, r.config.peft, r.config.seed): r for r in study.runs()}
    for r in result["rows"]:
        mine = [runs[int(r["cell"][-1]), r["method"], seed] for seed in (0, 1)]
        sent = {
            peft: sum(line["bytes_up"] + line["bytes_down"] for line in runs[int(r["cell"][-1]), peft, 0].rounds)
            for peft in ("head", "full")
        }
        assert r["total"] == sent[r["method"]] and r["budgets"] == sorted(sent.values())
        assert r["client_up"] == 4 * r["parameters"]
        accuracy = [run.summary["final"]["test"]["accuracy"] for run in mine if run.summary]
        assert r["test"]["mean"] == pytest.approx(sum(accuracy) / 2)
        assert r["rate"] == mine[0].config.lr == result["rates"][r["method"]]["rate"]
        for budget, at in zip(r["budgets"], r["at_equal_bytes"], strict=True):
            seen = [
                [line for line in run.rounds if line["total_bytes_up"] + line["total_bytes_down"] <= budget]
                for run in mine
            ]
            if not all(seen):
                assert at["mean"] is None, "its first round alone sends more"
                continue
            assert at["mean"] == pytest.approx(sum(lines[-1]["validation"]["accuracy"] for lines in seen) / 2)
    lines = rows.table(json.loads(json.dumps(result))).splitlines()
    assert len(lines) == 2 + 4 + 1 + 2 + 2 and len({line.count("|") for line in lines[:6]}) == 1

    other = dataclasses.replace(sweep, grid=grid | {"cell": {"M = 2": {}, "iid": {"partition": "iid"}}})
    again = fedsim.sweep(other, out=tmp_path / "study", quiet=True)
    shared = [r for r in rows.result(again)["rows"] if r["cell"] == "M = 2"]
    assert [(r["seconds"], r["test"]) for r in shared] == [(r["seconds"], r["test"]) for r in result["rows"][:2]]
    assert len([*(tmp_path / "study" / "tuning").iterdir()]) == 4


def test_the_table_says_seeds_and_edges(here: Any) -> None:
    row = {"cell": "c", "method": "m", "seeds": 2, "parameters": 5, "client_up": 20, "client_down": 20, "total": 200,
           "rate": 0.1, "at_the_edge": True, "test": {"mean": 0.5, "sd": 0.1414}, "validation": {"mean": None, "sd": None},
           "at_equal_bytes": [{"mean": 0.4, "sd": None}] * 2, "bytes_to_target": 1200, "seeds_at_target": 1, "paper": None,
           "seconds": 3.0}  # fmt: skip
    rate = {"rate": 0.1, "validation_by_rate": {"0.1": 0.5, "0.01": None}, "seconds_by_rate": {"0.1": 1.0, "0.01": 2.0}}
    lines = here("rows").table({"rows": [row], "grid": [0.001, 0.01, 0.1], "rates": {"m": rate}}).splitlines()
    assert (
        lines[2]
        == "| c | m | 5 | 20 | 200 | 0.1 (edge) | 0.500 ± 0.141 | – | 0.400 | 0.400 | 1,200 (1 of 2 seeds) |  | 3 |"
    )
    assert lines[-1] == "| m |  | – | 0.500 | 3 |"


# --- what is kept


@pytest.mark.parametrize("axis", AXES)
def test_kept_results_are_of_these_cells(here: Any, axis: str) -> None:
    """Every figure in docs/fedpeft.md is that of the JSON file, whose runs have the configs of the sweep's cells."""
    rows, result = here("rows"), json.loads((RESULTS / f"fedpeft_{axis}_small.json").read_text())
    document = (ROOT / "docs" / "fedpeft.md").read_text()
    cells_table, rates_table = rows.table(result).split("\n\n")
    assert cells_table in document
    assert axis != AXES[0] or rates_table in document, "the search stands there once: the other axes took its rates"
    found = at_rates(small(axis), {method: of["rate"] for method, of in result["rates"].items()})
    options = {(c.varied["cell"], c.varied["method"]): changed(c.config) for c in found}
    kept = {(cell, name): seeds["0"] for cell, methods in result["cells"].items() for name, seeds in methods.items()}
    assert {key: of["options"] for key, of in kept.items()} == options
    for commit in {of["git"]["commit"][:7] for of in kept.values()}:
        assert f"commit {commit}" in document
    assert result["rates"]["head"]["rate"] == here("common").HEAD_LR


def test_kept_results_of_the_vision_experiment_are_of_its_cells(here: Any) -> None:
    """Every row was made by the config of the sweep's cell, and docs/vision.md has the tables."""
    vision, document = here("vision"), (ROOT / "docs" / "vision.md").read_text()
    for sweep, name in ((vision.sweep, "fashion_mnist"), (vision.elpv, "elpv")):
        result = json.loads((RESULTS / f"vision_{name}.json").read_text())
        assert vision.table(result) in document
        rows = result["rows"]
        for c in at_rates(sweep, {method: row["rate"] for method, row in rows.items()}):
            row = rows[c.varied["method"]]
            said = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in today(row["config"]).items()})
            assert said == c.config.replace(accept_licence=said.accept_licence)
            assert c.config.head_lr in (None, rows["head"]["rate"])


# --- expected hours


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
    """Of one run; and the plan adds up seeds, methods, cells and the search."""
    hours = here("hours")
    monkeypatch.setattr(hours, "flops", lambda config, facts: hours.Flops(forward=1.0, train=10.0, features=0.0))
    config = Config(clients=10, clients_per_round=5, rounds=4, epochs=2, eval_every=2, peft="full")
    found = hours.hours(config, hours.Facts(100, 7, 11, 2, (4,)))
    examples = 4 * 5 * (2 * 100 / 10)  # rounds, clients, epochs over ten examples each
    assert found == pytest.approx((examples * 10 + 2 * 7 + 11) / (hours.PEAK * hours.UTILISATION) / 3600)
    for axis in AXES:
        sweep = here(axis).full
        monkeypatch.setattr(hours, "hours", lambda config, facts: 1.0)
        said = hours.plan(sweep)
        count = len(sweep.grid["cell"])
        assert all(f"| {cell} | {'1.00 | ' * 7}7.00 |" in said for cell in sweep.grid["cell"])
        assert f"| search, 6 rates | {'6.00 | ' * 7}42.00 |" in said
        assert f"In all {3 * 7 * count + 42} hours of one A100: 3 seeds" in said
