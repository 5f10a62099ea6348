"""Fashion-MNIST and ELPV from small files of exactly their formats, made here, and the licence that ELPV asks for."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedsim
from fedsim import data, peft
from fedsim.backbones.images import IMAGENET, IMAGENET_PIXELS, prepare
from fedsim.cli import main as cli
from fedsim.config import Config
from fedsim.data import assets, catalogue, images

ACCEPTED = "CC-BY-NC-SA"
ELPV = Config(dataset="elpv", accept_licence=ACCEPTED, backbone="linear", peft="head", partition="domain",
              clients=6, clients_per_round=3, rounds=2, validation=0.2, min_size=1)  # fmt: skip
REFUSED = "add --accept-licence CC-BY-NC-SA, in Python accept_licence='CC-BY-NC-SA'"


def put(name: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts files into the cache as the named asset, which then is as large as they are; returns its folder."""
    members = tuple(catalogue.Member("", target, len(content)) for target, content in files.items())
    monkeypatch.setitem(assets.ASSETS, name, assets.ASSETS[name]._replace(members=members))
    folder = assets._folder(assets.ASSETS[name])
    folder.mkdir(parents=True)
    for target, content in files.items():
        (folder / target).write_bytes(content)
    return folder


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def fashion(cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """60 training and 20 test images of 5x4 pixels."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (80, 5, 4), np.uint8), rng.integers(0, 10, 80).astype(np.uint8)
    files = {}
    for name, rows in (("train", slice(60)), ("t10k", slice(60, None))):
        files |= {f"{name}-images-idx3-ubyte.gz": idx(x[rows]), f"{name}-labels-idx1-ubyte.gz": idx(y[rows])}
    put("fashion_mnist", files, monkeypatch)
    return x, y


def cells(count: int = 40) -> tuple[np.ndarray, list[float], list[str]]:
    """Grey images, probabilities of a defect as annotators gave them, cell types; half of each type is defective."""
    x = np.random.default_rng(1).integers(0, 256, (count, 6, 6), np.uint8)
    return (
        x,
        [(0.0, 1 / 3, 2 / 3, 1.0)[i % 4] for i in range(count)],
        ["mono" if i % 3 else "poly" for i in range(count)],
    )


def elpv_zip(change: Callable[[str], str] = lambda labels: labels) -> bytes:
    x, probabilities, types = cells()
    lines = [
        f"images/cell{i + 1:04}.png  {p!r:21}{t}" for i, (p, t) in enumerate(zip(probabilities, types, strict=True))
    ]
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("elpv_dataset/data/labels.csv", change("\n".join(lines) + "\n"))
        for i, image in enumerate(x):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            archive.writestr(f"elpv_dataset/data/images/cell{i + 1:04}.png", png.getvalue())
    return whole.getvalue()


@pytest.fixture
def elpv(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 cells of 6x6 pixels."""
    return put("elpv", {"elpv.zip": elpv_zip()}, monkeypatch)


def test_fashion_mnist_is_read_with_its_own_splits(fashion: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = fashion
    source = data.read(Config(dataset="fashion_mnist"))
    assert isinstance(source.x, np.ndarray) and source.x.dtype == np.uint8 and source.y.dtype == np.int32
    assert np.array_equal(source.x, x[..., None]) and np.array_equal(source.y, y)
    assert source.splits["train"].tolist() == list(range(60)) and source.splits["test"].tolist() == list(range(60, 80))
    assert source.kind == "image" and source.classes[9] == "Ankle boot" and source.licence == "MIT"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: good[:-20], "gzipped idx file of bytes with 3 axes"),
        (lambda good: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(good)[4:]), "it starts with 00 00 0d 03"),
        (lambda good: gzip.compress(gzip.decompress(good)[:-1]), "cannot reshape"),
        (lambda good: good[:12] + b"\xff" * 12 + good[24:], "delete .* and fetch again"),
        (lambda good: b"no gzip", "delete .* and fetch again"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = tmp_path / "images.gz"
    file.write_bytes(damage(idx(np.zeros((4, 5, 4), np.uint8))))
    with pytest.raises(ValueError, match=message):
        images.idx(file, 3)


def table(rows: list[list[int]]) -> bytes:
    return gzip.compress("".join(",".join(f"{v:.1f}" for v in row) + "\n" for row in rows).encode())


def test_digits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 to 16 become 0 to 255, row by row of the image; splits are drawn."""
    rows = [[(i + k) % 17 for k in range(64)] + [i % 10] for i in range(30)]
    put("digits", {"digits.csv.gz": table(rows)}, monkeypatch)
    source = data.read(Config(dataset="digits"))
    assert isinstance(source.x, np.ndarray) and source.x.shape == (30, 8, 8, 1) and source.x.dtype == np.uint8
    assert source.x[0, 0, :3, 0].tolist() == [0, 15, 31] and source.x[0, 2, 0, 0] == 255 and source.x[8, 1, 0, 0] == 255
    assert source.y.tolist() == [i % 10 for i in range(30)] and list(source.splits) == ["train"]


# Names of their own: gzip writes the time, so that the bytes would name the same test differently in each worker.
@pytest.mark.parametrize(
    "content",
    [b"no gzip", table([[0] * 64]), table([[17] * 64 + [1]]), gzip.compress(b"a,b\n")],
    ids=["no gzip", "no label", "above 16", "no numbers"],
)
def test_a_damaged_table_of_digits_is_refused(cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put("digits", {"digits.csv.gz": content}, monkeypatch)
    with pytest.raises(ValueError, match=r"gzipped rows of 64 pixels from 0 to 16 and a label .*fetch again"):
        data.read(Config(dataset="digits"))


def test_elpv_is_read_out_of_its_archive(elpv: Path) -> None:
    x, probabilities, types = cells()
    source = data.read(ELPV)
    assert isinstance(source.x, np.ndarray) and source.x.dtype == np.uint8
    assert np.array_equal(source.x, x[..., None])
    assert [source.classes[i] for i in source.y] == ["defective" if p > 0.5 else "functional" for p in probabilities]
    assert source.natural["domain"].tolist() == types
    assert [f.name for f in elpv.rglob("*")] == ["elpv.zip"], "nothing is unpacked to the disk"


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels + "images/cell9999.png  0.0  mono\n",  # no such image
        lambda labels: labels.replace("mono", "", 1),
        lambda labels: labels.replace("0.0 ", "none ", 1),
    ],
)
def test_a_damaged_archive_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]
) -> None:
    put("elpv", {"elpv.zip": elpv_zip(change)}, monkeypatch)
    with pytest.raises(ValueError, match=r"Expected .*elpv\.zip to hold .*labels\.csv .*fetch again"):
        images.elpv()


def test_loaded_rows_keep_their_domain(elpv: Path) -> None:
    dataset = data.load(ELPV.replace(examples=20), None)
    x, _, types = cells()
    of = {image.tobytes(): kind for image, kind in zip(x, types, strict=True)}
    assert dataset.natural["domain"].tolist() == [of[image.tobytes()] for image in dataset.x[..., 0]]
    assert len(dataset.train) == 20 and len(dataset.x) == 20 + 6 + 8


def test_grey_images_enter_a_backbone_for_colours() -> None:
    """Repeated to three channels, then normalised by each channel's ImageNet mean and deviation."""
    grey = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), np.uint8)
    found = np.asarray(prepare(grey, IMAGENET_PIXELS))
    expected = (np.repeat(grey / 255, 3, axis=-1) - IMAGENET[0]) / np.asarray(IMAGENET[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_linear_is_one_matrix_on_pixels() -> None:
    model = peft.build("linear", 3, peft="head", input_shape=(4, 5, 1))
    trained, frozen = peft.start(model, "random", 0)
    assert {k: v.shape for k, v in trained.items()} == {"head/kernel": (20, 3), "head/bias": (3,)} and frozen == {}
    smaller = peft.build("linear", 3, peft="head", image_size=2, input_shape=(4, 4, 1))
    assert smaller.trained["head/kernel"].shape == (4, 3), "resized as for the other backbones"
    even = np.full((1, 4, 4, 1), 51, np.uint8)
    leaves = {"head/kernel": np.eye(4, 3, dtype=np.float32), "head/bias": np.zeros(3, np.float32)}
    np.testing.assert_allclose(smaller.apply(leaves, {}, even), [[0.2, 0.2, 0.2]], atol=1e-6)
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 1)).astype(np.uint8)
    expected = x.reshape(6, 20) / 255 @ trained["head/kernel"] + trained["head/bias"]
    np.testing.assert_allclose(model.apply(trained, frozen, x), expected, rtol=1e-4, atol=1e-5)


# --- the licence


@pytest.mark.parametrize("wrong", [None, "MIT"])
def test_an_unaccepted_set_is_refused_though_it_is_in_the_cache(
    elpv: Path, monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    monkeypatch.setattr(images, "elpv", lambda: pytest.fail("it was read"))
    config = ELPV.replace(accept_licence=wrong)
    for call in (lambda: data.read(config), lambda: fedsim.run(config, out=elpv.parent / "run", quiet=True)):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert not (elpv.parent / "run").exists()


@pytest.mark.parametrize("command", ["run", "run --dry-run", "data show", "data fetch"])
@pytest.mark.parametrize("cached", [False, True])
def test_every_command_asks_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, cached: bool
) -> None:
    if cached:
        put("elpv", {"elpv.zip": elpv_zip()}, monkeypatch)
    monkeypatch.chdir(cache)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was started"))
    what = ["elpv"] if command == "data fetch" else ["--dataset", "elpv", "--backbone", "linear", "--peft", "head"]
    assert cli.main([*command.split(), *what]) == 2
    said = capsys.readouterr()
    assert REFUSED in said.err and said.out == ""
    assert not (cache / "runs").exists()


@pytest.mark.slow
def test_commands_that_accept(
    elpv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(cache)
    accept = ["--accept-licence", ACCEPTED]
    assert cli.main(["data", "fetch", "elpv", *accept]) == 0 and "already in" in capsys.readouterr().out
    what = ["--dataset", "elpv", "--backbone", "linear", "--peft", "head", "--partition", "domain"]
    what += ["--clients", "6", "--clients-per-round", "3", "--min-size", "1"]
    assert cli.main(["data", "show", *what, *accept, "--out", "p.png"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "non-commercial" in said and "each client in one domain" in said and "mono: " in said and "poly: " in said
    assert cli.main(["run", "--dry-run", *what, *accept]) == 0 and "Nothing was trained" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_and_its_continuation(elpv: Path, tmp_path: Path) -> None:
    """What was accepted once is part of the run's config: a resumed run does not ask again."""
    run = fedsim.run(ELPV, out=tmp_path / "run", quiet=True)
    assert run.summary is not None and run.config.accept_licence == ACCEPTED
    (tmp_path / "run" / "summary.json").unlink()
    assert fedsim.run(resume=tmp_path / "run", quiet=True).summary is not None


@pytest.mark.assets
def test_real_digits() -> None:
    if not assets.is_fetched("digits"):
        pytest.skip("digits is not in the cache: run `fedsim data fetch digits`")
    source = images.digits()
    assert np.shape(source.x) == (1797, 8, 8, 1) and np.max(source.x) == 255
    assert np.bincount(source.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
