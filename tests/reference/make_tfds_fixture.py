"""Writes the TFDS set that the tests read: 200 small images in the array_record format, by TFDS itself.

Needs TensorFlow, which fedsim does not; in an environment of its own:

    pip install tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 array-record==0.8.6 importlib-resources
    python tests/reference/make_tfds_fixture.py tests/fixtures/data

The images are drawn from a fixed seed: 8 x 8 RGB, uint8, noise with one bright quadrant that is the label. Features and
names are those of an image classification set (`image`, `label`, `id`); images are PNG inside the records.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import tensorflow_datasets as tfds

CLASSES = ("top left", "top right", "bottom left", "bottom right")
ROWS = {"train": 160, "test": 40}


class FedsimQuadrants(tfds.core.GeneratorBasedBuilder):
    """8 x 8 images whose label is the bright quadrant."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First."}  # noqa: RUF012 - TFDS reads it from the class

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8 x 8 images whose label is the bright quadrant; made for the tests of fedsim.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 3)),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
            license="CC0-1.0",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split: str):
        for i in range(ROWS[split]):
            image, label = picture(split, i)
            yield i, {"id": f"{split}{i}", "image": image, "label": label}


def picture(split: str, i: int) -> tuple[np.ndarray, int]:
    """Image (8, 8, 3) uint8 and label of row i of a split."""
    rng = np.random.default_rng([len(split), i])
    label = int(rng.integers(4))
    image = rng.integers(0, 120, (8, 8, 3))
    image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 90
    return image.astype(np.uint8), label


if __name__ == "__main__":
    builder = FedsimQuadrants(data_dir=sys.argv[1], file_format="array_record")
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)
    print(builder.info)
