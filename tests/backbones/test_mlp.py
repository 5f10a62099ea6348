"""The perceptron equals two lines of NumPy and reads images as they are stored."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim import peft


def test_equals_numpy() -> None:
    model = peft.build("mlp", 5, peft="full", input_shape=(4, 3, 2))
    trained, frozen = peft.start(model, "random", 0)
    assert frozen == {}
    x = np.random.default_rng(0).normal(size=(6, 4, 3, 2)).astype(np.float32)
    h = x.reshape(6, 24)
    for i in range(2):
        h = np.maximum(h @ trained[f"layers/{i}/kernel"] + trained[f"layers/{i}/bias"], 0)
    expected = h @ trained["head/kernel"] + trained["head/bias"]
    np.testing.assert_allclose(model.apply(trained, frozen, x), expected, atol=1e-5)


def test_bytes_are_scaled_to_one() -> None:
    model = peft.build("mlp", 5, peft="head", input_shape=(8, 8))
    trained, frozen = peft.start(model, "random", 0)
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    scaled = image.astype(np.float32) / 255
    np.testing.assert_allclose(
        model.apply(trained, frozen, image), model.apply(trained, frozen, scaled), rtol=1e-5, atol=1e-6
    )


def test_input_shape_is_required() -> None:
    with pytest.raises(ValueError, match="input_shape of backbone='mlp'"):
        peft.build("mlp", 5, peft="head")
