"""Full-size models with random weights, saved by the reference libraries, give the reference's outputs here.

    pip install -e '.[test,reference]' && pip install --no-deps timm torchvision
    pytest tests/reference -m reference -s

prints the rows of the table in docs/backbones.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `reference` is not installed")

import jax
import transformers
from make_fixtures import augreg, torch_images
from reference_libraries import timm, torchvision
from safetensors.torch import save_file

from fedsim import peft
from fedsim.backbones.load import load
from fedsim.peft import export

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4
Answer = Callable[[np.ndarray], np.ndarray]


def shake(model: Any, seed: int = 1) -> Any:
    """Moves every leaf away from its start, so that no leaf is one or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.02)
    return model.eval()


def compare(kind: str, name: str, folder: Path, answer: Answer, x: np.ndarray, version: str, **options: Any) -> None:
    """Features of our backbone against the reference's, over the largest of them where that is above one."""
    model = peft.build(name, 3, peft="head", **options)
    frozen = load(name, str(folder), peft.published(model))
    got = np.asarray(jax.jit(model.prefix)(frozen, x))
    with torch.no_grad():
        expected = np.asarray(answer(x))
    size = max(1.0, float(np.max(np.abs(expected))))
    difference = float(np.max(np.abs(got - expected))) / size
    print(f"\n| {kind} | {name} | {x.shape[1]}{' px' if x.ndim == 4 else ' tokens'} | {difference:.1e} | {version} |")
    assert difference < TOLERANCE


def images(side: int, size: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(size, side, side, 3)).astype(np.float32)


HF = f"transformers {transformers.__version__}"
TIMM = f"timm {timm.__version__}"


@pytest.mark.parametrize("side", [224, 160])
def test_hugging_face_vit_b16(tmp_path: Path, side: int) -> None:
    model = shake(transformers.ViTModel(transformers.ViTConfig(layer_norm_eps=1e-6), add_pooling_layer=False))
    model.save_pretrained(tmp_path)

    def answer(x: np.ndarray) -> np.ndarray:
        return model(torch_images(x), interpolate_pos_encoding=True).last_hidden_state[:, 0].numpy()

    compare("Hugging Face safetensors", "vit_b16", tmp_path, answer, images(side), HF)


@pytest.mark.parametrize("side", [224, 56])
def test_hugging_face_dinov2_s14(tmp_path: Path, side: int) -> None:
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, layerscale_value=1.0
    )
    model = shake(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    compare(
        "Hugging Face safetensors",
        "dinov2_s14",
        tmp_path,
        lambda x: model(torch_images(x)).last_hidden_state[:, 0].numpy(),
        images(side),
        HF,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert_base", "BertModel"), ("roberta_base", "RobertaModel")],
)
def test_hugging_face_text(tmp_path: Path, name: str, kind: str) -> None:
    options = {
        "bert_base": {},
        "roberta_base": {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
        },
    }[name]
    config = getattr(transformers, kind.replace("Model", "Config"))(**options)
    model = shake(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path)
    pad = config.pad_token_id
    ids = np.random.default_rng(0).integers(pad + 1, 30000, (3, 48)).astype(np.int32)
    ids[0, 20:], ids[1, 47:] = pad, pad

    def answer(x: np.ndarray) -> np.ndarray:
        tokens = torch.tensor(x, dtype=torch.long)
        out = model(tokens, attention_mask=(tokens != pad).long())
        return (out.pooler_output if name == "bert_base" else out.last_hidden_state[:, 0]).numpy()

    compare("Hugging Face safetensors", name, tmp_path, answer, ids, HF)


@pytest.mark.parametrize(
    ("name", "theirs", "side", "options"),
    [
        ("vit_ti16", "vit_tiny_patch16_224", 224, {}),
        ("vit_b16", "vit_base_patch16_224", 224, {}),
        ("dinov2_s14", "vit_small_patch14_dinov2", 518, {}),
        ("resnet18", "resnet18", 224, {}),
        ("resnet50", "resnet50", 224, {}),
        ("resnet50_gn", "resnet50_gn", 224, {}),
    ],
)
def test_timm(tmp_path: Path, name: str, theirs: str, side: int, options: dict[str, Any]) -> None:
    model = timm.create_model(theirs, pretrained=False, **options)
    shake(model)
    if name.startswith("resnet"):
        randomise_statistics(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    def answer(x: np.ndarray) -> np.ndarray:
        features = model.forward_features(torch_images(x))
        return model.forward_head(features, pre_logits=True).numpy()

    compare("timm safetensors", name, tmp_path, answer, images(side, 1 if side > 224 else 2), TIMM)


def randomise_statistics(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf_name, leaf in model.named_buffers():
            if leaf_name.endswith(("running_mean", "running_var")):
                leaf.copy_(torch.rand(leaf.shape, generator=generator) + (0.5 if leaf_name.endswith("var") else -0.5))


def test_torchvision_shufflenet(tmp_path: Path) -> None:
    model = shake(torchvision.models.shufflenet_v2_x0_5(weights=None))
    randomise_statistics(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.fc = torch.nn.Identity()
    version = f"torchvision {torchvision.__version__}"
    compare(
        "torchvision safetensors",
        "shufflenet_v2_x0_5",
        tmp_path,
        lambda x: model(torch_images(x)).numpy(),
        images(224),
        version,
    )


@pytest.mark.parametrize(
    ("name", "theirs", "shape"),
    [
        ("vit_b16", "vit_base_patch16_224", {"width": 768, "heads": 12, "hidden": 3072}),
        ("vit_ti16", "vit_tiny_patch16_224", {"width": 192, "heads": 3, "hidden": 768}),
    ],
)
def test_google_augreg(tmp_path: Path, name: str, theirs: str, shape: dict[str, int]) -> None:
    """A file with Google's names and shapes, read by timm's own reader and by ours."""
    file = tmp_path / "model.npz"
    np.savez(file, **augreg(depth=12, patch=16, tokens=197, classes=1000, **shape))
    model = timm.create_model(theirs, pretrained=False).eval()
    model.load_pretrained(str(file))
    compare(
        "Google AugReg .npz",
        name,
        tmp_path,
        lambda x: model.forward_features(torch_images(x))[:, 0].numpy(),
        images(224),
        TIMM,
    )


@pytest.mark.parametrize("name", ["smollm2_135m", "tinyllama_1_1b", "gpt2"])
def test_hugging_face_decoders(tmp_path: Path, name: str) -> None:
    """Logits of every token, of as few blocks as keep the time short; the widths, heads and angles are the whole model's."""
    import dataclasses

    from fedsim.backbones import BACKBONES

    row = BACKBONES[name]
    c = dataclasses.replace(row.config, depth=4)
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=c.depth))
    else:
        config = transformers.LlamaConfig(
            vocab_size=c.vocabulary,
            hidden_size=c.width,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.hidden,
            max_position_embeddings=c.positions,
            rope_theta=c.theta,
            rms_norm_eps=c.eps,
            tie_word_embeddings=c.tied,
        )
        model = transformers.LlamaForCausalLM(config)
    shake(model).save_pretrained(tmp_path, max_shard_size="100MB")
    ids = np.random.default_rng(0).integers(0, c.vocabulary, (2, 96)).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, name, row._replace(config=c))
        compare_logits("Hugging Face safetensors", name, tmp_path, model, ids)


def test_packaged_smollm2() -> None:
    """The dequantised file, whole, read by transformers and by ours."""
    from fedsim.data import assets

    try:
        folder = assets.path("smollm2_135m")
    except ValueError as error:
        pytest.skip(str(error))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = np.load(Path(__file__).parents[1] / "fixtures" / "backbones" / "smollm2_135m.npz")["ids"]
    compare_logits("packaged GGUF, dequantised", "smollm2_135m", folder, model, ids)


def compare_logits(kind: str, name: str, folder: Path, theirs: Any, ids: np.ndarray) -> None:
    """Scores of the next tokens, over the largest of them."""
    model = peft.build(name, 3, peft="full", task="language_model")
    leaves = load(name, str(folder), peft.published(model))
    got = np.asarray(jax.jit(model.apply)(leaves, {}, ids))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    difference = float(np.max(np.abs(got - expected))) / max(1.0, float(np.max(np.abs(expected))))
    print(f"\n| {kind} | {name} | {ids.shape[1]} tokens | {difference:.1e} | {HF} |")
    assert difference < TOLERANCE
    assert np.array_equal(got.argmax(-1), expected.argmax(-1))


def test_packaged_vit_s14() -> None:
    """The encoder inside the packaged ONNX graph, run by onnxruntime up to its last LayerNorm; it takes 224 px only."""
    from fedsim.data import assets

    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    try:
        folder = assets.path("vit_s14")
    except ValueError as error:
        pytest.skip(str(error))
    graph = onnx.load(next(folder.glob("*.onnx")))
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info("/backbone/layernorm/Add_1_output_0"))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def answer(x: np.ndarray) -> np.ndarray:
        return session.run(["/backbone/layernorm/Add_1_output_0"], {name: x.transpose(0, 3, 1, 2)})[0][:, 0]

    compare("packaged ONNX", "vit_s14", folder, answer, images(224, 1), f"onnxruntime {runtime.__version__}")


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("fixture", ["bert_classifier", "vit"])
def test_peft_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixture: str, options: dict[str, bool]
) -> None:
    """Our LoRA in the real `peft`, on the reference model: the same logits; saved by `peft` and read again: the same leaves."""
    from fedsim.backbones import BACKBONES, Row, bert_row
    from fedsim.backbones.bert import BertConfig
    from fedsim.backbones.vit import Vit, VitConfig
    from peft import PeftModel

    folder = Path(__file__).parents[1] / "fixtures" / "backbones" / fixture
    rows = {
        "bert_classifier": bert_row(BertConfig(vocabulary=60, width=16, depth=2, heads=4, hidden=24, positions=20)),
        "vit": Row("image", Vit, VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12), formats=("vit",)),
    }
    monkeypatch.setitem(BACKBONES, "small", rows[fixture])
    model = peft.build("small", 3, peft="lora", rank=2, lora_alpha=6.0, targets=("query", "value", "mlp/*"), **options)
    trained, frozen = peft.start(model, str(folder), 0)
    rng = np.random.default_rng(0)
    trained = {p: v + rng.normal(size=v.shape).astype(np.float32) * np.float32(0.2) for p, v in trained.items()}
    export.export_lora(tmp_path / "ours", model, trained, frozen, base=str(folder))
    kind = transformers.ViTForImageClassification if fixture == "vit" else transformers.BertForSequenceClassification
    base = kind.from_pretrained(folder, attn_implementation="eager", num_labels=3).eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    expected = np.load(folder / "expected.npz")
    with torch.no_grad():
        if fixture == "vit":
            x = expected["images 12x12"]
            logits = theirs(torch_images(x)).logits.numpy()
        else:
            x = expected["ids"]
            tokens = torch.tensor(x, dtype=torch.long)
            logits = theirs(tokens, attention_mask=(tokens != 0).long()).logits.numpy()
    difference = float(np.max(np.abs(np.asarray(model.apply(trained, frozen, x)) - logits)))
    print(f"\n| peft LoRA {options or ''} | {fixture} | {difference:.1e} |")
    assert difference < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    read = export.read_lora(tmp_path / "theirs", model)
    assert set(read) == set(trained)
    assert all(np.array_equal(read[path], trained[path]) for path in read)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("fixture", ["llama", "llama_untied", "gpt2"])
def test_peft_reads_loras_of_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixture: str, options: dict[str, bool]
) -> None:
    """Our LoRA of a language model in the real `peft`, on transformers' own model for next tokens: the same logits."""
    from fedsim.backbones import BACKBONES, decoder_row
    from fedsim.backbones.decoder import DecoderConfig
    from peft import PeftModel

    folder = Path(__file__).parents[1] / "fixtures" / "backbones" / fixture
    gpt2 = fixture == "gpt2"
    llama = DecoderConfig("llama", 40, 16, 2, 4, 2, 24, positions=20, theta=100.0, tied=fixture == "llama")
    config = DecoderConfig("gpt2", 40, 16, 2, 4, 4, 64, positions=20) if gpt2 else llama
    monkeypatch.setitem(BACKBONES, "small", decoder_row(config, ("gpt2" if gpt2 else "llama",)))
    targets = ("mlp/*",) if gpt2 else ("query", "value", "mlp/*")
    model = peft.build(
        "small", 3, peft="lora", task="language_model", rank=2, lora_alpha=6.0, targets=targets, **options
    )
    trained, frozen = peft.start(model, str(folder), 0)
    rng = np.random.default_rng(0)
    trained = {p: v + rng.normal(size=v.shape).astype(np.float32) * np.float32(0.2) for p, v in trained.items()}
    export.export_lora(tmp_path, model, trained, frozen, base=str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = np.load(folder / "expected.npz")["ids"]
    tokens = torch.tensor(ids, dtype=torch.long)
    with torch.no_grad():
        logits = theirs(tokens, attention_mask=(tokens != 0).long()).logits.numpy()
    real = ids != 0
    difference = float(np.max(np.abs(np.asarray(model.apply(trained, frozen, ids)) - logits)[real]))
    size = max(1.0, float(np.max(np.abs(logits[real]))))
    print(f"\n| peft LoRA {options or ''} | {fixture} | {difference / size:.1e} |")
    assert difference / size < TOLERANCE
