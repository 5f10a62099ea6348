"""Causal decoders of token sequences, pre-norm, in two layouts.

Llama's (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary positions, grouped queries (Ainslie et al. 2023, 2305.13245),
SwiGLU, no biases. GPT-2's (Radford et al. 2019): LayerNorm, learned positions, GELU by its tanh form, biases everywhere.

As a language model its outputs are a score of every token of the vocabulary for what comes next, by the token embedding itself
(tied) or by a matrix of its own; as a classifier it has a head on the last real token.

Input: int32 token ids (B, T), padded with the pad id on either side; or a dict with them as "ids", and "loss" (B, T), 1 for the
tokens that the loss of a language model is about (default: all). The ids go along from stage to stage, since a loss needs
them where the first stages' outputs are kept in place of the texts. Published decoders have no token for padding alone: theirs
is -1, which no text holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedsim.backbones.attention import attend, plain
from fedsim.backbones.forms import wide
from fedsim.backbones.layers import MLP, Embedding, LayerNorm, Linear, Projections, Shape, Stage, param


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; the defaults are for trying things out."""

    layout: Literal["llama", "gpt2"] = "llama"
    vocabulary: int = 512
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 2
    """Heads of keys and values, each for `heads / kv_heads` heads of queries."""
    hidden: int = 176
    positions: int = 512
    theta: float = 10_000.0
    """Rotary positions turn by angles of 1 to 1 / theta a token."""
    eps: float = 1e-5
    pad: int = 0
    tied: bool = True
    """Whether the token embedding is the output of the language model too."""
    language_model: bool = False
    """Whether it answers with the next token of every token, not with the class of a text."""

    @property
    def tokens(self) -> int:
        """The longest text it reads, in tokens."""
        return self.positions


class RMSNorm(nnx.Module):
    """x (..., D) over its root mean square, times scale (D,); in at least float32, returned in x's dtype."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (width,), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * wide(self.scale[...])).astype(x.dtype)


class Embeddings(nnx.Module):
    """Token embeddings, and GPT-2's of positions; rotary positions come with the attention."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.token = Embedding(c.vocabulary, c.width, rngs=rngs)
        learned = c.layout == "gpt2"
        self.place: Embedding | None = nnx.data(Embedding(c.positions, c.width, rngs=rngs) if learned else None)

    def __call__(self, ids: jax.Array, position: jax.Array) -> jax.Array:
        """ids and the number of each token among the real ones of its text, (B, T) -> (B, T, D)."""
        x = self.token(ids)
        return x if self.place is None else x + self.place(position)


class CausalAttention(Projections):
    """Attention of every token to itself and those before it; keys and values of a prefix are seen by all."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        gpt2 = c.layout == "gpt2"
        super().__init__(c.width, c.heads, c.heads // c.kv_heads, bias=gpt2, rngs=rngs)
        self.theta = None if gpt2 else c.theta

    def __call__(self, x: jax.Array, mask: jax.Array, position: jax.Array | None = None) -> jax.Array:
        """x (B, T, D), mask (B, T) bool, true where a token may be looked at -> (B, T, D).

        Args:
            position: (B, T) int, by which rotary positions turn; default the columns, which is the same where nothing is in front
                of the text: only differences count.
        """
        query, key, value = self.projected(x, position, x.shape[1])
        key, value, mask = self.before(key, value, mask)
        mixed = attend(query, self.for_each(key), self.for_each(value), mask, causal=True)
        return self.written(mixed.reshape(x.shape))

    def cached(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array], real: jax.Array, at: jax.Array | int
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As a call for the tokens that stand in the slots from `at` on; those before them are kept as keys and values.

        Args:
            x: (B, T, D) tokens.
            past: keys and values (B, S, h, d) of S slots, those before `at` written.
            real: (B, S) bool, the slots that may be looked at, these tokens' included.

        Returns:
            (B, T, D), and the keys and values with those of these tokens.
        """
        tokens, slots = x.shape[1], real.shape[1]
        position = jax.lax.dynamic_slice_in_dim(counted(real), at, tokens, axis=1)
        query, *new = self.projected(x, position, slots)
        key, value = (jax.lax.dynamic_update_slice_in_dim(old, y, at, axis=1) for old, y in zip(past, new, strict=True))
        seen = real[:, None, :] & (jnp.arange(slots) <= at + jnp.arange(tokens)[:, None])  # (B, T, S)
        keys, values, seen = self.before(key, value, seen)
        mixed = plain(query, self.for_each(keys), self.for_each(values), seen)
        return self.written(mixed.reshape(x.shape)), (key, value)

    def projected(self, x: jax.Array, position: jax.Array | None, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B, T, D) -> queries (B, T, H, d), scaled, keys and values (B, T, h, d), turned by positions below `rows`."""
        depth = x.shape[2] // self.heads
        query, key, value = (
            linear(x).reshape(*x.shape[:2], -1, depth) for linear in (self.query, self.key, self.value)
        )
        if self.theta is not None:
            query, key = (rotated(y, self.theta, position, rows) for y in (query, key))
        return query * depth**-0.5, key, value

    def before(self, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values and mask (..., K) with a prefix in front, where there is one: it has no positions."""
        if self.prefix_key is None or self.prefix_value is None:
            return key, value, mask
        front = [
            jnp.broadcast_to(p[...].reshape(1, -1, *y.shape[2:]), (len(y), len(p[...]), *y.shape[2:]))
            for p, y in ((self.prefix_key, key), (self.prefix_value, value))
        ]
        seen = jnp.ones((*mask.shape[:-1], front[0].shape[1]), bool)
        key, value = (jnp.concatenate(both, axis=1) for both in zip(front, (key, value), strict=True))
        return key, value, jnp.concatenate([seen, mask], axis=-1)

    def for_each(self, y: jax.Array) -> jax.Array:
        """Keys or values (B, K, h, d) for each head of queries, (B, K, H, d)."""
        return jnp.repeat(y, self.heads // y.shape[2], axis=2)

    def written(self, mixed: jax.Array) -> jax.Array:
        """The output of what the heads mixed, (B, T, D)."""
        y = self.output(mixed)
        return y if self.adapter is None else y + self.adapter(y)


def rotated(x: jax.Array, theta: float, position: jax.Array | None = None, rows: int | None = None) -> jax.Array:
    """x (B, T, H, d): the pairs (i, i + d/2) of each head turned by position * theta^(-2i/d) (Su et al. 2021, arXiv 2104.09864).

    Args:
        position: (B, T) int, below `rows` (default: T); default 0, 1, 2, ...
    """
    half = x.shape[-1] // 2
    angle = np.arange(rows or x.shape[1])[:, None] * theta ** (-np.arange(half) / half)  # (T, d/2)
    cos, sin = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    if position is not None:
        cos, sin = (jnp.take(table, position, axis=0, mode="clip") for table in (cos, sin))
    a, b = wide(x[..., :half]), wide(x[..., half:])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def counted(real: jax.Array) -> jax.Array:
    """real (B, T) bool -> (B, T) int32: the number of each token among the real ones, from 0."""
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)


class GatedMLP(MLP):
    """x (..., D) -> down(silu(gate(x)) * up(x)) (..., D) (SwiGLU; Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(width, hidden, jax.nn.silu, bias=False, rngs=rngs)
        self.gate = Linear(width, hidden, bias=False, rngs=rngs)

    def inner(self, x: jax.Array) -> jax.Array:
        return self.activation(self.gate(x)) * self.up(x)


def gelu_new(x: jax.Array) -> jax.Array:
    """GELU by its tanh form, as GPT-2 was trained (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


def normalisation(c: DecoderConfig, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """The layout's own."""
    return (LayerNorm if c.layout == "gpt2" else RMSNorm)(c.width, eps=c.eps, rngs=rngs)


class Block(nnx.Module):
    """Norm and attention, norm and MLP, each added to its input."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = normalisation(c, rngs)
        self.attention = CausalAttention(c, rngs=rngs)
        self.norm2 = normalisation(c, rngs)
        self.mlp = (
            MLP(c.width, c.hidden, gelu_new, rngs=rngs)
            if c.layout == "gpt2"
            else GatedMLP(c.width, c.hidden, rngs=rngs)
        )
        self.prompt: nnx.Param | None = nnx.data(None)
        self.keep_prompt = False
        self.pad = c.pad

    def __call__(self, h: dict[str, Any]) -> dict[str, Any]:
        if "past" in h:
            return self.cached(h)
        real, position = h["ids"] != self.pad, None
        x, own = self.behind_prompt(h["x"])
        if (before := x.shape[1] - real.shape[1]) > 0:  # its own, or those that came along from the first block
            real = jnp.concatenate([jnp.ones((len(x), before), bool), real], axis=1)
        if before or self.attention.prefix_key is not None:
            position = counted(real)  # padding may stand between what is in front and the text
        x = x + self.attention(self.norm1(x), real, position)
        x = x + self.mlp(self.norm2(x), x)
        return {**h, "x": x if self.keep_prompt else x[:, own:]}

    def behind_prompt(self, x: jax.Array) -> tuple[jax.Array, int]:
        """x (B, T, D) behind the block's own prompt, where every token of the text looks at it; and the prompt's tokens."""
        if self.prompt is None:
            return x, 0
        front = jnp.broadcast_to(self.prompt[...], (len(x), *self.prompt.shape))
        return jnp.concatenate([front, x], axis=1), self.prompt.shape[0]

    def cached(self, h: dict[str, Any]) -> dict[str, Any]:
        """As a call, from the keys and values that are kept of the tokens before.

        `h` has "real" (B, S), which of S slots may be looked at, and "past", keys and values of each block; the first are this
        one's, and go to the end. The first tokens of texts come without "at", behind a prompt if there is one; later ones
        with the number of the slot that is theirs.
        """
        first = "at" not in h
        x, own = self.behind_prompt(h["x"]) if first else (h["x"], 0)
        mine, *others = h["past"]
        y, mine = self.attention.cached(self.norm1(x), mine, h["real"], 0 if first else h["at"])
        x = x + y
        x = x + self.mlp(self.norm2(x), x)
        return {**h, "x": x if self.keep_prompt else x[:, own:], "past": (*others, mine)}


class Decoder(nnx.Module):
    """Token ids (B, T) -> scores of the next tokens (B, T, vocabulary), or logits (B, classes)."""

    def __init__(self, c: DecoderConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape and input_shape[-1] > c.tokens:
            raise ValueError(
                f"Expected tokens={input_shape[-1]} <= {c.tokens}, the backbone's positions; cut the texts."
            )
        self.embeddings = Embeddings(c, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.depth)])
        self.norm = normalisation(c, rngs)
        own = c.language_model and not c.tied
        self.lm_head: Linear | None = nnx.data(Linear(c.width, c.vocabulary, bias=False, rngs=rngs) if own else None)
        self.head: Linear | None = nnx.data(None if c.language_model else Linear(c.width, classes, rngs=rngs))
        self.config = c

    @property
    def again(self) -> tuple[str, ...]:
        """Leaves that the head reads too."""
        return ("embeddings/token/embedding",) if self.config.language_model and self.config.tied else ()

    def embed(self, x: jax.Array | Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """ids (B, T), alone or in a dict -> {"x": (B, T, D), "ids": (B, T)} and what else was in the dict.

        "place" (B, T) is where each token stands among the real ones of its text, where not all of them are here.
        """
        h = dict(x) if isinstance(x, Mapping) else {"ids": x}
        place = h["place"] if "place" in h else counted(h["ids"] != self.config.pad)
        return {**h, "x": self.embeddings(h["ids"], place)}

    def normalise(self, h: dict[str, jax.Array]) -> dict[str, jax.Array] | jax.Array:
        """Every token's features beside what went along, or those of the last real token, (B, D); without a shallow prompt."""
        x = h["x"][:, h["x"].shape[1] - h["ids"].shape[1] :]
        if self.config.language_model:
            return {**h, "x": self.norm(x)}
        real = h["ids"] != self.config.pad
        last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        return self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])

    def answer(self, h: dict[str, jax.Array] | jax.Array) -> jax.Array:
        """What the head makes of the features."""
        if isinstance(h, Mapping):
            x = h["x"]
            if self.lm_head is not None:
                return self.lm_head(x)
            table = self.embeddings.token.embedding[...]
            return (x.reshape(-1, x.shape[-1]) @ table.T).reshape(*x.shape[:-1], table.shape[0])
        assert self.head is not None  # of a classifier, whose features are an array
        return self.head(h)

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        last = "head" if self.lm_head is None else "lm_head"  # a published leaf is no new head
        return [Stage("embeddings", self.embed), *blocks, Stage("norm", self.normalise), Stage(last, self.answer)]
