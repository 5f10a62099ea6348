"""What can be said of privacy: which sampling is accounted by which accountant under which neighbouring relation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from fedsim.config.options import Config, Privacy

Mechanism = Literal["none", "central", "local", "example"]
Sampling = Literal["poisson", "fixed"]
Relation = Literal["add_or_remove_one", "replace_one", "zero_out"]
Accountant = Literal["pld", "rdp"]

RELATIONS: tuple[str, ...] = get_args(Relation)
ACCOUNTANTS: tuple[str, ...] = get_args(Accountant)

# What dp-accounting 0.6.0 accounts of the Gaussian mechanism on a sample: (relation, accountant) -> samplings. "none" is the
# mechanism without a sample, which both accountants take under every relation.
SUPPORTED: dict[tuple[str, str], tuple[str, ...]] = {
    ("add_or_remove_one", "pld"): ("poisson", "none"),
    ("add_or_remove_one", "rdp"): ("poisson", "none"),
    ("replace_one", "pld"): ("poisson", "none"),
    ("replace_one", "rdp"): ("fixed", "none"),
    ("zero_out", "pld"): ("poisson", "none"),
    ("zero_out", "rdp"): ("poisson", "none"),
}
USUAL = {  # sampling -> relation and accountant where none is asked for
    "poisson": ("add_or_remove_one", "pld"),
    "fixed": ("replace_one", "rdp"),
}
# Without a sample by mechanism: a client's message may be any other; an example's gradient is there or is zero.
UNSAMPLED = {"local": ("replace_one", "pld"), "example": ("zero_out", "pld")}


def sampling_of(mechanism: str, sampling: str) -> str:
    """How the accountant may take it that whoever is protected comes in: local and example-level privacy claim no sample."""
    return sampling if mechanism == "central" else "none"


def terms_of(mechanism: str, sampling: str, relation: str | None, accountant: str | None) -> tuple[str, str]:
    """Relation and accountant of a mechanism, those asked for or the usual ones.

    Raises:
        ValueError: the accountant does not account that sampling under that relation; it names the nearest that does.
    """
    taken = sampling_of(mechanism, sampling)
    usual = UNSAMPLED.get(mechanism) or USUAL[sampling]
    if relation is None and accountant is not None:  # the usual relation, or the first that this accountant takes
        fits = [r for r in (usual[0], *RELATIONS) if taken in SUPPORTED[r, accountant]]
        found = (fits or [usual[0]])[0], accountant
    elif relation is not None and accountant is None:
        fits = [a for a in (usual[1], *ACCOUNTANTS) if taken in SUPPORTED[relation, a]]
        found = relation, (fits or [usual[1]])[0]
    else:
        found = relation or usual[0], accountant or usual[1]
    if mechanism == "local" and found[0] == "add_or_remove_one":
        raise ValueError(
            "Expected relation='add_or_remove_one' with another dp than local: who sends a message is there, and it is known; "
            "give replace_one."
        )
    if mechanism == "example" and found[0] == "replace_one":
        raise ValueError(
            "Expected relation='replace_one' with another dp than example: gradients are clipped and summed for examples that are "
            "there or are nothing; give zero_out."
        )
    if taken not in SUPPORTED[found]:
        near = [f"relation={r} with accountant={a}" for (r, a), kinds in SUPPORTED.items() if taken in kinds]
        near.sort(key=lambda text: (found[0] not in text) + (f"accountant={found[1]}" not in text))
        raise ValueError(
            f"Expected sampling={taken!r} to be accounted by accountant={found[1]!r} under relation={found[0]!r}, which "
            f"dp-accounting does not do; the nearest that it does: {near[0]}."
        )
    return found


def check_privacy(c: Privacy) -> None:
    """Refuses what cannot be accounted, or what would leak beside what is accounted.

    Raises:
        ValueError: names option, value, rule and remedy.
    """
    if c.dp == "none":
        return
    if c.delta is None or not 0 < c.delta < 1:
        raise ValueError(
            f"Expected 0 < delta={c.delta} < 1 with dp={c.dp!r}, below one over the number of clients or examples; give 1e-5."
        )
    if c.epsilon is None and c.noise_multiplier is None:
        raise ValueError(f"Expected epsilon or noise_multiplier with dp={c.dp!r}; give epsilon=5, or a noise.")
    terms_of(c.dp, c.sampling, c.relation, c.accountant)
    if c.clip_quantile is not None and not 0 < c.clip_quantile < 1:
        raise ValueError(
            f"Expected 0 < clip_quantile={c.clip_quantile} < 1, the share of changes that are not cut; give 0.5, or leave it out."
        )
    asked = {
        "per_layer": c.per_layer,
        "bands": c.bands != 1,
        "clip_quantile": c.clip_quantile is not None,
        "sampling": c.sampling != "poisson",
    }
    if c.dp != "central" and any(asked.values()):
        name = next(name for name, is_asked in asked.items() if is_asked)
        raise ValueError(f"Expected {name}={getattr(c, name)!r} with dp='central', not dp={c.dp!r}; leave it out.")
    if c.bands > 1 and c.clip_quantile is not None:
        raise ValueError(
            f"Expected clip_quantile={c.clip_quantile} to be None with bands={c.bands}: noise of earlier rounds is taken away again, "
            "and what it was scaled to has to stay; leave out one of them."
        )


def check_bands(
    bands: int, sampling: str, relation: str | None, clients: int, per_round: int, rounds: int, releases: int = 1
) -> None:
    """Refuses cohorts that cannot come round in order, and what is not accounted of them.

    Raises:
        ValueError: as `check_privacy`.
    """
    if bands == 1:
        return
    if sampling != "poisson" or relation == "replace_one":
        raise ValueError(
            f"Expected bands={bands} with sampling='poisson' and a relation that adds, removes or zeroes one, not "
            f"sampling={sampling!r}, relation={relation!r}, of which no account is known; leave these out, or bands."
        )
    if bands * per_round > clients:
        raise ValueError(
            f"Expected bands={bands} x clients_per_round={per_round} <= clients={clients}: so many cohorts share all clients; give "
            f"bands={max(clients // per_round, 1)} or less."
        )
    if bands > rounds:
        raise ValueError(f"Expected bands={bands} <= rounds={rounds}; give fewer bands, or more rounds.")
    if releases > 1:
        raise ValueError(
            f"Expected releases={releases} a round to be 1 with bands={bands}: the second one would be a round later; choose bands=1."
        )


def check_beside(c: Config) -> None:
    """Refuses other options that no accounting bounds.

    Raises:
        ValueError: as `check_privacy`.
    """
    if c.dp == "none":
        return
    if c.groups:
        raise ValueError(
            f"Expected groups={c.groups} to be empty with dp={c.dp!r}: each group draws clients of its own, which is not accounted; "
            "leave out one of them."
        )
    if c.dp == "example" and c.steps is not None:
        raise ValueError(
            f"Expected steps={c.steps} to be None with dp='example': passes over all examples are accounted, and how often one "
            "comes up in so many steps depends on its client; give epochs, and steps=None (--preset plain has none)."
        )
    if c.dp != "central":
        return
    if c.over_selection != 1:
        raise ValueError(
            f"Expected over_selection={c.over_selection} to be 1 with dp='central': which clients are first depends on who else is "
            "there, so that one client moves the sum by more than its own change; leave it out."
        )
    if c.sampling == "fixed" and c.availability != "always":
        raise ValueError(
            f"Expected availability={c.availability!r} to be always with sampling='fixed': a cohort that is drawn from those who "
            "are there is a larger share of them than is accounted; give sampling=poisson."
        )
    check_bands(c.bands, c.sampling, c.relation, c.clients, c.clients_per_round, c.rounds)
