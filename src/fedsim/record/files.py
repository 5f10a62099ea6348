"""Files of a run's folder: their names, JSON as it may be written, and writing whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1  # of all files; raised when a reader of older ones would be misled
CONFIG, ROUNDS, SUMMARY, TRAINED = "config.json", "rounds.jsonl", "summary.json", "trained.safetensors"
CLIENTS = "clients.json"
CHECKPOINTS = "checkpoints"  # folder of `record.checkpoint.Checkpoints`


def plain(x: Any) -> Any:
    """A value as JSON has it: NumPy scalars as Python ones, tuples as lists, NaN and infinity as None (null)."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `ValueError` naming the file if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be whole JSON ({error}); restore the file or run anew.") from None
    if not isinstance(found, dict):
        raise ValueError(f"Expected {path} to hold a JSON object; restore the file or run anew.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then moves it there: readers see the old one or the new one."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
