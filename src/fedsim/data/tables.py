"""Users' own tables of texts: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest
from fedsim.data import chat
from fedsim.data.dataset import SPLIT_WORDS, SPLITS, Columns, Source, plain, spelt
from fedsim.data.gate import labels, natural_key, texts

_LICENCE = "your own file"
ALIKE = "conversations"  # the one class of conversations without labels

Row = tuple[int, Sequence[str], Sequence[Any]]  # number of the line or row, the columns' names, their values


def read_table(file: Path, columns: Columns) -> Source:
    """Texts and labels of a .csv file with a header, a .jsonl file with an object a line, or a .parquet file.

    Labels are strings or whole numbers; classes are the labels that occur, sorted. A column `split` with train,
    validation and test is used where it exists; without one, test and validation are drawn by seed later.

    Where there is no such text, a column `messages` or columns `prompt` and `completion` hold conversations; these need no label.

    Raises:
        ValueError: a file, column, line, text, label, client, domain or split that cannot be used, with file and line.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    suffix = file.suffix.lower()
    unit = "row" if suffix == ".parquet" else "line"
    numbers: list[int] = []
    found: dict[str, list[Any]] = {}
    splits: list[str] = []
    names: Sequence[str] = ()
    at: dict[str, int] = {}
    for number, known, values in readers[suffix](existing(file), columns):
        where = f"{file} {unit} {number}"
        if known != names:  # of a .jsonl, each line may name its own
            names, at = known, _places(columns, known, where)
            found = found or {option: [] for option in at if option != "split"}
            if missing := next((option for option in found if option not in at), None):
                raise ValueError(f"Expected column {missing!r} in {where}, as in the lines before it; add it.")
        numbers.append(number)
        for option, column in found.items():
            column.append(values[at[option]])
        if ("split" in at) != (len(splits) == len(numbers) - 1) and len(numbers) > 1:
            raise ValueError(f"Expected a `split` in every row or in none, unlike {where}; complete or remove it.")
        if "split" in at:
            splits.append(_split(values[at["split"]], where))
    if not numbers:
        raise ValueError(f"Expected at least one row in {file}; it has none.")

    def place(row: int) -> str:
        return f"{file} {unit} {numbers[row]}"

    if "label" in found:
        y, classes = labels(found["label"], lambda row: f"column {columns.label!r} of {place(row)}")
    else:  # of conversations, whose rows are all alike to a partition
        y, classes = np.zeros(len(numbers), np.int32), (ALIKE,)
    turns = None if "text" in found else _turns(found, place)
    if turns is None:
        inputs = texts(found["text"], lambda row: f"column {columns.text!r} of {place(row)}")
    else:
        inputs = ["\n".join(turn.content for turn in one) for one in turns]
    keys = {key: natural_key(found[key], key, place) for key in columns.natural}
    splits_of = _split_rows(splits, len(inputs), file)
    return Source(file.name, inputs, y, splits_of, classes, "text", _LICENCE, natural=keys, turns=turns)


def _turns(found: dict[str, list[Any]], place: Callable[[int], str]) -> list[chat.Conversation]:
    """The conversations of the rows."""
    if "messages" in found:
        return [chat.messages(value, place(row)) for row, value in enumerate(found["messages"])]
    both = zip(found["prompt"], found["completion"], strict=True)
    return [chat.pair(prompt, completion, place(row)) for row, (prompt, completion) in enumerate(both)]


def _conversation(columns: Columns, known: Sequence[str]) -> tuple[str, ...]:
    """The columns of conversations, where there are such and no text."""
    there = {plain(name) for name in known}
    if plain(columns.text) in there - {"messages"}:
        return ()
    return next((names for names in (("messages",), ("prompt", "completion")) if {*names} <= there), ())


def _places(columns: Columns, known: Sequence[str], where: str) -> dict[str, int]:
    """Where in a row the wanted columns stand, and the `split` where there is one."""
    if conversation := _conversation(columns, known):
        asked = {"label": columns.label, **columns.natural}
        if columns.label == Columns().label and plain(columns.label) not in {plain(name) for name in known}:
            del asked["label"]
        asked |= dict(zip(conversation, conversation, strict=True))
        wanted = {option: spelt(name, option, known, where) for option, name in asked.items()}
    else:
        spelling = columns.found(known, where)
        wanted = {"text": spelling.text, "label": spelling.label, **spelling.natural}
    if any(plain(name) == "split" for name in known):
        wanted["split"] = spelt("split", "split", known, where)
    return {option: list(known).index(name) for option, name in wanted.items()}


def existing(file: Path) -> Path:
    """The file itself; raises `ValueError` with the nearest name beside it where there is none."""
    if not file.is_file():
        siblings = [f.name for f in file.parent.glob("*") if f.is_file()] if file.parent.is_dir() else []
        raise ValueError(f"Expected dataset={str(file)!r} to be an existing file{nearest(file.name, siblings)}.")
    return file


def _decoded(file: Path) -> str:
    data = file.read_bytes()
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
            line, where, start = start, f"{file} line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                _require_commas(header, columns, where)
            elif len(fields) != len(header):
                raise ValueError(
                    f"Expected {len(header)} fields in {where}, got {len(fields)}; quote texts with commas."
                )
            else:
                yield line, header, fields
    finally:
        csv.field_size_limit(limit)


def _require_commas(header: list[str], columns: Columns, where: str) -> None:
    """Refuses a header without the wanted columns; says so where another character separates its names."""
    try:
        _places(columns, header, where)
    except ValueError:
        whole = ",".join(header)
        best = max(";\t|", key=whole.count)
        if whole.count(best) < max(1, len(header) - 1):
            raise
        raise ValueError(
            f"Expected commas between the columns of {where}; it seems to be separated by {best!r}: save it with commas, in "
            f"pandas by read_csv(FILE, sep={best!r}).to_csv(FILE, index=False)."
        ) from None


def _jsonl_rows(file: Path, columns: Columns) -> Iterator[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=tuple)  # an object is a tuple of pairs: a name may be there twice
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line.strip())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected JSON in {file} line {number} ({error}); write one object a line.") from None
        if not isinstance(row, tuple):
            raise ValueError(
                f"Expected a JSON object in {file} line {number}, got {line.strip()[:40]!r}; write one object a line."
            )
        yield number, tuple(name for name, _ in row), [value for _, value in row]


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"Expected pyarrow to be installed for {file}; run pip install -e '.[parquet]', or write .jsonl."
        ) from None
    try:
        opened = parquet.ParquetFile(file)
        known = opened.schema_arrow.names
    except Exception as error:  # pyarrow's own, those of the file system, and of the bytes in it
        raise _unreadable(file, error) from error
    wanted = dict.fromkeys(known[i] for i in _places(columns, known, str(file)).values())
    number = 0
    batches = opened.iter_batches(columns=list(wanted))
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # a damaged page, types that are not read, bytes that are no text
            raise _unreadable(f"{file} from row {number} on", error) from error
        if batch is None:
            return
        for row in rows:
            yield number, list(wanted), [row[name] for name in wanted]
            number += 1


def _unreadable(what: object, error: Exception) -> ValueError:
    return ValueError(f"Expected {what} to be a readable Parquet file ({error}); write it again.")


def _split(value: Any, where: str) -> str:
    word = str(value).strip().lower()
    if word not in SPLIT_WORDS:
        raise ValueError(f"Expected split={value!r} in {where} to be train, validation or test; correct it.")
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
