"""Bytes of sums by masks, against the protocol played by toy means: every message is made, and the sum comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest

from fedsim.privacy.masking import KEY, NUMBER, SEAL, SHARE, fails, masked, usual_threshold

GROUP = 2**255 - 19  # Diffie and Hellman modulo a prime: its numbers have 32 bytes
FIELD = 2**256 + 297  # the least prime above 2^256, for Shamir's shares


def pad(seed: bytes, length: int) -> bytes:
    """A toy stream: hashes of a seed and a count."""
    return b"".join(hashlib.sha256(seed + i.to_bytes(4, "little")).digest() for i in range(-(-length // 32)))[:length]


def mask_of(seed: bytes, entries: int, modulus: int) -> np.ndarray:
    words = np.frombuffer(pad(seed, 8 * entries), "<u8")
    return (words % np.uint64(modulus)).astype(np.int64)


def shares_of(secret: int, count: int, threshold: int, rng: np.random.Generator) -> list[int]:
    """Of a polynomial of degree threshold - 1 whose value at zero is the secret, at 1 ... count."""
    factors = [secret, *(int.from_bytes(rng.bytes(32), "little") for _ in range(threshold - 1))]
    return [sum(f * pow(x, i, FIELD) for i, f in enumerate(factors)) % FIELD for x in range(1, count + 1)]


def secret_of(points: dict[int, int]) -> int:
    total = 0
    for x, y in points.items():
        factor = 1
        for other in points:
            if other != x:
                factor = factor * other * pow(other - x, -1, FIELD) % FIELD
        total += y * factor
    return total % FIELD


def packed(numbers: np.ndarray, bits: int) -> bytes:
    return np.packbits((numbers[:, None] >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def unpacked(data: bytes, count: int, bits: int) -> np.ndarray:
    lines = np.unpackbits(np.frombuffer(data, np.uint8))[: count * bits].reshape(count, bits).astype(np.int64)
    return lines @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def played(
    values: np.ndarray, bits: int, threshold: int, dropped: Sequence[int]
) -> tuple[np.ndarray, list[int], list[int]]:
    """Sum of those who do not drop after step 1; bytes up and down, step by step, of client 0, who stays."""
    (n, entries), rng = values.shape, np.random.default_rng(0)
    sum_bits = masked(entries, bits, n, threshold).sum_bits
    modulus, stay = n * (2**bits - 1) + 1, [i for i in range(n) if i not in dropped]
    up, down = [], []

    # 0: two pairs of keys each, one to encrypt with, one for masks
    secrets = [[int.from_bytes(rng.bytes(31), "little") for _ in range(2)] for _ in range(n)]
    publics = [b"".join(pow(2, s, GROUP).to_bytes(32, "little") for s in both) for both in secrets]
    up.append(len(publics[0]))
    down.append(sum(len(i.to_bytes(NUMBER, "little") + publics[i]) for i in range(1, n)))

    def agreed(i: int, j: int, which: int) -> bytes:
        public = int.from_bytes(publics[j][32 * which : 32 * which + 32], "little")
        return hashlib.sha256(pow(public, secrets[i][which], GROUP).to_bytes(32, "little")).digest()

    # 1: shares of the masks' secret and of a seed, encrypted for each other one
    seeds = [rng.bytes(KEY) for _ in range(n)]
    of_key = [shares_of(secrets[i][1], n, threshold, rng) for i in range(n)]
    of_seed = [shares_of(int.from_bytes(seeds[i], "little"), n, threshold, rng) for i in range(n)]

    def sealed(i: int, j: int) -> bytes:
        text = i.to_bytes(NUMBER, "little") + j.to_bytes(NUMBER, "little")
        text += of_key[i][j].to_bytes(SHARE, "little") + of_seed[i][j].to_bytes(SHARE, "little")
        nonce = rng.bytes(12)
        hidden = bytes(a ^ b for a, b in zip(text, pad(agreed(i, j, 0) + nonce, len(text)), strict=True))
        return nonce + hidden + hashlib.sha256(hidden).digest()[: SEAL - 12]

    up.append(sum(len(sealed(0, j)) for j in range(1, n)))
    down.append(sum(len(sealed(j, 0)) for j in range(1, n)))

    # 2: the vector, a mask of its own, and one with each other client that one adds and one subtracts
    def vector(i: int) -> bytes:
        total = values[i] + mask_of(seeds[i], entries, modulus)
        for j in range(n):
            if j != i:
                total = total + (1 if i < j else -1) * mask_of(agreed(i, j, 1), entries, modulus)
        return packed(total % modulus, sum_bits)

    vectors = {i: vector(i) for i in stay}
    up.append(len(vectors[0]))
    down.append(len(np.packbits(np.isin(np.arange(n), stay)).tobytes()))

    # 3: a share for each: seeds of those whose vector came, secret keys of the others
    given = {i: [(of_seed if j in stay else of_key)[j][i].to_bytes(SHARE, "little") for j in range(n)] for i in stay}
    up.append(sum(len(share) for share in given[0]))
    down.append(0)
    total = sum(unpacked(data, entries, sum_bits) for data in vectors.values())
    for j in range(n):
        points = {i + 1: int.from_bytes(given[i][j], "little") for i in stay[:threshold]}
        secret = secret_of(points)
        if j in stay:
            total = total - mask_of(secret.to_bytes(KEY, "little"), entries, modulus)
            continue
        for i in stay:  # the masks that j would have cancelled
            key = pow(int.from_bytes(publics[i][32:], "little"), secret, GROUP).to_bytes(32, "little")
            total = total - (1 if i < j else -1) * mask_of(hashlib.sha256(key).digest(), entries, modulus)
    return total % modulus, up, down


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("dropped", [(), (3,), (1, 4)])
def test_the_sum_comes_out_and_messages_are_as_long_as_priced(bits: int, dropped: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 2**bits, (7, 45))
    values[:, 0] = 2**bits - 1  # the largest sum there is
    found = masked(45, bits, 7)
    total, up, down = played(values, bits, found.threshold, dropped)
    np.testing.assert_array_equal(total, np.delete(values, dropped, axis=0).sum(axis=0))
    assert (tuple(up), tuple(down)) == (found.up, found.down)
    assert found.said()["bytes_up"] == sum(up)


def test_too_few_answers_lose_the_sum() -> None:
    """Threshold 5 of 7: four shares give another secret than five."""
    assert usual_threshold(7) == 5
    assert fails(4, 5) and not fails(5, 5)
    shares = shares_of(12345, 7, 5, np.random.default_rng(0))
    points = {x + 1: shares[x] for x in range(5)}
    assert secret_of(points) == 12345
    points.popitem()
    assert secret_of(points) != 12345


def test_a_masked_entry_has_room_for_the_sum() -> None:
    """16 bits of 64 clients: 22; of 65,536 clients of one bit 17, as all of them together are 2^16."""
    assert masked(10, 16, 64).sum_bits == 22
    assert masked(10, 1, 2**16).sum_bits == 17
    assert masked(1000, 16, 64).up[2] == 2750


@pytest.mark.parametrize(("clients", "threshold"), [(1, None), (8, 4), (8, 9), (8, 0)])
def test_impossible_thresholds_are_refused(clients: int, threshold: int | None) -> None:
    with pytest.raises(ValueError, match=r"Expected .* < threshold="):
        masked(10, 8, clients, threshold)
