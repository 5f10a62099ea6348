"""Laws of clients, from the options' text: a value for each client, and who can be reached in which round."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import Network, nearest, parse_call, take_call
from fedsim.network.traces import read_trace
from fedsim.randomness import chance

LEAST, MOST = 1e-12, 1e12  # what a client's value is drawn from; beyond, times become zero or infinite
WIDEST = 10.0  # sigma of a log-normal law: 30 standard deviations are still finite

Law = Callable[[np.ndarray], np.ndarray]  # client ids (K,) -> a value of each, (K,) float64


def law(text: str, option: str, seed: int) -> Law:
    """A value for each client, drawn once: `"20"`, `"uniform(5, 50)"`, `"lognormal(median=20, sigma=0.5)"`, `"choice(5, 20)"`.

    Raises:
        ValueError: an unknown law (the nearest is named), wrong arguments, or values that are not positive.
    """
    name, args, options = parse_call(text, option)
    try:
        constant = float(name)
    except ValueError:
        pass
    else:
        _require_positive([constant], text, option)
        return lambda ids: np.full(len(ids), constant)
    if name not in LAWS:
        raise ValueError(f"Expected {option}={text!r} to be a number or one of {', '.join(LAWS)}{nearest(name, LAWS)}.")
    _require_positive([*args, *options.values()], text, option)
    return _called(LAWS[name], name, args, options, text, option)(seed, option)


def uniform(low: float, high: float) -> Callable[[int, str], Law]:
    """Evenly between `low` and `high`."""
    if not low <= high:
        raise ValueError("low is above high")
    return lambda seed, purpose: lambda ids: low + (high - low) * chance(seed, purpose, ids)


def lognormal(median: float, sigma: float) -> Callable[[int, str], Law]:
    """median exp(sigma z) with z standard normal, by Box and Muller's transform of two uniform numbers (1958)."""
    if sigma > WIDEST:
        raise ValueError(f"sigma={sigma} <= {WIDEST} does not hold")

    def made(seed: int, purpose: str) -> Law:
        def values(ids: np.ndarray) -> np.ndarray:
            u, v = chance(seed, purpose, ids), chance(seed, f"{purpose} angle", ids)
            return median * np.exp(sigma * np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v))

        return values

    return made


def choice(*values: float) -> Callable[[int, str], Law]:
    """One of the values, each as likely."""
    if not values:
        raise ValueError("no value to choose from")
    table = np.array(values, float)
    return lambda seed, purpose: lambda ids: table[(chance(seed, purpose, ids) * len(table)).astype(np.int64)]


LAWS: dict[str, Callable[..., Any]] = {"uniform": uniform, "lognormal": lognormal, "choice": choice}


def _called(
    make: Callable[..., Any], name: str, args: list[Any], options: dict[str, Any], text: str, option: str
) -> Any:
    try:
        bound = inspect.signature(make).bind(*args, **options)
        named = {n: v for n, v in bound.arguments.items() if n != "values"}  # those of `choice` are checked already
        return (
            make(*bound.args, **bound.kwargs) if "values" in bound.arguments else make(**take_call(make, named, name))
        )
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{name}() ")
        raise ValueError(f"Expected {option}={text!r} to be a call that {name} takes ({reason}).") from None


def _require_positive(values: Sequence[Any], text: str, option: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"Expected the numbers of {option}={text!r} to be > 0, not {value!r}; leave it out for none."
            )
        if not LEAST <= value <= MOST:
            raise ValueError(
                f"Expected the numbers of {option}={text!r} to be from {LEAST} to {MOST}, not {value!r}; correct it."
            )


# --- availability


def availability(
    options: Network, clients: int, rounds: int, seed: int
) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """(ids (K,), round from 1) -> (K,) bool, or None for everybody always.

    Raises:
        ValueError: an unknown law, impossible probabilities, or a trace with holes.
    """
    text = options.availability
    if options.traced:
        return read_trace(Path(text), clients, rounds)
    name, args, named = parse_call(text, "availability")
    if name not in ("always", *AVAILABILITY):
        known = ("always", *AVAILABILITY)
        raise ValueError(
            f"Expected availability={text!r} to be one of {', '.join(known)} or a .csv file{nearest(name, known)}."
        )
    if name == "always":
        if args or named:
            raise ValueError(f"Expected availability={text!r} to have no options; write always.")
        return None
    probability = _called(AVAILABILITY[name], name, args, named, text, "availability")
    return lambda ids, round: chance(seed, "available", round, ids) < probability(seed, ids, round)


def bernoulli(p: float = 0.8) -> Callable[[int, np.ndarray, int], np.ndarray | float]:
    """Each client in each round with probability `p`."""
    if not 0 < p <= 1:
        raise ValueError(f"0 < p={p} <= 1 does not hold")
    return lambda seed, ids, round: p


def diurnal(
    period: float = 24, peak: float = 0.9, low: float = 0.1
) -> Callable[[int, np.ndarray, int], np.ndarray | float]:
    """A wave over rounds between `low` and `peak`; a client's own phase is uniform over the period."""
    if not (0 <= low <= peak <= 1 and peak > 0):
        raise ValueError(f"0 <= low={low} <= peak={peak} <= 1 with a peak above 0 does not hold")
    if not LEAST <= period <= MOST:
        raise ValueError(f"period={period} > 0, from {LEAST} to {MOST}, does not hold")

    def probability(seed: int, ids: np.ndarray, round: int) -> np.ndarray:
        turns = round / period - chance(seed, "phase", ids)
        return low + (peak - low) * (1 + np.cos(2 * np.pi * turns)) / 2

    return probability


AVAILABILITY: dict[str, Callable[..., Any]] = {"bernoulli": bernoulli, "diurnal": diurnal}
