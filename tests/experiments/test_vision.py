"""The vision experiment: its search for a rate, and a small whole pass on images made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fedsim
from fedsim.config import Config
from fedsim.config.older import today

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "fedpeft")  # as for a script
    spec = importlib.util.spec_from_file_location("vision", ROOT / "experiments" / "fedpeft" / "vision.py")
    assert spec is not None and spec.loader is not None
    sys.modules["vision"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1e-3, [1e-4, 1e-3, 1e-2]), (1e-4, [1e-5, 1e-4, 1e-3, 1e-2]), (1e-1, [1e-4, 1e-3, 1e-2, 1e-1])],
)
def test_the_search_goes_on_while_the_best_is_at_the_end(vision: ModuleType, best: float, tried: list[float]) -> None:
    found, chosen = vision.search(lambda rate: -abs(np.log10(rate) - np.log10(best)), vision.RATES)
    assert list(found) == tried and chosen == best
    assert vision.search(lambda rate: 0.5, vision.RATES)[1] == 1e-4, "of equals the one that was tried first"


@pytest.mark.slow
def test_a_whole_pass(
    vision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test rows are read for the chosen rate alone; a second call repeats no run; the table has every row."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 90)
    x = (rng.integers(0, 128, (90, 8, 8)) + 100 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "toy.npz", x=x, y=y)
    toy = Config(dataset=str(tmp_path / "toy.npz"), backbone="vit_tiny", weights="random", image_size=8, clients=4,
                 clients_per_round=2, rounds=2, head_rounds=1, min_size=2, steps=1, eval_every=2, peft="head")  # fmt: skip
    monkeypatch.setitem(vision.SETS, "fashion_mnist", toy)
    monkeypatch.setattr(vision, "RATES", (1e-3, 1e-2))
    pixels = {"backbone": "linear"}
    monkeypatch.setattr(vision, "METHODS", {"head": {}, "full": {"peft": "full"}, "pixels": pixels})
    options = vision.Options(
        "fashion_mnist", methods=("head", "full", "pixels"), runs=tmp_path / "runs", out=tmp_path / "out.json"
    )
    vision.main(options)
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["rows"]) == ["head", "full", "pixels"]
    assert result["examples"] == {"train": 65, "validation": 7, "test": 18}
    for name, row in result["rows"].items():
        run = fedsim.load(tmp_path / "runs" / "fashion_mnist" / name / f"{row['rate']:g}")
        assert run.summary is not None and run.config.hash() == row["config_hash"]
        assert run.summary["final"]["test"] == run.summary["final"]["validation"], "a run of the grid has no test rows"
        assert row["validation_by_rate"][f"{row['rate']:g}"] == max(row["validation_by_rate"].values())
        assert row["test"]["accuracy"] * 18 == pytest.approx(round(row["test"]["accuracy"] * 18))
        assert row["bytes"]["client_up"] == 4 * row["parameters"]["trained"]
        before = result["rows"]["head" if name == "full" else name]["bytes"]["client_up"]  # in the round of the head
        assert row["bytes"]["up"] == 2 * (before + row["bytes"]["client_up"])
    assert result["rows"]["full"]["config"]["head_lr"] == result["rows"]["head"]["rate"]
    monkeypatch.setattr(fedsim, "run", lambda *_, **__: pytest.fail("a finished run was repeated"))
    vision.main(options)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]
    capsys.readouterr()
    vision.main(vision.Options("fashion_mnist", out=tmp_path / "out.json", table=True))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| head |", "| full |", "| pixels |")) for line in lines) == 6
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_the_files_of_results_are_of_this_script(vision: ModuleType) -> None:
    """Every row in the repository was made by the config that the script has now, and docs/vision.md has the tables."""
    document = (ROOT / "docs" / "vision.md").read_text()
    for name, base in vision.SETS.items():
        file = ROOT / "experiments" / "results" / f"vision_{name}.json"
        result = json.loads(file.read_text())
        assert vision.table(result) in document
        for method, row in result["rows"].items():
            said = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in today(row["config"]).items()})
            found = {"accept_licence": said.accept_licence, "lr": row["rate"], "head_lr": said.head_lr}
            assert said == base.replace(**vision.METHODS[method], **found)
