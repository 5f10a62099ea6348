"""FedPEFT, domain gap: three data sets at different distances from what the backbone was trained on.

Command:  python experiments/fedpeft/domain_gap.py --small --accept-licence CC-BY-NC-SA    (without it, ELPV is left out)
          python experiments/fedpeft/domain_gap.py --full --plan           (expected accelerator-hours, nothing else)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25.
Time:     22 min after client_stability.py, whose rates and default cell it takes, beside other jobs.
Result:   test accuracy, digits: head 0.593, bias 0.741, adapter 0.688, prompt 0.521, LoRA 0.724, full 0.811, ShuffleNet 0.181;
          ELPV: 0.722, 0.743, 0.766, 0.756, 0.768, 0.768, 0.737 (seed 0).
"""

import cells

SMALL = {
    "Fashion-MNIST": {},
    "digits": {"dataset": "digits", "examples": None, "validation": 0.2},
    "ELPV": {"dataset": "elpv", "examples": None, "validation": 0.24, "image_size": 42},
}
FULL = {
    "CIFAR-100": {},
    "Resisc45": {"dataset": "tfds:resisc45"},
    "PCam": {"dataset": "tfds:patch_camelyon"},
}

if __name__ == "__main__":
    cells.main("domain_gap", SMALL, FULL, __doc__)
