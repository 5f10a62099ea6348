"""The forms of a convolution: equal values and gradients, alone and with kernels of every client's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from fedsim.backbones.convolution import convolve, plain

CASES = [  # size, stride, padding, groups, matmul
    (3, 1, 0, 1, False),
    (3, 2, 1, 1, False),
    (7, 2, 3, 1, False),
    (3, 1, 1, 1, True),
    (3, 2, 1, 1, True),
    (1, 1, 0, 1, False),
    (1, 2, 0, 1, False),
    (3, 1, 1, 6, False),
    (3, 2, 1, 6, False),
]


def draw(*shape: int, seed: int) -> jax.Array:
    return jax.numpy.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("size, stride, padding, groups, matmul", CASES)
def test_convolve_equals_xla(size: int, stride: int, padding: int, groups: int, matmul: bool) -> None:
    x, kernel = draw(2, 3, 9, 8, 6, seed=0), draw(2, size, size, 6 // groups, 12 if groups == 1 else 6, seed=1)

    def all_of(form: Callable[..., Any]) -> Any:
        """Values, gradients and a directional derivative, for two clients with kernels of their own."""

        def score(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return (form(x, kernel) ** 2).sum()

        def one(x: jax.Array, kernel: jax.Array) -> Any:
            along = jax.jvp(score, (x, kernel), (x, kernel))[1]
            return form(x, kernel), jax.grad(score, (0, 1))(x, kernel), along

        return jax.jit(jax.vmap(one))(x, kernel)

    ours = all_of(lambda x, k: convolve(x, k, stride, padding, groups, matmul=matmul))
    theirs = all_of(lambda x, k: plain(x, k, stride, padding, groups))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def test_no_patches_for_a_frozen_kernel() -> None:
    x, kernel = draw(3, 9, 8, 6, seed=0), draw(3, 3, 6, 12, seed=1)
    along_x = jax.jit(jax.grad(lambda x: (convolve(x, kernel, 1, 1) ** 2).sum())).lower(x).compile().as_text() or ""
    along_kernel = (
        jax.jit(jax.grad(lambda k: (convolve(x, k, 1, 1) ** 2).sum())).lower(kernel).compile().as_text() or ""
    )
    assert " dot(" in along_kernel
    assert " dot(" not in along_x and " concatenate(" not in along_x


def test_one_form_a_platform() -> None:
    x, kernel = draw(3, 9, 8, 6, seed=0), draw(3, 3, 6, 12, seed=1)
    traced = jax.jit(lambda x, k: convolve(x, k, 1, 1, matmul=True)).trace(x, kernel)
    here = traced.lower().compile().as_text() or ""
    assert " dot(" in here and " conditional(" not in here
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
