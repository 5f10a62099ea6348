"""`fedsim privacy`: noise and epsilon of a setting by arithmetic alone. No data, no weights, no JAX."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedsim.cli import help
from fedsim.cli.forms import arities, check_form
from fedsim.config import Config, at_most, positive, shown
from fedsim.config.privacy import Accountant, Relation, Sampling, check_bands


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """The noise that an epsilon needs, or the epsilon of a noise, over a whole run; needs no data (docs/privacy.md)."""

    dp: Literal["central", "local", "example"] = "central"
    """Where the noise is added: on the sum at the server, on each client's message, or on the gradients of its steps."""
    clients: int = Config.clients
    """Number of clients N."""
    clients_per_round: int = Config.clients_per_round
    """Clients of a round: expected under Poisson sampling, exactly under fixed."""
    rounds: int = Config.rounds
    """Communication rounds in all."""
    epsilon: float | None = None
    """The budget, for which the noise is sought (default: epsilon follows from the noise multiplier)."""
    delta: float | None = None
    """The delta of (epsilon, delta); below one over the number of clients or examples."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise over the clipping norm (default: the least for epsilon)."""
    sampling: Sampling = "poisson"
    """How clients come into a round: each by itself with the same chance, or a fixed number of them."""
    relation: Relation | None = None
    """What neighbouring data sets differ by (default: by the mechanism and the sampling)."""
    accountant: Accountant | None = None
    """Privacy loss distributions or Renyi differential privacy (default: by the sampling)."""
    bands: int = 1
    """Cohorts that come round in order, with noise that is correlated over as many rounds, for dp=central."""
    releases: int = 1
    """Exchanges of a round, each with a noise of its own."""
    epochs: int = 1
    """Passes of a client over its examples in a round, for dp=example."""
    examples: int | None = None
    """Number of examples of all clients, for a word on delta under dp=example (default: not compared)."""
    entries: int | None = None
    """Numbers that a client sends: prints what sums by masks would make of their bytes too (default: not printed)."""
    value_bits: int = 16
    """Bits of such a number before the sum, as a whole one."""
    threshold: int | None = None
    """Clients that have to answer at the end of such a sum (default: more than two thirds of clients_per_round)."""
    json: bool = False
    """Print JSON."""


def check(o: PrivacyOptions) -> None:
    """Refuses numbers that are none of a run.

    Raises:
        ValueError: names option, value, rule and remedy.
    """
    names = (
        "clients",
        "clients_per_round",
        "rounds",
        "releases",
        "bands",
        "epochs",
        "epsilon",
        "noise_multiplier",
        "examples",
    )
    positive(**{name: getattr(o, name) for name in (*names, "entries", "value_bits", "threshold")})
    at_most(10**12, entries=o.entries)
    at_most(32, value_bits=o.value_bits)
    if o.entries is None and (o.threshold is not None or o.value_bits != PrivacyOptions.value_bits):
        raise ValueError("Expected entries=None to be a number with threshold or value_bits; give --entries 149000.")
    at_most(10**8, clients=o.clients)
    at_most(10**7, rounds=o.rounds)
    at_most(10**6, releases=o.releases, epochs=o.epochs)
    at_most(100, epsilon=o.epsilon)
    if o.clients_per_round > o.clients:
        raise ValueError(
            f"Expected clients_per_round={o.clients_per_round} <= clients={o.clients}; lower it or add clients."
        )
    if o.delta is None or not 0 < o.delta < 1:
        raise ValueError(
            f"Expected 0 < delta={shown(o.delta)} < 1, below one over the number of clients; give 1e-5 or less."
        )
    if o.epsilon is None and o.noise_multiplier is None:
        raise ValueError("Expected epsilon=None or noise_multiplier=None to be a number; give --epsilon 5, or a noise.")
    if o.epochs != 1 and o.dp != "example":
        raise ValueError(
            f"Expected epochs={o.epochs} with dp=example: under dp={o.dp} a message counts, not how it was made."
        )
    if o.bands != 1 and o.dp != "central":
        raise ValueError(f"Expected bands={o.bands} with dp=central, not dp={o.dp}; leave it out.")
    check_bands(o.bands, o.sampling, o.relation, o.clients, o.clients_per_round, o.rounds, o.releases)
    if o.sampling != "poisson" and o.dp != "central":
        raise ValueError(
            f"Expected sampling={o.sampling!r} with dp=central: dp={o.dp} claims nothing of who is in a round; leave it out."
        )


def account(o: PrivacyOptions) -> dict[str, Any]:
    """The arithmetic: what `--json` prints.

    Raises:
        ValueError: as `check`; an accountant that does not account the sampling; an epsilon that no noise gives; no
            dp-accounting.
    """
    check(o)
    from fedsim.privacy import accounting, masking

    terms = accounting.terms(
        o.dp,
        clients=o.clients,
        per_round=o.clients_per_round,
        delta=o.delta or 0.0,
        sampling=o.sampling,
        relation=o.relation,
        accountant=o.accountant,
        releases=o.releases,
        epochs=o.epochs,
        bands=o.bands,
    )
    noise = o.noise_multiplier
    if noise is None:
        noise = accounting.calibrated(terms, o.epsilon or 0.0, o.rounds)
    spent = accounting.beside(terms, noise, o.rounds)
    if not math.isfinite(spent[terms.accountant] or 0.0):
        raise ValueError(
            f"Expected noise_multiplier={noise:g} to give a finite epsilon over {o.rounds} rounds; give a larger one."
        )
    protected = o.clients if terms.unit == "client" else o.examples
    found: dict[str, Any] = {
        "dp": o.dp,
        "unit": terms.unit,
        "noise_multiplier": noise,
        "epsilon": spent[terms.accountant],
        "delta": terms.delta,
        "accountant": terms.accountant,
        "sampling": terms.sampling,
        "relation": terms.relation,
        "clients": o.clients,
        "clients_per_round": o.clients_per_round,
        "rounds": o.rounds,
        "bands": o.bands,
        "releases_per_round": terms.times,
        **{f"epsilon_{name}": each if each and math.isfinite(each) else None for name, each in spent.items()},
        "target_epsilon": o.epsilon,
        "warnings": accounting.warnings(terms, protected) if protected else [],
    }
    if o.epsilon is not None and o.noise_multiplier is not None:
        found["rounds_within_epsilon"] = accounting.most_rounds(terms, noise, o.epsilon, o.rounds)
    if o.entries is not None:
        sums = masking.masked(o.entries, o.value_bits, o.clients_per_round, o.threshold)
        found["sums_by_masks"] = {"entries": o.entries, **sums.said()}
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    who = f"{found['clients_per_round']} of {found['clients']} clients a round"
    sample = {"poisson": f"Poisson sampling, {who} on average", "fixed": f"{who}, drawn without replacement"}
    other = "rdp" if found["accountant"] == "pld" else "pld"
    beside, times = found[f"epsilon_{other}"], found["releases_per_round"]
    said = [
        f"noise multiplier  {found['noise_multiplier']:.4f} (standard deviation over the clipping norm)",
        f"epsilon           {found['epsilon']:.4f} at delta {found['delta']:g}, by {found['accountant'].upper()}"
        + ("" if beside is None else f" ({beside:.4f} by {other.upper()})"),
        f"protects          one {found['unit']}; neighbours: {found['relation'].replace('_', ' ')}",
        f"sampling          {sample.get(found['sampling'], 'none claimed: as if everybody were in every round')}",
        f"rounds            {found['rounds']}, {times} noisy sum{'s' * (times > 1)} each",
    ]
    if found["bands"] > 1:
        said.append(
            f"bands             {found['bands']} cohorts in turn, noise correlated over as many rounds; a client is in one cohort"
        )
    if "rounds_within_epsilon" in found:
        said.append(
            f"budget            {found['rounds_within_epsilon']} of these rounds stay within epsilon {found['target_epsilon']:g}"
        )
    if (sums := found.get("sums_by_masks")) is not None:
        plain = f"{4 * sums['entries']:,} as float32"
        said += [
            f"sums by masks     up {sums['bytes_up']:,} B a client and round ({plain}): {sums['sum_bits']} bits an entry; by step "
            + ", ".join(f"{n:,}" for n in sums["up"]),
            f"                  down {sums['bytes_down']:,} B beside the model; {sums['threshold']} clients have to answer. Bytes of "
            "Bonawitz et al. 2017; nothing is protected by this simulation",
        ]
    return said + [f"warning           {text}" for text in found["warnings"]]


def privacy(argv: Sequence[str]) -> int:
    """Print the noise that an epsilon needs, or the epsilon of a noise."""
    check_form(argv, arities(PrivacyOptions))
    options = help.read(PrivacyOptions, argv, "fedsim privacy")
    found = account(options)
    print(json.dumps(found, indent=2, allow_nan=False) if options.json else "\n".join(lines(found)))
    return 0
