"""FedPEFT, client stability: M = 8, 16, 32, 64 of N = 64 clients take part in a round.

Command:  python experiments/fedpeft/client_stability.py --small
          python experiments/fedpeft/client_stability.py --full --plan     (expected accelerator-hours, nothing else)
"""

import cells

SMALL = {"M = 8": {}, "M = 32": {"clients_per_round": 32}}
FULL = {f"M = {m}": {"clients_per_round": m} for m in (8, 16, 32, 64)}

if __name__ == "__main__":
    cells.main("client_stability", SMALL, FULL, __doc__)
