"""Small TFDS sets with the features, shapes, formats and splits of CIFAR-100, Resisc45, PatchCamelyon, and flowers of mixed sizes.

TFDS itself writes them in the array_record format: without TensorFlow from encoded images, as a downloaded file would be;
where `by_tensorflow` is set, from arrays, which TensorFlow encodes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

RESISC = tuple(f"scene {i:02}" for i in range(45))


def pixels(i: int, height: int, width: int) -> np.ndarray:
    """Image i (height, width, 3): one colour, and a bright upper left quarter."""
    image = np.full((height, width, 3), (40 + i, 60 + i, 160 - i), np.uint8)
    image[: height // 2, : width // 2] += 90
    return image


def encoded(image: np.ndarray, form: str) -> io.BytesIO:
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **({"quality": 95} if form == "jpeg" else {}))
    out.seek(0)
    return out


class _Small(tfds.core.GeneratorBasedBuilder):
    """What the sets share; no set of its own."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES: dict[str, int] = {}  # noqa: RUF012 - rows of each split, only read
    FORM = "png"
    by_tensorflow = False

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: self._generate_examples(split) for split in self.SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        for i in range(self.SIZES[split]):
            example = self.example(split, i)
            if not self.by_tensorflow:
                example["image"] = encoded(example["image"], self.FORM)
            yield i, example

    def _described(self, features: dict[str, object]) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Made for the tests of fedsim.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )


class FedsimCifar100(_Small):
    """As cifar100: 32 x 32, `label` of 100 classes, `coarse_label` of 20, `id`."""

    VERSION = tfds.core.Version("3.0.2")
    SIZES = {"train": 100, "test": 20}  # noqa: RUF012 - as in _Small

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described(
            {
                "coarse_label": tfds.features.ClassLabel(names=[f"group {i:02}" for i in range(20)]),
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=[f"thing {i:02}" for i in range(100)]),
            }
        )

    def example(self, split: str, i: int) -> dict[str, object]:
        return {"id": f"{split}_{i}", "image": pixels(i % 50, 32, 32), "label": i % 100, "coarse_label": i % 100 // 5}


class FedsimResisc45(_Small):
    """As resisc45: 256 x 256 JPEGs of 45 scenes, `filename`, and a training split only."""

    VERSION = tfds.core.Version("3.0.0")
    SIZES = {"train": 90}  # noqa: RUF012 - as in _Small
    FORM = "jpeg"

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described(
            {
                "filename": tfds.features.Text(),
                "image": tfds.features.Image(shape=(256, 256, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(RESISC)),
            }
        )

    def example(self, split: str, i: int) -> dict[str, object]:
        return {"filename": f"{RESISC[i % 45]}_{i}.jpg", "image": pixels(i % 45, 256, 256), "label": i % 45}


class FedsimPatchCamelyon(_Small):
    """As patch_camelyon: 96 x 96, two classes without names, `id`, three splits."""

    VERSION = tfds.core.Version("2.0.0")
    SIZES = {"train": 24, "validation": 8, "test": 10}  # noqa: RUF012 - as in _Small

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(96, 96, 3)),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
        )

    def example(self, split: str, i: int) -> dict[str, object]:
        return {"id": f"{split}_{i}", "image": pixels(60 * (i % 2), 96, 96), "label": i % 2}


class FedsimFlowers(_Small):
    """As oxford_flowers102: images of mixed sizes, `file_name`; here also who took it, and where."""

    SIZES = {"train": 12, "validation": 4, "test": 6}  # noqa: RUF012 - as in _Small

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described(
            {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["aster", "daisy", "rose"]),  # nobody has a rose
                "author": tfds.features.Text(),
                "garden": tfds.features.Scalar(dtype=np.int64),
                "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            }
        )

    def example(self, split: str, i: int) -> dict[str, object]:
        return {
            "file_name": f"{split}/{i}.jpg",
            "image": pixels(i, 50 + i, 60),
            "label": i % 2,
            "author": f"author {i % 3}",
            "garden": i % 2,
            "scores": [0.0, 1.0],
        }
