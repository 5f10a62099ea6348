"""Packaged image sets, all grey: Fashion-MNIST from its idx files, ELPV out of its archive, digits from a table."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedsim.data import assets
from fedsim.data.dataset import Source
from fedsim.data.gate import class_ids

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag")
FASHION_CLASSES += ("Ankle boot",)  # in the order of the label's number, as the set's authors give them
ELPV_DATA = "elpv_dataset/data/"


def fashion_mnist() -> Source:
    """Fashion-MNIST from the fetched asset: 60,000 training and 10,000 test images (N, 28, 28, 1) uint8 of 10 classes.

    Raises:
        ValueError: the asset is not in the cache, or its files are not what they should be.
    """
    asset = assets.ASSETS["fashion_mnist"]
    folder = assets.path(asset.name)
    x = [idx(folder / f"{name}-images-idx3-ubyte.gz", 3) for name in ("train", "t10k")]
    y = [idx(folder / f"{name}-labels-idx1-ubyte.gz", 1) for name in ("train", "t10k")]
    train, total = len(y[0]), len(y[0]) + len(y[1])
    return Source(
        name=asset.name,
        x=np.concatenate(x)[..., None],
        y=np.concatenate(y).astype(np.int32),
        splits={"train": np.arange(train), "test": np.arange(train, total)},
        classes=FASHION_CLASSES,
        kind="image",
        licence=asset.licence,
    )


def idx(file: Path, axes: int) -> np.ndarray:
    """The bytes of a gzipped idx file (two zeros, type 8 for uint8, axes, big-endian sizes, values) as an array.

    Raises:
        ValueError: it is damaged, or of another type or number of axes.
    """
    try:
        data = gzip.decompress(file.read_bytes())
        if data[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"it starts with {data[:4].hex(' ')}")
        shape = struct.unpack_from(f">{axes}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(
            f"Expected {file} to be a gzipped idx file of bytes with {axes} axes ({error}); delete {file.parent} and "
            "fetch again."
        ) from error


def elpv() -> Source:
    """ELPV from the fetched asset: images (N, 300, 300, 1) uint8 of solar cells, functional or defective.

    A cell is defective where its probability of a defect is above one half. The natural key `domain` is the type of
    the cell, mono or poly. The archive is read as it is: nothing is unpacked to the disk.

    Raises:
        ValueError: the asset is not in the cache, or the archive is not what it should be.
    """
    from PIL import Image

    asset = assets.ASSETS["elpv"]
    file = assets.path(asset.name) / "elpv.zip"
    try:
        with zipfile.ZipFile(file) as archive:
            lines = archive.read(ELPV_DATA + "labels.csv").decode().splitlines()
            names, probabilities, domains = zip(*(line.split() for line in lines if line.strip()), strict=True)
            images = []
            for name in names:
                with Image.open(io.BytesIO(archive.read(ELPV_DATA + name))) as image:
                    images.append(np.asarray(image.convert("L")))
            x = np.stack(images)[..., None]
        y, classes = class_ids(["defective" if float(p) > 0.5 else "functional" for p in probabilities])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {file} to hold {ELPV_DATA}labels.csv (image, probability, cell type) and its images of one size "
            f"({error}); delete {file.parent} and fetch again."
        ) from error
    return Source(
        name=asset.name,
        x=x,
        y=y,
        splits={"train": np.arange(len(y))},
        classes=classes,
        kind="image",
        licence=asset.licence,
        natural={"domain": np.asarray(domains)},
    )


def digits() -> Source:
    """scikit-learn's digits from the fetched asset: 1,797 grey images (N, 8, 8, 1) uint8 of 10 classes.

    The file's values 0 to 16 (blocks of 4 x 4 black and white pixels, counted) become `value * 255 // 16`.

    Raises:
        ValueError: the asset is not in the cache, or its file is not what it should be.
    """
    asset = assets.ASSETS["digits"]
    file = assets.path(asset.name) / "digits.csv.gz"
    try:
        rows = np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.float64).astype(
            np.int64
        )
        if rows.ndim != 2 or rows.shape[1] != 65 or rows[:, :64].min() < 0 or rows[:, :64].max() > 16:
            raise ValueError(f"it has shape {rows.shape}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"Expected {file} to be gzipped rows of 64 pixels from 0 to 16 and a label ({error}); delete {file.parent} and "
            "fetch again."
        ) from error
    return Source(
        name=asset.name,
        x=(rows[:, :64] * 255 // 16).astype(np.uint8).reshape(-1, 8, 8, 1),
        y=rows[:, 64].astype(np.int32),
        splits={"train": np.arange(len(rows))},
        classes=tuple(map(str, range(10))),
        kind="image",
        licence=asset.licence,
    )
