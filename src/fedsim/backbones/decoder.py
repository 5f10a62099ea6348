"""Causal decoders of token sequences in Llama's layout (Touvron et al. 2023, arXiv 2302.13971), pre-norm, without biases.

RMSNorm, rotary positions, grouped queries (Ainslie et al. 2023, 2305.13245), SwiGLU. As a language model its outputs are a
score of every token of the vocabulary for what comes next, by the token embedding itself (tied); as a classifier it has a
head on the last real token.

Input: int32 token ids (B, T), padded with the pad id on either side; or a dict with them as "ids", and "loss" (B, T), 1 for the
tokens that the loss of a language model is about (default: all). The ids go along from stage to stage, since a loss needs
them where the first stages' outputs are kept in place of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedsim.backbones.attention import attend
from fedsim.backbones.forms import wide
from fedsim.backbones.layers import MLP, Embedding, Linear, Projections, Shape, Stage, param


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; the defaults are for trying things out."""

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
    """Token embeddings; positions come with the attention."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.token = Embedding(c.vocabulary, c.width, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (B, T) -> (B, T, D)."""
        return self.token(ids)


class CausalAttention(Projections):
    """Attention of every token to itself and those before it; keys and values of a prefix are seen by all."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c.width, c.heads, c.heads // c.kv_heads, bias=False, rngs=rngs)
        self.theta = c.theta

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x (B, T, D), mask (B, T) bool, true where a token may be looked at -> (B, T, D)."""
        size, tokens, width = x.shape
        depth = width // self.heads

        def split(y: jax.Array) -> jax.Array:
            """(B, T, h d) -> (B, T, h, d)."""
            return y.reshape(size, y.shape[1], -1, depth)

        query, key, value = (split(linear(x)) for linear in (self.query, self.key, self.value))
        query, key = rotated(query, self.theta), rotated(key, self.theta)
        if self.prefix_key is not None and self.prefix_value is not None:
            before = self.prefix_key.shape[0]
            key, value = (
                jnp.concatenate([split(jnp.broadcast_to(p[...], (size, *p.shape))), y], axis=1)
                for p, y in ((self.prefix_key, key), (self.prefix_value, value))
            )
            mask = jnp.concatenate([jnp.ones((size, before), bool), mask], axis=1)
        shared = self.heads // key.shape[2]
        key, value = (jnp.repeat(y, shared, axis=2) for y in (key, value))
        mixed = attend(query * depth**-0.5, key, value, mask, causal=True)
        y = self.output(mixed.reshape(size, tokens, width))
        return y if self.adapter is None else y + self.adapter(y)


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """x (B, T, H, d): the pairs (i, i + d/2) of each head turned by token * theta^(-2i/d) (Su et al. 2021, arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)  # (T, d/2)
    cos, sin = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    a, b = wide(x[..., :half]), wide(x[..., half:])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class GatedMLP(MLP):
    """x (..., D) -> down(silu(gate(x)) * up(x)) (..., D) (SwiGLU; Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(width, hidden, jax.nn.silu, bias=False, rngs=rngs)
        self.gate = Linear(width, hidden, bias=False, rngs=rngs)

    def inner(self, x: jax.Array) -> jax.Array:
        return self.activation(self.gate(x)) * self.up(x)


class Block(nnx.Module):
    """RMSNorm and attention, RMSNorm and MLP, each added to its input."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = RMSNorm(c.width, eps=c.eps, rngs=rngs)
        self.attention = CausalAttention(c, rngs=rngs)
        self.norm2 = RMSNorm(c.width, eps=c.eps, rngs=rngs)
        self.mlp = GatedMLP(c.width, c.hidden, rngs=rngs)
        self.pad = c.pad

    def __call__(self, h: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x = h["x"]
        x = x + self.attention(self.norm1(x), h["ids"] != self.pad)
        return {**h, "x": x + self.mlp(self.norm2(x), x)}


class Decoder(nnx.Module):
    """Token ids (B, T) -> scores of the next tokens (B, T, vocabulary), or logits (B, classes)."""

    def __init__(self, c: DecoderConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape and input_shape[-1] > c.tokens:
            raise ValueError(
                f"Expected tokens={input_shape[-1]} <= {c.tokens}, the backbone's positions; cut the texts."
            )
        self.embeddings = Embeddings(c, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.depth)])
        self.norm = RMSNorm(c.width, eps=c.eps, rngs=rngs)
        self.head: Linear | None = nnx.data(None if c.language_model else Linear(c.width, classes, rngs=rngs))
        self.config = c

    @property
    def again(self) -> tuple[str, ...]:
        """Leaves that the head reads too."""
        return ("embeddings/token/embedding",) if self.config.language_model else ()

    def embed(self, x: jax.Array | Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """ids (B, T), alone or in a dict -> {"x": (B, T, D), "ids": (B, T)} and what else was in the dict."""
        h = dict(x) if isinstance(x, Mapping) else {"ids": x}
        return {**h, "x": self.embeddings(h["ids"])}

    def normalise(self, h: dict[str, jax.Array]) -> dict[str, jax.Array] | jax.Array:
        """Every token's features beside what went along, or those of the last real token, (B, D)."""
        if self.config.language_model:
            return {**h, "x": self.norm(h["x"])}
        real = h["ids"] != self.config.pad
        last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        return self.norm(jnp.take_along_axis(h["x"], last[:, None, None], axis=1)[:, 0])

    def answer(self, h: dict[str, jax.Array] | jax.Array) -> jax.Array:
        """What the head makes of the features."""
        if isinstance(h, Mapping):
            x = h["x"]
            table = self.embeddings.token.embedding[...]
            return (x.reshape(-1, x.shape[-1]) @ table.T).reshape(*x.shape[:-1], table.shape[0])
        assert self.head is not None  # of a classifier, whose features are an array
        return self.head(h)

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        return [Stage("embeddings", self.embed), *blocks, Stage("norm", self.normalise), Stage("head", self.answer)]
