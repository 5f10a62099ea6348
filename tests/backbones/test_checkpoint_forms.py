"""The forms in which checkpoints are published, and what damage does to them: read rightly, or refused by file and rule."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fedsim
from fedsim import peft
from fedsim.backbones import BACKBONES, Row, bert_row
from fedsim.backbones.bert import BertConfig
from fedsim.backbones.images import IMAGENET, Pixels
from fedsim.backbones.load import load
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.peft import export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
CONFIG = (FIXTURES / "bert" / "config.json").read_bytes()
BARE = load_file(FIXTURES / "bert" / "model.safetensors")
BERT = {f"bert.{name}": leaf for name, leaf in BARE.items()}
WORDS, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"
HEAD_ALONE = {"cls.predictions.bias": np.zeros(60, np.float32)}
VIT = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., peft.Model]:
    def make(name: str = "bert", **options: Any) -> peft.Model:
        row = bert_row(BertConfig(vocabulary=60, width=16, depth=2, heads=4, hidden=24, positions=20))
        if name != "bert":
            row = Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats)
        monkeypatch.setitem(BACKBONES, "small", row)
        return peft.build("small", 3, **{"peft": "head", **options})

    return make


def write(
    folder: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None, config: bytes = CONFIG
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_bytes(config)
    return folder


def shards(folder: Path, **changes: Any) -> Path:
    """The checkpoint in two files and their index."""
    folder.mkdir()
    names = sorted(BERT)
    place = {name: f"model-0000{1 + (i >= 20)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        save_file({name: BERT[name] for name in names if place[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": place} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tied() -> dict[str, np.ndarray]:
    arrays = dict(BERT)
    arrays["cls.predictions.decoder.weight"] = arrays.pop(WORDS)
    return arrays


FORMS: dict[str, Callable[[Path], Path]] = {
    "DataParallel": lambda d: write(
        d, {f"module.{k}": v for k, v in BERT.items()} | {"module.classifier.bias": BERT[WORDS]}
    ),
    "wrapped": lambda d: write(d, {f"model.{k}": v for k, v in BARE.items()}),
    "compiled": lambda d: write(d, {f"_orig_mod.{k}": v for k, v in BERT.items()}),
    "question answering": lambda d: write(d, BERT | {"qa_outputs.weight": np.zeros((2, 16), np.float32)}),
    "pre-training": lambda d: write(d, BERT | HEAD_ALONE),
    "tied": lambda d: write(d, tied(), {"format": "pt", WORDS: "cls.predictions.decoder.weight"}),
    "byte-order mark": lambda d: write(d, BERT, config=b"\xef\xbb\xbf" + CONFIG),
    "shards": shards,
    "float64": lambda d: write(d, {k: v.astype(np.float64) for k, v in BERT.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_are_read(small, tmp_path: Path, form: str) -> None:
    model = small()
    expected = load("small", FIXTURES / "bert", peft.published(model))
    folder = FORMS[form](tmp_path / "d")
    for weights in (folder, str(folder)):
        got = load("small", weights, peft.published(model))
        assert all(np.array_equal(got[path], expected[path]) for path in expected)
    trained, frozen = peft.start(model, folder, 0)
    file = export.export_backbone(tmp_path / "out", model, trained, frozen, folder)
    again = load("small", file.parent, peft.published(model))
    assert all(np.array_equal(again[path], expected[path]) for path in expected)
    assert not [name for name in load_file(file) if "qa_outputs" in name or "cls." in name or "classifier" in name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(small, tmp_path: Path, dtype: Any) -> None:
    got = load("small", write(tmp_path / "d", {k: v.astype(dtype) for k, v in BERT.items()}), peft.published(small()))
    assert np.array_equal(got["embeddings/token/embedding"], BERT[WORDS].astype(dtype).astype(np.float32))


def test_masked_image_modelling_is_read_without_its_head(small, tmp_path: Path) -> None:
    arrays = load_file(FIXTURES / "vit" / "model.safetensors")
    arrays = {n: leaf for n, leaf in arrays.items() if not n.startswith("classifier")}
    expected = load("small", FIXTURES / "vit", peft.published(small("vit")))
    more = {"decoder.0.weight": np.zeros((48, 16, 1, 1), np.float32), "decoder.0.bias": np.zeros(48, np.float32)}
    save_file(
        arrays | more | {"vit.embeddings.mask_token": np.zeros((1, 1, 16), np.float32)}, tmp_path / "m.safetensors"
    )
    got = load("small", tmp_path / "m.safetensors", peft.published(small("vit")))
    assert all(np.array_equal(got[path], expected[path]) for path in expected)


def test_checkpoint_without_pooler_is_refused_with_what_reads_it(small, tmp_path: Path) -> None:
    """Question answering and masked language models are published without a pooler."""
    folder = write(tmp_path / "d", {k: v for k, v in BERT.items() if "pooler" not in k} | HEAD_ALONE)
    with pytest.raises(ValueError, match=r"2 missing: .*take pool='cls' or pool='mean'"):
        load("small", folder, peft.published(small()))
    load("small", folder, peft.published(small(pool="cls")))


def test_unknown_head_is_refused_with_both_ways_out(small, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", BERT | {"span_head.weight": np.zeros(16, np.float32)})
    with pytest.raises(
        ValueError, match=r"1 left over: span_head.weight: choose the backbone .* save the file without"
    ):
        load("small", folder, peft.published(small()))


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {k: change(v) if name in k else v for k, v in BERT.items()}


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf.astype(type(value) if isinstance(value, np.floating) else np.float32)
        leaf.flat[0] = value
        return leaf

    return put


KINDS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "float8": (changed("", lambda v: v.astype(ml_dtypes.float8_e4m3fn)), "F8_E4M3"),
    "int8": (changed("", lambda v: (v * 50).astype(np.int8)), "I8"),
    "bool": (changed(QUERY, lambda v: v > 0), rf"{QUERY} \(BOOL\)"),
    "integers": (changed(QUERY, lambda v: (v * 50).astype(np.int64)), rf"{QUERY} \(I64\)"),
    "NaN": (changed(QUERY, first(np.nan)), f"tensor '{QUERY}'.* 1 of 256 are NaN or infinite"),
    "infinite": (changed(WORDS, first(-np.inf)), f"tensor '{WORDS}'.* 1 of 960 are NaN or infinite"),
    "beyond float32": (changed(QUERY, first(np.float64(1e300))), f"tensor '{QUERY}'.* 1 of 256 are NaN or infinite"),
}


@pytest.mark.parametrize("form", [".safetensors", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_weight_is_refused_by_name(small, tmp_path: Path, kind: str, form: str) -> None:
    arrays, words = KINDS[kind]
    file = tmp_path / f"model{form}"
    if form == ".npz":
        np.savez(file, **arrays)
        words = (
            words.replace("F8_E4M3", "void8|float8")
            .replace("I8", "int8")
            .replace("BOOL", "bool")
            .replace("I64", "int64")
        )
    else:
        save_file(arrays, file)
    with pytest.raises(ValueError, match=words) as refused:
        load("small", file, peft.published(small()))
    assert str(file) in str(refused.value) and "; " in str(refused.value)


def test_leaf_in_two_spellings_is_refused(small, tmp_path: Path) -> None:
    name = "bert.embeddings.LayerNorm.weight"
    folder = write(tmp_path / "d", BERT | {name.replace("weight", "gamma"): BERT[name] + 1})
    with pytest.raises(ValueError, match=r"1 there in two spellings: bert\.embeddings.LayerNorm"):
        load("small", folder, peft.published(small()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": [1]}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, "beside it"),
        ({"weight_map": {"a": "model-00003-of-00002.safetensors"}}, "beside it"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "tensor 'a' .* to lie in model-00001"),
    ],
)
def test_wrong_index_is_refused(small, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        load("small", shards(tmp_path / "d", **changes), peft.published(small()))
    assert "model.safetensors.index.json" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' of .* to be a number"),
        ({"is_decoder": [1]}, "is_decoder=.* to be a flag"),
        ({"model_type": {"a": 1}}, "model_type=.* to be a text"),
        ({"num_attention_heads": True}, "num_attention_heads=True of .* to be a number"),
    ],
)
def test_field_of_another_type_is_refused(small, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    folder = write(tmp_path / "d", BERT, config=json.dumps(json.loads(CONFIG) | config).encode())
    with pytest.raises(ValueError, match=words) as refused:
        load("small", folder, peft.published(small()))
    assert "config.json" in str(refused.value)


def lora(folder: Path) -> None:
    model = peft.build("small", 3, peft="lora", **export.lora_options(folder))
    read = export.read_lora(folder, model)
    assert all(np.isfinite(leaf).all() for leaf in read.values())


def weights(folder: Path) -> None:
    model = peft.build("small", 3, peft="head")
    read = load("small", folder, peft.published(model))
    assert all(np.isfinite(leaf).all() for leaf in read.values())


# Room's readers: what they read, by file, and how. A cut or flipped one is refused, or read as finite numbers.
READERS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "safetensors": ("vit", "model.safetensors", weights),
    "config": ("vit", "config.json", weights),
    "npz": ("vit_augreg", "model.npz", weights),
    "onnx": ("dinov2_onnx", "model.onnx", weights),
    "shard": ("shards", "model-00002-of-00002.safetensors", weights),
    "index": ("shards", "model.safetensors.index.json", weights),
    "adapter config": ("vit_lora", "adapter_config.json", lora),
    "adapter": ("vit_lora", "adapter_model.safetensors", lora),
}
DEEP = b"[" * 200_000
ALWAYS_WRONG: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "first byte": lambda raw: raw[:1],
    "all but the last bytes": lambda raw: raw[:-9],
    "no text": lambda raw: b"\xff\xfe\x00" + raw[3:],
    "{}": lambda raw: b"{}",
    "list": lambda raw: b"[1, 2]",
    "null": lambda raw: b"null",
    "deep": lambda raw: DEEP,
    "long number": lambda raw: b"\xff" * 5000,
    "huge integer": lambda raw: b'{"a": ' + b"9" * 10_000 + b"}",
    "twice": lambda raw: b'{"r": 2, "r": 3}',
}


@pytest.fixture
def damaged(small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of what a reader reads, its backbone known."""

    def make(reader: str) -> Path:
        name, file, _ = READERS[reader]
        small("bert" if name == "shards" else "vit")
        if name.startswith("dinov2"):
            config = dataclasses.replace(VIT, hidden=32, layer_scale=True, pixels=Pixels(*IMAGENET))
            monkeypatch.setitem(BACKBONES, "small", Row("image", Vit, config, formats=BACKBONES["dinov2_s14"].formats))
        if name == "shards":
            shards(tmp_path / "d")
        else:
            shutil.copytree(FIXTURES / name, tmp_path / "d")
            (tmp_path / "d" / "expected.npz").unlink(missing_ok=True)
        return tmp_path / "d" / file

    return make


@pytest.mark.parametrize("damage", ALWAYS_WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_file_is_refused_by_name(damaged, reader: str, damage: str) -> None:
    file = damaged(reader)
    READERS[reader][2](file.parent)  # whole, it is read
    file.write_bytes(ALWAYS_WRONG[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"^Expected ") as refused:
        READERS[reader][2](file.parent)
    assert str(file) in str(refused.value) and "; " in str(refused.value)


@pytest.mark.parametrize("reader", READERS)
def test_flipped_bytes_are_refused_or_read_as_numbers(damaged, reader: str) -> None:
    """Weights have no checksum, so a flipped bit may be another number; it is never a traceback and never a NaN."""
    file = damaged(reader)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for trial in range(40):
        raw = bytearray(whole)
        for at in rng.integers(0, min(len(raw), 2000 if trial % 2 else len(raw)), 3):
            raw[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(raw))
        try:
            READERS[reader][2](file.parent)
        except ValueError as error:
            assert str(error).startswith("Expected "), error


def test_own_params_that_are_not_finite_are_refused() -> None:
    params = {"w": np.array([[1.0, np.nan]], np.float32)}
    with pytest.raises(ValueError, match="leaf 'model/w' of the own backbone's params to hold finite"):
        fedsim.Backbone(lambda p, x: x @ p["w"], params, width=2).values()
