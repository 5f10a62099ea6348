"""Training a convolutional network in full: forms of the convolution, numbers of lanes, and a whole round (W1).

    python benchmarks/models/convolution.py            # the CNN of federated EMNIST, 32 clients a round, lanes 1, 2, 4 and 6
    python benchmarks/models/convolution.py --small    # two forms, few clients, to see that it works

W1: images of 28x28x1, 62 classes, all 1,206,590 parameters trained, clients of 20 to 100 examples, batch 20, SGD 0.1,
one epoch. First the step alone in a compiled loop, with vmap over lanes: the convolution as XLA's (its gradients as JAX
transposes them), as XLA's with the kernel's gradient over patches, as a matmul over patches. Then a round of the engine
in the form that fedsim takes. Wall time and the process's CPU time, a client's step each. Repeats are interleaved and all
of them written; the least of each is printed. On a machine that other work shares, compare CPU time.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from fedsim import peft
from fedsim.backbones import convolution
from fedsim.core import Passes
from fedsim.engine import plan
from fedsim.engine.cohort import Cohort, Memory
from fedsim.engine.host import tune_host
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import classification_loss, masked_sums
from fedsim.folds import mean
from fedsim.training.local import fit

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES, LR, BATCH = 62, 0.1, 20
FORMS: dict[str, Callable[..., Any]] = {
    "xla": lambda x, kernel, stride, padding, groups=1, matmul=False: convolution.plain(x, kernel, stride, padding),
    "xla, patches for the kernel": lambda x, kernel, stride, padding, groups=1, matmul=False: convolution.spatial(
        x, kernel, stride, padding
    ),
    "matmul over patches": lambda x, kernel, stride, padding, groups=1, matmul=False: convolution.unfolded(
        x, kernel, stride, padding
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    clients: int = 32
    """Of a round."""
    lanes: tuple[int, ...] = (1, 2, 4, 6)
    """Numbers of lanes to measure."""
    repeats: int = 7
    """Timed repeats, after one that compiles."""
    xla: bool = False
    """Measure XLA's own gradients and its grouped convolutions of several lanes too: on a CPU seconds a step."""
    rounds: bool = True
    """Measure whole rounds of the engine, after the steps."""
    seed: int = 0
    """Of sizes, data and weights."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def step(form: str, lanes: int, seed: int) -> Callable[[], Any]:
    """One SGD step of every lane inside a compiled loop, kernels of its own in every lane."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.random((1, lanes, BATCH, 28, 28, 1), dtype=np.float32))
    y = jnp.asarray(rng.integers(0, CLASSES, (1, lanes, BATCH)), jnp.int32)
    model = peft.build("cnn", CLASSES, input_shape=(28, 28, 1), peft="full")
    params = peft.start(model, "random", seed)[0]
    params = jax.tree.map(lambda a: jnp.broadcast_to(a, (lanes, *a.shape)), params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return masked_sums(model.apply(params, {}, x), y, jnp.ones(BATCH))["loss"] / BATCH

    def one(params: Any, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda w, g: w - LR * g, params, jax.grad(loss)(params, x, y))

    @jax.jit
    def loop(params: Any, x: Any, y: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda t, params: jax.vmap(one)(params, x[t], y[t]), params)

    with mock.patch.object(convolution, "convolve", FORMS[form]):
        program = loop.lower(params, x, y, jnp.int32(1)).compile()
    return lambda: program(params, x, y, jnp.int32(1))


def rounds(o: Options) -> tuple[dict[str, Callable[[], Any]], int]:
    """A round of the engine for every number of lanes, planning included; and its local steps."""
    rng = np.random.default_rng(o.seed)
    sizes = rng.integers(20, 101, o.clients)
    x = rng.random((int(sizes.sum()), 28, 28, 1), dtype=np.float32)
    y = rng.integers(0, CLASSES, len(x)).astype(np.int32)
    rows, offsets = np.arange(len(x), dtype=np.int32), np.concatenate([[0], np.cumsum(sizes)])
    model = peft.build("cnn", CLASSES, input_shape=(28, 28, 1), peft="full")
    trained = peft.start(model, "random", o.seed)[0]
    passes = Passes(epochs=1, batch_size=BATCH)
    local, reduce = (
        fit(classification_loss(model.apply), optax.sgd, lambda client, message: jnp.float32(LR), passes),
        mean(),
    )

    def made(lanes: int) -> Callable[[], Any]:
        engine = Lanes({}, x, y, rows, offsets, seed=o.seed, lanes=lanes, devices=1)
        memory, params = Memory(lambda key, held: (), engine.held), engine.put(trained)
        return lambda: Cohort(engine, np.arange(o.clients), 1, memory).exchange(params, local, reduce)[0]

    return {f"round, {lanes} lanes": made(lanes) for lanes in o.lanes}, int(plan.steps_of(sizes, passes).sum())


def measured(variants: dict[str, tuple[Callable[[], Any], int]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """For every variant of (function, client steps): wall and CPU milliseconds a client's step, of every repeat."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall_ms": [], "cpu_ms": []} for name in variants}
    for repeat in range(repeats + 1):
        for name, (run, steps) in variants.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            wall, cpu = time.perf_counter() - start, time.process_time() - used
            if repeat:  # the first one compiles
                found[name]["wall_ms"].append(wall * 1e3 / steps)
                found[name]["cpu_ms"].append(cpu * 1e3 / steps)
    return found


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, clients=3, lanes=(1, 2), repeats=1)
    tune_host(report.speed())
    variants = {
        f"step, {form}, {lanes} lanes": (step(form, lanes, o.seed), lanes)
        for form in FORMS
        for lanes in o.lanes
        if o.xla or form == "matmul over patches" or (form != "xla" and lanes == 1)
    }
    results = measured(variants, o.repeats)
    if o.rounds:
        engines, steps = rounds(o)
        of_rounds = measured({name: (run, steps) for name, run in engines.items()}, o.repeats)
        results |= {name: {**r, "seconds": [ms * steps / 1e3 for ms in r["wall_ms"]]} for name, r in of_rounds.items()}
    for name, r in results.items():
        print(f"{name:48} {min(r['wall_ms']):8.1f} ms wall {min(r['cpu_ms']):8.1f} ms CPU a client's step", end="")
        print(f", {min(r['seconds']):6.2f} s a round" if "seconds" in r else "")
    report.write("convolution", o, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
