"""FedPEFT, data scarcity: 2,000, 1,500 and 1,000 training examples in all.

Command:  fedsim sweep experiments/fedpeft/data_scarcity.py
          fedsim sweep experiments/fedpeft/data_scarcity.py:full --weights ViT-B_16.npz --data-dir TFDS --out runs/FOLDER
          python experiments/fedpeft/hours.py data_scarcity        (expected accelerator-hours of the full form; starts nothing)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25, by the script of commit 7845b99.
Time:     14 min after client_stability.py, whose rates and default cell it took, beside other jobs.
Result:   test accuracy, 1,500 examples: head 0.588, bias 0.661, adapter 0.654, prompt 0.568, LoRA 0.659, full 0.673,
          ShuffleNet 0.206 (seed 0); the others in docs/fedpeft.md.
"""

import common

CELLS = {f"{n:,} examples": {"examples": n} for n in (2000, 1500, 1000)}

sweep = common.small(CELLS)
full = common.full(CELLS)
