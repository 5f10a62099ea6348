"""Differential privacy: what a run may say of it, and the mechanisms that make it so.

`accounting.py` turns clients, rounds and noise into epsilon and back, by dp-accounting. The mechanisms are a fold
(`central.py`, and `banded.py` for noise that is correlated over rounds), a codec (`local.py`) and a loss (`examples.py`); all cut
by `clipping.py`. What decides who is in a round, and what of a run's record is not private, is in `simulation/private.py`;
docs/privacy.md explains both. Begin with `central.py`.
"""

from __future__ import annotations

from fedsim.privacy.accounting import Terms, calibrated, curve, epsilon, most_rounds, terms, warnings
