"""Epsilon of ten settings: by `fedsim privacy`, by dp-accounting called as its own documentation does, and as others published it.

    python benchmarks/privacy/accounts.py     # a minute, no data; prints the table of docs/privacy.md

Stops where fedsim and the accountant differ by more than 0.1 %.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any, NamedTuple

import dp_accounting
from dp_accounting import pld, rdp

from fedsim.cli.main import main as fedsim

ADD = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE


class Setting(NamedTuple):
    """One line of the table; clients, or examples where the source has examples, are units all the same."""

    what: str
    clients: int
    per_round: int
    noise: float
    rounds: int
    delta: float
    accountant: str
    sampling: str = "poisson"
    published: str = ""


SETTINGS = [
    Setting("FedPEFT-like", 64, 8, 0.9166, 50, 1e-3, "pld"),
    Setting("the same by RDP", 64, 8, 1.0057, 50, 1e-3, "rdp"),
    Setting("FedPEFT-like, small delta", 64, 8, 1.1450, 50, 1e-5, "pld"),
    Setting("everybody in every round", 64, 64, 4.8779, 50, 1e-3, "pld"),
    Setting("fixed cohorts", 64, 8, 2.0, 50, 1e-3, "rdp", "fixed"),
    Setting("JAX-Privacy's test", 10, 1, 3.0, 512, 1e-6, "pld", published="3.77"),
    Setting("TensorFlow Privacy, MNIST", 60_000, 150, 1.3, 6000, 1e-5, "rdp", published="0.7242"),
    Setting("TensorFlow Privacy, n = 1e5", 100_000, 100, 1.0, 30_000, 1e-7, "rdp", published="1.4155"),
    Setting("Opacus, q = .04", 25, 1, 1.5, 2250, 1e-5, "rdp", published="7.3291"),
    Setting("Abadi et al. 2016, q = .01", 100, 1, 4.0, 10_000, 1e-5, "rdp", published="1.26, by the old conversion"),
]


def ours(setting: Setting) -> float:
    """What the command prints."""
    options = {
        "clients": setting.clients,
        "clients-per-round": setting.per_round,
        "rounds": setting.rounds,
        "noise-multiplier": setting.noise,
        "delta": setting.delta,
        "accountant": setting.accountant,
        "sampling": setting.sampling,
    }
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = fedsim(["privacy", "--json", *(part for name, v in options.items() for part in (f"--{name}", str(v)))])
    if code:
        raise SystemExit(f"fedsim privacy failed on {setting}")
    return json.loads(text.getvalue())["epsilon"]


def theirs(setting: Setting) -> float:
    """The accountant's own, event by event as its README has it."""
    if setting.sampling == "fixed":  # a client that is replaced moves the sum by two norms
        gaussian: Any = dp_accounting.GaussianDpEvent(setting.noise / 2)
        event: Any = dp_accounting.SampledWithoutReplacementDpEvent(setting.clients, setting.per_round, gaussian)
        accountant: Any = rdp.RdpAccountant(neighboring_relation=REPLACE)
    else:
        gaussian = dp_accounting.GaussianDpEvent(setting.noise)
        event = dp_accounting.PoissonSampledDpEvent(setting.per_round / setting.clients, gaussian)
        accountant = (
            pld.PLDAccountant(ADD) if setting.accountant == "pld" else rdp.RdpAccountant(neighboring_relation=ADD)
        )
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, setting.rounds))
    return float(accountant.get_epsilon(setting.delta))


def main() -> None:
    """Prints the table."""
    print("| setting | q | z | rounds | delta | accountant | fedsim | dp-accounting | published |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in SETTINGS:
        epsilon, expected = ours(one), theirs(one)
        sample = f"{one.per_round} of {one.clients:,}" + (", fixed" if one.sampling == "fixed" else "")
        print(
            f"| {one.what} | {sample} | {one.noise:g} | {one.rounds:,} | {one.delta:g} | {one.accountant} | {epsilon:.4f} | "
            f"{expected:.4f} | {one.published} |"
        )
        if abs(epsilon - expected) > 1e-3 * expected:
            raise SystemExit(f"fedsim says {epsilon}, the accountant {expected}")


if __name__ == "__main__":
    sys.exit(main())
