"""Populations to a million clients, 10 to 10,000 a round. What a round, a trained row and a client cost.

Command:  python experiments/million_clients.py            (three turns, each cell a process of its own; goes on where it stopped)
          python experiments/million_clients.py --small    (a minute, to see that it works)
Why apart: client_count.py is a sweep of what options can say. They cannot say that a million clients draw their examples with
          replacement; and a run's record has neither the time of sampling and planning, nor the peak of memory without what
          compiling took, nor the store of clients' memory alone.
Data:     Fashion-MNIST (`fedsim data fetch fashion_mnist`). Clients have 2 to 60 examples, log-normal with median 9; a million
          of them own 13 million, so they draw theirs from the 54,000 training images with replacement.
Models:   a perceptron, all of it trained (109,386 parameters), and a ViT of two blocks, LoRA r=4 and head (1,354).
Rounds:   8 for the accuracy, the first one compiles; then on until the timed ones have taken `seconds`.
Devices:  one. Lanes are a device's, so that on two devices the same `lanes` would be twice as many, and the smallest cohort
          that fills them another one.
Checked:  the index takes at most 64 bytes a client, the store's included, and 4 an example.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from fedsim import data, record
from fedsim.config import Config, Speed
from fedsim.core import Population
from fedsim.data.partition.index import by_size
from fedsim.engine import plan
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.host import tune_host
from fedsim.engine.keys import key_for
from fedsim.randomness import stream
from fedsim.report import plots
from fedsim.simulation import build, needs, trainers

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "experiments" / "results", ROOT / "docs" / "images"
FORMS: dict[str, dict[str, Any]] = {
    "perceptron": {"backbone": "mlp", "peft": "full", "lr": 0.1},
    "ViT, LoRA": {"backbone": "vit_tiny", "image_size": 28, "weights": "random", "peft": "lora", "rank": 4, "lr": 0.5},
}
ROUNDS, BATCH = 8, 8
DEVICES = 1
CLIENT_BYTES, EXAMPLE_BYTES = 64, 4  # most that the index may take
EARLIER = {"devices": 1, "least_seconds": 4.0}  # of cells that do not say: the defaults then


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    cohorts: tuple[int, ...] = (10, 16, 100, 1000, 10_000)
    """Clients a round; left out where the population has fewer than ten times as many."""
    populations: tuple[int, ...] = (10**4, 10**5, 10**6)
    """Numbers of clients for the perceptron; the ViT has the largest."""
    vit_cohorts: tuple[int, ...] = (10, 16, 100, 1000)
    """Clients a round of the ViT."""
    seen: tuple[int, ...] = (1000, 10_000, 100_000)
    """Clients with a memory, of which 1,000 come a round: the store alone."""
    lanes: int = 4
    """Lanes, the same in all cells."""
    seconds: float = 4.0
    """Timed rounds of a cell take at least this together; a cell of other lanes or seconds is another cell."""
    turns: int = 3
    """How often all cells are measured, in turn, since the machine's speed drifts; medians are shown."""
    small: bool = False
    """A few small cells, one turn; no figure worth reporting."""
    fresh: bool = False
    """Measure cells again that the JSON file has."""
    table: bool = False
    """Print and draw what the JSON file has; measure nothing."""
    child: tuple[str, int, int] | None = None
    """Internal: measure this cell (form, clients a round, population) in this process."""


class Cell(NamedTuple):
    """What a cell measures: another value is another cell."""

    form: str
    """A key of `FORMS`, or "memory": the store alone."""
    members: int
    population: int  # of "memory", clients seen
    devices: int = 0  # this and the rest are not the store's
    lanes: int = 0
    least_seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.form} / {self.members} / {self.population}"
        if self.form == "memory":
            return text
        return f"{text} / {self.devices} x {self.lanes} lanes / {self.least_seconds:g} s"


def cell_of(found: dict[str, Any]) -> Cell:
    """The cell that the figures of a file belong to, whatever their key there is."""
    asked: dict[str, Any] = {**EARLIER, **found}
    names = Cell._fields[:3] if found["form"] == "memory" else Cell._fields
    return Cell(*(asked[name] for name in names))


def cells(o: Options) -> Iterator[Cell]:
    """Every cell of the rounds, and of the store."""
    common = (DEVICES, o.lanes, o.seconds)
    for population in o.populations:
        yield from (Cell("perceptron", m, population, *common) for m in o.cohorts if 10 * m <= population)
    yield from (Cell("ViT, LoRA", m, max(o.populations), *common) for m in o.vit_cohorts)
    yield from (Cell("memory", 1000, n) for n in o.seen)


def resident(field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (its peak) of this process; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextmanager
def stopwatch(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of `plan.make`."""
    make = plan.make

    def timed(*args: Any, **options: Any) -> plan.Plan:
        start = time.perf_counter()
        made = make(*args, **options)
        spent["plan"] += time.perf_counter() - start
        return made

    plan.make = timed
    try:
        yield
    finally:
        plan.make = make


def problem(o: Options, form: str, members: int, population: int) -> build.Problem:
    """Real images; clients whose sizes are drawn, and whose examples are drawn with replacement."""
    config = Config(
        dataset="fashion_mnist", clients=population, clients_per_round=members, batch_size=BATCH, epochs=1, min_size=1,
        optimizer="sgd", head_rounds=0, **FORMS[form],
    )  # fmt: skip
    needs.fetch_missing(config)
    examples = data.load(config, None)
    rng = np.random.default_rng(0)
    sizes = np.clip(np.rint(9 * np.exp(rng.normal(0, 0.9, population))), 2, 60).astype(np.int64)
    rows = examples.train[rng.integers(0, len(examples.train), sizes.sum(), dtype=np.int32)]
    owned = by_size(rows, sizes)
    speed = Speed(lanes=o.lanes, devices=DEVICES, compilation_cache=False, cache="off")
    return build.Problem(config, speed, examples, owned, (), {})


def measure(o: Options, form: str, members: int, population: int) -> dict[str, Any]:
    """One cell, in a process of its own."""
    compiled = [0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    p = problem(o, form, members, population)
    tune_host(p.speed)
    trainer = trainers.trainer(p, build.phases(p.config)[-1])
    engine, algorithm = trainer.engine, trainer.algorithm
    server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
    kept, met = Memory(algorithm.memory, engine.held), np.zeros(population, np.int32)
    found: dict[str, list[float]] = defaultdict(list)
    facts: dict[str, Any] = {}
    round, timed = 0, 0.0
    while round < ROUNDS or timed < o.seconds:
        round += 1
        spent: dict[str, float] = defaultdict(float)
        begin, processor = time.perf_counter(), time.process_time()
        ids = algorithm.select(stream(0, f"sample {round}"), server, Population(population, members))
        sampled = time.perf_counter()
        with stopwatch(spent):
            cohort = Cohort(engine, ids, round, kept, met=met, lr=trainer.lr(round), average=trainer.average)
            server, _ = algorithm.round(key_for(engine.root, "server", round), engine.held, server, cohort)
        jax.block_until_ready(server)
        down, up = cohort.traffic()
        met[ids] = round
        seconds = time.perf_counter() - begin
        if round > 1:
            (done,) = cohort.done
            timed += seconds
            found["seconds"].append(seconds)
            found["processor_seconds"].append(time.process_time() - processor)
            found["microseconds_row"].append(1e6 * seconds / done.examples)
            found["sample_ms"].append(1e3 * (sampled - begin))
            found["plan_ms"].append(1e3 * spent["plan"])
            found["lane_occupancy"].append(done.occupancy[0])
            found["row_occupancy"].append(done.occupancy[1])
            found["rows"].append(done.examples)
        if round == 1:
            facts |= {"compiled_round_one": compiled[0], "compile_round_seconds": seconds}
            compiled[0] = 0
        if round == 2:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        if round == ROUNDS:
            # Read before the evaluation, which has a memory and a compilation of its own.
            facts |= {"peak_bytes": resident("VmHWM"), "compiled_later": compiled[0]}
            facts |= {"accuracy": trainer.validate(server)["accuracy"], "round_bytes": sum((down | up).values())}
            facts |= {"down": sum(down.values()), "up": sum(up.values())}
            facts["per_client_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(cohort.done[0].info.clients))
            compiled[0] = 0
    facts["compiled_later"] += compiled[0]
    taken = p.partition.rows.nbytes + p.partition.offsets.nbytes + met.nbytes
    limit = CLIENT_BYTES * population + EXAMPLE_BYTES * len(p.partition.rows)
    facts |= {"index_bytes": taken, "index_limit": limit, "rounds": round}
    return facts | {name: float(np.median(values)) for name, values in found.items()}


def measure_memory(members: int, seen: int) -> dict[str, Any]:
    """The store alone: rows of 10 kB, `seen` clients have one; what a round of `members` and a checkpoint cost."""
    values = 2560
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "memory.rows"
        memory = Memory(lambda key, held: np.zeros(values, np.float32), (), file)
        for first in range(0, seen, members):
            memory.scatter(np.arange(first, first + members), rng.normal(size=(members, values)).astype(np.float32))
        memory.seal()
        for _ in range(12):
            ids = rng.choice(seen, members, replace=False)
            new = rng.normal(size=(members, values)).astype(np.float32)
            before = memory.used
            for name, work in {
                "gather_ms": lambda ids=ids: memory.gather(ids),
                "scatter_ms": lambda ids=ids, new=new: memory.scatter(ids, new),
                "changed": lambda: found["rows_written"].append(int((~memory.seen["sealed"][: memory.count]).sum())),
                "seal_ms": memory.seal,
            }.items():
                start = time.perf_counter()
                work()
                found[name].append(1e3 * (time.perf_counter() - start))
            found["new_slots"].append(memory.used - before)
        table = memory.seal()
        facts = {
            "row_bytes": memory.row.itemsize,
            "table_bytes": sum(array.nbytes for array in table),
            "file_bytes": 512 * file.stat().st_blocks,
            "rows_bytes": memory.row.itemsize * seen,
            "index_bytes_client": (memory.place.nbytes + memory.seen.nbytes) / seen,
        }
    found.pop("changed")
    return facts | {name: float(np.median(series)) for name, series in found.items()}


def read(file: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a file, by what they measure: keys of earlier files do not say all of it.

    What is measured is a list with a figure for each turn; earlier files have a figure alone.
    """
    found = json.loads(file.read_text())["cells"].values() if file.exists() else ()
    return {cell_of(one): one for one in found}


def run(o: Options, file: Path) -> dict[Cell, dict[str, Any]]:
    """Measures the turns of cells that the file does not have, and writes it after each.

    A cell with too few turns, measured by another commit, starts anew.
    """
    git = record.machine()["git"]
    have = {} if o.fresh else read(file)
    have = {cell: found for cell, found in have.items() if turns_of(found) >= o.turns or found.get("git") == git}
    for turn, cell in itertools.product(range(o.turns), cells(o)):
        if turns_of(have.get(cell)) > turn:
            continue
        command = [sys.executable, __file__, f"--lanes={o.lanes}", f"--seconds={o.seconds}"]
        command += ["--child", cell.form, str(cell.members), str(cell.population)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell}: {done.stderr}")
        asked = {name: value for name, value in cell._asdict().items() if value}
        machine = {key: value for key, value in record.machine().items() if key != "platform"}  # the kernel
        now = {"time": datetime.now().astimezone().isoformat(timespec="seconds")}
        before = have[cell] if turn else {}
        figures = json.loads(done.stdout.splitlines()[-1])
        figures = {name: [*listed(before.get(name, [])), value] for name, value in figures.items()}
        have[cell] = {**asked, **now, **machine, **figures}
        print(f"{cell}: turn {turn + 1} of {o.turns}", flush=True)
        record.write_json(file, {"cells": {str(name): one for name, one in have.items()}})
    return have


def turns_of(found: dict[str, Any] | None) -> int:
    """How many turns a cell of the file has; a cell of an earlier file, whose figures are no lists, has one."""
    if found is None:
        return 0
    return max((len(value) for value in found.values() if isinstance(value, list)), default=1)


def listed(value: Any) -> list[Any]:
    """The turns of a figure; one of an earlier file is a single turn."""
    return value if isinstance(value, list) else [value]


def medians(found: dict[str, Any]) -> dict[str, Any]:
    """The cell with a figure in the place of its turns."""
    return {name: float(np.median(value)) if isinstance(value, list) else value for name, value in found.items()}


def chosen(o: Options, have: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that the options ask for, of those that there are; medians of their turns.

    Raises:
        SystemExit: rounds are asked for, and there are none of these options.
    """
    asked = list(cells(o))
    found = [cell for cell in asked if cell in have]
    if any(cell.lanes for cell in asked) and not any(cell.lanes for cell in found):
        raise SystemExit(
            f"Expected the file to have cells of these options, as {asked[0]}; it has: {', '.join(map(str, have))}."
        )
    return [medians(have[cell]) for cell in found]


def index(found: list[dict[str, Any]]) -> str:
    """What the index takes, the rounds' and the store's together, beside its limit.

    Raises:
        SystemExit: it takes more.
    """
    # The limit is that of the examples and CLIENT_BYTES a client.
    rounds = {
        CLIENT_BYTES - (c["index_limit"] - c["index_bytes"]) / c["population"] for c in found if "index_bytes" in c
    }
    store = {c["index_bytes_client"] for c in found if c["form"] == "memory"}
    own, kept = max(rounds, default=0.0), max(store, default=0.0)
    text = (
        f"Index: at most {own:.1f} B a client for partition and visits, and {kept:.1f} B for each client that keeps "
        f"something, {own + kept:.1f} of {CLIENT_BYTES} B; and {EXAMPLE_BYTES} B an example."
    )
    if own + kept > CLIENT_BYTES:
        raise SystemExit(f"{text} That is more than the limit.")
    return text


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: the rounds, against the smallest cohort that fills the lanes, and the store."""
    lines = [
        "| model | population | clients a round | round, s | row, us | to full lanes | peak, MiB | to full lanes | lanes in use "
        "| rows in use | accuracy | MB down + up | sample + plan, ms | share | programs after round 1 |",
        "|" + "---|" * 15,
    ]
    for c in (c for c in found if c["form"] != "memory"):
        base = reference(found, c)
        row = peak = "too few for the lanes"
        if base is not None and c["members"] >= base["members"]:
            row = f"{c['microseconds_row'] / base['microseconds_row']:.3f}"
            peak = f"{c['peak_bytes'] / base['peak_bytes']:.3f}"
        host = c["sample_ms"] + c["plan_ms"]
        lines.append(
            f"| {c['form']} | {c['population']:,} | {c['members']:,} | {c['seconds']:.3f} | {c['microseconds_row']:.1f} | {row} | "
            f"{c['peak_bytes'] / 2**20:.0f} | {peak} | {c['lane_occupancy']:.2f} | {c['row_occupancy']:.2f} | "
            f"{c['accuracy']:.3f} | {c['down'] / 1e6:.1f} + {c['up'] / 1e6:.1f} | {c['sample_ms']:.2f} + {c['plan_ms']:.2f} | "
            f"{host / 10 / c['seconds']:.1f} % | {c['compiled_later']:.0f} |"
        )
    lines += [
        "",
        "| clients with a memory | gather, ms | scatter, ms | checkpoint, ms | rows written | table, MB | file, MB |",
    ]
    lines += ["|" + "---|" * 7]
    lines += [
        f"| {c['population']:,} | {c['gather_ms']:.1f} | {c['scatter_ms']:.1f} | {c['seal_ms']:.1f} | {c['rows_written']:.0f} | "
        f"{c['table_bytes'] / 1e6:.2f} | {c['file_bytes'] / 1e6:.0f} |"
        for c in found
        if c["form"] == "memory"
    ]
    return "\n".join(lines)


def reference(found: list[dict[str, Any]], cell: dict[str, Any]) -> dict[str, Any] | None:
    """The smallest cohort of the same series with at least four clients a lane."""
    same = [c for c in found if (c["form"], c["population"]) == (cell["form"], cell["population"])]
    full = [c for c in same if c["members"] >= 4 * c["lanes"]]
    return min(full, key=lambda c: c["members"], default=None)


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Time of a row, peak memory, and what sampling and planning take, against clients a round."""
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "time of a trained row, us": lambda c: c["microseconds_row"],
        "peak memory of the process, MiB": lambda c: c["peak_bytes"] / 2**20,
        "sampling and planning, ms": lambda c: c["sample_ms"] + c["plan_ms"],
    }
    rounds = [c for c in found if c["form"] != "memory"]
    series = list(dict.fromkeys((c["form"], c["population"]) for c in rounds))
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for color, (form, population) in zip(plots.COLORS, series, strict=False):
            points = sorted(
                (c["members"], value(c)) for c in rounds if (c["form"], c["population"]) == (form, population)
            )
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=f"{form}, {population:,} clients")
        axes.set(xscale="log", xlabel="clients a round", title=title)
        axes.set_ylim(bottom=0) if "ms" not in title else axes.set_yscale("log")
        axes.grid(color=plots.GRID)
    figure.axes[0].legend(fontsize=7)
    plots.write(figure, file)


def main(o: Options) -> None:
    """Measures, prints the tables, draws the picture."""
    suffix = "_small" if o.small else ""
    if o.small:
        o = dataclasses.replace(
            o,
            cohorts=(10, 100),
            populations=(1000, 10_000),
            vit_cohorts=(10, 100),
            seen=(1000, 2000),
            seconds=0.5,
            turns=1,
        )
    file = RESULTS / f"client_count{suffix}.json"
    found = chosen(o, read(file) if o.table else run(o, file))
    print(f"{tables(found)}\n\n{index(found)}")
    draw(found, IMAGES / f"client_count{suffix}.png")


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if options.child is None:
        main(options)
    elif options.child[0] == "memory":
        print(json.dumps(measure_memory(*options.child[1:])))
    else:
        print(json.dumps(measure(options, *options.child)))
