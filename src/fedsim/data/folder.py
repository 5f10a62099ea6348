"""A folder of images by class: `DIR/CLASS/*.png`, or `DIR/train/CLASS/*.png` with validation and test beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.data.dataset import SPLIT_WORDS, SPLITS, Source
from fedsim.data.gate import class_names
from fedsim.data.pixels import stacked

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORM = "a folder of images by class is DIR/CLASS/*.png or DIR/{train,validation,test}/CLASS/*.png"


def read_folder(folder: Path, side: int | None) -> Source:
    """Images (N, H, W, C) uint8 of a folder; classes are the names of the folders, sorted.

    Files that are no images by their names, and hidden ones, are left out. Of an animation the first picture is read. A class
    folder without images is a class that nobody has. Images lie in the order of their names, split after split.

    Args:
        side: resize to this side while reading (`pixels.resized`); None leaves images as they are.

    Raises:
        ValueError: another layout, no image, a damaged image, images of mixed sizes; names the file.
    """
    from PIL import Image

    parts = _parts(folder)
    classes = tuple(sorted({d.name for part in parts.values() for d in part}))
    files: list[Path] = []
    labels: list[int] = []
    splits: dict[str, np.ndarray] = {}
    for split in (name for name in SPLITS if name in parts):
        before = len(files)
        for class_folder in parts[split]:
            found = _images(class_folder)
            files += found
            labels += [classes.index(class_folder.name)] * len(found)
        if len(files) == before:
            raise ValueError(f"Expected images of {split} in {folder}, got none; {_FORM}.")
        splits[split] = np.arange(before, len(files))
    x = stacked(len(files), lambda i: Image.open(files[i]), lambda i: str(files[i]), side)
    return Source(
        folder.name,
        x,
        np.asarray(labels, np.int32),
        splits,
        class_names(classes, str(folder)),
        "image",
        "your own files",
    )


def members(folder: Path) -> dict[str, Path]:
    """What `read_folder` goes by: folders of classes and their images, by path inside the folder.

    Raises:
        ValueError: another layout.
    """
    kept = [path for part in _parts(folder).values() for inside in part for path in (inside, *_images(inside))]
    return {path.relative_to(folder).as_posix(): path for path in kept}


def _parts(folder: Path) -> dict[str, list[Path]]:
    """Split -> its class folders; all are train where the folders are classes."""
    inside = _folders(folder)
    words = [SPLIT_WORDS.get(d.name.lower()) for d in inside]
    if "train" not in words:
        if not inside:
            raise ValueError(f"Expected folders in {folder}, got none; {_FORM}.")
        return {"train": inside}
    parts: dict[str, list[Path]] = {}
    for name, part in zip(words, inside, strict=True):
        if name is None or name in parts:
            raise ValueError(f"Expected {part} beside train to be one folder of validation or test; {_FORM}.")
        parts[name] = _folders(part)
    return parts


def _images(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    for file in found:
        if not file.is_file():  # a pipe would be waited for, for ever
            raise ValueError(f"Expected {file} to be a regular file; remove or rename it.")
    if not found and (inside := _folders(folder)):
        raise ValueError(f"Expected images in {folder}, got the folder {inside[0].name}; {_FORM}.")
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
