"""Layers of convolutional backbones: images are (B, H, W, C), kernels (height, width, in, out)."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.layers import param


class Conv(nnx.Module):
    """x (B, H, W, in) -> (B, H', W', out), by XLA's convolution or as one matmul over patches.

    A convolution whose own kernels differ from client to client is a grouped one under `vmap`, three to five times
    slower per client on CPUs; as a matmul over patches it is a batched matmul. A frozen kernel stays one convolution.
    """

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
        kernel, around = self.kernel[...], (self.padding, self.padding)
        if self.matmul:
            x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
            y = patches(x, kernel.shape[0], self.stride) @ kernel.reshape(-1, kernel.shape[-1])
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                (around, around),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return y if self.bias is None else y + self.bias[...]


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """x (B, H, W, C) -> (B, H', W', size * size * C): the pixels under each place of a kernel, row by row."""
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])

    def shifted(i: int, j: int) -> jax.Array:
        return x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]

    return jnp.concatenate([shifted(i, j) for i in range(size) for j in range(size)], axis=-1)


class BatchNorm(nnx.Module):
    """Batch norm with frozen statistics: an affine map per channel that no other example of the batch enters."""

    def __init__(self, channels: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (channels,), rngs)
        self.bias = param("bias", (channels,), rngs)
        self.mean = param("mean", (channels,), rngs)
        self.variance = param("variance", (channels,), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(self.variance[...] + self.eps)
        return x * factor + (self.bias[...] - self.mean[...] * factor)


class GroupNorm(nnx.Module):
    """Normalises each example over groups of channels and all pixels, then scale and bias per channel."""

    def __init__(self, channels: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> None:
        self.scale = param("scale", (channels,), rngs)
        self.bias = param("bias", (channels,), rngs)
        self.groups = math.gcd(32, channels)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)  # (B, H * W, G, C / G)
        centred = grouped - jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(centred * centred, axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return normal * self.scale[...] + self.bias[...]


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
