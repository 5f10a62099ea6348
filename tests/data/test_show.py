"""What `fedsim data` prints and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.config import Config
from fedsim.data import assets, show
from fedsim.data.partition import make

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
CONFIG = Config(dataset="tfds:fedsim_quadrants", data_dir=str(FIXTURES), clients=10, min_size=2)


def test_counts_and_classes_held() -> None:
    dataset = show.labels_only(CONFIG)
    partition = make(CONFIG, dataset)
    table = show.counts(dataset, partition, np.arange(10))
    assert np.array_equal(table.sum(axis=1), partition.sizes)
    assert np.array_equal(table.sum(axis=0), np.bincount(dataset.y[dataset.train]))
    assert np.array_equal((table > 0).sum(axis=1), show.classes_held(dataset, partition))


@pytest.mark.parametrize(("clients", "law"), [(10, "dirichlet"), (200, "iid"), (5000, "dirichlet")])
def test_data_show(clients: int, law, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIG.replace(clients=clients, partition=law, min_size=0)
    out = show.data_show(config, tmp_path / "new" / "picture.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 20_000
    said = capsys.readouterr().out
    for word in (
        "tfds:fedsim_quadrants",
        "144 examples",
        "16 examples",
        "40 examples",
        "top left",
        "CC0-1.0",
        str(out),
    ):
        assert word in said.replace("\n", "")


def test_data_list_and_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    show.data_list()
    said = capsys.readouterr().out
    assert all(name in said for name in assets.ASSETS) and "Apache-2.0" in said and "yes" not in said
    asked: list[list[str]] = []
    monkeypatch.setattr(assets, "fetch", lambda names, accepted: asked.append([*names, accepted]))
    show.data_fetch(["minilm_l6"])
    show.data_fetch(accepted="CC-BY-NC-SA")
    assert asked == [["minilm_l6", None], *([name, "CC-BY-NC-SA"] for name in assets.ASSETS)]


def test_picture_of_many_clients_shows_evenly_spaced_ones() -> None:
    assert show._shown(400).tolist() == list(range(400))
    shown = show._shown(1_000_000)
    assert len(shown) == 400 and shown[0] == 0 and set(np.diff(shown)) == {2500}


def test_classes_that_nobody_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"c{i}" for i in range(9)]
    np.savez(tmp_path / "my.npz", x=np.zeros((40, 2)), y=np.arange(40) % 2, classes=names)
    show.data_show(CONFIG.replace(dataset=str(tmp_path / "my.npz")), tmp_path / "picture.png")
    assert "7 have no training example: c2, c3, c4, c5, c6 ..." in capsys.readouterr().out
