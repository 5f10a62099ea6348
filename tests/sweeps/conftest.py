"""Processes of a crew that end cells at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crews import WORKER
from fedsim.sweeps import crew


@pytest.fixture
def crew_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`crew_of(action)`: processes of a crew do that in each cell instead of running it; gives the sweep's folder."""

    def made(action: str) -> Path:
        (tmp_path / "worker.py").write_text(WORKER.replace("ACTION", action))
        inner = crew.command_of

        def command(*args: Any, **named: Any) -> list[str]:
            _, _, module, *rest = inner(*args, **named)
            assert module == "fedsim.sweeps.worker"
            return [sys.executable, str(tmp_path / "worker.py"), *rest]

        monkeypatch.setattr(crew, "command_of", command)
        monkeypatch.setattr("fedsim.sweeps.board.LOOK", 0.02)
        return tmp_path / "study"

    return made
