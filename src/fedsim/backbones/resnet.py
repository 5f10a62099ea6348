"""ResNet-18 and -50 (He et al. 2015, arXiv 1512.03385), as torchvision and timm publish them (the "v1.5" stride).

Input: images, uint8 as stored or float32 already normalised. Batch norm keeps the checkpoint's statistics, frozen: an
average of clients' statistics means little, and no example of a batch touches another. Group norm has no statistics:
take it (`resnet18_gn`) where training starts from random values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.convolution import Conv, Norm, max_pool, normalisation
from fedsim.backbones.images import IMAGENET_PIXELS, Pixels, prepare, prepared_shape
from fedsim.backbones.layers import Linear, Shape, Stage


@dataclass(frozen=True)
class ResnetConfig:
    """Shape of a ResNet; the defaults are ResNet-18's."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    block: Literal["basic", "bottleneck"] = "basic"
    norm: Norm = "batch"
    stem: int = 64
    width: int = 64
    """Of the first level; each level doubles it."""
    pixels: Pixels = IMAGENET_PIXELS


class Shortcut(nnx.Module):
    """What changes the shape of a block's input where its output has another: a 1x1 convolution, normalised."""

    def __init__(self, c: ResnetConfig, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(inputs, outputs, 1, stride=stride, rngs=rngs)
        self.norm = normalisation(c.norm, outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, added to their input."""

    def __init__(self, c: ResnetConfig, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs) -> None:
        outputs = width * 4 if c.block == "bottleneck" else width
        # (inputs, outputs, kernel size, stride, padding) of each convolution
        plan = (
            [(inputs, width, 1, 1, 0), (width, width, 3, stride, 1), (width, outputs, 1, 1, 0)]
            if c.block == "bottleneck"
            else [(inputs, width, 3, stride, 1), (width, outputs, 3, 1, 1)]
        )
        self.convs = nnx.List([Conv(i, o, k, stride=s, padding=p, rngs=rngs) for i, o, k, s, p in plan])
        self.norms = nnx.List([normalisation(c.norm, o, rngs) for _, o, *_ in plan])
        same = stride == 1 and inputs == outputs
        self.shortcut: Shortcut | None = nnx.data(None if same else Shortcut(c, inputs, outputs, stride, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(jax.nn.relu(y) if i else y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stem(nnx.Module):
    """Images -> a quarter of the height and width."""

    def __init__(self, c: ResnetConfig, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(len(c.pixels.mean), c.stem, 7, stride=2, padding=3, rngs=rngs)
        self.norm = normalisation(c.norm, c.stem, rngs)
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(
            jax.nn.relu(self.norm(self.conv(prepare(x, self.config.pixels, self.conv.kernel.dtype)))), 3, 2, 1
        )


class Resnet(nnx.Module):
    """Images -> logits (B, classes)."""

    def __init__(self, c: ResnetConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape:
            prepared_shape(input_shape, c.pixels)
        self.stem = Stem(c, rngs=rngs)
        grow = 4 if c.block == "bottleneck" else 1
        blocks, channels = [], c.stem
        for level, depth in enumerate(c.depths):
            for i in range(depth):
                width = c.width * 2**level
                blocks.append(Block(c, channels, width, 2 if level and not i else 1, rngs=rngs))
                channels = width * grow
        self.blocks = nnx.List(blocks)
        self.head = Linear(channels, classes, rngs=rngs)
        self.config = c

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        return [Stage("stem", self.stem), *blocks, Stage("pool", mean_pool), Stage("head", self.head)]


def mean_pool(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> features (B, C)."""
    return jnp.mean(x, axis=(1, 2))
