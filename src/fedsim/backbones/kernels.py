"""Functions between a transformer's matrix products whose derivative is written by hand; `docs/kernels.md` has the why.

Both are computed in at least float32 and returned in their input's dtype, so a bfloat16 model keeps exact statistics.
Forward and reverse mode work, as do `vmap` and rematerialisation: the rules are `custom_jvp`, of plain operations.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from fedsim.backbones import gpu
from fedsim.backbones.forms import takes, wide


def plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y (..., F) + bias (F,)."""
    if takes("bias"):
        return gpu.plus(y, bias)
    return y + bias


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """x (..., D) with mean 0 and variance 1 over D, times scale (D,), plus bias (D,); in float32, returned in x's dtype."""
    if takes("norm"):
        return gpu.layer_norm(x, scale, bias, eps)
    return (normalise(x, eps) * wide(scale) + wide(bias)).astype(x.dtype)


def normal_cdf(x: jax.Array) -> jax.Array:
    """Phi(x) by the error function; below -3 its absolute error stays at 6e-8, its relative error grows."""
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) with the exact error function, as BERT and ViT checkpoints were trained.

    Not `jax.nn.gelu`, which takes erfc: XLA writes that out as three branches and evaluates all of them; erf is one
    quotient of polynomials.
    """
    y = wide(x)
    return (y * normal_cdf(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = wide(x)
    cdf, density = normal_cdf(y), jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    return (y * cdf).astype(x.dtype), dx * (cdf + y * density).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalise(x: jax.Array, eps: float) -> jax.Array:
    """x (..., D) with mean 0 and variance 1 over the last axis; in at least float32, whatever x is."""
    return _centred(x, eps)[0]


@normalise.defjvp
def _normalise_jvp(eps: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, scale = _centred(primals[0], eps)
    dx = wide(tangents[0])
    along = jnp.mean(y * dx, axis=-1, keepdims=True)
    return y, (dx - jnp.mean(dx, axis=-1, keepdims=True) - y * along) * scale


def _centred(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation and 1 / deviation."""
    x = wide(x)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale, scale
