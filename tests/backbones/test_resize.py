"""Resizing inside the compiled program equals the reference implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest
from PIL import Image

from fedsim import peft
from fedsim.backbones import row
from fedsim.backbones.images import Pixels, prepare
from fedsim.config import Config
from fedsim.simulation import build

TENSORFLOW = Path(__file__).parents[1] / "fixtures" / "backbones" / "resize.npz"
METHODS: tuple[Literal["bilinear", "bicubic"], ...] = ("bilinear", "bicubic")


def resized(image: np.ndarray, side: int, method: str) -> np.ndarray:
    """uint8 image (H, W, C) -> float32 (side, side, C), still from 0 to 255."""
    channels = image.shape[-1]
    pixels = Pixels((0.0,) * channels, (1 / 255,) * channels, side, method)
    return np.asarray(jax.jit(lambda x: prepare(x, pixels))(image[None]))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [7, 22, 40])
def test_resizing_equals_tensorflow(method: str, side: int) -> None:
    """tf.image.resize(antialias=True) of 0 to 255."""
    expected = np.load(TENSORFLOW)
    found = resized(expected["image"], side, method)
    np.testing.assert_allclose(found, expected[f"{method}_{side}"], atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [16, 40, 224])
def test_resizing_equals_pillow(method: str, side: int) -> None:
    """Image.resize of float images; of bytes Pillow rounds, after rows and again after columns."""
    image = np.random.default_rng(1).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    how = Image.Resampling[method.upper()]
    planes = [
        Image.fromarray(plane.astype(np.float32)).resize((side, side), how) for plane in np.moveaxis(image, -1, 0)
    ]
    found = resized(image, side, method)
    np.testing.assert_allclose(found, np.stack(planes, axis=-1), atol=2e-3)
    if method == "bilinear":
        rounded = np.asarray(Image.fromarray(image).resize((side, side), how), np.float32)
        np.testing.assert_allclose(found, rounded, atol=1)


def test_the_methods_differ() -> None:
    """The tests above can fail."""
    image = np.load(TENSORFLOW)["image"]
    assert np.abs(resized(image, 22, "bilinear") - resized(image, 22, "bicubic")).max() > 5


def test_interpolation_reaches_the_backbone() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    logits = []
    for method in METHODS:
        options = Config(interpolation=method, image_size=12, peft="head", backbone="linear")
        model = peft.from_config(options, 3, (8, 8, 3))
        trained, frozen = peft.start(model, "random", 0)
        logits.append(np.asarray(jax.jit(model.apply)(trained, frozen, x)))
        for name in ("vit_tiny", "resnet18"):
            assert row(name, image_size=12, interpolation=method).config.pixels[2:] == (12, method)
        assert row("cnn", image_size=12, interpolation=method).config.interpolation == method
    assert np.abs(logits[0] - logits[1]).max() > 1e-4


def test_interpolation_wants_a_size() -> None:
    with pytest.raises(ValueError, match="Expected image_size with interpolation='bicubic'"):
        build.check(Config(backbone="vit_tiny", weights="random", interpolation="bicubic"))
    with pytest.raises(ValueError, match="did you mean bicubic"):
        Config(interpolation="bicubi")  # type: ignore[arg-type]  # a misspelt word is the point
