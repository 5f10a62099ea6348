"""Images on their way into a backbone: channels, size, scale, all inside the compiled program, from bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim.backbones.layers import Shape

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Pixels(NamedTuple):
    """How a backbone wants its images."""

    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]
    resize: int | None = None
    """Side to which images are resized first (antialiased when smaller); None takes them as they are."""
    interpolation: str = "bilinear"
    """Or "bicubic" (Keys 1981, a = -0.5)."""


HALF_PIXELS = Pixels()
IMAGENET_PIXELS = Pixels(*IMAGENET)


def prepare(x: jax.Array, pixels: Pixels, dtype: Any = jnp.float32) -> jax.Array:
    """Images (B, H, W) or (B, H, W, C) -> (B, H', W', channels), prepared in float32 and handed on as `dtype`.

    uint8 is divided by 255 and normalised by mean and standard deviation; float32 is taken as normalised already.
    A single channel is repeated where the backbone wants more. docs/preprocessing.md compares resizing with Pillow's
    and TensorFlow's. Bicubic values may lie a little outside of the range of bytes; they are kept.
    """
    channels = len(pixels.mean)
    x = x[..., None] if x.ndim == 3 else x
    raw = x.dtype == jnp.uint8
    x = x.astype(jnp.float32)
    if pixels.resize is not None and x.shape[1:3] != (pixels.resize, pixels.resize):
        x = jax.image.resize(x, (x.shape[0], pixels.resize, pixels.resize, x.shape[-1]), pixels.interpolation)
    if x.shape[-1] == 1 and channels > 1:
        x = jnp.repeat(x, channels, axis=-1)
    if not raw:
        return x.astype(dtype)
    x = (x - 255 * np.asarray(pixels.mean, np.float32)) / (255 * np.asarray(pixels.std, np.float32))
    return x.astype(dtype)


def normalised(x: jax.Array, pixels: Pixels) -> jax.Array:
    """Intensities (B, H, W) or (B, H, W, C), bytes over 255, as the float32 (B, H, W, channels) that a backbone reads alike."""
    x = x[..., None] if x.ndim == 3 else x
    x = jnp.repeat(x, len(pixels.mean), axis=-1) if x.shape[-1] == 1 else x
    return (x - np.asarray(pixels.mean, np.float32)) / np.asarray(pixels.std, np.float32)


def prepared_shape(shape: Shape, pixels: Pixels) -> Shape:
    """(H', W', channels) of one example of that shape after `prepare`.

    Raises:
        ValueError: the shape is not that of an image with one channel or the backbone's.
    """
    channels = len(pixels.mean)
    given = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or given not in (1, channels):
        raise ValueError(
            f"Expected input_shape={tuple(shape)} to be (height, width) or (height, width, 1 or {channels}) for this "
            "backbone; give images, or take backbone=mlp for other arrays."
        )
    height, width = (pixels.resize,) * 2 if pixels.resize else shape[:2]
    return (height, width, channels)


def bicubic(old: int, new: int) -> np.ndarray:
    """Matrix (new, old) of cubic resampling: half-pixel centres, a = -0.75, edges repeated, no antialiasing.

    It is `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, by which published position
    embeddings are resampled.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(centre).astype(np.int64)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - (base + tap))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
