"""Sweeps whose processes are killed, stopped, or two at once: afterwards every cell was run once, and equals an undisturbed one.

The processes that are killed are those whose command line names the test's own folder.
"""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from fedsim import record
from fedsim.sweeps import folder
from fedsim.sweeps.study import CELLS_CSV

FILE = """
import fedsim

base = fedsim.Config(
    dataset="blobs.npz", backbone="mlp", peft="full", clients=12, clients_per_round=4, min_size=3, rounds={rounds}, lr=5e-3,
)
sweep = fedsim.Sweep(base=base, grid={grid}, seeds={seeds}, speed=fedsim.Speed(lanes=2, checkpoint_every=1, devices={devices}))
"""


class Place(NamedTuple):
    """A working directory with data, in which `fedsim sweep` is started."""

    folder: Path
    environment: dict[str, str]

    def file(self, grid: dict[str, list[object]], seeds: int, rounds: int = 4, devices: int | None = 1) -> None:
        """Writes the sweep's file."""
        (self.folder / "my.py").write_text(FILE.format(grid=grid, seeds=seeds, rounds=rounds, devices=devices))

    def start(self, out: str, *options: str) -> subprocess.Popen[str]:
        """`fedsim sweep my.py --out ...`."""
        return subprocess.Popen(
            [sys.executable, "-m", "fedsim", "sweep", "my.py", "--out", out, *options],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, out: str, *options: str, status: int = 0) -> str:
        """Runs it to its end; its output."""
        process = self.start(out, *options)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == status, said
        return said

    def places(self, out: str) -> list[Path]:
        """The folders of the cells."""
        return sorted((self.folder / out / folder.CELLS).iterdir())

    def rows(self, out: str) -> list[dict[str, str]]:
        """The table of cells without its times."""
        with (self.folder / out / CELLS_CSV).open() as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

    def workers(self, out: str) -> list[psutil.Process]:
        """The processes that a driver has started for this sweep."""
        found = []
        for process in psutil.process_iter():
            try:
                words, cwd = process.cmdline(), process.cwd()
            except psutil.Error:
                continue
            if "fedsim.sweeps.worker" in words and out in words and cwd == str(self.folder):
                found.append(process)
        return found


@pytest.fixture
def place(tmp_path: Path, environment: dict[str, str], blobs: Callable[..., Path]) -> Place:
    """A working directory with data."""
    blobs(tmp_path)
    return Place(tmp_path, environment)


def until(holds: Callable[[], object], seconds: float = 120) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def killed(process: psutil.Process) -> bool:
    """Kills a process; whether it was alive."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return alive


def lines(place: Path) -> list[str]:
    """The whole lines of a cell's rounds."""
    file = place / record.ROUNDS
    return file.read_text().splitlines(keepends=True) if file.is_file() else []


def rounds_of(place: Place, out: str) -> int:
    """Rounds of all cells together so far."""
    cells = place.folder / out / folder.CELLS
    return sum(len(lines(cell)) for cell in cells.iterdir()) if cells.is_dir() else 0


# Fields of a line that tell time or the process.
TIMES = ("checksum", "seconds", "compile_seconds", "server_seconds", "clients_per_second", "examples_per_second",
         "flops_per_second", "most_memory")  # fmt: skip


def deterministic(place: Path) -> list[dict[str, object]]:
    """A cell's rounds without their times."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines(place)]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_in_the_middle_of_its_cell(place: Place) -> None:
    """Rounds before the last checkpoint are not repeated: their lines, with their times, are those of before the kill."""
    place.file({"lr": [5e-3]}, seeds=2, rounds=40)
    process = place.start("study")

    def second() -> Path | None:
        under_way = [p for p in place.places("study") if lines(p) and not (p / record.SUMMARY).exists()]
        return under_way[0] if (place.folder / "study" / folder.CELLS).is_dir() and under_way else None

    until(lambda: (place.folder / "study" / folder.CELLS).is_dir() and (cell := second()) and len(lines(cell)) > 8)
    cell = second()
    assert cell is not None
    process.kill()
    process.communicate()
    before = lines(cell)
    assert folder.state(cell) == "stopped"
    done = {p: (p / record.SUMMARY).stat().st_mtime_ns for p in place.places("study") if folder.state(p) == "done"}
    place.file({"lr": [5e-3]}, seeds=3, rounds=40)  # the file has grown: only what is new runs
    said = place.run("study", "--retry")
    after = lines(cell)
    kept = sum(a == b for a, b in zip(before, after, strict=False))
    assert kept >= min(5, len(before) - 3)  # the last ones may be newer than the newest checkpoint that was whole
    assert len(after) == 40
    assert {p: (p / record.SUMMARY).stat().st_mtime_ns for p in done} == done
    assert [row["state"] for row in place.rows("study")] == ["done"] * 3
    assert "1 stopped" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_driver_and_processes_after_their_round(place: Place, number: int, status: int) -> None:
    place.file({"lr": [5e-3]}, seeds=2, rounds=400)
    process = place.start("study", "--jobs", "2")
    study = place.folder / "study" / folder.CELLS
    until(lambda: study.is_dir() and sum(len(lines(p)) > 2 for p in study.iterdir()) == 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "nothing is lost, the same command goes on" in said
    assert not place.workers("study")
    for cell in place.places("study"):
        assert folder.state(cell) == "stopped"
        rounds = len(lines(cell))
        assert (cell / record.CHECKPOINTS / str(rounds)).is_dir()  # not one round is lost


@pytest.mark.slow
def test_two_commands_on_one_folder_share_its_cells(place: Place) -> None:
    place.file({"lr": [1e-3, 5e-3], "batch_size": [4, 8]}, seeds=2)
    both = [place.start("study", "--tune", "server_lr=0.5,1.0") for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = place.rows("study")
    assert [row["state"] for row in rows] == ["done"] * 8
    pids = {(p / ".lock").read_text() for p in place.places("study")}
    assert len(pids) == 2  # each has run some


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(place: Place) -> None:
    """Twelve cells; the driver or its processes are killed again and again, with and without several jobs."""
    place.file({"lr": [1e-3, 5e-3], "batch_size": [4, 8]}, seeds=3, rounds=12, devices=None)
    place.run("undisturbed")
    rng, summaries, kills = random.Random(0), {}, 0
    for turn in range(8):
        jobs = ["--jobs", "2"] if turn % 2 == 0 else []
        process = place.start("study", *jobs)
        for _ in range(rng.randint(1, 2)):
            # Some rounds further, not some seconds: a fast machine would be done before it is killed.
            aim = rounds_of(place, "study") + rng.randint(1, 9)
            until(lambda aim=aim, process=process: rounds_of(place, "study") >= aim or process.poll() is not None)
            time.sleep(rng.uniform(0.0, 0.1))
            alive = [*place.workers("study"), *([psutil.Process(process.pid)] if process.poll() is None else [])]
            if alive:
                kills += killed(rng.choice(alive))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        if rng.random() < 0.5:  # else the processes of a dead driver go on beside the next one's
            for worker in place.workers("study"):
                kills += killed(worker)
        for cell in place.places("study") if (place.folder / "study" / folder.CELLS).is_dir() else []:
            if (cell / record.SUMMARY).exists():
                found = (cell / record.SUMMARY).stat().st_mtime_ns, (cell / record.SUMMARY).read_bytes()
                assert summaries.setdefault(cell, found) == found  # a finished cell is never run again
    said = place.run("study")
    until(lambda: not place.workers("study"))
    assert kills >= 6
    assert place.rows("study") == place.rows("undisturbed"), said
    assert len(place.places("study")) == 12
    for cell, other in zip(place.places("study"), place.places("undisturbed"), strict=True):
        assert cell.name == other.name
        assert deterministic(cell) == deterministic(other)
        assert (cell / record.TRAINED).read_bytes() == (other / record.TRAINED).read_bytes()
    for cell, (written, _) in summaries.items():
        assert (cell / record.SUMMARY).stat().st_mtime_ns == written
