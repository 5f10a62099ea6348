"""The folder of a run: what was asked (`config.json`), what happened (`rounds.jsonl`), how it ended (`summary.json`).

No JAX at the top, so that reading a run is fast. `docs/record.md` documents every field; `SCHEMA` is raised when a
reader of older files would be misled. Bytes are Python integers from end to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fedsim.config import Config, Speed, require_known

if TYPE_CHECKING:
    import pandas as pd

from fedsim.record.environment import machine
from fedsim.record.files import CLIENTS, CONFIG, ROUNDS, SCHEMA, SUMMARY, TRAINED, read_json, write_bytes, write_json
from fedsim.record.lines import flat, rounds

T = TypeVar("T", Config, Speed)


class Run(NamedTuple):
    """A run as its folder tells it; `rounds` holds the lines, `summary` is None while the run is not over."""

    directory: Path
    config: Config
    speed: Speed
    about: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    parameters: dict[str, np.ndarray]

    def table(self) -> pd.DataFrame:
        """The rounds as a pandas table: one row a round, `validation_loss` and `validation_accuracy` as columns.

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
        """Each client's own test, as docs/record.md says; none where the run held nothing out for them (`local_test`)."""
        file = self.directory / CLIENTS
        return read_json(file)["clients"] if file.exists() else []


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
    directory.mkdir(parents=True, exist_ok=True)
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
    with (directory / ".lock").open("a+") as file:
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks of this kind; the folder is then not guarded
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(
                f"Expected {directory} to be free, but {file.read().strip() or 'another process'} writes it; "
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
    return json.loads((directory / CONFIG).read_text())


# --- its end


def finish(
    directory: Path,
    result: Mapping[str, Any],
    parameters: Mapping[str, np.ndarray],
    clients: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes `trained.safetensors`, `clients.json` where clients have tests of their own, and then `summary.json`.

    Each is written whole or not at all.
    """
    from safetensors.numpy import save

    arrays = {k: np.ascontiguousarray(v) for k, v in parameters.items()}
    # one entry: safetensors writes several in an order of chance, and equal runs are to give equal files
    write_bytes(directory / TRAINED, save(arrays, metadata={"fedsim_schema": str(SCHEMA)}))
    if clients is not None:
        write_json(directory / CLIENTS, {"schema": SCHEMA, "clients": clients})
    write_json(directory / SUMMARY, result)


# --- reading it


def load(directory: str | Path) -> Run:
    """Reads a run's folder; one that is still running, or was stopped, has `summary=None` and maybe no parameters.

    Raises:
        ValueError: the folder holds no run, or a damaged one, or one of a newer fedsim.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"Expected {str(directory)!r} to hold a run ({CONFIG}); give the folder that fedsim run named, or start anew "
            "what was stopped before its first round."
        )
    about = read_json(directory / CONFIG)
    if about.get("schema", 0) > SCHEMA:
        raise ValueError(f"Expected schema={about['schema']} <= {SCHEMA} in {directory}; use the newer fedsim.")
    parameters: dict[str, np.ndarray] = {}
    if (directory / TRAINED).exists():
        from safetensors.numpy import load_file

        parameters = load_file(directory / TRAINED)
    return Run(
        directory=directory,
        config=options(Config, about["config"], directory),
        speed=options(Speed, about["speed"], directory),
        about=about,
        rounds=rounds(directory),
        summary=read_json(directory / SUMMARY) if (directory / SUMMARY).exists() else None,
        parameters=parameters,
    )


def options(kind: type[T], stored: Mapping[str, Any], directory: Path) -> T:
    """`Config` or `Speed` from its JSON; options added since the run was made take their default."""
    known = [f.name for f in dataclasses.fields(kind)]
    require_known(stored, known, f"option in {directory / CONFIG}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
