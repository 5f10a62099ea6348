"""Published layouts of checkpoints: under which name, and in which shape, each of our leaves lies in a file.

One row of `FORMATS` per layout, written once, from our module or leaf paths to theirs; reading and writing follow from
it. The layout of a leaf follows from its role (`kernel`, `scale`, ...) unless its row says otherwise.
"""

from __future__ import annotations

from typing import Any

from fedsim.backbones.bert import BertConfig
from fedsim.backbones.decoder_formats import GPT2, LLAMA, LLAMA_BARE
from fedsim.backbones.layers import Shape
from fedsim.backbones.layouts import CONV, LINEAR, SAME, Format, Layout, Place
from fedsim.backbones.resnet import ResnetConfig
from fedsim.backbones.shufflenet import ShufflenetConfig
from fedsim.backbones.vit import VitConfig


def _patch(shape: Shape, c: VitConfig) -> Shape:
    return (shape[1], len(c.pixels.mean), c.patch, c.patch)


PATCH = Layout(_patch, (2, 3, 1, 0))  # ours: (h * w * in, out)
THREE_AXES = Layout(lambda shape, c: (1,) * (3 - len(shape)) + shape)  # tokens and positions of one example
# Flax keeps heads apart: (D, H, D / H), (H, D / H, D), (H, D / H); and patches as (h, w, in, out).
HEADS_OUT = Layout(lambda shape, c: (*shape[:-1], c.heads, shape[-1] // c.heads))
HEADS_IN = Layout(lambda shape, c: (c.heads, shape[0] // c.heads, shape[1]))
FLAX_PATCH = Layout(lambda shape, c: (c.patch, c.patch, len(c.pixels.mean), shape[1]))


def _bert(c: BertConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {
        "embeddings/token": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/type": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense",
    }
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            names[f"{ours}/attention/{part}"] = f"{theirs}.attention.self.{part}"
        names |= {
            f"{ours}/attention/output": f"{theirs}.attention.output.dense",
            f"{ours}/norm1": f"{theirs}.attention.output.LayerNorm",
            f"{ours}/mlp/up": f"{theirs}.intermediate.dense",
            f"{ours}/mlp/down": f"{theirs}.output.dense",
            f"{ours}/norm2": f"{theirs}.output.LayerNorm",
        }
    return names


def _bert_config(c: BertConfig, model_type: str = "bert") -> dict[str, Any]:
    # Most of it shows in no leaf's shape.
    return {
        "model_type": model_type,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": c.eps,
        "position_embedding_type": "absolute",
        "pad_token_id": c.pad,
        "is_decoder": False,
    }


# From TensorFlow: the oldest checkpoints.
BERT_RENAMED = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
BERT_UNUSED = {
    "classifier.*": "head of the checkpoint's own task; ours is new",
    "qa_outputs.*": "head of question answering",
    "embeddings.position_ids": "the constants 0, 1, 2, ...",
    "pooler.dense.*": "dense layer on the first token; mean and cls features do not pass it",
}


def _vit(c: VitConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {
        "embeddings/patch/kernel": Place("embeddings.patch_embeddings.projection.weight", PATCH),
        "embeddings/patch": "embeddings.patch_embeddings.projection",
        "embeddings/cls": Place("embeddings.cls_token", THREE_AXES),
        "embeddings/position": Place("embeddings.position_embeddings", THREE_AXES),
        "norm": "layernorm",
    }
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            names[f"{ours}/attention/{part}"] = f"{theirs}.attention.attention.{part}"
        names[f"{ours}/attention/output"] = f"{theirs}.attention.output.dense"
        if c.layer_scale:  # DINOv2
            names |= {f"{ours}/norm{j}": f"{theirs}.norm{j}" for j in (1, 2)}
            names |= {f"{ours}/scale{j}/gamma": Place(f"{theirs}.layer_scale{j}.lambda1", SAME) for j in (1, 2)}
            names |= {f"{ours}/mlp/up": f"{theirs}.mlp.fc1", f"{ours}/mlp/down": f"{theirs}.mlp.fc2"}
        else:
            names |= {f"{ours}/norm1": f"{theirs}.layernorm_before", f"{ours}/norm2": f"{theirs}.layernorm_after"}
            names |= {f"{ours}/mlp/up": f"{theirs}.intermediate.dense", f"{ours}/mlp/down": f"{theirs}.output.dense"}
    return names


# Modules inside transformers 5, whose files still have the old names: graphs and LoRAs come with the new ones.
DINOV2_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
VIT_RENAMED = (
    *DINOV2_RENAMED,
    ("encoder.layer.", "layers."),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),  # after attention's, which has gone by then
)


def _vit_config(c: VitConfig) -> dict[str, Any]:
    # Not layer_norm_eps: Google's models were trained with 1e-6, their converted files say 1e-12.
    shared = {"num_hidden_layers": c.depth, "num_attention_heads": c.heads, "patch_size": c.patch, "hidden_act": "gelu"}
    if c.layer_scale:
        return shared | {"model_type": "dinov2", "layer_norm_eps": c.eps, "use_swiglu_ffn": False}
    return shared | {"model_type": "vit"}


def _vit_timm(c: VitConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {
        "embeddings/patch/kernel": Place("patch_embed.proj.weight", PATCH),
        "embeddings/patch": "patch_embed.proj",
        "embeddings/cls": Place("cls_token", THREE_AXES),
        "embeddings/position": Place("pos_embed", THREE_AXES),
        "norm": "norm",
    }
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        for part, which in enumerate(("query", "key", "value")):
            names[f"{ours}/attention/{which}/kernel"] = Place(f"{theirs}.attn.qkv.weight", LINEAR, part, 3)
            names[f"{ours}/attention/{which}/bias"] = Place(f"{theirs}.attn.qkv.bias", SAME, part, 3)
        names |= {f"{ours}/norm{j}": f"{theirs}.norm{j}" for j in (1, 2)}
        names |= {f"{ours}/scale{j}": f"{theirs}.ls{j}" for j in (1, 2)}
        names |= {
            f"{ours}/attention/output": f"{theirs}.attn.proj",
            f"{ours}/mlp/up": f"{theirs}.mlp.fc1",
            f"{ours}/mlp/down": f"{theirs}.mlp.fc2",
        }
    return names


def _vit_augreg(c: VitConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {
        "embeddings/patch/kernel": Place("embedding/kernel", FLAX_PATCH),
        "embeddings/patch": "embedding",
        "embeddings/cls": Place("cls", THREE_AXES),
        "embeddings/position": Place("Transformer/posembed_input/pos_embedding", THREE_AXES),
        "norm": "Transformer/encoder_norm",
    }
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            names[f"{ours}/attention/{part}/kernel"] = Place(f"{attention}/{part}/kernel", HEADS_OUT)
            names[f"{ours}/attention/{part}/bias"] = Place(f"{attention}/{part}/bias", HEADS_OUT)
        names |= {
            f"{ours}/attention/output/kernel": Place(f"{attention}/out/kernel", HEADS_IN),
            f"{ours}/attention/output": f"{attention}/out",
            f"{ours}/norm1": f"{theirs}/LayerNorm_0",
            f"{ours}/norm2": f"{theirs}/LayerNorm_2",
            f"{ours}/mlp/up": f"{theirs}/MlpBlock_3/Dense_0",
            f"{ours}/mlp/down": f"{theirs}/MlpBlock_3/Dense_1",
        }
    return names


def _resnet(c: ResnetConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {"stem/conv": "conv1", "stem/norm": "bn1"}
    places = [(level, k) for level, depth in enumerate(c.depths) for k in range(depth)]
    for i, (level, k) in enumerate(places):
        ours, theirs = f"blocks/{i}", f"layer{level + 1}.{k}"
        for j in range(3 if c.block == "bottleneck" else 2):
            names |= {f"{ours}/convs/{j}": f"{theirs}.conv{j + 1}", f"{ours}/norms/{j}": f"{theirs}.bn{j + 1}"}
        names |= {f"{ours}/shortcut/conv": f"{theirs}.downsample.0", f"{ours}/shortcut/norm": f"{theirs}.downsample.1"}
    return names


def _shufflenet(c: ShufflenetConfig) -> dict[str, str | Place]:
    names: dict[str, str | Place] = {}

    def layer(ours: str, theirs: str, at: int) -> None:
        names[f"{ours}/conv"], names[f"{ours}/norm"] = f"{theirs}.{at}", f"{theirs}.{at + 1}"

    layer("stem", "conv1", 0)
    layer("last", "conv5", 0)
    places = [(level, k) for level, depth in enumerate(c.depths) for k in range(depth)]
    for i, (level, k) in enumerate(places):
        theirs = f"stage{level + 2}.{k}"
        for j, at in enumerate((0, 2)):
            layer(f"blocks/{i}/left/{j}", f"{theirs}.branch1", at)
        for j, at in enumerate((0, 3, 5)):  # between them stand ReLUs
            layer(f"blocks/{i}/right/{j}", f"{theirs}.branch2", at)
    return names


CONVOLUTIONAL_UNUSED = {
    "fc.*": "head of the checkpoint's own classes; ours is new",
    "*num_batches_tracked": "a counter of training",
}

FORMATS: dict[str, Format] = {
    "bert": Format(
        _bert,
        ("", "bert."),
        BERT_UNUSED | {"cls.*": "heads of the pre-training tasks"},
        _bert_config,
        renamed=BERT_RENAMED,
        task=("bert.", "classifier", "pooler"),
    ),
    "roberta": Format(
        _bert,
        ("", "roberta."),
        BERT_UNUSED | {"lm_head.*": "head of the pre-training task"},
        lambda c: _bert_config(c, "roberta"),
        renamed=BERT_RENAMED,
    ),
    "vit": Format(
        _vit,
        ("", "vit."),
        {
            "classifier.*": "head of the checkpoint's own classes; ours is new",
            "pooler.dense.*": "dense layer on the class token that no features of ours pass",
            "decoder.*": "head of masked image modelling",
            "embeddings.mask_token": "of the pre-training task",
        },
        _vit_config,
        renamed=VIT_RENAMED,
        task=("vit.", "classifier", "cls"),
    ),
    "dinov2": Format(
        _vit,
        ("", "dinov2.", "backbone."),
        {
            "embeddings.mask_token": "of the pre-training task",
            "classifier.*": "head of the checkpoint's own classes; ours is new",
            "decoder.*": "of the saliency package out of which DINOv2-S/14-derived is taken",
        },
        _vit_config,
        renamed=DINOV2_RENAMED,
    ),
    "vit_timm": Format(
        _vit_timm,
        ("",),
        {
            "head.*": "head of the checkpoint's own classes; ours is new",
            "pre_logits.*": "dense layer of the pre-training task",
            "mask_token": "of the pre-training task",
        },
    ),
    "vit_augreg": Format(
        _vit_augreg,
        ("", "opt/target/"),
        {
            "head/*": "head of the checkpoint's own classes; ours is new",
            "pre_logits/*": "dense layer of the pre-training task",
        },
        roles={},
        layouts={},
        separator="/",
    ),
    "llama": LLAMA,
    "llama_bare": LLAMA_BARE,
    "gpt2": GPT2,
    "resnet": Format(_resnet, unused=CONVOLUTIONAL_UNUSED, layouts={"kernel": CONV}),
    "shufflenet": Format(_shufflenet, unused=CONVOLUTIONAL_UNUSED, layouts={"kernel": CONV}),
}
