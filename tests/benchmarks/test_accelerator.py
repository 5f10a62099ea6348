"""The accelerator's benchmark: what counts as met, missed, not measured; what fails is recorded, what is there is kept."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("report", "accelerator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("accelerator")


def test_verdicts_compare_with_the_better_ceiling(accelerator: Any) -> None:
    case = accelerator.Case("vit_b16", "bias", 16, mfu=0.4, ceiling=0.9, loop=3.0)
    found = {"examples_per_second": 95.0, "mfu": 0.41, "bare_jax": 100.0}
    assert accelerator.verdicts(case, found) == {
        "mfu": "0.41, met (target 0.4)",
        "ceiling": "0.95, met (target 0.9)",
        "loop": "not measured",
    }
    torch = {"torch_bare": {"examples_per_second": 190.0}, "torch_loop": {"examples_per_second": 38.0}}
    assert accelerator.verdicts(case, found | torch) == {
        "mfu": "0.41, met (target 0.4)",
        "ceiling": "0.50, missed (target 0.9)",
        "loop": "2.50, missed (target 3.0)",
    }


def test_targets_of_mfu_ceiling_and_sequential_loop_have_cases(accelerator: Any) -> None:
    cases = accelerator.CASES
    assert {name: c.mfu for name, c in cases.items() if c.mfu} == {
        "vit_b16-bias-16": 0.4, "vit_b16-lora-16": 0.3, "vit_b16-adapter-16": 0.3, "vit_b16-prompt-16": 0.3,
    }  # fmt: skip
    assert {name for name, c in cases.items() if c.ceiling == 0.9} == {name for name, c in cases.items() if c.mfu}
    assert {name: c.loop for name, c in cases.items() if c.loop} == {
        "vit_b16-lora-8": 3.0, "vit_ti16-lora-8": 20.0, "minilm_l6-lora-8": 20.0,
    }  # fmt: skip


def test_a_failing_child_is_told_by_its_last_words(accelerator: Any) -> None:
    assert accelerator.child([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(accelerator.FailedError, match="no such thing"):
        accelerator.child([sys.executable, "-c", "raise SystemExit('no such thing')"])


class Children:
    """Answers in the place of processes: seconds by lanes, peak memory by lanes, one case that does not work."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.broken, self.commit = accelerator, "", "a" * 40
        self.asked: list[tuple[str, str, int | str]] = []

    def __call__(self, command: list[str]) -> dict[str, Any]:
        given = json.loads(command[-1])
        if given["what"] == "machine":
            git = {"commit": self.commit, "changed": False}
            return {"git": git, "device": {"kind": "chip"}, "versions": {"jax": "1"}}
        case, lanes = given["case"], given["lanes"]
        self.asked.append((given["what"], case, lanes))
        if case == self.broken or lanes == 64:
            raise self.accelerator.FailedError("RESOURCE_EXHAUSTED")
        common = {"lanes": lanes, "remat": given["remat"], "peak_bytes": 10 * lanes, "seconds": 1 / lanes}
        if given["what"] == "trial":
            return common
        return {**common, "examples_per_second": 1.0, "clients_per_second": 1.0, "mfu": 0.5, "bare_jax": 1.0}


@pytest.fixture
def children(accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """In the place of all processes, and results in an empty folder."""
    made = Children(accelerator)
    monkeypatch.setattr(accelerator, "child", made)
    monkeypatch.setattr(accelerator.report, "RESULTS", tmp_path)
    return made


def options(accelerator: Any, **changes: Any) -> Any:
    return accelerator.Options(**{"torch_python": "false", "small": True, "lanes": (2,), **changes})


def test_the_chosen_setting_has_a_process_of_its_own(accelerator: Any, children: Children) -> None:
    found = accelerator.fastest(options(accelerator, lanes=(2, 32, 64, 8)), "vit_tiny-bias-4")
    assert [(what, lanes) for what, _, lanes in children.asked] == [
        ("trial", 2), ("trial", 32), ("trial", 64), ("trial", 8), ("case", 32),
    ]  # fmt: skip
    assert found["peak_bytes"] == 320
    assert [one.get("error") for one in found["tried"]] == [None, None, "RESOURCE_EXHAUSTED", None]
    with pytest.raises(accelerator.FailedError, match="none of 2 settings could be measured"):
        accelerator.fastest(options(accelerator, lanes=(64, 64)), "vit_tiny-bias-4")


def test_a_case_that_fails_is_recorded_and_alone_measured_again(
    accelerator: Any, children: Children, tmp_path: Path
) -> None:
    def rows() -> list[dict[str, Any]]:
        return json.loads((tmp_path / "accelerator-small.json").read_text())["results"]

    first, second = accelerator.SMALL
    children.broken = first
    with pytest.raises(SystemExit, match=f"1 of 2 cases failed: {first}"):
        accelerator.main(options(accelerator))
    assert [(row["name"], row.get("error")) for row in rows()] == [(first, "RESOURCE_EXHAUSTED"), (second, None)]
    assert rows()[1]["verdicts"]["mfu"] == "0.50, met (target 0.3)"

    children.broken, children.asked = "", []
    accelerator.main(options(accelerator))
    assert children.asked == [("case", first, 2)]
    assert [row.get("error") for row in rows()] == [None, None]
    for changes in ({"again": True}, {"repeats": 7, "lanes": (4,)}):
        children.asked = []
        accelerator.main(options(accelerator, **changes))
        assert [case for _, case, _ in children.asked] == [first, second]
    children.commit, children.asked = "b" * 40, []
    accelerator.main(options(accelerator, lanes=(4,), cases=(second,)))
    assert children.asked == [("case", second, 4)] and len(rows()) == 1


def test_a_torch_that_fails_leaves_the_other_figures(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way to compile fails, and one trains something else than fedsim."""

    def child(command: list[str]) -> dict[str, Any]:
        given = json.loads(command[-1])
        if given.get("bare"):
            return {"trained": 8, "examples_per_second": 1.0}
        if given["mode"] == "default":
            raise accelerator.FailedError("no compiler")
        return {"trained": 7, "examples_per_second": 2.0}

    monkeypatch.setattr(accelerator, "child", child)
    case = accelerator.CASES["vit_b16-lora-8"]
    found = accelerator.torch_loops(accelerator.Options(), case, {"rows": 8, "trained": 7}, "python")
    assert found["torch_loop"]["examples_per_second"] == 2.0 and "torch_bare" not in found
    errors = [one["error"] for one in found["torch_errors"]]
    assert errors[0] == "no compiler" and all("to train 7 parameters as fedsim, not 8" in e for e in errors[1:])
    assert len(errors) == 3
