"""Users' own tables of texts, good and bad."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedsim.data.dataset import Columns, Source
from fedsim.data.tables import read_table


def table(tmp_path: Path, content: str | bytes, name: str = "my.csv") -> Source:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(file, Columns())


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
    assert read_table(file, Columns("review", "stars")).x == ["fine", "poor"]


def test_own_splits(tmp_path: Path) -> None:
    source = table(tmp_path, "text,label,split\na,0,test\nb,1,train\nc,0,Dev\nd,1,train\n")
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [1, 3], "validation": [2], "test": [0]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my.csv", "txt,label\na,b\n", r"text_column='text' to be a column in .*my\.csv line 1.* \(did you mean txt"),
        ("my.csv", "text,stars\na,b\n", r"label_column='label' to be a column in .*my\.csv line 1"),
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
    with pytest.raises(ValueError, match=r"to be an existing file \(did you mean reviews\.csv\?"):
        read_table(tmp_path / "review.csv", Columns())


NATURAL = Columns(client="author", domain="year")


def test_clients_and_domains(tmp_path: Path) -> None:
    """Words where one is a word, whole numbers where all are; a .csv has words only."""
    rows = [{"text": f"text {i}", "label": i % 2, "author": ("b", "a")[i % 2], "year": 1990 + i} for i in range(4)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    natural = read_table(tmp_path / "my.jsonl", NATURAL).natural
    assert natural["client"].tolist() == ["b", "a", "b", "a"] and natural["domain"].tolist() == [1990, 1991, 1992, 1993]
    lines = ["text,label,author,year", *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "my.csv").write_text("\n".join(lines))
    assert read_table(tmp_path / "my.csv", NATURAL).natural["domain"].tolist() == ["1990", "1991", "1992", "1993"]
    assert read_table(tmp_path / "my.csv", Columns()).natural == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,autor,year\na,b,c,d\n", r"client_column='author' .*my\.csv line 1.* \(did you mean autor"),
        ("text,label,author,year\na,b,c,1\nd,e, ,2\n", r"a client .* in .*my\.csv line 3, got ' '; remove or fill"),
        ("text,label,author,year\na,b,c,1\nd,e,f,\n", r"a domain .* in .*my\.csv line 3, got ''"),
    ],
)
def test_bad_clients_and_domains_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "my.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "my.csv", NATURAL)


def parquet(tmp_path: Path, **columns: list[object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "my.parquet", row_group_size=2)
    return tmp_path / "my.parquet"


def test_parquet(tmp_path: Path) -> None:
    """The same as the .csv with the same rows; other columns are left out, whatever they hold."""
    texts, labels = ["one, two", "three", "four"], ["x", "y", "x"]
    file = parquet(tmp_path, text=texts, label=labels, split=["train", "dev", "test"], author=[3, 4, 3], z=[[1]] * 3)
    source = read_table(file, Columns(client="author"))
    assert source.x == texts and source.y.tolist() == [0, 1, 0] and source.classes == ("x", "y")
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [0], "validation": [1], "test": [2]}
    assert source.natural["client"].tolist() == [3, 4, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"texts": ["a"], "label": [1]}, r"text_column='text' .* in .*my\.parquet, among .* \(did you mean texts"),
        ({"text": ["a", "b", None], "label": [1, 2, 3]}, r"a text in column 'text' of .*my\.parquet row 2, got None"),
        ({"text": ["a", "b"], "label": [1.0, 2.0]}, r"a label .* of .*my\.parquet row 0, got 1\.0"),
        ({"text": [], "label": []}, "at least one row"),
    ],
)
def test_bad_parquet_is_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(parquet(tmp_path, **columns), Columns())


def test_what_is_no_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path / "my.parquet"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"Expected .*my\.parquet to be a readable Parquet file"):
        read_table(file, Columns())
    with pytest.raises(ValueError, match=r"to be an existing file \(did you mean my\.parquet\?"):
        read_table(tmp_path / "me.parquet", Columns())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[parquet\]', or write \.jsonl"):
        read_table(file, Columns())
