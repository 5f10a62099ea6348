"""fedsim and its peers on the same work, side by side: `python benchmarks/peers/install.py`, then `python benchmarks/peers/run.py`.

    python benchmarks/peers/run.py                                    # everything
    python benchmarks/peers/run.py --workloads W2 --systems fedsim torch flower --repeats 3
    python benchmarks/peers/run.py --small                            # to see that every system works
    python benchmarks/peers/run.py --write-docs                       # docs/peers.md from what is kept, nothing measured
    python benchmarks/peers/run.py --platform gpu                     # on a GPU, with workloads for one
    python benchmarks/peers/run.py --platform gpu --together --alone  # the same where minutes count

All systems of a workload are started one after another and run two rounds each, in which programs are compiled and actors
started. Then repeats are interleaved: a repeat is `--rounds` rounds of every system in turn, while the others wait for
leave, so that a drift of the machine hits all alike. After round 3 each hands in its parameters, and one judge computes the
loss on examples that no client has; a system that learned something else is void. `--fresh` starts every system anew for
each repeat instead, alone on the machine; `--together` starts all at once, which many cores do sooner, and `--alone` has each
run all its repeats and end before the next one runs, for a memory that does not hold what all of them keep. Records of what
is not asked for are kept; the table marks those that were not measured together with fedsim's. Linux only. See docs/peers.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import document
import install
import numpy as np
import tyro
import verdicts
import workloads
from driver import JUDGED
from processes import JAX_OPTIONS, System, SystemFailedError

BEGAN = time.monotonic()
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for report.py


class Kind(NamedTuple):
    """How a system is started."""

    script: str
    env: str | None
    """Its environment under .envs; None for the one that runs this."""
    more: tuple[str, ...] = ()
    models: tuple[str, ...] = ("cnn", "vit", "bert")
    """The workloads' models that it runs."""
    platforms: tuple[str, ...] = ("cpu", "gpu")


TORCH = ("torch", "pfl", "flower")  # environments that compute with it; the others with JAX
CPU, GPU, TRANSFORMERS = ("cpu",), ("gpu",), ("vit", "bert")
TWO = ("--devices", "2")
SYSTEMS: dict[str, Kind] = {
    "fedsim": Kind("with_fedsim.py", None),
    "fedsim-1": Kind("with_fedsim.py", None, ("--devices", "1"), platforms=CPU),
    "torch": Kind("with_torch.py", "torch"),
    "torch.func": Kind("with_torch_func.py", "torch", models=TRANSFORMERS),
    "pfl": Kind("with_pfl.py", "pfl"),
    "pfl-2": Kind("with_pfl.py", "pfl", ("--processes", "2")),
    **{f"pfl-{n}": Kind("with_pfl.py", "pfl", ("--processes", str(n)), platforms=GPU) for n in (4, 8)},
    "flower": Kind("with_flower.py", "flower", platforms=CPU),
    **{
        f"flower-{share}": Kind("with_flower.py", "flower", ("--gpu-share", str(share)), platforms=GPU)
        for share in (1.0, 0.5, 0.25, 0.125)
    },
    "fedjax": Kind("with_fedjax.py", "fedjax"),
    "drjax": Kind("with_drjax.py", "drjax"),
    "drjax-2": Kind("with_drjax.py", "drjax", TWO, platforms=CPU),
    "padded-vmap": Kind("with_padded_vmap.py", None, models=TRANSFORMERS),
    "padded-vmap-2": Kind("with_padded_vmap.py", None, TWO, models=TRANSFORMERS, platforms=CPU),
}
PACKAGES = ("fedsim-jax", "torch", "pfl", "flwr", "ray", "fedjax", "drjax", "jax", "jaxlib", "numpy")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    workloads: tuple[str, ...] = ()
    """Of W1, W2, W3-4, W3-8, W3-16, G-B-8, G-B-16, G-Ti-8, G-L-8 (default: those that begin with W; on a GPU with G)."""
    systems: tuple[str, ...] = ()
    """Which of them (default: all of the platform)."""
    platform: Literal["cpu", "gpu"] = "cpu"
    """Where the systems compute; results on a GPU are kept in a file of their own."""
    repeats: int = 5
    """Interleaved repeats."""
    rounds: int | None = None
    """Steady rounds of a system in a repeat (default: 2 of W2, 1 of the others)."""
    slow: float = 30.0
    """A system whose second round takes longer than this many seconds runs in the first two repeats only."""
    lanes: str = "auto"
    """fedsim's `Speed.lanes`."""
    fresh: bool = False
    """Start every system anew for each repeat, alone."""
    together: bool = False
    """Start all systems of a workload and run their first two rounds side by side; the table marks that. Repeats are in turn."""
    alone: bool = False
    """A system runs all its repeats and ends before the next one runs."""
    patience: float = 900.0
    """Seconds after which a start or a round is given up."""
    budget: float | None = None
    """Seconds after which nothing further is begun; what has been measured by then is kept."""
    small: bool = False
    """A few clients and a transformer of one block; no timing worth reporting."""
    write_docs: bool = False
    """Measure nothing: write the tables of what is kept into docs/peers.md."""


class Measured:
    """One start of a system, and its record."""

    def __init__(self, name: str, workload: str, o: Options, folder: Path, made: Mapping[str, Any]) -> None:
        kind = SYSTEMS[name]
        self.o, self.out = o, folder / f"{name}-{workload}.npz"
        self.out.unlink(missing_ok=True)
        python = sys.executable if kind.env is None else str(install.python_of(kind.env))
        rounds = max(2 + o.repeats * rounds_of(workload, o), JUDGED)
        command = [
            python,
            str(HERE / kind.script),
            workload,
            "--rounds",
            str(rounds),
            "--out",
            str(self.out),
            *kind.more,
        ]
        command += (
            ["--platform", o.platform]
            + ["--small"] * o.small
            + (["--lanes", o.lanes] if name.startswith("fedsim") else [])
        )
        self.record: dict[str, Any] = {
            "workload": workload,
            "system": name,
            **made,
            "versions": versions(kind.env),
            "together": o.together,
            "alone": o.alone or o.fresh,
            "time": now(),
            "repeats": [],
            "others": [],
            "cpu": [],
            "loss": None,
            "error": None,
        }
        print(f"{workload} {name}: starting", flush=True)
        self.system = System(command, folder / f"{name}-{workload}.log", folder, o.platform)
        self.done = 0

    def ready(self) -> None:
        """Waits until it could run its first round."""
        try:
            self.record["startup"] = self.system.ready(self.o.patience)
            self.record |= self.system.about
        except SystemFailedError as failure:
            self.fail(failure)

    def warm_up(self) -> None:
        """The two rounds in which programs are compiled and actors started."""
        r = self.record
        if r["error"]:
            return
        try:
            first = self.one()
            r["first"], r["compiling"] = first["seconds"], first["compiling"]
            r["warm"] = self.one()["seconds"]
        except SystemFailedError as failure:
            self.fail(failure)
            return
        figures = ", ".join(f"{r[name]:.1f}" for name in ("startup", "first", "warm"))
        print(f"{r['workload']} {r['system']}: {figures} s to start and in rounds 1 and 2", flush=True)

    def one(self) -> dict[str, Any]:
        """A round."""
        figures = self.system.round(self.o.patience)
        self.done += 1
        if self.done == JUDGED:
            self.system.wait("judged", self.o.patience)
        return figures

    def repeat(self, number: int, rounds: int) -> None:
        """A repeat's rounds; nothing of a system that failed, or that is slow and has had two."""
        if self.record["error"] or (number >= 2 and self.record["warm"] > self.o.slow):
            return
        try:
            figures = [self.one() for _ in range(rounds)]
        except SystemFailedError as failure:
            self.fail(failure)
            return
        for key, figure in (("repeats", "seconds"), ("others", "others"), ("cpu", "cpu")):
            self.record[key].append([f[figure] for f in figures])

    def fail(self, failure: SystemFailedError) -> None:
        """Notes the error, shows the end of the log and ends the system."""
        self.record["error"] = str(failure)
        print(f"{self.record['workload']} {self.record['system']}: {failure}")
        print(*("  " + line for line in self.system.log.read_text().splitlines()[-15:]), sep="\n", flush=True)
        self.system.end()

    def end(self, judge: Judge) -> dict[str, Any]:
        """Ends the system; its record, judged."""
        self.record["pss"] = self.system.peak_pss
        self.system.end()
        if not self.record["error"] and self.out.exists():
            self.record["loss"] = judge(dict(np.load(self.out)))
        return self.record


class Judge:
    """The loss of a workload's probe examples, by one model for all systems."""

    def __init__(self, w: workloads.Workload) -> None:
        import jax
        import jax_models

        d, apply = workloads.data(w), jax_models.apply_of(w)
        self.prepared = lambda trained: jax_models.prepared(w, trained)
        self.weights, frozen = workloads.weights(w)
        self.given = jax.device_put((self.prepared(frozen), d.probe_x, d.probe_y))

        @jax.jit
        @jax.default_matmul_precision("highest")  # a GPU would take TF32
        def loss(trained: Any, frozen: Any, x: Any, y: Any) -> Any:
            return jax_models.cross_entropy(apply(trained, frozen, x), y).mean()

        self.loss = loss

    @functools.cached_property
    def start(self) -> float:
        """Before the first round."""
        return self(self.weights)

    def __call__(self, trained: Mapping[str, np.ndarray]) -> float:
        """Mean cross-entropy with these trained parameters."""
        return float(self.loss(self.prepared({name: trained[name] for name in self.weights}), *self.given))


def rounds_of(workload: str, o: Options) -> int:
    """Steady rounds in a repeat."""
    return o.rounds or (2 if workload == "W2" else 1)


def measure(workload: str, o: Options, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """The records of a workload, and the probe loss before the first round."""
    w = workloads.find(workload, o.small)
    names = [name for name in SYSTEMS if name in o.systems and w.model in SYSTEMS[name].models]
    workloads.keep(w, folder)
    judge, made = Judge(w), {"batch": now(), **source()}
    records: list[dict[str, Any]] = []
    groups = [[name] for _ in range(o.repeats) for name in names] if o.fresh else [names]
    if o.alone and not o.together:
        groups = [[name] for group in groups for name in group]
    for group in groups:
        running: list[Measured] = []
        try:
            for name in group:
                if late(o):
                    break
                running.append(Measured(name, workload, o, folder, made))
                if not o.together:
                    running[-1].ready()
                    running[-1].warm_up()
            if o.together:
                judge.start  # noqa: B018 (compiled while they start)
                for system in running:
                    system.ready()
            for part in [[system] for system in running] if o.alone else [running]:
                in_turn(part, o, rounds_of(workload, o))
                records += [system.end(judge) for system in part]
        finally:
            for system in running:
                system.system.end()
    return [r for r in records if r["error"] or r["repeats"]], judge.start


def in_turn(running: list[Measured], o: Options, rounds: int) -> None:
    """The repeats of systems that have started, and their first two rounds where those have not been run."""
    if o.together and not late(o):
        with ThreadPoolExecutor(len(running)) as pool:  # of those that run alone there is one
            list(pool.map(Measured.warm_up, running))
    running = [system for system in running if "warm" in system.record]
    for number in range(1 if o.fresh else o.repeats):
        if number and late(o):
            return
        turn = number % max(len(running), 1)  # so that nobody always follows the same one
        for system in running[turn:] + running[:turn]:
            system.repeat(number, rounds)


def late(o: Options) -> bool:
    """Whether the budget of time is spent."""
    return o.budget is not None and time.monotonic() - BEGAN > o.budget


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def source() -> dict[str, Any]:
    """fedsim's commit, and whether its source has been changed since; empty outside of a checkout."""
    from fedsim import record

    return record.commit() or {}


def versions(env: str | None) -> dict[str, str]:
    """Package -> version in an environment, of those that matter."""
    folders = [str(f) for f in (install.ENVS / env / "lib").glob("python3*/site-packages")] if env else sys.path
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=folders)}
    return {package: there[package] for package in PACKAGES if package in there}


def completed(o: Options) -> Options:
    """The options with what is left to the platform filled in."""
    systems = tuple(name for name, kind in SYSTEMS.items() if o.platform in kind.platforms)
    work = tuple(document.WORK[o.platform])
    return dataclasses.replace(o, workloads=o.workloads or work, systems=o.systems or systems)


def check(o: Options) -> None:
    """Refuses unknown names, missing environments and a missing GPU before anything is started."""
    for what, given, known in (("workloads", o.workloads, workloads.ALL), ("systems", o.systems, SYSTEMS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"Expected {what}={', '.join(unknown)} to be among {', '.join(known)}.")
    elsewhere = [name for name in o.systems if o.platform not in SYSTEMS[name].platforms]
    if elsewhere:
        raise SystemExit(f"Expected systems that run with platform={o.platform}; {', '.join(elsewhere)} do not.")
    if o.repeats < 1 or (o.rounds is not None and o.rounds < 1):
        raise SystemExit(f"Expected repeats={o.repeats} and rounds={o.rounds} >= 1.")
    envs = sorted({kind.env for name, kind in SYSTEMS.items() if name in o.systems and kind.env})
    missing = [name for name in envs if not install.installed(name)]
    if missing:
        raise SystemExit(f"Expected the environments of {', '.join(missing)}; run python benchmarks/peers/install.py.")
    if o.platform == "gpu":
        check_gpu(envs)


SEES_GPU = """
import sys
if sys.argv[1] == "torch":
    import torch
    found = torch.cuda.is_available()
else:
    import jax
    found = any(d.platform == "gpu" for d in jax.devices("cuda"))
raise SystemExit(not found)
"""


def check_gpu(envs: Iterable[str]) -> None:
    """Refuses where fedsim's environment or one of these finds no GPU that it can compute on."""
    pythons = {"fedsim": sys.executable} | {name: str(install.python_of(name)) for name in envs}
    given = {"env": os.environ | JAX_OPTIONS["gpu"], "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    asked = {
        name: subprocess.Popen([python, "-c", SEES_GPU, "torch" if name in TORCH else "jax"], **given)
        for name, python in pythons.items()
    }
    blind = [name for name, process in asked.items() if process.wait()]
    if blind:
        raise SystemExit(
            f"Expected a GPU with platform=gpu; the environments of {', '.join(blind)} find none that they can use. "
            "Peers get CUDA by python benchmarks/peers/install.py --cuda, fedsim's by pip install 'jax[cuda12]'."
        )


def merged(before: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All records, the new ones in place of those of the same systems on the same workloads; the others are kept."""
    new = list(new)
    replaced = {(r["workload"], r["system"]) for r in new}
    return [r for r in before if (r["workload"], r["system"]) not in replaced] + new


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.write_docs:
        document.write()
        return
    o = completed(o)
    check(o)
    os.environ |= JAX_OPTIONS[o.platform]  # this process only judges; JAX reads them when it is imported
    import report

    name = document.FILES[o.platform].stem
    file = report.RESULTS / f"{name}{'-small' if o.small else ''}.json"
    before = json.loads(file.read_text()) if file.exists() else {"results": [], "start_loss": {}}
    records: list[Mapping[str, Any]] = before["results"]
    start_loss: dict[str, float] = before["start_loss"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[workloads.KEPT] = folder
        for workload in o.workloads:
            if late(o):
                break
            new, start_loss[workload] = measure(workload, o, Path(folder))
            records = merged(records, new)
            report.write(name, o, records, {"start_loss": start_loss, "judged_after_round": JUDGED})
    tables = document.tables_of({"results": records, "start_loss": start_loss}, o.platform)
    print(f"{verdicts.markdown(tables)}\n\n{verdicts.verdicts_markdown(tables)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
