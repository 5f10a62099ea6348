"""Results stay what they were: losses to rounding, bytes and counts exactly, of a few small runs kept as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_rounds import CASES, FILE, measured

from brief import brief

KEPT = json.loads(FILE.read_text())


def assert_alike(kept: Any, now: Any, where: str) -> None:
    """Equal in structure, words and whole numbers; to 2e-5 in what was computed."""
    if isinstance(kept, dict):
        assert kept.keys() == now.keys(), where
        for name in kept:
            assert_alike(kept[name], now[name], f"{where}/{name}")
    elif isinstance(kept, list):
        assert len(kept) == len(now), where
        for i, (a, b) in enumerate(zip(kept, now, strict=True)):
            assert_alike(a, b, f"{where}/{i}")
    elif isinstance(kept, float):
        assert now == pytest.approx(kept, rel=2e-5, abs=1e-6), where
    else:
        assert kept == now, where


def test_every_case_is_kept() -> None:
    assert KEPT.keys() == CASES.keys()


@pytest.mark.parametrize("case", brief(CASES, 3))
def test_rounds_are_as_they_were(case: str, tmp_path: Path) -> None:
    now = json.loads(json.dumps(measured(case, tmp_path)))
    assert now["rounds"][-1]["loss"] != now["rounds"][0]["loss"], "the case trains"
    assert_alike(KEPT[case], now, case)
