"""A run that was killed, stopped or damaged goes on to the same end, bit for bit, as one that never was."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedsim
from brief import brief
from fedsim import record
from fedsim.simulation import tasks
from remembers import REMEMBERS, TIMES

ROUNDS, EVERY = 30, 2

# Phases, stateful optimizers on both sides, and a schedule: whatever is not restored shows in the bits.
CASES: dict[str, dict[str, Any]] = {
    "plain": {
        "peft": "full",
        "optimizer": "adam",
        "lr": 0.002,
        "lr_schedule": f"cosine_decay_schedule(1.0, {ROUNDS})",
        "server_optimizer": "adam",
        "server_lr": 0.05,
    },
    "head-first": {"peft": "bias", "head_rounds": 13, "head_lr": 0.01, "optimizer": "adam", "lr": 0.002},
    "memory": {"peft": "full", "optimizer": "sgd(momentum=0.9)", "lr": 0.01, "algorithm": "mine.py:fed_remembers"},
    "server": {
        "peft": "full",
        "optimizer": "adam",
        "lr": 0.002,
        "algorithm": "serves.py:fed_tuned",
        "server_share": 0.1,
    },
    # What a codec still owes lies in a store of its own beside the clients' memory.
    "codec": {"peft": "full", "optimizer": "sgd", "lr": 0.05, "codec_up": "topk(0.1)"},
    "average": {"peft": "full", "optimizer": "sgd", "lr": 0.05},
    # What all clients hold of a message, and the codec's factors; a phase begins without them.
    "copies": {
        "peft": "full",
        "optimizer": "sgd",
        "lr": 0.05,
        "head_rounds": 2,
        "codec_down": "powersgd(2)+quantise(8)",
    },
}
# A run's average with a state: the mean of changes clipped to a norm that follows the median of their norms.
ADAPTS = """
import sys

import jax
import jax.numpy as jnp

from fedsim.core import Average, Averaged, Reduce
from fedsim.simulation import tasks


def add(total, replies, weights, slots, clip):
    norm = jnp.sqrt(sum(jnp.square(r).sum(axis=range(1, r.ndim)) for r in jax.tree.leaves(replies)))
    scale = weights * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
    sums = jax.tree.map(lambda t, r: t + jnp.tensordot(scale, r, axes=1), total[0], replies)
    return sums, total[1] + weights.sum(), total[2] + jnp.where(norm <= clip, weights, 0.0).sum()


def done(total, clip, key):
    sums, count, below = total
    return Averaged(jax.tree.map(lambda s: s / count, sums), count, seen=below / count)


def zero(reply, clients):
    return jax.tree.map(lambda r: jnp.zeros(r.shape), reply), jnp.zeros(()), jnp.zeros(())


def adaptive(config, releases=1):
    return Average(
        "adaptive",
        Reduce(zero, add, done, lambda client, reply: jnp.ones(())),
        init=lambda: {"clip": jnp.float32(0.05), "rounds": jnp.int32(0)},
        args=lambda state, members: state["clip"],
        next=lambda state, share: {
            "clip": state["clip"] * jnp.exp(-0.4 * (share - 0.5)), "rounds": state["rounds"] + 1
        },
    )


tasks.average = adaptive  # without privacy no option of a run asks for one

if __name__ == "__main__":
    from fedsim.cli.main import main

    sys.exit(main(sys.argv[1:]))
"""
EXPERIMENT = """
import fedsim

config = fedsim.Config(dataset="blobs.npz", backbone="mlp", clients=12, clients_per_round=4, min_size=3, **{options})
speed = fedsim.Speed(checkpoint_every={every}, lanes=2)
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """A working directory with data, in which `fedsim run` is started."""

    folder: Path
    environment: dict[str, str]
    program: tuple[str, ...] = ("-m", "fedsim")

    def start(self, *argv: str) -> subprocess.Popen[str]:
        command = [sys.executable, *self.program, "run", *argv]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *argv: str) -> tuple[int, str, str]:
        process = self.start(*argv)
        out, error = process.communicate(timeout=300)
        return process.returncode, out, error

    def options(self, case: str) -> list[str]:
        """Arguments that start a case: its experiment file, and no comparison."""
        file = self.folder / f"{case}.py"
        file.write_text(EXPERIMENT.format(options={**CASES[case], "rounds": ROUNDS}, every=EVERY))
        return [file.name, "--no-head-baseline"]

    def lines(self, name: str) -> int:
        file = self.folder / name / record.ROUNDS
        return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], blobs: Callable[..., Path]) -> Place:
    folder = tmp_path_factory.mktemp("runs")
    blobs(folder)
    (folder / "mine.py").write_text(REMEMBERS)
    (folder / "adapts.py").write_text(ADAPTS)
    shutil.copy(Path(__file__).parents[1] / "serves.py", folder)
    return Place(folder, environment)


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> Callable[[str], record.Run]:
    """`uninterrupted(case)`: the run that nothing happened to; made once."""

    def get(case: str) -> record.Run:
        if not (place.folder / case / record.SUMMARY).exists():
            status, _, error = of(place, case).run(*place.options(case), "--out", case)
            assert (status, error) == (0, "")
        return record.load(place.folder / case)

    return get


def of(place: Place, case: str) -> Place:
    """The place, with the program that runs the case."""
    return dataclasses.replace(place, program=("adapts.py",)) if case == "average" else place


def assert_same(a: record.Run, b: record.Run, rounds: int = ROUNDS) -> None:
    """The same lines and results but for times, the same bits of what was trained, no gap and no double."""
    assert [line["round"] for line in b.rounds] == list(range(1, rounds + 1))
    for x, y in zip(a.rounds, b.rounds, strict=True):
        assert {k: v for k, v in x.items() if k not in TIMES} == {k: v for k, v in y.items() if k not in TIMES}
    assert timeless(a) == timeless(b)
    assert (a.directory / record.TRAINED).read_bytes() == (b.directory / record.TRAINED).read_bytes()
    assert exported(a) == exported(b)


def timeless(run: record.Run) -> dict[str, Any]:
    """A summary without times, and without the hash of the table of memories: slots are other ones after a resume."""
    summary = {k: v for k, v in (run.summary or {}).items() if "second" not in k}
    return summary | {"sha256": {k: v for k, v in summary["sha256"].items() if k != record.MEMORIES}}


def exported(run: record.Run) -> dict[str, bytes]:
    """The files of what clients keep, if they keep anything."""
    if record.MEMORIES not in (run.summary or {})["sha256"]:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        fedsim.export(run.directory, "memories", Path(folder) / "kept")
        return {p.name: p.read_bytes() for p in (Path(folder) / "kept").iterdir()}


def kill_at(place: Place, name: str, process: subprocess.Popen[str], when: str, rng: random.Random) -> bool:
    """Waits for the moment and kills; False where the process had ended before."""
    checkpoints, before = place.folder / name / record.CHECKPOINTS, place.lines(name)
    threshold = before + rng.randint(1, 9)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        # a resumed run first cuts its lines to the checkpoint: fewer than before is no progress
        moved = place.lines(name) >= threshold
        saving = checkpoints.is_dir() and any(".orbax-checkpoint-tmp" in p.name for p in checkpoints.iterdir())
        if (when == "save" and moved and saving) or (when == "round" and moved):
            if when == "round":
                time.sleep(rng.uniform(0, 0.02))
            break
        time.sleep(0.002)
    ended = process.poll() is not None
    process.kill()
    process.communicate()
    return not ended


@pytest.mark.slow
@pytest.mark.parametrize("case", ["head-first", "memory", "server", "codec", "average"])
def test_killed_again_and_again(place: Place, uninterrupted: Callable[[str], record.Run], case: str) -> None:
    """kill -9 in the middle of rounds and of saves, whatever the moment; then on, until it is done."""
    reference, rng = uninterrupted(case), random.Random(case)
    place = of(place, case)
    name, kills = f"{case}-killed", 0
    for when in ("save", "round", "save"):
        begun = (place.folder / name / record.CONFIG).exists()
        process = place.start(*(["--resume", name] if begun else [*place.options(case), "--out", name]))
        kills += kill_at(place, name, process, when, rng)
        if (place.folder / name / record.SUMMARY).exists():
            break
    assert kills >= 2, "the test means to kill it more often than that"
    assert place.lines(name) < ROUNDS or not (place.folder / name / record.SUMMARY).exists()
    status, _, error = place.run("--resume", name)
    assert (status, error) == (0, "")
    assert_same(reference, record.load(place.folder / name))


def stop_by_ctrl_c(place: Place, name: str) -> tuple[int, str]:
    """Starts the plain case in folder `name`, presses Ctrl-C after a few rounds."""
    process = place.start(*place.options("plain"), "--out", name)
    while process.poll() is None and place.lines(name) < 5:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    return process.returncode, error


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(place: Place, uninterrupted: Callable[[str], record.Run]) -> None:
    status, error = stop_by_ctrl_c(place, "stopped")
    assert status == 130
    done = place.lines("stopped")
    assert 5 <= done < ROUNDS
    assert f"Stopped after round {done}; go on with: fedsim run --resume stopped" in error
    assert "Traceback" not in error
    assert (place.folder / "stopped" / record.CHECKPOINTS / str(done)).is_dir(), "nothing is lost"
    status, out, error = place.run("--resume", "stopped")
    assert (status, error) == (0, "") and f"{done + 1}/{ROUNDS}" in out and f" {done}/{ROUNDS}" not in out
    assert_same(uninterrupted("plain"), record.load(place.folder / "stopped"))


def cut_back(place: Place, name: str, case: str = "plain") -> Path:
    """A copy of the uninterrupted run as it was before its last checkpoint: as if killed in the rounds after it."""
    folder = place.folder / name
    shutil.copytree(place.folder / case, folder)
    for file in (record.SUMMARY, record.TRAINED):
        (folder / file).unlink()
    newest = max(int(p.name) for p in (folder / record.CHECKPOINTS).iterdir() if p.name.isdigit())
    shutil.rmtree(folder / record.CHECKPOINTS / str(newest))
    return folder


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / record.CHECKPOINTS).iterdir() if p.name.isdigit())


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    place: Place, uninterrupted: Callable[[str], record.Run]
) -> None:
    reference = uninterrupted("plain")
    folder = cut_back(place, "damaged")
    older, newest = checkpoints(folder)[-2:]
    data = max((folder / record.CHECKPOINTS / str(newest) / "arrays").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    status, _, error = place.run("--resume", "damaged")
    assert status == 0, error
    assert f"checkpoint of round {newest} is damaged" in error and f"going back to round {older}" in error
    assert_same(reference, record.load(folder))


@pytest.mark.slow
def test_a_lost_half_line_and_no_checkpoint_at_all(place: Place, uninterrupted: Callable[[str], record.Run]) -> None:
    """Killed before the first checkpoint, in the middle of a line: it begins again."""
    reference = uninterrupted("plain")
    folder = cut_back(place, "early")
    shutil.rmtree(folder / record.CHECKPOINTS)
    lines = (folder / record.ROUNDS).read_bytes().splitlines(keepends=True)
    (folder / record.ROUNDS).write_bytes(lines[0] + lines[1][:50])
    status, _, error = place.run("--resume", "early")
    assert (status, error) == (0, "")
    assert_same(reference, record.load(folder))


@pytest.mark.slow
def test_a_foreign_checkpoint_is_refused(place: Place, uninterrupted: Callable[[str], record.Run]) -> None:
    uninterrupted("plain")
    folder = cut_back(place, "foreign")
    about = json.loads((folder / record.CONFIG).read_text())
    about["config"]["seed"] = 9
    del about["checksum"]  # changed on purpose
    (folder / record.CONFIG).write_text(json.dumps(about))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    status, _, error = place.run("--resume", "foreign")
    assert status == 2 and "Traceback" not in error
    assert "to be a checkpoint of this run, but config is" in error and "Resume with the options" in error
    assert {p: p.read_bytes() for p in before} == before, "nothing was changed"


@pytest.mark.slow
def test_resuming_a_complete_run_does_no_harm(place: Place, uninterrupted: Callable[[str], record.Run]) -> None:
    reference = uninterrupted("plain")
    shutil.copytree(place.folder / "plain", place.folder / "complete")
    status, out, error = place.run("--resume", "complete")
    assert (status, error) == (0, "") and f"1/{ROUNDS}" not in out and "full (this run)" in out
    assert_same(reference, record.load(place.folder / "complete"))


@pytest.mark.slow
def test_a_run_in_progress_is_not_resumed_by_another_process(place: Place) -> None:
    process = place.start(*place.options("plain"), "--rounds", "100000", "--out", "busy")
    try:
        while process.poll() is None and place.lines("busy") < 1:
            time.sleep(0.01)
        status, _, error = place.run("--resume", "busy")
        assert status == 2 and f"process {process.pid}" in error and "Traceback" not in error
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_what_the_memory_case_remembers(place: Place, uninterrupted: Callable[[str], record.Run]) -> None:
    """The case is a case: clients do come again, and what they kept is what they get."""
    visits: list[Any] = [line["metrics"]["visits"] for line in uninterrupted("memory").rounds]
    assert visits[0] == 1 and sum(visits) * 4 == pytest.approx(sum_of_visits(place), rel=1e-6) and max(visits) > 5


def sum_of_visits(place: Place) -> float:
    """The visits that the cohorts alone imply: each client's k-th visit counts k."""
    from fedsim.randomness import stream

    seen: dict[int, int] = {}
    total = 0
    for round in range(1, ROUNDS + 1):
        for client in stream(0, f"sample {round}").choice(12, 4, replace=False).tolist():
            seen[client] = seen.get(client, 0) + 1
            total += seen[client]
    return float(total)


# --- what checkpoints hold beside the server and the clients' memory, in this process


class Killed(BaseException):
    """The end of a process, as far as one can be had without ending it."""


@pytest.fixture
def adaptive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The run's average is one with a state, which follows the clients' changes."""
    names: dict[str, Any] = {}
    monkeypatch.setattr(tasks, "average", tasks.average)  # put back afterwards: the file sets it
    exec(ADAPTS.replace('if __name__ == "__main__"', "if False"), names)
    return names["adaptive"]


def killed_after(round: int, monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any]) -> None:
    """Starts a run, which is killed once that round's line is written, before its checkpoint."""
    with monkeypatch.context() as patch:
        append = record.append

        def last(directory: Path, line: Any) -> None:
            append(directory, line)
            if line["round"] == round:
                raise Killed

        patch.setattr(record, "append", last)
        with pytest.raises(Killed):
            start()


@pytest.mark.parametrize("case", brief(["codec", "average", "copies"]))
def test_killed_in_this_process(
    blobs: Callable[..., Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    case: str,
) -> None:  # fmt: skip
    """Six rounds, killed after the fifth, whose checkpoint is that of the fourth: the same lines and bits."""
    if case == "average":
        request.getfixturevalue("adaptive")
    config = fedsim.Config(
        dataset=str(blobs(tmp_path)),
        backbone="mlp",
        clients=6,
        clients_per_round=6 if case == "copies" else 3,
        min_size=3,
        rounds=6,
        **CASES[case],
    )
    speed = fedsim.Speed(checkpoint_every=2, lanes=2, devices=8, compilation_cache=False)
    whole = fedsim.run(config, speed, out=tmp_path / "whole", quiet=True)
    killed_after(5, monkeypatch, lambda: fedsim.run(config, speed, out=tmp_path / "killed", quiet=True))
    assert checkpoints(tmp_path / "killed") == [2, 4] and len(record.rounds(tmp_path / "killed")) == 5
    assert_same(whole, fedsim.run(resume=tmp_path / "killed", quiet=True), 6)
    assert bool(list((tmp_path / "killed").glob("memory-peft.codec-*.rows"))) == (case == "codec")
    if case == "copies":
        down = [line["bytes_down"] for line in whole.rounds]
        assert down[0] > 2 * down[1] and down[2] > 2 * down[3], "the first message of a phase travels whole"
        assert down[3] == down[4] == down[5]
