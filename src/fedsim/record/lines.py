"""The lines of `rounds.jsonl`, one for each round: checked, appended, read, cut. `docs/record.md` documents every field."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.record.files import ROUNDS, SCHEMA, SUMMARY, plain, write_bytes

INTEGERS = ("round", "bytes_up", "bytes_down", "setup_bytes", "total_bytes_up", "total_bytes_down")
INTEGERS += ("clients", "reported", "nonfinite", "examples")
NUMBERS = ("loss", "accuracy", "seconds", "compile_seconds", "clients_per_second", "examples_per_second")
NUMBERS += ("lane_occupancy", "row_occupancy")
NULLABLE = ("loss", "accuracy", "clients_per_second", "examples_per_second")  # where nobody reported, or all compiled
LEAVES = ("bytes_up_leaves", "bytes_down_leaves")
Round = Mapping[str, Any]  # one line of rounds.jsonl, as docs/record.md says


def flat(line: Round) -> dict[str, Any]:
    """A round's line without its bytes per leaf, and with `validation_*`, `simulated_*` instead of the nested objects."""
    kept = {k: v for k, v in line.items() if k not in (*LEAVES, "validation", "simulated")}
    seen = line["validation"] or {}
    kept |= {f"simulated_{k}": v for k, v in (line.get("simulated") or {}).items()}
    return kept | {f"validation_{k}": seen.get(k, math.nan) for k in ("loss", "accuracy")}


def append(directory: Path, line: Round) -> None:
    """Adds one whole line to `rounds.jsonl` and sees it to the disk.

    Raises:
        ValueError: the line is not as `docs/record.md` says.
        OSError: the disk is full; the file is as before.
    """
    check_line(line)
    data = (json.dumps(plain({"schema": SCHEMA, **line}), allow_nan=False) + "\n").encode()
    descriptor = os.open(directory / ROUNDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)  # one call, so that a kill leaves all of the line or none
            if written != len(data):
                raise OSError(f"Expected {len(data)} bytes of {directory / ROUNDS} to be written; make room.")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def check_line(line: Round) -> None:
    """Raises `ValueError` unless a round's line has every field, in its type, and its leaves sum up to its bytes."""
    missing = [k for k in (*INTEGERS, *NUMBERS, *LEAVES, "phase", "validation") if k not in line]
    if missing:
        raise ValueError(f"Expected fields {', '.join(missing)} in the line of round {line.get('round')}; add them.")
    for name in INTEGERS:
        x = line[name]
        if isinstance(x, bool) or not isinstance(x, (int, np.integer)) or x < 0:
            raise ValueError(f"Expected {name}={x!r} to be an integer >= 0; sum bytes in Python integers.")
    for name in NUMBERS:
        if line[name] is None and name in NULLABLE:
            continue
        if isinstance(line[name], bool) or not isinstance(line[name], (int, float, np.floating)):
            raise ValueError(f"Expected {name}={line[name]!r} to be a number; fetch it from the device.")
    if line["phase"] not in ("head", "peft"):
        raise ValueError(f"Expected phase={line['phase']!r} to be head or peft.")
    for name in LEAVES:
        total = sum(line[name].values())
        if total != line[name.removesuffix("_leaves")]:
            raise ValueError(f"Expected the sum of {name}={total} to be {line[name.removesuffix('_leaves')]}.")
    if line["validation"] is not None and not {"loss", "accuracy"} <= set(line["validation"]):
        raise ValueError(f"Expected validation={line['validation']!r} to hold loss and accuracy, or to be None.")


def rounds(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of `rounds.jsonl`; a half-written last one is left out.

    Raises:
        ValueError: a line in the middle is damaged, rounds are missing or double, or the schema is a newer one.
    """
    path = directory / ROUNDS
    if not path.exists():
        return []
    text = path.read_bytes()
    found: list[dict[str, Any]] = []
    for i, raw in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(raw)
            number, schema = line["round"], line["schema"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"Expected line {i} of {path} to be a round's JSON; restore the file or run anew."
            ) from None
        if schema > SCHEMA:
            raise ValueError(f"Expected schema={schema} <= {SCHEMA} in line {i} of {path}; use the newer fedsim.")
        after = found[-1]["round"] + 1 if found else 1
        if number != after:
            raise ValueError(
                f"Expected round={number} to be {after} in line {i} of {path}; restore the file or run anew."
            )
        found.append(line)
    return found


def truncate(directory: Path, round: int) -> list[dict[str, Any]]:
    """Cuts `rounds.jsonl` to the rounds up to `round` and gives them: a run resumes from the checkpoint of `round`.

    Raises:
        ValueError: lines up to `round` are missing or damaged; the file stays as it is.
    """
    kept = [line for line in rounds(directory) if line["round"] <= round]
    if len(kept) != round:
        raise ValueError(
            f"Expected {directory / ROUNDS} to hold rounds 1 to {round}, found {len(kept)}; restore it or run anew."
        )
    path = directory / ROUNDS
    old = path.read_bytes() if path.exists() else b""
    write_bytes(path, b"".join(old.splitlines(keepends=True)[:round]))
    (directory / SUMMARY).unlink(missing_ok=True)  # of the run before it went on
    return kept
