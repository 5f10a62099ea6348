"""Epsilon of a whole run from its noise, and the noise for an epsilon, by dp-accounting. No JAX, no data.

Noise multiplier z means: on a sum of vectors of norm at most C lies Gaussian noise of standard deviation z C. How much one
client or example can move that sum depends on the neighbouring relation: C where it is added, removed or zeroed, 2 C where it
is replaced. The library's PLD accountant doubles by itself, its RDP accountant does not (0.6.0), so `event` does.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from fedsim.config.privacy import SUPPORTED, sampling_of, terms_of

UNITS = {"central": "client", "local": "client", "example": "example"}
SENSITIVITY = {"add_or_remove_one": 1.0, "zero_out": 1.0, "replace_one": 2.0}  # of the sum, in clip norms
STEP = 1e-4  # of the grid of privacy losses, as dp-accounting has it
POINTS = 1_000_000  # of that grid at most: a coarser one gives a larger epsilon, never a smaller one
TOLERANCE = 1e-4  # of a calibrated noise multiplier, relative
LEAST, MOST = 1e-3, 1e6  # noise multipliers that are looked for


class Terms(NamedTuple):
    """What an epsilon is a statement about."""

    mechanism: str  # "central", "local" or "example"
    sampling: str  # "poisson", "fixed", or "none" where no sample is claimed
    relation: str
    accountant: str
    delta: float
    clients: int
    per_round: int  # expected cohort
    times: int = 1  # Gaussian sums of one round that see the same client or example
    bands: int = 1  # cohorts that come round in order: a client is in one, and its rounds are `bands` apart

    @property
    def unit(self) -> str:
        """What is protected."""
        return UNITS[self.mechanism]

    @property
    def rate(self) -> float:
        """Chance of a client to be in a round of its cohort."""
        return self.bands * self.per_round / self.clients

    def turns(self, rounds: int) -> int:
        """Rounds, of the first so many, in which a client can be."""
        return -(-rounds // self.bands)


def terms(
    mechanism: str,
    *,
    clients: int,
    per_round: int,
    delta: float,
    sampling: str = "poisson",
    relation: str | None = None,
    accountant: str | None = None,
    releases: int = 1,
    epochs: int = 1,
    bands: int = 1,
) -> Terms:
    """The terms of a mechanism, with the usual relation and accountant where none is given.

    Args:
        releases: exchanges of a round.
        epochs: passes of a client over its examples in a round, each of which counts under example-level privacy.

    Raises:
        ValueError: the accountant does not account that sampling under that relation.
    """
    relation, accountant = terms_of(mechanism, sampling, relation, accountant)
    times = releases * (epochs if mechanism == "example" else 1)
    return Terms(
        mechanism, sampling_of(mechanism, sampling), relation, accountant, delta, clients, per_round, times, bands
    )


def library() -> Any:
    """dp-accounting.

    Raises:
        ValueError: it is not installed.
    """
    try:
        found = importlib.import_module("dp_accounting")  # which imports its pld and rdp
    except ImportError as error:
        raise ValueError(
            f"Expected dp-accounting for an epsilon, but it cannot be imported ({error}); pip install 'fedsim-jax[privacy]'."
        ) from None
    logging.getLogger("absl").addFilter(_of_an_order)
    return found


def _of_an_order(said: logging.LogRecord) -> bool:
    """False for what the RDP accountant says of every order that it leaves out: the others give a bound."""
    return "Excluding this order" not in str(said.msg)


def event(terms: Terms, noise: float) -> Any:
    """One round in which a client can be, as a `DpEvent`.

    With `bands` noise is correlated by the inverse of a matrix C of so many bands whose columns have norm 1. Columns of a client's
    rounds are then orthogonal, so that its rounds are as many Gaussian sums on samples of its cohort: Choquette-Choo et al., arXiv
    2306.08153, theorem 4; jax-privacy's `amplified_bandmf_event`.

    Sums that see the same client, each with noise of its own, are together one sum with less: z / sqrt(times). That is exact
    for the Gaussian mechanism, and holds where a later sum depends on an earlier one.
    """
    dp = library()
    if terms.accountant == "rdp":  # the PLD accountant knows the relation's sensitivity by itself
        noise = noise / SENSITIVITY[terms.relation]
    gaussian = dp.GaussianDpEvent(noise / math.sqrt(terms.times))
    if terms.sampling == "poisson":
        return dp.PoissonSampledDpEvent(terms.rate, gaussian)
    if terms.sampling == "fixed":
        return dp.SampledWithoutReplacementDpEvent(terms.clients, terms.per_round, gaussian)
    return gaussian


def accountant(terms: Terms, noise: float, rounds: int) -> Any:
    """A fresh accountant, whose grid is coarse enough for the losses of so many rounds."""
    dp = library()
    relation = dp.NeighboringRelation[
        {"zero_out": "REPLACE_SPECIAL"}.get(terms.relation, terms.relation.upper())
    ]  # its names
    if terms.accountant == "rdp":
        return dp.rdp.RdpAccountant(neighboring_relation=relation)
    return dp.pld.PLDAccountant(relation, step(terms, noise, rounds))


def step(terms: Terms, noise: float, rounds: int) -> float:
    """Width of the PLD accountant's grid: 1e-4, or more where losses would need more than `POINTS`."""
    signal = SENSITIVITY[terms.relation] ** 2 * terms.times / noise**2
    rate = terms.rate if terms.sampling == "poisson" else 1.0
    mean = signal / 2 if rate == 1 or signal > 50 else min(signal, rate**2 * math.expm1(signal)) / 2  # of one round
    return max(STEP, (terms.turns(rounds) * mean + signal + 10 * math.sqrt(signal)) / POINTS)


def epsilon(terms: Terms, noise: float, rounds: int) -> float:
    """Epsilon of so many rounds at the terms' delta; infinite without noise.

    Guarantees:
        epsilon of published settings: those of other libraries and papers come out, within their rounding.

    Raises:
        ValueError: dp-accounting is missing.
    """
    if rounds == 0:
        return 0.0
    if noise == 0:
        return math.inf
    dp = library()
    composed = dp.SelfComposedDpEvent(event(terms, noise), terms.turns(rounds))
    try:
        return float(accountant(terms, noise, rounds).compose(composed).get_epsilon(terms.delta))
    except OverflowError:  # beyond exp(709)
        return math.inf


def beside(terms: Terms, noise: float, rounds: int) -> dict[str, float | None]:
    """Epsilon by each accountant; None by one that does not account that sampling under that relation."""
    return {
        name: epsilon(terms._replace(accountant=name), noise, rounds)
        if terms.sampling in SUPPORTED[terms.relation, name]
        else None
        for name in ("pld", "rdp")
    }


@functools.lru_cache(maxsize=64)
def calibrated(terms: Terms, target: float, rounds: int) -> float:
    """The least noise multiplier, to a relative `TOLERANCE`, whose epsilon is at most `target`.

    Guarantees:
        calibrated never exceeds the target: what it gives, composed by `epsilon`, is at most that.

    Raises:
        ValueError: no noise gives that epsilon.
    """
    if terms.accountant == "pld" and terms.sampling in SUPPORTED[terms.relation, "rdp"]:
        near = calibrated(terms._replace(accountant="rdp"), target, rounds)  # a bound, in a tenth of the time
        low, high = 0.85 * near, near
    else:
        low, high = 0.5, 1.0

    def is_enough(noise: float) -> bool:
        return epsilon(terms, noise, rounds) <= target

    while not is_enough(high):
        low, high = high, 2 * high
        if high > MOST:
            raise ValueError(
                f"Expected epsilon={target:g} at delta={terms.delta:g} to be reached with a noise multiplier below {MOST:g} over "
                f"{rounds} round{'s' * (rounds > 1)}; raise epsilon or delta, or lower the rounds."
            )
    while is_enough(low):
        low, high = low / 2, low
        if high < LEAST:
            return high
    dp = library()
    found = dp.calibrate_dp_mechanism(
        lambda: accountant(terms, low, rounds),  # whose grid is coarse enough for all of the interval
        lambda noise: dp.SelfComposedDpEvent(event(terms, noise), terms.turns(rounds)),
        target,
        terms.delta,
        dp.ExplicitBracketInterval(low, high),
        tol=TOLERANCE * low,
    )
    return float(found)


def curve(terms: Terms, noise: float, rounds: int) -> Callable[[int], float]:
    """Epsilon after 0, 1, 2 ... rounds of at most `rounds`; each is composed from the one before, always in the same order."""
    if noise == 0:
        return lambda t: 0.0 if t == 0 else math.inf
    one, found = event(terms, noise), [0.0]
    if terms.sampling != "poisson" or terms.accountant != "pld":
        return functools.cache(lambda t: 0.0 if t == 0 else _after(terms, one, noise, rounds, t))
    dp = library()
    losses = dp.pld.privacy_loss_distribution
    single = losses.from_gaussian_mechanism(
        one.event.noise_multiplier,
        value_discretization_interval=step(terms, noise, rounds),
        sampling_prob=terms.rate,
        neighboring_relation=accountant(terms, noise, rounds).neighboring_relation,
    )
    so_far = [single]

    def after(rounds: int) -> float:
        t = terms.turns(rounds)
        while len(found) <= t:
            if len(found) > 1:
                so_far[0] = so_far[0].compose(single)
            found.append(float(so_far[0].get_epsilon_for_delta(terms.delta)))
        return found[t]

    return after


def _after(terms: Terms, one: Any, noise: float, rounds: int, t: int) -> float:
    fresh = accountant(terms, noise, rounds)
    return float(fresh.compose(one, terms.turns(t)).get_epsilon(terms.delta))


def most_rounds(terms: Terms, noise: float, target: float, rounds: int) -> int:
    """The most rounds, of `rounds`, whose epsilon is at most `target`; 0 where one is too many."""
    low, high = 0, rounds
    while low < high:  # epsilon grows with rounds
        middle = (low + high + 1) // 2
        if epsilon(terms, noise, middle) <= target:
            low = middle
        else:
            high = middle - 1
    return low


def warnings(terms: Terms, protected: int) -> list[str]:
    """What is doubtful about the terms.

    Args:
        protected: how many clients or examples there are.
    """
    if terms.delta < 1 / protected:
        return []
    return [
        f"delta={terms.delta:g} is not below 1/N = 1/{protected}: a mechanism may then publish one {terms.unit} whole; give a "
        f"delta below {1 / protected:.2g}."
    ]
