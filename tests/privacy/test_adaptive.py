"""A norm that follows a quantile of the changes' norms, and what the count that it follows costs."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_central import QUIET, TABLE, exchanged, sum_of

from fedsim.privacy.central import central, fold, split
from fedsim.testing.toys import COHORT, SIZES

pytestmark = pytest.mark.usefixtures("compile_once")

REAL = [i for i in COHORT if SIZES[i]]


def counted(norms: Any, bound: float, weights: Any = None) -> float:
    """Half the changes that are short enough less half of those that are not, of vectors of these norms."""
    replies = {"w": jnp.asarray(norms, jnp.float32)[:, None] * jnp.array([0.6, 0.8])}
    args = {name: jnp.float32(value) for name, value in {"clip": bound, "noise": 0, "expected": 1, "count": 0}.items()}
    own = fold(False, adaptive=True)
    total = own.zero({"w": jnp.zeros(2)}, len(norms))
    weights = jnp.ones(len(norms)) if weights is None else jnp.asarray(weights, jnp.float32)
    return float(own.add(total, replies, weights, jnp.arange(len(norms)), args)[1])


@pytest.mark.parametrize("more", [0.0, 0.5, 3.0, 1e38, np.nan, np.inf])
def test_neighbouring_counts(more: float) -> None:
    """One client more moves the count by 1/2, whatever it replies; one that does not count, not at all."""
    few = counted([0.5, 2.0, 3.0], 1.0)
    assert few == -0.5
    assert abs(counted([0.5, 2.0, 3.0, more], 1.0) - few) == 0.5
    assert counted([0.5, 2.0, 3.0, more], 1.0, [1, 1, 1, 0]) == few


@pytest.mark.parametrize(("noise", "expected"), [(0.9166, 8.0), (1.0, 100.0), (0.05, 10.0), (30.0, 4.0)])
def test_sum_and_count_cost_as_much_as_one_sum(noise: float, expected: float) -> None:
    """By the accountant: two Gaussian mechanisms, whose sensitivities are one norm and 1/2; and the sum's noise is 2.1 % more."""
    dp = pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedsim-jax[privacy]'")
    of_sum, deviation = split(noise, expected)
    assert noise < of_sum <= 1.021 * noise and deviation >= expected / 20

    def epsilon(*noises: float) -> float:
        accountant = dp.rdp.RdpAccountant()
        for each in noises:
            accountant.compose(dp.GaussianDpEvent(each))
        return float(accountant.get_epsilon(1e-5))

    assert epsilon(of_sum, deviation / 0.5) == pytest.approx(epsilon(noise), rel=1e-4)


def test_the_first_exchange_cuts_to_the_norm_and_adds_its_share_of_noise() -> None:
    average = central(3.0, QUIET, 5.0, quantile=0.5)
    found, info, cohort = exchanged(average)
    np.testing.assert_allclose(found, sum_of(COHORT, 3.0) / 5.0, rtol=2e-3, atol=1e-4)
    assert (float(info.weight), int(info.reported)) == (5.0, 5)
    share = -len(REAL) / 2 / 5 + 0.5  # all of them are longer
    assert np.log(float(cohort.averaging) / 3.0) == pytest.approx(-0.2 * (share - 0.5), abs=0.2 * 5 * 0.05)
    average = central(2.0, 1.5, 5.0, quantile=0.5)
    entries, _, _ = exchanged(average, (-1, -1))
    z, _ = split(1.5, 5.0)
    assert entries.std() * 5.0 / 2.0 == pytest.approx(z, rel=5 / np.sqrt(2 * entries.size))


def test_noise_of_the_count() -> None:
    """Over many exchanges of nobody: the norm's logarithm moves by 0.2 of a normal of deviation `count` / expected."""
    average, z, expected = central(1.0, 2.0, 10.0, quantile=0.5), 2.0, 10.0
    _, count = split(z, expected)
    done = jax.jit(
        lambda key: average.reduce.done(({"w": jnp.zeros(3)}, jnp.zeros(())), average.args(jnp.float32(1.0), 1), key)
    )
    found = jax.vmap(done)(jax.random.split(jax.random.key(0), 4000))
    assert float(found.seen.std()) == pytest.approx(count / expected, rel=5 / np.sqrt(8000))
    assert float(found.seen.mean()) == pytest.approx(0.5, abs=5 * count / expected / np.sqrt(4000))
    for entry in np.asarray(found.value["w"]).T:  # noise of its own
        assert abs(np.corrcoef(entry, found.seen)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("start", [0.01, 1000.0])
def test_the_norm_finds_its_quantile(start: float) -> None:
    """From far below and far above, of norms 1 to 100; then the share of uncut changes is the quantile."""
    norms, aim = np.arange(1.0, 101.0, dtype=np.float32), 0.7
    average = central(start, 0.01, 100.0, quantile=aim)
    replies = {"w": jnp.asarray(norms)[:, None] * jnp.array([0.6, 0.8])}

    @jax.jit
    def turn(norm: jax.Array, key: jax.Array) -> jax.Array:
        args, own = average.args(norm, 100), average.reduce
        total = own.add(own.zero({"w": jnp.zeros(2)}, 100), replies, jnp.ones(100), jnp.arange(100), args)
        return average.next(norm, own.done(total, args, key).seen)

    norm = jnp.float32(start)
    for number in range(200):
        norm = turn(norm, jax.random.key(number))
    assert abs(float((norms <= float(norm)).mean()) - aim) < 0.1


@pytest.mark.slow
def test_lanes_and_devices_count_once() -> None:
    """Of (3 lanes, 8 devices) as of one: the count is summed before its noise."""
    norms = np.linalg.norm(TABLE, axis=1)
    average = central(float(np.median(norms)), 1e-3, 8.0, quantile=0.5)
    states = [float(exchanged(average, grid=grid)[2].averaging) for grid in ((1, 1), (3, 8))]
    assert states[0] == pytest.approx(states[1], rel=1e-5)
    two = exchanged(average, times=2)[2].averaging
    assert all(a != b for a, b in itertools.pairwise([float(np.median(norms)), states[0], float(two)]))


def test_noise_independence_of_entries_leaves_and_count() -> None:
    """No two numbers of the noise agree, whatever the number of leaves: a count that shared a leaf's key would tell its noise."""
    own = fold(False, adaptive=True)
    args = {name: jnp.float32(value) for name, value in {"clip": 1, "noise": 1, "expected": 1, "count": 1}.items()}
    total = own.zero({name: jnp.zeros(4) for name in "abcde"}, 1)

    @jax.jit
    @jax.vmap
    def drawn(key: jax.Array) -> jax.Array:
        found = own.done(total, args, key)
        return jnp.concatenate([*jax.tree.leaves(found.value), found.seen[None] - 0.5])

    numbers = np.asarray(drawn(jax.random.split(jax.random.key(0), 4000)))
    between = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    assert np.abs(between).max() < 5 / np.sqrt(4000)  # five standard errors of a correlation of zero
    assert np.abs(numbers.std(axis=0) - 1).max() < 5 / np.sqrt(2 * 4000)
