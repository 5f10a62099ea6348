"""Images of any file format to one array (N, H, W, C) uint8: one mode for all, and one size or a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data.gate import require_memory

if TYPE_CHECKING:
    from PIL import Image

GREY = ("1", "L", "LA")  # modes of PIL that have no colour
DEEP = ("I", "F", "I;16", "I;16L", "I;16B")  # more than 8 bits: a cut to 8 is the user's choice

_DEEP_RAW = re.compile(r";(1[0-6]|32)")

Opened = Callable[[int], "Image.Image"]
Where = Callable[[int], str]


def stacked(count: int, opened: Opened, where: Where, side: int | None) -> np.ndarray:
    """Images as (N, H, W, C) uint8: C is 1 where all are grey, else 3 (palettes and alpha become RGB).

    Every header is read before the first image is decoded, so that mixed sizes show at once, and one array is filled.

    Args:
        count: number of images N.
        opened: opens image i by PIL.
        where: names image i in messages: its file, or its row.
        side: resize to this side (`resized`); None leaves images as they are.

    Raises:
        ValueError: an image that cannot be read, has more than 8 bits a channel, or has another size than the first.
    """
    sizes: list[tuple[int, int]] = []
    grey = True
    for i in range(count):
        with _read(opened, i, where) as image:
            require_bytes(image, where(i))
            sizes.append(image.size)
            grey = grey and image.mode in GREY
        if side is None:
            require_one_size(sizes[i], sizes[0], where(i), where(0))
    width, height = sizes[0] if side is None else (side, side)
    require_images_memory(count, height, width, 1 if grey else 3)
    out = np.empty((count, height, width, 1 if grey else 3), np.uint8)
    for i in range(count):
        with _read(opened, i, where) as image:
            try:
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
            except Exception as error:  # each of PIL's formats raises its own for damaged bytes
                raise ValueError(f"Expected {where(i)} to be an image ({error}); replace or remove it.") from error
        pixels = pixels[..., None] if grey else pixels
        out[i] = pixels if side is None else resized(pixels, side)
    return out


def require_bytes(image: Image.Image, where: str) -> None:
    """Raises `ValueError` for an opened image of more than 8 bits a channel; its pixels need not be decoded.

    PIL opens colours of 16 bits as RGB and cuts them: what the file holds stands in the raw mode of its tiles (`RGB;16B`),
    or beside it as the largest value (of a PPM).
    """
    tiles = getattr(image, "tile", [])
    arguments = [a for _, _, _, args in tiles for a in (args if isinstance(args, tuple) else (args,))]
    raw = [a for a in arguments if isinstance(a, str) and _DEEP_RAW.search(a)]
    largest = [a for a in arguments if image.format == "PPM" and type(a) is int and a > 255]
    if image.mode in DEEP or raw or largest or any(tile[0] == "SGI16" for tile in tiles):
        told = f"mode {image.mode}" if image.mode in DEEP else f"{[*raw, *largest, 'SGI16'][0]}"
        raise ValueError(f"Expected 8 bits a channel in {where}, got {told}; convert it, scaled as you need.")


def require_images_memory(count: int, height: int, width: int, channels: int) -> None:
    """Raises `ValueError` for more bytes of images than this machine has memory."""
    require_memory(
        count * height * width * channels,
        f"{count:,} images of {width} x {height} pixels",
        "take fewer, or a smaller side by image_store",
    )


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W, C) uint8 as (side, side, C): its shorter side is resized to `side`, then the centre is cut out.

    PIL's bicubic filter, which averages over what it shrinks (antialias). An image of that size stays as it is.
    """
    from PIL import Image

    height, width, channels = image.shape
    if (height, width) == (side, side):
        return image
    # PIL resizes the part that is kept, and looks beyond it where the filter reaches over its edge.
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[..., c])).resize((side, side), Image.Resampling.BICUBIC, box)
        )
        for c in range(channels)
    ]
    return np.stack(planes, axis=-1)


def all_resized(x: np.ndarray, side: int) -> np.ndarray:
    """Images (N, H, W, C) uint8 as (N, side, side, C), each by `resized`."""
    if x.shape[1:3] == (side, side):
        return x
    require_images_memory(len(x), side, side, x.shape[-1])
    out = np.empty((len(x), side, side, x.shape[-1]), np.uint8)
    for i, image in enumerate(x):
        out[i] = resized(image, side)
    return out


def require_one_size(size: Any, first: Any, where: str, where_first: str) -> None:
    """Raises `ValueError` where the size of an image differs from that of the first."""
    if tuple(size) != tuple(first):
        raise ValueError(
            f"Expected images of one size, got {tuple(first)} in {where_first} and {tuple(size)} in {where}; "
            "set image_store (--image-store 224) to have them resized to one side while they are read."
        )


def _read(opened: Opened, i: int, where: Where) -> Image.Image:
    try:
        return opened(i)
    except Exception as error:  # PIL, the file system and `datasets` each raise their own
        raise ValueError(f"Expected {where(i)} to be an image ({error}); replace or remove it.") from error
