"""Every reader against every odd input: the right result, or a `ValueError` that names the file and the row."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import fedsim
from fedsim import data
from fedsim.config import Data
from fedsim.data import gate, pixels
from fedsim.data.arrays import read_arrays
from fedsim.data.dataset import Columns, Dataset, Source, plain
from fedsim.data.folder import read_folder
from fedsim.data.partition import make
from fedsim.data.tables import read_table
from fedsim.data.tfds import decoded, read_tfds

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
Rows = list[tuple[Any, Any]]  # texts and labels
Reader = Callable[[Path, Rows], Source]

# ---- tables of texts: the same rows through every reader of texts


def csv_table(folder: Path, rows: Rows) -> Source:
    file = folder / "odd.csv"
    lines = ["text,label", *(",".join("" if cell is None else f'"{cell}"' for cell in row) for row in rows)]
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return read_table(file, Columns())


def jsonl_table(folder: Path, rows: Rows) -> Source:
    file = folder / "odd.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return read_table(file, Columns())


def parquet_table(folder: Path, rows: Rows) -> Source:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    try:
        table = pyarrow.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, UnicodeEncodeError, OverflowError):
        pytest.skip("Arrow itself takes no such column")
    parquet.write_table(table, folder / "odd.parquet")
    return read_table(folder / "odd.parquet", Columns())


def memory(folder: Path, rows: Rows) -> Source:
    y = np.empty(len(rows), object)
    y[:] = [label for _, label in rows]
    return fedsim.arrays([text for text, _ in rows], y, name="odd.list")


READERS: dict[str, Reader] = {"csv": csv_table, "jsonl": jsonl_table, "parquet": parquet_table, "memory": memory}
GOOD: Rows = [("one", "a"), ("two", "b"), ("three", "a")]
ODD: dict[str, tuple[Rows, str]] = {  # the third row of good ones is the odd one
    "blank text": ([*GOOD[:2], ("  ", "a")], "a text"),
    "empty text": ([*GOOD[:2], ("", "a")], "a text"),
    "missing text": ([*GOOD[:2], (None, "a")], "a text"),
    "number as text": ([*GOOD[:2], (5, "a")], "a text"),
    "surrogate in a text": ([*GOOD[:2], ("w\ud83d x", "a")], "Unicode text|UTF-8"),
    "surrogate in a label": ([*GOOD[:2], ("three", "\ud83d")], "Unicode text|UTF-8"),
    "blank label": ([*GOOD[:2], ("three", " ")], "a label"),
    "missing label": ([*GOOD[:2], ("three", None)], "a label"),
    "fraction": ([("one", 1), ("two", 2), ("three", 1.5)], "a label"),
    "NaN": ([("one", 1), ("two", 2), ("three", float("nan"))], "a label"),
    "long label": ([*GOOD[:2], ("three", "x" * 100_000)], "at most 1,000 characters"),
    "long text": ([*GOOD[:2], ("x" * 200, "a")], "at most 100 characters"),
}
ROW = {"csv": r"odd\.csv line 4", "jsonl": r"odd\.jsonl line 3", "parquet": r"odd\.parquet (row 2|from row)"}
ROW["memory"] = r"row 2 of odd\.list"


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_texts_refuses_odd_rows(
    reader: str, odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if odd == "long text":
        monkeypatch.setattr(gate, "LONGEST_TEXT", 100)
    rows, message = ODD[odd]
    if reader == "csv" and odd in ("number as text", "fraction", "NaN"):
        assert len(READERS[reader](tmp_path, rows).y) == 3, "a .csv has words only"
        return
    floats = reader == "parquet" and odd in ("fraction", "NaN")  # a column of floats: its first row is one already
    with pytest.raises(ValueError, match=message) as refused:
        READERS[reader](tmp_path, rows)
    assert re.search(r"odd\.parquet row 0" if floats else ROW[reader], str(refused.value)), refused.value


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_texts_gives_the_same(reader: str, tmp_path: Path) -> None:
    """Blanks around a label do not count, huge whole numbers are words like others, rows keep their order."""
    source = READERS[reader](tmp_path, [("one", "a"), ("zwei \u00e9\U0001f600", " a "), ("three", "b")])
    assert source.x == ["one", "zwei \u00e9\U0001f600", "three"] and source.kind == "text"
    assert source.classes == ("a", "b") and source.y.tolist() == [0, 0, 1] and source.y.dtype == np.int32
    if reader != "memory":  # where numbers count the classes
        big = READERS[reader](tmp_path, [("one", 2**32 + 1), ("two", 1), ("three", 10)])
        assert big.classes == ("1", "10", str(2**32 + 1)) and big.y.tolist() == [2, 0, 1]


# ---- the forms of tables


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "at least one row"),
        ("t.csv", "text,label\n", "at least one row"),
        ("t.jsonl", "", "at least one row"),
        ("t.csv", "text,label,text\na,b,c\n", r"one column 'text' in .*t\.csv line 1, got 2 of that name"),
        ("t.csv", "text,label,label\na,b,c\n", r"one column 'label' in .*t\.csv line 1"),
        ("t.csv", "text ,label, text\na,b,c\n", r"one column 'text' in .*t\.csv line 1"),
        ("t.csv", "text,label,split,split\na,b,c,d\n", r"one column 'split' in .*t\.csv line 1"),
        ("t.jsonl", '{"text": "a", "label": 1, "text": "b"}', r"one column 'text' in .*t\.jsonl line 1"),
        ("t.csv", "text;label\na;b\n", r"t\.csv line 1; it seems to be separated by ';'"),
        ("t.csv", "text\tlabel\na, b\tc\n", r"t\.csv line 1; it seems to be separated by '\\t'"),
        ("t.csv", "text|label|more\na|b|c\n", r"t\.csv line 1; it seems to be separated by '\|'"),
        ("t.csv", "text;label\n", r"t\.csv line 1; it seems to be separated by ';'"),
        ("t.csv", b"\xff\xfet\0e\0x\0t\0", r"UTF-8 in .*t\.csv line 1, got 0xff"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xff"}', r"UTF-8 in .*t\.jsonl line 2"),
        ("t.jsonl", '{"text": "a", "label": 1}\n' + "[" * 100_000, r"JSON in .*t\.jsonl line 2"),
        ("t.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", r"JSON in .*t\.jsonl line 1"),
        ("t.jsonl", '{"text": "a", "label": {"b": 1}}', r"a label .* of .*t\.jsonl line 1"),
        ("t.jsonl", '{"text": ["a"], "label": 1}', r"a text .* of .*t\.jsonl line 1"),
        ("t.jsonl", '"text"', r"a JSON object in .*t\.jsonl line 1"),
        ("t.jsonl", '[["text", "a"], ["label", 1]]', r"a JSON object in .*t\.jsonl line 1"),
    ],
)
def test_forms_that_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(written(tmp_path, name, content), Columns())


@pytest.mark.parametrize("wanted", ["Équipe ", "Équipe", "E\u0301quipe"])
def test_a_header_is_named_as_it_stands_or_without_blanks(tmp_path: Path, wanted: str) -> None:
    file = written(tmp_path, "t.csv", "\ufeff text,Équipe ,n,n\none,a,1,2\ntwo,b,1,2\n")
    source = read_table(file, Columns(label=wanted))
    assert source.x == ["one", "two"] and source.classes == ("a", "b"), "a double that is not read is no fault"
    file = written(tmp_path, "t.csv", "text,label,label \none,a,1\ntwo,b,2\n")
    assert read_table(file, Columns(label="label ")).classes == ("1", "2"), "what stands there exactly comes first"
    assert plain("\ufeff a\xa0") == "a"


def test_duplicates_and_damage_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "t.parquet"
    columns = [pyarrow.array(list("ab")), pyarrow.array(list("xy")), pyarrow.array(list("cd"))]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "label", "text"]), file)
    with pytest.raises(ValueError, match=r"one column 'text' in .*t\.parquet, got 2"):
        read_table(file, Columns())
    words = {"text": [f"text {i}" * 9 for i in range(500)], "label": list("ab") * 250}
    parquet.write_table(pyarrow.table(words), file, compression="NONE", use_dictionary=False)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(whole), 30), *range(4)]:
        file.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"t\.parquet"):
            read_table(file, Columns())
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        file.write_bytes(flipped)
        try:
            read_table(file, Columns())  # another letter of a text cannot be told
        except ValueError as error:
            assert "t.parquet" in str(error)


# ---- arrays


@pytest.mark.parametrize("y", [[0, 2**32 + 1, 1, 0], [0, 1, -1, 0], [0, 1, 2**70, 0]])
def test_labels_are_compared_before_they_are_cast(tmp_path: Path, y: list[int]) -> None:
    row = next(i for i, value in enumerate(y) if value not in (0, 1))
    with pytest.raises(ValueError, match=rf"0 <= label={y[row]} < 2 in row {row} of arrays \(1 such"):
        fedsim.arrays(np.zeros((4, 2)), y, classes=("a", "b"))
    if max(y) < 2**63:
        np.savez(tmp_path / "t.npz", x=np.zeros((4, 2)), y=y, classes=["a", "b"])
        with pytest.raises(ValueError, match=rf"0 <= label={y[row]} < 2 in row {row} of .*t\.npz"):
            read_arrays(tmp_path / "t.npz")


def test_the_largest_label_allocates_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((3, 2)), y=[0, 1, 10**9])
    with pytest.raises(ValueError, match=r"label=1000000000 < 100000 in row 2 .*number the classes 0, 1, 2"):
        read_arrays(tmp_path / "t.npz")


@pytest.mark.parametrize("value", [-1, 2**31, 2**32 + 5])
def test_token_ids_are_compared_before_they_are_cast(value: int) -> None:
    x = np.array([[1, 2], [3, value]])
    with pytest.raises(ValueError, match=rf"token ids from 0 to 2\*\*31 - 1 in row 1 of arrays, got {value}"):
        fedsim.arrays(x, [0, 1])


def test_what_pandas_users_give() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": np.arange(4.0), "b": np.arange(4.0)})
    assert np.array_equal(fedsim.arrays(frame, pd.Series(list("uvuv"))).x, frame.to_numpy(np.float32))
    shuffled = pd.Series([f"text {i}" for i in range(6)]).iloc[[4, 2, 5, 1]]
    source = fedsim.arrays(shuffled, pd.Series([0, 1, 0, 1], index=[7, 3, 1, 9]), client=pd.Series(list("wxyz")))
    assert source.x == ["text 4", "text 2", "text 5", "text 1"] and source.y.tolist() == [0, 1, 0, 1]
    assert source.natural["client"].tolist() == list("wxyz")
    mixed = pd.DataFrame({"a": [0.5, 1, 2, 3], "b": [1, 2, None, 4]}, dtype=object)
    with pytest.raises(ValueError, match=r"numbers in row 2 of arrays, got None"):
        fedsim.arrays(mixed, [0, 1, 0, 1])
    assert fedsim.arrays(mixed.fillna(3.0).astype(object), [0, 1, 0, 1]).x.dtype == np.float32
    with pytest.raises(ValueError, match=r"whole numbers or words, got float64 .*, nan in row 1"):
        fedsim.arrays(frame, pd.Series([0, pd.NA, 1, 1], dtype="Int64"))


@pytest.mark.parametrize("what", ["x", "y", "client"])
def test_masked_values_are_refused(what: str) -> None:
    given: dict[str, Any] = {"x": np.zeros((4, 2)), "y": np.arange(4) % 2, "client": np.arange(4)}
    mask = np.zeros(np.shape(given[what]), bool)
    fedsim.arrays(**given | {what: np.ma.masked_array(given[what], mask)})
    mask[2] = True
    with pytest.raises(ValueError, match=rf"no masked values in {what} of arrays, got some in row 2 \(1 such"):
        fedsim.arrays(**given | {what: np.ma.masked_array(given[what], mask)})


def test_classes_beside_words() -> None:
    x = np.zeros((4, 2))
    source = fedsim.arrays(x, ["neg", "pos ", "pos", "neg"], classes=("pos", "neg"))
    assert source.classes == ("pos", "neg") and source.y.tolist() == [1, 0, 0, 1]
    with pytest.raises(
        ValueError, match=r"label='poss' in row 2 of arrays to be one of the classes \(did you mean pos"
    ):
        fedsim.arrays(x, ["neg", "pos", "poss", "neg"], classes=("pos", "neg"))
    for classes, message in (("ab", "a list of words"), (("a", " "), "a word as class 1"), (("a", "a "), "'a' twice")):
        with pytest.raises(ValueError, match=message):
            fedsim.arrays(x, [0, 1, 0, 1], classes=classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [[1.0], [1.0, 2.0]]}, "x of arrays to be an array"),
        ({"x": np.zeros((2, 0))}, "values in the rows of arrays"),
        ({"x": np.array([[1.0], [1e300]])}, "finite values in row 1"),
        ({"x": np.array([[1.0], [np.inf]])}, "finite values in row 1"),
        ({"x": np.array([[1j], [2j]])}, "to hold numbers, got complex128"),
        ({"y": np.array([0.0, np.nan])}, "whole numbers or words, got float64 .*, nan in row 1"),
        ({"y": ["a", "b\ud800"]}, "Unicode text in the label of row 1"),
        ({"client": ["a", "x" * 1001]}, "at most 1,000 characters in the client of row 1"),
        ({"client": [1, 2**64]}, "a client .* in row 1"),
        ({"client": ["a", "\ud800"]}, "Unicode text in the client of row 1"),
    ],
)
def test_odd_arrays(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedsim.arrays(**{"x": np.zeros((2, 1)), "y": [0, 1]} | changes)


def test_damage_of_npz(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    np.savez(file, x=np.zeros((30, 3)), y=np.arange(30) % 2)
    whole = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 60):
        file.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"t\.npz"):
            read_arrays(file)
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        file.write_bytes(flipped)
        try:
            read_arrays(file)  # bytes of the archive that nothing reads
        except ValueError as error:
            assert "t.npz" in str(error)


# ---- images, in folders and in TFDS


def png(depth: int, colour: int, channels: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    line = b"\0" + bytes(4 * channels * depth // 8)
    header = struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line * 4)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


DEEP = {
    "grey.png": png(16, 0, 1),
    "rgb.png": png(16, 2, 3),
    "grey_alpha.png": png(16, 4, 2),
    "rgba.png": png(16, 6, 4),
    "rgb.ppm": b"P6\n4 4\n65535\n" + bytes(96),
    "grey.pgm": b"P5\n4 4\n65535\n" + bytes(32),
    "plain.ppm": b"P3\n4 4\n1023\n" + b"1 " * 48,
}


def pictures(folder: Path, name: str, content: bytes) -> Path:
    for part in "ab":
        (folder / part).mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "a" / "1.png")
    (folder / "b" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"8 bits a channel in .*b/{name}, got .*; convert it"):
        read_folder(pictures(tmp_path, name, DEEP[name]), None)


@pytest.mark.parametrize("name", [name for name in DEEP if name.endswith(".png")])
def test_deep_images_of_tfds_are_refused(name: str) -> None:
    """TFDS itself would cut colours to 8 bits, and take the lower 8 bits of grey."""
    feature = tfds.features.Image()
    with pytest.raises(ValueError, match="8 bits a channel in row 3 of train, got"):
        decoded(feature, DEEP[name], "row 3 of train")
    assert decoded(feature, png(8, 2, 3), "row 3 of train").shape == (4, 4, 3)
    with pytest.raises(ValueError, match="row 3 of train to be an image"):
        decoded(feature, png(8, 2, 3)[:36], "row 3 of train")


@pytest.mark.parametrize("colour", [(8, 0, 1), (8, 2, 3), (8, 4, 2), (8, 6, 4)])
def test_images_of_eight_bits_are_read(colour: tuple[int, int, int], tmp_path: Path) -> None:
    assert np.shape(read_folder(pictures(tmp_path, "x.png", png(*colour)), None).x) == (2, 4, 4, 3)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    low = b"P6\n4 4\n255\n" + bytes(48)
    assert np.shape(read_folder(pictures(tmp_path, "x.ppm", low), None).x) == (2, 4, 4, 3)


def test_damaged_images_and_what_is_no_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    pictures(tmp_path, "x.png", b"")
    file = tmp_path / "b" / "x.png"
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for at in range(len(whole) - 24):  # what comes last are checksums, and the word that it is the last
        file.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"b/x\.png to be an image"):
            read_folder(tmp_path, None)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"b/x\.png to be a regular file"):
        read_folder(tmp_path, None)
    file.unlink()
    file.write_bytes(png(8, 2, 3).replace(struct.pack(">II", 4, 4), struct.pack(">II", 10**5, 10**5)))
    with pytest.raises(ValueError, match=r"b/x\.png to be an image"):  # a decompression bomb, or a bad checksum
        read_folder(tmp_path, None)


def test_images_that_no_memory_holds(tmp_path: Path) -> None:
    pictures(tmp_path, "x.png", png(8, 2, 3))
    with pytest.raises(ValueError, match=r"2 images of 1048576 x 1048576 pixels to need less memory"):
        data.read(Data(dataset=str(tmp_path), image_store=2**20))
    with pytest.raises(ValueError, match="to need less memory"):
        pixels.all_resized(np.zeros((2, 4, 4, 3), np.uint8), 2**20)


def test_damaged_records_of_tfds(tmp_path: Path) -> None:
    """Truncated or flipped: the file is named; what is still whole may be read."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "fedsim_quadrants" / "1.0.0").glob("*train.array_record*")
    whole, refused = file.read_bytes(), 0
    for at in np.random.default_rng(0).integers(0, len(whole), 12):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        for content in (whole[:at], bytes(flipped)):
            file.write_bytes(content)
            try:
                read_tfds("fedsim_quadrants", str(tmp_path), Columns())
            except ValueError as error:
                refused += 1
                assert "array_record" in str(error)
    assert refused >= 12


# ---- sizes, names, vocabularies, partitions


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"Expected dataset=.* to be a name, a file or a folder"):
        data.read(Data(dataset=name))


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="to be an existing file"):
        data.read(Data(dataset=str(tmp_path / "t.csv")))


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(1, 99, (40, 6))
    x[30, 2] = 100
    config = Data(dataset="arrays")
    source = fedsim.arrays(x, np.arange(40) % 2, name="ids")
    with pytest.raises(ValueError, match=r"token ids below 100, the vocabulary .*, got 100 in row 30 of ids \(1 such"):
        data.load(config, None, source, vocabulary=100)
    assert data.load(config, None, source, vocabulary=101).kind == "text"
    assert data.load(config, None, source).kind == "text"


@pytest.mark.parametrize(
    "changes",
    [
        {"partition": "shards", "classes_per_client": 10**9, "clients": 10**4},
        {"partition": "iid", "clients": 10**12},
        {"partition": "dirichlet", "clients": 10**12},
        {"partition": "quantity", "clients": 10**12},
        {"partition": "dirichlet_balanced", "clients": 10**11},
    ],
)
def test_partitions_that_no_memory_holds(changes: dict[str, Any]) -> None:
    y = np.arange(20, dtype=np.int32) % 2
    rows = np.arange(20)
    dataset = Dataset("toy", None, y, rows, rows[:0], rows[:0], ("a", "b"), "array", "none", {})
    with pytest.raises(ValueError, match=r"clients=\d+ to need less memory than there is, not .*; lower"):
        make(Data(min_size=0, **changes), dataset)
