"""BERT equals the reference implementation, and reads its published files as they are or refuses them by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from brief import brief
from fedsim import peft
from fedsim.backbones import BACKBONES, bert_row
from fedsim.backbones.bert import BertConfig
from fedsim.backbones.load import load

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
SMALL = {"vocabulary": 60, "width": 16, "depth": 2, "heads": 4, "hidden": 24, "positions": 20}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Makes the fixtures' two-layer model a known backbone, by pool."""

    def make(pool: str, classes: int = 3) -> peft.Model:
        monkeypatch.setitem(BACKBONES, "small", bert_row(BertConfig(**SMALL, pool=pool)))
        return peft.build("small", classes, peft="head")

    return make


@pytest.mark.parametrize("directory", ["bert", "bert_classifier"])
@pytest.mark.parametrize("pool", ["mean", "cls", "pooler"])
def test_features_equal_the_reference(small, directory: str, pool: str) -> None:
    model = small(pool)
    expected = np.load(FIXTURES / directory / "expected.npz")
    frozen = load("small", str(FIXTURES / directory), peft.published(model))
    np.testing.assert_allclose(model.prefix(frozen, expected["ids"]), expected[pool], atol=1e-5, rtol=0)


def test_logits_equal_the_reference(small) -> None:
    model = small("pooler")
    expected = np.load(FIXTURES / "bert_classifier" / "expected.npz")
    file = FIXTURES / "bert_classifier" / "model.safetensors"
    frozen, raw = load("small", str(file), peft.published(model)), load_file(file)
    head = {"head/kernel": raw["classifier.weight"].T, "head/bias": raw["classifier.bias"]}
    np.testing.assert_allclose(model.apply(head, frozen, expected["ids"]), expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.assets
def test_minilm_equals_the_reference() -> None:
    """Largest difference seen: 1.9e-6 (torch 2.13.0, transformers 5.23.0), of features up to 2.6 in size."""
    assets = pytest.importorskip("fedsim.data.assets")
    try:
        directory = assets.path("minilm_l6")
    except ValueError as error:
        pytest.skip(f"MiniLM is not in the cache: {error}")
    expected = np.load(FIXTURES / "minilm_l6.npz")
    model = peft.build("minilm_l6", 20, peft="head")
    features = model.prefix(load("minilm_l6", None, peft.published(model)), expected["ids"])
    difference = float(np.max(np.abs(features - expected["mean"])))
    print(f"MiniLM-L6 in {directory}: largest difference to {expected['versions']}: {difference:.2e}")
    assert difference < 1e-5


def test_padding_changes_nothing(small) -> None:
    model = small("mean")
    trained, frozen = peft.start(model, "random", 0)
    ids = np.random.default_rng(0).integers(1, 60, (3, 7)).astype(np.int32)
    padded = np.pad(ids, ((0, 0), (0, 5)))
    np.testing.assert_allclose(model.apply(trained, frozen, padded), model.apply(trained, frozen, ids), atol=1e-5)


def moved(ids: np.ndarray, pad: int) -> np.ndarray:
    """Texts padded on the right, padded on the left."""
    return np.stack([np.roll(row, int(np.sum(row == pad))) for row in ids])


@pytest.mark.parametrize("pool", ["mean", "cls", "pooler"])
def test_roberta_counts_real_tokens_alone(monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    """Positions follow the mask: padding on the left, or between tokens, gives what padding on the right gives.

    The reference's expected features are those of texts padded on the right, whose positions are the same numbers.
    """
    config = BertConfig(**SMALL | {"positions": 22}, offset=2, types=1, eps=1e-5, pad=1, pool=pool)
    monkeypatch.setitem(BACKBONES, "small", bert_row(config, formats=("roberta",)))
    model, expected = peft.build("small", 3, peft="head"), np.load(FIXTURES / "roberta" / "expected.npz")
    frozen, ids = load("small", str(FIXTURES / "roberta"), peft.published(model)), expected["ids"]
    left, between = moved(ids, 1), np.insert(ids, [1, 1, 4], 1, axis=1)
    assert any((left != ids).any(axis=1))
    for given in (ids, left, between):
        np.testing.assert_allclose(model.prefix(frozen, given), expected[pool], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["mean", "cls", "pooler"])
def test_bert_counts_columns_and_pools_the_first_real_token(small, pool: str) -> None:
    """As the published model: positions count from the first column. What is pooled is never padding."""
    model = small(pool)
    expected = np.load(FIXTURES / "bert" / "expected.npz")
    frozen = load("small", str(FIXTURES / "bert"), peft.published(model))
    ids = expected["ids"][:, :6]
    padded = np.pad(ids, ((0, 0), (4, 0)))
    shifted = dict(frozen)  # a model whose first position is the fifth reads the texts without what stands before them
    shifted["embeddings/position/embedding"] = np.roll(frozen["embeddings/position/embedding"], -4, axis=0)
    np.testing.assert_allclose(model.prefix(frozen, padded), model.prefix(shifted, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", brief(["bert_tiny", "roberta_tiny"]))
def test_padding_on_the_left_has_gradients_as_on_the_right(name: str) -> None:
    model = peft.build(name, 3, peft="full", pool="cls")
    trained, frozen = peft.start(model, "random", 0)
    ids = np.array([[5, 6, 7, 8, 0, 0], [9, 8, 7, 6, 5, 4]], np.int32) + 1
    ids = np.where(ids == 1, 1 if name == "roberta_tiny" else 0, ids)
    trained["embeddings/position/embedding"] = np.tile(trained["embeddings/position/embedding"][:1], (130, 1))[
        : trained["embeddings/position/embedding"].shape[0]
    ]  # equal positions, so that BERT's columns do not matter

    def gradient(x: np.ndarray) -> dict[str, jax.Array]:
        return jax.grad(lambda t: jnp.sum(model.apply(t, frozen, x)[:, 0]))(trained)

    right, left = gradient(ids), gradient(moved(ids, 1 if name == "roberta_tiny" else 0))
    for path in trained.keys() - {"embeddings/position/embedding"}:
        np.testing.assert_allclose(left[path], right[path], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_row_of_padding_only_has_finite_output_and_gradient() -> None:
    model = peft.build("bert_tiny", 3, peft="full")
    trained, frozen = peft.start(model, "random", 0)
    ids = np.zeros((2, 4), np.int32)
    ids[1, :2] = 7
    gradients = jax.grad(lambda t: jnp.sum(model.apply(t, frozen, ids) ** 2))(trained)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradients.values())


def test_tiny_reads_ids_of_any_tokenizer() -> None:
    model = peft.build("bert_tiny", 3, peft="head")
    trained, frozen = peft.start(model, "random", 0)
    far = jnp.array([[101, 30521, 7, 0]], jnp.int32)
    near = jnp.array([[101, 30521 % 512, 7, 0]], jnp.int32)
    np.testing.assert_array_equal(model.apply(trained, frozen, far), model.apply(trained, frozen, near))


def test_texts_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens=513 <= 512"):
        peft.build("minilm_l6", 20, input_shape=(513,))
    model = peft.build("bert_tiny", 3, peft="head")
    trained, frozen = peft.start(model, "random", 0)
    with pytest.raises(ValueError, match="tokens=129 <= 128"):
        model.apply(trained, frozen, jnp.ones((1, 129), jnp.int32))


def copy_of_fixture(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A writable copy of the reference's file, and its leaves."""
    shutil.copytree(FIXTURES / "bert", tmp_path / "bert")
    return tmp_path / "bert" / "model.safetensors", load_file(tmp_path / "bert" / "model.safetensors")


def test_missing_left_over_and_misshapen_leaves_are_all_named(small, tmp_path: Path) -> None:
    model = small("mean")
    file, leaves = copy_of_fixture(tmp_path)
    del leaves["encoder.layer.1.attention.self.key.bias"]
    leaves["encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
    leaves["embeddings.position_embeddings.weight"] = np.zeros((19, 16), np.float32)
    save_file(leaves, file)
    with pytest.raises(ValueError) as refused:
        load("small", str(file), peft.published(model))
    message = str(refused.value)
    assert "1 missing: encoder.layer.1.attention.self.key.bias (our blocks/1/attention/key/bias)" in message
    assert "1 left over: encoder.layer.2.output.dense.bias" in message
    assert "1 misshapen: embeddings.position_embeddings.weight: (19, 16), not (20, 16)" in message


def test_pooler_is_the_only_leaf_left_behind(small) -> None:
    """Mean pooling leaves `pooler.dense.*` of the published file unused, by name; nothing else goes unread."""
    published = set(load_file(FIXTURES / "bert" / "model.safetensors"))
    mean, pooler = peft.published(small("mean")), peft.published(small("pooler"))
    assert len(published) == len(pooler) == len(mean) + 2
    assert set(pooler) - set(mean) == {"pooler/kernel", "pooler/bias"}


def test_oldest_names_of_layer_norm_are_read(small, tmp_path: Path) -> None:
    model = small("pooler")
    file, leaves = copy_of_fixture(tmp_path)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in leaves.items()
    }
    assert set(old) != set(leaves)
    expected = load("small", str(file), peft.published(model))
    save_file({f"bert.{k}": v for k, v in old.items()} | {"cls.predictions.bias": np.zeros(60, np.float32)}, file)
    got = load("small", str(file), peft.published(model))
    assert all(np.array_equal(got[path], expected[path]) for path in expected)


@pytest.mark.parametrize(
    ("option", "value"), [("num_attention_heads", 2), ("hidden_act", "relu"), ("layer_norm_eps", 1e-5)]
)
def test_another_model_is_refused_by_its_config(small, tmp_path: Path, option: str, value: object) -> None:
    model = small("mean")
    file, _ = copy_of_fixture(tmp_path)
    config = file.parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=f"{option}="):
        load("small", str(file.parent), peft.published(model))


def test_weights_that_cannot_be_read_are_refused(small, tmp_path: Path) -> None:
    shapes = peft.published(small("mean"))
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not a checkpoint")
    for weights, words in (
        (str(tmp_path / "absent"), "to be a file or a directory"),
        (str(broken), "readable safetensors file"),
    ):
        with pytest.raises(ValueError, match=words):
            load("small", weights, shapes)
    with pytest.raises(ValueError, match="none are packaged"):
        load("bert_base", None, shapes)
    with pytest.raises(ValueError, match="has no checkpoint"):
        load("mlp", "somewhere", shapes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # BERT-base as published, 109,482,240; MiniLM as published, 22,713,216, less its unused pooler, 384 * 385.
    [("bert_base", 109_482_240), ("minilm_l6", 22_713_216 - 147_840)],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    shapes = peft.published(peft.build(name, 2, peft="full"))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == parameters


def test_random_weights_depend_on_seed_and_path_only() -> None:
    wide = peft.published(peft.build("bert_tiny", 9, peft="lora+bias"))
    narrow = dict(list(peft.published(peft.build("bert_tiny", 2, peft="head")).items())[::2])
    first, second = load("bert_tiny", "random", wide), load("bert_tiny", "random", narrow)
    assert all(np.array_equal(first[path], leaf) for path, leaf in second.items())
    other = load("bert_tiny", "random", wide, seed=1)
    assert not np.array_equal(first["embeddings/token/embedding"], other["embeddings/token/embedding"])
