"""How likely a finished language model holds answers behind a text: what multiple choice is judged by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import backbones, peft
from fedsim.data import chat as chats
from fedsim.simulation.generate import MULTIPLE, reading
from fedsim.simulation.predict import final_model

if TYPE_CHECKING:
    from fedsim.record import Run


class Likelihood(NamedTuple):
    """Of one answer."""

    sum: float
    """Log-likelihood of its tokens together, nats."""
    tokens: int

    @property
    def mean(self) -> float:
        """Of a token."""
        return self.sum / self.tokens


def likelihoods(run: Run, text: str, answers: Sequence[str], *, chat: bool) -> list[Likelihood]:
    """Of each answer behind the text, without a mark of its end; see `Run.choose`.

    Raises:
        ValueError: as `Run.choose`.
    """
    if isinstance(answers, str) or len(answers) < 2:
        raise ValueError(f"Expected at least two answers, got {answers!r:.80}; give a list of them.")
    config, tokenizer, marks = reading(run)
    pairs = [chats.pair(text, answer, f"answer {number}") for number, answer in enumerate(answers, start=1)]
    said = chats.by_template(marks, f"backbone={config.backbone!r}") if chat else chats.as_they_are(chats.Marks())

    def written(turns: chats.Conversation) -> tuple[str, chats.Spans]:
        whole, ((start, stop),) = said(turns)
        answer = turns[1].content.strip() if chat else turns[1].content  # templates may strip it
        at = whole.find(answer, start, stop)
        return whole, [(at, at + len(answer))]

    c = backbones.row(config.backbone).config
    longest = max(len(tokenizer.encode(written(pair)[0], add_special_tokens=not chat).ids) for pair in pairs)
    if longest > c.tokens:
        raise ValueError(
            f"Expected the text with its longest answer, {longest} tokens, to fit into the model's context of {c.tokens}; shorten it."
        )
    width = min(-(-longest // MULTIPLE) * MULTIPLE, c.tokens)
    x = chats.tokenized(pairs, tokenizer, width, c.pad, written, answers=True, marked=not chat, ends=False)
    model, frozen = final_model(run, config, (width,), np.int32)
    sums = np.asarray(program(model.options, c.vocabulary)({**frozen, **run.parameters}, x["ids"], x["loss"]))
    return [Likelihood(float(sums[row]), int(x["loss"][row, 1:].sum())) for row in range(len(pairs))]


@functools.lru_cache(maxsize=8)
def program(options: peft.Options, vocabulary: int) -> Any:
    """The compiled function (leaves, ids (B, T), which of them count (B, T)) -> log-likelihoods (B,) of those that do."""
    model = peft.from_config(options, vocabulary)

    @jax.jit
    def run(leaves: Any, ids: jax.Array, counts: jax.Array) -> jax.Array:
        logits = model.run(leaves, ids, 0, model.stages)[:, :-1].astype(jnp.float32)
        odds = jax.nn.log_softmax(logits, axis=-1)
        said = jnp.take_along_axis(odds, jnp.maximum(ids[:, 1:], 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(said * counts[:, 1:], axis=1)

    return run
