"""The same functions as in `kernels.py` and `layers.py`, in the forms that XLA makes the fastest programs of on an NVIDIA GPU.

What is wrong with the plain forms there, and by how much: `docs/accelerators.md`. Reverse mode only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import layout

from fedsim.backbones.forms import wide


def by_rows(x: jax.Array) -> jax.Array:
    """x, which XLA is to keep in memory row by row.

    Before a sum over rows of several lanes it would choose the transpose, for all that leads there too.
    """
    return layout.with_layout_constraint(x, layout.Layout(major_to_minor=tuple(range(x.ndim))))


@jax.custom_vjp
def plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y (..., F) + bias (F,).

    In float32: XLA would hand a sum in the product's own type to the product, with the biases of all lanes written out in
    the size of y.
    """
    return (wide(y) + wide(bias)).astype(y.dtype)


def _plus_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return plus(y, bias), None


def _plus_backward(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    dy = by_rows(dy)
    return dy, jnp.sum(dy, axis=tuple(range(dy.ndim - 1)))


plus.defvjp(_plus_forward, _plus_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """As `kernels.layer_norm`.

    With barriers behind the sums over a row: XLA would put these and all that depends on them into one program, in tiles
    that do not fit into registers.
    """
    y, _ = _normal(x, eps)
    return (y * wide(scale) + wide(bias)).astype(x.dtype)


def _normal(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation over the last axis, and 1 / deviation."""
    x = wide(x)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + eps)
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    return (x - mean) * inverse, inverse


def _norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return layer_norm(x, scale, bias, eps), (x, scale)


def _norm_backward(eps: float, kept: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, scale = kept
    dy = by_rows(dy)
    y, inverse = _normal(x, eps)
    rows = tuple(range(dy.ndim - 1))
    dscale, dbias = jnp.sum(wide(dy) * y, axis=rows), jnp.sum(wide(dy), axis=rows)
    dy = wide(dy) * wide(scale)
    sums = jnp.mean(dy, axis=-1, keepdims=True), jnp.mean(dy * y, axis=-1, keepdims=True)
    whole, along = jax.lax.optimization_barrier(sums)
    dx = (dy - whole - y * along) * inverse
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


layer_norm.defvjp(_norm_forward, _norm_backward)
