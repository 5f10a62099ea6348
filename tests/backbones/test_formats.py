"""Every published format, read from small files that the reference libraries saved, gives their outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsim import peft
from fedsim.backbones import BACKBONES, Row, sources, vit
from fedsim.backbones import load as load_module
from fedsim.backbones.bert import BertConfig
from fedsim.backbones.images import IMAGENET, Pixels, bicubic
from fedsim.backbones.load import load, match, stored_shapes
from fedsim.backbones.resnet import Resnet, ResnetConfig
from fedsim.backbones.shufflenet import Shufflenet, ShufflenetConfig
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.peft import export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VIT = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)
DINOV2 = dataclasses.replace(VIT, hidden=32, layer_scale=True, pixels=Pixels(*IMAGENET))
ROBERTA = BertConfig(
    vocabulary=60, width=16, depth=2, heads=4, hidden=24, positions=22, offset=2, types=1, eps=1e-5, pad=1
)
LEVELS = {"depths": (1, 2, 1, 1), "stem": 64, "width": 4}
ROWS: dict[str, Row] = {
    "vit": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "vit_timm": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "vit_augreg": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "dinov2": Row("image", Vit, DINOV2, formats=BACKBONES["dinov2_s14"].formats),
    "dinov2_timm": Row("image", Vit, DINOV2, formats=BACKBONES["dinov2_s14"].formats),
    "dinov2_onnx": Row("image", Vit, DINOV2, formats=BACKBONES["dinov2_s14"].formats),
    "resnet_basic": Row("image", Resnet, ResnetConfig(**LEVELS), formats=("resnet",)),
    "resnet_bottleneck": Row("image", Resnet, ResnetConfig(block="bottleneck", **LEVELS), formats=("resnet",)),
    "shufflenet": Row(
        "image",
        Shufflenet,
        ShufflenetConfig(depths=(1, 2, 1), widths=(8, 16, 24), stem=8, last=32),
        formats=("shufflenet",),
    ),
}
# File -> the published names of the head's kernel and bias, and whether the kernel lies as (in, out).
HEADS = {
    "vit": ("classifier.weight", "classifier.bias", False),
    "vit_timm": ("head.weight", "head.bias", False),
    "dinov2_timm": ("head.weight", "head.bias", False),
    "vit_augreg": ("head/kernel", "head/bias", True),
    "resnet_basic": ("fc.weight", "fc.bias", False),
    "resnet_bottleneck": ("fc.weight", "fc.bias", False),
    "shufflenet": ("fc.weight", "fc.bias", False),
}
VITS = ("vit", "vit_timm", "vit_augreg", "dinov2", "dinov2_onnx")
IMAGES = {name: np.load(FIXTURES / name.replace("_onnx", "") / "expected.npz") for name in ROWS}
EVERY = [
    (name, pool, entry.split(" ")[1])
    for name in ROWS
    for entry in IMAGES[name].files
    for pool in ("cls", "mean")
    if entry.startswith(pool)
]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch):
    """Makes a fixture's model a known backbone and builds it with a head of three classes."""

    def make(name: str, **options: Any) -> peft.Model:
        monkeypatch.setitem(BACKBONES, "small", ROWS[name])
        return peft.build("small", 3, **{"peft": "head", **options})

    return make


@pytest.mark.parametrize(("name", "pool", "size"), EVERY)
def test_features_equal_the_reference(known, name: str, pool: str, size: str) -> None:
    """Positions of 3x3 patches are resampled where the image has another number of them, as the reference does."""
    model = known(name, pool=pool)
    frozen = load("small", str(FIXTURES / name), peft.published(model))
    features = model.prefix(frozen, IMAGES[name][f"images {size}"])
    np.testing.assert_allclose(features, IMAGES[name][f"{pool} {size}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_logits_equal_the_reference(known, name: str) -> None:
    model, data = known(name), IMAGES[name]
    source = sources.open_source(FIXTURES / name)
    frozen = load("small", str(source.file), peft.published(model))
    kernel, bias, straight = HEADS[name]
    head = {"head/kernel": source.read(kernel), "head/bias": source.read(bias)}
    head["head/kernel"] = head["head/kernel"] if straight else head["head/kernel"].T
    images = next(data[entry] for entry in data.files if entry.startswith("images"))
    size = float(np.max(np.abs(data["logits"])))  # thousands where random residual sums grow
    np.testing.assert_allclose(model.apply(head, frozen, images) / size, data["logits"] / size, atol=5e-6, rtol=0)


@pytest.mark.parametrize("pool", ["mean", "cls", "pooler"])
def test_roberta_equals_the_reference(monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    row = BACKBONES["roberta_base"]._replace(config=ROBERTA, tokens=ROBERTA.tokens)
    monkeypatch.setitem(BACKBONES, "small", row)
    model, expected = peft.build("small", 3, peft="head", pool=pool), np.load(FIXTURES / "roberta" / "expected.npz")
    frozen = load("small", str(FIXTURES / "roberta"), peft.published(model))
    np.testing.assert_allclose(model.prefix(frozen, expected["ids"]), expected[pool], atol=1e-5, rtol=0)
    assert row.tokens == 20


def test_onnx_holds_the_leaves_of_the_safetensors(known) -> None:
    """Kernels and positions, anonymous in the graph, are found by the nodes that read them; the decoder is left."""
    shapes = peft.published(known("dinov2"))
    plain, graph = (load("small", str(FIXTURES / name), shapes) for name in ("dinov2", "dinov2_onnx"))
    assert all(np.array_equal(plain[path], graph[path]) for path in shapes)
    source = sources.open_source(FIXTURES / "dinov2_onnx")
    assert any(name.startswith("decoder.") for name in source.shapes)


def halved(graph: bytes) -> bytes:
    """An ONNX graph whose float32 initialisers are float16, written by hand; fields of fixed width are left out."""

    def number(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)

    def message(data: bytes, change) -> bytes:
        parts = []
        for field, value in sources._fields(data, 0, len(data)):
            content = change(field, data[slice(*value)] if isinstance(value, tuple) else value)
            if isinstance(content, bytes):
                parts += [number(field << 3 | 2), number(len(content)), content]
            else:
                parts += [number(field << 3), number(content)]
        return b"".join(parts)

    def tensor(data: bytes) -> bytes:
        if (2, 1) not in list(sources._fields(data, 0, len(data))):  # data type float32
            return data
        half = lambda raw: np.frombuffer(raw, "<f4").astype("<f2").tobytes()  # noqa: E731 - one expression, named
        return message(data, lambda field, v: 10 if field == 2 else half(v) if field == 9 else v)

    return message(graph, lambda field, v: message(v, lambda f, t: tensor(t) if f == 5 else t) if field == 7 else v)


def test_onnx_in_float16_is_read_as_float32(known, tmp_path: Path) -> None:
    """A graph of float16 weights was refused as one that lacks them."""
    (tmp_path / "model.onnx").write_bytes(halved((FIXTURES / "dinov2_onnx" / "model.onnx").read_bytes()))
    shapes = peft.published(known("dinov2"))
    plain, half = (load("small", str(folder), shapes) for folder in (FIXTURES / "dinov2_onnx", tmp_path))
    for path in shapes:
        assert half[path].dtype == np.float32
        np.testing.assert_array_equal(half[path], plain[path].astype(np.float16).astype(np.float32), err_msg=path)


@pytest.mark.parametrize(
    ("file", "row"), [("vit", "dinov2"), ("dinov2", "vit"), ("vit_timm", "dinov2"), ("vit_augreg", "dinov2")]
)
def test_checkpoint_of_another_model_is_refused_before_it_is_read(known, file: str, row: str) -> None:
    model = known(row)
    source = sources.open_source(FIXTURES / file)

    def read(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    with pytest.raises(ValueError, match="choose the backbone that"):
        match(source._replace(read=read), ROWS[row], peft.published(model))


def test_every_wrong_leaf_of_a_fused_matrix_is_named(known, tmp_path: Path) -> None:
    model = known("vit_timm")
    leaves = load_file(FIXTURES / "vit_timm" / "model.safetensors")
    leaves["blocks.1.attn.qkv.weight"] = np.zeros((47, 16), np.float32)
    leaves["fc_norm.weight"] = np.zeros(16, np.float32)
    del leaves["norm.bias"]
    save_file(leaves, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as refused:
        load("small", str(tmp_path), peft.published(model))
    message = str(refused.value)
    assert "1 missing: norm.bias (our norm/bias)" in message
    assert "1 left over: fc_norm.weight" in message
    assert "1 misshapen: blocks.1.attn.qkv.weight: (47, 16), not (48, 16)" in message


def test_pickles_and_hub_names_are_refused_with_the_way_out(
    known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = peft.published(known("vit"))
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle is not read"):
        load("small", str(tmp_path / "model.pth"), shapes)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'fedsim-jax\[hub\]'"):
        load("small", "google/vit-base-patch16-224", shapes)


def test_hub_name_is_downloaded(known, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        if local_files_only and len(asked) == 1:
            raise FileNotFoundError("not downloaded before")
        return str(FIXTURES / "vit")

    monkeypatch.setitem(
        __import__("sys").modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)
    )
    shapes = peft.published(known("vit"))
    with pytest.raises(ValueError, match=r"can be reached \(not downloaded before\)"):
        stored_shapes("small", "someone/small-vit", shapes)
    got, expected = load("small", "someone/small-vit", shapes), load("small", str(FIXTURES / "vit"), shapes)
    assert stored_shapes("small", "someone/small-vit", shapes) == shapes
    assert asked == [("someone/small-vit", only) for only in (True, False, True)]
    assert all(np.array_equal(got[path], expected[path]) for path in shapes)


def test_bytes_of_images_are_normalised_inside(known) -> None:
    """uint8 images are what ImageNet's mean and deviation make of them; grey ones count for all three channels."""
    model = known("dinov2")
    frozen = load("small", str(FIXTURES / "dinov2"), peft.published(model))
    raw = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    mean, std = (np.array(v, np.float32) for v in IMAGENET)
    normal = ((raw / np.float32(255) - mean) / std).astype(np.float32)
    np.testing.assert_allclose(model.prefix(frozen, raw), model.prefix(frozen, normal), atol=2e-5)
    grey = np.repeat(raw[..., :1], 3, axis=-1)
    for x in (raw[..., 0], raw[..., :1]):
        np.testing.assert_allclose(model.prefix(frozen, x), model.prefix(frozen, grey), atol=1e-6)


def test_images_are_resized_inside(known) -> None:
    model, plain = known("vit", image_size=20), known("vit")
    frozen = load("small", str(FIXTURES / "vit"), peft.published(model))
    small = np.random.default_rng(0).integers(0, 256, (2, 28, 28)).astype(np.uint8)
    resized = jax.image.resize(small.astype(np.float32), (2, 20, 20), "bilinear")[..., None] / 255
    expected = plain.prefix(frozen, np.asarray(np.repeat((resized - 0.5) / 0.5, 3, axis=-1)))
    np.testing.assert_allclose(model.prefix(frozen, small), expected, atol=1e-5)


def test_bicubic_weights() -> None:
    """Rows sum to one; the same size is the identity; doubling gives the weights worked out by hand for a = -0.75."""
    for old, new in ((37, 4), (3, 7), (5, 5)):
        np.testing.assert_allclose(bicubic(old, new).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(bicubic(5, 5), np.eye(5), atol=1e-7)
    # Centre 1.25 between pixels 1 and 2: t = 1.25, 0.25, 0.75, 1.75.
    np.testing.assert_allclose(bicubic(4, 8)[3], [-0.10546875, 0.87890625, 0.26171875, -0.03515625], atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Without head, by the architectures' arithmetic; ResNets as torchvision counts them, less fc.
        ("vit_ti16", 5_524_416),
        ("vit_s16", 21_665_664),
        ("vit_b16", 85_798_656),
        ("vit_b32", 87_455_232),
        ("vit_l16", 303_301_632),
        ("vit_h14", 630_764_800),
        ("dinov2_s14", 22_056_192),
        ("dinov2_b14", 86_579_712),
        ("vit_s14", 22_056_192),
        ("roberta_base", 124_645_632 - 590_592),  # as published, less the pooler that it has not
        ("resnet18", 11_689_512 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet50_gn", 25_557_032 - 2_049_000),
        ("shufflenet_v2_x0_5", 1_366_792 - 1_025_000),
        ("shufflenet_v2_x0_5_gn", 1_366_792 - 1_025_000),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    model = peft.build(name, 100, peft="full")
    counted = sum(int(np.prod(leaf.shape)) for path, leaf in model.trained.items() if path not in model.fresh)
    assert counted == parameters
    statistics = {path for path in model.frozen if path.endswith(("/mean", "/variance"))}
    assert statistics == set(model.frozen)
    assert bool(statistics) == (name in ("resnet18", "resnet50", "shufflenet_v2_x0_5"))


def test_small_baselines_count_as_published() -> None:
    def count(*args: Any, **options: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in peft.build(*args, peft="full", **options).trained.values())

    assert count("shufflenet_v2_x0_5", 100) == 444_292
    assert count("cnn", 62, input_shape=(28, 28)) == 1_206_590


@pytest.mark.parametrize(("name", "pool", "size"), [case for case in EVERY if case[0] in VITS])
def test_checkpoint_of_another_resolution_is_resampled_once(
    known, name: str, pool: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as a model of 20 pixels, a checkpoint of 12 gives the reference's features: it keeps its grid of 3 x 3."""
    row = ROWS[name]
    monkeypatch.setitem(ROWS, name, row._replace(config=dataclasses.replace(row.config, image=20)))
    model = known(name, pool=pool)
    assert model.frozen["embeddings/position"].shape == (26, 16)
    trained, frozen = peft.start(model, str(FIXTURES / name), 0)
    assert frozen["embeddings/position"].shape == (10, 16)
    features = model.prefix(frozen, IMAGES[name][f"images {size}"])
    np.testing.assert_allclose(features, IMAGES[name][f"{pool} {size}"], atol=2e-5, rtol=0)
    fitted = peft.fitted(model, trained, frozen)
    assert {p: s.shape for p, s in fitted.frozen.items()} == {p: leaf.shape for p, leaf in frozen.items()}
    monkeypatch.setattr(load_module, "_read", lambda *args: pytest.fail("a value was read"))
    shapes = peft.fitted_to(model, str(FIXTURES / name))
    assert (shapes.trained, shapes.frozen) == (fitted.trained, fitted.frozen)


@pytest.mark.parametrize("name", VITS)
def test_checkpoint_at_its_own_resolution_is_not_resampled(
    known, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model of 12 pixels that loads a checkpoint of 20: positions are used as they are stored, and exported so."""
    source = sources.open_source(FIXTURES / name)
    arrays = {n: source.read(n) for n in source.shapes}
    place = next(n for n in arrays if n.endswith(("position_embeddings", "pos_embed", "pos_embedding")))
    arrays[place] = np.random.default_rng(0).normal(size=(1, 26, 16)).astype(np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    model = known(name, pool="mean")
    trained, frozen = peft.start(model, str(tmp_path), 0)
    images = np.random.default_rng(1).normal(size=(2, 20, 20, 3)).astype(np.float32)
    with monkeypatch.context() as patch:  # bicubic is asked for nothing
        patch.setattr(vit, "bicubic", lambda old, new: pytest.fail(f"resampled from {old} to {new}"))
        features = model.prefix(frozen, images)
    monkeypatch.setitem(ROWS, name, ROWS[name]._replace(config=dataclasses.replace(ROWS[name].config, image=20)))
    np.testing.assert_array_equal(features, known(name, pool="mean").prefix(frozen, images))
    export.export_backbone(tmp_path / "out", model, trained, frozen, str(tmp_path))
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")[place], arrays[place])
