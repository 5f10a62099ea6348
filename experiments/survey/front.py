"""The survey's two axes, measured: what a method computes and what it sends, on one task, and the accuracy that it gets for it.

Command:  fedsim sweep experiments/survey/front.py
          fedsim sweep experiments/survey/front.py:little                   (a minute, most of it compiling)
          python benchmarks/tables.py survey                                (the tables, as they are kept)
          python experiments/survey/efficiency.py runs/front --keep experiments/results/survey_front_small.json --picture front.png
Data:     digits (packaged), 1,000 examples, 20 clients, Dirichlet(0.5), 5 of them in a round.
Model:    vit_s14 by its packaged weights, at 28 pixels: five tokens. What is trained is the method's: families of PEFT,
          algorithms and codecs on one of them, and seeds exchanged in place of parameters (FedKSeed).
Start:    the same for all by seed. Rounds and clients are the same for all. Four local steps of Adam in batches of eight; FedKSeed,
          which has no gradients, takes steps of SGD, and many more of them, which its column of steps says. The rate is for each
          method the best of one grid by validation. Three seeds.
Shows:    test accuracy, bytes of a client and round each way, counted FLOPs, memory on a client's device, times and energy on
          places that are given (`axes.py`), and bytes, rounds and steps until a validation accuracy.
Fails if: no method is cheaper than full fine-tuning on both axes and within 0.05 of its accuracy (the premise that PEFT pays), or
          FedKSeed does not send the least up.
Time:     12:40 min on 2 cores of a shared AMD EPYC, almost alone; 2026-11-30.
Result:   full fine-tuning 0.693, LoRA in all blocks 0.554 with a 284th of its bytes: the first condition of failure occurred, at
          rounds as few as these. The head 0.265, FedKSeed on it 0.284 with a tenth of the bytes up. Tables: docs/efficiency.md.
"""

from dataclasses import replace
from typing import Any

from fedsim import Config, Speed, Sweep

TARGET = 0.5  # validation accuracy, for the bytes to it
UPPER = ("blocks/10/*query", "blocks/10/*value", "blocks/11/*query", "blocks/11/*value")
LORA: dict[str, Any] = {"peft": "lora", "rank": 4, "targets": UPPER}
FAMILIES = {  # a method -> what kind it is, in common words: the survey's own tables were not available
    "full": "full model",
    "head": "selective",
    "bias": "selective",
    "adapter 8": "additive",
    "LoRA, all blocks": "reparametrised",
    "LoRA, upper 2": "reparametrised",
    "FFA-LoRA": "reparametrised",
    "LoRA, quantise(8)": "quantised",
    "LoRA, topk(0.1)+quantise(8)": "sparse",
    "LoRA, FedDropoutAvg 0.5": "sparse",
    "FedKSeed, head": "seeds",
    "FedKSeed, LoRA": "seeds",
}


def methods(seeds: int = 1024, steps: tuple[int, int] = (200, 20)) -> dict[str, dict[str, Any]]:
    """The methods; FedKSeed has so many seeds, and takes so many steps a round with the head alone and with LoRA."""
    kseed = {"algorithm": f"fed_kseed(seeds={seeds})", "optimizer": "sgd"}
    return {
        "full": {"peft": "full"},
        "head": {"peft": "head"},
        "bias": {"peft": "bias"},
        "adapter 8": {"peft": "adapter"},
        "LoRA, all blocks": {"peft": "lora", "rank": 4},
        "LoRA, upper 2": LORA,
        "FFA-LoRA": {**LORA, "peft": "ffa_lora", "algorithm": "ffa_lora"},
        "LoRA, quantise(8)": {**LORA, "codec_up": "quantise(8)", "codec_down": "quantise(8)"},
        "LoRA, topk(0.1)+quantise(8)": {**LORA, "codec_up": "topk(0.1)+quantise(8)", "codec_down": "quantise(8)"},
        "LoRA, FedDropoutAvg 0.5": {**LORA, "algorithm": "fed_dropout_avg(rate=0.5)"},
        "FedKSeed, head": {**kseed, "peft": "head", "steps": steps[0]},
        "FedKSeed, LoRA": {**kseed, **LORA, "steps": steps[1]},
    }


base = Config(
    dataset="digits", examples=1000, backbone="vit_s14", image_size=28, clients=20, clients_per_round=5, partition="dirichlet",
    alpha=0.5, optimizer="adam", steps=4, batch_size=8, rounds=8, eval_every=2,
)  # fmt: skip
sweep = Sweep(
    base=base, grid={"method": methods()}, tune={"lr": [3e-5, 3e-4, 3e-3, 3e-2]}, tune_by=["method"], seeds=3,
    speed=Speed(checkpoint_every=1000),
)  # fmt: skip
few = {name: options for name, options in methods(16, (4, 4)).items() if name in ("full", "head", "FedKSeed, head")}
little = replace(
    sweep, base=base.replace(backbone="vit_tiny", weights="random", image_size=16, rounds=2), grid={"method": few},
    tune={"lr": [3e-3]}, seeds=1,
)  # fmt: skip
