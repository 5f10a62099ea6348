"""How many lanes, and what narrow steps save: a federated round at several numbers of lanes, with and without widths.

    python benchmarks/engine/batch_shapes.py                    # W2 and W3 of benchmarks/peers, 1 to 32 lanes
    python benchmarks/engine/batch_shapes.py --work w3-8 --lanes 2 4 8
    python benchmarks/engine/batch_shapes.py --work w2 w3-8 --devices 1 2 --lanes 2 3 4
    python benchmarks/engine/batch_shapes.py --small            # a few steps, to see that it works

A ViT-Tiny (192 wide, 12 blocks) at 64 px with LoRA of rank 4 on query and value, random weights, SGD. W2: 16 clients of 32
examples, batch 16. W3: clients with log-normal sizes (median 9, sigma 0.9, 2 to 60), batch 4, 8 or 16. `whole` computes
whole batches only, `narrow` as few columns as the lanes need. Repeats are interleaved; the results must agree.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from fedsim import peft
from fedsim.core import Passes
from fedsim.engine import packing
from fedsim.engine.cohort import Cohort, Memory
from fedsim.engine.host import divide_cpu, tune_host
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import classification_loss
from fedsim.folds import mean
from fedsim.training.local import fit

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES, LR, POPULATION = 20, 0.05, 2000
BATCH = {"w2": 16, "w3-4": 4, "w3-8": 8, "w3-16": 16}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    work: tuple[str, ...] = ("w2", "w3-4", "w3-8", "w3-16")
    """Workloads; the number is the batch size."""
    clients: int = 64
    """Of a round of W3."""
    lanes: tuple[int, ...] = (1, 2, 4, 6, 8, 16, 32)
    """Numbers of lanes of a device to measure."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices that the CPU is divided into; the largest must be there."""
    repeats: int = 5
    """Timed repeats, after one that compiles."""
    backbone: str = "vit_ti16"
    """Its weights are random."""
    image: int = 64
    """Side of an image."""
    seed: int = 0
    """Of sizes, data and weights."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def sizes_of(work: str, seed: int) -> np.ndarray:
    """Examples of each client of the population; (N,) int64."""
    if work == "w2":
        return np.full(100, 32)
    draw = np.random.default_rng(seed).normal(size=POPULATION)
    return np.clip(np.round(9 * np.exp(0.9 * draw)), 2, 60).astype(np.int64)


def measure(work: str, o: Options) -> list[dict[str, Any]]:
    """The rows of one workload's table."""
    sizes, passes = sizes_of(work, o.seed), Passes(epochs=1, batch_size=BATCH[work])
    ids = np.arange(min(16, o.clients) if work == "w2" else o.clients)
    offsets, total = np.concatenate([[0], np.cumsum(sizes)]), int(sizes.sum())
    rng = np.random.default_rng(o.seed)
    # As few images as one can tell apart: where they lie in memory does not matter, how many there are does.
    x = rng.integers(0, 256, (min(total, 4096), o.image, o.image, 3)).astype(np.uint8)
    y = rng.integers(0, CLASSES, len(x)).astype(np.int32)
    rows = (np.arange(total) % len(x)).astype(np.int32)
    model = peft.build(o.backbone, CLASSES, input_shape=x.shape[1:], peft="lora", rank=4)
    params, frozen = peft.start(model, "random", o.seed)
    local = fit(classification_loss(model.apply), optax.sgd, lambda client, message: jnp.float32(LR), passes)
    chosen = packing.choose_widths(sizes, passes)
    kinds = {"whole": (passes.batch_size,)} | ({"narrow": chosen} if len(chosen) > 1 else {})

    def variant(devices: int, lanes: int, widths: tuple[int, ...]) -> tuple[Callable[[], Any], dict[str, Any]]:
        engine = Lanes(frozen, x, y, rows, offsets, seed=o.seed, lanes=lanes, devices=devices, widths=widths)
        memory, reduce, about = Memory(lambda key, held: (), engine.held), mean(), {}
        message = engine.put(params)

        def round() -> Any:
            cohort = Cohort(engine, ids, 1, memory)
            change, _ = cohort.exchange(message, local, reduce)
            done = cohort.done[0]
            about.update(steps=done.steps, examples=done.examples)
            about.update(lane_occupancy=done.occupancy[0], row_occupancy=done.occupancy[1])
            return change

        return round, about

    shapes = {
        f"{devices} x {lanes} lanes, {kind}": (devices, lanes, kinds[kind])
        for devices in o.devices
        for lanes in o.lanes
        for kind in kinds
    }
    made = {name: variant(*shape) for name, shape in shapes.items()}
    results, first = {}, {}
    for name, (run, _) in made.items():
        start = time.perf_counter()
        results[name] = jax.device_get(jax.block_until_ready(run()))
        first[name] = time.perf_counter() - start
    seconds = report.interleaved({name: run for name, (run, _) in made.items()}, o.repeats)

    reference = next(iter(results.values()))
    largest = max(float(np.abs(v).max()) for v in reference.values())
    table = []
    for name, (_, about) in made.items():
        times, (devices, lanes, widths) = seconds[name], shapes[name]
        apart = max(float(np.abs(results[name][k] - v).max()) for k, v in reference.items()) / largest
        row = {
            "work": work,
            "devices": devices,
            "lanes": lanes,
            "widths": widths,
            **about,
            "seconds": times,
            "first": first[name],
        }
        row |= {"median": float(np.median(times)), "least": min(times), "relative_difference": apart}
        row["examples_per_second"] = about["examples"] / row["median"]
        table.append(row)
        print(
            f"{work:5} {name:19} {row['median']:8.3f} s (least {row['least']:.3f})  "
            f"{row['examples_per_second']:6.1f} ex/s  rows {about['row_occupancy']:4.0%} real  "
            f"first {row['first']:5.1f} s  differs by {apart:.0e}",
            flush=True,
        )
        if apart > 1e-4:
            raise SystemExit(f"{name}: another result than {next(iter(results))}")
    return table


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    wrong = [work for work in o.work if work not in BATCH]
    if wrong:
        raise SystemExit(f"Expected work={wrong[0]!r} to be one of {', '.join(BATCH)}; correct it.")
    if o.small:
        o = dataclasses.replace(
            o, backbone="vit_tiny", image=16, clients=12, work=("w2", "w3-8"), lanes=(1, 4), repeats=2
        )
    divide_cpu(max(o.devices))
    tune_host(report.speed())
    table = [row for work in o.work for row in measure(work, o)]
    report.write("batch_shapes", o, table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
