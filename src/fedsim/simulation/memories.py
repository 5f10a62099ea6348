"""What clients keep, for others: the table that a run leaves of it, and its export as shards of safetensors.

A run's rows stay where its rounds wrote them, in `memory-PHASE.rows`. At its end `memories.safetensors` says whose row lies
in which slot, its CRC-32, and what a row is made of. An export reads the rows by that table, a shard at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from fedsim import record
from fedsim.config import positive
from fedsim.config.fields import take
from fedsim.disk import reason, unwritten
from fedsim.engine.client_memory import Memory, Table, damaged, row_of
from fedsim.record.files import parse, read_bytes
from fedsim.record.folders import again, require_digest
from fedsim.record.schemas import fault

if TYPE_CHECKING:
    from fedsim.record import Run

INDEX = "memories.json"
SHARD = 2**30  # bytes
STORED = ("ids", "slots", "sums")  # arrays (K,) of a table, by client in ascending order
SHAPE = {"schema": int, "stores": {str: {"rows": str, "leaves": [{"path": str, "dtype": str, "shape": [int]}]}}}


class Leaf(NamedTuple):
    """A leaf of what one client keeps."""

    path: str
    dtype: str
    shape: tuple[int, ...]


class Store(NamedTuple):
    """What the clients of one architecture keep, as a run's folder has it."""

    rows: Path
    leaves: tuple[Leaf, ...]
    table: Table  # ids ascending

    def row(self) -> np.dtype:
        """The record of one client; fields "0", "1", ... are the leaves."""
        return row_of([(jnp.dtype(leaf.dtype), leaf.shape) for leaf in self.leaves])


# --- what a run leaves behind


def table_of(memory: Memory, members: Mapping[str, np.ndarray]) -> bytes | None:
    """Content of `memories.safetensors`; None where clients keep nothing. Seals the memory; of the first process alone.

    Args:
        members: the clients of each group; {} where all have one architecture.
    """
    stores = {name: memory.beside[name] for name, ids in members.items() if len(ids)} if members else {"": memory}
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for name, store in stores.items():
        if store.empty or store.file is None:
            continue
        table = store.seal()
        order = np.argsort(table.ids)
        arrays |= {named(name, each): getattr(table, each)[order] for each in STORED}
        described[name] = {"rows": store.file.name, "leaves": [leaf._asdict() for leaf in leaves_of(store)]}
    if not described:
        return None
    # one entry, as in `record.finish`
    return save(arrays, metadata={"fedsim": json.dumps({"schema": record.SCHEMA, "stores": described})})


def named(store: str, array: str) -> str:
    """An array's name in the file; "" is the store of all clients."""
    return f"{store}/{array}" if store else array


def leaves_of(store: Memory) -> list[Leaf]:
    """The leaves of what one client keeps: paths like those of parameters, "memory" where it is one array."""
    numbered = jax.tree.unflatten(store.structure, range(store.structure.num_leaves))
    found = tree_leaves_with_path(numbered)
    paths = [keystr(path, simple=True, separator="/") or "memory" for path, _ in found]
    if len({"ids", *paths}) <= len(paths):  # such as {"a/b": ..., "a": {"b": ...}}
        paths = [keystr(path) for path, _ in found]
    types = store.row_types()
    return [Leaf(path, types[i].base.name, types[i].shape) for path, (_, i) in zip(paths, found, strict=True)]


def rows_of(directory: Path) -> list[str]:
    """Names of the files whose rows `memories.safetensors` of a run's folder refers to; none where there is no such file."""
    file = directory / record.MEMORIES
    return [store.rows.name for store in stores_in(file).values()] if file.exists() else []


# --- reading it


def stores_in(file: Path) -> dict[str, Store]:
    """What the clients of each group keep, "" for all, by a run's `memories.safetensors`.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            about = parse((opened.metadata() or {})["fedsim"].encode())
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        if wrong := fault(about, SHAPE):
            raise ValueError(f"Expected {wrong}")
        found = {}
        for name, said in about["stores"].items():
            if name and not name.isidentifier():  # a folder is made of it
                raise ValueError(f"Expected {name!r} to be a group's name")
            ids, slots, sums = (arrays[named(name, each)] for each in STORED)
            if not ids.shape == slots.shape == sums.shape == (ids.size,):
                raise ValueError(f"Expected ids, slots and sums of {name!r} to be as long as each other")
            leaves = tuple(Leaf(leaf["path"], leaf["dtype"], tuple(leaf["shape"])) for leaf in said["leaves"])
            used = np.array(slots.max(initial=-1) + 1, np.int64)
            found[name] = Store(file.with_name(Path(said["rows"]).name), leaves, Table(ids, slots, sums, used))
            found[name].row()
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected {file} to be whole ({reason(error)}); {again(file.parent)}.") from None


def kept(run: Run) -> dict[str, Store]:
    """What the clients of a finished run keep, by group.

    Raises:
        ValueError: the run is not over, its clients keep nothing, or the table is not the one that it wrote.
    """
    if run.summary is None:
        raise ValueError(f"Expected {run.directory} to hold a finished run; go on with it by --resume.")
    file, remedy = run.directory / record.MEMORIES, again(run.directory)
    known = run.summary.get("sha256", {}).get(record.MEMORIES)
    if known is None:
        raise ValueError(
            f"Expected clients of algorithm={run.config.algorithm!r} in {run.directory} to keep something between rounds, but "
            f"its {record.SUMMARY} knows no {record.MEMORIES}; choose an algorithm with a memory. If it has one, the run is of "
            f"an older fedsim: delete {run.directory / record.SUMMARY} and go on by --resume {run.directory}."
        )
    require_digest(file, read_bytes(file, remedy), known, remedy)
    return stores_in(file)


# --- writing it for others


def export(run: Run, folder: Path, shard_bytes: int = SHARD) -> Path:
    """Writes what every client keeps that was ever in a round: `memories-00001-of-0000N.safetensors` and `memories.json`.

    A shard has `ids` (k,), ascending, and each leaf by its path, (k, ...). The index has the number of clients, the leaves
    with dtype and shape, and the shards with their first and last client. One shard is in memory at a time. What a codec
    keeps for clients is not exported.

    Args:
        shard_bytes: that the arrays of one shard have at most.

    Returns:
        The index; of several groups the folder, in which each has a folder of its name.

    Raises:
        ValueError: as `kept`; rows that are damaged or gone, a folder that cannot be used, or too small a shard. Nothing
            is left of an export that fails but empty folders.
        OSError: the disk takes no more.
    """
    shard_bytes = take(shard_bytes, int, "shard_bytes", default=SHARD)
    positive(shard_bytes=shard_bytes)
    stores = kept(run)
    places = {name: folder / name for name in stores}
    if folder.resolve() == run.directory.resolve():
        raise ValueError(f"Expected folder={str(folder)!r} to be another than the run's own; give a new folder.")
    for name, store in stores.items():
        prepare(run, store, places[name], shard_bytes)
    made: list[Path] = []
    try:
        for name, store in stores.items():
            shards(run, store, places[name], shard_bytes, made)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise
    return folder / INDEX if "" in stores else folder


def prepare(run: Run, store: Store, place: Path, shard_bytes: int) -> None:
    """Makes the folder of a group, and refuses what cannot be exported into it.

    Raises:
        ValueError: see `export`.
    """
    if (each := bytes_of(store)) > shard_bytes:
        raise ValueError(
            f"Expected shard_bytes={shard_bytes} >= {each}, which one client of {run.directory} keeps; raise it."
        )
    try:
        save({leaf.path: np.zeros(0, jnp.dtype(leaf.dtype)) for leaf in store.leaves})
    except SafetensorError as error:
        types = ", ".join(dict.fromkeys(leaf.dtype for leaf in store.leaves))
        raise ValueError(
            f"Expected the dtypes that clients keep ({types}) to be those of safetensors ({reason(error)}); choose others in "
            "Algorithm.memory."
        ) from None
    try:
        place.mkdir(parents=True, exist_ok=True)
        there = sorted(file.name for file in place.glob("memories*"))
    except OSError as error:
        raise ValueError(
            f"Expected folder={str(place)!r} to be one that can be written ({reason(error)}); give another folder."
        ) from None
    if there:
        raise ValueError(f"Expected folder={str(place)!r} to hold no memories, not {there[0]}; give a new folder.")


def bytes_of(store: Store) -> int:
    """Bytes of one client in a shard, its id included."""
    return store.table.ids.itemsize + sum(
        int(np.prod(leaf.shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize for leaf in store.leaves
    )


def shards(run: Run, store: Store, place: Path, shard_bytes: int, made: list[Path]) -> None:
    """Writes the shards and the index of one group; adds each file to `made` before it is written."""
    each, count = shard_bytes // bytes_of(store), len(store.table.ids)
    starts, entries = range(0, count, each), []
    for number, start in enumerate(starts, 1):
        ids, slots, sums = (column[start : start + each] for column in store.table[:3])
        part = store._replace(table=Table(ids, slots, sums, store.table.used))
        file = place / f"memories-{number:05}-of-{len(starts):05}.safetensors"
        made.append(file)
        write(file, arrays_of(run, part))
        entries.append({"file": file.name, "clients": len(ids), "first": int(ids[0]), "last": int(ids[-1])})
    leaves = {leaf.path: {"dtype": leaf.dtype, "shape": leaf.shape} for leaf in store.leaves}
    made.append(place / INDEX)
    record.write_json(place / INDEX, {"schema": record.SCHEMA, "clients": count, "leaves": leaves, "shards": entries})


def arrays_of(run: Run, part: Store) -> dict[str, np.ndarray]:
    """The arrays of a shard, whose rows are compared with their checksums first.

    Raises:
        ValueError: a row is not what the run wrote.
    """
    row, table = part.row(), part.table
    if (why := damaged(part.rows, row.itemsize, table)) is not None:
        raise hurt(run, why)
    rows = np.memmap(part.rows, row, "r", shape=(int(table.slots.max()) + 1,))
    found = {leaf.path: np.ascontiguousarray(rows[str(i)][table.slots]) for i, leaf in enumerate(part.leaves)}
    return {"ids": table.ids, **found}


def hurt(run: Run, why: str) -> ValueError:
    """What is said of rows that are not those of the run."""
    return ValueError(
        f"Expected the rows that {run.directory / record.MEMORIES} tells of, but {why}; {again(run.directory)}."
    )


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard whole or not at all.

    Raises:
        OSError: it cannot be written; names the file and the remedy.
    """
    beside = file.with_name(file.name + ".part")
    try:
        save_file(dict(arrays), beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    except (OSError, SafetensorError) as error:
        raise unwritten(str(file), error) from None
    finally:
        beside.unlink(missing_ok=True)
