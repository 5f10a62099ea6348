"""From the command to the end of the first round: `--help`, imports, and the main job with and without a compilation cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --small           # few examples, one repeat, to see that it works

Every repeat is a process of its own, cold (an empty folder for compiled programs) and warm (that folder again) in turn.
The main job runs with one round of the head and one of LoRA, so that the first round of both phases is seen; its data,
partition, model and programs are those of `fedsim run`. Seconds count from the end of the imports. They are taken apart
into what a run does once (reading, weights, frozen features, fingerprint), compiling as JAX reports it (tracing,
lowering, XLA), and the rest. Frozen features are arithmetic, not start-up, so the sum is given with and without them.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 5
    """Processes of each kind."""
    examples: int | None = None
    """Fewer training examples than the main job has."""
    small: bool = False
    """Little, to see that it works; no timing worth reporting."""


def processor_seconds() -> float:
    """Processor time of this process, all threads; says more than seconds on a machine with other work."""
    used = os.times()
    return used.user + used.system


def child(cache: str, examples: int | None) -> dict[str, Any]:
    """In a process of its own: imports, then the main job until the first LoRA round is recorded."""
    start = time.perf_counter()
    from fedsim import build, checkpoint, record, simulate
    from fedsim.config import Speed, main_job

    imported = time.perf_counter()
    import jax

    seconds: Counter[str] = Counter()
    compiling: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    inside: list[str] = []

    def timed(module: Any, name: str, what: str) -> None:
        """Adds the seconds of a function of a module to `what`, but for those of other timed ones that it calls."""
        whole = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            before, began = sum(seconds.values()), time.perf_counter()
            try:
                return whole(*args, **options)
            finally:
                nested = sum(seconds.values()) - before
                seconds[what] += time.perf_counter() - began - nested

        setattr(module, name, call)

    timed(build, "problem", "data")
    timed(build, "features", "features")
    timed(build, "trainer", "weights")
    timed(simulate, "prepare", "weights")
    timed(simulate, "fingerprint", "fingerprint")
    timed(checkpoint.Checkpoints, "save", "checkpoint")
    timed(record, "start", "record")

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            name = event.removeprefix("/jax/core/compile/").removesuffix("_duration")
            compiling[name] += duration_secs
            hits["programs"] += name.startswith("backend")

    def seen(event: str, **_: Any) -> None:
        hits["from_cache"] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(seen)
    jax.config.update("jax_compilation_cache_dir", cache)
    tune = simulate.tune_host

    def tuned(speed: Speed) -> None:
        tune(speed)
        jax.config.update("jax_compilation_cache_dir", cache)

    simulate.tune_host = tuned
    marks: list[dict[str, Any]] = []
    append = record.append
    used = processor_seconds()

    def mark(directory: Path, line: Any) -> None:
        append(directory, line)
        marks.append(
            {
                "phase": line["phase"],
                "seconds": time.perf_counter() - imported,
                "processor_seconds": processor_seconds() - used,
                "parts": dict(seconds),
                "compiling": dict(compiling),
                "programs": dict(hits),
                "round": line["seconds"],
                "round_compiling": line["compile_seconds"],
            }
        )

    record.append = mark
    del inside
    config = main_job(
        head_rounds=1, rounds=2, **({} if examples is None else {"dataset": "/tmp/mini.jsonl", "clients": 20})
    )
    with tempfile.TemporaryDirectory() as folder:
        simulate.run(config, Speed(), out=Path(folder) / "run", quiet=True)
    return {"imports": imported - start, "head": marks[0], "peft": marks[1]}
