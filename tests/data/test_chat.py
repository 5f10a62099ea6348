"""Conversations: what is read, how it is written, which tokens are learned, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fedsim import data
from fedsim.config import Config
from fedsim.data import chat, text
from fedsim.data.chat import Marks, Turn

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = (Turn("user", "ab cd"), Turn("assistant", "ef gh"), Turn("user", "cd"), Turn("assistant", "ab"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and a few words, ChatML's marks among its special tokens; it adds nothing by itself."""
    made = text.trained_tokenizer(["ab cd ef gh"] * 4, 300, -1)
    made.normalizer = None
    made.post_processor = None
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def learned(tokenizer: Tokenizer, made: dict[str, np.ndarray], row: int = 0) -> str:
    """The text that a row's loss is about."""
    return tokenizer.decode(made["ids"][row][made["loss"][row] > 0].tolist(), skip_special_tokens=False)


def test_answers_and_their_ends_are_learned(tokenizer: Tokenizer) -> None:
    written = chat.by_template(Marks(CHATML), "it")
    whole, spans = written(TALK)
    assert [whole[a:b] for a, b in spans] == ["ef gh<|im_end|>", "ab<|im_end|>"]
    made = chat.tokenized([TALK, TALK[:2]], tokenizer, 120, -1, written, answers=True)
    ids = tokenizer.encode(whole).ids
    assert made["ids"][0, : len(ids)].tolist() == ids and set(made["ids"][0, len(ids) :]) == {-1}
    assert learned(tokenizer, made).replace(" ", "") == "efgh<|im_end|>ab<|im_end|>"
    assert learned(tokenizer, made, 1).replace(" ", "") == "efgh<|im_end|>"
    everything = chat.tokenized([TALK], tokenizer, 120, -1, written, answers=False)
    assert everything["loss"][0].sum() == len(ids), "all but padding"


def test_plain_pairs_end_with_the_model_s_mark(tokenizer: Tokenizer) -> None:
    pair = chat.pair("ab cd", " ef", "row 1")
    made = chat.tokenized(
        [pair], tokenizer, 12, -1, chat.as_they_are(Marks(tokens={"eos_token": "<|im_end|>"})), answers=True
    )
    assert learned(tokenizer, made).strip() == "ef<|im_end|>"
    blank = chat.tokenized(
        [chat.pair("ab ", "cd", "row 1")], tokenizer, 12, -1, chat.as_they_are(Marks()), answers=True
    )
    assert learned(tokenizer, blank) == " cd", "whole, though the blank before it is the prompt's"
    own = text.trained_tokenizer(["ab cd ef gh"] * 4, 300, 0)
    made = chat.tokenized([pair], own, 12, 0, chat.as_they_are(Marks()), answers=True, marked=True)
    assert learned(own, made).endswith("[SEP]") and "[CLS]" not in learned(own, made) and "cd" not in learned(own, made)
    with pytest.raises(ValueError, match="turns='template' for messages"):
        chat.as_they_are(Marks())(TALK)


def test_long_conversations_are_cut_with_a_word_or_refused(tokenizer: Tokenizer) -> None:
    written = chat.by_template(Marks(CHATML), "it")
    tokens = len(tokenizer.encode(written(TALK[:2])[0]).ids)
    short = (Turn("user", "ab"), Turn("assistant", "cd"))
    long = (Turn("user", "ab cd " * 30), Turn("assistant", "ef"))
    with pytest.warns(
        UserWarning, match=r"1 of 2 conversations are longer than tokens=\d+ .* 1 have no token of an answer"
    ):
        made = chat.tokenized([short, long], tokenizer, tokens, -1, written, answers=True)
    assert made["loss"][1].sum() == 0 and made["ids"][1].min() >= 0
    with pytest.raises(ValueError, match=rf"tokens={tokens} >= \d+ for too_long='refuse': 1 of 2 .*raise tokens"):
        chat.tokenized([short, long], tokenizer, tokens, -1, written, answers=True, refuse_long=True)
    with pytest.raises(
        ValueError, match=r"Expected conversations with a token of an answer within tokens=4; .*raise tokens"
    ):
        chat.tokenized([long, long], tokenizer, 4, -1, written, answers=True)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, TALK, r"Expected it to have a chat template for turns='template'; write prompts .* turns=plain"),
        ("{% for %}", TALK, "Expected the chat template of it to be Jinja"),
        ("{{ raise_exception('user first') }}", TALK, r"to take turns of user, .*user first.*; change their roles"),
        ("{{ ''.__class__.__mro__ }}", TALK, "to take turns of"),  # nothing of Python can be reached
        ("{{ messages | length }}{{ messages[-1]['content'] }}", TALK, r"to write turn 2 the same whatever follows"),
    ],
)
def test_templates_that_do_not_serve_are_refused(template: str | None, turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.by_template(Marks(template), "it")(turns)


def test_marks_are_read_beside_the_tokenizer(tmp_path: Path) -> None:
    """Several templates by name, tokens as objects, and the newer file, which counts."""
    said = {
        "eos_token": {"content": "</s>"},
        "bos_token": "<s>",
        "chat_template": [{"name": "default", "template": "a"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert chat.marks(tmp_path / "tokenizer.json") == Marks("a", {"bos_token": "<s>", "eos_token": "</s>"})
    assert chat.template_file(tmp_path / "tokenizer.json") == tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text("b")
    assert chat.marks(tmp_path / "tokenizer.json").template == "b"
    assert chat.template_file(tmp_path / "tokenizer.json") == tmp_path / "chat_template.jinja"
    assert chat.template_file(tmp_path / "else" / "tokenizer.json") is None
    assert chat.marks(tmp_path / "else" / "tokenizer.json") == Marks() == chat.marks(None)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="to hold a JSON object, not a list"):
        chat.marks(tmp_path / "tokenizer.json")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


GOOD = [turn("user", "a"), turn("assistant", "b")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": "no"}], "Expected messages in .*line 1 to be a list of turns"),
        ([{"messages": []}], "to be a list of turns"),
        ([{"messages": GOOD}, {"messages": [{"role": "user"}]}], "Expected turn 1 in .*line 2 to have role and content"),
        ([{"messages": [turn("robot", "a")]}], "Expected role='robot' of turn 1 in .*line 1 to be one of system, user"),
        ([{"messages": [turn("user", "a")]}], "Expected a turn of role 'assistant' in .*line 1"),
        ([{"messages": [turn("user", ""), turn("assistant", "b")]}], "Expected a text as turn 1 in .*line 1, got ''"),
        ([{"prompt": "a", "completion": None}], "Expected a text as completion in .*line 1, got None"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "column 'text' to be a column|text_column='text'"),
        ([{"messages": GOOD}, {"prompt": "a", "completion": "b"}], "Expected column 'messages' in .*line 2"),
    ],
)  # fmt: skip
def test_rows_that_are_no_conversations_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        data.read(Config(dataset=str(file), task="language_model", backbone="decoder_tiny"))


@pytest.fixture
def talks(tmp_path: Path) -> Callable[..., Config]:
    """A config on a file of twenty conversations of two owners."""

    def make(form: str, **options: Any) -> Config:
        file = tmp_path / f"{form}.jsonl"
        rows = []
        for i in range(20):
            asked, said = f"what is {i % 5}", f"it is {i % 5}"
            row = {"messages": [turn("user", asked), turn("assistant", said)]} if form == "messages" else {}
            row = row or {"prompt": asked, "completion": said}
            rows.append(row | {"who": "ab"[i % 2]})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Config(
            **{"dataset": str(file), "task": "language_model", "backbone": "decoder_tiny", "tokens": 24, **options}
        )

    return make


def test_files_of_conversations_are_read_without_labels(talks: Callable[..., Config]) -> None:
    for form in ("messages", "pairs"):
        source = data.read(talks(form, client_column="who"))
        assert source.classes == ("conversations",) and len(source.turns or ()) == 20
        assert (source.turns or ())[3] == (Turn("user", "what is 3"), Turn("assistant", "it is 3"))
        assert set(source.natural["client"].tolist()) == {"a", "b"}
    assert data.read(talks("pairs", label_column="who")).classes == ("a", "b")


def test_conversations_need_a_language_model_and_a_template(talks: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"task='language_model' for the conversations of pairs\.jsonl"):
        data.load(talks("pairs"), None, learn=(300, 0))
    for form in ("messages", "pairs"):
        with pytest.raises(ValueError, match="backbone='decoder_tiny' to have a chat template for turns='template'"):
            data.load(talks(form), None, learn=(300, 0), taught=False, backbone="decoder_tiny")
    made = data.load(talks("pairs", turns="plain"), None, learn=(300, 0), taught=False).x
    assert made["ids"].shape == made["loss"].shape == (20, 24) and 0 < made["loss"].sum() < (made["ids"] > 0).sum()
