"""Noise in the parameters of a run whose noise is correlated by bands, at equal (epsilon, delta); by formula, nothing is trained."""

from __future__ import annotations

import numpy as np

from fedsim.privacy import accounting
from fedsim.privacy.banded import inverse, strategy

SETTINGS = ((64, 8, 50, 5.0, 1e-3, (1, 2, 4, 8)), (1000, 10, 400, 5.0, 1e-4, (1, 4, 8, 25, 100)))


def main() -> None:
    """Prints the table of docs/privacy.md."""
    for clients, per_round, rounds, epsilon, delta, choices in SETTINGS:
        for bands in choices:
            terms = accounting.terms("central", clients=clients, per_round=per_round, delta=delta, bands=bands)
            noise = accounting.calibrated(terms, epsilon, rounds)
            # A C^-1, with A the sums over rounds, is Toeplitz; the noise after round t is its row t.
            variances = np.cumsum(np.cumsum(inverse(strategy(bands), rounds)) ** 2)
            last, mean = noise * np.sqrt(variances[-1]), noise * np.sqrt(variances.mean())
            print(
                f"| {clients}, {per_round}, {rounds}, {epsilon:g}, {delta:g} | {bands} | {noise:.3f} | {last:.2f} | {mean:.2f} |"
            )


if __name__ == "__main__":
    main()
