"""Randomness of the host, each under a named purpose, so that no purpose disturbs another; NumPy only.

Nothing random is carried from round to round: `stream` gives a generator, `mix` and `chance` give numbers by counter, the
same for every client however many are drawn. Keys for compiled programs are made in `engine/keys.py` by the same rule.
"""

from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on the seed and a named purpose only."""
    return np.random.default_rng([seed, *purpose.encode()])


def mix(*words: np.ndarray | int) -> np.ndarray:
    """A hash of integers to uint64 (splitmix64 rounds), element by element: random numbers by counter.

    The same on every platform and NumPy version, and costs nothing to start: a generator per client would.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def chance(seed: int, purpose: str, *numbers: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) by counter: the same for the same seed, purpose and numbers; broadcast, float64."""
    return (mix(seed, zlib.crc32(purpose.encode()), *numbers) >> np.uint64(11)) * 2.0**-53
