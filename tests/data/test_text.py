"""Tokenising, its cache, and the reader of 20 Newsgroups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fedsim import data
from fedsim.config import Config
from fedsim.data import assets, catalogue, text

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
