"""ShuffleNet V2 0.5x (Ma et al. 2018, arXiv 1807.11164) in torchvision's layout: the small model that trains in full.

Input: images, uint8 as stored or float32 already normalised. Normalisation is as in `resnet.py`: frozen statistics of
a checkpoint, or group norm (`shufflenet_v2_x0_5_gn`) where training starts from random values.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.convolution import Conv, Norm, max_pool, normalisation
from fedsim.backbones.images import IMAGENET_PIXELS, Pixels, prepare, prepared_shape
from fedsim.backbones.layers import Linear, Shape, Stage
from fedsim.backbones.resnet import mean_pool


@dataclass(frozen=True)
class ShufflenetConfig:
    """Shape of a ShuffleNet V2; the defaults are those of width 0.5x."""

    depths: tuple[int, ...] = (4, 8, 4)
    widths: tuple[int, ...] = (48, 96, 192)
    stem: int = 24
    last: int = 1024
    norm: Norm = "batch"
    pixels: Pixels = IMAGENET_PIXELS


class Layer(nnx.Module):
    """Convolution, normalisation and, where asked for, ReLU."""

    def __init__(
        self,
        c: ShufflenetConfig,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv(
            inputs, outputs, size, stride=stride, padding=size // 2, groups=inputs if depthwise else 1, rngs=rngs
        )
        self.norm = normalisation(c.norm, outputs, rngs)
        self.relu = not depthwise  # depthwise convolutions are followed by none

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.conv(x))
        return jax.nn.relu(y) if self.relu else y


class Block(nnx.Module):
    """Half of the channels pass, half are transformed, then both are shuffled; with stride 2 both are transformed."""

    def __init__(self, c: ShufflenetConfig, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        half = outputs // 2
        entering = inputs if stride == 2 else half
        self.left = nnx.List(
            [Layer(c, inputs, inputs, 3, 2, depthwise=True, rngs=rngs), Layer(c, inputs, half, 1, rngs=rngs)]
            if stride == 2
            else []
        )
        self.right = nnx.List(
            [
                Layer(c, entering, half, 1, rngs=rngs),
                Layer(c, half, half, 3, stride, depthwise=True, rngs=rngs),
                Layer(c, half, half, 1, rngs=rngs),
            ]
        )
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        left, right = (x, x) if self.stride == 2 else jnp.split(x, 2, axis=-1)
        for layer in self.left:
            left = layer(left)
        for layer in self.right:
            right = layer(right)
        # Channels of both halves in turn: left 0, right 0, left 1, ...
        return jnp.stack([left, right], axis=-1).reshape(*left.shape[:-1], -1)


class Shufflenet(nnx.Module):
    """Images -> logits (B, classes)."""

    def __init__(self, c: ShufflenetConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape:
            prepared_shape(input_shape, c.pixels)
        self.stem = Layer(c, len(c.pixels.mean), c.stem, 3, 2, rngs=rngs)
        blocks, channels = [], c.stem
        for depth, width in zip(c.depths, c.widths, strict=True):
            for i in range(depth):
                blocks.append(Block(c, channels, width, 1 if i else 2, rngs=rngs))
                channels = width
        self.blocks = nnx.List(blocks)
        self.last = Layer(c, channels, c.last, 1, rngs=rngs)
        self.head = Linear(c.last, classes, rngs=rngs)
        self.config = c

    def embed(self, x: jax.Array) -> jax.Array:
        """Images -> a quarter of the height and width."""
        return max_pool(self.stem(prepare(x, self.config.pixels, self.stem.conv.kernel.dtype)), 3, 2, 1)

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        blocks = [Stage(f"blocks/{i}", block) for i, block in enumerate(self.blocks)]
        last = Stage("last", lambda x: mean_pool(self.last(x)))
        return [Stage("stem", self.embed), *blocks, last, Stage("head", self.head)]
