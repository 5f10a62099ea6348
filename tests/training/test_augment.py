"""Random changes of images: what each does, that only training sees them, and that their draws belong to client and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fedsim.config import Config, Speed
from fedsim.core import Batch
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.simulation import build, tasks, trainers
from fedsim.training import augment, features

pytestmark = pytest.mark.usefixtures("compile_once")

KEY = jax.random.key(3)


def images(rows: int = 256, side: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, channels)).astype(np.uint8)


def applied(calls: tuple[str, ...], x: np.ndarray, key: jax.Array = KEY) -> np.ndarray:
    out = np.asarray(jax.jit(augment.make(calls))(key, x))
    assert out.shape == x.shape and out.dtype == x.dtype
    return out


def test_flip_mirrors_half_of_the_images() -> None:
    x = images()
    out = applied(("flip",), x)
    mirrored = (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (out == x).all(axis=(1, 2, 3))).all()
    assert 96 < mirrored.sum() < 160, "5 standard deviations are 40"


def test_crop_moves_the_image_by_every_distance_up_to_the_padding() -> None:
    x = images()
    out = applied(("crop(padding=1)",), x)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = {(i, j): padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)}
    is_window = np.stack([(out == window).all(axis=(1, 2, 3)) for window in windows.values()])
    assert is_window.any(axis=0).all() and is_window.any(axis=1).all()


def test_resized_crop_shows_a_part_of_the_asked_size() -> None:
    """On a slope bilinear interpolation is exact: the output's slopes are the part's shares of the sides."""
    rows, columns = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    x = np.broadcast_to(np.stack([rows, columns], axis=-1), (64, 16, 16, 2)).astype(np.float32)
    out = applied(("resized_crop(scale=0.25, ratio=1.5)",), x)
    height, width = out[:, 8, 8, 0] - out[:, 7, 8, 0], out[:, 8, 8, 1] - out[:, 8, 7, 1]
    assert (height <= 1 + 1e-5).all() and (width <= 1 + 1e-5).all()
    assert (height * width >= 0.25 / 1.5 - 1e-5).all() and (height * width).min() < 0.5 < (height * width).max()
    assert (width / height < 1.5 + 1e-4).all() and (width / height > 1 / 1.5 - 1e-4).all()
    assert (out >= -1e-4).all() and (out <= 15 + 1e-4).all(), "the part lies inside"
    np.testing.assert_array_equal(applied(("resized_crop(scale=1.0, ratio=1)",), images()), images())


def test_draws_depend_on_the_key_and_the_place_in_the_batch() -> None:
    x = images(64)
    calls = ("flip", "crop(padding=2)")
    first = applied(calls, x)
    np.testing.assert_array_equal(first, applied(calls, x))
    assert (first != applied(calls, x, jax.random.fold_in(KEY, 1))).any()
    same = np.broadcast_to(x[:1], x.shape)
    assert len({image.tobytes() for image in applied(calls, same)}) > 10
    np.testing.assert_array_equal(applied(calls, x[..., 0])[..., None], applied(calls, x[..., :1]))  # (B, H, W) too


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("flop", "augment='flop' to be one of flip.*did you mean flip"),
        ("crop(4)", "by name"),
        ("crop(pading=4)", "by name, of .*padding"),
        ("crop(padding=0)", "padding=0"),
        ("resized_crop(scale=0)", r"scale=0 .*in \(0, 1\]"),
        ("flip(p=1)", "by name, of none"),
    ],
)
def test_impossible_calls_are_refused(call: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        build.check(Config(backbone="linear", peft="head", augment=(call,)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Bytes as images, 8 clients, a linear classifier, SGD."""
    file = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(file, x=images(160), y=np.arange(160) % 3)
    return Config(
        dataset=str(file), backbone="linear", peft="head", clients=8, clients_per_round=4, rounds=2, optimizer="sgd",
        lr=0.05, min_size=3, augment=("flip", "crop(padding=2)"),
    )  # fmt: skip


@pytest.mark.slow
def test_neither_lanes_nor_devices_change_what_is_drawn(config: Config) -> None:
    def after_a_round(config: Config, **speed: Any) -> np.ndarray:
        t = trainers.trainer(build.problem(config, Speed(**speed)), build.phases(config)[0])
        server = t.algorithm.init(jax.random.key(0), t.engine.held)
        cohort = Cohort(t.engine, np.arange(6), 1, Memory(t.algorithm.memory, t.engine.held), lr=config.lr)
        server, _ = t.algorithm.round(jax.random.key(0), t.engine.held, server, cohort)
        return np.asarray(t.algorithm.params(server)["head/kernel"])

    one = after_a_round(config, lanes=1, devices=1)
    np.testing.assert_allclose(after_a_round(config, lanes=2, devices=2), one, rtol=1e-5, atol=1e-6)
    assert np.abs(after_a_round(config.replace(augment=()), lanes=1, devices=1) - one).max() > 1e-3


def test_training_alone_sees_changed_images(config: Config) -> None:
    plain = config.replace(augment=())
    with_, without = (trainers.trainer(build.problem(c, Speed()), build.phases(c)[0]) for c in (config, plain))
    assert with_.engine.x.dtype == np.uint8, "bytes stay bytes on the device"
    server = {name: with_.engine.put(value) for name, value in with_.start.items()}
    scores = [t.validate(t.algorithm.init(jax.random.key(0), t.engine.held)) for t in (with_, without)]
    assert scores[0] == scores[1]
    x, y = images(8), np.zeros(8, np.int32)
    batch = Batch(x, y, np.ones(8, np.float32), KEY, np.int32(0), np.bool_(False))
    model = with_.model
    losses = [
        tasks.task(c, model, t.start, cached=False).loss({}, server, b)[0]
        for c, t, b in (
            (config, with_, batch),
            (plain, without, batch._replace(x=augment.make(config.augment)(KEY, x))),
            (plain, without, batch),
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(float(losses[0] - losses[2])) > 1e-4


def test_features_of_changing_images_are_not_kept(config: Config) -> None:
    head = config.replace(backbone="vit_tiny", image_size=16)
    problem = build.problem(head, Speed())
    model = build.split_model(head, problem.dataset)
    assert problem.cuts == () and not features.use_cache(Speed(), model, problem.dataset.x, head)
    assert features.use_cache(Speed(), model, problem.dataset.x, head.replace(augment=()))
    with pytest.raises(ValueError, match=r"Expected cache=on without augment=.*leave out --cache"):
        build.check(head, Speed(cache="on"))


def test_other_data_than_images_are_refused(tmp_path: Path, config: Config) -> None:
    np.savez(tmp_path / "arrays.npz", x=np.zeros((40, 5), np.float32), y=np.arange(40) % 2)
    with pytest.raises(ValueError, match=r"arrays.npz' to hold images for augment=.*not array"):
        build.problem(config.replace(dataset=str(tmp_path / "arrays.npz")), Speed())
    with pytest.raises(ValueError, match=r"augment=.*it reads texts"):
        build.check(config.replace(backbone="bert_tiny", weights="random"))
    with pytest.raises(ValueError, match=r"write \('flip',\)"):
        config.replace(augment="flip")
