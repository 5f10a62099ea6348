"""Fused encoders say what each says alone, from their own checkpoints; once for each example; unequal needs are refused."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from fedsim import Config, Speed, peft
from fedsim.backbones import BACKBONES, Row, backbone
from fedsim.backbones.images import IMAGENET, Pixels
from fedsim.backbones.load import POSITION, stored_shapes
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.simulation import build, inputs, needs, trainers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VIT = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)
DINOV2 = VitConfig(width=16, depth=2, heads=4, hidden=32, patch=4, image=12, layer_scale=True, pixels=Pixels(*IMAGENET))
TWO = f"fused('small', 'other mean', width=24, weights=({str(FIXTURES / 'vit')!r}, {str(FIXTURES / 'dinov2')!r}))"
TINY = "fused('vit_tiny', 'vit_tiny mean', 'linear', width=24)"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures' models by the names `small` and `other`."""
    monkeypatch.setitem(BACKBONES, "small", Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats))
    monkeypatch.setitem(BACKBONES, "other", Row("image", Vit, DINOV2, formats=BACKBONES["dinov2_s14"].formats))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("size", ["12x12", "8x8"])
def test_features_are_those_of_the_references_side_by_side(size: str) -> None:
    first, second = (np.load(FIXTURES / name / "expected.npz") for name in ("vit", "dinov2"))
    images = first[f"images {size}"]
    assert np.array_equal(images, second[f"images {size}"])
    model = peft.build(TWO, 3, peft="last_k", input_shape=images.shape[1:])
    _, frozen = peft.start(model, None, 0)
    assert stored_shapes(TWO, None, peft.published(model))["encoders/0/" + POSITION].shape == (10, 16)  # of the file
    expected = np.concatenate([first[f"cls {size}"], second[f"mean {size}"]], axis=1)
    np.testing.assert_allclose(model.prefix(frozen, images), expected, atol=2e-5, rtol=0)


def test_what_is_trained_is_one_layer_and_the_head_and_equals_numpy() -> None:
    model = peft.build(TINY, 5, peft="last_k", input_shape=(16, 16))
    trained, frozen = peft.start(model, "random", 0)
    assert {path: leaf.shape for path, leaf in trained.items()} == {
        "fusion/0/bias": (24,), "fusion/0/kernel": (32 + 32 + 256, 24), "head/bias": (5,), "head/kernel": (24, 5),
    }  # fmt: skip
    assert model.cut == 2 and model.stages == 4
    x = np.random.default_rng(0).integers(0, 256, (3, 16, 16)).astype(np.uint8)
    r = np.asarray(model.prefix(frozen, x))
    np.testing.assert_allclose(r[:, 64:], x.reshape(3, -1) / np.float32(255), rtol=1e-6)
    z = np.maximum(r @ trained["fusion/0/kernel"] + trained["fusion/0/bias"], 0)
    expected = z @ trained["head/kernel"] + trained["head/bias"]
    np.testing.assert_allclose(model.apply(trained, frozen, x), expected, atol=1e-5)


@pytest.mark.slow
def test_two_random_encoders_of_one_name_are_two() -> None:
    model = peft.build("fused('vit_tiny', 'vit_tiny')", 5, peft="last_k", input_shape=(16, 16))
    _, frozen = peft.start(model, "random", 0)
    r = np.asarray(model.prefix(frozen, np.zeros((1, 16, 16), np.uint8)))
    assert np.abs(r[:, :32] - r[:, 32:]).max() > 0.01


@pytest.mark.slow
def test_encoders_run_once_for_each_example(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 256, (60, 16, 16)).astype(np.uint8), y=np.arange(60) % 5)
    config = Config(
        dataset=str(tmp_path / "a.npz"), backbone=TINY, peft="last_k", clients=4, clients_per_round=2, partition="iid",
    )  # fmt: skip
    build.check(config, Speed(devices=1))
    problem = build.problem(config, Speed(devices=1))
    assert problem.cuts == (2,)
    made = trainers.trainer(problem, build.phases(config)[0])
    assert made.cached and jax.tree.leaves(made.engine.held) == []  # nothing of the encoders is left to compute
    whole = np.asarray(made.model.prefix(peft.start(made.model, "random", 0)[1], problem.dataset.x))
    np.testing.assert_allclose(np.asarray(made.engine.x).reshape(60, -1)[:, :320], whole, atol=1e-5)


def test_texts_are_read_by_one_tokenizer() -> None:
    row = backbone("fused('minilm_l6', 'minilm_l6 cls', 'bert_tiny')")  # the last takes ids modulo its vocabulary
    assert (row.kind, row.asset, row.tokens, row.pad) == ("text", "minilm_l6", 128, 0)
    pair = Config(backbone="fused('minilm_l6', 'minilm_l6 cls')", peft="last_k")
    assert needs.needed_assets(pair) == ("20newsgroups", "minilm_l6")
    images = pair.replace(dataset="digits", backbone="fused('vit_s14', 'cnn')", image_size=28)
    assert needs.needed_assets(images) == ("digits", "vit_s14") and needs.weights(images) is None
    tiny = pair.replace(backbone="fused('bert_tiny', 'bert_tiny cls')")
    assert needs.weights(tiny) is None  # bert_tiny has a published layout: say random


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fused(width=24)", "to name encoders"),
        ("fused('vit_s14 mean 28')", "to name encoders"),
        ("fused('vit_s14', 'minilm_l6')", r"to read the same inputs, not vit_s14: image, minilm_l6: text"),
        ("fused('minilm_l6', 'roberta_base')", r"to read the same token ids.*roberta_base: 50,265 tokens, padding 1"),
        ("fused('vit_s14', 'nothing')", "nothing"),
        ("fused('vit_s14', 'vit_s14 middle')", "pool='middle'"),
        ("fused('vit_s14', 'cnn', width=0)", "Expected 1 <= width=0"),
        ("fused('vit_s14', 'cnn', weights=('a',))", "to have an entry for each of 2 encoders"),
        ("fused('vit_s14', 'cnn', depth=2)", "to be width or weights"),
        ("fused('vit_s14', 'cnn'", "to be a name or a call"),
    ],
)
def test_unequal_needs_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        backbone(name)


def test_options_of_one_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pool='cls' to be unset"):
        backbone(TINY, pool="cls")
    with pytest.raises(ValueError, match=r"give each encoder its own"):
        needs.weights(Config(backbone=TINY, weights="a.npz"))
    with pytest.raises(ValueError, match=r"take last_k"):
        peft.build(TINY, 5, peft="prompt", input_shape=(16, 16))
    unpackaged = Config(backbone="fused('resnet18', 'vit_s14')", dataset="a.npz", peft="last_k")
    with pytest.raises(ValueError, match=r"backbone='resnet18' to be given, as none are packaged"):
        build.check(unpackaged)


@pytest.mark.usefixtures("known")
def test_a_run_knows_each_encoders_weights_by_its_hash() -> None:
    config = Config(backbone=TWO, dataset="a.npz", peft="last_k")
    found = {at: (model.backbone, model.weights) for at, model in inputs.models(config).items()}
    assert found == {
        "encoder_0.": ("small", str(FIXTURES / "vit")), "encoder_1.": ("other", str(FIXTURES / "dinov2")),
    }  # fmt: skip
    assert set(inputs.named(config)) >= {"encoder_0.weights", "encoder_1.weights"}
    alone = inputs.weights(config.replace(backbone="small", weights=str(FIXTURES / "vit")))
    assert inputs.weights(inputs.models(config)["encoder_0."]) == alone and alone is not None
    assert [model.weights for model in inputs.models(config.replace(weights="random")).values()] == ["random"] * 2
