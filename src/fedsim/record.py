"""The folder of a run: what was asked (`config.json`), what happened (`rounds.jsonl`), how it ended (`summary.json`).

No JAX at the top, so that reading a run is fast. `docs/record.md` documents every field; `SCHEMA` is raised when a
reader of older files would be misled. Bytes are Python integers from end to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fedsim.config import Config, Speed, require_known

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
CONFIG, ROUNDS, SUMMARY, TRAINED = "config.json", "rounds.jsonl", "summary.json", "trained.safetensors"
CLIENTS = "clients.json"
CHECKPOINTS = "checkpoints"  # folder of `fedsim.checkpoint.Checkpoints`
PACKAGES = ("fedsim-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")

INTEGERS = ("round", "bytes_up", "bytes_down", "setup_bytes", "total_bytes_up", "total_bytes_down")
INTEGERS += ("clients", "reported", "nonfinite", "examples")
NUMBERS = ("loss", "accuracy", "seconds", "compile_seconds", "clients_per_second", "examples_per_second")
NUMBERS += ("lane_occupancy", "row_occupancy")
NULLABLE = ("loss", "accuracy", "clients_per_second", "examples_per_second")  # where nobody reported, or all compiled
LEAVES = ("bytes_up_leaves", "bytes_down_leaves")

T = TypeVar("T", Config, Speed)
Round = Mapping[str, Any]  # one line of rounds.jsonl, as docs/record.md says


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

    def predict(self, inputs: Any) -> list[str]:
        """Classes of new inputs, texts (a list of strings) or arrays (N, ...), by the run's final model.

        Raises:
            ValueError: the run is not over, or the inputs do not fit its backbone.
        """
        from fedsim.predict import predict

        return predict(self, inputs)


def flat(line: Round) -> dict[str, Any]:
    """A round's line without its bytes per leaf, and with `validation_*`, `simulated_*` instead of the nested objects."""
    kept = {k: v for k, v in line.items() if k not in (*LEAVES, "validation", "simulated")}
    seen = line["validation"] or {}
    kept |= {f"simulated_{k}": v for k, v in (line.get("simulated") or {}).items()}
    return kept | {f"validation_{k}": seen.get(k, math.nan) for k in ("loss", "accuracy")}


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


def machine() -> dict[str, Any]:
    """Versions, commit, Python, platform, processor and devices of this process; asks JAX for its devices."""
    import jax

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = sorted({d.device_kind for d in jax.devices()})
    return {
        "versions": versions,
        "git": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": {"platform": jax.default_backend(), "kind": ", ".join(kinds), "count": jax.device_count()},
        "processes": jax.process_count(),
    }


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def commit(source: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `source` belongs to and whether it was changed since; None outside of one."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # an installed copy may lie in a virtual environment inside somebody else's checkout
        git("ls-files", "--error-unmatch", "config.py")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


# --- its rounds


def append(directory: Path, line: Round) -> None:
    """Adds one whole line to `rounds.jsonl` and sees it to the disk.

    Raises:
        ValueError: the line is not as `docs/record.md` says.
        OSError: the disk is full; the file is as before.
    """
    check_line(line)
    data = (json.dumps(plain({"schema": SCHEMA, **line}), allow_nan=False) + "\n").encode()
    descriptor = os.open(directory / ROUNDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)  # one call, so that a kill leaves all of the line or none
            if written != len(data):
                raise OSError(f"Expected {len(data)} bytes of {directory / ROUNDS} to be written; make room.")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def check_line(line: Round) -> None:
    """Raises `ValueError` unless a round's line has every field, in its type, and its leaves sum up to its bytes."""
    missing = [k for k in (*INTEGERS, *NUMBERS, *LEAVES, "phase", "validation") if k not in line]
    if missing:
        raise ValueError(f"Expected fields {', '.join(missing)} in the line of round {line.get('round')}; add them.")
    for name in INTEGERS:
        x = line[name]
        if isinstance(x, bool) or not isinstance(x, (int, np.integer)) or x < 0:
            raise ValueError(f"Expected {name}={x!r} to be an integer >= 0; sum bytes in Python integers.")
    for name in NUMBERS:
        if line[name] is None and name in NULLABLE:
            continue
        if isinstance(line[name], bool) or not isinstance(line[name], (int, float, np.floating)):
            raise ValueError(f"Expected {name}={line[name]!r} to be a number; fetch it from the device.")
    if line["phase"] not in ("head", "peft"):
        raise ValueError(f"Expected phase={line['phase']!r} to be head or peft.")
    for name in LEAVES:
        total = sum(line[name].values())
        if total != line[name.removesuffix("_leaves")]:
            raise ValueError(f"Expected the sum of {name}={total} to be {line[name.removesuffix('_leaves')]}.")
    if line["validation"] is not None and not {"loss", "accuracy"} <= set(line["validation"]):
        raise ValueError(f"Expected validation={line['validation']!r} to hold loss and accuracy, or to be None.")


def rounds(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of `rounds.jsonl`; a half-written last one is left out.

    Raises:
        ValueError: a line in the middle is damaged, rounds are missing or double, or the schema is a newer one.
    """
    path = directory / ROUNDS
    if not path.exists():
        return []
    text = path.read_bytes()
    found: list[dict[str, Any]] = []
    for i, raw in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(raw)
            number, schema = line["round"], line["schema"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"Expected line {i} of {path} to be a round's JSON; restore the file or run anew."
            ) from None
        if schema > SCHEMA:
            raise ValueError(f"Expected schema={schema} <= {SCHEMA} in line {i} of {path}; use the newer fedsim.")
        after = found[-1]["round"] + 1 if found else 1
        if number != after:
            raise ValueError(
                f"Expected round={number} to be {after} in line {i} of {path}; restore the file or run anew."
            )
        found.append(line)
    return found


def truncate(directory: Path, round: int) -> list[dict[str, Any]]:
    """Cuts `rounds.jsonl` to the rounds up to `round` and gives them: a run resumes from the checkpoint of `round`.

    Raises:
        ValueError: lines up to `round` are missing or damaged; the file stays as it is.
    """
    kept = [line for line in rounds(directory) if line["round"] <= round]
    if len(kept) != round:
        raise ValueError(
            f"Expected {directory / ROUNDS} to hold rounds 1 to {round}, found {len(kept)}; restore it or run anew."
        )
    path = directory / ROUNDS
    old = path.read_bytes() if path.exists() else b""
    write_bytes(path, b"".join(old.splitlines(keepends=True)[:round]))
    (directory / SUMMARY).unlink(missing_ok=True)  # of the run before it went on
    return kept


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


# --- files


def plain(x: Any) -> Any:
    """A value as JSON has it: NumPy scalars as Python ones, tuples as lists, NaN and infinity as None (null)."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `ValueError` naming the file if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be whole JSON ({error}); restore the file or run anew.") from None
    if not isinstance(found, dict):
        raise ValueError(f"Expected {path} to hold a JSON object; restore the file or run anew.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then moves it there: readers see the old one or the new one."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
