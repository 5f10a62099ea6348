"""Users' own tables of texts: CSV, JSON lines, Parquet."""

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
from fedsim.data.dataset import SPLIT_WORDS, SPLITS, Columns, Source, class_ids, natural_key

_LICENCE = "your own file"

Row = tuple[str, dict[str, Any]]  # where ("reviews.csv line 7") and the values by column


def read_table(file: Path, columns: Columns) -> Source:
    """Texts and labels of a .csv file with a header, a .jsonl file with an object a line, or a .parquet file.

    Labels are strings or whole numbers; classes are the labels that occur, sorted. A column `split` with train,
    validation and test is used where it exists; without one, test and validation are drawn by seed later.

    Raises:
        ValueError: a file, column, line, text, label, client, domain or split that cannot be used, with file and line.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    texts: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    natural: dict[str, list[Any]] = {key: [] for key in columns.natural}
    places: list[str] = []
    for where, row in readers[file.suffix.lower()](file, columns):
        columns.require(row, where)
        texts.append(_text(row[columns.text], columns.text, where))
        labels.append(_label(row[columns.label], columns.label, where))
        for key, column in columns.natural.items():
            natural[key].append(row[column])
        if natural:
            places.append(where)
        if ("split" in row) != (len(splits) == len(texts) - 1) and len(texts) > 1:
            raise ValueError(f"Expected a `split` in every row or in none, unlike {where}; complete or remove it.")
        if "split" in row:
            splits.append(_split(row, where))
    if not texts:
        raise ValueError(f"Expected at least one row in {file}; it has none.")
    y, classes = class_ids(labels)
    keys = {key: natural_key(values, key, places.__getitem__) for key, values in natural.items()}
    return Source(file.name, texts, y, _split_rows(splits, len(texts), file), classes, "text", _LICENCE, natural=keys)


def existing(file: Path) -> Path:
    """The file itself; raises `ValueError` with the nearest name beside it where there is none."""
    if not file.is_file():
        siblings = [f.name for f in file.parent.glob("*") if f.is_file()] if file.parent.is_dir() else []
        raise ValueError(f"Expected dataset={str(file)!r} to be an existing file{nearest(file.name, siblings)}.")
    return file


def _decoded(file: Path) -> str:
    data = existing(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"Expected UTF-8 in {file} line {line}, got {error.object[error.start]:#x}; convert it."
        ) from None


def _csv_rows(file: Path, columns: Columns) -> Iterator[Row]:
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


def _jsonl_rows(file: Path, columns: Columns) -> Iterator[Row]:
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


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"Expected pyarrow to be installed for {file}; run pip install -e '.[parquet]', or write .jsonl."
        ) from None
    try:
        opened = parquet.ParquetFile(existing(file))
        known = opened.schema_arrow.names
        columns.require(known, str(file))
        wanted = dict.fromkeys([columns.text, columns.label, *columns.natural.values()])
        number = 0
        for batch in opened.iter_batches(columns=[*wanted, *(["split"] if "split" in known else [])]):
            for row in batch.to_pylist():
                yield f"{file} row {number}", row
                number += 1
    except (ArrowException, OSError) as error:  # no Parquet file, a damaged one, or types that are not read
        raise ValueError(f"Expected {file} to be a readable Parquet file ({error}); write it again.") from error


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected a text in column {column!r} of {where}, got {value!r}; remove or fill the row.")
    return value


def _label(value: Any, column: str, where: str) -> str:
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise ValueError(
        f"Expected a label (a word or a whole number) in column {column!r} of {where}, got {value!r}; "
        "remove or fill the row."
    )


def _split(row: dict[str, Any], where: str) -> str:
    word = str(row["split"]).strip().lower()
    if word not in SPLIT_WORDS:
        raise ValueError(f"Expected split={row['split']!r} in {where} to be train, validation or test; correct it.")
    return SPLIT_WORDS[word]


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
