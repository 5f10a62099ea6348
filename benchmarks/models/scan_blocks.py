"""Blocks of a transformer unrolled, as fedsim has them, against one `lax.scan` over stacked blocks.

    python benchmarks/models/scan_blocks.py                       # ViT-Ti/16 at 64 px, bias, 4 lanes of 8
    python benchmarks/models/scan_blocks.py --backbone vit_b16 --image 224 --precision bfloat16
    python benchmarks/models/scan_blocks.py --small

Compile time (tracing, lowering and XLA apart), time of a step (the gradient of every lane's trained part, backbone
shared), and the temporary memory of the compiled step by XLA's own analysis; each without and with rematerialised blocks.
The gradients of all forms must agree.
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
import tyro

from fedsim import peft
from fedsim.engine.host import tune_host
from fedsim.peft import precision

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "vit_ti16"
    """A ViT."""
    peft: str = "bias"
    """Its leaves must be the same in every block."""
    image: int = 64
    """Side of an image."""
    lanes: int = 4
    """Clients side by side."""
    batch_size: int = 8
    """Rows of each."""
    precision: str = "float32"
    """Or bfloat16."""
    repeats: int = 5
    """Timed steps, after one that is not."""
    small: bool = False
    """Two blocks; no figure worth reporting."""


def unrolled(model: peft.Model, kind: str, remat: str) -> Callable[..., Any]:
    """The forward pass as fedsim has it."""
    return precision.computed(model, kind, remat).apply


def scanned(model: peft.Model, kind: str, remat: str) -> Callable[..., Any]:
    """The same function over the same leaves: those of the blocks are stacked, one traced block runs over them."""
    model = precision.computed(model, kind)
    blocks = model.stages - 3  # beside embeddings, norm and head

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        leaves = {**frozen, **trained}
        ends = {path.removeprefix("blocks/0/") for path in leaves if path.startswith("blocks/0/")}
        stacked = {end: jnp.stack([leaves[f"blocks/{i}/{end}"] for i in range(blocks)]) for end in ends}

        def block(h: Any, own: Any) -> tuple[Any, None]:
            return model.run({f"blocks/0/{end}": leaf for end, leaf in own.items()}, h, 1, 2), None

        if remat != "none":
            block = jax.checkpoint(block, policy=precision.POLICIES[remat], prevent_cse=False)
        h = jax.lax.scan(block, model.run(leaves, x, 0, 1), stacked)[0]
        return model.run(leaves, h, blocks + 1, model.stages)

    return apply


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, backbone="vit_tiny", image=16, lanes=2, batch_size=2, repeats=2)
    tune_host(report.speed())
    shape, rng = (o.image, o.image, 3), np.random.default_rng(0)
    model = peft.build(o.backbone, CLASSES, input_shape=shape, peft=o.peft)
    trained, frozen = peft.start(model, "random", 0)
    frozen = precision.held(frozen, o.precision)
    lanes = {path: np.stack([leaf] * o.lanes) for path, leaf in trained.items()}
    x = rng.integers(0, 256, (o.lanes, o.batch_size, *shape)).astype(np.uint8)
    given = jax.device_put((lanes, frozen, x))

    compiled, results = {}, {}
    about: dict[str, dict[str, Any]] = {}
    for name, make in (("unrolled", unrolled), ("scanned", scanned)):
        for remat in ("none", "blocks"):
            apply = make(model, o.precision, remat)

            def loss(trained: Any, frozen: Any, x: Any, apply: Any = apply) -> Any:
                return -jax.nn.log_softmax(apply(trained, frozen, x))[:, 0].mean()

            step = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, 0)))
            times = [time.perf_counter()]
            traced = step.trace(*given)
            times.append(time.perf_counter())
            lowered = traced.lower()
            times.append(time.perf_counter())
            program = lowered.compile()
            times.append(time.perf_counter())
            key = f"{name}, remat {remat}"
            compiled[key] = lambda program=program: program(*given)
            memory = program.memory_analysis()
            about[key] = {
                **dict(zip(("trace", "lower", "compile"), np.diff(times).tolist(), strict=True)),
                "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            }
            results[key] = jax.device_get(compiled[key]())
    seconds = report.interleaved(compiled, o.repeats)
    reference = next(iter(results.values()))
    largest = max(float(np.abs(v).max()) for v in reference.values())
    rows = []
    for key, found in results.items():
        apart = max(float(np.abs(found[p] - v).max()) for p, v in reference.items()) / largest
        if apart > (1e-3 if o.precision == "float32" else 0.1):
            raise SystemExit(f"{key} gives another gradient (differs by {apart:.1e})")
        row: dict[str, Any] = {
            "name": key,
            "seconds": seconds[key],
            "median": float(np.median(seconds[key])),
            **about[key],
        }
        rows.append({**row, "relative_difference": apart})
        print(
            f"{key:24} step {row['median']:.3f} s, compile {row['compile']:.1f} s (trace {row['trace']:.1f}, "
            f"lower {row['lower']:.1f}), {(row['temporary_bytes'] or 0) / 1e6:,.0f} MB, differs by {apart:.1e}"
        )
    report.write("scan_blocks", o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
