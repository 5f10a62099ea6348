"""JSON files of others (`config.json`, `adapter_config.json`, an index of shards), or a `ValueError` that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, with or without a byte-order mark.

    Args:
        remedy: what to do about a file that is none.

    Raises:
        ValueError: it cannot be read, is cut off, nested too deeply, no object, or says a key twice.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {file} to be a readable JSON file ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"Expected {file} to hold a JSON object, not a {type(found).__name__}; {remedy}.")
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found
