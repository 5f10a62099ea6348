"""Noise that is correlated over rounds: its matrix and its account against jax-privacy's, its cohorts, and whole runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_central import QUIET, exchanged, sum_of

import fedsim
from fedsim.config import Config, Speed
from fedsim.core import Population
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.privacy import accounting
from fedsim.privacy.banded import cohort_places, cohorts, cyclic, inverse, strategy
from fedsim.privacy.central import central, noisy, noisy_by_rows
from fedsim.simulation import build, private
from fedsim.testing.toys import COHORT, engine, tiny_problem

dp = pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedsim-jax[privacy]'")
toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz", reason="needs jax-privacy")
pytestmark = pytest.mark.usefixtures("compile_once")

SPEED = Speed(devices=1, lanes=2, compilation_cache=False, checkpoint_every=1)


def matrix(bands: int, rounds: int) -> np.ndarray:
    """C, as the library makes it of the coefficients."""
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(toeplitz.materialize_lower_triangular(jnp.asarray(strategy(bands)), rounds), np.float64)


@pytest.mark.parametrize(("bands", "rounds"), [(1, 4), (2, 5), (4, 4), (5, 30)])
def test_inverse_is_that_of_the_library(bands: int, rounds: int) -> None:
    """Its first column, and by NumPy; C has norm 1, and its coefficients fall, as the library's sensitivity asks for."""
    found = inverse(strategy(bands), rounds)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(found, toeplitz.inverse_coef(jnp.asarray(strategy(bands)), rounds), atol=1e-5)
    np.testing.assert_allclose(found, np.linalg.inv(matrix(bands, rounds))[:, 0], atol=1e-6)
    assert np.linalg.norm(strategy(bands)) == pytest.approx(1.0) and (np.diff(strategy(bands)) < 0).all()


def drawn(bands: int, rounds: int, size: int, deviation: float = 1.0) -> np.ndarray:
    """The noise of all exchanges, (rounds, size), one after the other as a run draws it."""
    average = central(1.0, deviation, 1.0, inverse=inverse(strategy(bands), rounds))
    done, state, found = jax.jit(average.reduce.done), average.init(), []
    for t in range(rounds):
        made = done({"a": jnp.zeros(size)}, average.args(state, 2), jax.random.key(100 + t))
        state = average.next(state, made.seen)
        found.append(np.asarray(made.value["a"], np.float64))
    return np.stack(found)


@pytest.mark.parametrize("bands", [1, 3])
def test_noise_covariance(bands: int) -> None:
    """C times the noise is white, and its covariance that of C^-1 Z, each entry within five standard errors."""
    rounds, size, z = 7, 20_000, 1.7
    noise, c = drawn(bands, rounds, size, z), matrix(bands, rounds)
    white = c @ noise
    for rows, aim in ((white, np.eye(rounds)), (noise, np.linalg.inv(c) @ np.linalg.inv(c).T)):
        found = rows @ rows.T / size / z**2
        error = np.sqrt((np.outer(np.diag(aim), np.diag(aim)) + aim**2) / size)
        assert (np.abs(found - aim) < 5 * error).all()


def test_each_row_is_the_librarys_of_the_same_draws() -> None:
    """The library's C^-1 as a stream, fed with the independent draws, gives the same noise."""
    rounds, args = 6, {"noise": jnp.float32(0.5), "inverse": jnp.asarray(inverse(strategy(3), 6), jnp.float32)}
    key = jax.random.key(7)
    white = [noisy({"a": jnp.zeros(5)}, jnp.float32(0.5), jax.random.fold_in(key, s))["a"] for s in range(rounds)]
    with jax.numpy_dtype_promotion("standard"):
        expected = toeplitz.inverse_as_streaming_matrix(jnp.asarray(strategy(3), jnp.float32)) @ jnp.stack(white)
    for t in range(rounds):
        now = {**args, "count": jnp.int32(t), "key": jax.random.key_data(key)}
        found, _ = noisy_by_rows({"a": jnp.zeros(5)}, now, key if t == 0 else jax.random.key(t))
        np.testing.assert_allclose(found["a"], expected[t], atol=1e-5)


def test_sums_over_rounds_have_less_noise() -> None:
    """What it is for: after 30 rounds the parameters' noise is far below that of independent draws, as A C^-1 says."""
    rounds, size = 30, 4000
    last = drawn(6, rounds, size).sum(axis=0)
    rows = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(matrix(6, rounds))
    assert last.std() == pytest.approx(np.linalg.norm(rows[-1]), rel=5 / np.sqrt(2 * size))
    assert last.std() < 0.7 * np.sqrt(rounds)


def test_a_clients_columns_are_orthogonal() -> None:
    """Sensitivity: of rounds at least `bands` apart at most sqrt(their number), by the library and by brute force."""
    bands, rounds = 4, 18
    c = matrix(bands, rounds)
    with jax.numpy_dtype_promotion("standard"):
        squared = float(toeplitz.minsep_sensitivity_squared(jnp.asarray(strategy(bands)), bands, n=rounds))
    terms = accounting.terms("central", clients=80, per_round=5, delta=1e-3, bands=bands)
    assert squared <= terms.turns(rounds) * (1 + 1e-5)
    for first in range(bands):
        columns = c[:, first::bands]
        assert np.linalg.norm(columns.sum(axis=1)) ** 2 <= terms.turns(rounds) * (1 + 1e-6)
        assert np.abs(columns.T @ columns - np.diag(np.diag(columns.T @ columns))).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "rounds"), [(1, 10), (4, 10), (4, 12), (5, 50)])
def test_account_is_that_of_the_library(bands: int, rounds: int) -> None:
    """jax-privacy's event for cyclic Poisson samples, by both accountants; the curve rises in every `bands`-th round."""
    from jax_privacy.experimental.accounting import amplified_bandmf_event

    event = amplified_bandmf_event(1.3, rounds, num_bands=bands, sampling_prob=bands * 8 / 64)
    for name, accountant in (("pld", dp.pld.PLDAccountant()), ("rdp", dp.rdp.RdpAccountant())):
        terms = accounting.terms("central", clients=64, per_round=8, delta=1e-3, accountant=name, bands=bands)
        expected = accountant.compose(event).get_epsilon(1e-3)
        assert accounting.epsilon(terms, 1.3, rounds) == pytest.approx(expected, rel=1e-6)
        after = accounting.curve(terms, 1.3, rounds)
        curve = [after(t) for t in range(rounds + 1)]
        assert curve[-1] == pytest.approx(expected, rel=1e-3)
        rises = [t for t in range(1, rounds + 1) if curve[t] > curve[t - 1]]
        assert rises == list(range(1, rounds + 1, bands))


def test_rounds_apart() -> None:
    """Whoever comes twice comes a multiple of `bands` later; all with one chance, within five standard errors."""
    bands, clients, per_round, rounds = 4, 400, 20, 400
    select, own = cyclic(3, bands), cohorts(3, clients, bands)
    came = np.zeros((rounds, clients))
    for round in range(1, rounds + 1):
        ids = select(np.random.default_rng(round), None, Population(clients, per_round, round=round))
        real = ids[ids >= 0]
        assert len(set(real)) == len(real) and len(ids) == cohort_places(3, clients, bands, 0.2)
        came[round - 1, real] = 1
    for client in range(clients):
        assert {(t + 1) % bands for t in np.flatnonzero(came[:, client])} <= {own[client]}
    chance = came.sum() / (rounds / bands * clients)
    assert chance == pytest.approx(0.2, abs=5 * np.sqrt(0.2 * 0.8 / (rounds / bands * clients)))
    sizes = np.bincount(own, minlength=bands)
    assert (np.abs(sizes - clients / bands) < 5 * np.sqrt(clients / bands)).all()
    np.testing.assert_array_equal(cohorts(3, 100, bands), own[:100])  # no client's cohort depends on who else is there


@pytest.mark.parametrize("grid", [(1, 1), (3, 8)])
def test_the_sum_is_as_without_bands(grid: tuple[int, int]) -> None:
    average = central(1.0, QUIET, 5.0, inverse=inverse(strategy(3), 4))
    found, info, cohort = exchanged(average, grid=grid)
    np.testing.assert_allclose(found, sum_of(COHORT, 1.0) / 5.0, rtol=2e-3, atol=1e-4)
    assert int(info.reported) == 5 and int(cohort.averaging["count"]) == 1


@pytest.mark.slow
def test_the_first_exchange_gives_the_key() -> None:
    """Of another round another one, so that each phase of a run has noise of its own; lanes change nothing."""
    average = central(1.0, 1.0, 1.0, inverse=inverse(strategy(3), 4))
    runs = [exchanged(average, (-1, -1), grid=grid, round=r) for grid, r in (((2, 1), 1), ((3, 8), 1), ((2, 1), 2))]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert abs(np.corrcoef(runs[0][0], runs[2][0])[0, 1]) < 5 / np.sqrt(2000)
    lanes = engine(tiny_problem())
    later = Cohort(lanes, np.array([-1]), 2, Memory(lambda key, held: (), lanes.held), averaging=runs[0][2].averaging)
    np.testing.assert_array_equal(later.averaging["key"], runs[1][2].averaging["key"])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"))), backbone="mlp", peft="bias", clients=12,
        clients_per_round=4, rounds=5, optimizer="sgd", lr=0.05, min_size=3, dp="central", noise_multiplier=0.5,
        delta=1e-2, clip_norm=0.5, accountant="rdp", bands=3, head_rounds=1, seed=1,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_and_its_resume(config: Config, tmp_path: Path) -> None:
    """Epsilon rises when the first cohort comes again; cut back to each round and gone on with, the same bits."""
    whole = fedsim.run(config, SPEED, out=tmp_path / "whole", quiet=True)
    spent = [line["privacy"]["epsilon"] for line in whole.rounds]
    assert spent[0] == spent[1] == spent[2] < spent[3] == spent[4]
    assert {line["privacy"]["bands"] for line in whole.rounds} == {3} == {whole.summary["privacy"]["bands"]}
    for last in (1, 3):
        cut = tmp_path / f"cut-{last}"
        shutil.copytree(whole.directory, cut)
        (cut / "summary.json").unlink()
        for later in range(last + 1, config.rounds + 1):
            shutil.rmtree(cut / "checkpoints" / str(later), ignore_errors=True)
        again = fedsim.run(resume=cut, quiet=True)
        assert [line["privacy"] for line in again.rounds] == [line["privacy"] for line in whole.rounds]
        for name, value in whole.parameters.items():
            np.testing.assert_array_equal(again.parameters[name], value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bands": 0}, "Expected bands=0 > 0"),
        ({"bands": 4}, "bands=4 x clients_per_round=4 <= clients=12.*bands=3 or less"),
        ({"rounds": 2, "head_rounds": 0}, "bands=3 <= rounds=2"),
        ({"dp": "local"}, "bands=3 with dp='central'"),
        ({"sampling": "fixed"}, "bands=3 with sampling='poisson'"),
        ({"relation": "replace_one", "accountant": "pld"}, "bands=3 .* relation='replace_one'"),
        ({"clip_quantile": 0.5}, "clip_quantile=0.5 to be None with bands=3"),
    ],
)  # fmt: skip
def test_what_is_not_accounted_is_refused(config: Config, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build.check(config.replace(**options))


def test_exchanges_and_rounds_have_to_agree(config: Config) -> None:
    """Two exchanges a round, and a round without one, would bring a client's columns together."""
    from fedsim.core import Algorithm

    twice = Algorithm(*[lambda *args: None] * 3, releases=2)
    with pytest.raises(ValueError, match="releases=2 a round to be 1 with bands=3"):
        private.guarded(config, twice)
    found = private.spending(config)
    assert private.line(found, 4, {"count": np.int32(3)}, first=2) is not None
    with pytest.raises(ValueError, match="exchange once in every round with bands=3, but in 3 rounds it did 2 times"):
        private.line(found, 4, {"count": np.int32(2)}, first=2)
