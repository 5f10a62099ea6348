"""A transformer's training step before and after each change to its layers: plain forms here, kept ones in fedsim.

    python benchmarks/models/layers.py                          # ViT-Ti/16, MiniLM-L6 and ViT-S/14 with LoRA
    python benchmarks/models/layers.py --backbones vit_ti16 --lanes 16
    python benchmarks/models/layers.py --hlo programs           # and writes the compiled programs there, a file each
    python benchmarks/models/layers.py --small                  # a tiny model, to see that it works

All variants run in one process, one repeat of each, then the next. A repeat is several steps in a loop inside of one program, as
the engine runs them: a call for each step would map its temporary memory anew every time. Given, for one step, are the
median and the least wall-clock time and CPU time (of all threads), and ratios of the medians: on a busy machine only the
CPU time means anything. The gradients must agree with the plain forms'. The compiled programs' operations and temporary
memory are counted too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fedsim import peft
from fedsim.backbones import backbone, bert, layers, vit
from fedsim.engine.host import tune_host
from fedsim.evaluation.evaluate import masked_sums

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES, LR = 10, 0.05
IMAGE = {"vit_ti16": 64, "vit_s14": 56, "vit_tiny": 16}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbones: tuple[str, ...] = ("vit_ti16", "minilm_l6", "vit_s14")
    """Random weights: their values do not matter here."""
    lanes: int = 4
    """Clients side by side."""
    batch_size: int = 16
    """Rows of a client's step."""
    tokens: int = 32
    """Length of a text."""
    rank: int = 4
    """Of LoRA on query and value; the head is trained beside it."""
    steps: int = 6
    """Steps of the loop in a repeat."""
    repeats: int = 7
    """Timed repeats, after one that compiles."""
    hlo: Path | None = None
    """Folder for the compiled programs as XLA writes them, BACKBONE-VARIANT.txt."""
    small: bool = False
    """A tiny model, few repeats; no timing worth reporting."""


def plain_gelu(x: jax.Array) -> jax.Array:
    """JAX's own exact GELU, by erfc, differentiated by JAX."""
    return jax.nn.gelu(x, approximate=False)


def plain_norm(self: layers.LayerNorm, x: jax.Array) -> jax.Array:
    """The formula, differentiated by JAX."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]


def plain_linear(self: layers.Linear, x: jax.Array) -> jax.Array:
    """Products over (batch, token) axes as they come; kernel, bias and LoRA only."""
    y = x @ self.kernel[...]
    if self.lora_a is not None and self.lora_b is not None:
        y = y + ((x @ self.lora_a[...]) * self.lora_scale) @ self.lora_b[...]
    return y if self.bias is None else y + self.bias[...]


def plain_attention(
    self: layers.Attention, x: jax.Array, mask: jax.Array | None = None, read: int | None = None
) -> jax.Array:
    """Batch and heads as two axes, batch and tokens first; every token's output; no prefix, no adapter."""
    if read is not None:
        raise ValueError(f"Expected read={read} to be None: the plain attention computes all tokens.")

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], self.heads, -1)  # (B, T, H, D/H)

    query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
    return self.output(mixed.reshape(x.shape))


def plain_block(block: Any) -> Callable[..., None]:
    """The block's `__init__`, every token computed in the last one too."""
    make = block.__init__
    return lambda self, config, read=None, *, rngs: make(self, config, rngs=rngs)


PLAIN: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "gelu": ((vit, "gelu", plain_gelu), (bert, "gelu", plain_gelu)),
    "norm": ((layers.LayerNorm, "__call__", plain_norm),),
    "rows": ((layers.Linear, "__call__", plain_linear),),
    "heads": ((layers.Attention, "__call__", plain_attention),),
    "read": tuple((block, "__init__", plain_block(block)) for block in (vit.Block, bert.Block)),
}
"""What was changed -> where its plain form goes."""

STEPS = {", ".join(list(PLAIN)[:kept]) or "plain": tuple(PLAIN)[kept:] for kept in range(len(PLAIN))} | {"all": ()}
"""Variant, by what is kept -> the forms that are still plain."""


@contextlib.contextmanager
def plain(names: tuple[str, ...]) -> Iterator[None]:
    """Models traced inside have these forms plain."""
    with contextlib.ExitStack() as stack:
        for name in names:
            for owner, attribute, form in PLAIN[name]:
                stack.enter_context(mock.patch.object(owner, attribute, form))
        yield


class Program:
    """Compiled training steps, or forward passes, of all lanes, in a loop."""

    def __init__(self, name: str, still_plain: tuple[str, ...], o: Options, *, train: bool) -> None:
        text = backbone(name).kind == "text"
        shape = (o.tokens,) if text else (IMAGE[name], IMAGE[name], 3)
        rng = np.random.default_rng(0)
        size = (o.lanes, o.batch_size)
        x = rng.integers(1, 500, (*size, *shape)).astype(np.int32 if text else np.uint8)
        with plain(still_plain):
            targets = ("*/attention/query", "*/attention/value")
            model = peft.build(name, CLASSES, input_shape=shape, peft="lora", rank=o.rank, targets=targets)
            trained, frozen = jax.device_put(peft.start(model, "random", 0))

            def loss(trained: Any, frozen: Any, x: Any, y: Any) -> Any:
                return masked_sums(model.apply(trained, frozen, x), y, jnp.ones(y.shape))["loss"] / len(y)

            def step(trained: Any, frozen: Any, x: Any, y: Any) -> Any:
                grads = jax.grad(loss)(trained, frozen, x, y)
                return jax.tree.map(lambda w, g: w - LR * g, trained, grads)

            lanes = jax.tree.map(lambda a: jnp.broadcast_to(a, (o.lanes, *a.shape)) + 0, trained)
            self.arguments = jax.device_put((lanes, frozen, x, rng.integers(0, CLASSES, size).astype(np.int32)))
            mapped = jax.vmap(step if train else loss, (0, None, 0, 0))

            def turn(carry: Any, frozen: Any, x: Any, y: Any) -> Any:
                if train:
                    return mapped(carry, frozen, x, y)
                losses = mapped(carry[0], frozen, x, y)
                # The next pass waits for this one, or XLA would take it out of the loop.
                held = jax.tree.map(lambda a: a + 1e-30 * losses.reshape(-1, *[1] * (a.ndim - 1)), carry[0])
                return held, losses

            def loop(lanes: Any, *given: Any) -> Any:
                first = lanes if train else (lanes, jnp.zeros(o.lanes))
                last = jax.lax.fori_loop(0, o.steps, lambda _, carry: turn(carry, *given), first)
                return last if train else last[1]

            start = time.perf_counter()
            self.compiled = jax.jit(loop).lower(*self.arguments).compile()
            self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)

    def about(self) -> dict[str, Any]:
        """Operations of the compiled program by kind, GELU's among all instructions, and its temporary memory."""
        hlo, memory = self.compiled.as_text() or "", self.compiled.memory_analysis()
        body = max(hlo.split("\n\n"), key=len)  # of the loop: the largest computation
        kinds = collections.Counter(re.findall(r" = \S+ ([a-z][\w\-]*)\(", body))
        erf = len(re.findall(r'op_name="[^"]*/erfc?["/]', hlo))
        copies = len(re.findall(r"%[\w.]*(?:transpose|copy)[\w.]* = \S+ fusion\(", body))
        return {
            "operations": {k: n for k, n in kinds.items() if k not in ("parameter", "constant", "get-tuple-element")},
            "transposing_copies": copies,
            "instructions_of_erf": erf,
            "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
            "compile_seconds": self.compile_seconds,
        }


def measure(programs: dict[str, Callable[[], Any]], repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Wall-clock and CPU seconds of a step in every repeat; one repeat of all, then the next."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            seconds[name]["wall"].append((time.perf_counter() - wall) / steps)
            seconds[name]["cpu"].append((time.process_time() - cpu) / steps)
    return seconds


def difference(a: Any, b: Any, start: Any) -> float:
    """Largest difference of two updates, relative to the largest update of the same leaf."""
    apart = [
        np.abs(np.asarray(p) - q).max() / max(float(np.abs(np.asarray(q) - s).max()), 1e-12)
        for p, q, s in zip(jax.tree.leaves(a), jax.tree.leaves(b), jax.tree.leaves(start), strict=True)
    ]
    return float(max(apart))


def of_backbone(name: str, o: Options) -> list[dict[str, Any]]:
    """Rows of one backbone: the step by variant, and the forward pass before and after."""
    programs = {f"step, {variant}": Program(name, forms, o, train=True) for variant, forms in STEPS.items()}
    programs |= {f"forward, {variant}": Program(name, STEPS[variant], o, train=False) for variant in ("plain", "all")}
    results = {variant: jax.device_get(program()) for variant, program in programs.items()}
    seconds = measure(dict(programs), o.repeats, o.steps)
    rows = []
    for variant, program in programs.items():
        kind, start = variant.partition(",")[0], jax.device_get(program.arguments[0])
        reference = f"{kind}, plain"
        if kind == "step":
            apart = difference(results[variant], results[reference], start)
        else:
            apart = float(np.abs(results[variant] - results[reference]).max())
        row: dict[str, Any] = {"backbone": name, "variant": variant, "difference": apart, "seconds": seconds[variant]}
        for clock in ("wall", "cpu"):
            now, before = seconds[variant][clock], seconds[reference][clock]
            row[f"median_{clock}"], row[f"least_{clock}"] = float(np.median(now)), min(now)
            row[f"ratio_{clock}"] = float(np.median(before) / np.median(now))
            row[f"ratio_least_{clock}"] = min(before) / min(now)
        about = program.about()
        if o.hlo is not None:
            o.hlo.mkdir(parents=True, exist_ok=True)
            (o.hlo / f"{name}-{variant.replace(', ', '-')}.txt").write_text(program.compiled.as_text() or "")
        rows.append({**row, **about})
        print(
            f"{name:10} {variant:32} wall {row['median_wall'] * 1e3:8.1f} ms {row['ratio_wall']:5.2f}x   "
            f"CPU {row['median_cpu'] * 1e3:8.1f} ms {row['ratio_cpu']:5.2f}x (least {row['ratio_least_cpu']:4.2f}x)   "
            f"{about['transposing_copies']:3} copies {about['temporary_bytes'] / 1e6:7.1f} MB  differs by {apart:.0e}",
            flush=True,
        )
        if apart > 1e-3:
            raise SystemExit(f"{variant} of {name} gives another result than the plain forms")
    return rows


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, backbones=("vit_tiny",), lanes=2, batch_size=4, tokens=8, steps=2, repeats=3)
    tune_host(report.speed())
    report.write(
        "layers", dataclasses.replace(o, hlo=None), [row for name in o.backbones for row in of_backbone(name, o)]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
