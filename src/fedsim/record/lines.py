"""The lines of `rounds.jsonl`, one for each round: checked, appended, read, cut. `docs/record.md` documents every field."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.disk import unwritten
from fedsim.record.files import (
    ANEW,
    CONFIG,
    ROUNDS,
    SCHEMA,
    SUMMARY,
    checked,
    decode,
    read_bytes,
    read_json,
    sealed,
    write_bytes,
)
from fedsim.record.schemas import ABOUT, INTEGERS, LEAVES, LINE, NULLABLE, NUMBERS

Round = Mapping[str, Any]  # one line of rounds.jsonl, as docs/record.md says


def flat(line: Round) -> dict[str, Any]:
    """A round's line without its bytes per leaf, and with `validation_*`, `simulated_*` instead of the nested objects."""
    kept = {
        k: v
        for k, v in line.items()
        if k not in (*LEAVES, "validation", "validation_clients", "simulated", "peers", "privacy")
    }
    seen = line["validation"] or {}
    kept |= {f"peers_{k}": v for k, v in (line.get("peers") or {}).items()}
    kept |= {f"privacy_{k}": v for k, v in (line.get("privacy") or {}).items()}
    kept |= {f"simulated_{k}": v for k, v in (line.get("simulated") or {}).items()}
    return kept | {f"validation_{k}": seen.get(k, math.nan) for k in {"loss": None, **seen}}


def append(directory: Path, line: Round) -> None:
    """Adds one whole line to `rounds.jsonl` and sees it to the disk.

    Raises:
        ValueError: the line is not as `docs/record.md` says.
        OSError: it cannot be written, as on a full disk; the file is as before.
    """
    check_line(line)
    path = directory / ROUNDS
    data = (json.dumps(sealed({"schema": SCHEMA, **line}, identity(directory)), allow_nan=False) + "\n").encode()
    try:
        _add(path, data)
    except OSError as error:
        raise unwritten(f"round {line['round']} in {path}", error) from error


def _add(path: Path, data: bytes) -> None:
    """Adds bytes to a file, all or none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)  # one call, so that a kill leaves all of the line or none
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def identity(directory: Path) -> str:
    """What tells the folder's run from runs of other options and inputs; empty where it was recorded before that."""
    file = directory / CONFIG
    if not file.is_file():
        return ""
    stat = file.stat()
    return _identity(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a line is written in every round
def _identity(file: Path, *stamp: int) -> str:
    return read_json(file, ABOUT).get("identity", "")


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
    if line["validation"] is not None and "loss" not in line["validation"]:
        raise ValueError(f"Expected validation={line['validation']!r} to hold a loss, or to be None.")


def rounds(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of `rounds.jsonl`; a half-written last one is left out.

    Raises:
        ValueError: a line in the middle is damaged, rounds are missing or double, or the schema is a newer one.
    """
    path = directory / ROUNDS
    if not path.exists():
        return []
    text, salt = read_bytes(path), identity(directory)
    found: list[dict[str, Any]] = []
    for i, raw in enumerate(text[: text.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        where = f"line {i} of {path}"
        try:
            line = decode(raw, where)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"round", "schema"} <= line.keys():
            raise ValueError(f"Expected {where} to be a round's JSON; {ANEW}.")
        line = checked(line, LINE, where, salt=salt)
        after = found[-1]["round"] + 1 if found else 1
        if line["round"] != after:
            raise ValueError(f"Expected round={line['round']} to be {after} in {where}; {ANEW}.")
        try:
            check_line(line)
        except ValueError as error:
            raise ValueError(f"Expected {where} to be a round's line; {ANEW} ({error})") from None
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
    old = read_bytes(path) if path.exists() else b""
    write_bytes(path, b"".join(line + b"\n" for line in old.split(b"\n")[:round]))
    (directory / SUMMARY).unlink(missing_ok=True)  # of the run before it went on
    return kept
