"""Users' own files, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.dataset import Source
from fedsim.data.tables import read_arrays, read_table


def table(tmp_path: Path, content: str | bytes, name: str = "my.csv") -> Source:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(file, "text", "label")


def arrays(tmp_path: Path, **values: object) -> Source:
    file = tmp_path / "my.npz"
    np.savez(file, **{name: np.asarray(value) for name, value in values.items()})
    return read_arrays(file)


def test_csv(tmp_path: Path) -> None:
    source = table(tmp_path, '\ufefflabel,text\r\n good ,"one, two\nthree"\r\n\r\nbad,four\r\n')
    assert source.x == ["one, two\nthree", "four"]
    assert source.y.tolist() == [1, 0] and source.classes == ("bad", "good")
    assert source.splits["train"].tolist() == [0, 1] and source.kind == "text" and source.key is None


def test_csv_with_a_very_long_text(tmp_path: Path) -> None:
    assert len(table(tmp_path, "text,label\n" + "word " * 60_000 + ",1\n").x[0]) == 300_000


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 10}, {"text": "b", "label": 9}, {"text": "c", "label": "10"}]
    source = table(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "my.jsonl")
    assert source.y.tolist() == [1, 0, 1] and source.classes == ("9", "10")


def test_own_columns(tmp_path: Path) -> None:
    file = tmp_path / "my.csv"
    file.write_text("review,stars,text\nfine,5,x\npoor,1,y\n")
    assert read_table(file, "review", "stars").x == ["fine", "poor"]


def test_own_splits(tmp_path: Path) -> None:
    source = table(tmp_path, "text,label,split\na,0,test\nb,1,train\nc,0,Dev\nd,1,train\n")
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [1, 3], "validation": [2], "test": [0]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my.csv", "txt,label\na,b\n", r"text_column='text' to be a column in .*my\.csv line 2.* did you mean txt"),
        ("my.csv", "text,stars\na,b\n", r"label_column='label' to be a column in .*my\.csv line 2"),
        ("my.csv", "text,label\na,b\n  ,c\n", r"a text in column 'text' of .*my\.csv line 3"),
        ("my.csv", "text,label\na,b\nc,\n", r"a label .* of .*my\.csv line 3"),
        ("my.csv", 'text,label\n"a\nb",c\nd,e,f\n', r"2 fields in .*my\.csv line 4, got 3"),
        ("my.csv", 'text,label\na,b\n"c,d\n', r"a readable row in .*my\.csv line 3"),
        ("my.csv", b"text,label\na,b\nc\xff,d\n", r"UTF-8 in .*my\.csv line 3, got 0xff"),
        ("my.csv", "text,label\n", r"at least one row in .*my\.csv"),
        ("my.csv", "", r"at least one row in .*my\.csv"),
        ("my.csv", "text,label,split\na,b,train\nc,d,holdout\n", r"split='holdout' in .*my\.csv line 3"),
        (
            "my.csv",
            "text,label,split\na,b,train\nc,d,dev\n",
            r"rows with split='test' in .*my\.csv, got only train, val",
        ),
        ("my.jsonl", '{"text": "a", "label": 1}\n{"text": ', r"JSON in .*my\.jsonl line 2"),
        ("my.jsonl", '["a", 1]', r"a JSON object in .*my\.jsonl line 1"),
        ("my.jsonl", '{"text": 5, "label": 1}', r"a text in column 'text' of .*line 1, got 5"),
        ("my.jsonl", '{"text": "a", "label": 1.5}', r"a label .* of .*line 1, got 1\.5"),
        ("my.jsonl", '{"text": "a", "label": null}', r"a label .* of .*line 1, got None"),
        ("my.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"label_column='label' .*my\.jsonl line 2"),
        (
            "my.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": 1, "split": "test"}',
            r"every row or in none, unlike .*my\.jsonl line 2",
        ),
        (
            "my.jsonl",
            '{"text": "a", "label": 1, "split": "test"}\n{"text": "b", "label": 1}',
            r"every row or in none, unlike .*my\.jsonl line 2",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(tmp_path, content, name)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"to be an existing file; did you mean reviews\.csv\?"):
        read_table(tmp_path / "review.csv", "text", "label")


@pytest.mark.parametrize(
    ("x", "kind", "shape", "dtype"),
    [
        (np.zeros((2, 4, 4), np.uint8), "image", (2, 4, 4, 1), np.uint8),
        (np.zeros((2, 4, 4, 3), np.uint8), "image", (2, 4, 4, 3), np.uint8),
        (np.zeros((2, 5), np.int64), "text", (2, 5), np.int32),
        (np.zeros((2, 5), np.float64), "array", (2, 5), np.float32),
        (np.zeros((2, 5), np.uint8), "array", (2, 5), np.float32),
    ],
)
def test_kinds_of_arrays(tmp_path: Path, x: np.ndarray, kind: str, shape: tuple[int, ...], dtype: type) -> None:
    source = arrays(tmp_path, x=x, y=[1, 0])
    assert (source.kind, source.x.shape, source.x.dtype) == (kind, shape, dtype)
    assert source.y.tolist() == [1, 0] and source.y.dtype == np.int32 and source.classes == ("0", "1")


def test_array_options(tmp_path: Path) -> None:
    x = np.zeros((4, 2))
    assert arrays(tmp_path, x=x, y=["b", "a", "b", "c"]).classes == ("a", "b", "c")
    assert arrays(tmp_path, x=x, y=[0, 0, 1, 0], classes=["no", "yes", "perhaps"]).classes == ("no", "yes", "perhaps")
    source = arrays(tmp_path, x=x, y=[0, 0, 1, 0], train=[3, 1], test=[0])
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [3, 1], "test": [0]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": np.zeros((2, 2))}, r"an array `y` in .*my\.npz, got \['x'\]"),
        ({"x": np.zeros(2), "y": [0, 1]}, r"2 axes or more, got shape \(2,\)"),
        ({"x": [["a"], ["b"]], "y": [0, 1]}, "to hold numbers, got <U1"),
        ({"x": np.zeros((2, 2)), "y": [0.0, 1.0]}, "whole numbers or words, got float64"),
        ({"x": np.zeros((2, 2)), "y": [[0, 1], [1, 0]]}, r"of shape \(2, 2\)"),
        ({"x": np.zeros((3, 2)), "y": [0, 1]}, r"as many rows in x as in y of .*my\.npz, got 3 and 2"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "test": [0]}, r"an array `train` beside \['test'\]"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "train": [0, 2]}, r"0 <= rows of train < 2 in .*my\.npz, got 0 to 2"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "train": [True, False]}, "train .* list of row numbers, got bool"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "train": [0, 1], "test": [1]}, "each row number once"),
        ({"x": np.array([[None], [None]]), "y": [0, 1]}, "to be an .npz file of plain arrays"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrays(tmp_path, **values)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "my.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"Expected .*my\.npz to be an \.npz file"):
        read_arrays(tmp_path / "my.npz")
