"""The campaign: `python -m tests.campaign --minutes 60` kills, damages and misuses fedsim, and prints how each case ended.

Every case has to end in the right result or in a clear error; the exit status is 1 otherwise. The same seed tries the same
cases, as far as the machine's speed lets it. docs/reliability.md has the figures of the last long one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from . import damages, kills, options
from .common import BAD

SHARES = {"kills": 0.5, "damages": 0.35, "options": 0.15}  # of the time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    total = 60 * asked.minutes / sum(SHARES[part] for part in asked.parts)
    worst = 0
    for part in asked.parts:
        seconds = SHARES[part] * total
        with tempfile.TemporaryDirectory() as folder:
            if part == "kills":
                tally = kills.campaign(Path(folder), dict(os.environ), seconds, asked.seed)
            elif part == "damages":
                tally = damages.campaign(Path(folder), seconds, asked.seed)
            else:
                tally = options.campaign(seconds, asked.seed)
        print(tally, flush=True)
        for said in tally.bad:
            print(f"  {said}", flush=True)
        worst += sum(tally.ends[end] for end in BAD)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
