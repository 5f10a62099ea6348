"""`experiments/killed_sweep.py`: a killed sweep beside an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "killed_sweep.py"


def test_tables_are_compared_without_times_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import killed_sweep

    def table(text: str) -> list[dict[str, str]]:
        (tmp_path / "cells.csv").write_text(text)
        return killed_sweep.table(tmp_path / "cells.csv")

    one = table("name,test,seconds\na,0.5,1.0\n")
    assert one == table("name,test,seconds\na,0.5,2.0\n") == [{"name": "a", "test": "0.5"}]
    assert one != table("name,test,seconds\na,0.4,1.0\n")


@pytest.mark.slow
def test_the_small_form_finds_no_difference(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "of 4 cells were done; 0 finished cells ran again" in done.stdout
    assert "cells.csv: 4 and 4 rows, 0 of them differ" in done.stdout
    assert "rounds.csv: 40 and 40 rows, 0 of them differ" in done.stdout
