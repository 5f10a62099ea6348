"""Folders of images by class, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim import data
from fedsim.config import Config
from fedsim.data.folder import read_folder
from fedsim.data.pixels import resized

RNG = np.random.default_rng(0)


def save(file: Path, image: np.ndarray, mode: str | None = None) -> np.ndarray:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file)
    return image


def colour(height: int = 4, width: int = 4) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def grey(height: int = 4, width: int = 4) -> np.ndarray:
    return RNG.integers(0, 256, (height, width), np.uint8)


def test_classes_are_folders(tmp_path: Path) -> None:
    """In the order of names, hidden and other files left out, and a class of which there is nothing."""
    wanted = [save(tmp_path / name, colour()) for name in ("bird/1.png", "cat/1.PNG", "cat/2.bmp")]
    save(tmp_path / "cat" / ".hidden.png", colour())
    (tmp_path / "cat" / "Thumbs.db").write_text("")
    (tmp_path / "dog").mkdir()
    (tmp_path / "readme.txt").write_text("")
    source = read_folder(tmp_path, None)
    assert isinstance(source.x, np.ndarray) and source.x.dtype == np.uint8 and np.array_equal(source.x, wanted)
    assert source.y.tolist() == [0, 1, 1] and source.classes == ("bird", "cat", "dog") and source.kind == "image"
    assert list(source.splits) == ["train"] and source.name == tmp_path.name


def test_splits_are_folders(tmp_path: Path) -> None:
    for split, rows in {"train": 4, "val": 2, "Test": 3}.items():
        for i in range(rows):
            save(tmp_path / split / ("a", "b")[i % 2] / f"{i}.png", colour())
    source = read_folder(tmp_path, None)
    assert {k: v.tolist() for k, v in source.splits.items()} == {
        "train": [0, 1, 2, 3], "validation": [4, 5], "test": [6, 7, 8]
    }  # fmt: skip
    assert source.y.tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 1]


def test_a_class_that_is_tested_and_not_trained_is_said(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "train" / f"c{i % 2}" / f"{i}.png", colour())
        save(tmp_path / "test" / f"c{i % 3}" / f"{i}.png", colour())
    with pytest.warns(
        UserWarning, match=r"1 of 3 classes are in validation or test and have no training example \(c2\)"
    ):
        assert data.load(Config(dataset=str(tmp_path), validation=0.4), None).classes == ("c0", "c1", "c2")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("RGB", 3)])
def test_modes(tmp_path: Path, mode: str, channels: int) -> None:
    """All grey are one channel; anything else among them makes all RGB."""
    first = save(tmp_path / "a" / "1.png", grey())
    save(tmp_path / "b" / "1.png", colour(), mode)
    source = read_folder(tmp_path, None)
    assert isinstance(source.x, np.ndarray) and source.x.shape == (2, 4, 4, channels)
    assert np.array_equal(source.x[0], np.repeat(first[..., None], channels, axis=-1))


def test_mixed_sizes(tmp_path: Path) -> None:
    """Refused with both files; with image_store the shorter side is resized and the centre cut out."""
    images = [save(tmp_path / name, colour(*size)) for name, size in (("a/1.png", (8, 8)), ("b/1.png", (16, 20)))]
    with pytest.raises(
        ValueError, match=r"one size, got \(8, 8\) in .*a/1\.png and \(20, 16\) in .*b/1\.png; set image_store"
    ):
        read_folder(tmp_path, None)
    source = data.read(Config(dataset=str(tmp_path), image_store=8))
    assert isinstance(source.x, np.ndarray) and source.x.shape == (2, 8, 8, 3)
    assert np.array_equal(source.x[0], images[0]), "what has the size already keeps its pixels"
    centre = Image.fromarray(images[1]).resize((10, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    assert np.array_equal(source.x[1], np.asarray(centre))


def test_shrinking_averages() -> None:
    """The bicubic filter is widened: noise of one pixel vanishes, the mean stays."""
    noise = np.random.default_rng(0).integers(0, 2, (256, 256, 1)).astype(np.uint8) * 255
    small = resized(noise, 8)
    assert small.shape == (8, 8, 1) and abs(small.mean() - 127.5) < 3 and small.std() < 15


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"Expected folders in .*, got none; a folder of images by class is"),
        ({"a/readme.txt": b"", "b/readme.txt": b""}, r"images of train in .*, got none"),
        ({"a/b/1.png": b""}, r"images in .*a, got the folder b"),
        ({"train/a/1.png": b"", "other/a/1.png": b""}, r"other beside train to be one folder of validation or test"),
        ({"train/a/1.png": b"", "val/a/1.png": b"", "dev/a/1.png": b""}, r"val beside train to be one folder"),
        ({"a/1.png": b"nonsense", "b/1.png": b""}, r"Expected .*a/1\.png to be an image \(cannot identify"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read(Config(dataset=str(tmp_path)))


def test_damaged_and_deep_images_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", colour(64, 64))
    save(tmp_path / "b" / "1.png", colour(64, 64))
    file = tmp_path / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"Expected .*b/1\.png to be an image \("):
        read_folder(tmp_path, None)
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(file)
    with pytest.raises(ValueError, match=r"8 bits a channel in .*b/1\.png, got mode I;16; convert it"):
        read_folder(tmp_path, None)


def test_a_misspelt_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(ValueError, match=rf"a folder of images by class, .* \(did you mean {tmp_path}/flowers"):
        data.read(Config(dataset=str(tmp_path / "flower")))


def test_a_folder_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected no client_column='author' for dataset=.*, which has no columns"):
        data.read(Config(dataset=str(tmp_path), client_column="author"))
