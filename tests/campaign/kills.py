"""Runs that are killed: `kill -9` at a random moment of a process, resumed until they end, and compared with a run left alone."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .common import LOST, REFUSED, RIGHT, UNCLEAR, WRONG, Tally, lines

REMEMBERS = Path(__file__).parents[1] / "remembers.py"  # an algorithm whose clients keep something

# Stateful optimizers, clients' memory, drop-outs, phases: whatever is not restored shows in the bits.
CASES = {
    "stateful": "peft='full', optimizer='sgd(momentum=0.9)', lr=0.01, algorithm='mine.py:fed_remembers'",
    "drop-outs": "peft='lora', targets=('layers/*',), rank=2, dropout=0.3, availability='bernoulli(p=0.7)', over_selection=1.5, "
    "compute='lognormal(1, 1)', deadline=6.0, late='partial', server_optimizer='adam', server_lr=0.05",
    "phases": "peft='bias', head_rounds=9, head_lr=0.01, optimizer='adam', lr=0.002, local_test=0.2, personal_epochs=1",
}
FILE = """import fedsim

config = fedsim.Config(
    dataset="blobs.npz", backbone="mlp", clients=12, clients_per_round=4, min_size=3, rounds=24, eval_every=2, {options}
)
speed = fedsim.Speed(checkpoint_every=2, lanes=2)
"""


class Place(NamedTuple):
    """A working directory with data in which `fedsim run` is started."""

    folder: Path
    environment: dict[str, str]

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """`fedsim run ...` in a process of its own."""
        command = [sys.executable, "-m", "fedsim", "run", *argv, "--quiet"]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def prepared(folder: Path, environment: dict[str, str]) -> Place:
    """Writes data, the algorithm and the experiment files of all cases."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    x = (rng.normal(size=(3, 6))[y] * 1.5 + rng.normal(size=(240, 6))).astype(np.float32)
    np.savez(folder / "blobs.npz", x=x, y=y)
    source = re.search(r'REMEMBERS = """(.*?)"""', REMEMBERS.read_text(), re.DOTALL)
    assert source is not None
    (folder / "mine.py").write_text(source[1])
    for case, options in CASES.items():
        (folder / f"{case}.py").write_text(FILE.format(options=options))
    return Place(folder, environment)


def alone(place: Place, case: str) -> float:
    """Makes the undisturbed run of a case; its seconds."""
    began = time.monotonic()
    process = place.start(f"{case}.py", "--no-head-baseline", "--out", case)
    _, error = process.communicate(timeout=300)
    if process.returncode:
        raise AssertionError(f"the undisturbed run of {case} failed: {error}")
    return time.monotonic() - began


def killed(place: Place, case: str, rng: random.Random, seconds: float, tally: Tally, until: float) -> None:
    """One run that is killed up to three times and then resumed to its end."""
    name = f"{case}-{rng.randrange(10**9)}"
    folder, argv = place.folder / name, [f"{case}.py", "--no-head-baseline", "--out", name]
    kills, before = 0, 0
    for _ in range(rng.randint(1, 3)):
        process = place.start(*argv)
        time.sleep(rng.uniform(0.05, 0.95) * seconds)
        ended = process.poll() is not None
        process.kill()
        process.communicate()
        kills += not ended
        if (folder / "config.json").exists():
            argv = ["--resume", name]
            there = saved(folder)
            if there < before:
                tally.add(name, LOST, f"checkpoints up to {there} after those up to {before}")
            before = max(before, there)
        elif folder.exists():
            shutil.rmtree(folder)  # killed before it wrote anything: the same command starts anew
    process = place.start(*argv)
    _, error = process.communicate(timeout=max(300.0, until - time.monotonic()))
    if process.returncode:
        end = REFUSED if "Expected" in error and "Traceback" not in error else UNCLEAR
        tally.add(f"{name}, {kills} kills", LOST if end == REFUSED else end, error)
        return
    reference = place.folder / case
    equal = lines(folder) == lines(reference)
    bits = all((folder / f).read_bytes() == (reference / f).read_bytes() for f in ("trained.safetensors",))
    for _ in range(kills):
        tally.add(name, RIGHT if equal and bits else WRONG, f"lines equal {equal}, parameters equal {bits}")
    shutil.rmtree(folder)


def saved(folder: Path) -> int:
    """The round of the newest checkpoint, 0 without one."""
    there = folder / "checkpoints"
    return max((int(p.name) for p in there.iterdir() if p.name.isdigit()), default=0) if there.is_dir() else 0


def campaign(folder: Path, environment: dict[str, str], seconds: float, seed: int) -> Tally:
    """Kills for about so many seconds."""
    rng, tally = random.Random(seed), Tally("kills")
    place = prepared(folder, environment)
    took = {case: alone(place, case) for case in CASES}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        case = rng.choice(list(CASES))
        killed(place, case, rng, took[case], tally, until)
    return tally
