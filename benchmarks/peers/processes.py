"""A system as a subprocess: started, given leave round by round, watched in memory and CPU time, ended. Linux only.

All processes of a system are found by a mark in their environment, so that those which a system detaches (Ray's) count too.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from driver import MARK

VARIABLE = "FEDSIM_PEERS_BENCHMARK"
TICK, CORES = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
PROC = Path("/proc")
# On a GPU the systems wait beside each other: none may take its memory in advance, as JAX does by default.
JAX_OPTIONS = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


class SystemFailedError(Exception):
    """A system ended or did not answer in time."""


def ticks(pid: str) -> tuple[str, int]:
    """(start time, which tells processes of one number apart; CPU ticks used)."""
    fields = (PROC / pid / "stat").read_text().rpartition(")")[2].split()
    return fields[19], int(fields[11]) + int(fields[12])


def busy_seconds() -> float:
    """CPU seconds of the whole machine that were not idle, the host's theft included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


class System:
    """One running system."""

    def __init__(self, command: list[str], log: Path, folder: Path, platform: str = "cpu") -> None:
        mark = uuid.uuid4().hex
        self._mark = f"{VARIABLE}={mark}".encode()
        self._used: dict[tuple[str, str], int] = {}  # (pid, start time) -> CPU ticks, ended processes included
        self._theirs: dict[tuple[str, str], bool] = {}
        self.peak_pss = 0.0  # MB
        self.about: dict[str, Any] = {}  # what it says of itself when it is ready
        self.log = log
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._began = time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment | {VARIABLE: mark, "PYTHONUNBUFFERED": "1", **JAX_OPTIONS[platform]},
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log.open("w") as log:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    message = json.loads(line.removeprefix(MARK))
                    self._messages.put(message | {"after": time.perf_counter() - self._began})
                else:
                    log.write(line)
                    log.flush()
        self._messages.put(None)

    def _pids(self) -> list[str]:
        """Numbers of this system's processes."""
        found = []
        for entry in PROC.iterdir():
            if not entry.name.isdigit():
                continue
            try:
                key = (entry.name, ticks(entry.name)[0])
                if key not in self._theirs:
                    self._theirs[key] = self._mark in (entry / "environ").read_bytes().split(b"\0")
                if self._theirs[key]:
                    found.append(entry.name)
            except OSError:  # it has ended, or is not ours to look at
                continue
        return found

    def cpu_seconds(self) -> float:
        """CPU seconds that this system's processes have used so far."""
        for pid in self._pids():
            try:
                start, used = ticks(pid)
            except OSError:
                continue
            self._used[pid, start] = used
        return sum(self._used.values()) / TICK

    def _sample_memory(self) -> None:
        total = 0
        for pid in self._pids():
            try:
                lines = (PROC / pid / "smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        self.peak_pss = max(self.peak_pss, total / 1024)

    def wait(self, event: str, patience: float) -> dict[str, Any]:
        """The next message, which must be `event`; memory is sampled meanwhile.

        Raises:
            SystemFailedError: it ended, said something else, or took longer than `patience` seconds.
        """
        until = time.perf_counter() + patience
        while True:
            try:
                message = self._messages.get(timeout=0.5)
                break
            except queue.Empty:
                self._sample_memory()
                if self._process.poll() is not None and self._messages.empty():  # a child may hold the pipe open
                    message = None
                    break
                if time.perf_counter() > until:
                    raise SystemFailedError(f"no {event!r} within {patience:.0f} s") from None
        if message is None or message["event"] != event:
            last = self.log.read_text().strip().splitlines()[-1:] or [""]
            raise SystemFailedError(f"{'ended' if message is None else message} instead of {event!r}: {last[0][:200]}")
        return message

    def ready(self, patience: float) -> float:
        """Seconds from the start of the process until it was ready; `patience` counts from the start too."""
        said = self.wait("ready", patience - (time.perf_counter() - self._began))
        self.about = {k: v for k, v in said.items() if k not in ("event", "after")}
        return said["after"]

    def round(self, patience: float) -> dict[str, Any]:
        """One round: its seconds, those in which JAX compiled (None without JAX), CPU seconds, others' share of cores."""
        assert self._process.stdin is not None
        own, busy, wall = self.cpu_seconds(), busy_seconds(), time.perf_counter()
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; `wait` says how
        said = self.wait("round", patience)
        wall, busy, own = time.perf_counter() - wall, busy_seconds() - busy, self.cpu_seconds() - own
        self._sample_memory()
        found = {"seconds": said["seconds"], "compiling": said["compiling"], "cpu": own}
        return found | {"others": max(0.0, (busy - own) / (wall * CORES))}

    def end(self) -> None:
        """Ends all of this system's processes."""
        for which, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for pid in self._pids():
                try:
                    os.kill(int(pid), which)
                except ProcessLookupError:
                    continue
            until = time.perf_counter() + grace
            while self._pids() and time.perf_counter() < until:
                self._process.poll()  # reaps the child, which would stay in /proc
                time.sleep(0.1)
        self._process.wait()
