"""A perceptron on flattened images or arrays, for tests and small data sets; there is no checkpoint for it.

Without hidden layers it is the linear classifier of raw pixels that frozen features are compared with.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.images import Pixels, prepare, prepared_shape
from fedsim.backbones.layers import Linear, Shape, Stage


@dataclass(frozen=True)
class MlpConfig:
    """Widths of the hidden layers, and the side to which images are resized first, if any."""

    hidden: tuple[int, ...] = (128, 64)
    resize: int | None = None
    interpolation: str = "bilinear"


class Mlp(nnx.Module):
    """x (B, ...), uint8 or float32 -> logits (B, classes); uint8 is scaled to [0, 1]."""

    def __init__(self, c: MlpConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        if input_shape is None:
            raise ValueError("Expected input_shape of backbone='mlp' to be given; it is the shape of one example.")
        self.pixels: Pixels | None = None
        if c.resize is not None:
            channels = input_shape[2] if len(input_shape) == 3 else 1
            self.pixels = Pixels((0.0,) * channels, (1.0,) * channels, c.resize, c.interpolation)
            input_shape = prepared_shape(input_shape, self.pixels)
        widths = (math.prod(input_shape), *c.hidden)
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)])
        self.head = Linear(widths[-1], classes, rngs=rngs)

    def flat(self, x: jax.Array) -> jax.Array:
        """(B, ...) -> (B, values) as the layers compute; bytes are scaled to [0, 1]."""
        x = x if self.pixels is None else prepare(x, self.pixels)
        x = x.reshape(x.shape[0], -1)
        x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
        first = (*self.layers, self.head)[0]
        return x.astype(first.kernel.dtype) if isinstance(first, Linear) else x  # no head: features as they are

    def layer(self, i: int, x: jax.Array) -> jax.Array:
        """Hidden layer `i` with its ReLU; the first one reads the input."""
        return jax.nn.relu(self.layers[i](self.flat(x) if i == 0 else x))

    def output(self, x: jax.Array) -> jax.Array:
        """The head; it reads the input where there is no hidden layer."""
        return self.head(x if len(self.layers) else self.flat(x))

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        # `i=i` binds the loop's value, not its variable.
        hidden = [Stage(f"layers/{i}", lambda x, i=i: self.layer(i, x)) for i in range(len(self.layers))]
        return [*hidden, Stage("head", self.output)]
