"""Layers shared by the backbones: `flax.nnx` modules whose leaves keep their paths whatever PEFT part is attached.

Every parameter is named by its role (`kernel`, `bias`, `scale`, `embedding`, `lora_a`, ...), and the role alone decides
its initial value (`INITIAL`). So a leaf's initial value depends on the seed and its own path, never on which other
leaves the model has: the head starts equal under every PEFT kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Shape = tuple[int, ...]


def _uniform_by_input(key: jax.Array, shape: Shape, dtype: jnp.dtype) -> jax.Array:
    """U(-1/sqrt(in), 1/sqrt(in)) for a shape (in, rank): Kaiming with a = sqrt(5), as LoRA's authors draw A."""
    bound = 1.0 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


INITIAL: dict[str, Callable[[jax.Array, Shape, jnp.dtype], jax.Array]] = {
    "kernel": nnx.initializers.lecun_normal(),
    "bias": nnx.initializers.zeros_init(),
    "scale": nnx.initializers.ones_init(),
    "embedding": nnx.initializers.normal(0.02),
    "lora_a": _uniform_by_input,
    "lora_b": nnx.initializers.zeros_init(),
}


def initial(path: str, key: jax.Array, shape: Shape) -> jax.Array:
    """The initial value (float32) of the leaf at `path`; only the path's last part, its role, matters."""
    return INITIAL[path.rpartition("/")[2]](key, shape, jnp.dtype("float32"))


def param(role: str, shape: Shape, rngs: nnx.Rngs) -> nnx.Param:
    """A new parameter of that role and shape, drawn from the stream `rngs.params`."""
    return nnx.Param(initial(role, rngs.params(), shape))


class Stage(NamedTuple):
    """One step of a backbone's forward pass; `stages()` of a backbone lists them in order, the head last.

    What goes from stage to stage is an array or a dict of arrays with the examples on axis 0, so that it can be kept
    as a data set: the stages below the first trained leaf are run once per example.
    """

    path: str  # prefix of the paths of all its leaves, e.g. "blocks/3"
    run: Callable[[Any], Any]


class Linear(nnx.Module):
    """x (..., in) -> x @ kernel + bias (..., out), plus what PEFT attached."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.kernel = param("kernel", (inputs, outputs), rngs)
        self.bias: nnx.Param | None = nnx.data(param("bias", (outputs,), rngs) if bias else None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0

    def attach_lora(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Adds scale * A B with A (in, rank) random and B (rank, out) zero: the output is unchanged at the start."""
        inputs, outputs = self.kernel.shape
        self.lora_a = param("lora_a", (inputs, rank), rngs)
        self.lora_b = param("lora_b", (rank, outputs), rngs)
        self.lora_scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]  # under vmap over clients a frozen kernel stays unbatched: one shared matmul
        if self.lora_a is not None and self.lora_b is not None:
            # Through the rank, never as kernel + A B: that would make one full matrix per client.
            y = y + ((x @ self.lora_a[...]) * self.lora_scale) @ self.lora_b[...]
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """ids (...) int -> rows (..., width) of a table; ids beyond the table take its last row."""

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.embedding = param("embedding", (size, width), rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


class LayerNorm(nnx.Module):
    """Normalises the last axis to mean 0 and variance 1, then scale and bias.

    Our own, because nnx.LayerNorm promotes dtypes implicitly, which strict promotion refuses.
    """

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (width,), rngs)
        self.bias = param("bias", (width,), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]


class Attention(nnx.Module):
    """Multi-head self-attention for short sequences: the (T, T) scores are materialised."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)
        self.output = Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x (B, T, D), mask (B, T) bool, true where a token may be looked at -> (B, T, D)."""

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)  # (B, T, H, D/H)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
        if mask is not None:
            # Finite, so that a row without any token (an empty slot of a batch) has no NaN, nor its gradient.
            scores = jnp.where(mask[:, None, None, :], scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
        return self.output(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """x (..., D) -> down(activation(up(x))) (..., D), the feed-forward half of a transformer block."""

    def __init__(self, width: int, hidden: int, activation: Callable[[jax.Array], jax.Array], *, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) with the exact error function, as BERT and ViT checkpoints were trained."""
    return jax.nn.gelu(x, approximate=False)
