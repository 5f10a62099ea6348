"""What the server holds of the training examples, cut off by seed before the others go to clients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsim.config import Data
from fedsim.data.partition.index import Partition
from fedsim.randomness import stream


class Holders(NamedTuple):
    """Who holds which of the training rows; disjoint, each ascending, together all of them."""

    clients: np.ndarray  # what is spread over the clients
    public: np.ndarray  # what the server holds without labels
    shard: np.ndarray  # what the server holds with labels


def holders(options: Data, rows: np.ndarray) -> Holders:
    """The training rows (n,) divided by the shares of the server: a random draw, whatever the labels and the clients.

    A share is round(share * n) rows, at least one of a share above 0. Neither share changes which rows the other has.

    Raises:
        ValueError: no row is left to the clients.
    """
    public, shard = (
        max(1, round(share * len(rows))) if share else 0 for share in (options.public_share, options.server_share)
    )
    if not public and not shard:
        return Holders(rows, rows[:0], rows[:0])
    if public + shard >= len(rows):
        raise ValueError(
            f"Expected public_share={options.public_share} and server_share={options.server_share} to leave at least one of "
            f"{len(rows)} training examples to the clients, not to take {public} and {shard}; lower them."
        )
    mixed = stream(options.seed, "server").permutation(rows)
    parts = np.split(mixed, [shard, len(rows) - public])
    return Holders(clients=np.sort(parts[1]), public=np.sort(parts[2]), shard=np.sort(parts[0]))


def held_apart(options: Data, rows: np.ndarray, partition: Partition) -> Holders:
    """As `holders`, after a look at the clients' partition, which may have been made for other options.

    Raises:
        ValueError: clients own what the options give to the server.
    """
    held = holders(options, rows)
    both = int(np.isin(partition.rows, np.concatenate([held.public, held.shard])).sum())
    if both:
        raise ValueError(
            f"Expected no client to own an example that the server holds by public_share={options.public_share} and "
            f"server_share={options.server_share}, not {both} of them; make the problem with the same shares and seed."
        )
    return held
