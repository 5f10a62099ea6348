"""FLOPs of one example of a model, counted in the traced program by `engine.flops`.

    training = forward + activation gradients + trained weights' gradients

Frozen weights have no gradient, and no activation gradient reaches below the first trained leaf; the program that JAX
traces contains neither, so nothing is assumed - unlike 6 FLOPs a parameter, which is for training all of them. A run's
record counts what its clients really do instead (`Cohort.flops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedsim.engine.flops import EXAMPLES, products
from fedsim.peft.split import Model


class Flops(NamedTuple):
    """Of one example in one training step."""

    forward: float
    """From what enters (inputs, or the cached features) to the logits."""
    activations: float
    """Gradients of activations, down to the first trained leaf."""
    weights: float
    """Gradients of trained weights, summed over the examples."""

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.forward + self.activations + self.weights


def training_flops(model: Model, example_shape: tuple[int, ...], dtype: Any = None, *, cached: bool = False) -> Flops:
    """What a training step costs for each example.

    Args:
        example_shape: of one input, without the batch axis.
        dtype: of the inputs; default as the model's backbone reads them, int32 for a text and uint8 for an image.
        cached: from the features that enter the first trained stage, as where the frozen prefix is computed once.
    """
    x = _batch(model, example_shape, dtype)
    inner = jax.eval_shape(model.prefix, model.frozen, x) if cached else x
    apply = model.suffix if cached else model.apply

    def loss(trained: Any, frozen: Any, x: Any) -> Any:
        return jnp.sum(jax.nn.log_softmax(apply(trained, frozen, x))[:, 0])

    forward = products(apply, model.trained, model.frozen, inner)[0]
    through, weights = products(jax.value_and_grad(loss), model.trained, model.frozen, inner)
    return Flops(forward, through - forward, weights)


def forward_flops(
    model: Model, example_shape: tuple[int, ...], dtype: Any = None, *, start: int = 0, stop: int | None = None
) -> float:
    """What an example costs in evaluation, or in the stages start..stop - 1 of the backbone alone."""
    x = _batch(model, example_shape, dtype)
    leaves = {**model.frozen, **model.trained}
    stop = model.stages if stop is None else stop
    h = jax.eval_shape(lambda leaves, x: model.run(leaves, x, 0, start), leaves, x)
    return products(lambda leaves, h: model.run(leaves, h, start, stop), leaves, h)[0]


def _batch(model: Model, example_shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    from fedsim.backbones import backbone

    kinds = {"text": jnp.int32, "image": jnp.uint8}
    dtype = dtype or kinds.get(backbone(model.name).kind, jnp.float32)
    return jax.ShapeDtypeStruct((EXAMPLES, *example_shape), dtype)
