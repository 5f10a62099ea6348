"""FedSP on a real decoder: perplexity of speakers in Shakespeare, beside FedPrompt, central prefix tuning, zero-shot.

Command:  python experiments/fed_sp/speakers.py --out runs/speakers
          python experiments/fed_sp/speakers.py --small --out runs/speakers_small     (a random decoder of two blocks: two minutes)
          python benchmarks/tables.py fed_sp                                          (the table)
Data:     the speeches of 12 speakers of Shakespeare (packaged) that experiments/llm/speakers.py draws, in windows of 32 tokens; a
          twentieth of them is validation and as much the test. Of the others a fifth is the server's shard, and four speakers,
          drawn by seed, are the clients. This is a script and no sweep file, because a packaged set's test is a fifth of all
          plays, half an hour of this model in every run: so a file with few speeches of the set is written first.
Model:    SmolLM2-135M-Instruct (packaged; Q4_1, dequantised) is the server's, 30 blocks. A prefix of four tokens: 46,080 numbers.
          FedSP's clients have its first block 30 times, distilled by 40 steps of two windows; of it the block alone is trained.
Start:    the same random prefix for all, by seed. Three rounds of four clients, four steps of two windows each, Adam; FedSP takes
          two such stages, so twice FedPrompt's steps, and its server eight steps of two windows a round. Central prefix tuning takes
          as many steps as FedPrompt's four clients do. A rate for each method from one grid by validation, at one seed; three seeds.
Metric:   perplexity on the test windows of all 12 speakers, bytes both ways, and the set-up: what all clients are given once.
Failure:  FedSP is not below what its server reaches alone, with its shard and no client ("server alone": the clients' rate is
          zero), by two deviations: then no knowledge came by prompts. Or it is not below zero-shot, the model without a
          prompt. FedPrompt, whose clients have the whole model, and central prefix tuning should be below both.
Size:     48 + 48 local steps in a run, where the paper's scripts have 500 and more for each of ten clients, and 40 steps of
          distillation where they have 5,000: a step of SmolLM2 is dear on two cores. So this says whether the system works on a
          real decoder, and nothing of how good the paper's is. A failure is to be expected: after these the auxiliary model's
          loss is still 17 nats a token and more, where guessing has 10.8.
Time:     14:36 min on 2 cores of a shared AMD EPYC, almost alone; 2026-12-01. A run of FedSP takes a minute and a half.
Result:   zero-shot 266, FedPrompt 178, central prefix 130; FedSP 242, server alone 249 +- 29. So FedSP is better than no prompt,
          and better than its server alone in two seeds of three, but not by two deviations: by the rule above it fails.
          docs/algorithms/fed_sp.md has the table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import methods
from llm.speakers import spoken

import fedsim
from fedsim import Config, Speed, Sweep

CLIENTS = 4
RATES = [1e-2, 3e-2]
FEDSP = "fed_sp(trains=('blocks/*',), aux_rate=0.1, server_steps=8, server_rate=1e-2, server_batch=2{})"
TUNED: dict[str, dict[str, Any]] = {
    "FedPrompt": {"algorithm": "fed_avg"},
    "FedSP": {"algorithm": FEDSP.format(", distil_steps=40, distil_rate=1e-3, distil_batch=2")},
    "central prefix": {
        "algorithm": "fed_avg", "partition": "iid", "clients": 1, "clients_per_round": 1, "steps": 16, "server_share": 0.0,
    },
}  # fmt: skip
STILL = {"lr_schedule": "constant_schedule(0.0)", "steps": 1}  # clients that learn nothing, however long they train
ALONE: dict[str, dict[str, Any]] = {
    "server alone": {"algorithm": FEDSP.format(", distil_steps=0, freeze_aux=True"), **STILL},
}
UNTRAINED: dict[str, dict[str, Any]] = {  # whatever the seed
    "zero-shot": {"algorithm": "fed_avg", "peft": "lora", "rank": 1, "rounds": 1, "server_share": 0.0, **STILL},
}
STANDING = (*ALONE, *UNTRAINED)
METHODS = {**TUNED, **ALONE, **UNTRAINED}  # rows of the table
BASE = Config(
    task="language_model", dataset="speakers.jsonl", backbone="smollm2_135m", tokens=32, packing=True, peft="prefix", prefix_tokens=4,
    clients=CLIENTS, clients_per_round=CLIENTS, partition="natural", client_column="who", min_size=4,
    server_share=0.2, rounds=3, steps=4, batch_size=2, optimizer="adam", eval_every=3,
)  # fmt: skip
SMALL = {"backbone": "decoder_tiny", "rounds": 1, "eval_every": 1}


def main(out: Path, small: bool = False, keep: Path | None = None) -> dict[str, Any]:
    """Runs all methods, or what is missing of them; the table's result.

    Args:
        out: their folder.
        small: a random decoder of two blocks, one rate, one seed, one round.
        keep: file of the result as JSON.
    """
    base = BASE.replace(dataset=str(spoken(out / "speakers.jsonl", 0)), **(SMALL if small else {}))
    seeds, speed = 1 if small else 3, Speed(checkpoint_every=1000)
    tuned = Sweep(
        base=base, grid={methods.METHOD: TUNED}, tune={"lr": RATES[:1] if small else RATES}, tune_by=[methods.METHOD],
        seeds=seeds, speed=speed,
    )  # fmt: skip
    alone = Sweep(base=base, grid={methods.METHOD: ALONE}, seeds=seeds, speed=speed)
    untrained = Sweep(base=base, grid={methods.METHOD: UNTRAINED}, seeds=1, speed=speed)
    found = methods.result(fedsim.sweep(tuned, out=out / "tuned"), setup=True)
    for sweep, name in ((alone, "alone"), (untrained, "untrained")):
        found["rows"] += methods.result(fedsim.sweep(sweep, out=out / name), setup=True)["rows"]
    for row in found["rows"]:
        if row[methods.METHOD] not in ("FedPrompt", "FedSP"):  # nobody sends anything
            row["bytes"] = row["setup"] = 0
        if row[methods.METHOD] in STANDING:
            row["rate"] = 0.0
    if keep is not None:
        methods.write(found, keep)
    return found


if __name__ == "__main__":
    print(methods.table(tyro.cli(main)))
