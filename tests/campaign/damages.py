"""Files that are damaged: of a run's folder, a data set, a checkpoint of weights. Each is read as before, or refused by name."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fedsim

from .common import DAMAGES, RIGHT, Tally, damage, judged, lines

CONFIG: dict[str, Any] = {
    "backbone": "mlp", "peft": "full", "clients": 8, "clients_per_round": 4, "rounds": 4, "min_size": 3,
    "optimizer": "sgd", "lr": 0.05, "local_test": 0.2,
}  # fmt: skip
SPEED = fedsim.Speed(devices=1, lanes=2, checkpoint_every=1)
X = np.linspace(-2, 2, 30, dtype=np.float32).reshape(5, 6)


def blobs(file: Path, seed: int) -> Path:
    """A small data set."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 160)
    np.savez(file, x=(rng.normal(size=(3, 6))[y] * 1.5 + rng.normal(size=(160, 6))).astype(np.float32), y=y)
    return file


def answers(folder: Path) -> Any:
    """All that reading a finished run gives."""
    run = fedsim.load(folder)
    return run.rounds, run.summary, run.config, run.clients(), run.predict(X), fedsim.compare(run, run)["results"]


def resumed(folder: Path) -> Any:
    """What a stopped run ends with."""
    run = fedsim.run(resume=folder, quiet=True)
    return lines(folder), {name: leaf.tobytes() for name, leaf in run.parameters.items()}


def of_a_run(
    tally: Tally, rng: random.Random, work: Path, whole: Path, other: Path, call: Callable[[Path], Any]
) -> None:
    """One damage of one file of a run's folder."""
    expected = call(copy(whole, work / "intact"))
    files = sorted(
        p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.suffix != ".png" and p.name != ".lock"
    )
    file, kind = rng.choice(files), rng.choice(DAMAGES)
    folder = copy(whole, work / "damaged")
    damage(folder / file, kind, rng, other / file)
    end, said = judged(lambda: call(folder), expected, same)
    tally.add(f"{call.__name__}, {file} {kind}", end, said)


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal; times of a run may differ."""
    return without_times(a) == without_times(b)


def without_times(found: Any) -> Any:
    """The same without wall times."""
    if isinstance(found, dict):
        return {
            k: without_times(v)
            for k, v in found.items()
            if "second" not in str(k) and k not in ("clients/s", "most_memory", "mfu")
        }
    if isinstance(found, (list, tuple)):
        return [without_times(v) for v in found]
    return found


def copy(source: Path, to: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(source, to))


def stopped(whole: Path, to: Path) -> Path:
    """The finished run as it was before its last checkpoint."""
    folder = copy(whole, to)
    for name in ("summary.json", "trained.safetensors", "clients.json"):
        (folder / name).unlink(missing_ok=True)
    there = folder / "checkpoints"
    shutil.rmtree(there / str(max(int(p.name) for p in there.iterdir() if p.name.isdigit())))
    return folder


def of_a_table(tally: Tally, rng: random.Random, work: Path) -> None:
    """One damage of a file of data: read as before (a value may differ), or refused by name."""
    from fedsim import data

    kind, suffix = rng.choice(DAMAGES), rng.choice((".npz", ".csv", ".jsonl"))
    file = work / f"data{suffix}"
    if suffix == ".npz":
        blobs(file, 0)
    else:
        rows = [(f"word {i} and more", "ab"[i % 2]) for i in range(40)]
        table = "text,label\n" + "".join(f"{t},{label}\n" for t, label in rows)
        objects = "".join(f'{{"text": "{t}", "label": "{label}"}}\n' for t, label in rows)
        file.write_text(table if suffix == ".csv" else objects)
    damage(file, kind, rng, blobs(work / "other.npz", 1))
    config = fedsim.Config(dataset=str(file))
    # A flipped bit of a text is another text, which nobody can tell from the right one: any reading counts.
    end, said = judged(lambda: data.read(config), None, lambda *_: True, named="" if kind == "delete" else file.name)
    tally.add(f"{file.name} {kind}", end, said)


def campaign(work: Path, seconds: float, seed: int) -> Tally:
    """Damages for about so many seconds."""
    rng, tally = random.Random(seed), Tally("damages")
    runs = []
    for i, name in enumerate(("whole", "other")):
        config = fedsim.Config(dataset=str(blobs(work / f"{name}.npz", i)), seed=i, **CONFIG)
        runs.append(fedsim.run(config, SPEED, out=work / name, quiet=True).directory)
    whole, other = runs
    cut = stopped(whole, work / "stopped")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(6):
            of_a_run(tally, rng, work, whole, other, answers)
            of_a_table(tally, rng, work)
        of_a_run(tally, rng, work, cut, other, resumed)
    assert tally.ends[RIGHT], "some damages do no harm"
    return tally
