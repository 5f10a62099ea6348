"""FedPEFT, privacy: no guarantee beside epsilon 5 at delta 1e-3 for each client, M = 8 of N = 64 clients in a round.

Command:  fedsim sweep experiments/fedpeft/privacy.py --out runs/fedpeft-privacy
          fedsim sweep experiments/fedpeft/privacy.py:full --weights ViT-B_16.npz --data-dir TFDS --out runs/FOLDER
Privacy:  central, of a client with all its examples, add or remove one, Poisson sampling, PLD: the noise is calibrated over
          all rounds. The paper's own mechanism is not known here.
Start:    as the axes beside this one, but no rounds of the head alone, which would spend from the same budget.
Rates:    one grid, chosen by method and cell on validation with seed 0. Changes are cut to norm 0.1.
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-30, beside much other work.
Time:     52 min, in which it got 29 min of processor time, with the search for all rates.
Result:   none and epsilon 5: head 0.302, 0.256; bias 0.447, 0.153; adapter 0.441, 0.175; prompt 0.349, 0.172; LoRA 0.610, 0.115;
          full 0.519, 0.140. Full fine-tuning loses much, but LoRA loses more points: by the criterion below it fails.
Failure:  full fine-tuning does not lose most, of the methods that learn without noise (the paper's trend does not show).
"""

import common

from fedsim import Speed, Sweep

METHODS = {name: of for name, of in common.METHODS.items() if not name.startswith("ShuffleNet")}
CELLS = {"none": {}, "epsilon 5": {"dp": "central", "epsilon": 5.0, "delta": 1e-3, "clip_norm": 0.1}}

SMALL = common.SMALL.replace(
    dataset="digits", examples=None, validation=0.1, partition="iid", head_rounds=0, rounds=12, steps=2, eval_every=4
)
sweep = Sweep(
    base=SMALL, grid={"cell": CELLS, "method": METHODS}, tune={"lr": (1e-4, 1e-3, 1e-2)}, tune_by=["cell", "method"], seeds=3,
    speed=Speed(lanes=4, checkpoint_every=1000),
)  # fmt: skip
full = Sweep(
    base=common.FULL,
    grid={"cell": CELLS, "method": METHODS},
    tune={"lr": common.RATES},
    tune_by=["cell", "method"],
    seeds=3,
)
