"""FedPEFT, client stability: M = 8, 16, 32, 64 of N = 64 clients take part in a round.

Command:  fedsim sweep experiments/fedpeft/client_stability.py
          fedsim sweep experiments/fedpeft/client_stability.py:full --weights ViT-B_16.npz --data-dir TFDS --out runs/FOLDER
          python experiments/fedpeft/hours.py client_stability     (expected accelerator-hours of the full form; starts nothing)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25, by the script of commit ad61cf4.
Time:     29:42 min on two idle cores, with the search for all rates; docs/fedpeft.md says how it was measured.
Result:   test accuracy, M = 8: head 0.585, bias 0.693, adapter 0.681, prompt 0.520, LoRA 0.693, full 0.696, ShuffleNet 0.174;
          M = 16: 0.676, 0.701, 0.699, 0.592, 0.703, 0.728, 0.197 (seed 0).
"""

import common

sweep = common.small({"M = 8": {}, "M = 16": {"clients_per_round": 16}})
full = common.full({f"M = {m}": {"clients_per_round": m} for m in (8, 16, 32, 64)})
