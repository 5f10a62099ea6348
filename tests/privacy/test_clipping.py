"""Norms that are bounded whatever comes in; each test has the name of the guarantee that it is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim.privacy.clipping import clip, clip_layers, norm, total

CLIPS = pytest.mark.parametrize("cut", [clip, clip_layers])


def length(tree: Any) -> float:
    """The norm in float64."""
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree))))


def replies() -> list[dict[str, Any]]:
    """Small, large, huge and broken ones."""
    rng = np.random.default_rng(0)
    found = [
        {"a": rng.normal(size=(3, 5)) * size, "b": rng.normal(size=7) * size}
        for size in (0.0, 1e-38, 1e-20, 1e-3, 0.1, 1.0, 1e3, 1e19, 1e30, 2e37)
    ]
    for broken in (np.nan, np.inf, -np.inf):
        for size in (1.0, 1e30):
            bad = {"a": rng.normal(size=(3, 5)) * size, "b": rng.normal(size=7)}
            bad["b"][3] = broken
            found.append(bad)
    found.append({"a": np.full((2, 2), 3.4e38), "b": np.full(7, -3.4e38)})
    return [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), one) for one in found]


@CLIPS
@pytest.mark.parametrize("bound", [1e-6, 0.37, 1.0, 1e6])
def test_bounded_norm_whatever_the_reply(cut: Callable[..., Any], bound: float) -> None:
    """NaN and infinity included, and in float64: not a rounding above the bound."""
    for reply in replies():
        kept, _ = jax.jit(cut)(reply, bound)
        assert np.isfinite(length(kept)) and length(kept) <= bound, reply


@CLIPS
def test_bounded_norm_of_a_long_vector(cut: Callable[..., Any]) -> None:
    """Three million equal entries, and as many tiny ones beside a large one: a long float32 sum would lose them."""
    ones = {"w": jnp.full((3_000_000,), 0.01)}
    mixed = {"w": jnp.full((3_000_000,), 1e-3).at[0].set(5.0)}
    for reply in (ones, mixed):
        kept, size = cut(reply, 1.0)
        assert 0.999 < length(kept) <= 1.0
        assert float(size) == pytest.approx(length(reply), rel=1e-5)


def test_long_sums_are_not_float32_sums_one_by_one() -> None:
    """Adding 1 to 2**24 changes nothing in float32: twenty million ones would be 16,777,216."""
    assert float(total(jnp.ones((20_000_000,)))) == 20_000_000


def test_direction() -> None:
    for reply in replies()[3:9]:
        kept, size = clip(reply, 1.0)
        scale = min(1.0, 1.0 / float(size))
        jax.tree.map(lambda k, r, s=scale: np.testing.assert_allclose(k, r * s, rtol=2e-4), kept, reply)


def test_what_is_short_stays_as_it_is() -> None:
    """Bit for bit, so that a large bound is no clipping."""
    reply = replies()[5]
    kept, _ = clip(reply, 100.0)
    jax.tree.map(np.testing.assert_array_equal, kept, reply)


def test_all_leaves_are_one_vector() -> None:
    """3, 4 and 12 in three leaves have norm 13: a clipping tensor by tensor would leave each at 1, and sqrt(3) of them."""
    reply = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]]), "c": jnp.array(12.0)}
    assert float(norm(reply)) == pytest.approx(13)
    kept, _ = clip(reply, 1.0)
    np.testing.assert_allclose([float(leaf.sum()) for leaf in kept.values()], np.array([3, 4, 12]) / 13, rtol=2e-4)
    layers, size = clip_layers(reply, 1.0)
    np.testing.assert_allclose([float(leaf.sum()) for leaf in layers.values()], 1 / np.sqrt(3), rtol=2e-4)
    assert float(size) == pytest.approx(13)


def test_half_precision_is_summed_in_float32() -> None:
    """300 ones squared and summed in bfloat16 would stop at 256."""
    reply = {"w": jnp.ones((70_000,), jnp.bfloat16)}
    kept, size = clip(reply, 1.0)
    assert kept["w"].dtype == jnp.float32 and float(size) == pytest.approx(np.sqrt(70_000), rel=1e-5)
    assert length(kept) <= 1.0


def test_the_gauge_of_a_lora_matters() -> None:
    """(A / c, c B) is the same model, and is clipped otherwise; with A frozen, as FFA-LoRA has it, there is one gauge."""
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 2), (2, 6)))
    change = {"a": 0.5 * a, "b": 0.5 * b}
    rescaled = {"a": change["a"] / 10, "b": change["b"] * 10}
    plain, other = clip(change, 0.5)[0], clip(rescaled, 0.5)[0]
    same_model = np.allclose(a @ b, (a / 10) @ (b * 10), rtol=1e-4)
    back = {"a": other["a"] * 10, "b": other["b"] / 10}
    assert same_model and not np.allclose(plain["b"], back["b"], rtol=0.1)
