"""The folder of a run: what was asked (`config.json`), what happened (`rounds.jsonl`), how it ended (`summary.json`).

No JAX at the top, so that reading a run is fast. `docs/record.md` documents every field; `SCHEMA` is raised when a
reader of older files would be misled. Bytes are Python integers from end to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fedsim.config import Config, Speed, older, require_known
from fedsim.digests import shown
from fedsim.disk import reason

if TYPE_CHECKING:
    import pandas as pd

from fedsim.record.environment import machine
from fedsim.record.files import (
    ANEW,
    CLIENTS,
    CONFIG,
    MEMORIES,
    ROUNDS,
    SCHEMA,
    SUMMARY,
    TRAINED,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)
from fedsim.record.lines import flat, identity, rounds
from fedsim.record.schemas import ABOUT, CLIENT_ROWS, SUMMARY_SHAPE

T = TypeVar("T", Config, Speed)
BYTES_OF = {"up": "bytes_up", "down": "bytes_down", "setup": "setup_bytes"}  # of a summary -> of a line


class Run(NamedTuple):
    """A run as its folder tells it; `rounds` holds the lines, `summary` is None while the run is not over."""

    directory: Path
    config: Config
    speed: Speed
    about: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    parameters: dict[str, np.ndarray]
    trust_code: bool = False  # of the user: its own Python files may run, also where they are not those recorded

    def table(self) -> pd.DataFrame:
        """The rounds as a pandas table: one row a round, `validation_loss` and the other scores as columns.

        Raises:
            ValueError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ValueError(
                "Expected pandas to be installed for a table; pip install pandas, or use .rounds."
            ) from None
        return pd.DataFrame([flat(line) for line in self.rounds])

    def clients(self) -> list[dict[str, Any]]:
        """Each client's own test, as docs/record.md says; none where the run held nothing out for them (`local_test`).

        Raises:
            ValueError: the file is damaged, missing or of another run.
        """
        file, remedy = self.directory / CLIENTS, again(self.directory)
        known = (self.summary or {}).get("sha256", {}).get(CLIENTS)
        if known is None and not file.exists():
            return []
        if known is not None:
            require_digest(file, read_bytes(file, remedy), known, remedy)
        return read_json(file, CLIENT_ROWS, remedy)["clients"]


# --- the start of a run


def folder(out: str | Path | None, config: Config) -> Path:
    """The run's folder, made if need be: `out`, or a fresh `runs/<date-time>-<config hash>`.

    Raises:
        ValueError: `out` holds a run already, or is a file.
    """
    if out is None:
        now = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        for i in range(1, 1000):  # several runs of one config may start within a second
            made = Path("runs") / (f"{now}-{config.hash()}" + (f"-{i}" if i > 1 else ""))
            with contextlib.suppress(FileExistsError):
                made.mkdir(parents=True)
                return made
    directory = Path(out or "runs")
    refuse_used(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Expected out={str(directory)!r} to be a folder that can be made ({reason(error)}); choose another --out."
        ) from None
    return directory


def refuse_used(out: str | Path | None) -> None:
    """Raises `ValueError` if a folder holds a run, or is a file."""
    if out is None:
        return
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"Expected out={str(out)!r} to be a folder, not a file; choose another --out.")
    if any((directory / name).exists() for name in (CONFIG, ROUNDS, SUMMARY)):
        raise ValueError(
            f"Expected out={str(directory)!r} to hold no run; go on with it by --resume {directory}, "
            "or choose another --out."
        )


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keeps other processes from writing the folder; the system frees it however this process ends.

    Raises:
        ValueError: another process, which is named, holds it.
    """
    path = directory / ".lock"
    try:
        opened = path.open("a+", errors="replace")
    except OSError as error:
        raise ValueError(
            f"Expected {path} to be a file that can be written ({reason(error)}); take it away, or make the folder writable "
            "for you."
        ) from None
    with opened as file:
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks of this kind; the folder is then not guarded
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = "".join(filter(str.isprintable, file.read(100).strip()))
            raise ValueError(
                f"Expected {directory} to be free, but {holder or 'another process'} writes it; "
                "wait for its end, or choose another --out."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def start(directory: Path, config: Config, speed: Speed, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes `config.json` of a new run and gives its content.

    Args:
        directory: the run's folder, locked by the caller.
        config: what is simulated.
        speed: how fast.
        more: further facts worth keeping, such as what `auto` chose.

    Raises:
        ValueError: the folder holds a run already.
    """
    refuse_used(directory)
    about = {
        "schema": SCHEMA,
        "config": dataclasses.asdict(config),
        "config_hash": config.hash(),
        "speed": dataclasses.asdict(speed),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        **machine(),
        **(more or {}),
    }
    write_json(directory / CONFIG, about)
    return read_json(directory / CONFIG, ABOUT)


# --- its end


def finish(
    directory: Path,
    result: Mapping[str, Any],
    parameters: Mapping[str, np.ndarray],
    clients: Sequence[Mapping[str, Any]] | None = None,
    memories: bytes | None = None,
) -> None:
    """Writes `trained.safetensors`, `clients.json` where clients have tests of their own, `memories.safetensors` where they
    keep something, and then `summary.json`.

    Each is written whole or not at all; the summary knows the run and the others by their SHA-256.

    Args:
        memories: content of that file.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors.numpy import save

    arrays = {k: np.ascontiguousarray(v) for k, v in parameters.items()}
    # one entry: safetensors writes several in an order of chance, and equal runs are to give equal files
    write_bytes(directory / TRAINED, save(arrays, metadata={"fedsim_schema": str(SCHEMA)}))
    written = [TRAINED]
    if clients is not None:
        write_json(directory / CLIENTS, {"schema": SCHEMA, "clients": clients})
        written.append(CLIENTS)
    if memories is not None:
        write_bytes(directory / MEMORIES, memories)
        written.append(MEMORIES)
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in written}
    write_json(directory / SUMMARY, {**result, "identity": identity(directory), "sha256": digests})


# --- reading it


def load(directory: str | Path) -> Run:
    """Reads a run's folder; one that is still running, or was stopped, has `summary=None` and no parameters.

    Raises:
        ValueError: the folder holds no run, or a damaged one, files of another run, or one of a newer fedsim.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"Expected {str(directory)!r} to hold a run ({CONFIG}); give the folder that fedsim run named, or start anew "
            "what was stopped before its first round."
        )
    about = read_json(directory / CONFIG, ABOUT)
    config, speed = options(Config, about["config"], directory), options(Speed, about["speed"], directory)
    lines = rounds(directory)
    if not (directory / SUMMARY).exists():  # a trained part is then one of before the run went on
        return Run(directory, config, speed, about, lines, None, {})
    summary = read_json(directory / SUMMARY, SUMMARY_SHAPE, again(directory, summary=True))
    refuse_other(summary, about, lines, directory)
    return Run(directory, config, speed, about, lines, summary, trained(directory, summary))


def again(directory: Path, *, summary: bool = False) -> str:
    """The remedy for a damaged file of the run's end, all of which are written again from the last checkpoint.

    Args:
        summary: it is the summary that is damaged.
    """
    other = "" if summary else f" {directory / SUMMARY}"
    return f"restore the file, or delete{other or ' it'} and go on by --resume {directory}, which ends the run anew"


def refuse_other(
    summary: Mapping[str, Any], about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], directory: Path
) -> None:
    """Raises `ValueError` unless a summary is of this run, by its identity, and of these lines, by their number and sums."""
    file = directory / SUMMARY
    if summary.get("identity", about.get("identity", "")) != about.get("identity", ""):
        raise ValueError(
            f"Expected {file} to be of the run in {directory / CONFIG}, but it is another run's; {again(directory, summary=True)}."
        )
    sums = {
        "rounds": (summary["rounds"], len(lines)),
        **{f"bytes {k}": (summary["bytes"][k], total(lines, n)) for k, n in BYTES_OF.items()},
        **{k: (summary[k], total(lines, k)) for k in ("clients", "examples", "nonfinite", "compile_seconds")},
        "seconds_in_rounds": (summary["seconds_in_rounds"], total(lines, "seconds")),
    }
    for name, (told, found) in sums.items():
        if not math.isclose(told, found, rel_tol=1e-9):
            raise ValueError(
                f"Expected {name}={found} of the lines of {directory / ROUNDS} to be {told}, as {file} says; restore the file "
                "that is another run's or was cut, or run anew."
            )


def total(lines: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Sum of a field over the rounds."""
    return sum(line[name] for line in lines)


def trained(directory: Path, summary: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a finished run trained, by name.

    Raises:
        ValueError: the file is missing, damaged, or not the one that the summary knows.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file, remedy = directory / TRAINED, again(directory)
    data = read_bytes(file, remedy)
    known = summary.get("sha256", {}).get(TRAINED)
    if known is not None:
        require_digest(file, data, known, remedy)
    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected {file} to be whole safetensors ({reason(error)}); {remedy}.") from None


def require_digest(file: Path, data: bytes, known: str, remedy: str) -> None:
    """Raises `ValueError` unless a file's bytes are those that the run wrote."""
    found = hashlib.sha256(data).hexdigest()
    if found != known:
        raise ValueError(f"Expected sha256={shown(found)} of {file} to be {shown(known)}, as {SUMMARY} says; {remedy}.")


def options(kind: type[T], stored: Mapping[str, Any], directory: Path) -> T:
    """`Config` or `Speed` from its JSON, renamed ones too; options added since the run was made take their default.

    Raises:
        ValueError: an unknown option or an impossible value; names the file.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    stored = older.today(stored)
    require_known(stored, known, f"option in {directory / CONFIG}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a damaged value may be of any type
        raise ValueError(f"Expected {directory / CONFIG} to hold possible options; {ANEW} ({error})") from None
