"""Makes the small reference fixtures under tests/fixtures/backbones with torch, transformers and timm.

They are committed; run this only to renew them, in an environment with the reference libraries, which no light test
needs (the extra `reference`; torchvision without its dependencies, as it asks for another build of torch):

    pip install torch==2.13.0 transformers safetensors tokenizers peft onnx
    pip install --no-deps timm torchvision
    python tests/reference/make_fixtures.py [DIRECTORY of MiniLM: model.safetensors, config.json, tokenizer.json]

Two-layer models with random weights prove each format on every machine. MiniLM itself is not copied: only its pooled
outputs for a few sentences of our own are kept. Decoders: `make_decoder_fixtures.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from reference_libraries import timm, torchvision
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "attn_implementation": "eager",
}

SENTENCES = (
    "The shuttle was launched yesterday.",
    "Selling a mountain bike, barely used, new tyres; make me an offer!",
    "Why does my graphics card refuse to show more than 256 colours?",
    "goalie",
    "A federation averages what its members learn, and never sees what they learn from, which is the point of it, "
    "so this sentence is longer than the thirty-two tokens to which it will be cut.",
    "",
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every leaf at random, LayerNorms too: a swapped or transposed leaf shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator) * 0.3
            leaf.copy_(noise + 1 if leaf.ndim == 1 and name.endswith("weight") else noise)
        for name, leaf in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                noise = torch.rand(leaf.shape, generator=generator)
                leaf.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)


def padded_ids(batch: int, tokens: int, vocabulary: int, pad: int = 0) -> np.ndarray:
    """Random ids (batch, tokens) of different lengths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(pad + 1, vocabulary, (batch, tokens))
    for row, length in enumerate(rng.integers(1, tokens + 1, batch)):
        ids[row, length:] = pad
    return ids.astype(np.int32)


def images(*sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    """Normalised images (2, height, width, 3) of each size, by name."""
    rng = np.random.default_rng(0)
    return {f"{h}x{w}": rng.normal(size=(2, h, w, 3)).astype(np.float32) for h, w in sizes}


def torch_images(x: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) -> (B, 3, H, W)."""
    return torch.tensor(x.transpose(0, 3, 1, 2).copy())


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, as sentence-transformers pools: (B, T, D), (B, T) -> (B, D)."""
    weight = mask[..., None].float()
    return (hidden * weight).sum(1) / weight.sum(1)


def bert() -> None:
    """A two-layer BertModel (names without prefix, with pooler), and a classifier (names `bert.*`, with a head)."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
        attn_implementation="eager",
    )
    ids = padded_ids(6, 12, 60)
    tokens = torch.tensor(ids, dtype=torch.long)
    mask = (tokens != 0).long()
    for name, kind in (("bert", BertModel), ("bert_classifier", BertForSequenceClassification)):
        config.num_labels = 3
        model = kind(config).eval()
        randomise(model, seed=1)
        model.save_pretrained(FIXTURES / name, safe_serialization=True)
        with torch.no_grad():
            body = model if kind is BertModel else model.bert
            out = body(tokens, attention_mask=mask)
            expected = {
                "ids": ids,
                "mean": mean(out.last_hidden_state, mask).numpy(),
                "cls": out.last_hidden_state[:, 0].numpy(),
                "pooler": out.pooler_output.numpy(),
                "versions": np.array(VERSIONS),
            }
            if kind is BertForSequenceClassification:
                expected["logits"] = model(tokens, attention_mask=mask).logits.numpy()
        np.savez(FIXTURES / name / "expected.npz", **expected)


def roberta() -> None:
    """A two-layer RoBERTa: id 1 pads, positions start at 2."""
    config = RobertaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=22,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    ids = padded_ids(6, 12, 60, pad=1)
    tokens = torch.tensor(ids, dtype=torch.long)
    mask = (tokens != 1).long()
    model = RobertaModel(config).eval()
    randomise(model, seed=2)
    model.save_pretrained(FIXTURES / "roberta", safe_serialization=True)
    with torch.no_grad():
        out = model(tokens, attention_mask=mask)
    np.savez(
        FIXTURES / "roberta" / "expected.npz",
        ids=ids,
        mean=mean(out.last_hidden_state, mask).numpy(),
        cls=out.last_hidden_state[:, 0].numpy(),
        pooler=out.pooler_output.numpy(),
        versions=np.array(VERSIONS),
    )


def hidden_of(outputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Normalised tokens (B, 1 + patches, D) by size -> class features and the means over patches, by size."""
    answer = {f"cls {size}": tokens[:, 0].numpy() for size, tokens in outputs.items()}
    return answer | {f"mean {size}": tokens[:, 1:].mean(1).numpy() for size, tokens in outputs.items()}


def save_images(name: str, given: dict[str, np.ndarray], **expected: np.ndarray) -> None:
    named = {f"images {size}": x for size, x in given.items()}
    np.savez(FIXTURES / name / "expected.npz", **named, **expected, versions=np.array(VERSIONS))


def vit() -> None:
    """A two-layer ViT with a classifier, at the size of its positions and at two others."""
    model = ViTForImageClassification(
        ViTConfig(**SMALL, intermediate_size=24, layer_norm_eps=1e-6, num_labels=3)
    ).eval()
    randomise(model, seed=3)
    model.save_pretrained(FIXTURES / "vit", safe_serialization=True)
    given = images((12, 12), (8, 8), (20, 16))
    with torch.no_grad():
        out = {
            size: model.vit(torch_images(x), interpolate_pos_encoding=True).last_hidden_state
            for size, x in given.items()
        }
        logits = model(torch_images(given["12x12"])).logits.numpy()
    save_images("vit", given, **hidden_of(out), logits=logits)


def dinov2() -> None:
    """A two-layer DINOv2 without register tokens, and the same as an ONNX graph in the form of the packaged one."""
    model = Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2)).eval()
    randomise(model, seed=4)
    model.save_pretrained(FIXTURES / "dinov2", safe_serialization=True)
    given = images((12, 12), (8, 8), (20, 16))
    with torch.no_grad():
        out = {size: model(torch_images(x)).last_hidden_state for size, x in given.items()}
    save_images("dinov2", given, **hidden_of(out))

    class Saliency(torch.nn.Module):
        """As the packaged graph is named: the encoder is `backbone`, a decoder comes after it."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = model
            self.decoder = torch.nn.ConvTranspose2d(16, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.backbone(x).last_hidden_state[:, 1:]
            return self.decoder(tokens.transpose(1, 2).reshape(x.shape[0], 16, 3, 3))

    (FIXTURES / "dinov2_onnx").mkdir(exist_ok=True)
    torch.onnx.export(
        Saliency().eval(),
        (torch_images(given["12x12"]),),
        str(FIXTURES / "dinov2_onnx" / "model.onnx"),
        input_names=["input_image"],
        dynamic_axes={"input_image": [0, 2, 3]},
        opset_version=14,
        dynamo=False,
    )


def vit_timm() -> None:
    """timm's ViT, plain and with LayerScale, as safetensors; and Google's names as .npz, which timm reads too."""
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    given = images((12, 12))
    for name, ratio, options in (("vit_timm", 1.5, {}), ("dinov2_timm", 2, {"init_values": 1.0})):
        model = timm.models.vision_transformer.VisionTransformer(**sizes, mlp_ratio=ratio, **options).eval()
        randomise(model, seed=5)
        (FIXTURES / name).mkdir(exist_ok=True)
        save_file(model.state_dict(), FIXTURES / name / "model.safetensors")
        with torch.no_grad():
            x = torch_images(given["12x12"])
            save_images(name, given, **hidden_of({"12x12": model.forward_features(x)}), logits=model(x).numpy())
    arrays = augreg(width=16, depth=2, heads=4, hidden=24, patch=4, tokens=10, classes=3)
    (FIXTURES / "vit_augreg").mkdir(exist_ok=True)
    file = FIXTURES / "vit_augreg" / "model.npz"
    np.savez(file, **arrays)
    model = timm.models.vision_transformer.VisionTransformer(**sizes, mlp_ratio=1.5).eval()
    model.load_pretrained(str(file))
    with torch.no_grad():
        x = torch_images(given["12x12"])
        save_images("vit_augreg", given, **hidden_of({"12x12": model.forward_features(x)}), logits=model(x).numpy())


def augreg(
    *, width: int, depth: int, heads: int, hidden: int, patch: int, tokens: int, classes: int
) -> dict[str, np.ndarray]:
    """Random leaves under the names and in the shapes of Google's published ViT files (heads apart, kernels (in, out))."""
    rng = np.random.default_rng(6)

    def leaf(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * (0.3 if width < 64 else 0.02)).astype(np.float32)

    arrays = {
        "cls": leaf(1, 1, width),
        "embedding/kernel": leaf(patch, patch, 3, width),
        "embedding/bias": leaf(width),
        "Transformer/posembed_input/pos_embedding": leaf(1, tokens, width),
        "Transformer/encoder_norm/scale": leaf(width) + 1,
        "Transformer/encoder_norm/bias": leaf(width),
        "head/kernel": leaf(width, classes),
        "head/bias": leaf(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = leaf(width, heads, width // heads)
            arrays[f"{attention}/{part}/bias"] = leaf(heads, width // heads)
        arrays[f"{attention}/out/kernel"] = leaf(heads, width // heads, width)
        arrays[f"{attention}/out/bias"] = leaf(width)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"], arrays[f"{block}/{norm}/bias"] = leaf(width) + 1, leaf(width)
        for dense, (inputs, outputs) in (("Dense_0", (width, hidden)), ("Dense_1", (hidden, width))):
            arrays[f"{block}/MlpBlock_3/{dense}/kernel"] = leaf(inputs, outputs)
            arrays[f"{block}/MlpBlock_3/{dense}/bias"] = leaf(outputs)
    return arrays


def convolutional() -> None:
    """Small ResNets with batch norm (basic, bottleneck) and group norm, and a small ShuffleNet V2."""
    resnet = timm.models.resnet
    small = {"layers": (1, 2, 1, 1), "channels": (4, 8, 16, 32), "num_classes": 3}
    shuffle = torchvision.models.ShuffleNetV2([1, 2, 1], [8, 8, 16, 24, 32], num_classes=3)
    models = {
        "resnet_basic": resnet.ResNet(resnet.BasicBlock, **small),
        "resnet_bottleneck": resnet.ResNet(resnet.Bottleneck, **small),
        "shufflenet": shuffle,
    }
    given = images((40, 32))
    for name, model in models.items():
        randomise(model.eval(), seed=7)
        (FIXTURES / name).mkdir(exist_ok=True)
        save_file(model.state_dict(), FIXTURES / name / "model.safetensors")
        with torch.no_grad():
            save_images(name, given, logits=model(torch_images(given["40x32"])).numpy())


def lora() -> None:
    """A `peft` LoRA on the two-layer ViT of `vit`, its factors at random: what we must read back."""
    from peft import LoraConfig, get_peft_model

    for name, options in (("vit_lora", {}), ("vit_dora", {"use_dora": True, "use_rslora": True})):
        model = ViTForImageClassification.from_pretrained(FIXTURES / "vit", attn_implementation="eager")
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], **options
        )
        tuned = get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for leaf in (leaf for leaf in tuned.parameters() if leaf.requires_grad):
                leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.3)
            given = images((12, 12))
            tuned.save_pretrained(FIXTURES / name)
            (FIXTURES / name / "README.md").unlink()
            config_file = FIXTURES / name / "adapter_config.json"  # without the path of the machine that made it
            config_file.write_text(config_file.read_text().replace(str(FIXTURES / "vit"), "vit"))
            save_images(name, given, logits=tuned(torch_images(given["12x12"])).logits.numpy())


def minilm(directory: Path) -> None:
    """Pooled outputs of the published MiniLM for our sentences, cut or padded to 32 tokens."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32, pad_id=0)
    ids = np.array([encoded.ids for encoded in tokenizer.encode_batch(list(SENTENCES))], np.int32)
    tokens = torch.tensor(ids, dtype=torch.long)
    mask = (tokens != 0).long()
    model = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(tokens, attention_mask=mask).last_hidden_state
    np.savez(
        FIXTURES / "minilm_l6.npz",
        sentences=np.array(SENTENCES),
        ids=ids,
        mean=mean(hidden, mask).numpy(),
        versions=np.array(VERSIONS),
    )


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    bert()
    roberta()
    vit()
    dinov2()
    vit_timm()
    convolutional()
    lora()
    if len(sys.argv) > 1:
        minilm(Path(sys.argv[1]))
