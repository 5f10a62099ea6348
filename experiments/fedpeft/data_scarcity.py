"""FedPEFT, data scarcity: 1,000, 1,500 and 2,000 training examples in all.

Command:  python experiments/fedpeft/data_scarcity.py --small
          python experiments/fedpeft/data_scarcity.py --full --plan        (expected accelerator-hours, nothing else)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25.
Time:     14 min after client_stability.py, whose rates and default cell it takes, beside other jobs.
Result:   test accuracy, 1,500 examples: head 0.588, bias 0.661, adapter 0.654, prompt 0.568, LoRA 0.659, full 0.673,
          ShuffleNet 0.206 (seed 0); the others in docs/fedpeft.md.
"""

import cells

SMALL = FULL = {f"{n:,} examples": {"examples": n} for n in (1000, 1500, 2000)}

if __name__ == "__main__":
    cells.main("data_scarcity", SMALL, FULL, __doc__)
