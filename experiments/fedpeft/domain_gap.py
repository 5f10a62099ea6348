"""FedPEFT, domain gap: three data sets at different distances from what the backbone was trained on.

Command:  python experiments/fedpeft/domain_gap.py --small --accept-licence CC-BY-NC-SA    (without it, ELPV is left out)
          python experiments/fedpeft/domain_gap.py --full --plan           (expected accelerator-hours, nothing else)
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
