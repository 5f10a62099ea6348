"""The private mean, exchange by exchange, against a loop in NumPy; each guarantee is a test of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import network, wire
from fedsim.core import Average, Local, Passes, Tree
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.folds import mean, uniform
from fedsim.privacy import central as central_module
from fedsim.privacy.central import central, fold, noisy
from fedsim.testing.toys import COHORT, SIZES, engine, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

GRIDS = [(1, 1), (3, 8)]  # lanes of a device, devices
TABLE = np.random.default_rng(3).normal(size=(len(SIZES), 2000)).astype(np.float32)
QUIET = 1e-12  # a noise multiplier that no float32 sum feels


def saying(table: np.ndarray = TABLE, marked: bool = True) -> Local:
    """A `Local` that trains nothing: a client's row of the table, in two leaves."""

    def finish(held: Tree, message: Tree, carry: Tree, client: Any) -> Any:
        row = jnp.asarray(table)[client.id]
        reply = {"a": row[:1000].reshape(10, 100), "b": row[1000:]}
        return wire.coded(reply) if marked else reply, client.memory, {}

    return Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry, {"rows": batch.mask.sum()}),
        finish,
        Passes(1, None, 4),
    )


def exchanged(
    average: Average,
    ids: Sequence[int] = COHORT,
    local: Local | None = None,
    *,
    grid: tuple[int, int] = (2, 1),
    round: int = 1,
    times: int = 1,
    averaging: Tree = None,
    drops: Sequence[int] = (),
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Any, Cohort]:
    """Result as one vector, info, and the cohort after its exchanges."""
    lanes = engine(tiny_problem(), lanes=grid[0], devices=grid[1], seed=seed, **options)
    given = np.array(ids, np.int64)
    conditions = network.reliable(given)
    conditions = conditions._replace(drops=np.isin(given, drops))
    averaging = lanes.put(average.init() if averaging is None else averaging)
    cohort = Cohort(
        lanes, given, round, Memory(lambda key, held: (), lanes.held), conditions, average=average, averaging=averaging,
        releases=times,
    )  # fmt: skip
    local = local or saying()
    found = [cohort.exchange({"w": jnp.zeros(())}, local) for _ in range(times)]
    vectors = [np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(r)]) for r, _ in found]
    return vectors[0] if times == 1 else np.stack(vectors), found[-1][1], cohort


def sum_of(ids: Sequence[int], bound: float, table: np.ndarray = TABLE) -> np.ndarray:
    """Clipped and summed, in float64; whoever has no examples replies nothing."""
    total = np.zeros(table.shape[1])
    for i in ids:
        if i >= 0 and SIZES[i]:
            row = table[i].astype(np.float64)
            total += row * min(1.0, bound / np.linalg.norm(row))
    return total


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bound", brief([30.0, 1.0, 1e6]))
def test_expected_denominator(grid: tuple[int, int], bound: float) -> None:
    """The sum is divided by the expected cohort, whoever came; clipped before it is summed, in whichever lanes."""
    for ids in (COHORT, (2, -1, 0, -1), (-1, -1, -1)):
        found, info, _ = exchanged(central(bound, QUIET, 5.0), ids, grid=grid)
        np.testing.assert_allclose(
            found, sum_of(ids, bound) / 5.0, rtol=2e-3, atol=1e-4 * bound / 5 * (bound < 1e6) + 1e-5
        )
        assert (float(info.weight), int(info.reported)) == (5.0, 5)


def test_a_large_norm_and_no_noise_are_the_plain_mean() -> None:
    """The reduction: with the cohort as denominator, FedAvg's own uniform mean."""
    plain = Average(
        "mean", mean(uniform)._replace(done=lambda t, a, k: central_module.Averaged(t[0], t[1])), plain=True
    )
    total, info, _ = exchanged(plain)
    found, _, _ = exchanged(central(1e9, 1e-20, float(info.weight)))
    np.testing.assert_allclose(found * float(info.weight), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e38])
def test_neighbouring_cohorts(broken: float) -> None:
    """One client more, or another one, moves the sum by one norm, or two: whatever they reply."""
    table = TABLE.copy()
    table[7, 5] = broken
    bound, expected = 0.7, 4.0
    without, _, _ = exchanged(central(bound, 0.5, expected), (2, 0, 4), saying(table))
    with_, _, _ = exchanged(central(bound, 0.5, expected), (2, 0, 7, 4), saying(table))
    # The noise is that of round 1 in all of them: what differs is the clients'.
    assert np.linalg.norm((with_ - without) * expected) <= bound * (1 + 1e-3)
    one, _, _ = exchanged(central(bound, 0.5, expected), (2, 0, 9, 4), saying(table))
    moved = np.linalg.norm((one - with_) * expected)
    assert moved <= 2 * bound * (1 + 1e-3)
    assert moved > bound or not np.isfinite(broken)  # so that 2 C is needed


def test_a_dropped_client_takes_the_denominator_along_nowhere() -> None:
    found, info, _ = exchanged(central(1.0, QUIET, 6.0), drops=(7, 4))
    np.testing.assert_allclose(found, sum_of([i for i in COHORT if i not in (7, 4)], 1.0) / 6.0, rtol=1e-3, atol=1e-5)
    assert int(info.reported) == 6


def noise_of(z: float, bound: float, expected: float, **options: Any) -> np.ndarray:
    """The noise on the sum in units of the norm: what is left without the clients' part."""
    found, _, _ = exchanged(central(bound, z, expected), (-1, -1), **options)
    return found * expected / bound


def test_noise_variance() -> None:
    """Of 2,000 entries: standard deviation z C on the sum, hence z C / expected on the mean, within five standard errors.

    Noise that was calibrated to the sum and added to the mean, or added twice, or on each of 3 x 8 lanes, is far outside.
    """
    for z, bound, expected, grid in ((0.8, 0.3, 5.0, (2, 1)), (3.0, 2.0, 50.0, (3, 8))):
        entries = noise_of(z, bound, expected, grid=grid)
        error = 5 / np.sqrt(2 * len(entries))
        assert entries.std() == pytest.approx(z, rel=error)
        assert abs(entries.mean()) < 5 * z / np.sqrt(len(entries))
        halves = entries[:1000], entries[1000:]
        assert abs(np.corrcoef(*halves)[0, 1]) < 5 / np.sqrt(1000)
        sorted_ = np.sort(entries / z)
        normal = np.sort(np.random.default_rng(0).normal(size=(200, len(entries))), axis=1).mean(axis=0)
        assert np.abs(sorted_ - normal)[50:-50].max() < 0.2  # quantiles of a normal


def test_noise_independence() -> None:
    """Of other rounds, exchanges, seeds; and the same once more where all of these are the same, so that a resume repeats it."""
    first = noise_of(1.0, 1.0, 4.0)
    again = noise_of(1.0, 1.0, 4.0, grid=(3, 8))
    np.testing.assert_array_equal(first, again)
    others = [noise_of(1.0, 1.0, 4.0, round=2), noise_of(1.0, 1.0, 4.0, seed=1)]
    two, _, _ = exchanged(central(1.0, 1.0, 4.0), (-1, -1), times=2)
    others.append(two[1] * 4.0)
    np.testing.assert_allclose(two[0] * 4.0, first, rtol=1e-6)
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(len(first))


def test_noise_of_each_leaf_is_its_own() -> None:
    """Two leaves of one shape."""
    made = noisy({"a": jnp.zeros(500), "b": jnp.zeros(500)}, jnp.float32(1.0), jax.random.key(0))
    assert abs(np.corrcoef(made["a"], made["b"])[0, 1]) < 5 / np.sqrt(500)


def test_an_empty_round_adds_noise() -> None:
    found, info, _ = exchanged(central(1.0, 1.0, 4.0), (-1, -1, -1))
    assert found.std() > 0.2 and float(info.weight) == 4.0 and central(1.0, 1.0, 4.0).runs_empty


def test_per_layer() -> None:
    """Each of the two leaves at C / sqrt(2): together C, so the noise is that of one clipping."""
    found, _, _ = exchanged(central(1.0, QUIET, 1.0, per_layer=True), (2,))
    norms = np.linalg.norm(found[:1000]), np.linalg.norm(found[1000:])
    np.testing.assert_allclose(norms, np.sqrt(0.5), rtol=1e-3)


def test_other_numbers_recompile_nothing() -> None:
    """Norm, noise and cohort are data of one fold."""
    assert central(1.0, 1.0, 4.0).reduce is central(2.0, 3.0, 5.0).reduce is fold(False)
    assert fold(True) is not fold(False)


def test_what_is_not_marked_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected every part of a reply to be a change for average='private mean'"):
        exchanged(central(1.0, 1.0, 4.0), local=saying(marked=False))


def test_another_fold_is_refused() -> None:
    lanes = engine(tiny_problem())
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(lambda k, h: (), lanes.held), average=central(1.0, 1.0, 4.0))
    with pytest.raises(ValueError, match="Expected average='private mean' to fold all replies"):
        cohort.exchange({"w": jnp.zeros(())}, saying(), mean())


def test_one_exchange_more_than_accounted_is_refused() -> None:
    lanes = engine(tiny_problem())
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(lambda k, h: (), lanes.held), average=central(1.0, 1.0, 4.0))
    local = saying()
    cohort.exchange({"w": jnp.zeros(())}, local)
    with pytest.raises(ValueError, match="to fold 1 exchanges a round"):
        cohort.exchange({"w": jnp.zeros(())}, local)


def test_whole_numbers_are_refused() -> None:
    def finish(held: Tree, message: Tree, carry: Tree, client: Any) -> Any:
        return wire.coded({"count": client.n}), client.memory, {}

    with pytest.raises(ValueError, match="leaf 'count' of a reply to hold floating-point numbers"):
        exchanged(central(1.0, 1.0, 4.0), local=saying()._replace(finish=finish))


@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier", "expected"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_numbers_are_refused(name: str, value: float) -> None:
    given = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected": 4.0} | {name: value}
    with pytest.raises(ValueError, match=f"Expected {name}="):
        central(**given)


@pytest.mark.slow
def test_codecs_come_before_the_norm() -> None:
    """The server clips what it has decoded, so that no codec moves the sum by more: topk feeds back what grows."""
    bound = 0.5
    for codec in ("bfloat16", "quantise(2)", "topk(0.1)"):
        up = wire.codec(codec)
        found, _, _ = exchanged(central(bound, QUIET, 1.0), (7,), up=up)
        assert 0.9 * bound < np.linalg.norm(found) <= bound * (1 + 1e-5)
