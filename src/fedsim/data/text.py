"""Texts to token ids by the model's own tokenizer, and the reader of 20 Newsgroups."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data import assets
from fedsim.data.dataset import Source
from fedsim.data.gate import LONGEST_TEXT, class_ids, require_characters, require_memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHUNK = 2048  # texts handed to the tokenizer at once: it keeps every token's offsets until they are cut
_CHARACTERS = 2**22
_PAD_TOKENS = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")


def newsgroups() -> Source:
    """20 Newsgroups from the fetched asset: 11,293 training and 7,528 test texts of 20 classes, in the file's order.

    The texts are a pre-processed form (lower case, letters only, the subject in front).

    Raises:
        ValueError: the asset is not in the cache, or its files are not what they should be.
    """
    folder = assets.path("20newsgroups")
    train, test = _tab(folder / "train.tab"), _tab(folder / "test.tab")
    y, classes = class_ids([label for label, _ in train + test])
    asset = assets.ASSETS["20newsgroups"]
    return Source(
        name="20newsgroups",
        x=[text for _, text in train + test],
        y=y,
        splits={"train": np.arange(len(train)), "test": np.arange(len(train), len(train) + len(test))},
        classes=classes,
        kind="text",
        licence=asset.licence,
        key=asset.sha256,
    )


def _tab(file: Path) -> list[tuple[str, str]]:
    """(label, text) of each row of a tab-separated file with three header lines; blank rows are dropped."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if number <= 3 or not line.strip():
            continue
        label, tab, text = line.partition("\t")
        if not tab or not label.strip() or not text.strip():
            raise ValueError(
                f"Expected a label, a tab and a text in {file} line {number}; delete {file.parent} and fetch again."
            )
        rows.append((label, text))
    return rows


def trained_tokenizer(texts: Sequence[str], vocabulary: int, pad: int) -> Tokenizer:
    """A tokenizer learned from the texts: byte-level BPE of at most `vocabulary` tokens, `[CLS] text [SEP]`, lower case.

    The same texts give the same tokenizer, in every process. Not WordPiece, whose trainer in `tokenizers` breaks ties by
    the order of a hash table. Every script can be written, as the first 256 tokens are bytes.

    Args:
        pad: the id of `[PAD]`, 0 to 2; below 0 there is no such token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[CLS]", "[SEP]"]
    if pad >= 0:
        special.insert(pad, "[PAD]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]"))
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(
    texts: Sequence[str], tokenizer_file: Path | Tokenizer, tokens: int, outside: int | None = None
) -> np.ndarray:
    """Token ids (N, tokens) int32 of each text, special tokens included, cut or padded on the right.

    The tokenizer's own truncation and padding settings are replaced; its padding token is kept.

    Args:
        outside: what stands where padding is in place of the tokenizer's token: a number below 0, for models whose texts may
            hold every token.

    Raises:
        ValueError: no readable tokenizer, no padding token, a length without room for a single word, or a text that is too
            long or no Unicode.
    """
    tokenizer = opened(tokenizer_file) if isinstance(tokenizer_file, Path) else tokenizer_file
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if tokens <= special:
        raise ValueError(
            f"Expected tokens={tokens} > {special}, the special tokens that this tokenizer adds; raise it."
        )
    if outside is None:
        pad_id, pad_token = _padding(tokenizer.padding, tokenizer.token_to_id, tokenizer_file)
    else:
        pad_id, pad_token = 0, tokenizer.id_to_token(0)
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=pad_id, pad_token=pad_token)
    require_memory(4 * tokens * len(texts), f"tokens={tokens} of {len(texts):,} texts", "lower tokens")
    for row, text in enumerate(texts):
        require_characters(text, LONGEST_TEXT, lambda row=row: f"text {row}")
    cut = _cutter(tokenizer, tokens)
    out = np.empty((len(texts), tokens), np.int32)
    start = 0
    while start < len(texts):
        short = _chunk([cut(text) for text in texts[start : start + _CHUNK]])
        chunk = texts[start : start + len(short)]
        encodings = tokenizer.encode_batch_fast(short)
        for i, encoding in enumerate(encodings):
            whole = len(short[i]) == len(chunk[i]) or encoding.attention_mask[-1] == 1
            encoding = encoding if whole else tokenizer.encode(chunk[i])
            out[start + i] = encoding.ids
            if outside is not None:
                out[start + i, np.asarray(encoding.attention_mask) == 0] = outside
        start += len(short)
    return out


def opened(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"Expected tokenizer={str(file)!r} to be a tokenizer.json ({error}).") from error


def _chunk(texts: list[str]) -> list[str]:
    """The first of these texts, at least one, that have together no more characters than are tokenised at once."""
    ends = np.cumsum([len(text) for text in texts])
    return texts[: max(1, int(np.searchsorted(ends, _CHARACTERS, side="right")))]


def _cutter(tokenizer: Tokenizer, tokens: int) -> Callable[[str], str]:
    """A function that shortens a text to what can matter for its first tokens.

    Only for tokenizers that split at spaces first (BERT's): there the tokens of a prefix that ends at a space are the
    first tokens of the text. Others get the text as it is.
    """
    settings = json.loads(tokenizer.to_str())
    by_space = (settings["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
    spaced = any(" " in added["content"] for added in settings["added_tokens"])
    if not by_space or spaced:
        return lambda text: text
    reach = 8 * tokens  # characters; longer than nearly every prefix of that many tokens, and the rest is redone

    def cut(text: str) -> str:
        end = text.rfind(" ", 0, reach) if len(text) > reach else -1
        return text[:end] if end > 0 else text

    return cut


def cached_tokens(
    texts: Sequence[str], tokenizer_file: Path, tokens: int, key: str, outside: int | None = None
) -> np.ndarray:
    """`tokenize`, kept in the cache under a hash of the texts' `key`, the tokenizer's bytes, the length and the padding."""
    form = b"1" if outside is None else b"1 %d" % outside
    inputs: Iterable[bytes] = (key.encode(), tokenizer_file.read_bytes(), str(tokens).encode(), form)
    name = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in inputs)).hexdigest()[:24]
    file = assets.cache_dir() / "tokens" / f"{name}.npz"
    try:
        with file.open("rb") as stream, np.load(stream) as saved:
            ids = saved["ids"]
        if ids.shape == (len(texts), tokens) and ids.dtype == np.int32:
            return ids
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # not there yet, or damaged: made again below
    ids = tokenize(texts, tokenizer_file, tokens, outside)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tokens-", dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, ids=ids)
        os.replace(temporary, file)
    except OSError:
        pass  # a cache that cannot be written costs a few seconds next time, nothing else
    return ids


def _padding(
    settings: dict[str, Any] | None, token_to_id: Callable[[str], int | None], tokenizer_file: object
) -> tuple[int, str]:
    """The id and the name of the padding token, from the file's settings or by its usual names."""
    if settings:
        return settings["pad_id"], settings["pad_token"]
    for token in _PAD_TOKENS:
        if (found := token_to_id(token)) is not None:
            return found, token
    raise ValueError(
        f"Expected a padding token in {tokenizer_file} (one of {', '.join(_PAD_TOKENS)}, or padding settings); add one."
    )
