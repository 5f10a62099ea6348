"""The plan of a round: which lane runs which client's which batch at which step. NumPy only, cost in the cohort.

Clients differ in size by orders of magnitude, so they are not padded to the longest one. A fixed number of lanes runs
clients one after another (`packing.py` says where), and a step computes no more columns of the batch than it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsim.core import Passes
from fedsim.engine import packing
from fedsim.engine.packing import steps_of
from fedsim.randomness import mix


class Plan(NamedTuple):
    """One exchange, for D devices of L lanes, T steps, batches of B rows, S client slots a device."""

    rows: np.ndarray  # (D, T, L, B), int32: rows of the data set; 0 where there is padding
    count: np.ndarray  # (D, T, L), int32: real rows of the batch, which come first; 0: an empty step
    slot: np.ndarray  # (D, T, L), int32: client slot on its device; S for an idle lane
    step: np.ndarray  # (D, T, L), int32: the client's own step number
    first: np.ndarray  # (D, T, L), bool: the client starts here
    last: np.ndarray  # (D, T, L), bool: the client ends here
    width: np.ndarray  # (D, T), int32: columns of the batch that the step computes, in all lanes; 0 beyond the length
    length: np.ndarray  # (D,), int32: steps that the device has to run
    member: np.ndarray  # (D, S), int32: the slot's place in the cohort; M for an unused slot

    @property
    def occupancy(self) -> tuple[float, float]:
        """Share of lane-steps in use, and share of real rows among all that are computed."""
        used = self.slot < self.member.shape[1]
        lanes = self.slot.shape[2] * int(self.length.max(initial=1)) * self.slot.shape[0]
        computed = self.slot.shape[2] * int(self.width.sum())
        return float(used.sum() / max(lanes, 1)), float(self.count.sum() / max(computed, 1))


def batches(
    ids: np.ndarray, sizes: np.ndarray, passes: Passes, seed: int, round: int, exchange: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every row that the cohort visits: (member, step, column, example within the client), each (R,) int64.

    An epoch visits each example once, in an order that depends on (seed, round, exchange, client, epoch) only; its last batch is
    short. With `passes.steps` epochs follow one another without a seam and every batch is full.
    """
    size = passes.batch_size
    if passes.steps is None:
        epochs = np.full(len(ids), passes.epochs)
    else:
        epochs = -(-passes.steps * size // np.maximum(sizes, 1))
    member = np.repeat(np.arange(len(ids)), sizes * epochs)  # (R,)
    start = np.cumsum(sizes * epochs) - sizes * epochs
    place = np.arange(len(member)) - start[member]
    epoch, example = np.divmod(place, np.maximum(sizes, 1)[member])
    if passes.shuffle:
        # By client and epoch, which stand in order, then by the hash: one key, as sorting by three takes several times as long.
        # What the key leaves out of the hash could change an order only where two of 2^(64 - bits) numbers are equal.
        group = epoch + (np.cumsum(epochs) - epochs)[member]
        bits = np.uint64(int(epochs.sum()).bit_length())
        chance = mix(seed, round, exchange, ids[member], epoch, example)
        example = example[np.argsort(group.astype(np.uint64) << (np.uint64(64) - bits) | chance >> bits, kind="stable")]
    if passes.steps is not None:
        step, column = np.divmod(place, size)
        keep = step < passes.steps
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
) -> Plan:
    """The plan of one exchange.

    Args:
        ids: (M,) clients of the cohort.
        rows, offsets: the partition; client i owns rows[offsets[i]:offsets[i + 1]].
        exchange: which of the round's, from 0.
        limit: (M,) most steps of each client, for those that do not come to their end; None for no limit.
        widths: columns that a step may compute, ascending, the last enough for every batch (`packing.choose_widths`);
            None for whole batches only.
    """
    begin_row = offsets[ids].astype(np.int64)
    sizes = offsets[ids + 1].astype(np.int64) - begin_row
    steps = steps_of(sizes, passes)
    if limit is not None:
        steps = np.minimum(steps, limit)
    slots = -(-max(len(ids), 1) // devices)
    work = packing.work_of(sizes, steps, passes)
    (device, lane, begin), width = packing.pack(work, devices, lanes, widths or (passes.batch_size,))
    spans = work.spans
    length = np.zeros(devices, np.int64)
    np.maximum.at(length, device, begin + spans)
    shape = (devices, width.shape[1], lanes)

    # Slots are numbered per device in the cohort's order.
    by_device = np.argsort(device, kind="stable")
    first_on_device = np.searchsorted(device[by_device], np.arange(devices))
    slot_of = np.empty(len(ids), np.int64)
    slot_of[by_device] = np.arange(len(ids)) - first_on_device[device[by_device]]
    member = np.full((devices, slots), len(ids), np.int32)
    member[device, slot_of] = np.arange(len(ids))

    # Every place that a client holds: its slot and step number, first and last, its real rows.
    who, step = work.who, work.step
    at = (device[who], begin[who] + step, lane[who])
    slot_grid = np.full(shape, slots, np.int32)
    step_grid, count = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    first, last = np.zeros(shape, bool), np.zeros(shape, bool)
    slot_grid[at], step_grid[at], count[at] = slot_of[who], step, work.count
    first[at], last[at] = step == 0, step == spans[who] - 1

    # Every row that a client visits.
    grid = np.zeros((*shape, passes.batch_size), np.int32)
    who, step, column, example = visits = batches(ids, np.where(steps > 0, sizes, 0), passes, seed, round, exchange)
    if limit is not None:
        who, step, column, example = (a[step < steps[who]] for a in visits)
    places = np.ravel_multi_index((device, begin, lane), shape) * passes.batch_size  # flat, of the clients' first rows
    grid.reshape(-1)[places[who] + step * (lanes * passes.batch_size) + column] = rows[begin_row[who] + example]
    return Plan(grid, count, slot_grid, step_grid, first, last, width, length.astype(np.int32), member)
