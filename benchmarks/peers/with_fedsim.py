"""fedsim's own side: the trainer that `fedsim.run` would build from the same config, and its rounds, without evaluation.

A round is what the loop of `simulate` does between selecting clients and evaluating: planning, training in lanes, the
server's step, the count of bytes. `Speed` is the default but for `--lanes`; compiled programs are not kept between runs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driver
import jax
import jax_models
import numpy as np
import workloads
from safetensors.numpy import save_file
from workloads import LORA_SCALE, RANK, Workload

import fedsim
from fedsim.backbones import BACKBONES, Row, bert_row, vit_row
from fedsim.backbones.bert import BertConfig
from fedsim.config import Config, Speed
from fedsim.data.partition import Partition
from fedsim.engine.cohort import Cohort, Memory
from fedsim.engine.host import tune_host
from fedsim.engine.keys import key_for
from fedsim.simulation import build, simulate, trainers

TRANSFORMER = "transformer_of_peers"  # the name of the workload's ViT or BERT in the table of backbones
PATHS = {
    "conv1": "layers/0",
    "conv2": "layers/1",
    "dense": "layers/2",
    "q_a": "query/lora_a",
    "q_b": "query/lora_b",
    "v_a": "value/lora_a",
    "v_b": "value/lora_b",
    "attn": "attention",
    "weight": "kernel",
}


def ours(name: str) -> str:
    """`blocks.0.attn.q_a` -> `blocks/0/attention/query/lora_a`: a published name as fedsim's path."""
    name = name.replace("encoder.layer", "blocks").replace(".self", "")
    return "/".join(PATHS.get(part, part) for part in name.split("."))


def config_of(w: Workload, folder: Path, frozen: workloads.Arrays) -> Config:
    """The workload as fedsim's options; the frozen weights go to a file in timm's layout, or BERT's."""
    common: dict[str, Any] = {
        "dataset": "arrays",
        "clients": w.clients,
        "clients_per_round": w.cohort,
        "batch_size": w.batch_size,
        "optimizer": "sgd",
        "lr": w.lr,
        "seed": workloads.SEED,
    }
    if w.model == "cnn":
        return Config(backbone="cnn", weights="random", peft="full", **common)
    BACKBONES[TRANSFORMER] = row_of(w)
    file = folder / "model.safetensors"
    save_file(frozen, file)
    lora = {"peft": "lora", "rank": RANK, "lora_alpha": LORA_SCALE * RANK, "targets": ("query", "value")}
    return Config(backbone=TRANSFORMER, weights=str(file), **lora, **common)


def row_of(w: Workload) -> Row:
    """The workload's transformer as a backbone."""
    if w.model == "bert":
        return bert_row(BertConfig(w.vocabulary, w.width, w.depth, w.heads, 4 * w.width, pool="mean"))
    # The table's ViTs have positions for 224 px and would resample them in every step; this one has the workload's.
    row = vit_row(w.width, w.depth, w.heads, workloads.PATCH)
    return row._replace(config=dataclasses.replace(row.config, image=w.image))


def trainer_of(w: Workload, d: workloads.Data, speed: Speed) -> tuple[trainers.Trainer, list[str]]:
    """Data, weights, algorithm and engine, as a run makes them; the published names of what is trained."""
    trained, frozen = workloads.weights(w)
    n, probe = len(d.y), np.arange(len(d.probe_y))
    splits = {"train": np.arange(n), "validation": n + probe[::2], "test": n + probe[1::2]}
    x, y = np.concatenate([d.x, d.probe_x]), np.concatenate([d.y, d.probe_y])
    source = fedsim.arrays(x, y, splits=splits, classes=[str(i) for i in range(w.classes)])
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(w, Path(folder), frozen)
        problem = build.problem(config.replace(partition="iid", min_size=1), speed, source)
        problem = problem._replace(partition=Partition(np.arange(n, dtype=np.int32), d.offsets))
        start = {ours(n): v for n, v in jax_models.prepared(w, trained).items()}
        made = trainers.trainer(problem, build.phases(config)[0], start)
    missing = start.keys() ^ made.start.keys()
    if missing:
        raise SystemExit(
            f"Expected the workload's trained parameters to be fedsim's; {sorted(missing)} are not in both."
        )
    return made, list(trained)


def prepare(
    w: Workload, d: workloads.Data, speed: Speed
) -> tuple[Callable[[int], None], Callable[[], workloads.Arrays]]:
    """(a round by its number, the trained parameters under the workload's names)."""
    trainer, names = trainer_of(w, d, speed)
    algorithm, engine = trainer.algorithm, trainer.engine
    server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
    memory = Memory(algorithm.memory, engine.held)

    def round(number: int) -> None:
        nonlocal server
        ids = workloads.cohort(w, number)
        cohort = Cohort(engine, ids, number, memory, lr=trainer.lr(number), average=trainer.average)
        key = key_for(engine.root, "server", number)
        server, _, _ = simulate.exchange_round(key, trainer, server, cohort)
        jax.block_until_ready(server)
        cohort.traffic()

    def trained() -> workloads.Arrays:
        params = algorithm.params(server)
        return jax_models.published(w, {name: params[ours(name)] for name in names})

    return round, trained


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    lanes = o.lanes if o.lanes == "auto" else int(o.lanes)
    speed = Speed(lanes=lanes, devices=o.devices, compilation_cache=False)
    tune_host(speed)
    round, trained = prepare(w, workloads.data(w), speed)
    driver.loop(o, round, trained, devices=jax.local_device_count(), speed=dataclasses.asdict(speed))


if __name__ == "__main__":
    main()
