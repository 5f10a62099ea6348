"""Local Superior Soups: accuracy after one to three rounds from a pre-trained start, at equal rounds and at equal local steps.

Command:  fedsim sweep experiments/superior_soups/few_rounds.py
          fedsim sweep experiments/superior_soups/few_rounds.py:little      (a minute, most of it compiling)
          python benchmarks/tables.py superior_soups                        (the table)
Data:     Fashion-MNIST (packaged), 1,000 examples, 5 clients, Dirichlet(0.3), all of them in every round.
Model:    ViT-S/14 (packaged, DINOv2-derived) at 28 pixels, LoRA of rank 4 in its last two blocks, and the head.
Start:    pre-trained weights and a head that the same algorithm trains alone for five rounds. Adam; a rate for each method
          from one grid, by validation, 3 seeds.
Columns:  FedAvg with a soup's steps of one model (equal rounds) and with those of all three (equal local steps).
Shows:    test accuracy after 1 and 3 rounds of everything.
Fails if: after 1 or after 3 rounds the soup's mean test accuracy is not above both columns of FedAvg.
Machine:  2 cores of a shared AMD EPYC, 23 GiB, Python 3.11, JAX 0.10.2; 2026-11-30, beside much other work.
Time:     9:23 min alone on such a machine, with the same means and deviations, 2026-12-01.
Result:   the code's form after one round: 0.618, FedAvg 0.553 and 0.595. After three rounds 0.656, FedAvg 0.613 and 0.663: so
          it fails there by 0.007. The paper's weights of 3 fail, 0.454 and 0.539; weights of 0.3 have 0.575 and 0.657.
          This is a second try: with a fresh head, six steps of 8 examples and Dirichlet(1.0) it failed altogether.
          docs/algorithms/superior_soups.md has the table, and why.
"""

from dataclasses import replace

from fedsim import Config, Speed, Sweep

STEPS, MODELS, HEAD = 20, 3, 5
METHODS = {
    "FedAvg, equal rounds": {"algorithm": "fed_avg", "steps": STEPS},
    "FedAvg, equal steps": {"algorithm": "fed_avg", "steps": STEPS * MODELS},
    "LSS, paper": {"algorithm": f"superior_soups(models={MODELS})", "steps": STEPS},
    "LSS, paper, pulls 0.3": {
        "algorithm": f"superior_soups(models={MODELS}, lambda_a=0.3, lambda_d=0.3)",
        "steps": STEPS,
    },
    "LSS, code": {"algorithm": f"superior_soups(form='code', models={MODELS})", "steps": STEPS},
}
AFTER = {"1 round": {"rounds": HEAD + 1}, "3 rounds": {"rounds": HEAD + 3}}

base = Config(
    dataset="fashion_mnist", image_size=28, examples=1000, validation=0.01, backbone="vit_s14", peft="lora", rank=4,
    targets=("blocks/10/*", "blocks/11/*"), clients=5, clients_per_round=5, partition="dirichlet", alpha=0.3,
    optimizer="adam", batch_size=32, head_rounds=HEAD, head_lr=5e-3, rounds=HEAD + 1, eval_every=1,
)  # fmt: skip
sweep = Sweep(
    base=base, grid={"method": METHODS, "after": AFTER}, tune={"lr": [5e-4, 2e-3]}, tune_by=["method"],
    seeds=3, speed=Speed(checkpoint_every=1000),
)  # fmt: skip
little = replace(
    sweep,
    base=base.replace(
        dataset="digits", image_size=None, examples=None, validation=0.1, backbone="vit_tiny", targets=("query", "value"),
        head_rounds=1, rounds=2,
    ),
    grid={"method": METHODS}, tune={"lr": [2e-3]}, seeds=1,
)  # fmt: skip
