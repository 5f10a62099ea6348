"""One federated round three ways: client by client in plain JAX, a padded vmap over all clients, and fedsim's lanes.

    python benchmarks/engine/lanes.py                          # MiniLM-L6 with LoRA, random weights, 48 clients
    python benchmarks/engine/lanes.py --backbone vit_tiny --clients 256 --lanes 1 4 16 64
    python benchmarks/engine/lanes.py --small                  # a few seconds, to see that it works

The same clients, batches (in the same order), optimizer (SGD) and weights for all three; the sizes of clients are
log-normal. The batches of the first two are made beforehand and not timed; fedsim's time includes its planning, its
gathering of batches and its count of bytes. Repeats are interleaved; the medians are compared. The results must agree.
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
from fedsim.engine import plan
from fedsim.engine.cohort import Cohort, Memory
from fedsim.engine.host import tune_host
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import classification_loss, masked_sums
from fedsim.folds import mean
from fedsim.training.local import fit

sys.path.append(str(Path(__file__).parents[1]))
import report

Params = dict[str, Any]
CLASSES, LR, ROUND = 20, 0.01, 1


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "minilm_l6"
    """Its weights are random: their values do not matter here."""
    peft: str = "lora"
    """What is trained beside the head."""
    clients: int = 48
    """All of them take part."""
    mean_size: int = 24
    """Mean number of examples of a client."""
    spread: float = 1.0
    """Standard deviation of the logarithm of the sizes."""
    longest: int = 240
    """Larger clients are cut to this size."""
    tokens: int = 32
    """Length of a text."""
    image: int = 16
    """Side of an image."""
    batch_size: int = 8
    """Rows of a step."""
    lanes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of lanes to measure."""
    repeats: int = 5
    """Timed repeats, after one that compiles."""
    skip_padded: bool = False
    """Leave the padded vmap out, where it does not fit into memory."""
    seed: int = 0
    """Of sizes, data and weights."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


class Problem:
    """The model, the clients' data, and every client's batches in the engine's order."""

    def __init__(self, o: Options) -> None:
        rng = np.random.default_rng(o.seed)
        sizes = np.exp(rng.normal(0, o.spread, o.clients))
        self.sizes = np.clip(np.round(sizes / sizes.mean() * o.mean_size), 1, o.longest).astype(np.int64)
        total = int(self.sizes.sum())
        from fedsim.backbones import backbone

        text = backbone(o.backbone).kind == "text"
        if text:
            self.x = rng.integers(1, 500, (total, o.tokens)).astype(np.int32)
        else:
            self.x = rng.integers(0, 256, (total, o.image, o.image, 3)).astype(np.uint8)
        self.y = rng.integers(0, CLASSES, total).astype(np.int32)
        self.model = peft.build(o.backbone, CLASSES, input_shape=self.x.shape[1:], peft=o.peft)
        self.params, self.frozen = jax.device_put(peft.start(self.model, "random", o.seed))
        self.rows = np.arange(total, dtype=np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self.passes = Passes(epochs=1, batch_size=o.batch_size)
        ids = np.arange(o.clients)
        made = plan.make(ids, self.rows, self.offsets, self.passes, o.seed, ROUND, 1, 1)
        self.steps = plan.steps_of(self.sizes, self.passes)
        self.batches: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * o.clients
        for member in ids:  # one lane: a client's steps follow one another
            at = np.flatnonzero(made.member[0, np.minimum(made.slot[0, :, 0], o.clients - 1)] == member)
            self.batches[member] = made.rows[0, at, 0], made.count[0, at, 0]


def client_by_client(p: Problem) -> Callable[[], Params]:
    """A jitted step, a Python loop over steps and clients, a running mean."""
    loss, sgd = plain_loss(p), optax.sgd(LR)

    @jax.jit
    def step(params: Params, frozen: Params, x: Any, y: Any, mask: Any) -> Any:
        grads = jax.grad(loss)(params, frozen, x, y, mask)
        return optax.apply_updates(params, sgd.update(grads, sgd.init(params))[0])

    add = jax.jit(lambda total, w, new, old: jax.tree.map(lambda t, a, b: t + w * (a - b), total, new, old))
    batches = [
        [
            jax.device_put((p.x[rows], p.y[rows], (np.arange(len(rows)) < n).astype(np.float32)))
            for rows, n in zip(*client, strict=True)
        ]
        for client in p.batches
    ]
    weights = p.sizes.astype(np.float32) / np.float32(p.sizes.sum())

    def round() -> Params:
        total = jax.tree.map(jnp.zeros_like, p.params)
        for client, weight in zip(batches, weights, strict=True):
            params = p.params
            for x, y, mask in client:
                params = step(params, p.frozen, x, y, mask)
            total = add(total, weight, params, p.params)
        return total

    return round


def padded(p: Problem) -> Callable[[], Params]:
    """`vmap` over all clients, each padded to the longest; an empty step keeps the parameters."""
    loss, sgd = plain_loss(p), optax.sgd(LR)
    T, B = int(p.steps.max()), p.passes.batch_size
    rows = np.zeros((len(p.sizes), T, B), np.int32)
    count = np.zeros((len(p.sizes), T), np.int32)
    for i, (client_rows, client_count) in enumerate(p.batches):
        rows[i, : len(client_rows)], count[i, : len(client_rows)] = client_rows, client_count
    mask = (np.arange(B) < count[:, :, None]).astype(np.float32)
    data = jax.device_put((p.x[rows], p.y[rows], mask))
    weights = jnp.asarray(p.sizes.astype(np.float32) / np.float32(p.sizes.sum()))

    @jax.jit
    def run(params: Params, frozen: Params, x: Any, y: Any, mask: Any, weights: Any) -> Params:
        def client(x: Any, y: Any, mask: Any) -> Params:
            def step(now: Params, batch: Any) -> tuple[Params, None]:
                grads = jax.grad(loss)(now, frozen, *batch)
                new = optax.apply_updates(now, sgd.update(grads, sgd.init(now))[0])
                return jax.tree.map(lambda n, o: jnp.where(batch[2].sum() > 0, n, o), new, now), None

            return jax.tree.map(jnp.subtract, jax.lax.scan(step, params, (x, y, mask))[0], params)

        return jax.tree.map(lambda a: jnp.tensordot(weights, a, axes=1), jax.vmap(client)(x, y, mask))

    return lambda: run(p.params, p.frozen, *data, weights)


def in_lanes(p: Problem, o: Options, lanes: int) -> tuple[Callable[[], Params], dict[str, float]]:
    """One exchange of fedsim's engine; what it says about occupancy is filled in by the first call."""
    local = fit(classification_loss(p.model.apply), optax.sgd, lambda client, message: jnp.float32(LR), p.passes)
    engine = Lanes(p.frozen, p.x, p.y, p.rows, p.offsets, seed=o.seed, lanes=lanes, devices=1)
    memory, reduce, ids = Memory(lambda key, held: (), engine.held), mean(), np.arange(o.clients)
    params, about = engine.put(p.params), {}

    def round() -> Params:
        cohort = Cohort(engine, ids, ROUND, memory)
        change, _ = cohort.exchange(params, local, reduce)
        cohort.traffic()
        about["lane_occupancy"], about["row_occupancy"] = cohort.done[0].occupancy
        return change

    return round, about


def plain_loss(p: Problem) -> Callable[..., Any]:
    """Mean cross-entropy over the real rows."""

    def loss(params: Params, frozen: Params, x: Any, y: Any, mask: Any) -> Any:
        return masked_sums(p.model.apply(params, frozen, x), y, mask)["loss"] / jnp.maximum(mask.sum(), 1.0)

    return loss


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, backbone="vit_tiny", clients=12, longest=60, lanes=(1, 4), repeats=2)
    tune_host(report.speed())
    p = Problem(o)
    print(
        f"{o.backbone}, {o.peft}: {o.clients} clients, {int(p.sizes.sum())} examples, {int(p.steps.sum())} steps, "
        f"the longest {int(p.steps.max())}; padded {o.clients * int(p.steps.max())}"
    )
    variants: dict[str, Callable[[], Params]] = {"client by client": client_by_client(p)}
    if not o.skip_padded:
        variants["padded vmap"] = padded(p)
    abouts: dict[str, dict[str, float]] = {}
    for lanes in o.lanes:
        name = f"fedsim, {lanes} lanes"
        variants[name], abouts[name] = in_lanes(p, o, lanes)

    results, first = {}, {}
    for name, run in variants.items():  # compile, and keep what came out
        start = time.perf_counter()
        results[name] = jax.device_get(jax.block_until_ready(run()))
        first[name] = time.perf_counter() - start
    seconds = report.interleaved(variants, o.repeats)

    reference = results["client by client"]
    largest = max(float(np.abs(v).max()) for v in reference.values())
    table = []
    for name in variants:
        apart = max(float(np.abs(results[name][k] - v).max()) for k, v in reference.items()) / largest
        median = float(np.median(seconds[name]))
        ratio = float(np.median(seconds["client by client"])) / median
        row = {"name": name, "seconds": seconds[name], "median": median, "times_faster": ratio, "first": first[name]}
        table.append({**row, "relative_difference": apart, **abouts.get(name, {})})
        occupied = f"  lanes {abouts[name]['lane_occupancy']:4.0%} full" if name in abouts else ""
        print(f"{name:20} {median:9.3f} s  {ratio:6.2f}x  differs by {apart:.1e}{occupied}")
        if apart > 1e-4:
            raise SystemExit(f"{name} gives another result than client by client")
    report.write("lanes", o, table, {"sizes": p.sizes.tolist(), "steps": p.steps.tolist()})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
