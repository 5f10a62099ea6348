"""Conversations to token ids: by the model's own chat template, or as they are, with the answers marked that a loss is about.

A conversation is its turns in order; a prompt and its completion are one of two turns. Templates are Jinja, as Hugging Face's
tokenizers have them, run in Jinja's sandbox (extra `chat`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedsim.data.gate import LONGEST_TEXT, require_characters, require_memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWERS = "assistant"  # role whose turns are answers
ROLES = ("system", "user", "assistant", "tool")
MARKS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # which newer versions write, and which counts where it is there


class Turn(NamedTuple):
    """What one side says."""

    role: str
    content: str


Conversation = tuple[Turn, ...]
Spans = list[tuple[int, int]]  # first character of an answer, and the one behind its last
Written = Callable[[Conversation], tuple[str, Spans]]


class Marks(NamedTuple):
    """What a tokenizer's folder says beside the tokens."""

    template: str | None = None
    tokens: Mapping[str, str] = {}
    """`eos_token` and others -> how they are written."""


def messages(value: Any, where: str) -> Conversation:
    """The turns of a `messages` column: a list of objects with `role` and `content`.

    Raises:
        ValueError: it is none, a role is unknown, there is no answer, or a text that cannot be used; `where` names its row.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"Expected messages in {where} to be a list of turns, got {value!r:.80}; write role and content."
        )
    turns = []
    for number, said in enumerate(value, start=1):
        try:
            turn = dict(said)
            role, content = turn["role"], turn["content"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"Expected turn {number} in {where} to have role and content, got {said!r:.80}; add them."
            ) from None
        if role not in ROLES:
            raise ValueError(
                f"Expected role={role!r} of turn {number} in {where} to be one of {', '.join(ROLES)}; correct it."
            )
        turns.append(Turn(role, content_of(content, f"turn {number} in {where}")))
    if not any(turn.role == ANSWERS for turn in turns):
        raise ValueError(
            f"Expected a turn of role {ANSWERS!r} in {where}, which is what is learned; add one, or remove the row."
        )
    return tuple(turns)


def pair(prompt: Any, completion: Any, where: str) -> Conversation:
    """The two turns of a prompt and its completion.

    Raises:
        ValueError: one that cannot be used.
    """
    return (
        Turn("user", content_of(prompt, f"prompt in {where}")),
        Turn(ANSWERS, content_of(completion, f"completion in {where}")),
    )


def content_of(value: Any, where: str) -> str:
    """Raises `ValueError` for what is no text, or blank, or too long."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected a text as {where}, got {value!r:.80}; fill it, or remove the row.")
    require_characters(value, LONGEST_TEXT, lambda: where)
    return value


def template_file(tokenizer_file: Path) -> Path | None:
    """The file beside a tokenizer that a chat template would be in; None where there is none."""
    return next((file for name in (TEMPLATE, MARKS) if (file := tokenizer_file.with_name(name)).is_file()), None)


def marks(tokenizer_file: Path | None) -> Marks:
    """The chat template and the marks in the files beside a tokenizer, as Hugging Face's library writes them.

    Raises:
        ValueError: `tokenizer_config.json` is there and is no JSON object.
    """
    if tokenizer_file is None:
        return Marks()
    file, alone = tokenizer_file.with_name(MARKS), tokenizer_file.with_name(TEMPLATE)
    said: dict[str, Any] = {}
    if file.is_file():
        try:
            said = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected {file} to be a readable JSON file ({error}); fetch it again.") from error
        if not isinstance(said, dict):
            raise ValueError(f"Expected {file} to hold a JSON object, not a {type(said).__name__}; fetch it again.")
    template = said.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if alone.is_file():
        template = alone.read_text(encoding="utf-8")
    tokens = {
        name: token if isinstance(token, str) else token.get("content", "")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if isinstance(token := said.get(name), (str, dict))
    }
    return Marks(template if isinstance(template, str) else None, tokens)


def rendered(marks: Marks, whose: str) -> Callable[[Conversation, bool], str]:
    """(turns, whether an answer is to follow) -> what the chat template writes.

    Args:
        whose: model, for refusals.

    Raises:
        ValueError: there is no template, Jinja is not installed or cannot read it; when called, it cannot write the turns.
    """
    if marks.template is None:
        raise ValueError(
            f"Expected {whose} to have a chat template for turns='template'; write prompts and completions as they are by "
            "turns=plain, or take a model that was made for conversations, with its tokenizer_config.json."
        )
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(
            "Expected jinja2 to be installed, in which chat templates are written; run pip install 'fedsim-jax[chat]', or take "
            "turns=plain."
        ) from None

    def refused(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refused)  # pyrefly: ignore[bad-argument-type] - what templates call
    try:
        template = environment.from_string(marks.template)
    except TemplateError as error:
        raise ValueError(f"Expected the chat template of {whose} to be Jinja ({error}); take turns=plain.") from error

    def text(turns: Conversation, asked: bool) -> str:
        try:
            said = [turn._asdict() for turn in turns]
            return template.render(messages=said, add_generation_prompt=asked, **marks.tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected the chat template of {whose} to take turns of {', '.join(turn.role for turn in turns)} ({error}); "
                "change their roles or their order."
            ) from error

    return text


def asking(marks: Marks, whose: str) -> Callable[[str], str]:
    """What a user asks -> the template's text up to where the answer begins.

    Raises:
        ValueError: as `rendered`.
    """
    text = rendered(marks, whose)
    return lambda asked: text((Turn("user", asked),), True)


def by_template(marks: Marks, whose: str) -> Written:
    """Writes conversations by the chat template; an answer's span holds the mark of its end.

    Raises:
        ValueError: as `rendered`; when called, the template writes turns otherwise once others follow.
    """
    text = rendered(marks, whose)

    def written(turns: Conversation) -> tuple[str, Spans]:
        whole, spans = text(turns, False), []
        for number, turn in enumerate(turns):
            if turn.role == ANSWERS:
                before, until = text(turns[:number], True), text(turns[: number + 1], False).rstrip()
                if not (whole.startswith(until) and until.startswith(before)):
                    raise ValueError(
                        f"Expected the chat template of {whose} to write turn {number + 1} the same whatever follows; it does "
                        "not, so that answers cannot be found in it: split conversations into prompt and completion, turns=plain."
                    )
                spans.append((len(before), len(until)))
        return whole.rstrip(), spans

    return written


def as_they_are(marks: Marks) -> Written:
    """Writes a prompt and its completion one after the other, and the model's mark of an end where it has one."""

    def written(turns: Conversation) -> tuple[str, Spans]:
        if len(turns) != 2 or turns[0].role != "user":
            raise ValueError(
                "Expected turns='template' for messages, which are no prompt with its completion; leave out turns."
            )
        prompt, whole = turns[0].content, turns[0].content + turns[1].content + marks.tokens.get("eos_token", "")
        return whole, [(len(prompt), len(whole))]

    return written


def opened(marks: Marks, whose: str, turns: str) -> Written:
    """`by_template` or `as_they_are`, as the option says."""
    return as_they_are(marks) if turns == "plain" else by_template(marks, whose)


def pieces(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, written: Written, *,
    answers: bool, marked: bool = False, ends: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Of each whole conversation its token ids, (n,) int32, and (n,) float32, 1 where a token is learned.

    Args: as of `tokenized`.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for turns in conversations:
        text, spans = written(turns)
        encoding = tokenizer.encode(text, add_special_tokens=marked)
        special = encoding.special_tokens_mask
        loss = np.zeros(len(encoding.ids), np.float32)
        for at, (first, last) in enumerate(encoding.offsets):
            inside = any(
                first < stop and start < last for start, stop in spans
            )  # a token may begin with a prompt's blank
            # What the tokenizer itself puts behind a text ends the answer there.
            end = ends and first == last and special[at] == 1 and at > 0
            loss[at] = not answers or inside or end
        yield np.asarray(encoding.ids, np.int32), loss


def tokenized(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, tokens: int, pad: int, written: Written, *,
    answers: bool, marked: bool = False, ends: bool = True, refuse_long: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Inputs of a language model: `ids` (N, tokens) int32, and `loss` (N, tokens) float32, 1 where a token is learned.

    A conversation that is longer is cut at its end, and a warning says how many were.

    Args:
        pad: what stands behind shorter ones.
        answers: the loss is about answers and the marks of their ends; else about every token.
        marked: the tokenizer adds its own special tokens, which a template writes itself.
        ends: the mark that the tokenizer puts behind a text is an answer's last token.
        refuse_long: refuse what is longer.

    Raises:
        ValueError: conversations that are too long where that is refused, or none with a token that is learned.
    """
    require_memory(8 * tokens * len(conversations), f"tokens={tokens} of {len(conversations):,} texts", "lower tokens")
    ids = np.full((len(conversations), tokens), pad, np.int32)
    loss = np.zeros((len(conversations), tokens), np.float32)
    long: list[int] = []
    longest = 0
    every = pieces(conversations, tokenizer, written, answers=answers, marked=marked, ends=ends)
    for row, (whole, learned) in enumerate(every):
        count = min(len(whole), tokens)
        ids[row, :count], loss[row, :count] = whole[:count], learned[:count]
        if len(whole) > tokens:
            long.append(row)
            longest = max(longest, len(whole))
    _tell(long, longest, loss, tokens, refuse_long)
    return {"ids": ids, "loss": loss}


def _tell(long: list[int], longest: int, loss: np.ndarray, tokens: int, refuse_long: bool) -> None:
    """Warns of conversations that were cut.

    Raises:
        ValueError: they are refused, or nothing is left to learn.
    """
    what = f"{len(long):,} of {len(loss):,} conversations are longer than tokens={tokens} (the longest has {longest:,})"
    if long and refuse_long:
        raise ValueError(
            f"Expected tokens={tokens} >= {longest:,} for too_long='refuse': {what}; raise tokens, or take too_long=cut."
        )
    mute = int((loss[:, 1:].sum(axis=1) == 0).sum())
    if len(loss) and mute == len(loss):
        raise ValueError(
            f"Expected conversations with a token of an answer within tokens={tokens}; {what}, and none has one: raise tokens."
        )
    if long:
        rest = f"; {mute:,} have no token of an answer left and teach nothing" if mute else ""
        warnings.warn(f"{what} and were cut at their ends{rest}: raise tokens to keep them whole.", stacklevel=4)
