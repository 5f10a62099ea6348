"""Who is there, how fast, and what time it is: clients that are absent, drop out or are slow. NumPy only.

Begin with `clients.py`; `outcomes.py` says who reports in an exchange and when, `laws.py` what is drawn for each client,
`traces.py` reads files. Nothing here trains or grows with the population.
"""

from __future__ import annotations

from fedsim.network.clients import FREE, UNITS, Conditions, Fleet, conditions, files, fleet, reachable, reliable
from fedsim.network.laws import law
from fedsim.network.outcomes import Outcome, figures, outcome
