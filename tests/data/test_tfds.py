"""Sets written by TFDS itself (tests/reference/make_tfds_fixture.py), read without TensorFlow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim import data
from fedsim.config import Config
from fedsim.data.tfds import _stacked

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
CONFIG = Config(dataset="tfds:fedsim_quadrants", data_dir=str(FIXTURES), clients=10)


def test_images_labels_and_splits() -> None:
    dataset = data.load(CONFIG, None)
    assert dataset.name == "tfds:fedsim_quadrants" and dataset.kind == "image" and dataset.licence == "CC0-1.0"
    assert dataset.x.shape == (200, 8, 8, 3) and dataset.x.dtype == np.uint8
    assert dataset.classes == ("top left", "top right", "bottom left", "bottom right")
    assert [len(rows) for rows in dataset[3:6]] == [144, 16, 40]
    assert np.array_equal(dataset.test, np.arange(160, 200))
    quadrants = dataset.x.reshape(200, 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(200, 4)
    assert np.array_equal(quadrants.argmax(axis=1), dataset.y), "each image belongs to its label"


WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "tensorflow" else find(name, *rest)
from fedsim.data.tfds import read_tfds
assert len(read_tfds("fedsim_quadrants", sys.argv[1], "text", "label").y) == 200
"""


def test_tensorflow_is_not_needed() -> None:
    """Also where it is installed: a process that does not find it reads the set, and prints nothing."""
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(FIXTURES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["mnist", "fedsim_unheard_of"])
def test_an_unprepared_set_says_what_to_run(tmp_path: Path, name: str) -> None:
    call = rf"tfds\.builder\('{name}', data_dir='{tmp_path}', file_format='array_record'\)\.download_and_prepare\(\)"
    with pytest.raises(ValueError, match=rf"Expected dataset='tfds:{name}' to be prepared under {tmp_path} .*{call}"):
        data.read(CONFIG.replace(dataset=f"tfds:{name}", data_dir=str(tmp_path)))


def test_another_file_format_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "fedsim_quadrants" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"in the array_record format \(.*tfrecord.*prepare into another data_dir"):
        data.read(CONFIG.replace(data_dir=str(tmp_path)))


def test_a_missing_feature_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"label_column='labels' .* among .*; did you mean label\?"):
        data.read(CONFIG.replace(label_column="labels"))


def test_mixed_sizes_are_refused() -> None:
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"one size in tfds:x, got \(4, 4, 3\) and, in row 1, \(4, 5, 3\)"):
        _stacked(images, "tfds:x")


def test_texts_and_arrays() -> None:
    assert _stacked([b"caf\xc3\xa9", b"b"], "x") == (["café", "b"], "text")
    array, kind = _stacked([np.zeros(3, np.float64)] * 2, "x")
    assert kind == "array" and array.shape == (2, 3) and array.dtype == np.float32  # type: ignore[union-attr]  # the row above says that it is an array
