"""The CNN of federated EMNIST as Adaptive Federated Optimization has it (arXiv 2003.00295), without its dropout.

3x3 convolution to 32 channels, another to 64, 2x2 max pooling, a dense layer of 128: 1,206,590 parameters for 28x28
images with one channel and 62 classes. There is no checkpoint for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from flax import nnx

from fedsim.backbones.convolution import Conv, max_pool_halves
from fedsim.backbones.images import Pixels, prepare, prepared_shape
from fedsim.backbones.layers import Linear, Shape, Stage


@dataclass(frozen=True)
class CnnConfig:
    """Channels of the convolutions, width of the dense layer."""

    channels: tuple[int, int] = (32, 64)
    dense: int = 128
    resize: int | None = None
    interpolation: str = "bilinear"
    matmul: bool = True
    """On a CPU, convolutions as matmuls over patches: faster there where every client has kernels of its own."""


class Cnn(nnx.Module):
    """Images (B, H, W) or (B, H, W, C), uint8 or float32 -> logits (B, classes); uint8 is scaled to [0, 1]."""

    def __init__(self, c: CnnConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        input_shape = input_shape or (28, 28, 1)
        channels = input_shape[2] if len(input_shape) == 3 else 1
        self.pixels = Pixels((0.0,) * channels, (1.0,) * channels, c.resize, c.interpolation)
        height, width, _ = prepared_shape(input_shape, self.pixels)
        if min(height, width) < 6:
            raise ValueError(
                f"Expected image size={height}x{width} to be at least 6x6 for backbone='cnn'; resize them."
            )
        flat = math.prod(((height - 4) // 2, (width - 4) // 2, c.channels[1]))
        sizes = ((channels, c.channels[0]), c.channels)
        convs = [Conv(i, o, 3, bias=True, matmul=c.matmul, rngs=rngs) for i, o in sizes]
        self.layers = nnx.List([*convs, Linear(flat, c.dense, rngs=rngs)])
        self.head = Linear(c.dense, classes, rngs=rngs)

    def first(self, x: jax.Array) -> jax.Array:
        """Images -> the first convolution's features."""
        return jax.nn.relu(self.layers[0](prepare(x, self.pixels, self.layers[0].kernel.dtype)))

    def second(self, x: jax.Array) -> jax.Array:
        """The second convolution and the pooling, flattened: (B, features)."""
        return max_pool_halves(jax.nn.relu(self.layers[1](x))).reshape(x.shape[0], -1)

    def dense(self, x: jax.Array) -> jax.Array:
        """Features (B, dense)."""
        return jax.nn.relu(self.layers[2](x))

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        runs = (self.first, self.second, self.dense)
        return [*(Stage(f"layers/{i}", run) for i, run in enumerate(runs)), Stage("head", self.head)]
