"""Examples on the device against examples that stream from the host: the same bits, and how much of the sending is hidden.

    python benchmarks/engine/streaming.py            # a linear classifier on 96-px images: little work a byte, the hard case
    python benchmarks/engine/streaming.py --small    # a few seconds, to see that it works

One round of FedAvg over all clients, three ways in one process, repeats interleaved: resident (`--resident on`), streamed
(`--resident off`), and the gathering and sending of the same segments alone. Hidden is the share of the sending that
the streamed round does not show: (resident + sending - streamed) / sending. On a CPU device and host share memory and
cores, so a gather competes with the training that it hides behind; on an accelerator the host is otherwise idle.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

from fedsim import peft
from fedsim.core import Passes
from fedsim.engine import plan
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.host import tune_host
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import classification_loss
from fedsim.folds import mean
from fedsim.training.local import fit

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "linear"
    """Its weights are random: their values do not matter here."""
    peft: str = "head"
    """What is trained beside the head."""
    clients: int = 32
    """All of them take part."""
    size: int = 128
    """Examples of every client."""
    image: int = 96
    """Side of an image."""
    batch_size: int = 16
    """Rows of a step."""
    lanes: int = 4
    """Clients side by side."""
    segment_steps: int = 8
    """Steps of a segment."""
    repeats: int = 15
    """Timed repeats, after one that compiles."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, clients=6, size=16, image=16, batch_size=4, lanes=2, segment_steps=2, repeats=2)
    tune_host(report.speed())
    rng, total = np.random.default_rng(0), o.clients * o.size
    x = rng.integers(0, 256, (total, o.image, o.image, 3)).astype(np.uint8)
    y = rng.integers(0, CLASSES, total).astype(np.int32)
    model = peft.build(o.backbone, CLASSES, input_shape=x.shape[1:], peft=o.peft)
    params, frozen = jax.device_put(peft.start(model, "random", 0))
    passes = Passes(epochs=1, batch_size=o.batch_size)
    local = fit(classification_loss(model.apply), optax.sgd, lambda client, message: client.lr, passes)
    reduce, ids, offsets = mean(), np.arange(o.clients), np.arange(o.clients + 1) * o.size

    def engine(resident: str) -> Lanes:
        options: dict[str, Any] = {"lanes": o.lanes, "segment_steps": o.segment_steps, "devices": 1}
        return Lanes(frozen, x, y, np.arange(total), offsets, resident=resident, **options)

    engines = {"resident": engine("on"), "streamed": engine("off")}

    def round(lanes: Lanes) -> Callable[[], Any]:
        memory = Memory(lambda key, held: (), lanes.held)
        return lambda: Cohort(lanes, ids, 1, memory, lr=0.01).exchange(params, local, reduce)[0]

    made = plan.make(ids, engines["streamed"].rows, offsets, passes, 0, 1, 1, o.lanes)
    parts = [made.rows[:, at : at + o.segment_steps] for at in range(0, made.rows.shape[1], o.segment_steps)]

    def send() -> None:
        for rows in parts:
            jax.block_until_ready(engines["streamed"].gather(rows))

    variants: dict[str, Callable[[], Any]] = {name: round(lanes) for name, lanes in engines.items()} | {"sending": send}
    results = {name: jax.device_get(run()) for name, run in variants.items()}
    equal = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(results["resident"]), jax.tree.leaves(results["streamed"]), strict=True)
    )
    assert equal, "streamed and resident rounds differ"
    seconds = report.interleaved(variants, o.repeats)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    hidden = (median["resident"] + median["sending"] - median["streamed"]) / median["sending"]
    sent = sum(rows.size for rows in parts) * x[0].nbytes
    print(
        f"{o.backbone}, {o.clients} clients x {o.size} images of {o.image} px, {len(parts)} segments, {sent:,} B sent"
    )
    for name, value in median.items():
        print(f"  {name:9} {value:.4f} s")
    print(
        f"  equal bit for bit; streamed / resident {median['streamed'] / median['resident']:.3f}; hidden {hidden:.0%}"
    )
    report.write(
        "streaming", o, {"seconds": seconds, "median": median, "hidden": hidden, "bytes": sent, "bit_identical": equal}
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
