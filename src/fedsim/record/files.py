"""Files of a run's folder: their names, JSON as it may be written and read, and writing whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.disk import reason, unwritten
from fedsim.record.schemas import Shape, fault

SCHEMA = 1  # of all files; raised when a reader of older ones would be misled
CONFIG, ROUNDS, SUMMARY, TRAINED = "config.json", "rounds.jsonl", "summary.json", "trained.safetensors"
CLIENTS, MEMORIES = "clients.json", "memories.safetensors"
CHECKPOINTS = "checkpoints"  # folder of `record.checkpoint.Checkpoints`
CHECKSUM = "checksum"  # field of every JSON object in these files; runs of before have none
SEAL = re.compile("[0-9a-f]{16}")  # what `checksum` gives
ANEW = "restore the file or run anew"


def plain(x: Any) -> Any:
    """A value as JSON has it: NumPy scalars as Python ones, tuples as lists, NaN and infinity as None (null)."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


# --- reading: the one gate for JSON that lies in a run's folder


def decode(raw: bytes, what: str, remedy: str = ANEW) -> Any:
    """The value of JSON text in UTF-8 with finite numbers.

    Args:
        what: the file, or the line of it, for messages.

    Raises:
        ValueError: it is none; names `what` and says the remedy.
    """
    try:
        return parse(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {what} to be whole JSON ({reason(error)}); {remedy}.") from None


def parse(raw: bytes) -> Any:
    """As `decode`, for who names the file itself; raises `ValueError`, or `RecursionError` for what is nested too deeply."""
    return json.loads(raw.decode(), parse_constant=_finite, parse_float=_finite)


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists, keys as texts; raises `TypeError` for what JSON cannot hold."""
    return json.loads(json.dumps(value))


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def checked(found: Any, shape: Shape, what: str, remedy: str = ANEW, salt: str = "") -> dict[str, Any]:
    """A decoded object without its checksum, if it is as it was written and of the shape; more fields are kept.

    Args:
        salt: the run that a line must belong to.

    Raises:
        ValueError: it is not; names `what` and the field.
    """
    if not isinstance(found, dict):
        raise ValueError(f"Expected {what} to hold a JSON object; {remedy}.")
    schema = found.get("schema", 0)
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(f"Expected schema={schema} <= {SCHEMA} in {what}; use the newer fedsim.")
    rest = {name: value for name, value in found.items() if name != CHECKSUM}
    seal = CHECKSUM if CHECKSUM in found else _misnamed_seal(found, shape)
    if seal is not None and (seal != CHECKSUM or found[seal] != checksum(rest, salt)):
        raise ValueError(
            f"Expected {what} to be as this run wrote it, but its checksum differs; {remedy} (if you changed it on purpose, "
            f"take {seal!r} out of it)."
        )
    if wrong := fault(rest, shape):
        raise ValueError(f"Expected {wrong} in {what}; {remedy}.")
    return rest


def _misnamed_seal(found: dict[str, Any], shape: Shape) -> str | None:
    """The last field, if it is a checksum whose name was damaged: with the name the comparison would go unnoticed."""
    if not found:
        return None
    name, value = next(reversed(found.items()))
    known = {field.removesuffix("?") for field in shape}
    return name if name not in known and isinstance(value, str) and SEAL.fullmatch(value) else None


def read_bytes(path: Path, remedy: str = ANEW) -> bytes:
    """A file's bytes; raises `ValueError` naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"Expected {path} to be a file that can be read ({reason(error)}); {remedy}.") from None


def read_json(path: Path, shape: Shape, remedy: str = ANEW) -> dict[str, Any]:
    """A JSON object from a file, as it was written and of the shape; raises `ValueError` naming the file and the field."""
    return checked(decode(read_bytes(path, remedy), str(path), remedy), shape, str(path), remedy)


# --- writing


def checksum(value: Any, salt: str = "") -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON, behind `salt`."""
    return hashlib.sha256((salt + json.dumps(value, sort_keys=True)).encode()).hexdigest()[:16]


def sealed(value: Mapping[str, Any], salt: str = "") -> dict[str, Any]:
    """A JSON object with its checksum as last field."""
    made = plain(value)
    return {**made, CHECKSUM: checksum(made, salt)}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with its checksum, whole or not at all; raises `OSError` as `write_bytes`."""
    write_bytes(path, (json.dumps(sealed(value), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then moves it there: readers see the old one or the new one.

    Raises:
        OSError: it cannot be written; names the file, what went wrong and the remedy.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise unwritten(str(path), error) from error
