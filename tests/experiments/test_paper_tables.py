"""`benchmarks/tables.py`: names, JSON, the numbers of FedPEFT's communication table, and the documents that print them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import own

ROOT = Path(__file__).parents[2]
COUNTS = {
    "full": (85_875_556, 85_833_261, 85_800_194),
    "head": (76_900, 34_605, 1_538),
    "bias": (179_812, 137_517, 104_450),
    "bias, patch bias frozen": (179_044, 136_749, 103_682),
    "adapter, width 8": (233_668, 191_373, 158_306),
    "prompt, deep, 10 tokens": (169_060, 126_765, 93_698),
    "LoRA, query and value, r = 4": (224_356, 182_061, 148_994),
    "ShuffleNet V2 0.5x, full": (444_292, 387_917, 343_842),
}


def command(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    file = str(ROOT / "benchmarks" / "tables.py")
    return subprocess.run(
        [sys.executable, file, *argv], env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_json_holds_the_table(environment: dict[str, str]) -> None:
    done = command(environment, "fedpeft", "--table", "communication", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    found = {(r["method"], r["dataset"]): r for r in rows}
    assert len(found) == len(rows) == 24
    for method, counts in COUNTS.items():
        for dataset, count in zip(("CIFAR-100", "Resisc45", "PCam"), counts, strict=True):
            row = found[method, dataset]
            assert row["trainable_parameters"] == count
            assert row["bytes_up"] == row["bytes_down"] == 4 * count
            assert row["mib_up"] == row["mib_down"] == 4 * count / 2**20
            assert row["round_bytes_up"] == row["round_bytes_down"] == 8 * 4 * count
            assert row["run_bytes_up"] == row["run_bytes_down"] == 50 * 8 * 4 * count
            ours = method.startswith(("adapter", "LoRA", "Shuffle"))
            assert (row["source"] == "ours") == ours and (not ours or row["choice"])
    assert [r for r in rows if r["paper"]] == [found["full", "CIFAR-100"]]


def test_names(environment: dict[str, str]) -> None:
    listed = command(environment, "--list")
    assert (listed.returncode, listed.stdout) == (0, "fedpeft: communication\n")
    for argv, message in (
        (["fedpef"], "did you mean fedpeft"),
        (["fedpeft", "--table", "comunication"], "did you mean communication"),
    ):
        refused = command(environment, *argv)
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr


def test_the_document_holds_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    own.execute(ROOT / "benchmarks" / "tables.py", "benchmark").main("fedpeft", "communication")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    document = [line.strip() for line in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8").splitlines()]
    missing = [line for line in lines if line and line not in document]
    assert len(lines) > 80 and not missing
