"""The backbones that can be trained, in one plain table; one file per architecture.

A backbone is a `flax.nnx` module with a last layer `head` and a method `stages()` (see `layers.Stage`). A new one is a
file here, its row in `BACKBONES`, and, where published weights exist, its name maps in `formats.FORMATS`. A user's own
model is a `Backbone` (see `own`), which needs none of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from flax import nnx

from fedsim.backbones.bert import Bert, BertConfig
from fedsim.backbones.cnn import Cnn, CnnConfig
from fedsim.backbones.decoder import Decoder, DecoderConfig
from fedsim.backbones.fused import Encoder, Fused, agreed, is_fused, parse
from fedsim.backbones.images import IMAGENET_PIXELS
from fedsim.backbones.layers import Shape, Stage
from fedsim.backbones.mlp import Mlp, MlpConfig
from fedsim.backbones.own import Backbone, find
from fedsim.backbones.resnet import Resnet, ResnetConfig
from fedsim.backbones.shufflenet import Shufflenet, ShufflenetConfig
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.config import one_of


class Module(Protocol):
    """What PEFT needs of a backbone, which is an `nnx.Module` too."""

    def stages(self) -> list[Stage]: ...


class Row(NamedTuple):
    """One row of the table."""

    kind: Literal["text", "image", "array"]
    architecture: Callable[..., Module]
    """(config, classes, shape of one example or None, rngs=) -> the module, all leaves at random."""
    config: Any
    """Its frozen dataclass."""
    pad: int | None = None
    """Token id of padding (text only)."""
    tokens: int | None = None
    """Longest text it reads, in tokens (text only)."""
    asset: str | None = None
    """Packaged weights, and for text the tokenizer beside them (`fedsim data list`)."""
    formats: tuple[str, ...] = ()
    """Published layouts of its checkpoints: keys of `formats.FORMATS`."""

    encoders: tuple[Encoder, ...] = ()
    """Those that it fuses, whose weights are its own."""

    def make(self, classes: int, input_shape: Shape | None, rngs: nnx.Rngs) -> Module:
        """The module with its head."""
        return self.architecture(self.config, classes, input_shape, rngs=rngs)


def bert_row(config: BertConfig, asset: str | None = None, formats: tuple[str, ...] = ("bert",)) -> Row:
    """The row of any BERT or RoBERTa."""
    return Row("text", Bert, config, pad=config.pad, tokens=config.tokens, asset=asset, formats=formats)


def decoder_row(config: DecoderConfig, formats: tuple[str, ...] = (), asset: str | None = None) -> Row:
    """The row of a decoder, a language model or a classifier as the task asks."""
    return Row("text", Decoder, config, pad=config.pad, tokens=config.tokens, asset=asset, formats=formats)


def llama_row(
    width: int,
    depth: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    vocabulary: int = 32_000,
    positions: int = 4096,
    theta: float = 10_000.0,
    tied: bool = False,
    asset: str | None = None,
) -> Row:
    """The row of a published model in Llama's layout; the defaults are Llama 2's."""
    config = DecoderConfig(
        "llama", vocabulary, width, depth, heads, kv_heads, hidden, positions, theta, pad=-1, tied=tied
    )
    return decoder_row(config, ("llama", "llama_bare"), asset)


def smollm2_row(
    width: int, depth: int, heads: int, kv_heads: int, hidden: int, theta: float = 100_000.0, asset: str | None = None
) -> Row:
    """The row of a SmolLM2 (Allal et al. 2025, arXiv 2502.02737)."""
    sizes = {"vocabulary": 49_152, "positions": 8192}
    return llama_row(width, depth, heads, kv_heads, hidden, **sizes, theta=theta, tied=True, asset=asset)


def gpt2_row(width: int, depth: int, heads: int) -> Row:
    """The row of a GPT-2."""
    config = DecoderConfig("gpt2", 50_257, width, depth, heads, heads, 4 * width, 1024, pad=-1)
    return decoder_row(config, ("gpt2",))


def vit_row(width: int, depth: int, heads: int, patch: int) -> Row:
    """The row of a ViT of the usual proportions, at 224 px."""
    config = VitConfig(width=width, depth=depth, heads=heads, hidden=4 * width, patch=patch)
    return Row("image", Vit, config, formats=("vit", "vit_timm", "vit_augreg"))


def dinov2_row(width: int, heads: int, asset: str | None = None) -> Row:
    """The row of a DINOv2 without register tokens, learned at 518 px."""
    config = VitConfig(
        width=width, heads=heads, hidden=4 * width, patch=14, image=518, layer_scale=True, pixels=IMAGENET_PIXELS
    )
    return Row("image", Vit, config, asset=asset, formats=("dinov2", "vit_timm"))


def convolutional_row(architecture: Callable[..., Module], config: ResnetConfig | ShufflenetConfig) -> Row:
    """The row of a convolutional backbone with published checkpoints."""
    return Row("image", architecture, config, formats=("resnet" if architecture is Resnet else "shufflenet",))


RESNET50 = ResnetConfig((3, 4, 6, 3), "bottleneck")
ROBERTA = BertConfig(vocabulary=50265, positions=514, offset=2, types=1, eps=1e-5, pad=1, pool="cls")
TINY = BertConfig(vocabulary=512, width=32, depth=2, heads=2, hidden=64, positions=128, pool="mean", fold=True)

BACKBONES: dict[str, Row] = {
    "vit_ti16": vit_row(192, 12, 3, 16),
    "vit_s16": vit_row(384, 12, 6, 16),
    "vit_b16": vit_row(768, 12, 12, 16),
    "vit_b32": vit_row(768, 12, 12, 32),
    "vit_l16": vit_row(1024, 24, 16, 16),
    "vit_h14": vit_row(1280, 32, 16, 14),
    "dinov2_s14": dinov2_row(384, 6),
    "dinov2_b14": dinov2_row(768, 12),
    "vit_s14": dinov2_row(384, 6, asset="vit_s14"),  # DINOv2-S/14-derived: taken out of a saliency package
    "minilm_l6": bert_row(BertConfig(width=384, depth=6, hidden=1536, pool="mean"), asset="minilm_l6"),
    "bert_base": bert_row(BertConfig()),
    "roberta_base": bert_row(ROBERTA, formats=("roberta",)),
    "resnet18": convolutional_row(Resnet, ResnetConfig()),
    "resnet18_gn": convolutional_row(Resnet, ResnetConfig(norm="group")),
    "resnet50": convolutional_row(Resnet, RESNET50),
    "resnet50_gn": convolutional_row(Resnet, dataclasses.replace(RESNET50, norm="group")),
    "shufflenet_v2_x0_5": convolutional_row(Shufflenet, ShufflenetConfig()),
    "shufflenet_v2_x0_5_gn": convolutional_row(Shufflenet, ShufflenetConfig(norm="group")),
    "smollm2_135m": smollm2_row(576, 30, 9, 3, 1536, asset="smollm2_135m"),
    "smollm2_360m": smollm2_row(960, 32, 15, 5, 2560),
    "smollm2_1_7b": smollm2_row(2048, 24, 32, 32, 8192, theta=130_000.0),
    "tinyllama_1_1b": llama_row(2048, 22, 32, 4, 5632, positions=2048),
    "llama2_7b": llama_row(4096, 32, 32, 32, 11_008),
    "llama2_13b": llama_row(5120, 40, 40, 40, 13_824),
    "llama3_8b": llama_row(4096, 32, 32, 8, 14_336, vocabulary=128_256, positions=8192, theta=500_000.0),
    "gpt2": gpt2_row(768, 12, 12),
    "gpt2_medium": gpt2_row(1024, 24, 16),
    "gpt2_large": gpt2_row(1280, 36, 20),
    "gpt2_xl": gpt2_row(1600, 48, 25),
    "cnn": Row("image", Cnn, CnnConfig()),
    "mlp": Row("array", Mlp, MlpConfig()),
    "linear": Row("array", Mlp, MlpConfig(hidden=())),  # what frozen features are compared with
    # Two blocks, for trying things out and for tests.
    "vit_tiny": Row("image", Vit, VitConfig(width=32, depth=2, heads=2, hidden=64, patch=4, image=16)),
    "bert_tiny": bert_row(TINY),
    "roberta_tiny": bert_row(dataclasses.replace(TINY, positions=130, offset=2, types=1, pad=1), formats=("roberta",)),
    "decoder_tiny": decoder_row(DecoderConfig()),
    "gpt2_tiny": decoder_row(DecoderConfig("gpt2", kv_heads=4, hidden=256, pad=-1)),
}


def backbone(
    name: str,
    *,
    pool: str | None = None,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    task: str = "classification",
) -> Row | Backbone:
    """The row of the table, with pooling of features and resizing of images changed where given; or the user's own.

    Raises:
        ValueError: an unknown name; the nearest ones are given. A change that the backbone does not know, or a task that it
            has no answer to.
    """
    if task == "language_model":
        require_decoder(name)
    if is_fused(name) or ":" not in name:
        return row(name, pool=pool, image_size=image_size, interpolation=interpolation, task=task)
    other = None if interpolation == "bilinear" else interpolation
    for option, value in (("pool", pool), ("image_size", image_size), ("interpolation", other)):
        if value is not None:
            raise ValueError(f"Expected {option}={value!r} to be unset for backbone={name!r}; its own apply does that.")
    return find(name)


def require_decoder(name: str) -> None:
    """Raises `ValueError` for a backbone that cannot be a language model, and names those that can."""
    able = [known for known, row in BACKBONES.items() if row.architecture is Decoder]
    if name not in able:
        raise ValueError(
            f"Expected backbone={name!r} to be a decoder for task='language_model', one of {', '.join(able)}; choose one."
        )


def row(
    name: str,
    *,
    pool: str | None = None,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    task: str = "classification",
) -> Row:
    """The row of the table, as `backbone`.

    Raises:
        ValueError: as `backbone`.
    """
    if is_fused(name):
        return fused_row(name, pool, image_size, interpolation)
    one_of(tuple(BACKBONES), backbone=name)
    row = BACKBONES[name]
    if task == "language_model":
        require_decoder(name)
        row = row._replace(config=dataclasses.replace(row.config, language_model=True))
    if pool is not None:
        pools = {"text": ("mean", "cls", "pooler"), "image": ("cls", "mean")}.get(row.kind, ())
        pools = pools if hasattr(row.config, "pool") else ()
        if pool not in pools:
            raise ValueError(f"Expected pool={pool!r} to be one of {pools} for backbone={name!r}; leave it out.")
        row = row._replace(config=dataclasses.replace(row.config, pool=pool))
    if image_size is None and interpolation != "bilinear":
        raise ValueError(f"Expected image_size with interpolation={interpolation!r}; give the side to resize to.")
    if image_size is not None:
        if row.kind == "text":
            raise ValueError(f"Expected image_size={image_size} to be unset for backbone={name!r}; it reads no images.")
        config = row.config
        resized = (
            dataclasses.replace(config, resize=image_size, interpolation=interpolation)
            if isinstance(config, (CnnConfig, MlpConfig))
            else dataclasses.replace(
                config, pixels=config.pixels._replace(resize=image_size, interpolation=interpolation)
            )
        )
        row = row._replace(config=resized)
    return row


def fused_row(name: str, pool: str | None, image_size: int | None, interpolation: str) -> Row:
    """The row of `"fused('vit_s14', 'vit_s14 mean', width=256)"`; images are resized for all encoders alike.

    Raises:
        ValueError: no such call, an encoder that is none, encoders that do not read the same.
    """
    if pool is not None:
        raise ValueError(
            f"Expected pool={pool!r} to be unset for backbone={name!r}, each of whose encoders has its own; give "
            f"fused('NAME {pool}', ...)."
        )
    named, width, weights = parse(name)
    encoders = tuple(
        Encoder(one, row(one, pool=pooled, image_size=image_size, interpolation=interpolation), given)
        for (one, pooled), given in zip(named, weights, strict=True)
    )
    kind, config, tokens, asset = agreed(name, encoders)
    config = dataclasses.replace(config, width=width)
    return Row(kind, Fused, config, config.pad, tokens, asset, encoders=encoders)
