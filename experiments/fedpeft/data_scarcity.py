"""FedPEFT, data scarcity: 1,000, 1,500 and 2,000 training examples in all.

Command:  python experiments/fedpeft/data_scarcity.py --small
          python experiments/fedpeft/data_scarcity.py --full --plan        (expected accelerator-hours, nothing else)
Methods:  head, bias, LoRA and full were run; adapter, prompt and ShuffleNet were not, for time.
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-24.
Time:     2:05 min after client_stability.py, whose rates and default cell it takes.
Result:   test accuracy, 1,500 examples: head 0.588, bias 0.661, LoRA 0.659, full 0.674 (seed 0); the others in docs/fedpeft.md.
"""

import cells

SMALL = FULL = {f"{n:,} examples": {"examples": n} for n in (1000, 1500, 2000)}

if __name__ == "__main__":
    cells.main("data_scarcity", SMALL, FULL, __doc__)
