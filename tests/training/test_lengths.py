"""Length buckets change no result: features, scores and training equal those of the padded texts."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim import peft
from fedsim.backbones import row
from fedsim.config import Config, Speed
from fedsim.simulation import build, trainers
from fedsim.training import features, lengths

pytestmark = pytest.mark.usefixtures("compile_once")


def texts(rows: int = 200, tokens: int = 40, longest: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (N, T), mostly short, and their lengths."""
    rng = np.random.default_rng(seed)
    of = np.minimum(1 + rng.geometric(0.12, rows), longest)
    of[:3] = longest
    return np.where(np.arange(tokens) < of[:, None], rng.integers(1, 500, (rows, tokens)), 0).astype(np.int32), of


def test_lengths_and_buckets() -> None:
    ids, of = texts()
    found = lengths.measure(ids, 0, 4)
    np.testing.assert_array_equal(found.of, of)
    assert found.buckets == (8, 16, 24, 32) and lengths.measure(ids, 0, 1).buckets == (32,)
    assert lengths.measure(ids[:, :13], 0, 2).buckets == (8, 13), "never beyond the texts' width"
    inside = np.array([[5, 0, 7, 0], [0, 0, 0, 4], [0, 0, 0, 0]])
    assert lengths.measure(inside, 0, 4).of.tolist() == [3, 4, 4], "padding alone keeps its length"


def test_batches_hold_every_row_once_and_every_text_whole() -> None:
    ids, of = texts()
    rows = np.random.default_rng(1).permutation(200)[:150]
    found = lengths.batches(rows, 16, lengths.measure(ids, 0, 4))
    assert sorted(np.concatenate([part for part, _ in found])) == sorted(rows)
    assert all(length is not None and of[part].max() <= length < of[part].max() + 8 for part, length in found)
    assert len({length for _, length in found}) > 2


def test_texts_of_one_length_run_in_one_program_and_in_order() -> None:
    ids = np.full((50, 32), 7, np.int32)
    ids[:2, 8:] = 0  # too few short ones to pay for a program of their own
    found = lengths.batches(np.arange(50), 16, lengths.measure(ids, 0, 4))
    assert {length for _, length in found} == {32}
    assert np.concatenate([part for part, _ in found]).tolist() == list(range(50))
    assert [length for _, length in lengths.batches(np.arange(50), 16, None)] == [None] * 4


@pytest.mark.parametrize(("name", "pool", "cuts"), [("bert_tiny", "mean", (2,)), ("roberta_tiny", "cls", ())])
def test_features_equal_those_of_padded_texts(name: str, pool: str, cuts: tuple[int, ...]) -> None:
    """Inside of the encoder what lies beyond a text may differ, what is made of it may not."""
    ids, _ = texts()
    pad = row(name).pad
    assert pad is not None
    ids = np.where(ids == 0, pad, ids).astype(np.int32)
    ids[:, 0] = 5
    model = peft.build(name, 3, peft="head", pool=pool)
    trained, frozen = peft.start(model, "random", 0)
    found = lengths.measure(ids, pad, 2)
    expected = np.asarray(jax.jit(model.prefix)(frozen, ids))
    assert len({length for _, length in lengths.batches(np.arange(200), features.FEATURE_BATCH, found)}) > 1
    for cut in (*cuts, model.cut):
        h = features.run_stages(model, frozen, ids, 0, cut, found, jax.local_devices()[:3])
        assert cut == model.cut or h["x"].shape[:2] == (200, 32), "no longer than the longest text"
        rest = features.run_stages(model, frozen, h, cut, model.cut, found) if cut < model.cut else h
        np.testing.assert_allclose(rest, expected, atol=1e-5)
    assert trained


def test_kept_ids_are_padding_where_a_text_has_ended() -> None:
    """A decoder's ids go along, beside what a loss is about; where no token is padding, zero would be one."""
    model = peft.build("gpt2_tiny", 3, peft="last_k", task="language_model")
    _, frozen = peft.start(model, "random", 0)
    ids, of = texts(100)
    ids = np.where(np.arange(ids.shape[1]) < of[:, None], ids, -1).astype(np.int32)
    x = {"ids": ids, "loss": (ids >= 0).astype(np.float32)}
    found = lengths.measure(x, -1, 4)
    assert len({length for _, length in lengths.batches(np.arange(100), 64, found)}) > 1, "in several lengths"
    kept = features.run_stages(model, frozen, x, 0, model.cut, found)
    for name, leaf in x.items():
        np.testing.assert_array_equal(kept[name], leaf[:, : found.longest])
    whole = np.asarray(jax.jit(model.prefix)(frozen, x)["x"])[:, : found.longest]
    real = ids[:, : found.longest] >= 0
    np.testing.assert_allclose(kept["x"][real], whole[real], atol=1e-5)


def test_only_axes_of_tokens_are_cut() -> None:
    """Features (B, 32) have as many columns as the texts have tokens."""
    ids, _ = texts(tokens=32)
    model = peft.build("bert_tiny", 3, peft="head")
    _, frozen = peft.start(model, "random", 0)
    inside = lengths.entering(lengths.measure(ids, 0, 4), model, 2)
    pooled = lengths.entering(lengths.measure(ids, 0, 4), model, model.cut)
    assert inside is not None and pooled is not None
    h = model.run(frozen, ids[:2], 0, 2)
    assert jax.tree.map(np.shape, inside.cut(h, 8)) == {"x": (2, 8, 32), "mask": (2, 8)}
    assert pooled.cut(model.prefix(frozen, ids[:2]), 8).shape == (2, 32)


def test_cutting_a_batch_traces_the_model_once_for_each_length() -> None:
    """The features of a data set are cut batch by batch, and a trace takes as long as a batch."""
    ids, _ = texts()
    model, traced = peft.build("bert_tiny", 3, peft="head"), []
    counting = model._replace(run=lambda *args: traced.append(args[-1]) or model.run(*args))
    inside = lengths.entering(lengths.measure(ids, 0, 4), counting, 2)
    assert inside is not None
    h = model.run(peft.start(model, "random", 0)[1], ids[:2], 0, 2)
    for length in (8, 16, 8, 8, 16):
        inside.cut(h, length)
    assert traced == [2, 2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Ids of short texts in a wide array; LoRA in the upper block of a tiny BERT."""
    file = tmp_path_factory.mktemp("texts") / "ids.npz"
    ids, _ = texts(240)
    np.savez(file, x=ids, y=np.arange(240) % 3)
    return Config(
        dataset=str(file), backbone="bert_tiny", weights="random", peft="lora", targets=("blocks/1/*/query",), rank=2,
        clients=6, clients_per_round=3, rounds=1, steps=2, optimizer="sgd", lr=0.1, min_size=3,
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["on", "off"])
def test_scores_equal_those_of_padded_texts(config: Config, cache: Literal["on", "off"]) -> None:
    scores = {}
    for count in (4, 1):
        speed = Speed(length_buckets=count, cache=cache, devices=1, eval_batch=16)
        trainer = trainers.trainer(build.problem(config, speed), build.phases(config)[0])
        assert jax.tree.leaves(trainer.engine.x)[0].shape[1] == (32 if count > 1 else 40)
        scores[count] = trainer.test(trainer.algorithm.init(jax.random.key(0), trainer.engine.held))
    assert scores[4]["accuracy"] == scores[1]["accuracy"]
    np.testing.assert_allclose(scores[4]["loss"], scores[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_gradients_equal_those_of_padded_texts(depth: str) -> None:
    """Training runs on texts cut to the longest; prompts and prefixes come behind the text, wherever it ends."""
    ids, _ = texts(6)
    model = peft.build("bert_tiny", 3, peft="prompt+prefix", prompt_tokens=2, prefix_tokens=2, prompt_depth=depth)
    trained, frozen = peft.start(model, "random", 0)
    grad = jax.jit(jax.grad(lambda t, x: jnp.sum(model.apply(t, frozen, x) ** 2)))
    cut, whole = grad(trained, ids[:, :32]), grad(trained, ids)
    for name, value in cut.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)
