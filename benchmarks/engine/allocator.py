"""A forward pass with and without the setting of the host's allocator that `fedsim.engine.host.tune_host` makes.

    python benchmarks/engine/allocator.py
    python benchmarks/engine/allocator.py --small

Linux with glibc only. The setting holds for a process, so every measurement is a process of its own, with and without
in turns. Page faults are counted too: they are what the setting saves.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from fedsim import peft
from fedsim.engine.host import tune_host

sys.path.append(str(Path(__file__).parents[1]))
import report


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "minilm_l6"
    """Text backbone, with random weights."""
    batch: int = 256
    """Texts of a pass."""
    tokens: int = 32
    """Length of a text."""
    passes: int = 10
    """Timed passes of a process, after two others."""
    processes: int = 5
    """Processes with, and as many without."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""
    child: str | None = None
    """Internal: measure in this process, `tuned` or `plain`."""


def child(o: Options) -> None:
    """Prints the seconds and the minor page faults of each pass as JSON."""
    if o.child == "tuned":
        tune_host(report.speed())
    model = peft.build(o.backbone, 20, input_shape=(o.tokens,), peft="head")
    trained, frozen = jax.device_put(peft.start(model, "random", 0))
    x = jax.device_put(np.random.default_rng(0).integers(1, 500, (o.batch, o.tokens)).astype(np.int32))
    forward = jax.jit(model.apply)
    seconds, faults = [], []
    for _ in range(o.passes + 2):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        forward(trained, frozen, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(json.dumps({"seconds": seconds[2:], "page_faults": faults[2:]}))


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if platform.libc_ver()[0] != "glibc":
        raise SystemExit("The setting is one of glibc; there is nothing to measure here.")
    if o.small:
        o = dataclasses.replace(o, backbone="bert_tiny", batch=32, passes=3, processes=1)
    found: dict[str, dict[str, list[float]]] = {k: {"seconds": [], "page_faults": []} for k in ("plain", "tuned")}
    options = [f"--{k}={getattr(o, k)}" for k in ("backbone", "batch", "tokens", "passes")]
    for _ in range(o.processes):
        for kind, values in found.items():
            command = [sys.executable, __file__, *options, f"--child={kind}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for name, new in json.loads(done.stdout.splitlines()[-1]).items():
                values[name].append(float(np.median(new)))
    medians = {k: {name: float(np.median(v)) for name, v in values.items()} for k, values in found.items()}
    for kind, m in medians.items():
        print(f"{kind:6} {m['seconds']:8.4f} s a pass, {m['page_faults']:8.0f} page faults")
    gain = 1 - medians["tuned"]["seconds"] / medians["plain"]["seconds"]
    print(f"{gain:+.1%} of the time saved")
    report.write("allocator", o, {"medians_of_processes": found, "saved": gain})


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    child(options) if options.child else main(options)
