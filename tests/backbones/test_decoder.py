"""The decoder is Llama's layout by NumPy's account, sees no future, and takes every PEFT kind that it can or names itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import peft
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.peft.export import merge

SMALL = DecoderConfig(vocabulary=40, width=16, heads=4, kv_heads=2, hidden=24, positions=12, theta=100.0)
GPT2 = dataclasses.replace(SMALL, layout="gpt2", kv_heads=4)
RIGHT = np.array([[1, 5, 6, 7, 2, 0, 0], [1, 9, 8, 7, 6, 5, 2]], np.int32)  # padded behind
LEFT = np.array([[0, 0, 1, 5, 6, 7, 2], [1, 9, 8, 7, 6, 5, 2]], np.int32)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No implicit promotion anywhere; the small decoders are known backbones."""
    monkeypatch.setitem(BACKBONES, "small", decoder_row(SMALL))
    monkeypatch.setitem(BACKBONES, "small_gpt2", decoder_row(GPT2))
    with jax.numpy_dtype_promotion("strict"):
        yield


def made(
    kind: str = "full", name: str = "small", **options: Any
) -> tuple[peft.Model, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model with every leaf moved from its start, so that none is one or zero."""
    model = peft.build(name, 3, peft=kind, **{"task": "language_model", "rank": 2, **options})
    rng = np.random.default_rng(0)
    parts = [
        {name: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in part.items()}
        for part in peft.start(model, "random", 0)
    ]
    return model, parts[0], parts[1]


def oracle(leaves: dict[str, np.ndarray], ids: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The scores of the next tokens, head by head and token by token, in float64."""
    w = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.eps) * scale

    def turned(x: np.ndarray, at: int) -> np.ndarray:
        half = len(x) // 2
        angle = at / c.theta ** (2 * np.arange(half) / len(x))
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag])

    depth, out = c.width // c.heads, []
    for text in ids:
        x = w["embeddings/token/embedding"][text]
        for b in range(c.depth):
            at = f"blocks/{b}"
            h = norm(x, w[f"{at}/norm1/scale"])
            q, k, v = (h @ w[f"{at}/attention/{name}/kernel"] for name in ("query", "key", "value"))
            mixed = np.zeros_like(x)
            for head in range(c.heads):
                own, shared = slice(head * depth, (head + 1) * depth), head // (c.heads // c.kv_heads)
                group = slice(shared * depth, (shared + 1) * depth)
                for t in range(len(text)):
                    seen = [s for s in range(t + 1) if text[s] != c.pad] or list(range(len(text)))
                    scores = np.array([turned(q[t, own], t) @ turned(k[s, group], s) for s in seen]) / np.sqrt(depth)
                    weights = np.exp(scores - scores.max())
                    mixed[t, own] = weights / weights.sum() @ v[seen][:, group]
            x = x + mixed @ w[f"{at}/attention/output/kernel"]
            h = norm(x, w[f"{at}/norm2/scale"])
            gate, up = (h @ w[f"{at}/mlp/{name}/kernel"] for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}/mlp/down/kernel"]
        out.append(norm(x, w["norm/scale"]) @ w["embeddings/token/embedding"].T)
    return np.array(out)


@pytest.mark.parametrize("ids", [RIGHT, LEFT], ids=["right", "left"])
def test_outputs_equal_numpy(ids: np.ndarray) -> None:
    model, trained, frozen = made()
    real = ids != 0
    np.testing.assert_allclose(
        np.asarray(model.apply(trained, frozen, ids))[real], oracle(trained, ids, SMALL)[real], atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["small", "small_gpt2"])
@pytest.mark.parametrize("kind", ["full", "prefix", "prompt"])
def test_padding_on_either_side_gives_the_same_outputs(kind: str, name: str) -> None:
    """Positions are relative, or count real tokens, and no token looks at padding."""
    model, trained, frozen = made(kind, name)
    right, left = (np.asarray(model.apply(trained, frozen, ids))[ids != 0] for ids in (RIGHT, LEFT))
    np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("name", ["small", "small_gpt2"])
@pytest.mark.parametrize("kind", ["full", "prefix", "prompt", "adapter", "lora"])
def test_future_tokens_change_no_earlier_output(kind: str, name: str) -> None:
    model, trained, frozen = made(kind, name)
    ids, other = np.array([[1, 5, 6, 7, 8, 9, 2]], np.int32), np.array([[1, 5, 6, 7, 30, 31, 32]], np.int32)
    before, after = (np.asarray(model.apply(trained, frozen, x))[0] for x in (ids, other))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).max(axis=1).min() > 1e-3, "each token sees itself"
    earlier = np.asarray(model.apply(trained, frozen, np.array([[1, 20, 6, 7, 8, 9, 2]], np.int32)))[0]
    assert np.abs(before[1:] - earlier[1:]).max(axis=1).min() > 1e-4, "and those before it"


@pytest.mark.parametrize("kind", ["lora", "norm", "last_k", "adapter"])
def test_kept_features_give_the_outputs_of_the_texts(kind: str) -> None:
    """The tied embedding is held though only stages below the first trained one and the head read it; ids go along."""
    model, trained, frozen = made(kind, targets=("blocks/1/attention/query",))
    kept = model.prefix(frozen, RIGHT)
    held = {name: leaf for name, leaf in frozen.items() if name not in model.below}
    assert ("embeddings/token/embedding" in held) and len(held) < len(frozen) + (model.cut == 1)
    np.testing.assert_array_equal(kept["ids"], RIGHT)
    np.testing.assert_allclose(
        model.suffix(trained, held, kept), model.apply(trained, frozen, RIGHT), rtol=1e-6, atol=1e-6
    )


def test_what_comes_with_the_ids_goes_along() -> None:
    model, trained, frozen = made("last_k")
    mask = (RIGHT > 5).astype(np.float32)
    kept = model.prefix(frozen, {"ids": RIGHT, "loss": mask})
    np.testing.assert_array_equal(kept["loss"], mask)
    np.testing.assert_array_equal(model.suffix(trained, frozen, kept), model.apply(trained, frozen, RIGHT))


KINDS = ["full", "norm", "lora", "ffa_lora", "adapter", "prefix", "prompt", "ia3", "last_k"]


@pytest.mark.parametrize(
    ("name", "kind"), brief([("small_gpt2", k) for k in [*KINDS, "bias"]] + [("small", k) for k in KINDS], 10)
)
def test_kinds_train_what_they_take(name: str, kind: str) -> None:
    """A gradient reaches every trained leaf; where the kind adds nothing at the start, outputs are the backbone's own."""
    model = peft.build(name, 3, peft=kind, task="language_model", rank=2)
    trained, frozen = peft.start(model, "random", 0)
    plain = peft.build(name, 3, peft="full", task="language_model")
    if kind not in ("prefix", "prompt"):
        expected = plain.apply(peft.start(plain, "random", 0)[0], {}, RIGHT)
        np.testing.assert_allclose(model.apply(trained, frozen, RIGHT), expected, rtol=1e-5, atol=1e-6)
    _, moved, frozen = made(kind, name)
    grads = jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, frozen, RIGHT))[:, :, 3]))(moved)
    # A key's bias, which softmax does not see, has a gradient that is zero but for rounding.
    assert all(np.abs(grad).max() > 0 for path, grad in grads.items() if not path.endswith("key/bias"))


def hidden(leaves: dict[str, np.ndarray], ids: np.ndarray, block: int) -> np.ndarray:
    """What enters a block of the small decoder, (T, D)."""
    plain = peft.build("small", 3, peft="full", task="language_model")
    return np.asarray(plain.run(leaves, ids, 0, 1 + block)["x"][0])


@pytest.mark.parametrize("depth", ["shallow", "deep"])
@pytest.mark.parametrize("ids", [RIGHT[:1], LEFT[:1]], ids=["right", "left"])
def test_a_prompt_stands_before_the_text(depth: str, ids: np.ndarray) -> None:
    """Prompts that are what two tokens become in each block do what these do in front of the text, wherever the padding is."""
    model, trained, frozen = made("prompt", prompt_tokens=2, prompt_depth=depth)
    first = np.array([[30, 31]], np.int32)
    leaves = {path: leaf for path, leaf in frozen.items() if path not in model.fresh}
    trained = {f"blocks/{b}/prompt": hidden(leaves, first, b) for b in range(1 if depth == "shallow" else 2)}
    assert trained.keys() == model.trained.keys()
    whole = np.concatenate([first, ids[ids != 0][None]], axis=1)
    expected = np.asarray(peft.build("small", 3, peft="full", task="language_model").apply(leaves, {}, whole))
    found = np.asarray(model.apply(trained, frozen, ids))
    assert found.shape == (1, 7, SMALL.vocabulary), "no output is the prompt's"
    np.testing.assert_allclose(found[ids != 0], expected[0, 2:], atol=2e-5)


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_a_classifier_reads_the_text_behind_its_prompt(depth: str) -> None:
    model, trained, frozen = made("prompt", prompt_depth=depth, task="classification")
    logits = np.asarray(model.apply(trained, frozen, RIGHT))
    np.testing.assert_allclose(model.apply(trained, frozen, LEFT), logits, atol=2e-5)
    np.testing.assert_allclose(model.apply(trained, frozen, RIGHT[:1, :5]), logits[:1], atol=2e-5)
    other = {p: leaf + 1 if p.endswith("prompt") else leaf for p, leaf in trained.items()}
    assert np.abs(np.asarray(model.apply(other, frozen, RIGHT)) - logits).max() > 1e-3, "and the prompt through it"


COUNTS = {
    "norm": 61 * 576,
    "lora": 30 * 8 * ((576 + 576) + (576 + 192)),  # query and value
    "ffa_lora": 30 * 8 * (576 + 192),
    "adapter": 30 * (2 * 576 * 8 + 8 + 576),
    "prefix": 30 * 2 * 10 * 192,
    "prompt": 30 * 10 * 576,
    "ia3": 30 * (2 * 192 + 1536),
    "last_k": 576 + 2 * 576 + 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_counts_of_smollm2_follow_from_its_shape(kind: str) -> None:
    model = peft.build("smollm2_135m", 2, peft=kind, task="language_model")
    assert sum(math.prod(leaf.shape) for leaf in model.trained.values()) == COUNTS[kind]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_merged_decoder_gives_the_same_outputs(kind: str) -> None:
    model, trained, frozen = made(kind, targets=("*",)) if kind == "lora" else made(kind)
    plain = peft.build("small", 3, peft="full", task="language_model")
    merged = merge(model, trained, frozen)
    np.testing.assert_allclose(
        plain.apply(merged, {}, RIGHT), model.apply(trained, frozen, RIGHT), rtol=1e-4, atol=1e-5
    )


def test_a_classifier_reads_the_last_real_token() -> None:
    model, trained, frozen = made("head", task="classification")
    logits = np.asarray(model.apply(trained, frozen, RIGHT))
    alone = np.asarray(model.apply(trained, frozen, RIGHT[:1, :5]))
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(logits[:1], alone, atol=1e-5)
    np.testing.assert_allclose(model.apply(trained, frozen, LEFT), logits, atol=1e-5)


def test_blocks_are_numbered_and_outputs_are_the_vocabulary() -> None:
    model = peft.build("small", 3, peft="full", task="language_model")
    assert model.classes == SMALL.vocabulary
    assert {model.blocks[p] for p in model.trained if p.startswith("blocks/1/")} == {1}
    assert model.blocks["embeddings/token/embedding"] == 0 and model.blocks["norm/scale"] == 1


def test_only_decoders_are_language_models() -> None:
    for name in ("bert_tiny", "mlp", "my.py:model"):
        with pytest.raises(
            ValueError, match=rf"backbone='{name}' to be a decoder .* one of smollm2_135m, .*decoder_tiny"
        ):
            peft.build(name, 3, peft="full", task="language_model", input_shape=(6,))


def test_texts_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens=13 <= 12"):
        peft.build("small", 3, peft="full", input_shape=(13,))
    assert dataclasses.replace(SMALL, positions=13).tokens == 13
