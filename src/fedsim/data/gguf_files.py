"""A GGUF file as the folder that Hugging Face's library would save: dequantised float32 weights, config, tokenizer, template.

For models in Llama's layout with a byte-level BPE, by the `gguf` library (extra `gguf`). What is written is the quantised
model: each number is one of the few that its block of 32 can hold, so results are not those of the published weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

MODEL, CONFIG, TOKENIZER, TEMPLATE = "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"
MADE = (MODEL, CONFIG, TOKENIZER, TEMPLATE)
CONTROL = 3  # type of a token that no text gives, such as the end of a turn
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def installed() -> bool:
    """Whether the `gguf` library is there."""
    return importlib.util.find_spec("gguf") is not None


def require_library() -> None:
    """Raises `ValueError` where `gguf` is not installed."""
    if not installed():
        raise ValueError(
            "Expected gguf to be installed, which reads the packaged decoder; run pip install 'fedsim-jax[gguf]'."
        )


def convert(file: Path, folder: Path, report: Callable[[str], None] = lambda said: None) -> None:
    """Writes the files of `MADE` into a folder.

    Raises:
        ValueError: no readable GGUF, another architecture or tokenizer than those named above, or tensors of other names.
    """
    require_library()
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"Expected {file} to be a readable GGUF file ({error}); fetch it again.") from error
    about = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(about, file, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    report(f"dequantising {len(reader.tensors)} tensors of {file.name}")
    save_file(leaves(reader, config, file), folder / MODEL, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    made, vocabulary = bpe(about, file), about["tokenizer.ggml.tokens"]
    made.save(str(folder / TOKENIZER))
    marks = {
        f"{name}_token": vocabulary[at]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (at := about.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    said = {**marks, "chat_template": about.get("tokenizer.chat_template")}
    (folder / TEMPLATE).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(about: dict[str, Any], file: Path, *, tied: bool) -> dict[str, Any]:
    """`config.json` from a GGUF's own description.

    Raises:
        ValueError: another architecture than Llama's, or scaled positions.
    """
    if about.get("general.architecture") != "llama" or about.get("llama.rope.scaling.type", "none") != "none":
        what = f"{about.get('general.architecture')!r}, scaling {about.get('llama.rope.scaling.type', 'none')!r}"
        raise ValueError(f"Expected {file} to hold a Llama without rope scaling, not {what}; take another file.")
    heads = about["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(about["tokenizer.ggml.tokens"]),
        "hidden_size": about["llama.embedding_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": about.get("llama.attention.head_count_kv", heads),
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"],
        "rope_theta": about.get("llama.rope.freq_base", 10_000.0),
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # kept there as a float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": about.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": about.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": about.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def leaves(reader: GGUFReader, config: dict[str, Any], file: Path) -> dict[str, np.ndarray]:
    """Every tensor by its Hugging Face name, float32, kernels (out, in).

    Raises:
        ValueError: a tensor of another name.
    """
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        *block, name, role = tensor.name.split(".")
        if name not in NAMES or role != "weight" or block[:-1] not in ([], ["blk"]):
            raise ValueError(
                f"Expected tensor {tensor.name!r} of {file} to be one of a Llama's; take the file of another."
            )
        leaf = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name in heads:
            leaf = halves(leaf, heads[name])
        front = f"model.layers.{block[1]}." if block else ""
        found[f"{front}{NAMES[name]}.weight"] = np.ascontiguousarray(leaf)
    return found


def halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """kernel (out, in) of queries or keys, whose rows lie in pairs that turn together, with all first ones of a head in front."""
    out, inputs = kernel.shape
    return kernel.reshape(heads, out // heads // 2, 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def bpe(about: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer of a GGUF's tokens and merges: bytes, digits one by one, nothing in front of a text or behind it.

    Raises:
        ValueError: the file's tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"Expected the tokenizer of {file} to be a byte-level BPE as SmolLM's, not {kind}; take its tokenizer.json."
        )
    tokens, types = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made
