"""Tokenising, its cache, and the reader of 20 Newsgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import fedsim
from fedsim import data
from fedsim.config import Config
from fedsim.data import assets, catalogue, text
from fedsim.simulation import build, needs

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "##a", "##b", "cat", "dog", "##s"]
CLS, SEP, PAD = 1, 2, 3


def make_tokenizer(file: Path, padded: bool = True, pad: bool = True, by_space: bool = True) -> Path:
    """A BERT tokenizer of eleven tokens whose file asks for 5 tokens, padded to 7: settings that must not be used."""
    vocabulary = {word: i for i, word in enumerate(WORDS) if pad or word != "[PAD]"}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if by_space else pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.enable_truncation(5, direction="left")
    if padded:
        tokenizer.enable_padding(length=7, pad_id=PAD, pad_token="[PAD]", direction="left")
    tokenizer.save(str(file))
    return file


def whole(texts: list[str], file: Path, tokens: int) -> list[list[int]]:
    """The reference: each whole text encoded, cut on the right behind the special token, padded."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    out = []
    for one in texts:
        ids = tokenizer.encode(one).ids
        ids = ids if len(ids) <= tokens else [*ids[: tokens - 1], ids[-1]]
        out.append(ids + [PAD] * (tokens - len(ids)))
    return out


@pytest.mark.parametrize("padded", [True, False])
def test_cut_and_padded_on_the_right(tmp_path: Path, padded: bool) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json", padded)
    ids = text.tokenize(["cat", "dogs cat zebra dog", ""], file, 6)
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [CLS, 8, SEP, PAD, PAD, PAD],
        [CLS, 9, 10, 8, 0, SEP],
        [CLS, SEP, PAD, PAD, PAD, PAD],
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    texts=st.lists(st.text(alphabet="ab .\u00e9\u3000\n\u4e2d[]", max_size=90), min_size=1, max_size=5),
    tokens=st.integers(3, 9),
    by_space=st.booleans(),
)
def test_shortcut_equals_the_whole_text(tmp_path: Path, texts: list[str], tokens: int, by_space: bool) -> None:
    """Texts are shortened before they are tokenised; that must never be seen."""
    file = make_tokenizer(tmp_path / "tokenizer.json", by_space=by_space)
    assert text.tokenize(texts, file, tokens).tolist() == whole(texts, file, tokens)


def test_a_long_text_of_few_tokens_is_read_to_its_end(tmp_path: Path) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    one = "x" * 50 + " " * 50 + "cat"
    assert text.tokenize([one], file, 4).tolist() == [[CLS, 0, 8, SEP]]


def test_a_chunk_is_bounded_by_its_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    texts = ["cat " * 30, "dog", "cat", "dog " * 90, "cat"]
    whole = text.tokenize(texts, file, 6)
    monkeypatch.setattr(text, "_CHARACTERS", 10)
    assert np.array_equal(text.tokenize(texts, file, 6), whole)


def test_what_is_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Unicode text in text 1, got half of a surrogate pair, '\\ud83d', at character 4"
    ):
        text.tokenize(["cat", "dog \ud83d"], make_tokenizer(tmp_path / "tokenizer.json"), 6)


LEARN = """
import hashlib, random
from fedsim.data.text import trained_tokenizer
draw = random.Random(0)
words = ["".join(draw.choices("abcdefgh\u00e9\u4e2d", k=draw.randint(2, 9))) for _ in range(900)]
texts = [" ".join(draw.choices(words, k=30)) for _ in range(400)]
print(hashlib.sha256(trained_tokenizer(texts, 512, 0).to_str().encode()).hexdigest())
"""


def test_a_trained_tokenizer_is_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = {
        subprocess.run([sys.executable, "-c", LEARN], check=True, capture_output=True, env=environment).stdout
        for _ in range(3)
    }
    assert len(said) == 1


@pytest.mark.parametrize("pad", [0, 1])
def test_a_trained_tokenizer_writes_every_script(pad: int) -> None:
    tokenizer = text.trained_tokenizer(["good nice thing"] * 5, 300, pad)
    ids = text.tokenize(["Good \u4e16\U0001f600", "x"], tokenizer, 12)
    assert ids.max() < 300 and ids[1, -1] == pad == tokenizer.token_to_id("[PAD]")
    assert ids[0, 0] == tokenizer.token_to_id("[CLS]") and tokenizer.token_to_id("[SEP]") in ids[0]


@pytest.mark.slow
def test_a_tiny_backbone_learns_its_tokenizer_from_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched; resume gives the same ids, predict reads the tokenizer of the run's folder and believes no other."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "empty"))
    file = tmp_path / "texts.csv"
    words = [("good nice great", "bad poor awful")[i % 2] for i in range(120)]
    file.write_text("text,label\n" + "".join(f"{w} thing {i},{w[:4]}\n" for i, w in enumerate(words)))
    config = Config(dataset=str(file), backbone="bert_tiny", weights="random", peft="full", clients=4, clients_per_round=4,
                    rounds=6, min_size=1, partition="iid", tokens=12, lr=0.01)  # fmt: skip
    run = fedsim.run(config, fedsim.Speed(lanes=2, devices=1), out=tmp_path / "run", quiet=True)
    assert run.summary is not None and run.summary["final"]["test"]["accuracy"] > 0.9
    (kept,) = (tmp_path / "run").glob("tokenizer-*.json")
    dataset = data.load(config, None, learn=(512, 0))
    assert dataset.tokenizer == kept.read_text() and dataset.x.max() < 512
    file.unlink()  # its answers need no data
    assert fedsim.load(tmp_path / "run").predict(["nice good", "awful poor"]) == ["good", "bad"]
    kept.write_text(kept.read_text().replace("good", "goof"))
    with pytest.raises(ValueError, match=r"tokenizer-.*\.json to be as the run wrote it"):
        fedsim.load(tmp_path / "run").predict(["nice good"])


def test_ids_are_compared_with_the_vocabulary_of_the_backbone() -> None:
    assert needs.vocabulary(Config()) == 30522 and needs.vocabulary(Config(backbone="mlp")) is None
    tiny = Config(backbone="bert_tiny", weights="random", dataset="arrays")
    assert needs.vocabulary(tiny) is None, "it takes any id modulo its vocabulary"
    assert needs.learned(tiny) == (512, 0) and needs.learned(tiny.replace(backbone="roberta_tiny")) == (512, 1)
    assert needs.learned(Config()) is needs.learned(Config(weights="random")) is None
    ids = fedsim.arrays(np.full((40, 6), 30522), np.arange(40) % 2)
    with pytest.raises(ValueError, match="token ids below 30522, the vocabulary of the backbone, got 30522 in row 0"):
        build.problem(tiny.replace(backbone="bert_base"), fedsim.Speed(), ids)


def test_more_texts_than_a_chunk(tmp_path: Path) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    ids = text.tokenize(["cat", "dog"] * 1500, file, 4)
    assert np.array_equal(ids[:, 1], np.tile([8, 9], 1500))


@pytest.mark.parametrize(
    ("tokens", "pad", "content", "message"),
    [
        (2, True, None, "Expected tokens=2 > 2"),
        (8, False, None, "Expected a padding token"),
        (8, True, "{}", "to be a tokenizer.json"),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path: Path, tokens: int, pad: bool, content: str | None, message: str):
    file = make_tokenizer(tmp_path / "tokenizer.json", padded=False, pad=pad)
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        text.tokenize(["cat"], file, tokens)


def test_tokens_are_cached_by_all_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    file = make_tokenizer(tmp_path / "tokenizer.json")
    first = text.cached_tokens(["cat"], file, 4, "key")
    (saved,) = (tmp_path / "cache" / "tokens").glob("*.npz")

    with monkeypatch.context() as patch:
        patch.setattr(text, "tokenize", lambda *_: pytest.fail("made again"))
        assert np.array_equal(text.cached_tokens(["cat"], file, 4, "key"), first)

    saved.write_bytes(saved.read_bytes()[:40])
    assert np.array_equal(text.cached_tokens(["cat"], file, 4, "key"), first), "a damaged file is made again"

    text.cached_tokens(["cat"], file, 5, "key")
    text.cached_tokens(["cat"], file, 4, "other")
    text.cached_tokens(["cat"], make_tokenizer(tmp_path / "tokenizer.json", padded=False), 4, "key")
    assert sorted(f.suffix for f in saved.parent.iterdir()) == [".npz"] * 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    file = make_tokenizer(tmp_path / "tokenizer.json")
    assert text.cached_tokens(["cat"], file, 4, "key").tolist() == [[CLS, 8, SEP, PAD]]


HEADER = "Category\tText\nd\tstring\nclass\t\n"


def fake_newsgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, test: str) -> None:
    """The asset in an empty cache, with these two files for its own."""
    contents = {"train.tab": train.encode(), "test.tab": test.encode()}
    members = tuple(catalogue.Member("", name, len(content)) for name, content in contents.items())
    monkeypatch.setitem(assets.ASSETS, "20newsgroups", assets.ASSETS["20newsgroups"]._replace(members=members))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "20newsgroups-1.16.3"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def test_newsgroups_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = HEADER + "sci.space\tmoon shot\n\nalt.atheism\tone two\n\n"
    fake_newsgroups(tmp_path, monkeypatch, train, HEADER + "sci.space\tstar\n")
    source = text.newsgroups()
    assert source.x == ["moon shot", "one two", "star"]
    assert source.y.tolist() == [1, 0, 1] and source.classes == ("alt.atheism", "sci.space")
    assert {name: rows.tolist() for name, rows in source.splits.items()} == {"train": [0, 1], "test": [2]}


def test_a_damaged_newsgroups_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_newsgroups(tmp_path, monkeypatch, HEADER + "sci.space moon\n", HEADER)
    with pytest.raises(ValueError, match=r"train\.tab line 4"):
        text.newsgroups()


@pytest.mark.assets
def test_real_newsgroups() -> None:
    for name in ("minilm_l6", "20newsgroups"):
        if not assets.is_fetched(name):
            pytest.skip(f"{name} is not in the cache: run `fedsim data fetch {name}`")
    tokenizer = assets.path("minilm_l6") / "tokenizer.json"
    source = text.newsgroups()
    assert [len(rows) for rows in source.splits.values()] == [11_293, 7_528] and len(source.classes) == 20
    dataset = data.load(Config(), tokenizer)
    assert dataset.x.shape == (18_821, 32) and dataset.x.dtype == np.int32
    assert [len(rows) for rows in dataset[3:6]] == [10_164, 1_129, 7_528]
    assert set(np.unique(dataset.y[dataset.train])) == set(range(20))

    reference = Tokenizer.from_file(str(tokenizer))  # whole texts, without the shortcut
    reference.enable_truncation(32)
    reference.enable_padding(length=32)
    rows = np.arange(0, 18_821, 37)
    encodings = reference.encode_batch([source.x[row] for row in rows])
    assert np.array_equal(dataset.x[rows], [encoding.ids for encoding in encodings])


def test_padding_may_stand_outside_the_vocabulary() -> None:
    """Where every token may be part of a text, and there is no padding token to ask for."""
    tokenizer = text.trained_tokenizer(["a b c"] * 3, 300, -1)
    assert tokenizer.token_to_id("[PAD]") is None and tokenizer.token_to_id("[CLS]") == 0
    with pytest.raises(ValueError, match="Expected a padding token"):
        text.tokenize(["a"], tokenizer, 8)
    ids = text.tokenize(["a b", "a b c a b c a b c"], tokenizer, 8, outside=-1)
    tokenizer.no_padding()
    assert ids[0].tolist() == [*tokenizer.encode("a b").ids, -1, -1, -1, -1]
    assert ids[1].min() >= 0, "a text that is cut has no padding"
