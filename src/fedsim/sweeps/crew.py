"""Processes of this machine that share the cells of a sweep: each has its part of cores and devices.

A process that dies is replaced while cells are left; a cell that has ended three of them is given up, and the others go on.
Whoever leads the crew may die as well: its processes go on to the last cell, and the same command shares with them.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedsim.disk import unwritten
from fedsim.engine.host import cpu_devices
from fedsim.sweeps import folder, worker
from fedsim.sweeps.cells import Cell
from fedsim.sweeps.work import FREE

DEATHS = 3  # of processes, after which a cell is given up, or the crew where they have begun none
SOON = 10.0  # s for processes to end that were asked to end at once
STOPPED = (
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
    -signal.SIGINT,
    -signal.SIGTERM,
)  # exit status of who was asked to


class Part(NamedTuple):
    """What one process gets of the machine."""

    environment: dict[str, str]
    cores: tuple[int, ...]  # none: all of them


class Worker(NamedTuple):
    """A process that runs cells."""

    process: subprocess.Popen[bytes]
    part: Part
    log: Path


class Crew:
    """Processes that run cells; `look` from time to time.

    Args:
        directory: the folder of the cells, in the sweep's.
        cells: all of them.
        jobs: processes.
        led: only Ctrl-C stops them; other signals are seen to by this process.
    """

    def __init__(self, directory: Path, cells: Sequence[Cell], jobs: int, *, led: bool = False) -> None:
        self.where, self.which, self.led = directory.parent, directory.name, led
        self.logs = self.where / folder.LOGS
        self.places = folder.places(directory, cells)
        self.left = list(cells)  # not over, as far as this crew has seen
        speed = cells[0].speed if cells else None
        self.parts = parts(jobs, os.environ, devices=speed.devices if speed else None)
        self.workers: list[Worker] = []
        self.deaths: Counter[str] = Counter()  # by a cell's key; of processes that had begun none under ""
        self._made = 0

    def look(self) -> bool:
        """Starts processes while there are cells for them; whether one is at work.

        Raises:
            OSError: processes cannot be started, or none of them gets as far as a cell, or the disk is full.
        """
        ended = [one for one in self.workers if one.process.poll() is not None]
        self.workers = [one for one in self.workers if one not in ended]
        died = sum(map(self._has_died, ended))
        if died or not self.workers:  # one that has gone by itself has found no cell to take
            free = [cell for cell in self._look() if folder.state(self.places[cell.key]) in FREE]
            idle = [part for part in self.parts if part not in [one.part for one in self.workers]]
            for part in idle[: len(free)]:
                self.workers.append(self._start(part))
        return bool(self.workers)

    def stop(self, number: int = signal.SIGINT, seconds: float | None = None) -> None:
        """Has all processes stop after their round, with a checkpoint, and waits for it; interrupted, at once.

        Args:
            number: the signal that they get.
            seconds: how long they are waited for (default: as long as it takes).
        """
        self._send(number)
        try:
            self._wait(seconds)
        except KeyboardInterrupt:
            self._send(number)  # the second signal: at once
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._wait(SOON)
            self._send(signal.SIGKILL)
            raise

    def join(self) -> None:
        """Waits for processes that find no cell any more."""
        self._wait(SOON)

    def _send(self, number: int) -> None:
        for one in self.workers:
            one.process.send_signal(number)

    def _wait(self, seconds: float | None) -> None:
        until = None if seconds is None else time.monotonic() + seconds
        for one in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(None if until is None else max(0.0, until - time.monotonic()))

    def _look(self) -> list[Cell]:
        self.left = [cell for cell in self.left if not folder.over(self.places[cell.key])]
        return self.left

    def _start(self, part: Part) -> Worker:
        command = command_of(self.where, self.which, part.cores, led=self.led)
        self._made += 1
        log = self.logs / f"{platform.node()}-{os.getpid()}-{self._made}.log"
        try:
            self.logs.mkdir(exist_ok=True)
            with log.open("wb") as out:
                # Of a session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on, once.
                started = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **part.environment},
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise unwritten(str(log), error) from None
        return Worker(started, part, log)

    def _has_died(self, one: Worker) -> bool:
        """Whether a process that has ended left a cell behind; a cell that does so again and again is given up.

        Raises:
            OSError: not a cell was to blame, but all processes meet it.
        """
        status = one.process.returncode
        if status in STOPPED:
            return True
        said = one.log.read_text(errors="replace") if one.log.is_file() else ""
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        if status == worker.FAULT:
            raise OSError(last.removeprefix("fedsim: "))
        key = worker.begun(said).rpartition("-")[2]
        if status == 0 and (worker.BEGINS in said or not self._free()):
            return False
        self.deaths[key] += 1
        if self.deaths[key] >= DEATHS and key not in self.places:
            raise OSError(
                f"Expected a process to run cells, but {DEATHS} have ended before ({told(status)}): {last}; see {one.log}."
            )
        if self.deaths[key] >= DEATHS:
            self._give_up(self.places[key], told(status), one.log)
        return True

    def _free(self) -> bool:
        return any(folder.state(self.places[cell.key]) in FREE for cell in self._look())

    def _give_up(self, place: Path, how: str, log: Path) -> None:
        """Keeps as a cell's error that its processes die, unless one runs it now."""
        with folder.claim(place) as is_mine:
            if is_mine and not folder.over(place):
                folder.fail(
                    place,
                    f"Expected the process to live as long as the cell, but {DEATHS} have died in it ({how}); see {log} and what "
                    "the system says of memory, give fewer --jobs or --lanes, and start the same command with --retry.",
                )


def command_of(where: Path, which: str, cores: Sequence[int], *, led: bool) -> list[str]:
    """What starts a process that runs cells (`worker.py`)."""
    command = [sys.executable, "-m", "fedsim.sweeps.worker", str(where), which]
    return [*command, *["--led"] * led, *(["--cores", *map(str, cores)] if cores else [])]


def told(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        return name + (", as where memory runs out" if name == "SIGKILL" else "")
    return f"signal {-status}"


# --- what each gets of the machine


def parts(
    jobs: int, environ: Mapping[str, str], *, devices: int | None = None, cores: Sequence[int] | None = None
) -> list[Part]:
    """What each of several processes gets: one of the GPUs, in turn, or a part of the cores.

    A CPU is shown to each as as many devices as to a single process, so that results do not depend on `jobs`. A GPU's
    memory is divided among those who share it.

    Args:
        jobs: processes; a single one gets all there is.
        environ: variables of this process.
        devices: `Speed.devices`.
        cores: of this machine (default: those that this process may use).
    """
    if jobs == 1:
        return [Part({}, ())]
    if gpus := visible_gpus(environ):
        each = math.ceil(jobs / len(gpus))
        room = {} if each == 1 or "XLA_PYTHON_CLIENT_MEM_FRACTION" in environ else memory_share(each)
        return [Part({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)], **room}, ()) for k in range(jobs)]
    if cores is None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    divided = "JAX_NUM_CPU_DEVICES" in environ or "xla_force_host_platform_device_count" in environ.get("XLA_FLAGS", "")
    shown = {} if divided else {"JAX_NUM_CPU_DEVICES": str(devices or cpu_devices())}
    return [Part(dict(shown), tuple(cores[k::jobs]) if len(cores) >= jobs else ()) for k in range(jobs)]


def memory_share(each: int) -> dict[str, str]:
    """Lets so many processes live in one GPU's memory: JAX would take three quarters of it for each."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.3f}"}


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """NVIDIA GPUs that this process may use, without asking JAX, which would take their memory."""
    if environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if (given := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in given.split(",") if word.strip() not in ("", "-1")]
    found = [re.fullmatch(r"nvidia(\d+)", entry.name) for entry in devices.iterdir()] if devices.is_dir() else []
    return sorted((match[1] for match in found if match), key=int)


def has_tpu(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether JAX would run on TPUs here, all of which one process takes."""
    wanted = environ.get("JAX_PLATFORMS", "")
    return wanted.split(",")[0] == "tpu" or (not wanted and (devices / "accel0").exists())
