"""The forms for NVIDIA GPUs, on a CPU: values and gradients of the plain ones, under vmap over clients, shared and own leaves.

cuDNN itself runs on a GPU only (`docs/accelerators.md` has how far it was from the plain form there); here four lines stand
in its place, so that what is added to queries, keys and values is checked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedsim import peft
from fedsim.backbones import attention, forms, gpu, kernels
from fedsim.backbones.layers import Attention
from fedsim.peft import precision

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


def gradients(fn: Any, args: tuple[Any, ...], axes: tuple[int | None, ...]) -> list[np.ndarray]:
    """Results and gradients (towards a fixed random direction) of `fn` mapped over clients."""
    out = jax.eval_shape(jax.vmap(fn, axes), *args)
    towards = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype)

    def both(towards: jax.Array, *args: Any) -> Any:
        value, back = jax.vjp(fn, *args)
        return value, back(towards)

    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(jax.vmap(both, (0, *axes))(towards, *args))]


def close(found: list[np.ndarray], right: list[np.ndarray], tolerance: float) -> None:
    for one, other in zip(found, right, strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("own", [True, False], ids=["own leaves", "shared leaves"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_norm_and_bias_are_the_plain_ones(own: bool, dtype: Any, tolerance: float) -> None:
    clients = 3
    x = normal(clients, 2, 5, 24, dtype=dtype) * 3 + 1
    scale, bias = (normal(*((clients,) if own else ()), 24, dtype=dtype) for _ in range(2))
    axis = 0 if own else None

    def norm(fn: Any) -> Any:
        return lambda x, scale, bias: fn(x, scale, bias, 1e-6)

    args, axes = (x, scale, bias), (0, axis, axis)
    close(gradients(norm(gpu.layer_norm), args, axes), gradients(norm(kernels.layer_norm), args, axes), tolerance)
    close(gradients(gpu.plus, (x, bias), (0, axis)), gradients(kernels.plus, (x, bias), (0, axis)), tolerance)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A GPU is said to be there; what cuDNN would compute, and notes of what it was asked."""
    asked: list[dict[str, Any]] = []

    def computed(
        query: Any, key: Any, value: Any, *, scale: float, key_value_seq_lengths: Any, implementation: str
    ) -> Any:
        assert implementation == "cudnn" and scale == 1.0 and query.dtype == jnp.bfloat16
        assert query.shape[1] % 2 == 0 == key.shape[1] % 2 and query.shape[3] == value.shape[3]
        asked.append({"depth": query.shape[3], "lengths": key_value_seq_lengths is not None})
        query, key, value = (a.astype(jnp.float32) for a in (query, key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        if key_value_seq_lengths is not None:
            there = jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None]
            scores = jnp.where(there[:, None, None], scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).astype(jnp.bfloat16)

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    monkeypatch.setattr(forms, "has_cuda", lambda: True)
    return asked


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "depth", "lengths"),
    [(20, 20, False, 8, False), (21, 21, False, 8, True), (21, 24, False, 8, False), (20, 23, True, 16, True)],
    ids=["even", "odd", "prefix", "masked"],
)
def test_cudnn_gets_what_the_plain_form_means(
    queries: int, keys: int, masked: bool, depth: int, lengths: bool, stand_in: list[dict[str, Any]]
) -> None:
    clients, size, heads = 2, 3, 2
    query, key, value = (normal(clients, size, n, heads, 8, dtype=jnp.bfloat16) for n in (queries, keys, keys))
    mask = jnp.asarray(RNG.random((clients, size, keys)) < 0.6) if masked else None

    def form(fn: Any) -> list[np.ndarray]:
        if mask is None:
            return gradients(fn, (query, key, value), (0, 0, 0))
        given = [jax.vmap(lambda q, k, v, m: jax.vjp(lambda *a: fn(*a, m), q, k, v)[0])(query, key, value, mask)]

        def summed(*qkv: jax.Array) -> jax.Array:
            return jax.vmap(fn)(*qkv, mask).astype(jnp.float32).sum()

        given += jax.grad(summed, argnums=(0, 1, 2))(query, key, value)
        return [np.asarray(leaf, np.float32) for leaf in given]

    close(form(attention.attend), form(attention.plain), 2e-2)
    assert stand_in and all(one == {"depth": depth, "lengths": lengths} for one in stand_in)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, 21])
def test_a_token_that_is_added_is_seen_by_none(
    tokens: int, stand_in: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd number of tokens gets one more before the products, which here every query would like best."""
    layer = Attention(16, 2, rngs=nnx.Rngs(0))
    layer.query.kernel[...], layer.key.kernel[...] = jnp.eye(16), -jnp.eye(16)
    for part in (layer.query, layer.key, layer.value, layer.output):
        assert part.bias is not None
        part.bias[...] = normal(16)
    graph, leaves = nnx.split(layer)
    leaves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), leaves)
    x = (2 + 0.5 * normal(3, tokens, 16)).astype(jnp.bfloat16)

    def found() -> list[np.ndarray]:
        value, *grads = gradients(lambda leaves, x: nnx.merge(graph, leaves)(x), (leaves, x[:, None]), (None, 0))
        return [value, np.concatenate([np.ravel(g) for g in grads])]  # the keys' biases have none but noise

    on_gpu = found()
    assert stand_in and all(one["lengths"] == bool(tokens % 2) for one in stand_in)
    monkeypatch.setattr(forms, "has_cuda", lambda: False)
    close(on_gpu, found(), 2e-2)


IMAGE, TEXT = ("vit_tiny", (24, 24, 3)), ("bert_tiny", (19,))  # 37 and 19 tokens: odd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "shape", "kind"),
    [(*IMAGE, "bias"), (*IMAGE, "prompt"), (*TEXT, "lora"), (*TEXT, "prefix")],
    ids=["image, bias", "image, prompt", "text, lora", "text, prefix"],
)
def test_whole_models_have_the_same_gradients(
    backbone: str, shape: tuple[int, ...], kind: str, stand_in: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft.build(backbone, 5, input_shape=shape, peft=kind)
    trained, frozen = peft.start(model, "random", 0)
    held = precision.held(frozen, "bfloat16")
    high, dtype = (256, np.uint8) if len(shape) == 3 else (500, np.int32)
    x = RNG.integers(1, high, (4, *shape)).astype(dtype)
    if len(shape) == 1:
        x[1, 7:] = 0  # padding
    given = jnp.asarray(x)
    own = {path: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32) for path, leaf in trained.items()}

    def found() -> list[np.ndarray]:
        apply = precision.computed(model, "bfloat16").apply

        def loss(trained: Any) -> jax.Array:
            return jax.nn.log_softmax(apply(trained, held, given))[:, 0].mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(own)
        return [np.asarray(value), np.concatenate([np.ravel(grads[path]) for path in sorted(grads)])]

    on_gpu = found()
    assert stand_in
    monkeypatch.setattr(forms, "has_cuda", lambda: False)
    close(on_gpu, found(), 3e-2)
