"""What a run under differential privacy does otherwise, and what it says of it: who is drawn, the average, epsilon, the record."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fedsim import wire
from fedsim.config import Config
from fedsim.config.privacy import check_bands
from fedsim.core import Algorithm, Average, draw, places, poisson
from fedsim.engine.traffic import Exchanged
from fedsim.folds import plain, uniform
from fedsim.privacy import accounting, banded, local
from fedsim.privacy.accounting import Terms
from fedsim.privacy.central import central
from fedsim.privacy.examples import Loss, private_loss
from fedsim.wire import Codec

# Fields of a round's line that follow from what is released, or from options alone. Of all others, which count clients,
# examples or their messages, or measure their training or the time it takes, nothing is promised.
PRIVATE = ("round", "phase", "validation", "privacy", "bitwise")
NOT_PRIVATE = (
    "loss", "accuracy", "perplexity", "token_accuracy", "metrics", "validation_clients", "bytes_up", "bytes_down",
    "bytes_up_leaves", "bytes_down_leaves", "setup_bytes", "total_bytes_up", "total_bytes_down", "clients", "reported",
    "nonfinite", "examples", "seconds", "compile_seconds", "server_seconds", "clients_per_second", "examples_per_second",
    "flops", "server_flops", "flops_per_second", "mfu", "lane_occupancy", "row_occupancy", "simulated", "peers", "most_memory",
)  # fmt: skip
# Nor of these files.
FILES = (
    "clients.json",
    "memories.safetensors",
    "checkpoints",
    "memory-PHASE.rows",
    "pictures of clients or of the partition",
)


class Spending(NamedTuple):
    """What a run may spend, and what its rounds cost."""

    terms: Terms
    noise: float  # noise multiplier
    budget: float  # epsilon that no round may exceed; infinite without one
    after: Callable[[int], float]  # rounds -> epsilon so far
    about: dict[str, Any]  # the same in every round

    def is_spent(self, round: int) -> bool:
        """Whether a round more would cost too much."""
        return self.budget < math.inf and self.after(round + 1) > self.budget


def line(found: Spending | None, round: int, averaging: Any = (), first: int = 1) -> dict[str, Any] | None:
    """For the record, after a round.

    Args:
        averaging: state of the run's average: a norm that adapts, of which the record has what the next round cuts to.
        first: round of the phase.

    Raises:
        ValueError: a round went by without its exchange, so that a client's rounds are less far apart than is accounted.
    """
    if found is None:
        return None
    if found.terms.bands > 1:
        if (count := int(averaging["count"])) != round - first + 1:
            raise ValueError(
                f"Expected the algorithm to exchange once in every round with bands={found.terms.bands}, but in {round - first + 1} "
                f"rounds it did {count} times; choose bands=1."
            )
        return {"epsilon": found.after(round), **found.about}
    norm = {"next_clip_norm": float(averaging)} if jax.tree.leaves(averaging) else {}
    return {"epsilon": found.after(round), **found.about, **norm}


def summary(found: Spending | None, round: int) -> dict[str, Any] | None:
    """For the record, at the end."""
    if found is None:
        return None
    both = accounting.beside(found.terms, found.noise, round)
    return {
        "epsilon": found.after(round),
        **found.about,
        **{f"epsilon_{name}": each for name, each in both.items()},
        "not_private": [*NOT_PRIVATE, *FILES],
    }


def terms(config: Config, releases: int = 1) -> Terms:
    """What the run's epsilon is a statement about.

    Args:
        releases: exchanges of a round, `Algorithm.releases`.
    """
    return accounting.terms(
        config.dp,
        clients=config.clients,
        per_round=config.clients_per_round,
        delta=config.delta or 0.0,
        sampling=config.sampling,
        relation=config.relation,
        accountant=config.accountant,
        releases=releases,
        epochs=config.epochs,
        bands=config.bands,
    )


def noise(config: Config, releases: int = 1) -> float:
    """The run's noise multiplier: as given, or the least for its epsilon over all its rounds, of all phases."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    return accounting.calibrated(terms(config, releases), config.epsilon or 0.0, config.rounds)


def spending(config: Config, releases: int = 1) -> Spending | None:
    """What the run spends; None without privacy. All rounds, of all phases, cost the same."""
    if config.dp == "none":
        return None
    under, multiplier = terms(config, releases), noise(config, releases)
    budget = math.inf if config.epsilon is None else config.epsilon
    # A calibrated noise never exceeds the budget; composed round by round, its last digit may.
    slack = 1 + 1e-6 if config.noise_multiplier is None else 1.0
    about = {
        "delta": under.delta,
        "dp": config.dp,
        "unit": under.unit,
        "relation": under.relation,
        "accountant": under.accountant,
        "sampling": under.sampling,
        "noise_multiplier": multiplier,
        "clip_norm": config.clip_norm,
        "expected_clients": config.clients_per_round,
        **({"bands": config.bands} if config.bands > 1 else {}),
    }
    return Spending(under, multiplier, budget * slack, curve(under, multiplier, config.rounds), about)


@functools.lru_cache(maxsize=8)  # phases of a run share it
def curve(under: Terms, multiplier: float, rounds: int) -> Callable[[int], float]:
    """Epsilon round by round; one more than `rounds` may be asked for."""
    return accounting.curve(under, multiplier, rounds)


def average(config: Config, releases: int = 1) -> Average:
    """The run's average under privacy, in which every client counts alike.

    Under example-level privacy replies are private by themselves, so that any fold will do.
    """
    if config.dp == "local":
        return local.average()
    if config.dp == "example":
        return plain(uniform)
    rows = banded.inverse(banded.strategy(config.bands), config.rounds) if config.bands > 1 else None
    return central(
        config.clip_norm, noise(config, releases), float(config.clients_per_round), per_layer=config.per_layer,
        quantile=config.clip_quantile, inverse=rows,
    )  # fmt: skip


def up(config: Config, releases: int = 1) -> Codec | None:
    """The codec of clients' messages: local privacy first, what `codec_up` says behind it."""
    coded = wire.codec(config.codec_up, "codec_up")
    if config.dp != "local":
        return coded
    return local.noised(config.clip_norm, noise(config, releases), coded)


def loss(config: Config, plain_loss: Loss) -> Loss:
    """The loss that clients train on, whose gradients are private under example-level privacy."""
    if config.dp != "example":
        return plain_loss
    return private_loss(plain_loss, config.clip_norm, noise(config), config.batch_size)


def guarded(config: Config, algorithm: Algorithm) -> Algorithm:
    """The algorithm with the sampling of clients that is accounted.

    Raises:
        ValueError: it chooses clients by itself, decides by what clients' own tests say, or exchanges more often than is
            accounted.
    """
    if config.dp == "none":
        return algorithm
    if algorithm.answers == "client":
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to answer by its server with dp={config.dp!r}, not by clients' own models: "
            "what their tests say would steer the run unprotected; choose dp=none."
        )
    if config.dp == "example" and algorithm.releases > 1:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to exchange once a round with dp='example', not {algorithm.releases} times; "
            "choose another, or dp=central."
        )
    if config.dp == "example" and not algorithm.plain_steps:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to read the examples as the run says with dp='example', once a step: "
            "it reads them more often than is accounted; choose another, or dp=central."
        )
    if config.dp != "central":
        return algorithm
    if algorithm.select is not draw:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} not to select clients by itself with dp='central', as only sampling by lot is "
            "accounted; leave `select` away, or choose dp=none."
        )
    if algorithm.releases > 1 and config.deadline is not None:
        raise ValueError(
            f"Expected deadline={config.deadline} to be None with dp='central' and algorithm={config.algorithm!r}, which exchanges "
            f"{algorithm.releases} times a round: the time left for the second one depends on all clients; leave it out."
        )
    check_bands(
        config.bands, config.sampling, config.relation, config.clients, config.clients_per_round, config.rounds,
        algorithm.releases,
    )  # fmt: skip
    if config.bands > 1:
        return algorithm._replace(select=banded.cyclic(config.seed, config.bands))
    return algorithm._replace(select=poisson()) if config.sampling == "poisson" else algorithm


def refuse_uncounted(config: Config, done: Sequence[Exchanged]) -> None:
    """Refuses a round in which clients read their examples more often than example-level privacy counts: one exchange, the run's
    epochs. Nothing of the round is released then.

    Raises:
        ValueError: names what the algorithm did, and the remedy.
    """
    trained = [one for one in done if one.live] if config.dp == "example" else []
    passes = [one.request.local.passes for one in trained]
    if len(trained) > 1 or any(p.rows is not None or p.steps is not None or p.epochs > config.epochs for p in passes):
        found = (
            f"{len(trained)} exchanges" if len(trained) > 1 else f"{passes[0].epochs} epochs, steps={passes[0].steps}"
        )
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to train clients once a round over {config.epochs} epochs with dp='example', "
            f"as is accounted, not in {found}; choose another, or dp=central."
        )


def check(config: Config) -> None:
    """Refuses a budget that one round exceeds, and a computer without an accountant.

    Raises:
        ValueError: names the options and the remedy.
    """
    if config.dp == "none":
        return
    accounting.library()
    if config.bands > 1:
        banded.strategy(config.bands)
    if config.epsilon is not None and config.noise_multiplier is not None:
        once = accounting.epsilon(terms(config), config.noise_multiplier, 1)
        if once > config.epsilon:
            raise ValueError(
                f"Expected epsilon={config.epsilon:g} to be enough for one round, which costs {once:.4g} with "
                f"noise_multiplier={config.noise_multiplier:g}; leave out one of them, or give a larger one."
            )


def doubts(config: Config, examples: int) -> list[str]:
    """What is doubtful about the promise, known before anything is trained.

    Args:
        examples: of all clients.
    """
    if config.dp == "none":
        return []
    under = terms(config)
    return accounting.warnings(under, config.clients if under.unit == "client" else examples)


def promise(found: Spending, config: Config) -> str:
    """The noise, and what the epsilon of the whole run is of."""
    t = found.terms
    return (
        f"dp={config.dp}: noise multiplier {found.noise:.4f}, epsilon {found.after(config.rounds):.4g} at delta {t.delta:g} "
        f"after {config.rounds} rounds; unit {t.unit}, neighbours {t.relation.replace('_', ' ')}, sampling {t.sampling}, "
        f"accountant {t.accountant.upper()}"
        + (f"; {t.bands} cohorts in turn, noise correlated over as many rounds" if t.bands > 1 else "")
    )


def unusual(found: Spending, config: Config, round: int, members: int) -> list[str]:
    """What is said after a round that was not like the others.

    Args:
        members: places of the cohort.
    """
    usual = places(config.clients, config.clients_per_round / config.clients)
    if config.bands > 1:
        usual = banded.cohort_places(config.seed, config.clients, config.bands, found.terms.rate)
    if found.terms.sampling != "poisson" or members <= usual:
        return []
    return [
        f"round {round}: more clients were drawn than the {usual} places that are compiled; compiled once more for {members}, "
        "nobody is left out"
    ]
