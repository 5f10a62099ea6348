"""A language model goes on with texts: the same tokens as without kept keys and values, by the odds that are asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import fedsim
from brief import brief
from fedsim import peft
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.config import Config, Speed
from fedsim.data import chat
from fedsim.simulation.choose import likelihoods
from fedsim.simulation.generate import continued, drawn

LLAMA = DecoderConfig(vocabulary=40, width=16, heads=4, kv_heads=2, hidden=24, positions=48, theta=100.0, pad=-1)
ROWS = {
    "llama": LLAMA,
    "untied": dataclasses.replace(LLAMA, tied=False),
    "gpt2": dataclasses.replace(LLAMA, layout="gpt2", kv_heads=4),
}
TEXTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7], [11]]


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, config in ROWS.items():
        monkeypatch.setitem(BACKBONES, name, decoder_row(config))
    with jax.numpy_dtype_promotion("strict"):
        yield


def made(name: str, kind: str, **options: Any) -> tuple[peft.Model, dict[str, np.ndarray]]:
    """A model and its leaves, all moved from their start far enough for sharp odds."""
    model = peft.build(name, 2, peft=kind, task="language_model", rank=2, prompt_tokens=3, prefix_tokens=2, **options)
    rng = np.random.default_rng(0)
    leaves = {p: v for part in peft.start(model, "random", 0) for p, v in part.items()}
    return model, {p: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) for p, v in leaves.items()}


def anew(model: peft.Model, leaves: dict, said: list[list[int]]) -> np.ndarray:
    """Scores of each next token (N, tokens, V) by one pass over texts and what was said, without anything kept."""
    whole = [[*text, *more] for text, more in zip(TEXTS, said, strict=True)]
    ids = np.full((len(whole), max(map(len, whole))), -1, np.int32)
    for row, each in enumerate(whole):
        ids[row, : len(each)] = each
    logits = np.asarray(jax.jit(lambda leaves, ids: model.run(leaves, ids, 0, model.stages))(leaves, ids))
    return np.stack([logits[row, len(t) - 1 : len(t) - 1 + len(said[row])] for row, t in enumerate(TEXTS)])


def drawn_from(logits: np.ndarray, seed: int, temperature: float, top_p: float) -> list[list[int]]:
    """Tokens by the keys of texts and steps."""
    keys = [jax.random.fold_in(jax.random.key(seed), row) for row in range(len(logits))]
    draw = jax.jit(drawn)
    return [
        [int(draw(jax.random.fold_in(keys[row], step), each, temperature, top_p)) for step, each in enumerate(of)]
        for row, of in enumerate(logits)
    ]


CASES = [(name, "full", {}) for name in ROWS] + [
    (name, kind, options)
    for name in ("llama", "gpt2")
    for kind, options in (("lora", {}), ("prefix", {}), ("prompt", {}), ("prompt", {"prompt_depth": "shallow"}))
]


@pytest.mark.parametrize(
    ("name", "kind", "options"), brief(CASES, 4), ids=[f"{n}-{k}{'-s' * bool(o)}" for n, k, o in CASES]
)
def test_kept_keys_and_values_change_no_token(name: str, kind: str, options: dict[str, Any]) -> None:
    """Texts of several lengths side by side, each as if it were alone and computed anew."""
    model, leaves = made(name, kind, **options)
    said = continued(model, leaves, TEXTS, 6, temperature=2.0, top_p=0.9, seed=3)
    assert said == drawn_from(anew(model, leaves, said), 3, np.float32(2.0), np.float32(0.9))
    assert len({token for row in said for token in row}) > 8, "no model that says one thing"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_temperature_the_likeliest_is_said(name: str) -> None:
    model, leaves = made(name, "full")
    said = continued(model, leaves, TEXTS, 6)
    assert said == anew(model, leaves, said).argmax(-1).tolist()
    assert said == continued(model, leaves, TEXTS, 6, temperature=1e-4), "drawn from odds as sharp as can be"


def test_a_seed_says_the_same_again_and_another_does_not() -> None:
    model, leaves = made("llama", "full")
    odds = {"temperature": 2.0, "top_p": 0.9}
    said = continued(model, leaves, TEXTS, 6, seed=3, **odds)
    assert (
        said == continued(model, leaves, TEXTS, 6, seed=3, **odds) != continued(model, leaves, TEXTS, 6, seed=4, **odds)
    )
    assert said[:1] == continued(model, leaves, TEXTS[:1], 6, seed=3, **odds), "whatever stands beside it"


def test_the_nucleus_is_the_fewest_likeliest() -> None:
    """Of odds 0.5, 0.3, 0.15, 0.05 the first two make 0.7; drawn by their own odds."""
    logits = np.log(np.array([0.05, 0.3, 0.5, 0.15], np.float32))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(drawn, (0, None, None, None)))
    count = np.bincount(np.asarray(draw(keys, logits, np.float32(1), np.float32(0.7))), minlength=4) / 4000
    np.testing.assert_allclose(count, [0, 0.375, 0.625, 0], atol=0.03)
    whole = np.bincount(np.asarray(draw(keys, logits, np.float32(1), np.float32(1))), minlength=4) / 4000
    np.testing.assert_allclose(whole, [0.05, 0.3, 0.5, 0.15], atol=0.03)
    flat = np.bincount(np.asarray(draw(keys, logits, np.float32(2), np.float32(1))), minlength=4) / 4000
    odds = np.sqrt([0.05, 0.3, 0.5, 0.15])
    np.testing.assert_allclose(flat, odds / odds.sum(), atol=0.03)
    one = np.asarray(draw(keys[:50], logits, np.float32(1), np.float32(1e-6)))
    assert set(one.tolist()) == {2}, "the likeliest is always in"


def test_a_mark_of_the_end_ends_a_text_and_not_the_others() -> None:
    model, leaves = made("llama", "full")
    free = continued(model, leaves, TEXTS, 8)
    stop = free[0][2]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert continued(model, leaves, TEXTS, 8, stops=(stop,)) == cut
    assert len(cut[0]) <= 2 and any(len(row) == 8 for row in cut)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedsim.Run:
    """A small model that has learned pairs by heart."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"the {word} says", "completion": f" {said}"} for word, said in (("cat", "meow"), ("dog", "bark"))
    ] * 40
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        task="language_model", backbone="decoder_tiny", dataset=str(folder / "pairs.jsonl"), turns="plain", tokens=16, peft="full",
        lr=0.01, clients=2, clients_per_round=2, rounds=6, steps=12, batch_size=8, partition="iid", min_size=4,
    )  # fmt: skip
    return fedsim.run(config, Speed(devices=1, lanes=2), out=folder / "run", quiet=True)


@pytest.mark.slow
def test_a_run_goes_on_with_texts(run: fedsim.Run) -> None:
    """It ends where its examples ended, one text or several."""
    assert run.generate("the cat says", tokens=12).strip() == "meow"
    assert [said.strip() for said in run.generate(["the dog says", "the cat says"])] == ["bark", "meow"]
    assert run.generate([]) == []
    first = run.generate("the", tokens=4, temperature=5.0, seed=1)
    assert (
        first
        == run.generate("the", tokens=4, temperature=5.0, seed=1)
        != run.generate("the", tokens=4, temperature=5.0)
    )


@pytest.mark.slow
def test_the_likeliest_answer_is_chosen(run: fedsim.Run) -> None:
    """By the sum of its tokens' log-likelihoods, or their mean: those of the outputs at the tokens before."""
    assert run.choose("the cat says", [" bark", " meow"]) == " meow"
    assert run.choose("the dog says", [" bark", " meow"], by="mean") == " bark"
    found = likelihoods(run, "the cat says", [" meow", " meow meow"], chat=False)
    assert [each.tokens for each in found] == [1, 2] and found[1].sum < found[0].sum <= 0
    assert found[1].mean == found[1].sum / 2
    model = peft.build("decoder_tiny", 2, peft="full", task="language_model")
    tokenizer = Tokenizer.from_file(str(next(run.directory.glob("tokenizer-*.json"))))
    ids = np.array([tokenizer.encode("the cat says meow meow").ids], np.int32)
    odds = np.asarray(jax.nn.log_softmax(model.apply(run.parameters, {}, ids)))[0]
    expected = odds[-4, ids[0, -3]] + odds[-3, ids[0, -2]]  # the last token is the mark of the end
    assert found[1].sum == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="Expected at least two answers"):
        run.choose("the cat says", [" meow"])
    with pytest.raises(ValueError, match=r"tokens, to fit into the model's context of 512"):
        run.choose("the cat says " * 300, [" meow", " bark"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 >= 0"),
        ({"top_p": 0.0}, "0 < top_p=0.0 <= 1"),
        ({"tokens": 0}, "tokens=0 > 0"),
        ({"tokens": 510}, "tokens=510 and the longest text of .* to fit into the model's context of 512"),
        ({"chat": True}, "backbone='decoder_tiny' to have a chat template"),
    ],
)
def test_what_cannot_be_generated_is_refused(run: fedsim.Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.generate("the cat says", **options)


def test_what_a_user_asks_is_written_by_the_template() -> None:
    said = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template = said + "{% if add_generation_prompt %}[assistant] {% endif %}"
    assert chat.asking(chat.Marks(template), "it")("who?") == "[user] who?\n[assistant] "


@pytest.mark.assets
@pytest.mark.slow
def test_the_packaged_decoder_answers() -> None:
    """The tokens that transformers' own generate gives."""
    from fedsim.data import assets

    try:
        assets.path("smollm2_135m")
    except ValueError as error:
        pytest.skip(f"SmolLM2 is not in the cache: {error}")
    expected = np.load(Path(__file__).parents[1] / "fixtures" / "backbones" / "smollm2_135m.npz")
    model = peft.build("smollm2_135m", 2, peft="lora", task="language_model")
    leaves = {path: leaf for part in peft.start(model, None, 0) for path, leaf in part.items()}
    (said,) = continued(model, leaves, [expected["question"][0].tolist()], 16, stops=(2,))
    assert [*said, 2] == expected["answer"].tolist()
