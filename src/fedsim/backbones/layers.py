"""Layers shared by the backbones: `flax.nnx` modules whose leaves keep their paths whatever PEFT part is attached.

Every parameter is named by its role (`kernel`, `bias`, `scale`, `embedding`, `lora_a`, ...), and the role alone decides
its initial value (`INITIAL`). So a leaf's initial value depends on the seed and its own path, never on which other
leaves the model has: the head starts equal under every PEFT kind. What PEFT attaches has roles of its own (`ADDED`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.attention import attend, even, may_take_cudnn
from fedsim.backbones.kernels import layer_norm, plus

Shape = tuple[int, ...]
Activation = Callable[[jax.Array], jax.Array]


def _uniform(bound: Callable[[Shape], float]) -> nnx.Initializer:
    def draw(key: jax.Array, shape: Shape, dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound(shape), bound(shape))

    return draw


ZEROS, ONES, NORMAL = nnx.initializers.zeros_init(), nnx.initializers.ones_init(), nnx.initializers.normal(0.02)

INITIAL: dict[str, nnx.Initializer] = {
    "kernel": nnx.initializers.lecun_normal(),
    "bias": ZEROS,
    "scale": ONES,
    "gamma": ONES,  # LayerScale
    "mean": ZEROS,  # batch norm's statistics
    "variance": ONES,
    "embedding": NORMAL,
    "cls": NORMAL,
    "position": NORMAL,
    # Attached by PEFT. A as LoRA's authors draw it: Kaiming uniform with a = sqrt(5), which is 1/sqrt(in).
    "lora_a": _uniform(lambda shape: 1 / math.sqrt(shape[0])),
    "lora_b": ZEROS,
    "magnitude": ONES,  # `peft.start` puts the kernel's column norms in its place
    "ia3": ONES,
    "down_kernel": NORMAL,
    "down_bias": ZEROS,
    "up_kernel": ZEROS,
    "up_bias": ZEROS,
    "prompt": _uniform(lambda shape: math.sqrt(3 / shape[-1])),  # VPT's bound for ViT-B/16: sqrt(6 / (3 * 16^2 + 768))
    "prefix_key": NORMAL,
    "prefix_value": NORMAL,
}

STATISTICS = frozenset({"mean", "variance", "var"})
"""Roles that are never trained: no gradient is meant for them. flax says var."""

ADDED = frozenset(list(INITIAL)[list(INITIAL).index("lora_a") :])
"""Roles that only PEFT attaches; no checkpoint of a backbone holds them."""


def initial(path: str, key: jax.Array, shape: Shape) -> jax.Array:
    """The initial value (float32) of the leaf at `path`; only the path's last part, its role, matters."""
    return INITIAL[path.rpartition("/")[2]](key, shape, jnp.dtype("float32"))


class NoRngs(nnx.Rngs):
    """For modules of which only shapes matter: nothing is drawn, which makes tracing a large one take seconds less."""

    def __init__(self) -> None:
        pass


def param(role: str, shape: Shape, rngs: nnx.Rngs) -> nnx.Param:
    """A new parameter of that role and shape, drawn from the stream `rngs.params`; zeros of `NoRngs`."""
    drawn = not isinstance(rngs, NoRngs)
    return nnx.Param(initial(role, rngs.params(), shape) if drawn else jnp.zeros(shape, jnp.float32))


class Stage(NamedTuple):
    """One step of a backbone's forward pass; `stages()` of a backbone lists them in order, the head last.

    What goes from stage to stage is an array or a dict of arrays with the examples on axis 0, so that it can be kept
    as a data set: the stages below the first trained leaf are run once per example.
    """

    path: str  # prefix of the paths of all its leaves, e.g. "blocks/3"
    run: Callable[[Any], Any]


class Skeleton(NamedTuple):
    """A backbone with its head and what PEFT attached, before it is known what is trained."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    """Every leaf."""
    stages: list[str]
    """Prefix of each stage's leaves, in the order of the forward pass, the head's last."""
    run: Callable[[Mapping[str, Any], Any, int, int], Any]
    """(leaves, h, start, stop) -> h after the stages start..stop - 1; leaves of other stages may be absent."""
    again: frozenset[str] = frozenset()
    """Leaves that the last stage reads beside its own: a token embedding that is the output too."""


class Linear(nnx.Module):
    """x (..., in) -> x @ kernel + bias (..., out), plus what PEFT attached."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.kernel = param("kernel", (inputs, outputs), rngs)
        self.bias: nnx.Param | None = nnx.data(param("bias", (outputs,), rngs) if bias else None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0
        self.magnitude: nnx.Param | None = nnx.data(None)
        self.ia3: nnx.Param | None = nnx.data(None)
        self.ia3_input = False

    def attach_lora(self, rank: int, scale: float, rngs: nnx.Rngs, *, dora: bool = False) -> None:
        """Adds scale * A B with A (in, rank) random and B (rank, out) zero: the output is unchanged at the start.

        Args:
            dora: give the sum kernel + scale * A B a trained length per output (Liu et al. 2024, arXiv 2402.09353).
        """
        inputs, outputs = self.kernel.shape
        self.lora_a = param("lora_a", (inputs, rank), rngs)
        self.lora_b = param("lora_b", (rank, outputs), rngs)
        self.lora_scale = scale
        if dora:
            self.magnitude = param("magnitude", (outputs,), rngs)

    def attach_ia3(self, rngs: nnx.Rngs, *, on_input: bool = False) -> None:
        """Scales every output, or every input, by a trained number that starts at one."""
        self.ia3 = param("ia3", self.kernel.shape[:1] if on_input else self.kernel.shape[1:], rngs)
        self.ia3_input = on_input

    def __call__(self, x: jax.Array) -> jax.Array:
        # One row axis: the weights' gradients sum over it. Over (B, T) XLA on a CPU would transpose a copy of x first.
        rows = x.reshape(-1, x.shape[-1])
        if self.ia3 is not None and self.ia3_input:
            rows = rows * self.ia3[...]
        y = rows @ self.kernel[...]  # under vmap over clients a frozen kernel stays unbatched: one shared matmul
        if self.lora_a is not None and self.lora_b is not None:
            # Through the rank, never as kernel + A B: that would make one full matrix per client.
            y = y + ((rows @ self.lora_a[...]) * self.lora_scale) @ self.lora_b[...]
            if self.magnitude is not None:
                length = column_norms(self.kernel[...], self.lora_a[...], self.lora_b[...], self.lora_scale)
                # DoRA's section 4.3: the length is a constant to the gradient.
                y = y * per_length(self.magnitude[...], jax.lax.stop_gradient(length))
        if self.bias is not None:
            y = plus(y, self.bias[...])
        if self.ia3 is not None and not self.ia3_input:
            y = y * self.ia3[...]
        return y.reshape(*x.shape[:-1], y.shape[-1])


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Lengths (out,) of the columns of kernel + scale * A B, without making that matrix: |w|^2 + 2 s w.ab + s^2 |ab|^2.

    Zero for a column whose square is no normal number.
    """
    cross = jnp.sum((a.T @ kernel) * b, axis=0)
    square = jnp.sum(((a.T @ a) @ b) * b, axis=0)
    total = jnp.sum(kernel * kernel, axis=0) + 2 * scale * cross + scale * scale * square
    return jnp.sqrt(jnp.where(total >= jnp.finfo(total.dtype).tiny, total, 0.0))


def per_length(magnitude: jax.Array, length: jax.Array) -> jax.Array:
    """magnitude / length (out,), and 0 for a column without a direction: it stays zero, and so do its gradients."""
    there = length > 0
    return jnp.where(there, magnitude / jnp.where(there, length, 1.0), 0.0)


class Adapter(nnx.Module):
    """x (..., D) -> scale * (activation(x @ down + bias) @ up + bias) (..., D); zero at the start, as up is."""

    def __init__(
        self, width: int, bottleneck: int, activation: Activation, scale: float = 1.0, *, rngs: nnx.Rngs
    ) -> None:
        self.down_kernel = param("down_kernel", (width, bottleneck), rngs)
        self.down_bias = param("down_bias", (bottleneck,), rngs)
        self.up_kernel = param("up_kernel", (bottleneck, width), rngs)
        self.up_bias = param("up_bias", (width,), rngs)
        self.activation = activation
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.activation(plus(x @ self.down_kernel[...], self.down_bias[...]))
        return plus(hidden @ self.up_kernel[...], self.up_bias[...]) * self.scale


class Embedding(nnx.Module):
    """ids (...) int -> rows (..., width) of a table; ids beyond the table take its last row."""

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.embedding = param("embedding", (size, width), rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


class LayerNorm(nnx.Module):
    """Normalises the last axis to mean 0 and variance 1, then scale and bias.

    Our own, because nnx.LayerNorm promotes dtypes implicitly, which strict promotion refuses. Computed in at least
    float32, returned in x's dtype.
    """

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (width,), rngs)
        self.bias = param("bias", (width,), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class Projections(nnx.Module):
    """The four linear maps of a multi-head attention, and what PEFT attaches to it; its kinds know an attention by it."""

    def __init__(self, width: int, heads: int, shared: int = 1, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        """The maps of `heads` heads, of which `shared` have keys and values in common."""
        self.query = Linear(width, width, bias=bias, rngs=rngs)
        self.key = Linear(width, width // shared, bias=bias, rngs=rngs)
        self.value = Linear(width, width // shared, bias=bias, rngs=rngs)
        self.output = Linear(width, width, bias=bias, rngs=rngs)
        self.heads = heads
        self.adapter: Adapter | None = nnx.data(None)
        self.prefix_key: nnx.Param | None = nnx.data(None)
        self.prefix_value: nnx.Param | None = nnx.data(None)

    def attach_prefix(self, tokens: int, rngs: nnx.Rngs) -> None:
        """Adds trained keys and values (tokens, width of the keys) that every query may look at."""
        width = self.key.kernel.shape[1]
        self.prefix_key = param("prefix_key", (tokens, width), rngs)
        self.prefix_value = param("prefix_value", (tokens, width), rngs)


class Attention(Projections):
    """Multi-head self-attention for short sequences."""

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, read: int | None = None) -> jax.Array:
        """x (B, T, D), mask (B, T) bool, true where a token may be looked at -> (B, T, D).

        Args:
            read: return only the first so many tokens, (B, read, D), and ask for no others.
        """
        size, tokens, width = x.shape
        depth = width // self.heads

        def split(y: jax.Array) -> jax.Array:
            """(B, T, D) -> (B, T, H, D/H)."""
            return y.reshape(size, y.shape[1], self.heads, depth)

        keys = None
        if mask is None and read is None and self.prefix_key is None and may_take_cudnn(tokens, depth, x.dtype):
            # cuDNN wants an even number: here a token more is written by the norm before, which writes them all anyway.
            x, keys = even(x), tokens
        query, key, value = self.query(x[:, :read]), self.key(x), self.value(x)
        if self.prefix_key is not None and self.prefix_value is not None:
            key, value = append(key, self.prefix_key[...]), append(value, self.prefix_value[...])
            mask = None if mask is None else append_true(mask, self.prefix_key.shape[0])
        mixed = attend(split(query * depth**-0.5), split(key), split(value), mask, keys)
        y = self.output(mixed.reshape(size, -1, width))[:, :tokens]
        return y if self.adapter is None else y + self.adapter(y)


def append(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """x (B, T, D), tokens (n, D) -> (B, T + n, D): the same tokens after those of every example."""
    return jnp.concatenate([x, jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))], axis=1)


def append_true(mask: jax.Array, count: int) -> jax.Array:
    """mask (B, T) -> (B, T + count), true for what was appended."""
    return jnp.concatenate([mask, jnp.ones((mask.shape[0], count), mask.dtype)], axis=1)


class MLP(nnx.Module):
    """x (..., D) -> down(activation(up(x))) (..., D), the feed-forward half of a transformer block."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)
        self.activation = activation
        self.adapter: Adapter | None = nnx.data(None)
        self.parallel = False

    def inner(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> its hidden features (..., hidden)."""
        return self.activation(self.up(x))

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """x, and what the block adds the result to where that is not x (pre-norm): a parallel adapter reads it."""
        y = self.down(self.inner(x))
        if self.adapter is None:
            return y
        if self.parallel:
            return y + self.adapter(x if residual is None else residual)
        return y + self.adapter(y)
