"""Tables of what clients do: when they can be reached, how fast they are. Every hole is refused, by file, line or client."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedsim.config import nearest

COLUMNS = ("download", "upload", "latency", "compute")  # of a table of devices, in the units of the options


def read_trace(file: Path, clients: int, rounds: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Availability from a table: a row `client,start,end` for each stretch of rounds, both ends included.

    A client that is never there has one row with start and end empty. Rows may come in any order.

    Raises:
        ValueError: a missing client, overlapping stretches, a trace that ends before the run, a cell that is no number.
    """
    stretches, seen = [], np.zeros(clients, bool)
    for line, row in _rows(file, ("client", "start", "end"), ("client", "start", "end")):
        client = _client(row, clients, file, line)
        seen[client] = True
        if not row["start"] and not row["end"]:
            continue
        start, end = (_whole(row[name], name, file, line) for name in ("start", "end"))
        if not 1 <= start <= end:
            raise ValueError(f"Expected 1 <= start={start} <= end={end} in line {line} of {file}; rounds count from 1.")
        stretches.append((client, start, end, line))
    _require_all(seen, file, "give it a row, with start and end empty if it is never there")
    if not stretches or (reach := max(end for _, _, end, _ in stretches)) < rounds:
        raise ValueError(
            f"Expected {file} to reach round {rounds}, the last of the run; it ends with round {reach if stretches else 0}: "
            "lengthen it or lower rounds."
        )
    stretches.sort()
    for (client, _, end, before), (other, start, _, line) in pairwise(stretches):
        if client == other and start <= end:
            raise ValueError(
                f"Expected client {client} to have no overlapping stretches, as in lines {before} and {line} of {file}; "
                "join them."
            )
    client, start, end, _ = np.array(stretches, np.int64).T
    span = int(end.max()) + 1
    key = client * span + start  # ascending

    def available(ids: np.ndarray, round: int) -> np.ndarray:
        place = np.searchsorted(key, np.asarray(ids, np.int64) * span + min(round, span - 1), side="right") - 1
        found = np.maximum(place, 0)
        return (place >= 0) & (client[found] == ids) & (end[found] >= round)

    return available


def read_devices(file: Path, clients: int) -> dict[str, np.ndarray]:
    """Columns of a table with one row for each client, (clients,) float64 each.

    Raises:
        ValueError: a missing or double client, an unknown column, a cell that is empty or not positive.
    """
    rows = _rows(file, ("client",), ("client", *COLUMNS))
    names = [name for name in (rows[0][1] if rows else {}) if name != "client"]
    if not names:
        raise ValueError(f"Expected a row and one of the columns {', '.join(COLUMNS)} in {file}; add them.")
    values = {name: np.zeros(clients) for name in names}
    seen = np.zeros(clients, bool)
    for line, row in rows:
        client = _client(row, clients, file, line)
        if seen[client]:
            raise ValueError(
                f"Expected one row for client {client}, found another in line {line} of {file}; remove it."
            )
        seen[client] = True
        for name in names:
            try:
                values[name][client] = float(row[name])
            except ValueError:
                values[name][client] = math.nan
            if not (0 < values[name][client] < math.inf or (name == "latency" and values[name][client] == 0)):
                raise ValueError(
                    f"Expected {name}={row[name]!r} of client {client} in line {line} of {file} to be a number > 0; fill it in."
                )
    _require_all(seen, file, "give it a row")
    return values


def _rows(file: Path, needed: Sequence[str], known: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Lines of a .csv with their numbers; cells stripped."""
    if not file.is_file():
        raise ValueError(
            f"Expected {str(file)!r} to be a file; give the path of a .csv with columns {', '.join(known)}."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"Expected {file} to be a .csv in UTF-8 ({error}); write it anew.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
    try:
        found = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = found
        _check_header(found, needed, known, file)
        rows = []
        for row in reader:
            if "" in row:
                raise ValueError(f"Expected {len(found)} cells in line {reader.line_num} of {file}; remove the others.")
            rows.append((reader.line_num, {name: str(cell).strip() for name, cell in row.items()}))
    except csv.Error as error:
        raise ValueError(
            f"Expected line {reader.line_num + 1} of {file} to be of a .csv ({error}); correct it."
        ) from None
    return rows


def _check_header(found: Sequence[str], needed: Sequence[str], known: Sequence[str], file: Path) -> None:
    """Raises `ValueError` unless every needed column is there, all are known, and each is there once."""
    for name in needed:
        if name not in found:
            other = next((mark for mark in ";\t|" if mark in "".join(found)), None)
            said = f"which seems to be separated by {other!r}; write it with commas" if other else (
                f"which has {', '.join(found) or 'none'}; add it"
            )  # fmt: skip
            raise ValueError(f"Expected a column {name!r} in {file}, {said}.")
    for name in found:
        if name not in known:
            raise ValueError(
                f"Expected column {name!r} of {file} to be one of {', '.join(known)}{nearest(name, known)}."
            )
        if found.count(name) > 1:
            raise ValueError(
                f"Expected column {name!r} once in {file}, not {found.count(name)} times; remove the others."
            )


def _whole(cell: str, name: str, file: Path, line: int) -> int:
    try:
        return int(cell)
    except ValueError:
        raise ValueError(
            f"Expected {name}={cell!r} in line {line} of {file} to be a whole number; fill it in or remove the line."
        ) from None


def _client(row: Mapping[str, str], clients: int, file: Path, line: int) -> int:
    client = _whole(row["client"], "client", file, line)
    if not 0 <= client < clients:
        raise ValueError(f"Expected 0 <= client={client} < clients={clients} in line {line} of {file}; correct it.")
    return client


def _require_all(seen: np.ndarray, file: Path, remedy: str) -> None:
    missing = np.flatnonzero(~seen)
    if len(missing):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"Expected a row for client {missing[0]}{more} in {file}; {remedy}.")
