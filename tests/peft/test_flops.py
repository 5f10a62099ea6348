"""Counted FLOPs against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from fedsim import peft
from fedsim.peft import flops

BLOCKS, WIDTH, HIDDEN, TOKENS, CLASSES, PATCH = 2, 32, 64, 17, 5, 4 * 4 * 3  # vit_tiny at 16 px
SHAPE = (16, 16, 3)


def vit(kind: str, **options: object) -> flops.Flops:
    model = peft.build("vit_tiny", CLASSES, input_shape=SHAPE, peft=kind, **options)
    return flops.training_flops(model, SHAPE)


# A product of (a, b) with (b, c) is 2abc; attention has two of (T, D) with (D, T).
MIX = 2 * TOKENS * WIDTH  # one token's scores, or its mixed values
BLOCK = TOKENS * (2 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + 2 * MIX)
LAST = TOKENS * 2 * 2 * WIDTH * WIDTH + 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + 2 * MIX  # keys and values of all
EMBED, HEAD = 2 * (TOKENS - 1) * PATCH * WIDTH, 2 * WIDTH * CLASSES
FORWARD = EMBED + (BLOCKS - 1) * BLOCK + LAST + HEAD


def test_forward_is_the_sum_of_products() -> None:
    assert vit("head").forward == FORWARD
    model = peft.build("vit_tiny", CLASSES, input_shape=SHAPE, peft="head")
    assert flops.forward_flops(model, SHAPE) == FORWARD
    assert flops.forward_flops(model, SHAPE, start=1, stop=2) == BLOCK
    assert flops.forward_flops(model, SHAPE, start=2, stop=3) == LAST


def test_head_alone_needs_its_own_gradient_only() -> None:
    assert vit("head")[1:] == (0, HEAD)


def test_full_is_three_products_for_each_but_the_patches() -> None:
    """Attention's products have no weights: their gradients are activations', twice."""
    attention = ((BLOCKS - 1) * TOKENS + 1) * 2 * MIX
    found = vit("full")
    assert found.activations == FORWARD - EMBED + attention
    assert found.weights == FORWARD - attention


def test_bias_needs_no_gradient_of_a_matrix() -> None:
    found, full = vit("bias"), vit("full")
    assert found.activations == full.activations
    assert found.weights == HEAD


def test_lora_pays_its_factors_three_times_and_stops_at_the_first() -> None:
    rank, layers = 2, ("blocks/1/attention/query",)
    found = vit("lora", rank=rank, targets=layers)
    factors = 2 * rank * 2 * WIDTH  # only the class token asks in the last block
    assert found.forward == FORWARD + factors
    assert found.weights == factors + HEAD
    # From the head down to the query: no value, no key, nothing of block 0. Mixed values to scores, scores to query.
    through = HEAD + 2 * (WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    assert found.activations == through + 2 * MIX + 2 * rank * WIDTH


def test_cached_features_start_at_the_first_trained_stage() -> None:
    model = peft.build("vit_tiny", CLASSES, input_shape=SHAPE, peft="head")
    assert flops.training_flops(model, SHAPE, cached=True) == (HEAD, 0, HEAD)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients_cost_the_same(stride: int) -> None:
    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum()

    side = 65 if stride == 2 else 66
    out = (side - 3) // stride + 1
    product = 2 * out * out * 3 * 3 * 4 * 6
    shapes = (
        jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32),
        jax.ShapeDtypeStruct((flops.EXAMPLES, side, side, 4), jnp.float32),
    )
    assert flops.products(loss, *shapes) == (product, 0)
    kept, summed = flops.products(jax.value_and_grad(loss, argnums=(0, 1)), *shapes)
    assert summed == product
    assert kept - product == pytest.approx(product, rel=0.07)  # border pixels are reached less often than counted
