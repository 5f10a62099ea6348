"""Arrays in .npz files and in memory, good and bad, and a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import data
from fedsim.config import Config
from fedsim.data.arrays import read_arrays
from fedsim.data.dataset import Columns, Source


def arrays(tmp_path: Path, **values: object) -> Source:
    file = tmp_path / "my.npz"
    np.savez(file, **{name: np.asarray(value) for name, value in values.items()})
    return read_arrays(file)


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


def test_clients_and_domains_of_files(tmp_path: Path) -> None:
    x, y = np.zeros((3, 2)), [0, 1, 0]
    natural = arrays(tmp_path, x=x, y=y, client=[7, 7, 9], domain=["a", "b", "a"]).natural
    assert natural["client"].tolist() == [7, 7, 9] and natural["domain"].tolist() == ["a", "b", "a"]
    arrays(tmp_path, x=x, y=y, writer=[1, 2, 3], client=[7, 7, 9])
    assert read_arrays(tmp_path / "my.npz", Columns(client="writer")).natural["client"].tolist() == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"client_column='writers' to be an array of .*my\.npz, .* \(did you mean writer"
    ):
        read_arrays(tmp_path / "my.npz", Columns(client="writers"))
    with pytest.raises(ValueError, match=r"client of .*my\.npz to have a value a row, got shape \(2,\), 3 rows"):
        arrays(tmp_path, x=x, y=y, client=[1, 2])
    with pytest.raises(ValueError, match=r"a client .* in row 1 of .*my\.npz, got ''"):
        arrays(tmp_path, x=x, y=y, client=["a", "", "b"])
    with pytest.raises(ValueError, match=r"a domain .* in row 0 of .*my\.npz, got 0\.5"):
        arrays(tmp_path, x=x, y=y, domain=[0.5, 1.5, 2.5])


def test_arrays_in_memory_are_the_file(tmp_path: Path) -> None:
    """The same source as from the .npz with the same arrays, and no copy of what has the right dtype."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    y, splits = np.array([0, 1, 2, 0, 1, 2]), {"train": [0, 1, 2, 3], "test": [4, 5]}
    memory = fedsim.arrays(x, y, splits=splits, classes=("a", "b", "c"), client=list("uvwuvw"), domain=y)
    file = arrays(tmp_path, x=x, y=y, **splits, classes=["a", "b", "c"], client=list("uvwuvw"), domain=y)
    assert memory.x is x and memory.classes == file.classes == ("a", "b", "c") and memory.kind == file.kind
    assert np.array_equal(memory.y, file.y) and memory.name == "arrays"
    assert all(np.array_equal(memory.splits[k], file.splits[k]) for k in ("train", "test"))
    assert all(np.array_equal(memory.natural[k], file.natural[k]) for k in ("client", "domain"))


def test_texts_in_memory() -> None:
    texts = fedsim.arrays(["one", "two"], ["b", "a"])
    assert (texts.x, texts.kind, texts.y.tolist()) == (["one", "two"], "text", [1, 0])
    assert fedsim.arrays(np.array(["one", "two"]), [0, 1]).x == ["one", "two"]
    with pytest.raises(ValueError, match=r"a text in row 1 of mails, got ' '"):
        fedsim.arrays(["one", " "], [0, 1], name="mails")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": [0, 3, 1, 0], "classes": ("a", "b", "c")}, r"0 <= label=3 < 3 in row 1 of mine \(1 such"),
        ({"y": [0, -1, 1, 0]}, r"0 <= label=-1 < 2 in row 1 of mine"),
        ({"x": np.array([[0.0], [1.0], [np.nan], [0.0]])}, r"finite values in row 2 of mine \(1 such rows hold NaN"),
        ({"classes": ("a", "b", "a")}, r"each class of mine once, got 'a' twice"),
        ({"splits": {"training": [0]}}, r"split 'training' to be a known one \(did you mean train\?"),
        ({"splits": {"test": [0]}}, "an array `train` beside"),
        ({"client": [1, 2]}, r"client of mine to have a value a row"),
        ({"x": np.zeros((3, 1))}, r"as many rows in x as in y of mine, got 3 and 4"),
    ],
)
def test_bad_arrays_in_memory_are_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": np.zeros((4, 1), np.float32), "y": [0, 1, 1, 0], "name": "mine"}
    fedsim.arrays(**good)
    with pytest.raises(ValueError, match=message):
        fedsim.arrays(**good | changes)


CONFIG = Config(dataset="arrays", backbone="linear", peft="head", head_rounds=0, clients=4, clients_per_round=2, rounds=3,
                min_size=1, partition="iid", lr=0.1)  # fmt: skip


@pytest.mark.slow
def test_a_run_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a round and resumed with the same arrays: the same bits; other arrays are refused."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    x = (rng.normal(size=(80, 5)) + y[:, None]).astype(np.float32)
    speed = fedsim.Speed(lanes=2, devices=1, checkpoint_every=1)
    whole = fedsim.run(CONFIG, speed, out=tmp_path / "whole", quiet=True, data=fedsim.arrays(x, y))

    from fedsim import record

    append = record.append

    def stop(directory: Path, line: dict[str, Any]) -> None:
        append(directory, line)
        if line["round"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "append", stop)
        fedsim.run(CONFIG, speed, out=tmp_path / "part", quiet=True, data=fedsim.arrays(x, y))
    with pytest.raises(ValueError, match=r"Expected data=fedsim\.arrays\(x, y\) for dataset='arrays'"):
        fedsim.run(resume=tmp_path / "part", quiet=True)
    with pytest.raises(ValueError, match="inputs"):
        fedsim.run(resume=tmp_path / "part", quiet=True, data=fedsim.arrays(x + 1, y))
    again = fedsim.run(resume=tmp_path / "part", quiet=True, data=fedsim.arrays(x, y))
    assert all(np.array_equal(whole.parameters[k], again.parameters[k]) for k in whole.parameters)


def test_arrays_go_with_their_name_only() -> None:
    source = fedsim.arrays(np.zeros((10, 2), np.float32), np.arange(10) % 2)
    for call in (data.read, fedsim.run):
        with pytest.raises(ValueError, match=r"Expected data=fedsim\.arrays\(x, y\) for dataset='arrays'"):
            call(CONFIG)
    with pytest.raises(ValueError, match=r"dataset='arrays' beside data=\.\.\., got 'digits'"):
        fedsim.run(CONFIG.replace(dataset="digits"), data=source)
    with pytest.raises(
        ValueError, match=r"no client_column='author' for dataset='arrays'.* give client= to fedsim\.arrays"
    ):
        data.read(CONFIG.replace(client_column="author"), source)


def test_no_second_copy_is_held() -> None:
    """Of arrays that have the right dtype, unless `examples` leaves rows out."""
    x = np.zeros((100, 50), np.float32)
    source = fedsim.arrays(x, np.arange(100) % 2)
    assert data.load(CONFIG, None, source).x is x
    assert len(data.load(CONFIG.replace(examples=10), None, source).x) == 10 + 8 + 20


def test_images_are_resized_on_request() -> None:
    """`image_store` works on arrays too; a flat colour stays that colour, and a set of another kind is refused."""
    x = np.full((10, 12, 9, 3), 77, np.uint8)
    source = data.read(CONFIG.replace(image_store=4), fedsim.arrays(x, np.arange(10) % 2))
    assert isinstance(source.x, np.ndarray) and np.array_equal(source.x, np.full((10, 4, 4, 3), 77))
    with pytest.raises(ValueError, match=r"image_store=4 for a set of images, not array"):
        data.read(CONFIG.replace(image_store=4), fedsim.arrays(np.zeros((10, 3)), np.arange(10) % 2))
