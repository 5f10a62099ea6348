"""Which client owns which rows: pure functions from rows, labels or keys and a seed to index arrays (docs/partitions.md).

Begin with `index.py`, the type; `labels.py`, `sizes.py` and `keys.py` hold the laws. `server.py` is what the server holds.
"""

from __future__ import annotations

import numpy as np

from fedsim.config import Data
from fedsim.data.dataset import Dataset
from fedsim.data.gate import require_memory
from fedsim.data.partition.index import Partition, split_local
from fedsim.data.partition.keys import domain, natural
from fedsim.data.partition.labels import dirichlet, dirichlet_balanced, dirichlet_pfllib, shards
from fedsim.data.partition.server import Holders, held_apart, holders
from fedsim.data.partition.sizes import iid, quantity

__all__ = [
    "Holders",
    "Partition",
    "dirichlet",
    "dirichlet_balanced",
    "dirichlet_pfllib",
    "domain",
    "held_apart",
    "holders",
    "iid",
    "make",
    "natural",
    "quantity",
    "shards",
    "split_local",
]


def make(options: Data, dataset: Dataset) -> Partition:
    """The partition of the training rows that the config asks for; its local test sets are not cut off yet.

    What the server holds (`holders`) belongs to no client.

    Raises:
        ValueError: a natural key that the set has not, a client that would have fewer examples than `min_size`, or what
            the law itself cannot do.
    """
    rows, all_rows = holders(options, dataset.train).clients, dataset.train
    try:
        return _by_law(options, dataset, rows)
    except ValueError as error:
        if len(rows) < len(all_rows) and _can(options, dataset, all_rows):
            raise ValueError(
                f"{error} The server holds {len(all_rows) - len(rows)} of {len(all_rows)} training examples: lower "
                f"public_share={options.public_share} or server_share={options.server_share}."
            ) from None
        raise


def _can(options: Data, dataset: Dataset, rows: np.ndarray) -> bool:
    """Whether the law has a partition of these rows."""
    try:
        _by_law(options, dataset, rows)
    except ValueError:
        return False
    return True


def _by_law(c: Data, dataset: Dataset, rows: np.ndarray) -> Partition:
    """The partition of these rows that the law makes; raises `ValueError` as `make`."""
    labels = dataset.y[rows]
    if c.clients > len(rows) and c.min_size > 0 and c.partition != "natural":
        raise ValueError(
            f"Expected clients={c.clients} <= {len(rows)} training examples; lower it, or set min_size=0 to allow "
            "empty clients."
        )
    _require_memory(c, len(dataset.classes))
    match c.partition:
        case "iid":
            made = iid(rows, c.clients, c.seed)
        case "dirichlet":
            made = dirichlet(rows, labels, c.clients, c.alpha, c.min_size, c.seed)
        case "dirichlet_balanced":
            made = dirichlet_balanced(rows, labels, c.clients, c.alpha, c.seed)
        case "dirichlet_pfllib":
            made = dirichlet_pfllib(rows, labels, c.clients, c.alpha, c.min_size, c.seed)
        case "shards":
            made = shards(rows, labels, c.clients, c.classes_per_client, c.seed)
        case "quantity":
            made = quantity(rows, c.clients, c.size_law, c.min_size, c.seed)
        case "natural":
            made = natural(rows, _key(c, dataset, "client")[rows], c.clients, c.min_size, c.seed)
        case "domain":
            made = domain(rows, _key(c, dataset, "domain")[rows], c.clients, c.seed)
    smallest = int(made.sizes.argmin())
    if made.sizes[smallest] < c.min_size:
        raise ValueError(
            f"Expected min_size={c.min_size} <= {made.sizes[smallest]}, the examples of client {smallest} of "
            f"partition={c.partition} ({len(rows)} on clients={c.clients}); lower min_size (0 allows empty clients) or clients."
        )
    return made


def _require_memory(c: Data, classes: int) -> None:
    """Refuses sizes that no memory holds before anything of them is allocated; bytes are what a law holds at once, at least."""
    parts = c.clients * (c.classes_per_client if c.partition == "shards" else 1)
    what = f"clients={c.clients}"
    if c.partition == "shards":
        what = f"classes_per_client={c.classes_per_client} x {what}"
    mixtures = 4 * c.clients * classes * (c.partition == "dirichlet_balanced")
    require_memory(40 * parts + mixtures, what, f"lower {'one of them' if c.partition == 'shards' else 'clients'}")


def _key(options: Data, dataset: Dataset, name: str) -> np.ndarray:
    """The natural key of all rows of the data set, (N,); raises `ValueError` where the set has none of that name."""
    if name not in dataset.natural:
        remedy = {
            "client": "name the column that says whose example it is with client_column, or choose another partition.",
            "domain": "choose dirichlet or iid, or a set with domains such as elpv.",
        }
        raise ValueError(
            f"Expected partition={options.partition!r} on a data set with the natural key `{name}`, which {dataset.name} "
            f"has not; {remedy[name]}"
        )
    return dataset.natural[name]
