"""What FedPCL sends by the number of clients: the downlink grows with it, and FedAvg of the same block does not.

Command:  python benchmarks/tables.py fed_pcl --table downlink          (--json for programs)
Needs:    no weights, no data: messages are made of zeros, marked and priced as a run does.
Time:     seconds.
Result:   docs/algorithms/fed_pcl.md has the table. Ten classes, prototypes of 256 float32: with five clients the downlink is 4 % of
          FedAvg's, from 154 clients on it is more than FedAvg's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from fedsim import wire
from fedsim.algorithms.prototypes import sent

CLIENTS = (5, 10, 20, 40, 80, 153, 154, 300)
CLASSES, WIDTH, FEATURES = 10, 256, 3 * 512  # as in the authors' code: three ResNet-18
BLOCK = FEATURES * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES  # what FedAvg sends of it, with the decision layer


def priced(message: Any) -> int:
    """Bytes of a message to one client."""
    return sum(wire.price(wire.depart(None, message, jax.random.key(0))).values())


def rows() -> list[dict[str, Any]]:
    """A row for each number of clients, all of whom have all classes; bytes of one client and round."""
    mean = sent(jnp.zeros((CLASSES, WIDTH)), jnp.ones(CLASSES, bool))
    found = []
    for m in CLIENTS:
        sets = sent(jnp.zeros((m, CLASSES, WIDTH)), jnp.ones((m, CLASSES), bool))
        down = priced({"sets": sets, "mean": mean})
        row = {"clients": m, "up": priced(mean), "down": down, "down_mean_alone": priced({"mean": mean})}
        found.append({**row, "fed_avg": 4 * BLOCK, "ratio": down / (4 * BLOCK)})
    return found


def tables(found: Sequence[dict[str, Any]]) -> list[Table]:
    """For people."""
    table = Table(box=box.SIMPLE, title="Bytes of one client and round")
    for name in ("clients", "up", "down", "down, mean alone", "FedAvg, each way", "down / FedAvg's"):
        table.add_column(name, justify="right")
    for row in found:
        numbers = (row[key] for key in ("clients", "up", "down", "down_mean_alone", "fed_avg"))
        table.add_row(*(f"{number:,}" for number in numbers), f"{row['ratio']:.2f}")
    return [table]
