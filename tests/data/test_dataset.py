"""Splits, classes, checks and the dispatch of `data.load`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim import data
from fedsim.config import Config
from fedsim.data.dataset import Source, divide
from fedsim.data.gate import check, class_ids

Splits = dict[str, np.ndarray]


def source(**changes: object) -> Source:
    x = np.zeros((4, 3), np.float32)
    good = Source("four", x, np.array([0, 1, 0, 1], np.int32), {"train": np.arange(4)}, ("a", "b"), "array", "none")
    return good._replace(**changes)


@given(rows=st.integers(10, 300), validation=st.floats(0.1, 0.6), seed=st.integers(0, 5), own=st.booleans())
def test_splits_are_disjoint_and_complete(rows: int, validation: float, seed: int, own: bool) -> None:
    splits = {"train": np.arange(rows - 4), "test": np.arange(rows - 4, rows)} if own else {"train": np.arange(rows)}
    train, held, test = divide(splits, validation=validation, examples=None, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([train, held, test])), np.arange(rows))
    if own:
        assert np.array_equal(test, splits["test"])
    else:
        assert len(test) == round(0.2 * rows)
    assert len(held) == round(validation * (rows - len(test)))
    assert all(np.array_equal(part, np.sort(part)) and part.dtype == np.int64 for part in (train, held, test))


def test_fewer_examples_change_train_only_and_are_nested() -> None:
    splits = {"train": np.arange(100)}
    whole = divide(splits, validation=0.1, examples=None, seed=3)
    thirty = divide(splits, validation=0.1, examples=30, seed=3)
    ten = divide(splits, validation=0.1, examples=10, seed=3)
    assert (len(thirty[0]), len(ten[0])) == (30, 10)
    assert set(ten[0]) < set(thirty[0]) < set(whole[0])
    for part in (1, 2):
        assert np.array_equal(whole[part], thirty[part]) and np.array_equal(whole[part], ten[part])
    assert not np.array_equal(ten[0], divide(splits, validation=0.1, examples=10, seed=4)[0])


def test_drawn_splits_are_golden() -> None:
    train, validation, test = divide({"train": np.arange(20)}, validation=0.25, examples=None, seed=0)
    assert test.tolist() == GOLDEN["test"]
    assert validation.tolist() == GOLDEN["validation"]
    assert len(train) == 12


GOLDEN: dict[str, list[int]] = {"test": [13, 15, 17, 19], "validation": [0, 4, 10, 11]}


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected examples=90 <= 72 training rows"):
        divide({"train": np.arange(100)}, validation=0.1, examples=90, seed=0)
    with pytest.raises(ValueError, match=r"at least one row of train and of validation, got 2 and 0"):
        divide({"train": np.arange(2), "test": np.arange(2, 4)}, validation=0.1, examples=None, seed=0)


@pytest.mark.parametrize(
    ("labels", "ids", "classes"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        (["10", "2", "10"], [1, 0, 1], ("2", "10")),
        (["-1", "1", "0"], [0, 2, 1], ("-1", "0", "1")),
        (["10", "2", "x"], [0, 1, 2], ("10", "2", "x")),
    ],
)
def test_classes_are_sorted(labels: list[str], ids: list[int], classes: tuple[str, ...]) -> None:
    found, names = class_ids(labels)
    assert found.tolist() == ids and found.dtype == np.int32 and names == classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.array([0, 1, 2, 1], np.int32)}, r"0 <= label=2 < 2 in row 2 of four \(1 such"),
        ({"y": np.array([0, -1, -1, 1], np.int32)}, r"0 <= label=-1 < 2 in row 1 of four \(2 such"),
        ({"y": np.array([0, 1], np.int32)}, "as many inputs as labels in four, got 4 and 2"),
        ({"classes": ("a",)}, "at least 2 classes in four"),
        ({"classes": ("a", "a")}, "each class of four once, got 'a' twice"),
        ({"natural": {"client": np.arange(3)}}, "as many values of client as labels in four, got 3, 4"),
        ({"x": np.array([[0.0], [1.0], [np.nan], [np.inf]])}, r"finite values in row 2 of four \(2 such"),
    ],
)
def test_unusable_sets_are_refused(changes: dict[str, object], message: str) -> None:
    check(source())
    with pytest.raises(ValueError, match=message):
        check(source(**changes))


def test_load_gives_arrays_and_three_splits(tmp_path: Path) -> None:
    file = tmp_path / "images.npz"
    x = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    np.savez(file, x=x, y=np.arange(50) % 3)
    config = Config(dataset=str(file), examples=20)
    dataset = data.load(config, None)
    assert dataset.kind == "image" and dataset.classes == ("0", "1", "2") and dataset.name == "images.npz"
    assert dataset.y.dtype == np.int32
    # Training rows beyond `examples` are left out, and what is left keeps its order and its labels.
    assert len(dataset.x) == len(dataset.y) == 20 + 4 + 10
    whole = {row.tobytes(): i % 3 for i, row in enumerate(x)}
    assert [whole[row.tobytes()] for row in dataset.x] == dataset.y.tolist()
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (20, 4, 10)
    again = data.load(config, None)
    assert all(np.array_equal(a, b) for a, b in zip(dataset[2:6], again[2:6], strict=True))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("20newsgroup", r"Expected dataset='20newsgroup' to be one of .* \(did you mean 20newsgroups\?"),
        ("reviews.xlsx", r"a file that ends in \.csv, \.jsonl, \.parquet, \.npz"),
        ("missing.csv", r"Expected dataset='missing.csv' to be an existing file"),
    ],
)
def test_an_unknown_set_is_refused(dataset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(Config(dataset=dataset), None)


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(10)))
    with pytest.raises(ValueError, match="Expected backbone='cnn' to have a tokenizer"):
        data.load(Config(dataset=str(file)), None, backbone="cnn")


def test_needed_assets() -> None:
    assert data.needed(Config()) == ("20newsgroups",)
    assert data.needed(Config(dataset="mine.csv")) == ()


def test_data_needs_no_jax_and_no_tensorflow() -> None:
    code = (
        "import sys, fedsim.data.show, fedsim.data.tfds, fedsim.data.tables, fedsim.data.text;"
        "import fedsim.data.arrays, fedsim.data.folder, fedsim.data.hugging_face;"
        "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'tokenizers', 'matplotlib', 'PIL', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
