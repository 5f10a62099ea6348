"""FedPEFT, data distribution: the same examples spread evenly over the clients, and by Dirichlet(0.1) over the labels.

Command:  python experiments/fedpeft/data_distribution.py --small
          python experiments/fedpeft/data_distribution.py --full --plan    (expected accelerator-hours, nothing else)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25.
Time:     7 min after client_stability.py, whose rates and default cell it takes, beside other jobs.
Result:   test accuracy, iid: head 0.721, bias 0.726, adapter 0.723, prompt 0.707, LoRA 0.727, full 0.722, ShuffleNet 0.372 (seed 0).
"""

import cells

SMALL = FULL = {"iid": {"partition": "iid"}, "Dirichlet 0.1": {}}

if __name__ == "__main__":
    cells.main("data_distribution", SMALL, FULL, __doc__)
