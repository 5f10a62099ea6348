"""Published decoders: the names of their leaves, and what their `config.json` may say that ours do not compute.

What such a file leaves out has its library's default, which may be another than the backbone's value, so defaults are
filled in before the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.backbones.decoder import DecoderConfig
from fedsim.backbones.layouts import SAME, Format, Place


def _llama(c: DecoderConfig, front: str = "model.") -> dict[str, str | Place]:
    names: dict[str, str | Place] = {
        "embeddings/token": f"{front}embed_tokens",
        "norm": f"{front}norm",
        "lm_head": "lm_head",
    }
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"{front}layers.{i}"
        for part in ("query", "key", "value", "output"):
            names[f"{ours}/attention/{part}"] = f"{theirs}.self_attn.{part[0]}_proj"
        names |= {f"{ours}/mlp/{part}": f"{theirs}.mlp.{part}_proj" for part in ("gate", "up", "down")}
        names |= {f"{ours}/norm1": f"{theirs}.input_layernorm", f"{ours}/norm2": f"{theirs}.post_attention_layernorm"}
    return names


def _gpt2(c: DecoderConfig) -> dict[str, str | Place]:
    # Its kernels lie as ours do, (in, out), and those of query, key and value side by side.
    names: dict[str, str | Place] = {"embeddings/token": "wte", "embeddings/place": "wpe", "norm": "ln_f"}
    for i in range(c.depth):
        ours, theirs = f"blocks/{i}", f"h.{i}"
        for part, which in enumerate(("query", "key", "value")):
            names[f"{ours}/attention/{which}/kernel"] = Place(f"{theirs}.attn.c_attn.weight", SAME, part, 3, 1)
            names[f"{ours}/attention/{which}/bias"] = Place(f"{theirs}.attn.c_attn.bias", SAME, part, 3)
        names |= {f"{ours}/norm{j}": f"{theirs}.ln_{j}" for j in (1, 2)}
        names |= {
            f"{ours}/attention/output": f"{theirs}.attn.c_proj",
            f"{ours}/mlp/up": f"{theirs}.mlp.c_fc",
            f"{ours}/mlp/down": f"{theirs}.mlp.c_proj",
        }
    return names


DECODER_UNUSED = {
    "lm_head.weight": "head of the language model: a copy of the token embedding, or nothing that a classifier reads",
    "score.weight": "head of the checkpoint's own classes; ours is new",
}


def llama(c: DecoderConfig) -> dict[str, Any]:
    """What `llama_said` must give for this backbone; most of it shows in no leaf's shape."""
    return {
        "model_type": "llama",
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.eps,
        "rope_theta": c.theta,
        "tie_word_embeddings": c.tied,
    }


LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
# Key -> the values that change nothing; every other one changes what a token sees, or how it is counted.
LLAMA_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}


def llama_said(said: dict[str, Any], file: str, c: DecoderConfig) -> dict[str, Any]:
    """A Llama's `config.json` with its library's defaults, and one `rope_theta` wherever the file has it.

    Args:
        file: its name, for refusals.

    Raises:
        ValueError: it says something that our decoder does not compute, or has a shorter context.
    """
    full = filled(said, LLAMA_DEFAULTS)
    refuse_others(full, LLAMA_COMPUTED, file)
    rope = said.get("rope_parameters")  # transformers 5; before, both stood in the file itself
    rope = rope if isinstance(rope, Mapping) else {"rope_theta": said.get("rope_theta")}
    scaling = said.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else scaling
    if kind not in (None, "default"):
        raise ValueError(
            f"Expected rope scaling {kind!r} of {file} to be absent or 'default'; positions are turned by rope_theta alone here, "
            "and others would be misread: take a checkpoint without it, of an earlier version of the model."
        )
    theta = rope.get("rope_theta")
    if theta is not None or "model_type" in said:
        full["rope_theta"] = 10_000.0 if theta is None else theta
    if "num_attention_heads" in full:
        full.setdefault("num_key_value_heads", full["num_attention_heads"])
    _refuse_head_dim(full, file)
    context = full.get("max_position_embeddings", c.positions)
    if isinstance(context, int) and context < c.positions:
        raise ValueError(
            f"Expected max_position_embeddings={context} of {file} >= {c.positions}, the context of the backbone; longer texts "
            "than it was trained on would be read: take a checkpoint of the whole context."
        )
    return full


def filled(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, and where it is one of a model, the defaults of what it leaves out or has as null."""
    known = {name: value for name, value in said.items() if value is not None}
    return {**(defaults if "model_type" in said else {}), **known}


def _refuse_head_dim(said: Mapping[str, Any], file: str) -> None:
    """Raises `ValueError` for heads that are not the width divided by their number."""
    width, heads, depth = (said.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if isinstance(width, int) and isinstance(heads, int) and heads and depth not in (None, width / heads):
        raise ValueError(
            f"Expected head_dim={depth} of {file} to be {width} / {heads}, hidden_size / num_attention_heads; heads of another "
            "size are not computed: take another checkpoint."
        )


def gpt2(c: DecoderConfig) -> dict[str, Any]:
    """What `gpt2_said` must give for this backbone."""
    return {
        "model_type": "gpt2",
        "n_layer": c.depth,
        "n_head": c.heads,
        "layer_norm_epsilon": c.eps,
    }


GPT2_DEFAULTS: dict[str, Any] = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
GPT2_COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "tie_word_embeddings": (None, True),
    "quantization_config": (None,),
}


def gpt2_said(said: dict[str, Any], file: str, c: DecoderConfig) -> dict[str, Any]:
    """As `llama_said`, of a GPT-2's file.

    Raises:
        ValueError: it says something that our decoder does not compute.
    """
    full = filled(said, GPT2_DEFAULTS)
    refuse_others(full, GPT2_COMPUTED, file)
    return full


def refuse_others(said: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]], file: str) -> None:
    """Raises `ValueError` for values of a file that our decoder does not compute."""
    for name, values in computed.items():
        if said.get(name) not in values:
            shown = " or ".join(repr(value) for value in values if value is not None) or "absent"
            raise ValueError(
                f"Expected {name}={said[name]!r} of {file} to be {shown}; nothing else is computed here, and the model would be "
                "misread: take a checkpoint of the plain layout."
            )


LLAMA = Format(
    _llama,
    unused=DECODER_UNUSED | {"*rotary_emb.inv_freq": "angles, which follow from theta"},
    config=llama,
    said=llama_said,
    tied=lambda c: {"lm_head.weight": "embeddings/token/embedding"} if c.tied else {},
)
LLAMA_BARE = LLAMA._replace(places=lambda c: _llama(c, ""))  # of transformers' LlamaModel
GPT2 = Format(
    _gpt2,
    ("", "transformer."),
    DECODER_UNUSED | {"h.*.attn.bias": "the causal mask", "h.*.attn.masked_bias": "a constant of the causal mask"},
    gpt2,
    gpt2_said,
    tied=lambda c: {"lm_head.weight": "embeddings/token/embedding"},
    layouts={},
    causal="transformer.",
)
