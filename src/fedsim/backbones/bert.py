"""BERT, an encoder of token sequences (Devlin et al. 2019, arXiv 1810.04805), post-norm, with a classification head.

Input: int32 token ids (B, T), padded with the pad id on either side; the attention mask is derived from it. There is no dropout:
clients take few steps, and two runs of one seed are equal. Parity with the reference is tested in
`tests/backbones/test_bert.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.kernels import gelu
from fedsim.backbones.layers import MLP, Attention, Embedding, LayerNorm, Linear, Shape, Stage, append, append_true


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT; the defaults are BERT-base's (uncased)."""

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    offset: int = 0
    """Row of the first token's position: RoBERTa's table begins with rows that no token uses."""
    types: int = 2
    eps: float = 1e-12
    pad: int = 0
    pool: Literal["mean", "cls", "pooler"] = "pooler"
    """Features: mean over real tokens (sentence encoders), the first token, or tanh(dense(first token)) (BERT)."""
    fold: bool = False
    """Take token ids modulo the vocabulary, so that a tiny model reads any tokenizer's ids."""

    @property
    def tokens(self) -> int:
        """The longest text it reads, in tokens."""
        return self.positions - self.offset


class Embeddings(nnx.Module):
    """Token + position + type embeddings, normalised."""

    def __init__(self, c: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.token = Embedding(c.vocabulary, c.width, rngs=rngs)
        self.position = Embedding(c.positions, c.width, rngs=rngs)
        self.type = Embedding(c.types, c.width, rngs=rngs)
        self.norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.config = c

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (B, T) -> (B, T, D); every token is of type 0, a single sentence."""
        # Slices of both tables, not gathers: their gradients are cheap. No token's row depends on the mask: BERT counts
        # columns, and RoBERTa's ids come with their padding last (`Bert.embed`).
        tokens, offset = ids.shape[-1], self.config.offset
        if tokens > self.config.tokens:
            raise ValueError(
                f"Expected tokens={tokens} <= {self.config.tokens}, the backbone's positions; cut the texts."
            )
        position = self.position.embedding[...][offset : offset + tokens]
        return self.norm(self.token(ids) + position + self.type.embedding[...][0])


class Block(nnx.Module):
    """Attention and MLP, each followed by residual sum and LayerNorm (post-norm).

    Args:
        read: how many tokens, the first ones, are read by what follows: only they are computed beyond keys and values.
    """

    def __init__(self, c: BertConfig, read: int | None = None, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(c.width, c.heads, rngs=rngs)
        self.norm1 = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.mlp = MLP(c.width, c.hidden, gelu, rngs=rngs)
        self.norm2 = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.prompt: nnx.Param | None = nnx.data(None)
        self.keep_prompt = False
        self.read = read

    def __call__(self, h: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, mask = h["x"], h["mask"]
        if self.prompt is not None:
            x, mask = append(x, self.prompt[...]), append_true(mask, self.prompt.shape[0])
        x = self.norm1(x[:, : self.read] + self.attention(x, mask, self.read))
        x = self.norm2(x + self.mlp(x))
        if self.prompt is not None and not self.keep_prompt:
            x, mask = x[:, : h["x"].shape[1]], h["mask"]
        return {"x": x, "mask": mask[:, : self.read]}


class Bert(nnx.Module):
    """Token ids (B, T) -> logits (B, classes)."""

    def __init__(self, c: BertConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape and input_shape[-1] > c.tokens:
            raise ValueError(
                f"Expected tokens={input_shape[-1]} <= {c.tokens}, the backbone's positions; cut the texts."
            )
        self.embeddings = Embeddings(c, rngs=rngs)
        last = None if c.pool == "mean" else 1
        self.blocks = nnx.List([Block(c, last if i == c.depth - 1 else None, rngs=rngs) for i in range(c.depth)])
        self.pooler: Linear | None = nnx.data(Linear(c.width, c.width, rngs=rngs) if c.pool == "pooler" else None)
        self.head = Linear(c.width, classes, rngs=rngs)
        self.config = c

    def embed(self, ids: jax.Array) -> dict[str, jax.Array]:
        """ids (B, T) -> {"x": (B, T, D), "mask": (B, T) bool, true for real tokens}.

        RoBERTa numbers the real tokens alone: its ids are sorted first. BERT numbers columns: where features are the first
        token's, the first real one is brought to the front after that.
        """
        c = self.config
        ids = padding_last(ids, ids != c.pad) if c.offset else ids
        x, mask = self.embeddings(ids % c.vocabulary if c.fold else ids), ids != c.pad
        if c.pool != "mean" and not c.offset:
            x, mask = padding_last(x, mask), padding_last(mask, mask)
        return {"x": x, "mask": mask}

    def pool(self, h: dict[str, jax.Array]) -> jax.Array:
        """Features (B, D) of whole sequences; a shallow prompt, which came along up to here, is left out."""
        if self.config.pool != "mean":
            first = h["x"][:, 0]
            return first if self.pooler is None else jnp.tanh(self.pooler(first))
        first_block = self.blocks[0]
        kept = first_block.prompt.shape[0] if first_block.keep_prompt and first_block.prompt is not None else 0
        x, mask = (leaf[:, : leaf.shape[1] - kept] for leaf in (h["x"], h["mask"]))
        mask = mask.astype(x.dtype)[..., None]  # (B, T, 1)
        # An empty slot of a batch has no token at all: 0 / 1, not 0 / 0.
        return jnp.sum(x * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        return [Stage("embeddings", self.embed), *blocks, Stage("pooler", self.pool), Stage("head", self.head)]


def padding_last(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x (B, T, ...) with the rows where mask (B, T) is true in front, in their order; as it is where they are there already."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1, mode="promise_in_bounds")
