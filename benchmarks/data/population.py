"""Time and memory of populations of 10^2 to 10^6 clients: making the partition, and a round's sampling and planning.

    python benchmarks/data/population.py
    python benchmarks/data/population.py --small

Two series: as many examples for every population, and three a client. Labels of ten classes and features are drawn; the
model is a perceptron, whose rounds are so short that the host's work shows. Every population is a process of its own,
so that its peak memory is its own. Memory is read from /proc: Linux only. Seconds are the processor's, all threads
together, so that other programs on the machine change little.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from fedsim.config import Config
from fedsim.core import Passes, Population
from fedsim.data import partition
from fedsim.data.dataset import Dataset
from fedsim.engine import plan
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.randomness import stream
from fedsim.simulation import build, trainers

sys.path.append(str(Path(__file__).parents[1]))
import report


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    populations: tuple[int, ...] = (10**2, 10**3, 10**4, 10**5, 10**6)
    """Numbers of clients."""
    examples: int = 10**6
    """Examples of the first series."""
    each: int = 3
    """Examples a client of the second series."""
    cohorts: tuple[int, ...] = (10, 1000)
    """Cohort sizes; left out where the population has fewer than ten times as many."""
    repeats: int = 5
    """Timed rounds, of which the median counts."""
    law: str = "dirichlet"
    """The partition."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""
    child: tuple[int, int] | None = None
    """Internal: measure this population, (clients, examples), in this process."""


def memory(field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(o: Options, clients: int, examples: int) -> dict[str, Any]:
    """Processor seconds and bytes of one population."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, examples).astype(np.int32)
    x = rng.normal(size=(examples, 8)).astype(np.float32)
    rows = np.arange(examples)
    data = Dataset("drawn", x, y, rows, rows[:100], rows[:100], tuple("0123456789"), "array", "none", {})
    config = Config(dataset="drawn.npz", backbone="mlp", peft="full", clients=clients, clients_per_round=1, min_size=1)
    config = config.replace(partition=o.law)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, start = memory("VmRSS"), time.process_time()
    owned = partition.make(config, data)
    seconds = time.process_time() - start
    found: dict[str, Any] = {
        "clients": clients,
        "examples": examples,
        "partition_seconds": seconds,
        "index_bytes": owned.rows.nbytes + owned.offsets.nbytes,
        "partition_peak_bytes": memory("VmHWM") - before,
        "partition_kept_bytes": memory("VmRSS") - before,
        "largest_client": int(owned.sizes.max()),
        "cohorts": {},
    }
    speed = dataclasses.replace(report.speed(), devices=1)  # the plan that is made alone is one device's too
    problem = build.Problem(config, speed, data, owned, (), {})
    trainer = trainers.trainer(problem, build.phases(config)[-1])
    engine, algorithm = trainer.engine, trainer.algorithm
    for size in (m for m in o.cohorts if 10 * m <= clients):
        server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
        kept, met = Memory(algorithm.memory, engine.held), np.zeros(clients, np.int32)
        times: dict[str, list[float]] = {"sample": [], "plan": [], "round": []}
        resident = 0
        for round in range(1, o.repeats + 3):
            begin = time.process_time()
            ids = algorithm.select(stream(0, f"sample {round}"), server, Population(engine.population, size))
            cohort = Cohort(engine, ids, round, kept, met=met, average=trainer.average)
            sampled = time.process_time()
            server, _ = algorithm.round(key_for(engine.root, "server", round), engine.held, server, cohort)
            jax.block_until_ready(server)
            met[cohort.ids] = round
            end = time.process_time()
            # What the exchange has planned, once more alone.
            again = time.process_time()
            lanes = int(engine.lanes) if engine.lanes != "auto" else 6
            plan.make(ids, engine.rows, engine.offsets, Passes(1, None, config.batch_size), 0, round, 1, lanes)
            planned = time.process_time() - again
            for name, value in (("sample", sampled - begin), ("plan", planned), ("round", end - begin)):
                times[name].append(value)
            if round == 2:  # compiled
                resident = memory("VmRSS")
        found["cohorts"][size] = {name: values[2:] for name, values in times.items()} | {
            "grown_bytes": memory("VmRSS") - resident
        }
    return found


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, populations=(100, 1000), examples=3000, repeats=3, cohorts=(10, 100))
    found = []
    for clients, examples in [(n, o.examples) for n in o.populations] + [(n, n * o.each) for n in o.populations]:
        command = [sys.executable, __file__, f"--repeats={o.repeats}", f"--law={o.law}"]
        command += ["--cohorts", *map(str, o.cohorts), "--child", str(clients), str(examples)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        one = json.loads(done.stdout.splitlines()[-1])
        found.append(one)
        text = f"{clients:9,} clients, {examples:9,} examples: partition {one['partition_seconds']:6.2f} s, index "
        text += f"{one['index_bytes'] / 2**20:6.2f} MiB, peak +{one['partition_peak_bytes'] / 2**20:5.0f} MiB"
        for size, c in one["cohorts"].items():
            ms = {name: 1e3 * float(np.median(c[name])) for name in ("sample", "plan", "round")}
            share = (ms["sample"] + ms["plan"]) / ms["round"]
            text += f"; {size}: sample {ms['sample']:.2f} + plan {ms['plan']:.2f} of {ms['round']:.0f} ms ({share:.1%})"
        print(text, flush=True)
    report.write("population", o, found)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    print(json.dumps(measure(options, *options.child))) if options.child else main(options)
