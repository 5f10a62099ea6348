"""Hand-written derivatives equal those of the plain formulas; bfloat16 keeps float32 statistics."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from scipy.special import erf

from fedsim.backbones.kernels import gelu, normalise
from fedsim.backbones.layers import Attention, LayerNorm, Linear

EPS = 1e-6


def plain_gelu(x: jax.Array) -> jax.Array:
    return x * jax.scipy.stats.norm.cdf(x)


def plain_normalise(x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPS)


def ours(x: jax.Array) -> jax.Array:
    return normalise(x, EPS)


@pytest.fixture
def x() -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(0), (3, 5, 8))


@pytest.mark.parametrize(("written", "plain"), [(gelu, plain_gelu), (ours, plain_normalise)])
def test_value_and_gradient_equal_plain_autodiff(written: Callable, plain: Callable, x: jax.Array) -> None:
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    (y, pull), (expected, expected_pull) = jax.vjp(written, x), jax.vjp(plain, x)
    np.testing.assert_allclose(y, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], expected_pull(cotangent)[0], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("written", [gelu, ours])
def test_derivatives_equal_finite_differences(written: Callable, x: jax.Array) -> None:
    with jax.enable_x64(True):
        check_grads(written, (jnp.asarray(np.asarray(x, np.float64)),), order=2, modes=("fwd", "rev"))


def test_gelu_is_exact_where_tanh_is_not() -> None:
    x = np.linspace(-12, 12, 4001)
    exact = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    y = gelu(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, exact, atol=1e-6, rtol=3e-7)
    tanh = jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=True)
    assert np.abs(tanh - exact).max() > 1e-4


def test_gelu_far_out_is_finite_with_a_finite_slope() -> None:
    far = jnp.array([-3e38, -1e20, -50.0, 0.0, 50.0, 1e20, 3e38], jnp.float32)
    value, slope = gelu(far), jax.vmap(jax.grad(gelu))(far)
    np.testing.assert_allclose(value, np.maximum(far, 0))
    np.testing.assert_allclose(slope, [0, 0, 0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("written", [gelu, ours])
def test_vmap_and_remat_change_nothing(written: Callable, x: jax.Array) -> None:
    def slope(f: Callable, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)

    expected = slope(written, x)
    np.testing.assert_allclose(jax.vmap(lambda x: slope(written, x))(x), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: slope(jax.checkpoint(written), x))(x), expected, atol=1e-6)


def test_bfloat16_is_computed_in_float32(x: jax.Array) -> None:
    # Mean 8, deviation 1: bfloat16 has 3 bits for the difference; in float32 only the rounding of x is left.
    small = (8 + x / 2).astype(jnp.bfloat16)
    norm = LayerNorm(x.shape[-1], eps=EPS, rngs=nnx.Rngs(0))
    graph, state = nnx.split(norm)
    norm = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    y, g = norm(small), gelu(small)
    assert y.dtype == g.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), plain_normalise(small.astype(jnp.float32)), rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(np.float32(g), plain_gelu(small.astype(jnp.float32)), rtol=2**-8, atol=1e-6)
    assert jax.grad(lambda x: jnp.sum(norm(x)))(small).dtype == jnp.bfloat16


def test_attention_weighs_bfloat16_in_float32() -> None:
    attention = Attention(8, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(attention)
    low = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.bfloat16)
    assert low(x).dtype == jnp.bfloat16
    weights = [e for e in jax.make_jaxpr(low)(x).eqns if e.primitive.name == "exp"] or [
        e
        for call in jax.make_jaxpr(low)(x).eqns
        for sub in jax.extend.core.jaxprs_in_params(call.params)
        for e in sub.eqns
        if e.primitive.name == "exp"
    ]
    assert weights
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in weights)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 0, 8)])
def test_linear_keeps_leading_axes(shape: tuple[int, ...]) -> None:
    layer = Linear(8, 6, rngs=nnx.Rngs(0))
    layer.attach_lora(2, 0.5, nnx.Rngs(1))
    layer.lora_b = nnx.Param(jnp.ones((2, 6)))
    x = jax.random.normal(jax.random.key(0), shape)
    assert layer.bias is not None
    assert layer.lora_a is not None
    full = layer.kernel[...] + 0.5 * layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), jnp.einsum("...i,io->...o", x, full) + layer.bias[...], atol=1e-5)


def test_attention_equals_a_loop_over_heads() -> None:
    attention = Attention(12, 3, rngs=nnx.Rngs(0))
    attention.attach_prefix(2, nnx.Rngs(1))
    assert attention.prefix_key is not None
    assert attention.prefix_value is not None
    x = jax.random.normal(jax.random.key(0), (4, 5, 12))
    mask = jnp.arange(5) < jnp.array([[5], [3], [1], [0]])
    y = jax.jit(attention)(x, mask)
    kernels = {name: np.asarray(getattr(attention, name).kernel[...]) for name in ("query", "key", "value", "output")}
    for i in range(4):
        seen = np.concatenate([np.asarray(mask[i]), [True, True]])
        query, key, value = (np.asarray(x[i]) @ kernels[name] for name in ("query", "key", "value"))
        key = np.concatenate([key, np.asarray(attention.prefix_key[...])])[seen]
        value = np.concatenate([value, np.asarray(attention.prefix_value[...])])[seen]
        mixed = []
        for head in np.split(np.arange(12), 3):
            weights = np.exp(query[:, head] @ key[:, head].T / 2)  # / sqrt(12 / 3)
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ value[:, head])
        np.testing.assert_allclose(y[i], np.concatenate(mixed, axis=1) @ kernels["output"], atol=1e-5)
