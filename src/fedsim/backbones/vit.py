"""Vision transformers, pre-norm: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) and DINOv2's layout (2304.07193).

Input: images (B, H, W) or (B, H, W, C), uint8 as stored, or float32 already normalised. Every size that the patch
divides is read: the learned positions, of whatever grid the checkpoint has, are resampled to the image's inside the
forward pass, so that the leaves keep their published shapes. Parity with three reference implementations: `docs/backbones.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.images import HALF_PIXELS, Pixels, bicubic, prepare, prepared_shape
from fedsim.backbones.kernels import gelu
from fedsim.backbones.layers import MLP, Attention, LayerNorm, Linear, Shape, Stage, append, param


@dataclass(frozen=True)
class VitConfig:
    """Shape of a ViT; the defaults are ViT-B/16's at 224 px."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image: int = 224
    """Side of the images for which positions were learned: (image / patch)^2 of them and the class token's.

    A checkpoint's own grid takes the place of this one.
    """
    eps: float = 1e-6
    layer_scale: bool = False
    """A trained factor per channel after attention and after the MLP (DINOv2)."""
    pool: Literal["cls", "mean"] = "cls"
    """Features: the class token, or the mean over the patches, in both cases after the last LayerNorm."""
    pixels: Pixels = HALF_PIXELS


class Embeddings(nnx.Module):
    """Patches, each a linear map of its pixels, the class token in front, plus positions."""

    def __init__(self, c: VitConfig, *, rngs: nnx.Rngs) -> None:
        channels = len(c.pixels.mean)
        self.patch = Linear(c.patch * c.patch * channels, c.width, rngs=rngs)
        self.cls = param("cls", (c.width,), rngs)
        self.position = param("position", (1 + (c.image // c.patch) ** 2, c.width), rngs)
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> (B, 1 + patches, D)."""
        c = self.config
        x = prepare(x, c.pixels, self.patch.kernel.dtype)
        size, p = x.shape[0], c.patch
        grid = _grid(x.shape[1:], c)
        x = x.reshape(size, grid[0], p, grid[1], p, -1).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(x.reshape(size, grid[0] * grid[1], -1))
        position = resampled(self.position[...], grid)
        first = jnp.broadcast_to(self.cls[...] + position[0], (size, 1, c.width))
        return jnp.concatenate([first, x + position[1:]], axis=1)


class LayerScale(nnx.Module):
    """x (..., D) times a factor per channel."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.gamma = param("gamma", (width,), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...]


class Block(nnx.Module):
    """LayerNorm and attention, LayerNorm and MLP, each added to its input.

    Args:
        read: how many tokens, the first ones, are read by what follows: only they are computed beyond keys and values.
    """

    def __init__(self, c: VitConfig, read: int | None = None, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.attention = Attention(c.width, c.heads, rngs=rngs)
        self.scale1: LayerScale | None = nnx.data(LayerScale(c.width, rngs=rngs) if c.layer_scale else None)
        self.norm2 = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.mlp = MLP(c.width, c.hidden, gelu, rngs=rngs)
        self.scale2: LayerScale | None = nnx.data(LayerScale(c.width, rngs=rngs) if c.layer_scale else None)
        self.prompt: nnx.Param | None = nnx.data(None)
        self.keep_prompt = False
        self.read = read

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.shape[1]
        if self.prompt is not None:
            x = append(x, self.prompt[...])
        y = self.attention(self.norm1(x), read=self.read)
        x = x[:, : self.read] + (y if self.scale1 is None else self.scale1(y))
        y = self.mlp(self.norm2(x), x)
        x = x + (y if self.scale2 is None else self.scale2(y))
        return x[:, :tokens] if self.prompt is not None and not self.keep_prompt else x


class Vit(nnx.Module):
    """Images -> logits (B, classes)."""

    def __init__(self, c: VitConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        _grid(prepared_shape(input_shape or (c.image, c.image), c.pixels), c)
        self.embeddings = Embeddings(c, rngs=rngs)
        last = 1 if c.pool == "cls" else None
        self.blocks = nnx.List([Block(c, last if i == c.depth - 1 else None, rngs=rngs) for i in range(c.depth)])
        self.norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.head = Linear(c.width, classes, rngs=rngs)
        self.config = c

    def pool(self, x: jax.Array) -> jax.Array:
        """Tokens (B, T, D) -> features (B, D); a shallow prompt, which came along up to here, is left out."""
        if self.config.pool == "cls":
            return self.norm(x[:, 0])
        first = self.blocks[0]
        kept = first.prompt.shape[0] if first.keep_prompt and first.prompt is not None else 0
        return jnp.mean(self.norm(x[:, 1 : x.shape[1] - kept]), axis=1)

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        return [Stage("embeddings", self.embeddings), *blocks, Stage("norm", self.pool), Stage("head", self.head)]


def _grid(shape: Shape, c: VitConfig) -> tuple[int, int]:
    """Patches (down, across) of an image of that shape.

    Raises:
        ValueError: the patch does not divide its sides.
    """
    height, width = shape[:2]
    if height % c.patch or width % c.patch or not height or not width:
        near = max(1, round(min(height, width) / c.patch)) * c.patch
        raise ValueError(
            f"Expected image size={height}x{width} to divide by the patch of {c.patch}; resize the images in the "
            f"backbone by image_size={near}, or another multiple of {c.patch}."
        )
    return height // c.patch, width // c.patch


def resampled(position: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Positions (1 + n^2, D), the class token's first, for a grid of patches: (1 + down * across, D)."""
    side = math.isqrt(position.shape[0] - 1)
    if grid == (side, side):
        return position
    patches = position[1:].reshape(side, side, -1).astype(jnp.float32)
    patches = jnp.einsum("ij,jkd->ikd", bicubic(side, grid[0]), patches)
    patches = jnp.einsum("lk,ikd->ild", bicubic(side, grid[1]), patches)
    patches = patches.reshape(grid[0] * grid[1], -1).astype(position.dtype)
    return jnp.concatenate([position[:1], patches])
