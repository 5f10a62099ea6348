"""The verdicts of the accelerator's benchmark: what counts as met, missed, not measured."""

from __future__ import annotations

import importlib
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


def test_every_target_of_the_issue_has_a_case(accelerator: Any) -> None:
    cases = accelerator.CASES
    assert {name: c.mfu for name, c in cases.items() if c.mfu} == {
        "vit_b16-bias-16": 0.4, "vit_b16-lora-16": 0.3, "vit_b16-adapter-16": 0.3, "vit_b16-prompt-16": 0.3,
    }  # fmt: skip
    assert {name: c.loop for name, c in cases.items() if c.loop} == {
        "vit_b16-lora-8": 3.0, "vit_ti16-lora-8": 20.0, "minilm_l6-lora-8": 20.0,
    }  # fmt: skip


def test_a_failing_child_ends_the_benchmark_with_its_words(accelerator: Any) -> None:
    assert accelerator.child([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(SystemExit, match="no such thing"):
        accelerator.child([sys.executable, "-c", "raise SystemExit('no such thing')"])
