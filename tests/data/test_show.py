"""What `fedsim data` prints and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedsim.config import PARTITIONS, Config
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


def test_every_partition_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The law with its options, keys, what is left out and what is held out; a picture with the domains' names."""
    plain = show.labels_only(CONFIG)
    rows = np.arange(len(plain.y))
    keyed = plain._replace(natural={"client": rows % 20, "domain": np.where(rows % 3, "day", "night")})
    day = int((rows[plain.train] % 3 > 0).sum())
    said = {}
    for law in PARTITIONS:
        config = CONFIG.replace(partition=law, size_law="power(exponent=2)", classes_per_client=3, local_test=0.5)
        partition = make(config, keyed)
        Console(width=200).print(show.summary(config, keyed, partition))
        said[law] = capsys.readouterr().out
        assert "of them held out" in said[law] and "10, 0 of them empty" in said[law]
    assert (
        "power(exponent=2)" in said["quantity"]
        and "3 shards" in said["shards"]
        and "0.3 x prior" in said["dirichlet_balanced"]
    )
    assert "20 values; " in said["iid"] and f"day: {day} training examples" in said["iid"]
    assert "left out" in said["natural"] and "left out" not in said["iid"]
    made = make(CONFIG.replace(partition="domain"), keyed)
    stretches = show._stretches(keyed.natural["domain"], made, np.arange(10))
    assert [name for name, *_ in stretches] == ["day", "night"]
    assert stretches[0][1] == 0 and stretches[0][2] + 1 == stretches[1][1] and stretches[1][2] == 9
    show.draw(CONFIG.replace(partition="domain"), keyed, made, tmp_path / "domains.png")
    assert (tmp_path / "domains.png").stat().st_size > 20_000


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


def test_names_are_words_in_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no formula, no escape code; and a script that the font has not is said in one line."""
    names = ["$x_$", "cls[/b]", "\x1b[31mred", "\u65e5\u672c", "[bold]b[/bold]"]
    y = np.arange(50) % 5
    np.savez(tmp_path / "my[.npz", x=np.zeros((50, 2)), y=y, classes=names, domain=np.array(["$d_$", "[/e]"])[y % 2])
    config = CONFIG.replace(dataset=str(tmp_path / "my[.npz"), partition="domain")
    show.data_show(config, tmp_path / "picture.png")
    said = capsys.readouterr()
    assert "$x_$, cls[/b], \\x1b[31mred, \u65e5\u672c, [bold]b[/bold]" in said.out and "\x1b[31m" not in said.out
    assert "some names are drawn as boxes" in said.out and "Warning" not in said.out + said.err
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"picture\.xyz to be a picture that can be written"):
        show.data_show(config, tmp_path / "picture.xyz")
