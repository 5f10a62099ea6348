"""Sets written by TFDS itself, read without TensorFlow and, where it is installed, with it.

Those of tfds_sets.py are written by the tests; the one in fixtures/ was written by tests/reference/make_tfds_fixture.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import fedsim
from fedsim import data
from fedsim.cli import main as cli
from fedsim.config import Config
from fedsim.data.dataset import Columns
from fedsim.data.tfds import prepare, read_tfds, stacked

sys.path.insert(0, str(Path(__file__).parent))
import tfds_sets

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
CONFIG = Config(dataset="tfds:fedsim_quadrants", data_dir=str(FIXTURES), clients=10)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the sets of tfds_sets.py, as TFDS prepares them."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (tfds_sets.FedsimCifar100, tfds_sets.FedsimResisc45, tfds_sets.FedsimPatchCamelyon):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds_sets.FedsimFlowers(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_images_labels_and_splits() -> None:
    dataset = data.load(CONFIG, None)
    assert dataset.name == "tfds:fedsim_quadrants" and dataset.kind == "image" and dataset.licence == "CC0-1.0"
    assert dataset.x.shape == (200, 8, 8, 3) and dataset.x.dtype == np.uint8
    assert dataset.classes == ("top left", "top right", "bottom left", "bottom right")
    assert [len(rows) for rows in dataset[3:6]] == [144, 16, 40]
    assert np.array_equal(dataset.test, np.arange(160, 200))
    quadrants = dataset.x.reshape(200, 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(200, 4)
    assert np.array_equal(quadrants.argmax(axis=1), dataset.y), "each image belongs to its label"


def test_as_cifar100(prepared: str) -> None:
    source = read_tfds("fedsim_cifar100", prepared, Columns())
    assert isinstance(source.x, np.ndarray) and source.x.shape == (120, 32, 32, 3) and source.x.dtype == np.uint8
    assert source.classes == tuple(f"thing {i:02}" for i in range(100)) and source.kind == "image"
    assert {k: (v[0], v[-1]) for k, v in source.splits.items()} == {"train": (0, 99), "test": (100, 119)}
    rows = [*range(100), *range(20)]
    assert source.y.tolist() == rows
    assert all(np.array_equal(x, tfds_sets.pixels(i % 50, 32, 32)) for x, i in zip(source.x, rows, strict=True))
    coarse = read_tfds("fedsim_cifar100:3.0.2", prepared, Columns(label="coarse_label"))
    assert len(coarse.classes) == 20 and np.array_equal(coarse.y, source.y // 5)


def test_as_resisc45(prepared: str) -> None:
    """JPEG, and one split: the others are drawn."""
    source = read_tfds("fedsim_resisc45", prepared, Columns())
    assert isinstance(source.x, np.ndarray) and source.x.shape == (90, 256, 256, 3)
    assert source.classes == tfds_sets.RESISC and source.y.tolist() == [i % 45 for i in range(90)]
    wanted = np.stack([tfds_sets.pixels(i % 45, 256, 256) for i in range(90)])[:, 16::32, 16::32]  # away from edges
    assert np.abs(source.x[:, 16::32, 16::32].astype(int) - wanted).max() <= 4
    with pytest.warns(
        UserWarning, match=r"of 45 classes are in validation or test and have no training example \(scene"
    ):
        dataset = data.load(Config(dataset="tfds:fedsim_resisc45", data_dir=prepared), None)
    assert [len(rows) for rows in dataset[3:6]] == [65, 7, 18]
    small = read_tfds("fedsim_resisc45", prepared, Columns(), 64)
    assert isinstance(small.x, np.ndarray) and small.x.shape == (90, 64, 64, 3)
    assert np.abs(small.x[:, 4::8, 4::8].astype(int) - wanted).max() <= 6


def test_as_patch_camelyon(prepared: str, tmp_path: Path) -> None:
    """Three splits of its own, classes without names; and a federated run on it."""
    config = Config(dataset="tfds:fedsim_patch_camelyon", data_dir=prepared, backbone="linear", peft="head", head_rounds=0,
                    clients=4, clients_per_round=2, rounds=2, min_size=1, partition="iid", image_store=16)  # fmt: skip
    source = data.read(config)
    assert isinstance(source.x, np.ndarray) and source.x.shape == (42, 16, 16, 3) and source.classes == ("0", "1")
    assert {k: len(v) for k, v in source.splits.items()} == {"train": 24, "validation": 8, "test": 10}
    run = fedsim.run(config, fedsim.Speed(lanes=2, devices=1), out=tmp_path / "run", quiet=True)
    assert run.summary is not None and run.summary["rounds"] == 2


def test_mixed_sizes(prepared: str) -> None:
    """As Oxford Flowers: refused with the remedy, and read with it."""
    config = Config(dataset="tfds:fedsim_flowers", data_dir=prepared)
    message = (
        r"one size, got \(50, 60, 3\) in row 0 of train of tfds:fedsim_flowers and \(51, 60, 3\) in row 1 of train .*"
    )
    with pytest.raises(ValueError, match=message + "set image_store"):
        data.read(config)
    source = data.read(config.replace(image_store=20, client_column="author", domain_column="garden"))
    assert isinstance(source.x, np.ndarray) and source.x.shape == (22, 20, 20, 3)
    assert source.natural["client"].tolist()[:4] == ["author 0", "author 1", "author 2", "author 0"]
    assert source.natural["domain"].tolist()[:4] == [0, 1, 0, 1] and len(source.natural["domain"]) == 22
    dataset = data.load(config.replace(image_store=20), None)
    assert dataset.classes == ("aster", "daisy", "rose"), "a class that nobody has keeps its place"


def test_other_labels(prepared: str) -> None:
    words = read_tfds("fedsim_flowers", prepared, Columns(label="author"), 20)
    assert words.classes == ("author 0", "author 1", "author 2") and words.y.tolist()[:4] == [0, 1, 2, 0]
    assert read_tfds("fedsim_flowers", prepared, Columns(label="garden"), 20).classes == ("0", "1")
    with pytest.raises(
        ValueError, match=r"'scores' to be one class .* in row 0 of train of tfds:.* float32 of shape \(2,\)"
    ):
        read_tfds("fedsim_flowers", prepared, Columns(label="scores"), 20)
    with pytest.raises(ValueError, match=r"client_column='autor' .* in tfds:fedsim_flowers, .* \(did you mean author"):
        read_tfds("fedsim_flowers", prepared, Columns(client="autor"), 20)
    with pytest.raises(
        ValueError, match=r"a client \(a word or a whole number\) in row 0 of train of tfds:fedsim_flowers"
    ):
        read_tfds("fedsim_flowers", prepared, Columns(client="scores"), 20)


WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "tensorflow" else find(name, *rest)
from fedsim.data.dataset import Columns
from fedsim.data.tfds import read_tfds
for name in sys.argv[3:]:
    assert len(read_tfds(name, sys.argv[2], Columns()).y) > 40
assert len(read_tfds("fedsim_quadrants", sys.argv[1], Columns()).y) == 200
"""


def test_tensorflow_is_not_needed(prepared: str) -> None:
    """Also where it is installed: a process that does not find it reads the sets, and prints nothing."""
    names = ["fedsim_cifar100", "fedsim_resisc45", "fedsim_patch_camelyon"]
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(FIXTURES), prepared, *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs pip install -e '.[tfds-prepare]'")
@pytest.mark.parametrize("name", ["FedsimCifar100", "FedsimResisc45", "FedsimPatchCamelyon"])
def test_what_tensorflow_encodes_reads_the_same(
    name: str, prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf  # noqa: F401 - TFDS decodes by it once it is imported

    builder = getattr(tfds_sets, name)
    monkeypatch.setattr(builder, "by_tensorflow", True)
    prepare(builder.name, str(tmp_path))
    ours, theirs = (read_tfds(builder.name, folder, Columns()) for folder in (prepared, str(tmp_path)))
    assert np.array_equal(ours.y, theirs.y) and ours.classes == theirs.classes
    difference = np.abs(np.asarray(ours.x, int) - np.asarray(theirs.x, int)).max()
    assert difference == 0 if builder.FORM == "png" else difference <= 6  # two JPEG encoders


def test_fedsim_data_prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that the error names, with and without TensorFlow."""
    config = Config(dataset="tfds:fedsim_patch_camelyon", data_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"`fedsim data prepare tfds:fedsim_patch_camelyon --data-dir {tmp_path}` \(needs"
    ):
        data.read(config)
    command = ["data", "prepare", config.dataset, "--data-dir", str(tmp_path)]
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else found(name, *a))
        assert cli.main(command) == 2
        assert "run pip install -e '.[tfds-prepare]'" in capsys.readouterr().err
    # This set's images are encoded already, so that TFDS writes it without TensorFlow as well.
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found("numpy" if name == "tensorflow" else name, *a)
    )
    assert cli.main(command) == 0
    assert f"in {tmp_path / 'fedsim_patch_camelyon' / '2.0.0'}" in capsys.readouterr().out
    assert len(data.read(config).y) == 42
    with monkeypatch.context() as patch:
        patch.setattr(tfds_sets.FedsimPatchCamelyon, "_split_generators", lambda *_: 1 / 0)
        assert cli.main([*command[:-1], str(tmp_path / "other")]) == 2
        assert (
            "prepare tfds:fedsim_patch_camelyon (ZeroDivisionError: division by zero). With" in capsys.readouterr().err
        )
    for bad, message in (
        ("tfds:fedsim_patch_camelion", r"did you mean fedsim_patch_camelyon"),
        ("fedsim_patch_camelyon", "to be tfds:NAME"),
    ):
        assert cli.main(["data", "prepare", bad]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mnist", "fedsim_unheard_of"])
def test_an_unprepared_set_says_what_to_run(tmp_path: Path, name: str) -> None:
    command = rf"`fedsim data prepare tfds:{name} --data-dir {tmp_path}` \(needs TensorFlow"
    with pytest.raises(
        ValueError, match=rf"Expected dataset='tfds:{name}' to be prepared under {tmp_path} .*{command}"
    ):
        data.read(CONFIG.replace(dataset=f"tfds:{name}", data_dir=str(tmp_path)))


def test_another_file_format_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "fedsim_quadrants" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"in the array_record format \(.*tfrecord.*prepare into another data_dir"):
        data.read(CONFIG.replace(data_dir=str(tmp_path)))


def test_a_missing_feature_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"label_column='labels' .* among .* \(did you mean label\?"):
        data.read(CONFIG.replace(label_column="labels"))


def test_one_copy_is_held() -> None:
    """Images go into the result one by one."""
    images = (np.full((64, 64, 3), i, np.uint8) for i in range(200))
    tracemalloc.start()
    x, _ = stacked(images, 200, str, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(x, np.ndarray) and x.nbytes <= peak < 1.1 * x.nbytes


def test_texts_and_arrays() -> None:
    assert stacked(iter([b"caf\xc3\xa9", b"b"]), 2, str, None) == (["café", "b"], "text")
    array, kind = stacked(iter([np.zeros(3, np.float64)] * 2), 2, str, None)
    assert kind == "array" and array.shape == (2, 3) and array.dtype == np.float32  # type: ignore[union-attr]  # the row above says that it is an array
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) in 0 and \(2,\) in 1"):
        stacked(iter([np.zeros(3), np.zeros(2)]), 2, str, None)
