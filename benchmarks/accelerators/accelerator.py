"""One accelerator: fedsim against its limit, a bare forward-backward pass, and a sequential torch loop.

    python benchmarks/accelerators/accelerator.py --torch-python ~/torch/bin/python   # everything; goes on where it stopped
    python benchmarks/accelerators/accelerator.py --cases vit_b16-bias-16 --rows 256 512 --remat none blocks
    python benchmarks/accelerators/accelerator.py --together --rows 512               # all compile at once: minutes
    python benchmarks/accelerators/accelerator.py --small                             # a tiny ViT on the CPU, to see that it works

256 clients a round, two local steps each, bfloat16. MFU = examples/s * FLOPs of an example / dense bfloat16 peak; the
FLOPs are those of `fedsim.peft.flops`: forward, activation gradients, trained weights' gradients. The bare pass computes the
gradient of the trained part for as many rows as fedsim has in a step, in JAX (repeats interleaved) and in compiled torch;
the better of the two is the ceiling. `torch_loop.py` is the loop; without a torch it is left out, and so said.

Every setting that is to be tried (lanes, rematerialisation, forms for GPUs) is measured in a process of its own, one after
the other, so that its peak memory is that of this setting alone (the device's allocator, or the process on a CPU, before
the bare pass runs; what XLA takes to choose kernels counts). A process compiles, waits for leave, and is timed; with
`--together` all of them compile side by side first, and XLA then chooses kernels on a busy device. The fastest setting
counts, the others are kept beside it. What fails is recorded as `error`, and the next is measured. The file is written
after each case; cases that it has with the same options, at the same commit, on the same device are not measured again but
with --again, and a file of other ones is begun anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from fedsim import peft, record
from fedsim.backbones import forms as kernel_forms
from fedsim.core import Passes
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.host import compile_clock, tune_host
from fedsim.engine.lanes import Lanes, Request
from fedsim.evaluation.evaluate import classification_loss
from fedsim.folds import mean
from fedsim.peft import precision
from fedsim.peft.flops import training_flops
from fedsim.training.local import fit

sys.path.append(str(Path(__file__).parents[1]))
import report

CLASSES, LR, ROUND, EXAMPLES = 100, 0.01, 1, 1024
LOOP = Path(__file__).parent / "torch_loop.py"


class Case(NamedTuple):
    """What is trained, and the targets: least MFU, least share of the ceiling, least ratio to the sequential loop."""

    backbone: str
    peft: str
    batch: int
    shape: tuple[int, ...] = (224, 224, 3)
    mfu: float | None = None
    ceiling: float | None = None
    loop: float | None = None


def named(*cases: Case) -> dict[str, Case]:
    """Cases by name."""
    return {f"{c.backbone}-{c.peft}-{c.batch}": c for c in cases}


CASES = named(
    Case("vit_b16", "bias", 16, mfu=0.40, ceiling=0.9),
    *(Case("vit_b16", kind, 16, mfu=0.30, ceiling=0.9) for kind in ("lora", "adapter", "prompt")),
    Case("vit_b16", "lora", 8, loop=3.0),
    Case("vit_ti16", "lora", 8, loop=20.0),
    Case("minilm_l6", "lora", 8, (128,), loop=20.0),
)
SMALL = named(
    Case("vit_tiny", "bias", 4, (16, 16, 3), 0.4, 0.9, 3.0), Case("bert_tiny", "lora", 4, (8,), 0.3, 0.9, 3.0)
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    cases: tuple[str, ...] = ()
    """Names such as vit_b16-bias-16 (default: all)."""
    clients: int = 256
    """Of a round; each trains `steps` batches."""
    steps: int = 2
    """Local steps of a client."""
    rows: tuple[int, ...] = ()
    """Rows of a step to try, lanes times batch; the fastest counts (default: the lanes that auto chooses)."""
    remat: tuple[str, ...] = ("none",)
    """Rematerialisations to try; the fastest counts."""
    forms: tuple[str, ...] = ("all",)
    """Of the forms for NVIDIA GPUs: all, none, or some as in attention+norm; the fastest counts."""
    precision: str = "bfloat16"
    """Of fedsim and of the bare pass."""
    repeats: int = 5
    """Timed rounds, after one that compiles."""
    together: bool = False
    """Have all processes compile side by side before the first is timed."""
    peak: float | None = None
    """FLOP/s that count as 100 % (default: the published dense peak, or what a matrix product reaches here)."""
    torch_python: str = ""
    """A Python with torch (default: the one that runs this)."""
    again: bool = False
    """Measure cases again that the file has."""
    small: bool = False
    """Tiny models; no figure worth reporting."""


class FailedError(Exception):
    """A process ended with an error; its last words."""


READY = "ready to be timed"


class Process:
    """A process that compiles, waits for leave, measures, and answers with a line of JSON."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.prepared = False

    def start(self) -> None:
        """Begins."""
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)

    def prepare(self) -> None:
        """Returns when it is ready to be timed, or has ended."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.strip() == READY:
                break
        self.prepared = True

    def answer(self) -> dict[str, Any]:
        """Gives it leave, and what it then finds.

        Raises:
            FailedError: it ended with an error; its last words.
        """
        if not self.prepared:
            self.prepare()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        out = self.process.stdout.read()
        if self.process.wait():
            self.errors.seek(0)
            name = Path(self.command[1]).name
            raise FailedError(f"{name} ended with {self.process.returncode}:\n{self.errors.read()[-2000:]}")
        return json.loads(out.strip().splitlines()[-1])


def wait_for_leave() -> None:
    """What such a process calls when it has compiled."""
    print(READY, flush=True)
    sys.stdin.readline()


def main(o: Options) -> None:
    """Measures every case that the file does not have, prints verdicts, writes JSON after each."""
    if o.small:
        o = dataclasses.replace(o, clients=8, rows=o.rows or (8,), repeats=2)
    cases = SMALL if o.small else CASES
    unknown = [name for name in o.cases if name not in cases]
    if unknown:
        raise SystemExit(f"Expected cases={unknown[0]!r} to be one of {', '.join(cases)}.")
    torch = o.torch_python or sys.executable
    has_torch = subprocess.run([torch, "-c", "import torch"], capture_output=True).returncode == 0
    if not has_torch:
        print(f"torch is missing in {torch}: no sequential loop, no ceiling by torch; give --torch-python")
    # This process opens no device: a TPU, and most of a GPU's memory, belong to the process that has.
    if o.together:  # beside others none may take the device's memory in advance, as JAX does by default
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    machine = Process(own("machine", o)).answer()
    rows = {} if o.again else kept(o, machine)
    for name in (name for name in o.cases or cases if name in rows):
        print(f"{name}: the file has it; --again measures it again")
    waiting = [name for name in o.cases or cases if name not in rows]
    tried = {name: settings(o, name, cases[name]) for name in waiting}
    torches = {name: torch_process(o, cases[name], torch) for name in waiting} if has_torch else {}
    if o.together:
        prepare([p for name in waiting for p in (*tried[name].values(), torches.get(name)) if p is not None])
    for name in waiting:
        found = fastest(tried[name])
        if "error" not in found and has_torch:
            process = torches[name] or Process(torch_command(o, cases[name], torch, found["rows"]))
            found |= torch_loops(process, found)
        if "error" not in found:
            found["verdicts"] = verdicts(cases[name], found)
        rows[name] = {"name": name, **found}
        print(described(rows[name]), flush=True)
        report.write("accelerator", o, [rows[n] for n in cases if n in rows], machine=machine)
    failed = [name for name, row in rows.items() if "error" in row]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} cases failed: {', '.join(failed)}")


def prepare(processes: list[Process]) -> None:
    """Starts all, and waits until each is ready or has ended."""
    for one in processes:
        one.start()
    for one in processes:
        one.prepare()


def kept(o: Options, machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> finished row of the file, if it was measured with these options and versions, at this commit, on this device."""
    file = report.place("accelerator", o)
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    same = all(found.get(key) == machine[key] for key in ("git", "device", "versions"))
    git = machine["git"] or {"changed": True}  # what a changed checkout holds is not known
    left, right = (
        {k: v for k, v in options.items() if k not in ("cases", "again")}
        for options in (found["options"], json.loads(json.dumps(dataclasses.asdict(o))))
    )
    if git["changed"] or not same or left != right:
        print(f"{file.name} has other options, versions, another commit or device: it is begun anew")
        return {}
    return {row["name"]: row for row in found["results"] if "error" not in row}


def settings(o: Options, name: str, case: Case) -> dict[str, Process]:
    """A process for each setting that is to be tried, by what it says of itself."""
    return {
        f"{lanes} lanes, remat {remat}, forms {forms}": Process(
            own("case", o, case=name, remat=remat, lanes=lanes, forms=forms)
        )
        for forms in o.forms
        for remat in o.remat
        for lanes in [max(1, rows // case.batch) for rows in o.rows] or ["auto"]
    }


def fastest(tried: Mapping[str, Process]) -> dict[str, Any]:
    """What the fastest of a case's settings gave, the others' figures as `others`; `error` where none could be measured."""
    found: list[dict[str, Any]] = []
    for setting, process in tried.items():
        try:
            found.append({"setting": setting, **process.answer()})
        except FailedError as error:  # most likely too many lanes
            found.append({"setting": setting, "error": str(error)})
    worked = [one for one in found if "error" not in one]
    if not worked:
        return {"error": f"none of {len(found)} settings could be measured; the first: {found[0]['error']}"}
    best = max(worked, key=lambda one: one["examples_per_second"])
    return {**best, "others": [one for one in found if one is not best]}


def own(what: str, o: Options, **more: Any) -> list[str]:
    """The command of a process of this script: "machine" (where it runs) or "case" (`measure`)."""
    return [sys.executable, __file__, "--child", json.dumps({"what": what, "options": dataclasses.asdict(o), **more})]


def work(what: str, options: dict[str, Any], case: str = "", **setting: Any) -> Any:
    """What such a process answers."""
    o = Options(**options)
    if what == "machine":
        wait_for_leave()
        return record.plain(record.machine())
    return measure(o, (SMALL if o.small else CASES)[case], **setting)


def measure(o: Options, case: Case, remat: str, lanes: int | str, forms: str) -> dict[str, Any]:
    """fedsim with one setting, in this process, beside the bare JAX pass."""
    tune_host(report.speed())
    if forms != "all":
        kernel_forms.GPU_FORMS &= set(forms.split("+"))
    device = jax.devices()[0]
    shape, rng = case.shape, np.random.default_rng(0)
    model = peft.build(case.backbone, CLASSES, input_shape=shape, peft=case.peft)
    flops = training_flops(model, shape)
    trained, frozen = peft.start(model, "random", 0)
    held = precision.held(frozen, o.precision)
    high, kind = (256, np.uint8) if len(shape) == 3 else (500, np.int32)
    x = rng.integers(1, high, (EXAMPLES, *shape)).astype(kind)
    y = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)

    clock, computed = compile_clock(), precision.computed(model, o.precision, remat)
    before = clock.seconds
    run, engine = federated(o, case, computed, trained, held, x, y, lanes)
    compile_seconds = clock.seconds - before
    lanes = int(engine.lanes)
    size = lanes * case.batch
    bare = bare_pass(classification_loss(computed.apply), trained, held, x, y, size)
    wait_for_leave()
    before = clock.seconds
    first = report.interleaved({"first": run}, 1)["first"][0]
    compile_seconds += clock.seconds - before
    report.interleaved({"again": run}, 1)
    peak_bytes = used(device)
    report.interleaved({"first": bare}, 1)
    seconds = report.interleaved({"fedsim": run, "bare": bare}, o.repeats)
    examples = o.clients * o.steps * case.batch
    median = float(np.median(seconds["fedsim"]))
    peak = o.peak or published(device, o.precision)
    return {
        "seconds": seconds["fedsim"],
        "examples_per_second": examples / median,
        "clients_per_second": o.clients / median,
        "mfu": examples / median * flops.total / peak,
        "flops": flops._asdict(),
        "peak_flops": peak,
        "lanes": lanes,
        "remat": remat,
        "forms": forms,
        "compile_seconds": compile_seconds,  # tracing, lowering and XLA; with --together beside other cases
        "first": first,
        "peak_bytes": peak_bytes,
        "rows": size,
        "bare_seconds": seconds["bare"],
        "bare_jax": size / float(np.median(seconds["bare"])),
        "trained": sum(v.size for v in trained.values()),
    }


def federated(
    o: Options, case: Case, model: peft.Model, trained: Any, held: Any, x: Any, y: Any, lanes: int | str
) -> tuple[Callable[[], Any], Lanes]:
    """One exchange of fedsim's engine, compiled; its planning, gathering and counting of bytes included."""
    owned = o.steps * case.batch
    rows = np.arange(o.clients * owned, dtype=np.int32) % len(y)  # clients share examples: only their number matters
    offsets = np.arange(o.clients + 1) * owned
    engine = Lanes(held, x, y, rows, offsets, lanes=lanes, devices=1)
    passes, reduce = Passes(epochs=1, batch_size=case.batch), mean()
    local = fit(classification_loss(model.apply), optax.sgd, lambda client, message: jnp.float32(LR), passes)
    memory, params, ids = Memory(lambda key, held: (), engine.held), engine.put(trained), np.arange(o.clients)
    engine.programs(Request(local, reduce, False, memory.init, params), o.clients, np.diff(offsets))

    def round() -> Any:
        cohort = Cohort(engine, ids, ROUND, memory)
        change, _ = cohort.exchange(params, local, reduce)
        cohort.traffic()
        return change

    return round, engine


def bare_pass(loss: Any, trained: Any, held: Any, x: np.ndarray, y: np.ndarray, size: int) -> Callable[[], Any]:
    """The gradient of one trained part for `size` rows that lie on the device, compiled: no lanes, no optimizer, no bytes."""
    from fedsim.core import Batch

    at = np.arange(size) % len(y)
    given = jax.device_put((trained, held, x[at], y[at]))

    @jax.jit
    def gradient(trained: Any, held: Any, x: Any, y: Any) -> Any:
        batch = Batch(x, y, jnp.ones(size), jax.random.key(0), jnp.int32(0), jnp.bool_(False))
        return jax.grad(loss, argnums=1, has_aux=True)(held, trained, batch)

    compiled = gradient.lower(*given).compile()
    return lambda: compiled(*given)


def torch_process(o: Options, case: Case, torch: str) -> Process | None:
    """A process for the sequential loop and the bare pass in torch, if fedsim's rows are known beforehand."""
    known = len(o.rows) == 1
    return Process(torch_command(o, case, torch, max(1, o.rows[0] // case.batch) * case.batch)) if known else None


def torch_command(o: Options, case: Case, torch: str, rows: int) -> list[str]:
    """The command of that process."""
    given = {"backbone": case.backbone, "peft": case.peft, "shape": case.shape, "batch": case.batch, "rows": rows}
    given |= {"steps": o.steps, "classes": CLASSES, "repeats": o.repeats, "compile": not o.small}
    if case.ceiling is None:
        given["rows"] = 0  # no bare pass
    # Fewer clients: each costs the same, one after the other.
    return [torch, str(LOOP), json.dumps(given | {"clients": min(o.clients, 32)})]


def torch_loops(process: Process, found: dict[str, Any]) -> dict[str, Any]:
    """`torch_loop` and `torch_bare`, the sequential loop and the bare pass in torch, of the same trained part.

    `torch_errors` holds what failed; what else worked, and fedsim's figures, count all the same.
    """
    try:
        results = process.answer()
        if results["trained"] != found["trained"]:
            raise FailedError(
                f"Expected torch to train {found['trained']} parameters as fedsim, not {results['trained']}."
            )
    except FailedError as error:
        return {"torch_errors": [{"name": "torch", "error": str(error)}]}
    return results


def verdicts(case: Case, found: dict[str, Any]) -> dict[str, str]:
    """Every target of the case with what was reached: met, missed, or not measured."""
    fast = found["examples_per_second"]
    bare = max(found["bare_jax"], found.get("torch_bare", {}).get("examples_per_second", 0.0))
    loop = found.get("torch_loop", {}).get("examples_per_second")
    reached = {
        "mfu": (found["mfu"], case.mfu),
        "ceiling": (fast / bare, case.ceiling),
        "loop": (fast / loop if loop else None, case.loop),
    }
    return {
        name: "not measured"
        if value is None
        else f"{value:.2f}, {'met' if value >= target else 'missed'} (target {target})"
        for name, (value, target) in reached.items()
        if target is not None
    }


def described(row: dict[str, Any]) -> str:
    """A case as one paragraph for people."""
    if "error" in row:
        return f"{row['name']}: failed: {row['error']}"
    verdict = "; ".join(f"{name} {said}" for name, said in row["verdicts"].items())
    return (
        f"{row['name']}: {row['examples_per_second']:,.1f} examples/s, {row['clients_per_second']:,.2f} clients/s, "
        f"MFU {row['mfu']:.1%}, peak {row['peak_bytes'] / 1e9:.2f} GB; {row['lanes']} lanes, remat {row['remat']}; "
        f"bare JAX {row['bare_jax']:,.1f} examples/s\n    {verdict}"
        + "".join(f"\n    {one['name']} failed: {one['error']}" for one in row.get("torch_errors", ()))
    )


def used(device: Any) -> int:
    """Most bytes in use so far: the device's, or this process's on a CPU."""
    stats = device.memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def published(device: Any, kind: str) -> float:
    """The device's published dense peak, or what it reaches here."""
    from fedsim.engine import peaks

    return peaks.of(device).flops(kind)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(work(**json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options, description=__doc__))
