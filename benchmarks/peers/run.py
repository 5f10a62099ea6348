"""fedsim and its peers on the same work, side by side: `python benchmarks/peers/install.py`, then `python benchmarks/peers/run.py`.

    python benchmarks/peers/run.py                                    # everything
    python benchmarks/peers/run.py --workloads W2 --systems fedsim torch flower --repeats 3
    python benchmarks/peers/run.py --small                            # to see that every system works

All systems of a workload are started one after another and run two rounds each, in which programs are compiled and actors
started. Then repeats are interleaved: a repeat is `--rounds` rounds of every system in turn, while the others wait for
leave, so that a drift of the machine hits all alike. After round 3 each hands in its parameters, and one judge computes the
loss on examples that no client has; a system that learned something else is void. `--fresh` starts every system anew for
each repeat instead, alone on the machine. Linux only. See docs/peers.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import install
import numpy as np
import tyro
import verdicts
import workloads
from driver import JUDGED
from processes import System, SystemFailedError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for report.py


class Kind(NamedTuple):
    """How a system is started."""

    script: str
    env: str | None
    """Its environment under .envs; None for the one that runs this."""
    more: tuple[str, ...] = ()
    workloads: tuple[str, ...] = tuple(workloads.WORKLOADS)


PEFT_ONLY = ("W2", "W3-4", "W3-8")

SYSTEMS: dict[str, Kind] = {
    "fedsim": Kind("with_fedsim.py", None),
    "fedsim-1": Kind("with_fedsim.py", None, ("--devices", "1")),
    "torch": Kind("with_torch.py", "torch"),
    "torch.func": Kind("with_torch_func.py", "torch", workloads=PEFT_ONLY),
    "pfl": Kind("with_pfl.py", "pfl"),
    "pfl-2": Kind("with_pfl.py", "pfl", ("--processes", "2")),
    "flower": Kind("with_flower.py", "flower"),
    "fedjax": Kind("with_fedjax.py", "fedjax"),
    "drjax": Kind("with_drjax.py", "drjax"),
    "padded-vmap": Kind("with_padded_vmap.py", None, workloads=PEFT_ONLY),
}
PACKAGES = ("torch", "pfl", "flwr", "ray", "fedjax", "drjax", "jax", "jaxlib", "numpy")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    workloads: tuple[str, ...] = tuple(workloads.WORKLOADS)
    """Of W1, W2, W3-4, W3-8."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which of them."""
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
    patience: float = 900.0
    """Seconds after which a start or a round is given up."""
    small: bool = False
    """A few clients and a ViT of one block; no timing worth reporting."""


class Measured:
    """One start of a system, and its record."""

    def __init__(self, name: str, workload: str, o: Options, folder: Path) -> None:
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
        command += ["--small"] * o.small + (["--lanes", o.lanes] if name.startswith("fedsim") else [])
        self.record: dict[str, Any] = {
            "workload": workload,
            "system": name,
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "repeats": [],
            "others": [],
            "cpu": [],
            "loss": None,
            "error": None,
        }
        print(f"{workload} {name}: starting", flush=True)
        self.system = System(command, folder / f"{name}-{workload}.log", folder)
        self.done = 0
        try:
            self.record["startup"] = self.system.ready(o.patience)
            self.record["first"], self.record["warm"] = self.one()["seconds"], self.one()["seconds"]
        except SystemFailedError as failure:
            self.fail(failure)
        print(f"{workload} {name}: {self.record.get('first', 0):.1f} s, {self.record.get('warm', 0):.1f} s", flush=True)

    def one(self) -> dict[str, float]:
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
        """Notes the error and ends the system."""
        self.record["error"] = str(failure)
        print(f"{self.record['workload']} {self.record['system']}: {failure}", flush=True)
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
        self.workload, self.prepared = w, jax_models.prepared
        trained, self.frozen = jax_models.weights(w)
        self.names = trained.keys()
        self.loss = jax.jit(
            lambda trained, frozen: jax_models.cross_entropy(apply(trained, frozen, d.probe_x), d.probe_y).mean()
        )
        self.start = float(self.loss(trained, self.frozen))

    def __call__(self, trained: Mapping[str, np.ndarray]) -> float:
        """Mean cross-entropy with these trained parameters."""
        return float(self.loss(self.prepared(self.workload, {n: trained[n] for n in self.names}), self.frozen))


def rounds_of(workload: str, o: Options) -> int:
    """Steady rounds in a repeat."""
    return o.rounds or (2 if workload == "W2" else 1)


def measure(workload: str, o: Options, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """The records of a workload, and the probe loss before the first round."""
    names = [name for name in SYSTEMS if name in o.systems and workload in SYSTEMS[name].workloads]
    judge, records, rounds = Judge(workloads.find(workload, o.small)), [], rounds_of(workload, o)
    groups = [[name] for _ in range(o.repeats) for name in names] if o.fresh else [names]
    for group in groups:
        running: list[Measured] = []
        try:
            for name in group:
                running.append(Measured(name, workload, o, folder))
            for number in range(1 if o.fresh else o.repeats):
                turn = number % len(running)  # so that nobody always follows the same one
                for system in running[turn:] + running[:turn]:
                    system.repeat(number, rounds)
        finally:
            records += [system.end(judge) for system in running]
    return records, judge.start


def versions() -> dict[str, dict[str, str]]:
    """Environment -> package -> version, of those that matter."""
    found = {}
    for name in install.REQUIREMENTS:
        folders = [str(f) for f in (install.ENVS / name / "lib").glob("python3*/site-packages")]
        there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=folders)}
        found[name] = {package: there[package] for package in PACKAGES if package in there}
    return found


def check(o: Options) -> None:
    """Refuses unknown names and missing environments before anything is started."""
    for what, given, known in (("workloads", o.workloads, workloads.WORKLOADS), ("systems", o.systems, SYSTEMS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"Expected {what}={', '.join(unknown)} to be among {', '.join(known)}.")
    if o.repeats < 1 or (o.rounds is not None and o.rounds < 1):
        raise SystemExit(f"Expected repeats={o.repeats} and rounds={o.rounds} >= 1.")
    envs = {SYSTEMS[name].env for name in o.systems} - {None}
    missing = sorted(str(name) for name in envs if not install.installed(str(name)))
    if missing:
        raise SystemExit(f"Expected the environments of {', '.join(missing)}; run python benchmarks/peers/install.py.")


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    import report

    check(o)
    file = report.RESULTS / f"peers{'-small' if o.small else ''}.json"
    before = json.loads(file.read_text()) if file.exists() else {"results": [], "start_loss": {}}
    records = [r for r in before["results"] if r["workload"] not in o.workloads]  # each carries its own time
    start_loss: dict[str, float] = before["start_loss"]
    with tempfile.TemporaryDirectory() as folder:
        for workload in o.workloads:
            new, start_loss[workload] = measure(workload, o, Path(folder))
            records += new
            more = {"start_loss": start_loss, "judged_after_round": JUDGED, "versions_of_peers": versions()}
            report.write("peers", o, records, more)
    show(records, start_loss)


def show(records: list[dict[str, Any]], start_loss: Mapping[str, float]) -> None:
    """Prints the table and the verdicts."""
    present = [w for w in workloads.WORKLOADS if any(r["workload"] == w for r in records)]
    tables = {w: verdicts.rows(records, w, start_loss[w]) for w in present}
    print(verdicts.markdown(tables))
    print("\n| work | target | found | verdict |\n|---|---|---|---|")
    for workload, table in tables.items():
        for v in verdicts.verdicts(workload, table):
            print(f"| {v.workload} | {v.target} | {v.found} | {v.verdict} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
