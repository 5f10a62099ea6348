"""Layers of convolutional backbones: images are (B, H, W, C), kernels (height, width, in, out)."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from fedsim.backbones.forms import wide
from fedsim.backbones.layers import param


class Conv(nnx.Module):
    """x (B, H, W, in) -> (B, H', W', out), in the form that is fastest where it runs; see `convolve`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        matmul: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param("kernel", (size, size, inputs // groups, outputs), rngs)
        self.bias: nnx.Param | None = nnx.data(param("bias", (outputs,), rngs) if bias else None)
        self.stride, self.padding, self.groups, self.matmul = stride, padding, groups, matmul

    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolve(x, self.kernel[...], self.stride, self.padding, self.groups, matmul=self.matmul)
        return y if self.bias is None else y + self.bias[...]


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1, *, matmul: bool = False
) -> jax.Array:
    """x (B, H, W, in), kernel (h, w, in / groups, out) -> (B, H', W', out); the form changes rounding only.

    Accelerators get XLA's convolution. On a CPU its gradients are 5 to 100 times slower inside a compiled loop than
    outside, and kernels of clients' own make it a grouped one under `vmap` (docs/kernels.md). So there, what has a form
    that is faster in every pass takes it: a depthwise convolution as a sum of shifted products, one of 1x1 as a matmul.
    The others keep XLA's forward pass and get the gradient of the kernel by a matmul over patches.

    Args:
        groups: 1, or the number of channels.
        matmul: make it a matmul over patches on a CPU: for kernels that every client has of its own.
    """

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if groups == 1 and not matmul and kernel.shape[0] > 1:
            return spatial(x, kernel, stride, padding)
        return unfolded(x, kernel, stride, padding, groups)

    def elsewhere(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain(x, kernel, stride, padding, groups)

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def plain(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    """XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def unfolded(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    """The same as one matmul over patches; a depthwise one as a sum of shifted products."""
    around, size = (padding, padding), kernel.shape[0]
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    if groups == 1:
        return jnp.concatenate(shifted(x, size, stride), axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    taps = kernel.reshape(size * size, -1)  # (h * w, channels): each output reads one input
    return reduce(jnp.add, (part * tap for part, tap in zip(shifted(x, size, stride), taps, strict=True)))


def shifted(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """x (B, H, W, C) -> for every tap of a kernel, row by row, the pixels under it: (B, H', W', C) each."""
    height, width = (stride * ((n - size) // stride) + 1 for n in x.shape[1:3])
    taps = [(i, j) for i in range(size) for j in range(size)]
    return [x[:, i : i + height : stride, j : j + width : stride] for i, j in taps]


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def spatial(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """XLA's convolution, but linear in the kernel as a matmul over patches, so that its transpose is one too."""
    return plain(x, kernel, stride, padding)


def _spatial_jvp(stride: int, padding: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (along_x, along_kernel) = primals, tangents
    y = spatial(x, kernel, stride, padding)
    along = jnp.zeros_like(y)
    if not isinstance(along_x, SymbolicZero):
        along += plain(along_x, kernel, stride, padding)
    if not isinstance(along_kernel, SymbolicZero):  # of a frozen kernel it is: no patches
        along += unfolded(x, along_kernel, stride, padding)
    return y, along


spatial.defjvp(_spatial_jvp, symbolic_zeros=True)


class BatchNorm(nnx.Module):
    """Batch norm with frozen statistics: an affine map per channel that no other example of the batch enters.

    Like GroupNorm, computed in at least float32 and returned in x's dtype.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (channels,), rngs)
        self.bias = param("bias", (channels,), rngs)
        self.mean = param("mean", (channels,), rngs)
        self.variance = param("variance", (channels,), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = wide(self.scale[...]) * jax.lax.rsqrt(wide(self.variance[...]) + self.eps)
        return (wide(x) * factor + (wide(self.bias[...]) - wide(self.mean[...]) * factor)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises each example over groups of channels and all pixels, then scale and bias per channel."""

    def __init__(self, channels: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (channels,), rngs)
        self.bias = param("bias", (channels,), rngs)
        self.groups = math.gcd(32, channels)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = wide(x).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)  # (B, H * W, G, C / G)
        centred = grouped - jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(centred * centred, axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normal * wide(self.scale[...]) + wide(self.bias[...])).astype(x.dtype)


Norm = Literal["batch", "group"]


def normalisation(kind: Norm, channels: int, rngs: nnx.Rngs) -> BatchNorm | GroupNorm:
    """The layer of that kind."""
    return BatchNorm(channels, rngs=rngs) if kind == "batch" else GroupNorm(channels, rngs=rngs)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Largest value of each window of (B, H, W, C); what is added around is never the largest."""
    around = (padding, padding)
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), ((0, 0), around, around, (0, 0))
    )


def max_pool_halves(x: jax.Array) -> jax.Array:
    """2x2 windows without overlap, by reshaping: its gradient is cheaper than that of `max_pool`; odd edges fall off."""
    size, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(x.reshape(size, height // 2, 2, width // 2, 2, channels), axis=(2, 4))
