"""Users' own files: texts as CSV or JSON lines, arrays as .npz."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest
from fedsim.data.dataset import SPLITS, Source, class_ids

_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test"}
_LICENCE = "your own file"

Row = tuple[str, dict[str, Any]]  # where ("reviews.csv line 7") and the values by column


def read_table(file: Path, text_column: str, label_column: str) -> Source:
    """Texts and labels of a .csv file with a header, or of a .jsonl file with an object a line.

    Labels are strings or whole numbers; classes are the labels that occur, sorted. A column `split` with train,
    validation and test is used where it exists; without one, test and validation are drawn by seed later.

    Raises:
        ValueError: a file, column, line, text, label or split that cannot be used, with the file and the line.
    """
    rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _jsonl_rows(file)
    texts: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    for where, row in rows:
        texts.append(_text(row, text_column, where))
        labels.append(_label(row, label_column, where))
        if ("split" in row) != (len(splits) == len(texts) - 1) and len(texts) > 1:
            raise ValueError(f"Expected a `split` in every row or in none, unlike {where}; complete or remove it.")
        if "split" in row:
            splits.append(_split(row, where))
    if not texts:
        raise ValueError(f"Expected at least one row in {file}; it has none.")
    y, classes = class_ids(labels)
    return Source(file.name, texts, y, _split_rows(splits, len(texts), file), classes, "text", _LICENCE)


def read_arrays(file: Path) -> Source:
    """Arrays `x` (N, ...) and `y` (N,) of an .npz file.

    `y` is whole numbers 0..C-1 or strings; `classes` (C,) names the numbers if it is there. `train`, `validation` and
    `test` are arrays of row numbers, all optional but not without `train`. uint8 of 3 or 4 axes are images (a channel
    axis is added to three), other whole numbers of 2 axes are token ids, everything else becomes float32.

    Raises:
        ValueError: a missing array, a dtype that cannot be used, or row numbers that overlap or do not exist.
    """
    try:
        with np.load(_existing(file), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, header and pickle problems each have their own type
        if isinstance(error, ValueError) and str(error).startswith("Expected"):
            raise
        raise ValueError(
            f"Expected {file} to be an .npz file of plain arrays ({error}); write it by np.savez."
        ) from error
    for name in ("x", "y"):
        if name not in arrays:
            raise ValueError(
                f"Expected an array `{name}` in {file}, got {sorted(arrays)}; write np.savez(file, x=x, y=y)."
            )
    x, kind = _inputs(arrays["x"], file)
    y, classes = _targets(arrays["y"], arrays.get("classes"), file)
    if len(x) != len(y):
        raise ValueError(f"Expected as many rows in x as in y of {file}, got {len(x)} and {len(y)}.")
    splits = {name: _row_numbers(arrays[name], name, len(y), file) for name in SPLITS if name in arrays}
    if splits and "train" not in splits:
        raise ValueError(f"Expected an array `train` beside {sorted(splits)} in {file}; add it or remove the others.")
    used = np.concatenate(list(splits.values())) if splits else np.arange(0)
    if len(np.unique(used)) < len(used):
        raise ValueError(f"Expected each row number once in train, validation and test of {file}; remove the doubles.")
    return Source(file.name, x, y, splits or {"train": np.arange(len(y))}, classes, kind, _LICENCE)


def _existing(file: Path) -> Path:
    if not file.is_file():
        siblings = [f.name for f in file.parent.glob("*") if f.is_file()] if file.parent.is_dir() else []
        raise ValueError(f"Expected dataset={str(file)!r} to be an existing file{nearest(file.name, siblings)}.")
    return file


def _decoded(file: Path) -> str:
    data = _existing(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"Expected UTF-8 in {file} line {line}, got {error.object[error.start]:#x}; convert it."
        ) from None


def _csv_rows(file: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than some texts
    try:
        reader = csv.reader(io.StringIO(_decoded(file), newline=""), strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"Expected a readable row in {file} line {start} ({error}); check its quotes."
                ) from None
            where, start = f"{file} line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
            elif len(fields) != len(header):
                raise ValueError(
                    f"Expected {len(header)} fields in {where}, got {len(fields)}; quote texts with commas."
                )
            else:
                yield where, dict(zip(header, fields, strict=True))
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Expected JSON in {file} line {number} ({error}); write one object a line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"Expected a JSON object in {file} line {number}, got {line.strip()[:40]!r}.")
        yield f"{file} line {number}", row


def _value(row: dict[str, Any], column: str, option: str, where: str) -> Any:
    if column not in row:
        raise ValueError(
            f"Expected {option}={column!r} to be a column in {where}, among {', '.join(map(repr, row))}"
            f"{nearest(column, row)}; set {option}."
        )
    return row[column]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = _value(row, column, "text_column", where)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected a text in column {column!r} of {where}, got {value!r}; remove or fill the row.")
    return value


def _label(row: dict[str, Any], column: str, where: str) -> str:
    value = _value(row, column, "label_column", where)
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise ValueError(
        f"Expected a label (a word or a whole number) in column {column!r} of {where}, got {value!r}; "
        "remove or fill the row."
    )


def _split(row: dict[str, Any], where: str) -> str:
    word = str(row["split"]).strip().lower()
    if word not in _SPLIT_WORDS:
        raise ValueError(f"Expected split={row['split']!r} in {where} to be train, validation or test; correct it.")
    return _SPLIT_WORDS[word]


def _split_rows(splits: list[str], rows: int, file: Path) -> dict[str, np.ndarray]:
    """Row numbers of each split that occurs; all of them are train where there is no split column."""
    if not splits:
        return {"train": np.arange(rows)}
    found = {name: np.flatnonzero(np.asarray(splits) == name) for name in SPLITS if name in splits}
    for name in ("train", "test"):
        if name not in found:
            raise ValueError(
                f"Expected rows with split={name!r} in {file}, got only {', '.join(found)}; "
                "add some, or remove the column `split` to have the splits drawn by seed."
            )
    return found


def _inputs(x: np.ndarray, file: Path) -> tuple[np.ndarray, str]:
    if x.ndim < 2:
        raise ValueError(f"Expected x of {file} to have 2 axes or more, got shape {x.shape}; the first is the rows.")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return (x if x.ndim == 4 else x[..., None]), "image"
    if np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8 and x.ndim == 2:
        return x.astype(np.int32), "text"
    if np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer):
        return x.astype(np.float32), "array"
    raise ValueError(f"Expected x of {file} to hold numbers, got {x.dtype}; write texts as .csv or .jsonl.")


def _targets(y: np.ndarray, names: np.ndarray | None, file: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    if y.ndim != 1 or not (np.issubdtype(y.dtype, np.integer) or y.dtype.kind == "U") or not len(y):
        raise ValueError(
            f"Expected y of {file} to be a list of whole numbers or words, got {y.dtype} of shape {y.shape}."
        )
    if y.dtype.kind == "U":
        return class_ids(y.tolist())
    if names is not None:
        return y.astype(np.int32), tuple(str(name) for name in names)
    return y.astype(np.int32), tuple(str(i) for i in range(int(y.max()) + 1))


def _row_numbers(rows: np.ndarray, name: str, total: int, file: Path) -> np.ndarray:
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or not len(rows):
        raise ValueError(f"Expected {name} of {file} to be a list of row numbers, got {rows.dtype} {rows.shape}.")
    if rows.min() < 0 or rows.max() >= total:
        raise ValueError(f"Expected 0 <= rows of {name} < {total} in {file}, got {rows.min()} to {rows.max()}.")
    return rows.astype(np.int64)
