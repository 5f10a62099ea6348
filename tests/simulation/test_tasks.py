"""What a task says of a model's inputs: of images' intensities it reads what it reads of their bytes."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim import Config, peft
from fedsim.simulation import tasks


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("vit_tiny", (16, 16), None), ("vit_tiny", (12, 12, 3), 16), ("cnn", (8, 8, 1), None), ("mlp", (8, 8), 6)],
)
def test_intensities_are_read_as_bytes_are(name: str, shape: tuple[int, ...], size: int | None) -> None:
    config = Config(dataset="a.npz", backbone=name, peft="full", image_size=size)
    model = peft.from_config(config, 5, shape)
    trained, frozen = peft.start(model, "random", 0)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    read = tasks.inputs(config, cached=False)
    assert read is not None
    found = model.apply(trained, frozen, read(images.astype(np.float32) / 255))
    np.testing.assert_allclose(found, model.apply(trained, frozen, images), atol=1e-4)


def test_several_encoders_have_no_common_scale_but_what_they_say_has() -> None:
    config = Config(dataset="a.npz", backbone="fused('vit_tiny', 'linear')", peft="last_k")
    assert tasks.inputs(config, cached=False) is None
    read = tasks.inputs(config, cached=True)
    x = np.ones((2, 3), np.float32)
    assert read is not None and read(x) is x
