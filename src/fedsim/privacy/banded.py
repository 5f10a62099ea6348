"""Noise that later rounds take away again: DP-FTRL by banded matrix factorisation, and the cohorts that it needs.

Choquette-Choo et al., (Amplified) Banded Matrix Factorization, arXiv 2306.08153. The noise of rounds 1 to T is C^-1 Z, with C
lower triangular, of b bands, its columns of norm 1 at most, and Z independent. Parameters are sums of changes, and the noise in
such a sum is less than that of as many independent draws. What it needs: a client's rounds are at least b apart. So clients are
divided into b cohorts once, by lot, and round t draws a Poisson sample of cohort t mod b. C is jax-privacy's; what it costs is in
`accounting.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import jax
import numpy as np

from fedsim.core import Population, Tree, places
from fedsim.randomness import stream


def strategy(bands: int) -> np.ndarray:
    """The coefficients of C, a Toeplitz matrix of so many bands, (bands,), of norm 1.

    They are the leading ones of the square root of the matrix of sums (Fichtenberger et al., ICML 2023), by
    `jax_privacy.matrix_factorization.toeplitz.optimal_max_error_strategy_coefs`.

    Raises:
        ValueError: jax-privacy is not installed.
    """
    try:
        toeplitz = importlib.import_module("jax_privacy.matrix_factorization.toeplitz")
    except ImportError as error:
        raise ValueError(
            f"Expected bands={bands} with jax-privacy, but it cannot be imported ({error}); pip install 'fedsim-jax[privacy]'."
        ) from None
    with jax.numpy_dtype_promotion("standard"):
        found = np.asarray(toeplitz.optimal_max_error_strategy_coefs(bands), np.float64)
    return found / np.linalg.norm(found)


def inverse(coefficients: np.ndarray, rounds: int) -> np.ndarray:
    """The first column of C^-1, which is Toeplitz too, (rounds,), by substitution in float64."""
    found = np.zeros(rounds)
    for t in range(rounds):
        before = sum(c * found[t - j] for j, c in enumerate(coefficients) if 0 < j <= t)
        found[t] = ((t == 0) - before) / coefficients[0]
    return found


def cohorts(seed: int, clients: int, bands: int) -> np.ndarray:
    """The cohort of each client, (N,): each by itself and with equal chances, so that nobody's depends on who else is there."""
    return stream(seed, "bands").integers(0, bands, clients)


@functools.lru_cache(maxsize=2)  # so that no round looks at all clients
def members(seed: int, clients: int, bands: int) -> tuple[np.ndarray, ...]:
    """The clients of each cohort, ascending."""
    of = cohorts(seed, clients, bands)
    return tuple(np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of, minlength=bands))[:-1]))


def cohort_places(seed: int, clients: int, bands: int, chance: float) -> int:
    """Members that fewer than one round in a million exceeds, in the largest cohort."""
    return max(places(len(own), chance) for own in members(seed, clients, bands))


def cyclic(seed: int, bands: int) -> Callable[[np.random.Generator, Tree, Population], np.ndarray]:
    """A `select`: in round t each client of cohort t mod `bands` comes by itself, all with the same chance.

    It is `bands` times the share of clients that a round asks for.

    Guarantees:
        rounds apart: whoever comes twice comes a multiple of `bands` rounds later.
    """

    def select(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
        chance = bands * population.cohort / population.size
        cap = cohort_places(seed, population.size, bands, chance)
        own = members(seed, population.size, bands)[population.round % bands]
        drawn = rng.choice(own, rng.binomial(len(own), chance), replace=False)
        return np.pad(drawn, (0, -len(drawn) % cap if len(drawn) else cap), constant_values=-1)

    return select
