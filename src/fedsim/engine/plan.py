"""The plan of a round: which lane runs which client's which batch at which step. NumPy only, cost in the cohort.

Clients differ in size by orders of magnitude, so they are not padded to the longest one. A fixed number of lanes runs
clients one after another (`packing.py` says where), and a step computes no more columns of the batch than it needs.
Rows that clients choose for themselves (`Passes.rows`) are made a segment of the plan at a time, the rest at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fedsim import randomness
from fedsim.core import Passes
from fedsim.engine import packing
from fedsim.engine.packing import Labels, Places, steps_of
from fedsim.randomness import mix


class Plan(NamedTuple):
    """One exchange, for D devices of L lanes, T steps, batches of B rows, S client slots a device."""

    rows: np.ndarray  # (D, T, L, B), int32: rows of the data set; -1 for none; of own rows all -1, see `segment`
    count: np.ndarray  # (D, T, L), int32: rows of the batch, which come first but among own rows
    live: np.ndarray  # (D, T, L), bool: the client takes a step, with rows or, where it chooses them, without any
    slot: np.ndarray  # (D, T, L), int32: client slot on its device; S for an idle lane
    step: np.ndarray  # (D, T, L), int32: the client's own step number
    first: np.ndarray  # (D, T, L), bool: the client starts here
    last: np.ndarray  # (D, T, L), bool: the client ends here
    width: np.ndarray  # (D, T), int32: columns of the batch that the step computes, in all lanes; 0 beyond the length
    length: np.ndarray  # (D,), int32: steps that the device has to run
    member: np.ndarray  # (D, S), int32: the slot's place in the cohort; M for an unused slot
    own: OwnRows | None = None  # where clients choose their rows; these and their `count` are known by segments

    def segment(self, start: int, steps: int) -> np.ndarray:
        """Rows of the data set of the steps from `start` on, (D, steps, L, B) int32; -1 for none, also beyond T.

        Own rows are read one segment after the other, and from the beginning again at start 0.

        Raises:
            ValueError: a client's own rows are not what `Passes.rows` should give; it names the client and the step.
        """
        if self.own is not None:
            return self.own.segment(start, steps, self.count)
        part = self.rows[:, start : start + steps]
        return np.pad(part, ((0, 0), (0, steps - part.shape[1]), (0, 0), (0, 0)), constant_values=-1)

    @property
    def holes(self) -> bool:
        """Whether a batch may have a hole before a row, so that `count` does not say where its rows are."""
        return self.own is not None

    @property
    def examples(self) -> int:
        """Rows that all clients visit together; of own rows those of the segments made so far."""
        return int(self.count.sum())

    @property
    def occupancy(self) -> tuple[float, float]:
        """Share of lane-steps in use, and share of real rows among all that are computed (`examples` of them)."""
        used = self.slot < self.member.shape[1]
        lanes = self.slot.shape[2] * int(self.length.max(initial=1)) * self.slot.shape[0]
        computed = self.slot.shape[2] * int(self.width.sum())
        return float(used.sum() / max(lanes, 1)), float(self.count.sum() / max(computed, 1))


class OwnRows:
    """Rows that K clients choose for themselves, each client's read as its steps come: no grid of them lies here.

    Args:
        opened: client, by its place -> its rows of the data set from its first step on, (B,) each.
        at, steps: where each client runs, and for how many steps; (K,).
        shape: (D, T, L, B) of the plan.
    """

    def __init__(
        self, opened: Callable[[int], Iterator[np.ndarray]], at: Places, steps: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        self.opened, self.at, self.end, self.shape = opened, at, at.begin + steps, shape
        self.running: dict[int, Iterator[np.ndarray]] = {}
        self.next = 0  # the step at which the next segment begins

    def segment(self, start: int, steps: int, count: np.ndarray) -> np.ndarray:
        """As `Plan.segment`; writes how many rows each batch has to `count` (D, T, L)."""
        if start == 0:
            self.running, self.next = {}, 0
        if start != self.next:
            raise ValueError(f"Expected the next segment of own rows, from step {self.next} on, or 0, not {start}.")
        devices, _, lanes, size = self.shape
        rows = np.full((devices, steps, lanes, size), -1, np.int32)
        device, lane, begin = self.at
        for i in np.flatnonzero((begin < start + steps) & (self.end > start) & (begin < self.end)).tolist():
            low, high = max(int(begin[i]), start), min(int(self.end[i]), start + steps)
            visits = self.running.pop(i, None) or self.opened(i)
            found = np.stack(list(islice(visits, high - low)))
            rows[device[i], low - start : high - start, lane[i]] = found
            count[device[i], low:high, lane[i]] = (found >= 0).sum(axis=1)
            if high < self.end[i]:
                self.running[i] = visits
        self.next = start + steps
        return rows


def own_steps(
    client: int,
    labels: np.ndarray,
    steps: int,
    passes: Passes,
    seed: int,
    round: int,
    exchange: int = 0,
    stream: str | None = None,
) -> Iterator[np.ndarray]:
    """What a client of own rows visits, step by step: (B,) int32 of its examples 0..n - 1, -1 for a hole.

    Depends on (seed, round, stream, exchange, client) and the labels (n,) only. Blocks are read, and checked, as they
    are needed.

    Raises:
        ValueError: fewer steps than `steps`, another batch size, what is no index of the client's examples.
    """
    stream = passes.stream if stream is None else stream
    assert passes.rows is not None
    found = passes.rows(labels, randomness.stream(seed, f"rows {stream} {round} {exchange} {client}"))
    if not isinstance(found, Iterator):
        raise ValueError(
            f"Expected Passes.rows of client {client} to give an iterator of blocks (k, {passes.batch_size}), got "
            f"{type(found).__name__}; yield the blocks, or return iter([block])."
        )
    step = 0
    while step < steps:
        try:
            block = _checked(next(found), client, step, len(labels), passes.batch_size)
        except StopIteration:
            raise ValueError(
                f"Expected Passes.rows of client {client} to give at least {steps} steps, which Passes.steps asks for, "
                f"got {step}; yield further blocks, or ask for fewer steps."
            ) from None
        yield from block[: steps - step]
        step += len(block)


def _checked(block: Any, client: int, step: int, n: int, size: int) -> np.ndarray:
    """A block as (k, B) int32, a copy: its maker may go on writing to it. Raises `ValueError` as `own_steps` says."""
    try:
        block, form = np.asarray(block), ""
    except ValueError:
        block, form = np.zeros((0, size)), "rows of different lengths"
    if block.ndim != 2 or block.shape[1] != size or not len(block) or block.dtype.kind not in "iu":
        raise ValueError(
            f"Expected Passes.rows of client {client} to give blocks of integers (k, {size}), k >= 1 batches, got "
            f"{form or f'{block.dtype} {block.shape}'} at step {step}; yield for example order.reshape(-1, {size}), "
            "and -1 where there is no example."
        )
    wrong = (block < -1) | (block >= n)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        known = f"0 to {n - 1} for its {n} examples" if n else "no index, as it has no examples"
        raise ValueError(
            f"Expected Passes.rows of client {client} to give {known}, or -1 for a hole, got {block[row, column]} at "
            f"step {step + row}, column {column}; indices count the client's own examples, as its labels do."
        )
    return block.astype(np.int32)


def batches(
    ids: np.ndarray,
    sizes: np.ndarray,
    passes: Passes,
    seed: int,
    round: int,
    exchange: int = 0,
    stream: str | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every row that the cohort visits: (member, step, column, example within the client), each (R,) int64.

    An epoch visits each example once, in an order that depends on (seed, round, stream, exchange, client, epoch) only;
    its last batch is short. With `passes.steps` epochs follow one another without a seam and every batch is full.
    """
    size, steps = passes.batch_size, passes.steps
    if passes.rows is not None or callable(steps):
        raise ValueError("Expected passes without rows of their own; `own_steps` gives those, client by client.")
    if steps is None:
        epochs = np.full(len(ids), passes.epochs)
    else:
        epochs = -(-steps * size // np.maximum(sizes, 1))
    member = np.repeat(np.arange(len(ids)), sizes * epochs)  # (R,)
    start = np.cumsum(sizes * epochs) - sizes * epochs
    place = np.arange(len(member)) - start[member]
    epoch, example = np.divmod(place, np.maximum(sizes, 1)[member])
    if passes.shuffle:
        # By client and epoch, which stand in order, then by the hash: one key, as sorting by three takes several times as long.
        # What the key leaves out of the hash could change an order only where two of 2^(64 - bits) numbers are equal.
        group = epoch + (np.cumsum(epochs) - epochs)[member]
        bits = np.uint64(int(epochs.sum()).bit_length())
        stream = passes.stream if stream is None else stream
        named = (zlib.crc32(stream.encode()),) if stream else ()
        chance = mix(seed, round, *named, exchange, ids[member], epoch, example)
        example = example[np.argsort(group.astype(np.uint64) << (np.uint64(64) - bits) | chance >> bits, kind="stable")]
    if steps is not None:
        step, column = np.divmod(place, size)
        keep = step < steps
        return member[keep], step[keep], column[keep], example[keep]
    per_epoch = -(-sizes // size)
    step, column = np.divmod(place - epoch * sizes[member], size)
    return member, step + epoch * per_epoch[member], column, example


def make(
    ids: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    passes: Passes,
    seed: int,
    round: int,
    devices: int,
    lanes: int,
    exchange: int = 0,
    limit: np.ndarray | None = None,
    widths: Sequence[int] | None = None,
    *,
    stream: str | None = None,
    members: int | None = None,
    places: np.ndarray | None = None,
    labels: Labels | None = None,
) -> Plan:
    """The plan of one exchange.

    Args:
        ids: (K,) clients of the cohort; there may be none.
        rows, offsets: the partition; client i owns rows[offsets[i]:offsets[i + 1]].
        exchange: which of the round's in this stream, from 0.
        limit: (K,) most steps of each client, for those that do not come to their end; None for no limit.
        widths: columns that a step may compute, ascending, the last enough for every batch (`packing.choose_widths`);
            None for whole batches only.
        stream: in place of `passes.stream`, the name of the randomness.
        members: the cohort's size M, nobodies included; None for K. It alone says how many slots there are.
        places: (K,) the clients' places in the cohort, ascending; None for the first K.
        labels: place in `ids` -> the client's labels; looked at only where `passes.rows` is set.

    Raises:
        ValueError: `passes.rows` and `passes.steps` do not fit together, or a client's steps are no whole number.
    """
    begin_row = offsets[ids].astype(np.int64)
    sizes = offsets[ids + 1].astype(np.int64) - begin_row
    steps = steps_of(sizes, passes, labels, ids)
    if limit is not None:
        steps = np.minimum(steps, limit)
    work = packing.work_of(sizes, steps, passes)
    at, width = packing.pack(work, devices, lanes, widths or (passes.batch_size,))
    length = np.zeros(devices, np.int64)
    np.maximum.at(length, at.device, at.begin + work.spans)
    slot_of, member = _slots(at.device, devices, len(ids) if members is None else members, places)

    # Every place that a client holds: its slot and step number, first and last, whether it takes a step.
    who, step, shape = work.who, work.step, (devices, width.shape[1], lanes)
    held = (at.device[who], at.begin[who] + step, at.lane[who])
    slot, number = np.full(shape, member.shape[1], np.int32), np.zeros(shape, np.int32)
    first, last, live = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    slot[held], number[held], live[held] = slot_of[who], step, step < steps[who]
    first[held], last[held] = step == 0, step == work.spans[who] - 1

    # Every row that a client visits, or how it will be found.
    count, size, draw = np.zeros(shape, np.int32), passes.batch_size, (passes, seed, round, exchange, stream)
    if passes.rows is None:
        count[held] = work.count
        grid, own = np.full((*shape, size), -1, np.int32), None
        who, step, column, example = visits = batches(ids, np.where(steps > 0, sizes, 0), *draw)
        if limit is not None:
            who, step, column, example = (a[step < steps[who]] for a in visits)
        start = np.ravel_multi_index((at.device, at.begin, at.lane), shape) * size  # flat, of the clients' first rows
        grid.reshape(-1)[start[who] + step * (lanes * size) + column] = rows[begin_row[who] + example]
    else:
        look = labels or packing.no_labels

        def opened(i: int) -> Iterator[np.ndarray]:
            known = look(i)
            if len(known) != sizes[i]:
                raise ValueError(f"Expected {sizes[i]} labels, one an example, of client {ids[i]}, got {len(known)}.")
            owned = np.append(rows[begin_row[i] + np.arange(sizes[i])], np.int32(-1))  # a hole, -1, finds the last
            return (owned[examples] for examples in own_steps(int(ids[i]), known, int(steps[i]), *draw))

        grid = np.broadcast_to(np.int32(-1), (*shape, size))  # takes no memory
        own = OwnRows(opened, at, steps, grid.shape)
    return Plan(grid, count, live, slot, number, first, last, width, length.astype(np.int32), member, own)


def _slots(device: np.ndarray, devices: int, members: int, places: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Client slots, numbered per device in the cohort's order: of each client (K,), and whose each is (D, S)."""
    clients = len(device)
    places = np.arange(clients) if places is None else places
    by_device = np.argsort(device, kind="stable")
    first_on_device = np.searchsorted(device[by_device], np.arange(devices))
    slot_of = np.empty(clients, np.int64)
    slot_of[by_device] = np.arange(clients) - first_on_device[device[by_device]]
    member = np.full((devices, -(-max(members, 1) // devices)), members, np.int32)
    member[device, slot_of] = places
    return slot_of, member
