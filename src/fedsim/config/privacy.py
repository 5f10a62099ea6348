"""What can be said of privacy: which sampling is accounted by which accountant under which neighbouring relation."""

from __future__ import annotations

from typing import Literal, get_args

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
