"""What clients keep between rounds: private rows on the host, of which a round moves its cohort's alone.

A row is a client's pytree as one NumPy record. Rows lie in an array that grows by doubling: in main memory, or in a
sparse memory map of a file, which is then a part of every checkpoint without being copied. A row that a checkpoint
refers to is never written again: its client's next row goes to another slot, and the old slot is free once no
checkpoint that is kept can refer to it. So a checkpoint writes the rows that have changed since the one before, and a
table of 12 bytes a client that was ever seen: who, which slot, the row's checksum.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim.core import Tree
from fedsim.disk import unreadable, unwritten

SEEN = np.dtype([("id", np.int32), ("slot", np.int32), ("sum", np.uint32), ("sealed", np.bool_)])  # 13 bytes


class Table(NamedTuple):
    """The memory in a checkpoint: K clients in the order of their first visits, and where their rows lie in the file."""

    ids: np.ndarray  # (K,), int32
    slots: np.ndarray  # (K,), int32
    sums: np.ndarray  # (K,), uint32: CRC-32 of the row's bytes
    used: np.ndarray  # (), int64: slots in use or used before; those behind were never written


class Memory:
    """What clients keep between rounds: rows for clients ever seen, whatever the population.

    Args:
        init: `(key, held) -> what one client keeps`, as in `Algorithm.memory`.
        held: the frozen parameters, for the shapes.
        file: where the rows lie; made with the first row. None: in main memory, and in no checkpoint.
        keep: checkpoints that stay usable, as `checkpoint.Checkpoints` has it.

    Guarantees:
        `gather` and `scatter` cost the rows that they move, `seal` those written since the last one, whatever was seen.
        Rows of the last `keep` sealed tables stay as they are, also where the process is killed.
    """

    def __init__(self, init: Any, held: Tree, file: Path | None = None, keep: int = 3) -> None:
        self.init, self.file, self.keep = init, file, keep
        leaves, self.structure = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0), held))
        self.row = row_of([(s.dtype, s.shape) for s in leaves])
        self.empty = not leaves
        self.rows = np.zeros(0, self.row)  # by slot
        self.place = np.zeros(0, np.int32)  # by client: its place in `seen`, from 1; 0 for a client never seen
        self.seen, self.count = np.zeros(0, SEEN), 0
        self.used, self.free = 0, np.zeros(0, np.int32)  # slots
        self.left: list[np.ndarray] = []  # slots that clients have left since the last table was sealed
        self.retired: deque[np.ndarray] = deque()  # the same, of the tables before, oldest first
        self.beside: dict[
            str, Memory
        ] = {}  # what else clients keep, such as a codec's state: a store of its own by name
        self.pending: Callable[[], None] | None = None  # brings rows that still lie on the devices
        self.used_here = False

    def store(self, name: str, init: Any, held: Tree) -> Memory:
        """The store beside this one of that name, made at its first use.

        Args:
            init, held: as of the memory itself.
        """
        if name not in self.beside:
            file = None if self.file is None else self.file.with_name(f"{self.file.stem}.{name}.rows")
            self.beside[name] = Memory(init, held, file, self.keep)
        store = self.beside[name]
        if not store.used_here:  # made by a checkpoint's description, which knows leaves alone
            store.structure = jax.tree.structure(jax.eval_shape(init, jax.random.key(0), held))
            store.used_here = True
        return store

    def described(self) -> dict[str, Any]:
        """The stores beside this one, each as shapes and dtypes of its leaves and its number of clients; JSON."""
        return {
            name: {"count": store.count, "leaves": [[list(dt.shape), dt.base.name] for dt in store.row_types()]}
            for name, store in self.beside.items()
        }

    def row_types(self) -> list[np.dtype]:
        """The dtypes of a row's leaves, their shapes included."""
        return [self.row[name] for name in self._leaves()]

    def make_beside(self, described: Mapping[str, Any]) -> None:
        """Makes the stores that a checkpoint describes, before anything has used them."""
        for name, store in described.items():
            shapes = [(tuple(shape), jax.numpy.dtype(dtype)) for shape, dtype in store["leaves"]]
            self.store(name, lambda key, held, shapes=shapes: [np.zeros(*one) for one in shapes], ()).used_here = False

    def later(self, bring: Callable[[], None]) -> None:
        """Has rows written when they are asked for: a round's exchanges hand them on from one to the next."""
        self.pending = bring

    def settle(self) -> None:
        """Writes what is still on the devices; of several processes all call this."""
        bring, self.pending = self.pending, None
        if bring is not None:
            bring()

    def gather(self, ids: np.ndarray) -> tuple[Tree, np.ndarray]:
        """Stored rows of these clients, zeros where there are none, and which ones were seen; ids.shape leads."""
        self.settle()
        places = self._places(ids)
        seen = places >= 0
        slots = self.seen["slot"][places[seen]]

        def take(name: str) -> np.ndarray:
            kept = self.rows[name]
            out = np.zeros((*places.shape, *kept.shape[1:]), kept.dtype)
            out[seen] = kept[slots]
            return out

        return jax.tree.unflatten(self.structure, [take(name) for name in self._leaves()]), seen

    def scatter(self, ids: np.ndarray, new: Tree) -> None:
        """Keeps the rows (M, ...) of these clients, each once.

        Raises:
            OSError: the disk has no room for them, or the file cannot be written.
        """
        if self.empty or len(ids) == 0:
            return
        ids = np.asarray(ids)
        places = self._places(ids)
        first = places < 0
        leaving = places[~first][self.seen["sealed"][places[~first]]]
        slots = self._take(int(first.sum()) + len(leaving))
        self.left.append(self.seen["slot"][leaving])

        places[first] = np.arange(self.count, self.count + first.sum())
        self.count += int(first.sum())
        self.place, self.seen = grown(self.place, int(ids.max()) + 1), grown(self.seen, self.count)
        self.place[ids[first]], self.seen["id"][places[first]] = places[first] + 1, ids[first]
        moving = np.concatenate([places[first], leaving])
        self.seen["slot"][moving], self.seen["sealed"][moving] = slots, False
        at = self.seen["slot"][places]
        for name, rows in zip(self._leaves(), jax.tree.leaves(new), strict=True):
            self.rows[name][at] = rows

    def state(self) -> tuple[Tree, np.ndarray]:
        """A copy of all rows, and their clients, in the order of first visits: for tests, not for large populations."""
        self.settle()
        ids = self.seen["id"][: self.count].astype(np.int64)
        return self.gather(ids)[0], ids

    def seal(self) -> Table:
        """Brings the rows to the disk and gives the table of them, for a checkpoint.

        Raises:
            ValueError: the rows lie in no file.
            OSError: the disk does not take them.
        """
        self.settle()
        seen = self.seen[: self.count]
        if self.file is None and self.count:
            raise ValueError("Expected the memory to have a file, without which no checkpoint can hold it; give one.")
        changed = np.flatnonzero(~seen["sealed"])
        content = self._bytes()
        for place, slot in zip(changed.tolist(), seen["slot"][changed].tolist(), strict=True):
            seen["sum"][place] = zlib.crc32(content[slot])
        if isinstance(self.rows, np.memmap):
            try:
                self.rows.flush()
            except OSError as error:
                raise unwritten(f"clients' memory in {self.file}", error) from None
        seen["sealed"] = True
        # A slot left before this table is in older ones. When the table after the next `keep` - 1 is sealed, and the
        # checkpoint before that one is whole, the last of those is gone.
        self.retired.append(np.concatenate([np.zeros(0, np.int32), *self.left]))
        self.left = []
        if len(self.retired) > self.keep:
            self.free = np.concatenate([self.free, self.retired.popleft()])
        used = np.array(self.used, np.int64)
        return Table(seen["id"].copy(), seen["slot"].copy(), seen["sum"].copy(), used)

    def shapes(self, count: int) -> Table:
        """A table of `count` clients without its values, to restore a checkpoint by."""
        ids, slots, sums = (np.zeros(count, SEEN[name]) for name in ("id", "slot", "sum"))
        return Table(ids, slots, sums, np.zeros((), np.int64))

    def damage(self, table: Table) -> str | None:
        """What is wrong with the rows in the file, measured by a table of them; reads them all. None: nothing.

        Raises:
            ValueError: the file is there and cannot be read, which says nothing about the rows.
        """
        return damaged(self.file, self.row.itemsize, table)

    def restore(self, table: Table) -> None:
        """Goes on from a sealed table, whose rows are in the file."""
        self.count, self.used = len(table.ids), int(table.used)
        self.seen = np.zeros(self.count, SEEN)
        self.seen["id"], self.seen["slot"], self.seen["sum"], self.seen["sealed"] = *table[:3], True
        self.place = grown(np.zeros(0, np.int32), int(table.ids.max(initial=-1)) + 1)
        self.place[table.ids] = np.arange(self.count) + 1
        self.rows = np.zeros(0, self.row)
        self._grow(self.used)
        self.free, self.left = np.zeros(0, np.int32), []
        self.retired = deque([np.setdiff1d(np.arange(self.used, dtype=np.int32), table.slots)])

    def _leaves(self) -> tuple[str, ...]:
        return self.row.names or ()

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """Where these clients stand in `seen`; -1 for those that were never seen."""
        ids = np.asarray(ids, np.int64)
        places = np.full(ids.shape, -1, np.int64)
        known = (ids >= 0) & (ids < len(self.place))
        places[known] = self.place[ids[known]] - 1
        return places

    def _bytes(self) -> np.ndarray:
        """The rows as bytes, (slots, bytes of a row)."""
        return self.rows.view(np.ndarray).view(np.uint8).reshape(len(self.rows), self.row.itemsize)

    def _take(self, count: int) -> np.ndarray:
        """Slots for as many rows: those that are free first."""
        again = self.free[:count]
        more = np.arange(self.used, self.used + count - len(again), dtype=np.int32)
        self._grow(self.used + len(more))
        self.free, self.used = self.free[len(again) :], self.used + len(more)
        return np.concatenate([again, more])

    def _grow(self, slots: int) -> None:
        if self.file is None:
            self.rows = grown(self.rows, slots)
            return
        try:
            self._grow_file(self.file, slots)
        except OSError as error:
            if error.errno is None:  # in our words already
                raise
            raise unwritten(f"clients' memory in {self.file}", error) from None

    def _grow_file(self, file: Path, slots: int) -> None:
        need = (slots - self.used) * self.row.itemsize  # a disk that is full while a map is written kills the process
        if need > 0 and (room := shutil.disk_usage(file.parent).free) < need:
            raise OSError(
                f"Expected room for {need} more bytes of clients' memory in {file.parent}, got {room}; make room or "
                "choose another disk, then resume."
            )
        if slots > len(self.rows):
            size = max(slots, 2 * len(self.rows)) * self.row.itemsize
            with file.open("ab") as open_file:
                if open_file.tell() < size:
                    open_file.truncate(size)
                else:
                    size = open_file.tell() // self.row.itemsize * self.row.itemsize
            self.rows = np.memmap(file, self.row, "r+", shape=(size // self.row.itemsize,))
        if need > 0:
            reserve(file, self.used * self.row.itemsize, need)


def row_of(leaves: Sequence[tuple[Any, tuple[int, ...]]]) -> np.dtype:
    """The record that one client's leaves, each as (dtype, shape), are in the file; fields "0", "1", ..."""
    return np.dtype([(str(i), dtype, shape) for i, (dtype, shape) in enumerate(leaves)], align=True)


def damaged(file: Path | None, size: int, table: Table) -> str | None:
    """What is wrong with a file's rows of `size` bytes, measured by a table of them; reads them all. None: nothing.

    Raises:
        ValueError: the file is there and cannot be read, which says nothing about the rows.
    """
    if len(table.ids) == 0:
        return None
    need = (int(table.slots.max()) + 1) * size
    if file is None:
        return f"no file has {need} bytes"
    try:
        with file.open("rb") as opened:
            have = opened.seek(0, os.SEEK_END)
            if have < need:
                return f"{file} has {have} of {need} bytes"
            content = np.memmap(opened, np.uint8, "r").reshape(-1)[:need].reshape(-1, size)
    except FileNotFoundError:
        return f"{file} has 0 of {need} bytes"
    except OSError as error:
        raise unreadable(file, error) from None
    for id, slot, expected in zip(table.ids.tolist(), table.slots.tolist(), table.sums.tolist(), strict=True):
        if zlib.crc32(content[slot]) != expected:
            return f"{file}: the row of client {id} differs from its checksum"
    return None


def reserve(file: Path, start: int, count: int) -> None:
    """Takes room on the disk for bytes of a sparse file: free space says nothing of quotas, and others take it, too.

    Raises:
        OSError: there is none.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), start, count)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that know nothing of it
                raise


def grown(array: np.ndarray, count: int) -> np.ndarray:
    """The array itself where it has `count` entries, else a longer one, at least doubled, with zeros behind."""
    if count <= len(array):
        return array
    longer = np.zeros((max(count, 2 * len(array)), *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
