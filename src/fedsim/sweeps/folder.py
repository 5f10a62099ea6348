"""The folder of a sweep: what is asked (`sweep.json`), and a folder for each cell, which alone says how the cell stands.

    sweep.json                the base, the cells, what was chosen
    cells/NAME-HASH/          a run's folder, with `.claim` while somebody runs it and `error.json` where it failed
    tuning/NAME-HASH/         the runs in which options were chosen; they never read the test set
    cells.csv, rounds.csv     see `study.py`
    logs/                     what processes say that a launcher has started

There is no database and no daemon: a finished cell has a summary, a failed one an error, a stopped one a record that goes
on; who works on a cell holds its claim, which the system gives back when the process ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from fedsim import record
from fedsim.config import Config, Speed, differences
from fedsim.disk import unwritten
from fedsim.record.files import read_json
from fedsim.sweeps.cells import Cell

SWEEP, CELLS, TUNING = "sweep.json", "cells", "tuning"
CLAIM, ERROR, LOCK, LOGS = ".claim", "error.json", ".lock", "logs"
State = Literal["waiting", "running", "stopped", "failed", "done"]
BEAT, SILENT = 30.0, 300.0  # s between signs of life of who works on a cell, and after which another host takes it over
MADE = 5.0  # s within which whoever has made a claim writes into it


def state(directory: Path) -> State:
    """How a cell stands, from its folder alone."""
    if (directory / record.SUMMARY).is_file():
        return "done"
    if claimed(directory):
        return "running"
    if (directory / ERROR).is_file():
        return "failed"
    return "stopped" if (directory / record.CONFIG).is_file() else "waiting"


def over(directory: Path) -> bool:
    """Whether a cell has ended, well or not."""
    return (directory / record.SUMMARY).is_file() or (directory / ERROR).is_file()


def places(directory: Path, cells: Sequence[Cell]) -> dict[str, Path]:
    """The folder of each cell by its key: where a run of that key lies already, by whatever readable name."""
    there = {entry.name.rpartition("-")[2]: entry for entry in directory.iterdir()} if directory.is_dir() else {}
    return {cell.key: there.get(cell.key, directory / cell.name) for cell in cells}


# --- who works on a cell


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[bool]:
    """Takes a cell; yields False where another process has it. The system gives it back however this process ends.

    A claim is a file that only one process can make, also on a shared file system. It says who holds it and since when, is
    locked while its process lives, and its time is a sign of life: the claim of a dead process of this host is void at once,
    that of another host after `SILENT` seconds.

    Raises:
        OSError: the folder cannot be written.
    """
    path = directory / CLAIM
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = taken(path)
    except OSError as error:
        raise unwritten(str(path), error) from None
    if file is None:
        yield False
        return
    with file:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        mine = f"{platform.node()} process {os.getpid()} since {now}"
        file.seek(0)
        file.truncate()
        file.write(mine)
        file.flush()
        over = threading.Event()
        beating = threading.Thread(target=beat, args=(path, over), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            over.set()
            beating.join()
            with contextlib.suppress(OSError):
                if path.read_text(errors="replace") == mine:  # else another host has taken us for dead
                    file.truncate(0)
                    path.unlink()


def taken(path: Path) -> TextIO | None:
    """The claim, open and locked for this process; None where another process has it."""
    for _ in range(10):
        try:
            file = path.open("x", errors="replace")
        except FileExistsError:
            try:
                file = path.open("r+", errors="replace")
            except FileNotFoundError:  # given back this moment
                continue
            if not held(file) and is_there(file, path):
                return file  # of a process that has died
            file.close()
            return None
        if locked(file) is not False:
            return file
        file.close()
    return None


def held(file: TextIO) -> bool:
    """Whether a living process holds this claim; if not, it is locked for this process now, while the file is open."""
    text, age = file.read(), time.time() - os.fstat(file.fileno()).st_mtime
    if not text:  # made this moment, and its maker is about to write
        return age < MADE
    if age < SILENT and text.partition(" process ")[0] != platform.node():
        return True
    got = locked(file)
    return age < SILENT if got is None else not got


def is_there(file: TextIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def beat(path: Path, over: threading.Event) -> None:
    """Touches the claim from time to time."""
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def locked(file: TextIO, *, wait: bool = False) -> bool | None:
    """Takes the system's lock of an open file; False where another process has it, None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def claimed(directory: Path) -> bool:
    """Whether a process works on the cell."""
    try:
        with (directory / CLAIM).open("r+", errors="replace") as file:
            return held(file)
    except OSError:
        return False


def holder(directory: Path) -> str:
    """Who works on the cell, in words; "" where nobody does."""
    with contextlib.suppress(OSError):
        return (directory / CLAIM).read_text(errors="replace").strip() if claimed(directory) else ""
    return ""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process writes the sweep's own files: two of them would write one file beside its place."""
    with (folder / LOCK).open("a") as file:
        locked(file, wait=True)
        yield


# --- what went wrong


def fail(directory: Path, error: BaseException | str) -> None:
    """Keeps the error of a cell; what it has computed stays.

    Raises:
        OSError: it cannot be written.
    """
    own = isinstance(error, (str, ValueError, OSError))  # whose words are for people
    said = str(error) if own else f"{type(error).__name__}: {error}"
    told = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    record.write_json(
        directory / ERROR,
        {"schema": record.SCHEMA, "error": said, "traceback": told, "time": now, "host": platform.node()},
    )


def error_of(directory: Path) -> str:
    """The error of a failed cell, in its first line; "" where there is none."""
    try:
        return str(read_json(directory / ERROR, {"error": str})["error"]).partition("\n")[0]
    except ValueError:
        return ""


def forgive(directory: Path) -> None:
    """Lets a failed cell run again; its error stays beside it, under a number."""
    number = 1 + sum(1 for _ in directory.glob("error-*.json"))
    with contextlib.suppress(FileNotFoundError):  # another process has been quicker
        (directory / ERROR).replace(directory / f"error-{number}.json")


def clear(directory: Path) -> None:
    """Takes away what a stopped cell has computed; its claim and the errors of before stay."""
    for entry in directory.iterdir():
        if entry.name not in (CLAIM, LOCK) and not entry.name.startswith("error-"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


# --- what is asked


def write(folder: Path, base: Config, cells: Sequence[Cell], tuning: Sequence[Cell], chosen: Mapping[str, Any]) -> None:
    """Writes `sweep.json`.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": record.SCHEMA,
        "base": dataclasses.asdict(base),
        "cells": [described(cell, base) for cell in cells],
        "tuning": [described(cell, base) for cell in tuning],
        "chosen": chosen,
    }
    with alone(folder):
        record.write_json(folder / SWEEP, content)


def described(cell: Cell, base: Config) -> dict[str, Any]:
    """A cell as JSON: its options where they are not the base's, those of its speed where they are not the default."""
    speed = {
        f.name: getattr(cell.speed, f.name)
        for f in dataclasses.fields(Speed)
        if getattr(cell.speed, f.name) != f.default
    }
    options = {name: pair[1] for name, pair in differences(base, cell.config).items()}
    return {"name": cell.name, "options": options, "speed": speed, "varied": dict(cell.varied), "repeat": cell.repeat}


class Asked:
    """What `sweep.json` says."""

    def __init__(self, folder: Path) -> None:
        """Reads it.

        Raises:
            ValueError: the folder holds no sweep, or a damaged one.
        """
        file = folder / SWEEP
        if not file.is_file():
            raise ValueError(
                f"Expected {str(folder)!r} to hold a sweep ({SWEEP}); give the folder that fedsim sweep named."
            )
        content = read_json(file, {"base": dict, "cells": list, "tuning": list, "chosen": dict})
        self._speeds: dict[str, Speed] = {}  # most cells have one
        self.base = record.options(Config, content["base"], folder)
        self.cells = [self.cell(each) for each in content["cells"]]
        self.tuning = [self.cell(each) for each in content["tuning"]]
        self.chosen: dict[str, Any] = content["chosen"]

    def cell(self, each: Mapping[str, Any]) -> Cell:
        """A cell from its description."""

        def value(found: Any) -> Any:
            return tuple(found) if isinstance(found, list) else found

        options = {name: value(found) for name, found in each["options"].items()}
        told = str(each["speed"])
        speed = self._speeds.get(told) or Speed(**{name: value(found) for name, found in each["speed"].items()})
        self._speeds[told] = speed
        varied = {name: value(found) for name, found in each["varied"].items()}
        return Cell(each["name"], self.base.replace(**options), speed, varied, each["repeat"])


def refuse_another(folder: Path, base: Config, varied: set[str]) -> None:
    """Raises `ValueError` if the folder holds a run, or a sweep of another base; options that vary may differ.

    Args:
        varied: options on the axes.
    """
    if (folder / record.CONFIG).is_file():
        raise ValueError(f"Expected out={str(folder)!r} to hold no single run; choose another --out.")
    if not (folder / SWEEP).is_file():
        return
    before = Asked(folder)
    varied = (
        varied
        | {name for cell in (*before.cells, *before.tuning) for name in cell.varied}
        | {name for cell in before.cells for name in differences(before.base, cell.config)}
    )
    changed = {name: pair for name, pair in differences(before.base, base).items() if name not in varied}
    if changed:
        name, (was, now) = next(iter(changed.items()))
        raise ValueError(
            f"Expected out={str(folder)!r} to hold a sweep of the same base, but its {name} is {was!r}, not {now!r}"
            f"{f', and {len(changed) - 1} more options differ' if len(changed) > 1 else ''}; choose another --out."
        )
