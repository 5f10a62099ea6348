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
    monkeypatch.syspath_prepend(str(BENCHMARKS / "accelerators"))
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


def test_a_process_prepares_waits_and_answers(accelerator: Any) -> None:
    """Two that are prepared together are timed one after the other, and a failure is told by its last words."""
    code = (
        "import sys; print('noise'); print('ready to be timed', flush=True); sys.stdin.readline(); print('{\"a\": 1}')"
    )
    processes = [accelerator.Process([sys.executable, "-c", code]) for _ in range(2)]
    accelerator.prepare(processes)
    assert all(one.process.poll() is None for one in processes)
    assert [one.answer() for one in processes] == [{"a": 1}] * 2
    assert accelerator.Process([sys.executable, "-c", code]).answer() == {"a": 1}
    for broken in (
        "raise SystemExit('no such thing')",
        code.split("print('{")[0] + "raise SystemExit('no such thing')",
    ):
        with pytest.raises(accelerator.FailedError, match="no such thing"):
            accelerator.Process([sys.executable, "-c", broken]).answer()


class Children:
    """Answers in the place of processes: speed by lanes, one case that does not work."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.broken, self.commit = accelerator, "", "a" * 40
        self.asked: list[tuple[str, int | str]] = []
        self.prepared: list[list[str]] = []

    def __call__(self, command: list[str]) -> Any:
        outer = self

        class Process:
            def start(self) -> None:
                outer.prepared.append(command)

            def prepare(self) -> None:
                pass

            def answer(self) -> dict[str, Any]:
                return outer.answer(json.loads(command[-1]))

        return Process()

    def answer(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["what"] == "machine":
            git = {"commit": self.commit, "changed": False}
            return {"git": git, "device": {"kind": "chip"}, "versions": {"jax": "1"}}
        case, lanes = given["case"], given["lanes"]
        self.asked.append((case, lanes))
        if case == self.broken or lanes == 64:
            raise self.accelerator.FailedError("RESOURCE_EXHAUSTED")
        found = {"lanes": lanes, "remat": given["remat"], "peak_bytes": 10 * lanes, "rows": 4 * lanes, "mfu": 0.5}
        return {**found, "examples_per_second": float(lanes), "clients_per_second": 1.0, "bare_jax": 1.0}


@pytest.fixture
def children(accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """In the place of all processes, and results in an empty folder."""
    made = Children(accelerator)
    monkeypatch.setattr(accelerator, "Process", made)
    monkeypatch.setattr(accelerator.report, "RESULTS", tmp_path)
    return made


def options(accelerator: Any, **changes: Any) -> Any:
    return accelerator.Options(**{"torch_python": "false", "small": True, "rows": (8,), **changes})


def test_the_fastest_setting_counts_and_the_others_are_kept(accelerator: Any, children: Children) -> None:
    case = accelerator.SMALL["vit_tiny-bias-4"]

    def found(*rows: int) -> dict[str, Any]:
        return accelerator.fastest(
            accelerator.settings(options(accelerator, rows=rows, forms=("all", "none")), "vit_tiny-bias-4", case)
        )

    best = found(8, 128, 256, 32)
    assert [lanes for _, lanes in children.asked] == [2, 32, 64, 8] * 2
    assert best["setting"] == "32 lanes, remat none, forms all" and best["peak_bytes"] == 320
    lost = "RESOURCE_EXHAUSTED"
    assert [one.get("error") for one in best["others"]] == [None, lost, None, None, None, lost, None]
    assert found(256)["error"].startswith("none of 2 settings could be measured")


def test_a_case_that_fails_is_recorded_and_alone_measured_again(
    accelerator: Any, children: Children, tmp_path: Path
) -> None:
    def rows() -> list[dict[str, Any]]:
        return json.loads((tmp_path / "accelerator-small.json").read_text())["results"]

    first, second = accelerator.SMALL
    children.broken = first
    with pytest.raises(SystemExit, match=f"1 of 2 cases failed: {first}"):
        accelerator.main(options(accelerator))
    assert "RESOURCE_EXHAUSTED" in rows()[0]["error"] and "error" not in rows()[1]
    assert rows()[1]["verdicts"]["mfu"] == "0.50, met (target 0.3)"

    children.broken, children.asked = "", []
    accelerator.main(options(accelerator))
    assert children.asked == [(first, 2)] and not children.prepared
    assert [row.get("error") for row in rows()] == [None, None]
    for changes in ({"again": True, "together": True}, {"repeats": 7, "rows": (16,)}):
        children.asked = []
        accelerator.main(options(accelerator, **changes))
        assert [case for case, _ in children.asked] == [first, second]
    assert len(children.prepared) == 2  # of the first of these, all before the first answer
    children.commit, children.asked = "b" * 40, []
    accelerator.main(options(accelerator, rows=(16,), cases=(second,)))
    assert children.asked == [(second, 4)] and len(rows()) == 1


def test_a_torch_that_fails_leaves_the_other_figures(accelerator: Any) -> None:
    """It does not run, or trains something else than fedsim."""
    print_it = "import sys; print('ready to be timed', flush=True); sys.stdin.readline(); print('{}')"
    loop = {"trained": 7, "torch_loop": {"examples_per_second": 2.0}, "torch_errors": []}
    for trained, code, error in (
        (7, print_it.format(json.dumps(loop)), None),
        (8, print_it.format(json.dumps(loop)), "to train 8 parameters as fedsim, not 7"),
        (7, "raise SystemExit('no compiler')", "no compiler"),
    ):
        found = accelerator.torch_loops(accelerator.Process([sys.executable, "-c", code]), {"trained": trained})
        if error is None:
            assert found == loop
        else:
            assert "torch_loop" not in found and error in found["torch_errors"][0]["error"]


def test_a_bare_torch_pass_is_for_cases_with_a_ceiling(accelerator: Any) -> None:
    given = {
        name: json.loads(accelerator.torch_command(accelerator.Options(), case, "python", 512)[-1])["rows"]
        for name, case in accelerator.CASES.items()
    }
    assert {name for name, rows in given.items() if rows} == {n for n, c in accelerator.CASES.items() if c.ceiling}
