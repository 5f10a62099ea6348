"""How many lanes a device gets where nobody says it: the number whose plan is cheapest (docs/lanes.md)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from fedsim.core import Passes, Tree
from fedsim.engine import packing

CPU_LANES, ACCELERATOR_LANES = 6, 256  # at most; the first measured (docs/lanes.md), the second a choice
CONVOLUTION_LANES = 1  # at most on a CPU, where clients train whole kernels of a convolution
FLAT = 0.02  # of a plan's cost that fewer lanes may cost more


def own_convolutions(trained: Tree) -> bool:
    """Whether clients train whole kernels of a convolution: over lanes they make a grouped one, slow on a CPU."""
    return any(len(leaf.shape) == 4 for leaf in jax.tree.leaves(trained))


def choose_lanes(
    sizes: np.ndarray,
    passes: Passes,
    devices: int,
    platform: str,
    widths: Sequence[int] | None = None,
    *,
    convolutions: bool = False,
    labels: packing.Labels | None = None,
) -> int:
    """Lanes a device for cohorts with sizes like these (M,): the number whose plan is cheapest by `packing.cost`.

    Lanes beyond (total steps / steps of the longest client) stand idle at the end, so there are no more than that, and
    no more than the platform's most. On a CPU fewer are taken where they cost hardly more: they need less memory. On an
    accelerator no fewer than half of the most are looked at, a step's rows count with what they are padded with, and of
    numbers that cost about the same those that need no padding are taken: multiples of eight with any widths.

    Args:
        widths: as `packing.choose_widths` gives them; None for whole batches.
        convolutions: clients train whole kernels of a convolution.
        labels: of the clients, for passes whose steps are a function of them.
    """
    work = packing.work_of(sizes, packing.steps_of(sizes, passes, labels), passes)
    busy = int(work.spans.sum() // (work.spans.max(initial=1) * devices))
    cpu = platform == "cpu"
    share = CONVOLUTION_LANES if convolutions else -(-CPU_LANES // devices)  # host devices share the cores
    most = max(1, min(busy, share if cpu else ACCELERATOR_LANES))
    tile, widths = packing.row_tile(platform), widths or (passes.batch_size,)
    eighths = [-(-most * k // 8) for k in range(4, 9)]
    tiled = [lanes // tile * tile for lanes in eighths]
    tried = range(1, most + 1) if cpu else sorted({n for n in (*eighths, *tiled) if n >= eighths[0]})
    costs = {lanes: packing.cost(packing.pack(work, devices, lanes, widths)[1], lanes, tile) for lanes in tried}
    near = [lanes for lanes in tried if costs[lanes] <= (1 + FLAT) * min(costs.values())]
    if cpu:
        return min(near)
    padded = {lanes: any(lanes * width % tile for width in widths) for lanes in near}
    return min(near, key=lambda lanes: (padded[lanes], costs[lanes], -lanes))
