"""The engine's own cost of several devices and processes: the same work on 1 to 8 host devices, in one process and more.

    python benchmarks/engine/scaling.py                    # ViT-Ti/16 with LoRA at 64 px, 5 interleaved repeats
    python benchmarks/engine/scaling.py --processes 2      # no four processes
    python benchmarks/engine/scaling.py --small            # to see that it works

Host devices share the machine's cores, so nothing here can become faster: what N devices take beyond the time of one is
what planning, copying, gathering, separate programs and the sum over devices cost. Strong: the same clients and the same
number of lanes in all, spread over N devices. Weak: N times as many clients, the same lanes a device; its time is divided
by N. Each setting lives in processes of its own for the whole measurement, and repeats go round all of them. All
settings must give the same result. Also written: `docs/images/scaling.png` and the table in `docs/distributed.md`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

sys.path.append(str(Path(__file__).parents[1]))  # where `report` lies

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
CLASSES, LR = 20, 0.01
PARTS = ("plan", "put", "gather", "begin", "segment", "end", "fetch")
HOW = {"shard_map": "shard_map", "pmap": "pmap", "gloo": "shard_map, {} processes (gloo)"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "vit_ti16"
    """Its weights are random: their values do not matter here."""
    peft: str = "lora"
    """What is trained beside the head."""
    image: int = 64
    """Side of an image."""
    clients: int = 16
    """Of the strong form, and of the weak one on 8 devices; equal sizes, so that no device waits for another's plan."""
    size: int = 16
    """Examples of a client."""
    batch_size: int = 8
    """Rows of a step."""
    lanes: int = 8
    """Lanes of all devices together in the strong form, and of 8 devices in the weak one."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; each divides `lanes`."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes, beside one; each has those settings whose devices it divides."""
    repeats: int = 5
    """Timed repeats, after one that compiles."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


class Setting(NamedTuple):
    """One way to run: `how` is a key of `HOW`."""

    how: str
    devices: int  # of all processes
    processes: int = 1

    def __str__(self) -> str:
        return "-".join(map(str, self))


def settings_of(o: Options) -> list[Setting]:
    """Every way to run; the first is one device in one process."""
    alone = [Setting(how, n) for how in ("shard_map", "pmap") for n in o.devices]
    return alone + [Setting("gloo", n, p) for p in o.processes for n in o.devices if n % p == 0]


def label(how: str, processes: int) -> str:
    """A way to run for people, without its devices."""
    return HOW[how].format(processes)


# --- a worker: one process of one setting


def work(setting: Setting, number: int, at: str, folder: Path, o: Options) -> None:
    """Answers "strong", "weak" and "parts" on standard input with a line of JSON after "@"."""
    import report
    from fedsim.engine import processes
    from fedsim.engine.host import tune_host

    if setting.processes > 1:
        processes.distributed(at, setting.processes, number)  # before all that asks JAX for devices
    tune_host(report.speed())
    start = time.perf_counter()
    rounds = {kind: prepared(setting, kind, o) for kind in ("strong", "weak")}
    built = time.perf_counter() - start
    first = {}
    for kind, (run, _) in rounds.items():
        start = time.perf_counter()
        result = run()
        first[kind] = time.perf_counter() - start
        if kind == "strong" and number == 0:
            np.savez(folder / f"{setting}.npz", **result)
    answer({"built": built, "first": first})
    for asked in sys.stdin:
        kind = asked.strip()
        if kind == "parts":
            answer(rounds["strong"][1]())
            continue
        start = time.perf_counter()
        rounds[kind][0]()
        answer(time.perf_counter() - start)


def answer(value: Any) -> None:
    """Says it to the process that asks."""
    print("@" + json.dumps(value), flush=True)


def prepared(setting: Setting, kind: str, o: Options) -> tuple[Callable[[], Any], Callable[[], dict[str, float]]]:
    """Two functions: a whole round, which gives the clients' mean change; its parts, each waited for, in seconds."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedsim import peft
    from fedsim.core import Passes
    from fedsim.engine import cohort as cohorts
    from fedsim.engine import processes
    from fedsim.engine.cohort import Cohort, Memory
    from fedsim.engine.lanes import Lanes, Request
    from fedsim.evaluation.evaluate import classification_loss
    from fedsim.folds import mean
    from fedsim.training.local import fit

    most = max(o.devices)
    members = o.clients if kind == "strong" else o.clients * setting.devices // most
    lanes = o.lanes // (setting.devices if kind == "strong" else most)
    rng = np.random.default_rng(0)
    total = o.clients * o.size
    x = rng.integers(0, 256, (total, o.image, o.image, 3)).astype(np.uint8)
    y = rng.integers(0, CLASSES, total).astype(np.int32)
    model = peft.build(o.backbone, CLASSES, input_shape=x.shape[1:], peft=o.peft, image_size=o.image)
    params, frozen = peft.start(model, "random", 0)
    engine = Lanes(
        frozen, x, y, np.arange(total), np.arange(0, total + 1, o.size), lanes=lanes,
        devices=setting.devices // setting.processes, parallel="pmap" if setting.how == "pmap" else "shard_map",
    )  # fmt: skip
    local = fit(
        classification_loss(model.apply),
        optax.sgd,
        lambda client, message: jnp.float32(LR),
        Passes(1, None, o.batch_size),
    )
    memory, reduce, message = Memory(lambda key, held: (), engine.held), mean(), engine.put(params)

    def run() -> Any:
        cohort = Cohort(engine, np.arange(members), 1, memory)
        change, info = cohort.exchange(message, local, reduce)
        cohort.traffic()
        return cohort.fetch((change, info.metrics))[0]

    def parts() -> dict[str, float]:
        spent = dict.fromkeys(PARTS, 0.0)

        def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def waited(*args: Any, **options: Any) -> Any:
                start = time.perf_counter()
                out = call(*args, **options)
                jax.block_until_ready([leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)])
                spent[name] += time.perf_counter() - start
                return out

            return waited

        plain = engine.programs, cohorts.planning.make
        request = Request(local, reduce, False, memory.init, message)
        programs = engine.programs(request, members, np.full(members, o.size))
        compiled: dict[str, Any] = {name: timed(name, getattr(programs, name)) for name in ("begin", "segment", "end")}
        replaced: Any = programs._replace(**compiled)
        engine.programs = lambda *args: replaced  # pyrefly: ignore[bad-assignment] - timed ones, for these rounds
        cohorts.planning.make = timed("plan", cohorts.planning.make)
        start = time.perf_counter()
        try:
            cohort = Cohort(engine, np.arange(members), 1, memory)
            cohort._slots = timed("put", cohort._slots)
            cohort._segment = timed("gather", cohort._segment)
            change, info = cohort.exchange(message, local, reduce)
            timed("fetch", lambda: (cohort.traffic(), processes.fetch((change, info.metrics))))()
        finally:
            engine.programs, cohorts.planning.make = plain
        whole = time.perf_counter() - start
        return {**spent, "rest": whole - sum(spent.values()), "whole": whole}

    return run, parts


# --- the process that asks


class Workers:
    """The processes of one setting."""

    def __init__(self, setting: Setting, folder: Path, o: Options) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            at = f"127.0.0.1:{found.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={setting.devices // setting.processes}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        given = json.dumps([setting, at, str(folder), dataclasses.asdict(o)])
        self.running = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", str(i), given],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for i in range(setting.processes)
        ]  # fmt: skip
        self.setting = setting
        self.about = self.heard()

    def ask(self, what: str) -> Any:
        """Every process does it; what the first says."""
        for process in self.running:
            if process.stdin is not None:
                process.stdin.write(what + "\n")
                process.stdin.flush()
        return self.heard()

    def heard(self) -> Any:
        """The next answer of the first process, once all have answered."""
        answers = []
        for process in self.running:
            for line in process.stdout or ():
                if line.startswith("@"):
                    answers.append(json.loads(line[1:]))
                    break
            else:
                raise SystemExit(f"{self.setting} has ended; its errors are above")
        return answers[0]

    def end(self) -> None:
        """Lets them end."""
        for process in self.running:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.running:
            process.wait(60)


def compare(folder: Path, settings: Sequence[Setting]) -> dict[Setting, float]:
    """The largest difference of a setting's result from that of one device, relative to its largest entry."""
    results = {s: np.load(folder / f"{s}.npz") for s in settings}
    reference = results[settings[0]]
    largest = max(float(np.abs(reference[name]).max()) for name in reference)
    apart = {}
    for setting, found in results.items():
        apart[setting] = max(float(np.abs(found[name] - reference[name]).max()) for name in reference) / largest
        if apart[setting] > 1e-4:
            raise SystemExit(f"{setting} gives another result than one device: {apart[setting]:.1e}")
    return apart


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Seconds relative to one device against devices, strong and weak."""
    from matplotlib.figure import Figure

    from fedsim.report import plots

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("strong", "weak"), strict=True):
        ways = list(dict.fromkeys((row["how"], row["processes"]) for row in rows))
        for (how, processes), color in zip(ways, plots.COLORS, strict=False):
            same = [row for row in rows if (row["kind"], row["how"], row["processes"]) == (kind, how, processes)]
            line = [(row["devices"], row["ratio"]) for row in same]
            name = label(how, processes)
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=name, linewidth=1.8, markersize=5)
        plots.style(axes)
        axes.set_xscale("log", base=2)
        devices = sorted({row["devices"] for row in rows})
        axes.set_xticks(devices, [str(n) for n in devices])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("host devices")
        axes.set_title("the same work" if kind == "strong" else "work grows with devices, per device", fontsize=10)
    figure.axes[0].set_ylabel("seconds relative to one device")
    figure.axes[0].legend(fontsize=9, loc="lower left", edgecolor="none")
    plots.write(figure, file)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of the docs."""
    head = "| form | how | devices | s a round | relative to one device | plan | put | gather | segment | end, fetch |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        p = row.get("parts")
        cells = ["", "", "", "", ""]
        if p:
            cells = [f"{1e3 * s:.1f}" for s in (p["plan"], p["put"], p["gather"], p["segment"], p["end"] + p["fetch"])]
        cells = [row["kind"], label(row["how"], row["processes"]), f"{row['devices']}", *cells]
        cells[3:3] = [f"{row['median']:.3f}", f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(o: Options) -> None:
    """Measures, prints, writes JSON, picture and table."""
    import report

    if o.small:
        o = dataclasses.replace(
            o, backbone="vit_tiny", image=16, clients=8, size=4, batch_size=2, lanes=2, devices=(1, 2), repeats=2
        )
    if any(o.lanes % n or o.clients % n for n in o.devices) or min(o.devices) != 1:
        raise SystemExit(
            f"Expected devices={o.devices} to hold 1 and to divide lanes={o.lanes} and clients={o.clients}."
        )
    if min(o.processes, default=2) < 2:
        raise SystemExit(f"Expected processes={o.processes} to be 2 or more each; one is measured anyway.")
    settings = settings_of(o)
    with tempfile.TemporaryDirectory() as name:
        workers = []
        for setting in settings:
            workers.append(Workers(setting, Path(name), o))
            print(
                f"{label(setting.how, setting.processes)}, {setting.devices} devices: {workers[-1].about}", flush=True
            )
        apart = compare(Path(name), settings)
        seconds: dict[tuple[Setting, str], list[float]] = {(s, k): [] for s in settings for k in ("strong", "weak")}
        parts: dict[Setting, list[dict[str, float]]] = {s: [] for s in settings}
        for _ in range(o.repeats):
            for one in workers:
                for kind in ("strong", "weak"):
                    seconds[one.setting, kind].append(one.ask(kind))
                parts[one.setting].append(one.ask("parts"))
        for one in workers:
            one.end()
    rows = []
    for kind in ("strong", "weak"):
        unit = float(np.median(seconds[settings[0], kind]))
        for one in workers:
            s = one.setting
            median = float(np.median(seconds[s, kind]))
            row: dict[str, Any] = {
                "kind": kind,
                "how": s.how,
                "devices": s.devices,
                "processes": s.processes,
                "median": median,
            }
            row |= {"ratio": median / unit / (s.devices if kind == "weak" else 1), "seconds": seconds[s, kind]}
            row |= {"first": one.about["first"][kind], "relative_difference": apart[s]}
            if kind == "strong":
                row["parts"] = {k: float(np.median([p[k] for p in parts[s]])) for k in parts[s][0]}
            rows.append(row)
    text = table(rows)
    print(text)
    report.write("scaling", o, rows)
    if not o.small:
        draw(rows, DOCS / "images" / "scaling.png")
        file = DOCS / "distributed.md"
        before, after = file.read_text().split(BEGIN)[0], file.read_text().split(END)[1]
        file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        own, where, place, options = json.loads(sys.argv[3])
        options |= {name: tuple(options[name]) for name in ("devices", "processes")}
        work(Setting(*own), int(sys.argv[2]), where, Path(place), Options(**options))
    else:
        main(tyro.cli(Options, description=__doc__))
