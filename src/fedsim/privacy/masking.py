"""Bytes of sums by masks: what a published protocol sends so that a server reads no single message. Arithmetic alone.

Bonawitz et al. 2017 (Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS, figure 4, the variant for servers
that keep to the protocol). **Nothing is protected here**: no key is agreed on, no mask is added, no run is changed by it.

The four steps, n clients at the start:
0. each sends two public keys; the server passes on those of all others;
1. each sends every other one, through the server, an encrypted share of its secret key and of its mask's seed;
2. each sends its masked vector: whole numbers modulo R, where R - 1 is the largest sum; the server says who did;
3. each sends a share for every client of step 1: of the seed of whoever sent a vector, of the secret key of whoever did not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

KEY = 32  # bytes of a public key, of a secret one and of a seed: X25519, SHA-256
SHARE = 33  # of a secret of 256 bits, over a prime field just above 2^256
NUMBER = 4  # of a client's number
SEAL = 28  # of an encrypted text beside the text: nonce and tag of AES-GCM
SEALED = 2 * NUMBER + 2 * SHARE + SEAL  # who from, who to, both shares


class Masked(NamedTuple):
    """Bytes of a client that stays to the end, in one round; payloads, as all prices of the project."""

    up: tuple[int, int, int, int]  # by step
    down: tuple[int, int, int, int]
    value_bits: int  # of an entry, before the sum
    sum_bits: int  # of an entry modulo R
    threshold: int  # clients that have to answer in step 3

    def said(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "bytes_up": sum(self.up), "bytes_down": sum(self.down)}


def usual_threshold(clients: int) -> int:
    """More than two thirds."""
    return 2 * clients // 3 + 1


def masked(entries: int, value_bits: int, clients: int, threshold: int | None = None) -> Masked:
    """What sums by masks send in place of `entries` numbers of a client.

    Args:
        value_bits: of an entry as a whole number, from 0.
        clients: that begin the round.
        threshold: (default: more than two thirds of them).

    Raises:
        ValueError: a threshold with which a single answer is not hidden, or that cannot be reached.
    """
    threshold = usual_threshold(clients) if threshold is None else threshold
    if not clients // 2 < threshold <= clients or clients < 2:
        raise ValueError(
            f"Expected {clients} / 2 < threshold={threshold} <= clients={clients}, and two clients at least: with fewer, two parts "
            f"of them could be asked for shares of both kinds; give {usual_threshold(max(clients, 2))}."
        )
    sum_bits = (clients * (2**value_bits - 1)).bit_length()
    others = clients - 1
    up = 2 * KEY, others * SEALED, -(-entries * sum_bits // 8), clients * SHARE
    # What is passed on says whose it is; who sent a vector is a bit each. The sum itself travels as the next round's message.
    down = others * (NUMBER + 2 * KEY), others * SEALED, -(-clients // 8), 0
    return Masked(up, down, value_bits, sum_bits, threshold)


def fails(reported: int, threshold: int) -> bool:
    """Whether the sum of a round is lost, as too few answer in step 3 (here: those whose vector came)."""
    return reported < threshold
