"""What leaves fedsim: merged backbones give the same outputs, files fit the libraries that read them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsim import peft
from fedsim.backbones import BACKBONES, Row, bert_row, sources
from fedsim.backbones.bert import BertConfig
from fedsim.backbones.images import IMAGENET, Pixels
from fedsim.backbones.load import load
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.peft import export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VIT = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)
DINOV2 = dataclasses.replace(VIT, hidden=32, layer_scale=True, pixels=Pixels(*IMAGENET))
BERT = BertConfig(vocabulary=60, width=16, depth=2, heads=4, hidden=24, positions=20)
ROWS: dict[str, Row] = {
    "vit": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "vit_timm": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "vit_augreg": Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats),
    "dinov2_onnx": Row("image", Vit, DINOV2, formats=BACKBONES["dinov2_s14"].formats),
    "bert": bert_row(BERT),
}
IDS = np.load(FIXTURES / "bert" / "expected.npz")["ids"]
IMAGES = np.load(FIXTURES / "vit" / "expected.npz")["images 12x12"]


@pytest.fixture
def trained_model(monkeypatch: pytest.MonkeyPatch):
    """A fixture's checkpoint with a PEFT part whose every trained leaf has moved."""

    def make(name: str, weights: str | None = None, **options: Any) -> tuple[peft.Model, Any, Any]:
        monkeypatch.setitem(BACKBONES, "small", ROWS[name])
        model = peft.build("small", 3, **{"rank": 2, "lora_alpha": 6.0, **options})
        trained, frozen = peft.start(model, weights or str(FIXTURES / name), 0)
        rng = np.random.default_rng(0)
        moved = {p: v + rng.normal(size=v.shape).astype(np.float32) * np.float32(0.2) for p, v in trained.items()}
        return model, moved, frozen

    return make


def inputs(name: str) -> np.ndarray:
    return IDS if name.startswith("bert") else IMAGES


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(
    "options",
    [
        {"peft": "lora"},
        {"peft": "lora", "dora": True, "rslora": True, "targets": ("*",)},
        {"peft": "lora+bias"},
        {"peft": "ffa_lora"},
        {"peft": "ia3"},
        {"peft": "lora+ia3", "targets": ("key", "down")},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_merged_backbone_gives_the_same_outputs(trained_model, name: str, options: dict[str, Any]) -> None:
    model, trained, frozen = trained_model(name, **options)
    plain = peft.build("small", 3, peft="full")
    merged = export.merge(model, trained, frozen)
    assert set(merged) == set(plain.trained)
    expected = model.apply(trained, frozen, inputs(name))
    np.testing.assert_allclose(plain.apply(merged, {}, inputs(name)), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix"])
def test_what_no_kernel_can_hold_is_refused(trained_model, kind: str) -> None:
    model, trained, frozen = trained_model("vit", peft=kind)
    with pytest.raises(ValueError, match="to fold into the backbone"):
        export.merge(model, trained, frozen)


@pytest.mark.parametrize("name", ROWS)
def test_merged_backbone_is_written_as_it_came(trained_model, tmp_path: Path, name: str) -> None:
    """The same names and shapes but for the old head, a graph as safetensors; read again, the same outputs."""
    model, trained, frozen = trained_model(name, peft="lora")
    file = export.export_backbone(tmp_path, model, trained, frozen, str(FIXTURES / name))
    assert file.name == ("model.npz" if name == "vit_augreg" else "model.safetensors")
    before, after = sources.open_source(FIXTURES / name).shapes, sources.open_source(tmp_path).shapes
    gone = {n for n in before if n.startswith(("classifier", "head"))}
    assert after == {n: shape for n, shape in before.items() if n not in gone}
    plain = peft.build("small", 3, peft="head")
    raw = load_file(tmp_path / "head.safetensors")
    head = {f"head/{part}": raw[part] for part in ("kernel", "bias")}
    got = plain.apply(head, load("small", str(tmp_path), peft.published(plain)), inputs(name))
    np.testing.assert_allclose(got, model.apply(trained, frozen, inputs(name)), atol=5e-5, rtol=1e-5)
    assert (tmp_path / "config.json").is_file() == (FIXTURES / name / "config.json").is_file()


def test_random_weights_are_written_in_the_first_layout(trained_model, tmp_path: Path) -> None:
    model, trained, frozen = trained_model("vit", "random", peft="lora")
    export.export_backbone(tmp_path, model, trained, frozen, "random")
    got = load("small", str(tmp_path), peft.published(model))
    merged = export.merge(model, trained, frozen)
    assert all(np.array_equal(got[path], merged[path]) for path in got)


@pytest.mark.parametrize(("file", "options"), [("vit_lora", {}), ("vit_dora", {"dora": True, "rslora": True})])
def test_lora_saved_by_peft_is_read(trained_model, file: str, options: dict[str, Any]) -> None:
    """The reference's logits with its own LoRA and head; it has the names of modules in transformers 5."""
    assert (
        export.lora_options(FIXTURES / file) == {"rank": 2, "lora_alpha": 6.0, "rslora": False, "dora": False} | options
    )
    model, trained, frozen = trained_model("vit", peft="lora", **options)
    expected = np.load(FIXTURES / file / "expected.npz")
    read = export.read_lora(FIXTURES / file, model)
    assert set(read) == set(trained)
    np.testing.assert_allclose(model.apply(read, frozen, expected["images 12x12"]), expected["logits"], atol=5e-5)


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2_onnx"])
@pytest.mark.parametrize(
    "options", [{"peft": "lora"}, {"peft": "ffa_lora", "rslora": True}, {"peft": "lora", "dora": True}]
)
def test_exported_lora_is_read_back(trained_model, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model, trained, frozen = trained_model(name, **options)
    export.export_lora(tmp_path, model, trained, frozen, base="someone/model")
    read = export.read_lora(tmp_path, model)
    whole = {**frozen, **trained}
    assert {path for path in model.fresh if not path.startswith("head/")} <= set(read)
    assert all(np.array_equal(read[path], whole[path]) for path in read)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (
        "LORA",
        2,
        6.0,
        "someone/model",
    )
    classifier = name != "dinov2_onnx"
    assert said["modules_to_save"] == (["classifier"] if classifier else None)
    assert (tmp_path / "head.safetensors").is_file() == (not classifier)


def test_names_are_those_of_the_model_for_classification(trained_model, tmp_path: Path) -> None:
    model, trained, frozen = trained_model("bert", peft="lora")
    leaves = load_file(export.export_lora(tmp_path, model, trained, frozen))
    assert leaves["base_model.model.bert.encoder.layer.1.attention.self.value.lora_A.weight"].shape == (2, 16)
    assert leaves["base_model.model.classifier.weight"].shape == (3, 16)
    image, trained, frozen = trained_model("vit", peft="lora")
    for version, name in ((5, "layers.1.attention.v_proj"), (4, "encoder.layer.1.attention.attention.value")):
        leaves = load_file(export.export_lora(tmp_path / "vit", image, trained, frozen, transformers=version))
        assert f"base_model.model.vit.{name}.lora_B.weight" in leaves
    mean, trained, frozen = trained_model("bert", peft="lora", pool="mean")
    leaves = load_file(export.export_lora(tmp_path / "mean", mean, trained, frozen))
    assert "base_model.model.encoder.layer.1.attention.self.value.lora_A.weight" in leaves


def test_lora_of_another_model_is_refused(trained_model, tmp_path: Path) -> None:
    model, trained, frozen = trained_model("bert", peft="lora")
    file = export.export_lora(tmp_path, model, trained, frozen)
    other, *_ = trained_model("bert", peft="lora", rank=4)
    with pytest.raises(ValueError, match="rank=2, not 4"):
        export.read_lora(tmp_path, other)
    wider, *_ = trained_model("bert", peft="lora", targets=("query", "value", "key"))
    with pytest.raises(ValueError, match="key/lora_a\\) missing"):
        export.read_lora(tmp_path, wider)
    leaves = load_file(file)
    leaves["base_model.model.bert.encoder.layer.7.attention.self.query.lora_A.weight"] = np.zeros((2, 16), np.float32)
    save_file(leaves, file)
    with pytest.raises(ValueError, match=r"layer\.7\.attention\.self\.query\.lora_A\.weight left over"):
        export.read_lora(tmp_path, model)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"query": 4}}))
    with pytest.raises(ValueError, match="one rank and alpha"):
        export.read_lora(tmp_path, model)


def test_lora_beside_other_parts_is_not_exported(trained_model, tmp_path: Path) -> None:
    model, trained, frozen = trained_model("bert", peft="lora+bias")
    with pytest.raises(ValueError, match="to train LoRA alone"):
        export.export_lora(tmp_path, model, trained, frozen)
    model = peft.build("mlp", 3, peft="lora", rank=2, targets=("layers/*",), input_shape=(4,))
    trained, frozen = peft.start(model, "random", 0)
    with pytest.raises(ValueError, match="to have Hugging Face names"):
        export.export_lora(tmp_path, model, trained, jax.tree.map(np.asarray, frozen))


def with_zero_rows(tmp_path: Path) -> Path:
    """The fixture's ViT with a row of zeros in a query and in a value."""
    shutil.copytree(FIXTURES / "vit", tmp_path / "zeros")
    file = tmp_path / "zeros" / "model.safetensors"
    leaves = load_file(file)
    for name in ("query", "value"):
        leaves[f"vit.encoder.layer.0.attention.attention.{name}.weight"][3] = 0
    save_file(leaves, file)
    return tmp_path / "zeros"


def test_dora_leaves_a_zero_row_at_zero(trained_model, tmp_path: Path) -> None:
    """The row has no direction: output, gradients, merged kernel and files are 0 there, whatever its length says."""
    model, moved, frozen = trained_model("vit", str(with_zero_rows(tmp_path)), peft="lora", dora=True)
    names = [f"blocks/0/attention/{name}" for name in ("query", "value")]
    trained, _ = peft.start(model, str(tmp_path / "zeros"), 0)
    assert all(trained[f"{name}/magnitude"][3] == 0 for name in names)
    for name in names:  # the others have moved; a long length must not reach beyond its column either
        moved[f"{name}/lora_b"][:, 3] = 0
    assert all(moved[f"{name}/magnitude"][3] != 0 for name in names)

    def loss(leaves: Any) -> jax.Array:
        return (model.apply(leaves, frozen, IMAGES) ** 2).sum()

    for leaves in (trained, moved):
        gradient = jax.jit(jax.grad(loss))(leaves)
        assert all(np.isfinite(g).all() for g in gradient.values())
        assert all(not gradient[f"{n}/lora_b"][:, 3].any() and gradient[f"{n}/magnitude"][3] == 0 for n in names)
        merged = export.merge(model, leaves, frozen)
        assert all(not merged[f"{name}/kernel"][:, 3].any() for name in names)
        got = peft.build("small", 3, peft="full").apply(merged, {}, IMAGES)
        np.testing.assert_allclose(got, model.apply(leaves, frozen, IMAGES), atol=5e-5, rtol=1e-5)
    file = export.export_backbone(tmp_path / "out", model, moved, frozen, tmp_path / "zeros")
    assert all(np.isfinite(leaf).all() for leaf in load_file(file).values())
    export.export_lora(tmp_path / "lora", model, moved, frozen)
    read = export.read_lora(tmp_path / "lora", model)
    np.testing.assert_array_equal(model.apply(read, frozen, IMAGES), model.apply(moved, frozen, IMAGES))


def test_dora_of_an_own_backbone_leaves_a_zero_column_at_zero(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import fedsim, numpy as np\n"
        "w = np.ones((4, 3), np.float32)\nw[:, 1] = 0\n"
        "model = fedsim.Backbone(lambda p, x: x @ p['w'], {'w': w}, width=3)\n"
    )
    model = peft.build(f"{tmp_path}/own.py:model", 2, peft="lora", dora=True, rank=1, targets=("w",), input_shape=(4,))
    trained, frozen = peft.start(model, None, 0)
    trained["model/w/magnitude"] = trained["model/w/magnitude"] + 1
    grad = jax.grad(lambda t: (model.apply(t, frozen, np.ones((2, 4), np.float32)) ** 2).sum())(trained)
    assert all(np.isfinite(g).all() for g in grad.values())
    assert not export.merge(model, trained, frozen)["model/w"][:, 1].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_leaves_that_are_not_finite_are_not_exported(trained_model, tmp_path: Path, value: float) -> None:
    model, trained, frozen = trained_model("vit", peft="lora")
    trained["blocks/1/attention/query/lora_b"][0, 1] = value
    for write in (
        lambda: export.export_lora(tmp_path / "out", model, trained, frozen),
        lambda: export.export_backbone(tmp_path / "out", model, trained, frozen, FIXTURES / "vit"),
        lambda: export.merge(model, trained, frozen),
    ):
        with pytest.raises(ValueError, match="trained leaf 'blocks/1/attention/query/lora_b' to be finite, but 1 of"):
            write()
    assert not (tmp_path / "out").exists()


def by_copy(source: Path, folder: Path) -> Path:
    return source


def by_link_to_folder(source: Path, folder: Path) -> Path:
    folder.symlink_to(source)
    return folder


def by_links_to_files(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def by_hard_link(source: Path, folder: Path) -> Path:
    folder.mkdir()
    os.link(next(source.glob("model.*")), folder / "head.safetensors")
    return folder


@pytest.mark.parametrize("name", ["vit", "vit_timm", "vit_augreg"])
@pytest.mark.parametrize("place", [by_copy, by_link_to_folder, by_links_to_files, by_hard_link])
def test_export_never_writes_over_its_source(
    trained_model, tmp_path: Path, name: str, place: Callable[[Path, Path], Path]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / name, source)
    folder = place(source, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    model, trained, frozen = trained_model(name, str(source), peft="lora")
    for weights in (source, next(source.glob("model.*"))):
        with pytest.raises(ValueError, match="give a new folder"):
            export.export_backbone(folder, model, trained, frozen, weights)
    if place in (by_copy, by_link_to_folder, by_hard_link):
        named = peft.build("small", 3, peft="lora", rank=2, lora_alpha=6.0, weights=str(source))
        for built, base in ((model, source), (named, None)):
            with pytest.raises(ValueError, match="give a new folder"):
                export.export_lora(folder, built, trained, frozen, base=base)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert set(os.listdir(folder)) <= before.keys() | {"head.safetensors"}


def test_export_over_an_older_export_and_into_a_file(trained_model, tmp_path: Path) -> None:
    model, trained, frozen = trained_model("vit", peft="lora")
    for _ in range(2):
        export.export_backbone(tmp_path / "out", model, trained, frozen, FIXTURES / "vit")
        export.export_lora(tmp_path / "lora", model, trained, frozen, base=FIXTURES / "vit")
    (tmp_path / "file").write_text("mine")
    for write in (
        lambda: export.export_lora(tmp_path / "file", model, trained, frozen),
        lambda: export.export_backbone(tmp_path / "file", model, trained, frozen, "random"),
    ):
        with pytest.raises(ValueError, match=r"folder='.*file' to be one that can be written"):
            write()


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_words_or_paths(trained_model, tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    model, trained, frozen = trained_model("vit", peft="lora")
    export.export_backbone(kind(tmp_path / "out"), model, trained, frozen, kind(FIXTURES / "vit"))
    export.export_lora(kind(tmp_path / "lora"), model, trained, frozen, base=kind(FIXTURES / "vit"))
    assert export.lora_options(kind(tmp_path / "lora"))["rank"] == 2
    assert export.read_lora(kind(tmp_path / "lora"), model).keys() >= trained.keys()
    load("small", kind(tmp_path / "out"), peft.published(model))
    assert sources.open_source(kind(tmp_path / "out")).shapes
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        FIXTURES / "vit"
    )


def test_fused_matrices_of_half_precision_are_exported_in_float32(trained_model, tmp_path: Path) -> None:
    """Queries, keys and values of timm lie in one matrix: its parts are as exact as all else that was trained."""
    (tmp_path / "half").mkdir()
    leaves = load_file(FIXTURES / "vit_timm" / "model.safetensors")
    save_file({n: a.astype(np.float16) for n, a in leaves.items()}, tmp_path / "half" / "model.safetensors")
    model, trained, frozen = trained_model("vit_timm", str(tmp_path / "half"), peft="lora")
    export.export_backbone(tmp_path / "out", model, trained, frozen, tmp_path / "half")
    got, merged = load("small", tmp_path / "out", peft.published(model)), export.merge(model, trained, frozen)
    assert all(np.array_equal(got[path], merged[path]) for path in got)
