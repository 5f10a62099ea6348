"""BERT, an encoder of token sequences (Devlin et al. 2019, arXiv 1810.04805), post-norm, with a classification head.

Input: int32 token ids (B, T), padded with the pad id; the attention mask is derived from it. There is no dropout:
clients take few steps, and two runs of one seed are equal. Parity with the reference is tested in
`tests/backbones/test_bert.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.layers import MLP, Attention, Embedding, LayerNorm, Linear, Stage, gelu


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT; the defaults are BERT-base's (uncased)."""

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    types: int = 2
    eps: float = 1e-12
    pad: int = 0
    pool: Literal["mean", "cls", "pooler"] = "pooler"
    """Features: mean over real tokens (sentence encoders), the first token, or tanh(dense(first token)) (BERT)."""
    fold: bool = False
    """Take token ids modulo the vocabulary, so that a tiny model reads any tokenizer's ids."""


class Embeddings(nnx.Module):
    """Token + position + type embeddings, normalised."""

    def __init__(self, c: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.token = Embedding(c.vocabulary, c.width, rngs=rngs)
        self.position = Embedding(c.positions, c.width, rngs=rngs)
        self.type = Embedding(c.types, c.width, rngs=rngs)
        self.norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (B, T) -> (B, T, D); every token is of type 0, a single sentence."""
        # position.embedding[:T] and type.embedding[0] are slices, not gathers: their gradients are cheap.
        tokens, positions = ids.shape[-1], self.position.embedding.shape[0]
        if tokens > positions:
            raise ValueError(f"Expected tokens={tokens} <= {positions}, the backbone's positions; cut the texts.")
        position = self.position.embedding[...][:tokens]
        return self.norm(self.token(ids) + position + self.type.embedding[...][0])


class Block(nnx.Module):
    """Attention and MLP, each followed by residual sum and LayerNorm (post-norm)."""

    def __init__(self, c: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(c.width, c.heads, rngs=rngs)
        self.norm1 = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.mlp = MLP(c.width, c.hidden, gelu, rngs=rngs)
        self.norm2 = LayerNorm(c.width, eps=c.eps, rngs=rngs)

    def __call__(self, h: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x = self.norm1(h["x"] + self.attention(h["x"], h["mask"]))
        return {"x": self.norm2(x + self.mlp(x)), "mask": h["mask"]}


class Bert(nnx.Module):
    """Token ids (B, T) -> logits (B, classes)."""

    def __init__(self, c: BertConfig, classes: int, *, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(c, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.depth)])
        self.pooler: Linear | None = nnx.data(Linear(c.width, c.width, rngs=rngs) if c.pool == "pooler" else None)
        self.head = Linear(c.width, classes, rngs=rngs)
        self.config = c

    def embed(self, ids: jax.Array) -> dict[str, jax.Array]:
        """ids (B, T) -> {"x": (B, T, D), "mask": (B, T) bool, true for real tokens}."""
        c = self.config
        return {"x": self.embeddings(ids % c.vocabulary if c.fold else ids), "mask": ids != c.pad}

    def pool(self, h: dict[str, jax.Array]) -> jax.Array:
        """Features (B, D) of whole sequences."""
        if self.config.pool == "mean":
            mask = h["mask"].astype(h["x"].dtype)[..., None]  # (B, T, 1)
            # An empty slot of a batch has no token at all: 0 / 1, not 0 / 0.
            return jnp.sum(h["x"] * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        first = h["x"][:, 0]
        return first if self.pooler is None else jnp.tanh(self.pooler(first))

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        return [Stage("embeddings", self.embed), *blocks, Stage("pooler", self.pool), Stage("head", self.head)]


# Our module path -> the module in the Hugging Face checkpoint; {i} is any block. See `load.py`.
HUGGING_FACE: dict[str, str] = {
    "embeddings/token": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "blocks/{i}/attention/query": "encoder.layer.{i}.attention.self.query",
    "blocks/{i}/attention/key": "encoder.layer.{i}.attention.self.key",
    "blocks/{i}/attention/value": "encoder.layer.{i}.attention.self.value",
    "blocks/{i}/attention/output": "encoder.layer.{i}.attention.output.dense",
    "blocks/{i}/norm1": "encoder.layer.{i}.attention.output.LayerNorm",
    "blocks/{i}/mlp/up": "encoder.layer.{i}.intermediate.dense",
    "blocks/{i}/mlp/down": "encoder.layer.{i}.output.dense",
    "blocks/{i}/norm2": "encoder.layer.{i}.output.LayerNorm",
    "pooler": "pooler.dense",
}


def hugging_face_config(c: BertConfig) -> dict[str, Any]:
    """What the checkpoint's `config.json` must say where it speaks of it: most of it shows in no leaf's shape."""
    return {
        "model_type": "bert",
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": c.eps,
        "position_embedding_type": "absolute",
        "pad_token_id": c.pad,
        "is_decoder": False,
    }
