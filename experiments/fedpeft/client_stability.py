"""FedPEFT, client stability: M = 8, 16, 32, 64 of N = 64 clients take part in a round.

Command:  python experiments/fedpeft/client_stability.py --small
          python experiments/fedpeft/client_stability.py --full --plan     (expected accelerator-hours, nothing else)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25.
Time:     29:42 min on two idle cores, with the search for all rates; docs/fedpeft.md says how it was measured.
Result:   test accuracy, M = 8: head 0.585, bias 0.693, adapter 0.681, prompt 0.520, LoRA 0.693, full 0.696, ShuffleNet 0.174;
          M = 16: 0.676, 0.701, 0.699, 0.592, 0.703, 0.728, 0.197 (seed 0).
"""

import cells

SMALL = {"M = 8": {}, "M = 16": {"clients_per_round": 16}}
FULL = {f"M = {m}": {"clients_per_round": m} for m in (8, 16, 32, 64)}

if __name__ == "__main__":
    cells.main("client_stability", SMALL, FULL, __doc__)
