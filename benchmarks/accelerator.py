"""One accelerator: fedsim against its limit, a bare forward-backward pass, and a sequential torch loop.

    python benchmarks/accelerator.py --torch-python ~/torch/bin/python   # everything; goes on where it stopped
    python benchmarks/accelerator.py --cases vit_b16-bias-16 --lanes 32 64 --remat none blocks
    python benchmarks/accelerator.py --small                             # a tiny ViT on the CPU, to see that it works

256 clients a round, two local steps each, bfloat16. MFU = examples/s * FLOPs of an example / dense bfloat16 peak; the
FLOPs are those of `fedsim.flops`: forward, activation gradients, trained weights' gradients. The bare pass computes the
gradient of the trained part for as many rows as fedsim has in a step, in JAX (repeats interleaved) and in compiled torch;
the better of the two is the ceiling. `torch_loop.py` is the loop; without a torch it is left out, and so said.

Everything is measured in processes of its own, one after the other: every number of lanes and rematerialisation that is
to be tried, then the fastest of them again, in a fresh process whose peak memory is therefore that of this setting alone
(the device's allocator, or the process on a CPU, before the bare pass is compiled). What fails is recorded as `error`, and
the next is measured. The file is written after each case; cases that it has with the same options, at the same commit,
on the same device are not measured again but with --again, and a file of other ones is begun anew.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import tyro

from fedsim import peft, precision, record
from fedsim.cohort import Cohort
from fedsim.core import Passes, mean
from fedsim.evaluate import classification_loss
from fedsim.flops import training_flops
from fedsim.host import tune_host
from fedsim.lanes import Lanes
from fedsim.local import fit
from fedsim.memory import Memory

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
    lanes: tuple[int, ...] = ()
    """Numbers of lanes to try; the fastest counts (default: what auto chooses)."""
    remat: tuple[str, ...] = ("none",)
    """Rematerialisations to try; the fastest counts."""
    precision: str = "bfloat16"
    """Of fedsim and of the bare pass."""
    repeats: int = 5
    """Timed rounds, after one that compiles."""
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


def main(o: Options) -> None:
    """Measures every case that the file does not have, prints verdicts, writes JSON after each."""
    if o.small:
        o = dataclasses.replace(o, clients=8, lanes=o.lanes or (2,), repeats=2)
    cases = SMALL if o.small else CASES
    unknown = [name for name in o.cases if name not in cases]
    if unknown:
        raise SystemExit(f"Expected cases={unknown[0]!r} to be one of {', '.join(cases)}.")
    torch = o.torch_python or sys.executable
    has_torch = subprocess.run([torch, "-c", "import torch"], capture_output=True).returncode == 0
    if not has_torch:
        print(f"torch is missing in {torch}: no sequential loop, no ceiling by torch; give --torch-python")
    # This process opens no device: a TPU, and most of a GPU's memory, belong to the process that has.
    machine = child(own("machine", o))
    rows = {} if o.again else kept(o, machine)
    for name in o.cases or cases:
        if name in rows:
            print(f"{name}: the file has it; --again measures it again")
            continue
        rows[name] = {"name": name, **measured(o, name, cases[name], torch if has_torch else None)}
        print(described(rows[name]), flush=True)
        report.write("accelerator", o, [rows[n] for n in cases if n in rows], machine=machine)
    failed = [name for name, row in rows.items() if "error" in row]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} cases failed: {', '.join(failed)}")


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


def measured(o: Options, name: str, case: Case, torch: str | None) -> dict[str, Any]:
    """What `fastest` and `torch_loops` find, with verdicts, or `error`."""
    try:
        found = fastest(o, name)
    except FailedError as error:
        return {"error": str(error)}
    if torch is not None:
        found |= torch_loops(o, case, found, torch)
    return found | {"verdicts": verdicts(case, found)}


def fastest(o: Options, name: str) -> dict[str, Any]:
    """The fastest setting of a case in a process of its own, and what others took.

    Raises:
        FailedError: none could be measured.
    """
    settings = [(remat, lanes) for remat in o.remat for lanes in o.lanes or ("auto",)]
    tried: list[dict[str, Any]] = []
    for remat, lanes in settings if len(settings) > 1 else ():
        one = {"name": f"remat {remat}, {lanes} lanes", "remat": remat, "lanes": lanes}
        try:
            one |= child(own("trial", o, case=name, remat=remat, lanes=lanes))
        except FailedError as error:  # most likely too many lanes
            one["error"] = str(error)
        tried.append(one)
    worked = [one for one in tried if "error" not in one]
    if tried and not worked:
        raise FailedError(f"none of {len(tried)} settings could be measured; the first: {tried[0]['error']}")
    best = (
        min(worked, key=lambda one: one["seconds"])
        if worked
        else dict(zip(("remat", "lanes"), settings[0], strict=True))
    )
    return {**child(own("case", o, case=name, remat=best["remat"], lanes=best["lanes"])), "tried": tried}


def own(what: str, o: Options, **more: Any) -> list[str]:
    """The command of a process of this script: "machine" (where it runs), "trial" or "case" (`measure`)."""
    return [sys.executable, __file__, "--child", json.dumps({"what": what, "options": dataclasses.asdict(o), **more})]


def work(what: str, options: dict[str, Any], case: str = "", remat: str = "none", lanes: int | str = "auto") -> Any:
    """What such a process answers."""
    o = Options(**options)
    if what == "machine":
        return record.plain(record.machine())
    return measure(o, (SMALL if o.small else CASES)[case], remat, lanes, trial=what == "trial")


def measure(o: Options, case: Case, remat: str, lanes: int | str, *, trial: bool) -> dict[str, Any]:
    """fedsim with one setting, in this process; but for a trial beside the bare JAX pass."""
    tune_host(report.speed())
    device = jax.devices()[0]
    shape, rng = case.shape, np.random.default_rng(0)
    model = peft.build(case.backbone, CLASSES, input_shape=shape, peft=case.peft)
    flops = training_flops(model, shape)
    trained, frozen = peft.start(model, "random", 0)
    held = precision.held(frozen, o.precision)
    high, kind = (256, np.uint8) if len(shape) == 3 else (500, np.int32)
    x = rng.integers(1, high, (EXAMPLES, *shape)).astype(kind)
    y = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)

    computed = precision.computed(model, o.precision, remat)
    run, engine = federated(o, case, computed, trained, held, x, y, lanes)
    first = report.interleaved({"first": run}, 1)["first"][0]
    again = report.interleaved({"again": run}, 2)["again"]
    lanes = int(engine.lanes)
    common = {"lanes": lanes, "remat": remat, "first": first, "peak_bytes": used(device)}
    if trial:
        return {**common, "seconds": min(again)}
    size = lanes * case.batch
    bare = bare_pass(classification_loss(computed.apply), trained, held, x, y, size)
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
        **common,
        "rows": size,
        "bare_seconds": seconds["bare"],
        "bare_jax": size / float(np.median(seconds["bare"])),
        "trained": sum(v.size for v in trained.values()),
    }


def federated(
    o: Options, case: Case, model: peft.Model, trained: Any, held: Any, x: Any, y: Any, lanes: int | str
) -> tuple[Callable[[], Any], Lanes]:
    """One exchange of fedsim's engine, its planning, gathering and counting of bytes included."""
    owned = o.steps * case.batch
    rows = np.arange(o.clients * owned, dtype=np.int32) % len(y)  # clients share examples: only their number matters
    offsets = np.arange(o.clients + 1) * owned
    engine = Lanes(held, x, y, rows, offsets, lanes=lanes, devices=1)
    passes, reduce = Passes(epochs=1, batch_size=case.batch), mean()
    local = fit(classification_loss(model.apply), optax.sgd, lambda client: jnp.float32(LR), passes)
    memory, params, ids = Memory(lambda key, held: (), engine.held), engine.put(trained), np.arange(o.clients)

    def round() -> Any:
        cohort = Cohort(engine, ids, ROUND, memory)
        change, _ = cohort.exchange(params, local, reduce)
        cohort.traffic()
        return change

    return round, engine


def bare_pass(loss: Any, trained: Any, held: Any, x: np.ndarray, y: np.ndarray, size: int) -> Callable[[], Any]:
    """The gradient of one trained part for `size` rows that lie on the device: no lanes, no optimizer, no bytes."""
    from fedsim.core import Batch

    at = np.arange(size) % len(y)
    given = jax.device_put((trained, held, x[at], y[at]))

    @jax.jit
    def gradient(trained: Any, held: Any, x: Any, y: Any) -> Any:
        batch = Batch(x, y, jnp.ones(size), jax.random.key(0), jnp.int32(0), jnp.bool_(False))
        return jax.grad(loss, argnums=1, has_aux=True)(held, trained, batch)

    return lambda: gradient(*given)


def torch_loops(o: Options, case: Case, found: dict[str, Any], torch: str) -> dict[str, Any]:
    """The sequential loop and the bare pass in torch, each the faster of two ways to compile; the same trained part.

    `torch_errors` holds what failed; the other way to compile, and fedsim's figures, count all the same.
    """
    common = {"backbone": case.backbone, "peft": case.peft, "shape": case.shape, "batch": case.batch}
    common |= {"steps": o.steps, "classes": CLASSES, "repeats": o.repeats}
    modes = [{"compile": False}] if o.small else [{"mode": "default"}, {"mode": "reduce-overhead"}]
    # Fewer clients: each costs the same, one after the other.
    kinds = {"torch_loop": {"clients": min(o.clients, 32)}, "torch_bare": {"bare": True, "rows": found["rows"]}}
    results: dict[str, Any] = {"torch_errors": []}
    for name, asked in kinds.items():
        runs = []
        for mode in modes:
            try:
                one = child([torch, str(LOOP), json.dumps(common | asked | mode)]) | mode
                if one["trained"] != found["trained"]:
                    raise FailedError(
                        f"Expected {name} to train {found['trained']} parameters as fedsim, not {one['trained']}."
                    )
            except FailedError as error:
                results["torch_errors"].append({"name": f"{name} {mode}", "error": str(error)})
            else:
                runs.append(one)
        if runs:
            results[name] = max(runs, key=lambda r: r["examples_per_second"])
    return results


def child(command: list[str]) -> dict[str, Any]:
    """The last line of a process's output, as JSON.

    Raises:
        FailedError: it ended with an error; its last words.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"{Path(command[1]).name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    from fedsim import peaks

    return peaks.of(device).flops(kind)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(work(**json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options, description=__doc__))
