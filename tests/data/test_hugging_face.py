"""Sets of Hugging Face `datasets`, written by its own `save_to_disk`; skipped where it is not installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsim import data, record
from fedsim.config import Config
from fedsim.data import hashes, hugging_face
from fedsim.data.dataset import Columns
from fedsim.data.hugging_face import read_hugging_face
from moments import Place

REASON = "needs pip install -e '.[hf]'"


def saved(folder: Path, parts: dict[str, dict[str, list[Any]]] | dict[str, list[Any]], **features: Any) -> str:
    """Writes one split, or several by name, with features for some of the columns."""
    datasets = pytest.importorskip("datasets", reason=REASON)

    def one(columns: dict[str, list[Any]]) -> Any:
        made = datasets.Dataset.from_dict(columns)
        return made.cast(datasets.Features({**made.features, **features})) if features else made

    several = isinstance(next(iter(parts.values())), dict)
    made = datasets.DatasetDict({k: one(v) for k, v in parts.items()}) if several else one(parts)
    made.save_to_disk(str(folder / "set"))
    return str(folder / "set")


def test_texts_splits_and_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=REASON)
    parts = {"train": {"text": ["a", "b", "c"], "label": [1, 0, 1], "who": ["x", "y", "x"]},
             "test": {"text": ["d"], "label": [0], "who": ["z"]},
             "unsupervised": {"text": ["e"], "label": [0], "who": ["z"]}}  # fmt: skip
    folder = saved(tmp_path, parts, label=datasets.ClassLabel(names=["neg", "pos", "neutral"]))
    source = data.read(Config(dataset=f"hf:{folder}", client_column="who"))
    assert source.x == ["a", "b", "c", "d"] and source.y.tolist() == [1, 0, 1, 0] and source.kind == "text"
    assert source.classes == ("neg", "pos", "neutral") and source.natural["client"].tolist() == ["x", "y", "x", "z"]
    assert {k: v.tolist() for k, v in source.splits.items()} == {"train": [0, 1, 2], "test": [3]}


def test_images(tmp_path: Path) -> None:
    """Decoded from what is stored; without a split all of it is train, and labels without names are sorted."""
    datasets = pytest.importorskip("datasets", reason=REASON)
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in images], "label": ["b", "a"] * 3}
    folder = saved(tmp_path, columns, image=datasets.Image())
    source = read_hugging_face(folder, Columns())
    assert isinstance(source.x, np.ndarray) and np.array_equal(source.x, images) and source.kind == "image"
    assert source.classes == ("a", "b") and list(source.splits) == ["train"]
    columns["image"][4] = Image.fromarray(images[0, :4])
    folder = saved(tmp_path / "mixed", columns, image=datasets.Image())
    with pytest.raises(
        ValueError, match=r"got \(5, 5\) in row 0 of train of hf:.* and \(5, 4\) in row 4 of train .*image_store"
    ):
        read_hugging_face(folder, Columns())
    assert np.shape(data.read(Config(dataset=f"hf:{folder}", image_store=4)).x) == (6, 4, 4, 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"texts": ["a"], "label": [0]}, r"text_column='text' .* in hf:.* \(did you mean texts"),
        ({"text": ["a", None], "label": [0, 1]}, r"a text in column 'text' of row 1 of train of hf:"),
        (
            {"text": ["a", "b"], "label": [0.5, 1.5]},
            r"a label .* in column 'label' of row 0 of train of hf:.*, got 0\.5",
        ),
        ({"text": ["a", "b"], "label": [0, None]}, r"a label .* of row 1 of train of hf:.*, got None"),
    ],
)
def test_bad_sets_are_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    folder = saved(tmp_path, columns)
    with pytest.raises(ValueError, match=message):
        read_hugging_face(folder, Columns())


def test_an_unlabelled_test_split_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=REASON)
    parts = {"train": {"text": ["a", "b"], "label": [0, 1]}, "test": {"text": ["c"], "label": [-1]}}
    folder = saved(tmp_path, parts, label=datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(ValueError, match=r"0 <= label=-1 < 2 in column 'label' of row 0 of test of hf:"):
        data.read(Config(dataset=f"hf:{folder}"))


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason=REASON)
    with pytest.raises(ValueError, match=r"dataset='hf:.*' to be a folder that save_to_disk wrote, or a set that"):
        read_hugging_face(str(tmp_path), Columns())


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"Expected `datasets` to be installed .*pip install -e '\.\[hf\]'"):
        data.read(Config(dataset="hf:someone/some_set"))


class Part:
    """What `read_hugging_face` takes of a split, where `datasets` is not installed."""

    info = SimpleNamespace(license="none")

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None) -> None:
        self.columns = columns
        self.features = {name: SimpleNamespace(names=names if name == "label" else None) for name in columns}

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "w\ud83d"], [0, 1], "Unicode text in column 'text' of row 1 of train of hf:set"),
        (["a", " "], [0, 1], "a text in column 'text' of row 1 of train of hf:set"),
        (["a", "b"], [0, -1], r"0 <= label=-1 < 2 in column 'label' of row 1 of train of hf:set"),
        (["a", "b"], [0, 2**32 + 1], r"0 <= label=4294967297 < 2 in column 'label' of row 1"),
        (["a", "b"], [0, float("nan")], "a label .* of row 1 of train of hf:set, got nan"),
    ],
)
def test_the_rules_of_every_source(
    texts: list[str], labels: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"train": Part({"text": texts, "label": labels}, ["no", "yes"])}
    monkeypatch.setattr(hugging_face, "_loaded", lambda name: parts)
    with pytest.raises(ValueError, match=message):
        read_hugging_face("set", Columns())


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=REASON)
    from PIL import Image

    columns = {"image": [Image.fromarray(np.zeros((4, 4), np.uint8)), None], "label": [0, 1]}
    folder = saved(tmp_path, columns, image=datasets.Image())
    with pytest.raises(ValueError, match=r"Expected row 1 of train of hf:.* to be an image \(there is none\)"):
        read_hugging_face(folder, Columns())


def test_a_set_of_the_hub_is_known_by_its_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked: what `datasets` gives stands in for it."""
    datasets = pytest.importorskip("datasets", reason=REASON)
    made = {"train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(made))
    monkeypatch.setattr(hugging_face, "_fingerprints", {})
    first = hashes.sha256("hf:someone/some_set")
    assert first is not None and first == hashes.sha256("hf:someone/some_set")
    made["train"] = made["train"].add_column("more", [1, 2])
    read_hugging_face("someone/some_set", Columns())
    assert hashes.sha256("hf:someone/some_set") not in (None, first)


TYPED = """
    --backbone bert_tiny --weights random --peft head --head-rounds 0 --clients 4 --clients-per-round 2 --rounds 2 --min-size 1
    --tokens 8 --no-head-baseline --checkpoint-every 1 --devices 1 --lanes 2 --quiet --out run
"""


@pytest.mark.parametrize("form", ["save_to_disk", "csv", "json", "parquet"])
def test_a_run_of_a_real_set_is_gone_on_with_from_anywhere_or_refused(
    tmp_path: Path, environment: dict[str, str], form: str
) -> None:
    """`fedsim run`, then `--resume`: of the set as it was, of one that has changed."""
    datasets = pytest.importorskip("datasets", reason=REASON)
    columns = {
        "text": [f"{('good', 'bad')[i % 2]} word {i}" for i in range(60)],
        "label": [i % 2 for i in range(60)],
        "who": [f"user {i % 4}" for i in range(60)],
    }
    folder = tmp_path / "set"
    folder.mkdir()

    def write() -> None:
        made = datasets.Dataset.from_dict(columns)
        if form == "save_to_disk":
            datasets.DatasetDict({"train": made}).save_to_disk(str(folder))
        else:
            getattr(made, f"to_{form}")(str(folder / f"train.{form}"))

    write()
    place = Place(tmp_path, environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    start = ["--dataset", "hf:set", "--client-column", "who", "--partition", "natural", *TYPED.split()]
    assert place.run(*start) == (0, "")
    run = record.load(tmp_path / "run")
    assert run.about["files"]["dataset"]["path"] == str(folder) and run.summary is not None
    (tmp_path / "run" / record.SUMMARY).unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "changed")
    away = tmp_path / "away"
    away.mkdir()
    assert Place(away, place.environment).run("--resume", "../run", "--quiet") == (0, "")
    assert (tmp_path / "run" / record.SUMMARY).is_file()

    columns["text"][59] = "bad word 58"
    write()
    status, said = place.run("--resume", "changed", "--quiet")
    assert status == 2 and "set, the dataset of changed, to be " in said and "Traceback" not in said
