"""The decoder is Llama's layout by NumPy's account, sees no future, and takes every PEFT kind that it can or names itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsim import peft
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.peft.export import merge

FIXTURE = Path(__file__).parents[1] / "fixtures" / "backbones" / "llama"
SMALL = DecoderConfig(vocabulary=40, width=16, depth=2, heads=4, kv_heads=2, hidden=24, positions=12, theta=100.0)
RIGHT = np.array([[1, 5, 6, 7, 2, 0, 0], [1, 9, 8, 7, 6, 5, 2]], np.int32)  # padded behind
LEFT = np.array([[0, 0, 1, 5, 6, 7, 2], [1, 9, 8, 7, 6, 5, 2]], np.int32)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No implicit promotion anywhere; the small decoder is a known backbone."""
    monkeypatch.setitem(BACKBONES, "small", decoder_row(SMALL))
    with jax.numpy_dtype_promotion("strict"):
        yield


def made(kind: str = "full", **options: Any) -> tuple[peft.Model, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model with every leaf moved from its start, so that none is one or zero."""
    model = peft.build("small", 3, peft=kind, **{"task": "language_model", "rank": 2, **options})
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


THEIRS = {
    "embeddings/token/embedding": "embed_tokens.weight",
    "norm/scale": "norm.weight",
    "norm1/scale": "input_layernorm.weight",
    "norm2/scale": "post_attention_layernorm.weight",
    **{f"attention/{ours}/kernel": f"self_attn.{ours[0]}_proj.weight" for ours in ("query", "key", "value", "output")},
    **{f"mlp/{ours}/kernel": f"mlp.{ours}_proj.weight" for ours in ("gate", "up", "down")},
}


def test_outputs_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' LlamaForCausalLM, leaf by leaf (tests/reference/make_fixtures.py)."""
    monkeypatch.setitem(BACKBONES, "small", decoder_row(dataclasses.replace(SMALL, positions=20)))
    model = peft.build("small", 3, peft="full", task="language_model")
    stored, expected = load_file(FIXTURE / "model.safetensors"), np.load(FIXTURE / "expected.npz")
    leaves = {}
    for path, shape in model.trained.items():
        block, leaf = path.split("/")[1], "/".join(path.split("/")[2:])
        name = f"layers.{block}.{THEIRS[leaf]}" if path.startswith("blocks/") else THEIRS[path]
        value = stored.pop(f"model.{name}")
        leaves[path] = value.T if path.endswith("kernel") else value
        assert leaves[path].shape == shape.shape, path
    assert not stored, "every leaf of the reference has its place"
    real = expected["ids"] != 0
    found = np.asarray(model.apply(leaves, {}, expected["ids"]))
    np.testing.assert_allclose(found[real], expected["logits"][real], atol=2e-5, rtol=0)


def test_padding_on_either_side_gives_the_same_outputs() -> None:
    """Positions are relative, and no token looks at padding."""
    model, trained, frozen = made()
    right, left = (np.asarray(model.apply(trained, frozen, ids))[ids != 0] for ids in (RIGHT, LEFT))
    np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("kind", ["full", "prefix", "adapter", "lora"])
def test_future_tokens_change_no_earlier_output(kind: str) -> None:
    model, trained, frozen = made(kind)
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


@pytest.mark.parametrize("kind", ["full", "norm", "lora", "ffa_lora", "adapter", "prefix", "ia3", "last_k"])
def test_kinds_train_what_they_take(kind: str) -> None:
    """A gradient reaches every trained leaf; where the kind adds nothing at the start, outputs are the backbone's own."""
    model = peft.build("small", 3, peft=kind, task="language_model", rank=2)
    trained, frozen = peft.start(model, "random", 0)
    plain = peft.build("small", 3, peft="full", task="language_model")
    if kind != "prefix":
        expected = plain.apply(peft.start(plain, "random", 0)[0], {}, RIGHT)
        np.testing.assert_allclose(model.apply(trained, frozen, RIGHT), expected, rtol=1e-5, atol=1e-6)
    _, moved, frozen = made(kind)
    grads = jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, frozen, RIGHT))[:, :, 3]))(moved)
    assert all(np.abs(grad).max() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("head", "language_model", "peft='head' of backbone='small' to have a head to train"),
        ("bias", "language_model", "peft='bias' to take leaves of backbone='small'"),
        ("bias", "classification", "peft='bias' to take leaves of backbone='small'"),
        ("prompt", "language_model", "peft='prompt' to meet tokens that look at those behind them"),
        ("prompt", "classification", "peft='prompt' to meet tokens that look at those behind them"),
    ],
)
def test_kinds_that_cannot_are_refused_by_name(kind: str, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.build("small", 3, peft=kind, task=task)


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
        with pytest.raises(ValueError, match=rf"backbone='{name}' to be a decoder .* one of decoder_tiny"):
            peft.build(name, 3, peft="full", task="language_model", input_shape=(6,))


def test_texts_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens=13 <= 12"):
        peft.build("small", 3, peft="full", input_shape=(13,))
    assert dataclasses.replace(SMALL, positions=13).tokens == 13
