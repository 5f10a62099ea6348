"""FedPEFT, data distribution: the same examples by Dirichlet(0.1) over the labels, and spread evenly over the clients.

Command:  fedsim sweep experiments/fedpeft/data_distribution.py
          fedsim sweep experiments/fedpeft/data_distribution.py:full --weights ViT-B_16.npz --data-dir TFDS --out runs/FOLDER
          python experiments/fedpeft/hours.py data_distribution    (expected accelerator-hours of the full form; starts nothing)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25, by the script of commit 7845b99.
Time:     7 min after client_stability.py, whose rates and default cell it took, beside other jobs.
Result:   test accuracy, iid: head 0.721, bias 0.726, adapter 0.723, prompt 0.707, LoRA 0.727, full 0.722, ShuffleNet 0.372 (seed 0).
"""

import common

CELLS = {"Dirichlet 0.1": {}, "iid": {"partition": "iid"}}

sweep = common.small(CELLS)
full = common.full(CELLS)
