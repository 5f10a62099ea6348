"""From the command to the end of the first round: `--help`, imports, and the main job with and without a compilation cache.

    python benchmarks/engine/startup.py
    python benchmarks/engine/startup.py --small           # few examples, one repeat, to see that it works

Every repeat is a process of its own, cold (an empty folder for compiled programs) and warm (that folder again) in turn.
The main job runs with one round of the head and one of LoRA, so that the first round of both phases is seen; its data,
partition, model and programs are those of `fedsim run`. Seconds count from the end of the imports. They are taken apart
into what a run does once (reading, weights, frozen features, fingerprint), compiling as JAX reports it (tracing,
lowering, XLA), and the rest. Frozen features and evaluation are arithmetic, not start-up: the sum is given with and
without them. Of the test texts, which a run reads at its end alone, 256 are kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tyro

sys.path.append(str(Path(__file__).parents[1]))  # where `report` lies


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 5
    """Processes of each kind."""
    examples: int | None = None
    """Fewer training examples than the main job has."""
    small: bool = False
    """Little, to see that it works; no timing worth reporting."""


class Recorded(Exception):  # noqa: N818 - a signal, no error
    """Both first rounds are recorded: the rest of the run says nothing about its start."""


def fewer_tests(whole: Any, tests: int = 256) -> Any:
    """The data set with that many test texts, which a run reads at its end alone; their features would take minutes."""
    import jax
    import numpy as np

    keep = np.sort(np.concatenate([whole.train, whole.validation, whole.test[:tests]]))
    rows = {name: np.searchsorted(keep, getattr(whole, name)) for name in ("train", "validation")}
    x, natural = jax.tree.map(lambda a: a[keep], (whole.x, whole.natural))
    return whole._replace(x=x, y=whole.y[keep], test=np.searchsorted(keep, whole.test[:tests]), natural=natural, **rows)


def child(cache: str, examples: int | None) -> dict[str, Any]:
    """In a process of its own: imports, then the main job until the first round of LoRA is recorded."""
    start = time.perf_counter()
    import jax

    from fedsim import data, record
    from fedsim.config import Speed, main_job
    from fedsim.record import checkpoint
    from fedsim.simulation import build, resuming, simulate

    imported = time.perf_counter()
    seconds: dict[str, float] = defaultdict(float)
    compiling: dict[str, float] = defaultdict(float)
    programs: Counter[str] = Counter()

    def timed(whole: Callable[..., Any], what: str) -> Callable[..., Any]:
        """The function, its seconds added to `what`, less those of other timed ones that it calls and less its compiling."""

        def call(*args: Any, **options: Any) -> Any:
            before, began = sum(seconds.values()) + sum(compiling.values()), time.perf_counter()
            try:
                return whole(*args, **options)
            finally:
                inside = sum(seconds.values()) + sum(compiling.values()) - before
                seconds[what] += time.perf_counter() - began - inside

        return call

    def replace(place: Any, name: str, change: Callable[[Any], Any]) -> None:
        setattr(place, name, change(getattr(place, name)))

    def validating(trainer: Any) -> Any:
        return lambda *args: (made := trainer(*args))._replace(validate=timed(made.validate, "evaluation"))

    replace(data, "load", lambda load: lambda *args: fewer_tests(load(*args)))
    replace(build, "trainer", validating)
    for place, name, what in (
        (build, "problem", "data"),
        (build, "features", "features"),
        (build, "trainer", "weights"),
        (simulate, "prepare", "weights"),
        (resuming, "fingerprint", "fingerprint"),
        (checkpoint.Checkpoints, "save", "checkpoint"),
    ):
        replace(place, name, partial(timed, what=what))

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            name = event.removeprefix("/jax/core/compile/").removesuffix("_duration")
            compiling[name] += duration_secs
            programs["compiled or read"] += name.startswith("backend")

    def count(event: str, **_: Any) -> None:
        programs["from the cache"] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(count)
    tune, append = simulate.tune_host, record.append

    def tuned(speed: Speed) -> None:
        tune(speed)
        jax.config.update("jax_compilation_cache_dir", cache)

    marks: list[dict[str, Any]] = []
    began = time.process_time()

    def mark(directory: Path, line: Any) -> None:
        append(directory, line)
        now = time.perf_counter() - imported
        marks.append(
            {
                "seconds": now,
                "without_features": now - seconds["features"] - seconds["evaluation"],
                "processor_seconds": time.process_time() - began,  # of all threads
                "parts": dict(seconds),
                "compiling": dict(compiling),
                "programs": dict(programs),
                "round": line["seconds"] - line["compile_seconds"],
            }
        )
        if len(marks) == 2:
            raise Recorded

    simulate.tune_host, record.append = tuned, mark
    config = main_job(head_rounds=1, rounds=2, examples=examples)
    with tempfile.TemporaryDirectory() as folder, suppress(Recorded):
        simulate.run(config, Speed(), out=Path(folder) / "run", quiet=True)
    return {"imports": imported - start, "head": marks[0], "lora": marks[1]}


def run_child(cache: str, examples: int | None) -> dict[str, Any]:
    """`child` in a fresh process."""
    code = f"import json, startup; print(json.dumps(startup.child({cache!r}, {examples!r})))"
    where = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": where},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def help_seconds() -> float:
    """Seconds of `fedsim --help` in a fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fedsim", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def gathered(found: list[Any]) -> Any:
    """Repeats of one structure as one structure of lists."""
    if not isinstance(found[0], dict):
        return found
    names = dict.fromkeys(name for one in found for name in one)
    return {name: gathered([one.get(name, 0) for one in found]) for name in names}


def main(o: Options) -> None:
    """Measures, prints medians, writes JSON."""
    import report

    if o.small:
        o = dataclasses.replace(o, repeats=1, examples=1000)  # of 100 clients, each at least 8
    found: dict[str, list[Any]] = {"help": [], "cold": [], "warm": []}
    for _ in range(o.repeats):
        found["help"].append(help_seconds())
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                found[kind].append(run_child(cache, o.examples))
    results = {name: gathered(each) for name, each in found.items()}
    print(f"fedsim --help {median(results['help']):8.2f} s")
    for kind in ("cold", "warm"):
        of = results[kind]
        print(f"\n{kind}: imports {median(of['imports']):.2f} s")
        for phase in ("head", "lora"):
            one = of[phase]
            parts = ", ".join(f"{name} {median(v):.2f}" for name, v in (one["parts"] | one["compiling"]).items())
            print(
                f"  to the end of the first {phase} round {median(one['seconds']):7.2f} s, without features and evaluation "
                f"{median(one['without_features']):7.2f} s\n    {parts}, round {median(one['round']):.2f}"
            )
    report.write("startup", o, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
