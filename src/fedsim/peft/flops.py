"""FLOPs of one example, counted in the traced program: matrix products and convolutions, a multiplication and an addition each.

    training = forward + activation gradients + trained weights' gradients

Frozen weights have no gradient, and no activation gradient reaches below the first trained leaf; the program that JAX
traces contains neither, so nothing is assumed - unlike 6 FLOPs a parameter, which is for training all of them. Sums,
normalisations, softmax and activation functions are left out, as is usual where utilisation of matrix units is meant;
so is what is computed once a batch and not for every example, and what rematerialisation computes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from fedsim.peft.split import Model

# Examples in the batch that is traced (nothing of it is computed): a prime that divides no size of a model, so that an
# array has the examples' axis, merged with others or not, exactly where its size is a multiple.
EXAMPLES = 104_729
PRODUCTS = ("dot_general", "conv_general_dilated")


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


def products(fn: Callable[..., Any], *shapes: Any) -> tuple[float, float]:
    """FLOPs an example of the products in `fn` on a batch of EXAMPLES: those that keep their axis, those that sum over it."""
    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(fn)(*shapes).jaxpr
    kept = summed = 0
    for eqn, times in equations(jaxpr):
        count = times * _product(eqn)
        if _has_examples(eqn.outvars[0]):
            kept += count
        elif any(map(_has_examples, eqn.invars)):
            summed += count
    return kept / EXAMPLES, summed / EXAMPLES


def all_products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all products of a program, on whatever they compute; a loop of known length counts every turn."""
    return float(sum(times * _product(eqn) for eqn, times in equations(jaxpr)))


def equations(jaxpr: core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every product of a program and of those inside it, and how often it runs; a `while` counts as one turn."""
    return ((eqn, times) for eqn, times in all_equations(jaxpr) if eqn.primitive.name in PRODUCTS)


def all_equations(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
    """As `equations`, not of products alone; what a program inside does is told, and its results once more."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                program = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
                yield from all_equations(program, times * eqn.params.get("length", 1))


def _is_program(value: Any) -> bool:
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def _product(eqn: core.JaxprEqn) -> int:
    left, right, out = (_shape(v) for v in (*eqn.invars[:2], eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    # A convolution: every output adds up the kernel's entries of its channel, borders as if there were no padding; the
    # zeros that a gradient puts between the pixels of a strided one are no work.
    numbers, spread = eqn.params["dimension_numbers"], eqn.params["lhs_dilation"]
    return 2 * math.prod(out) * math.prod(right) // (right[numbers.rhs_spec[0]] * math.prod(spread))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _has_examples(variable: Any) -> bool:
    return math.prod(_shape(variable)) % EXAMPLES == 0


def _batch(model: Model, example_shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    from fedsim.backbones import backbone

    kinds = {"text": jnp.int32, "image": jnp.uint8}
    dtype = dtype or kinds.get(backbone(model.name).kind, jnp.float32)
    return jax.ShapeDtypeStruct((EXAMPLES, *example_shape), dtype)
