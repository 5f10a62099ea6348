"""Writes what TensorFlow makes of a small image at several sizes, for the comparison in tests/backbones/test_resize.py.

Needs TensorFlow, which fedsim does not; in an environment of its own:

    pip install tensorflow-cpu==2.21.0
    python tests/reference/make_resize_fixture.py tests/fixtures/backbones
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

image = np.random.default_rng(0).integers(0, 256, (19, 26, 1)).astype(np.uint8)
resized = {
    f"{method}_{side}": tf.image.resize(image.astype(np.float32), (side, side), method=method, antialias=True).numpy()
    for method in ("bilinear", "bicubic")
    for side in (7, 22, 40)  # smaller, smaller and larger, larger
}
np.savez_compressed(Path(sys.argv[1]) / "resize.npz", image=image, version=tf.__version__, **resized)
