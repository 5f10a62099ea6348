"""FedPEFT, domain gap: three data sets at different distances from what the backbone was trained on.

Command:  fedsim sweep experiments/fedpeft/domain_gap.py                                              (without ELPV)
          fedsim sweep experiments/fedpeft/domain_gap.py:elpv --accept-licence CC-BY-NC-SA            (all three)
          fedsim sweep experiments/fedpeft/domain_gap.py:full --weights ViT-B_16.npz --data-dir TFDS --out runs/FOLDER
          python experiments/fedpeft/hours.py domain_gap           (expected accelerator-hours of the full form; starts nothing)
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-25, by the script of commit 7845b99.
Time:     22 min after client_stability.py, whose rates and default cell it took, beside other jobs.
Result:   test accuracy, digits: head 0.593, bias 0.741, adapter 0.688, prompt 0.521, LoRA 0.724, full 0.811, ShuffleNet 0.181;
          ELPV: 0.722, 0.743, 0.766, 0.756, 0.768, 0.768, 0.737 (seed 0).
"""

import common

# The licence that the command line accepts is ELPV's alone: without it the other cells are the same in both sweeps.
FREE = {
    "Fashion-MNIST": {"accept_licence": None},
    "digits": {"dataset": "digits", "examples": None, "validation": 0.2, "accept_licence": None},
}
ELPV = {"ELPV": {"dataset": "elpv", "examples": None, "validation": 0.24, "image_size": 42}}

sweep = common.small(FREE)
elpv = common.small(FREE | ELPV)
full = common.full(
    {"CIFAR-100": {}, "Resisc45": {"dataset": "tfds:resisc45"}, "PCam": {"dataset": "tfds:patch_camelyon"}}
)
