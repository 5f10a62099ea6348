"""Quantisers: every entry as one of a few levels between or around scales of its leaf, or of a row of it."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs.chains import closed
from fedsim.wire.codecs.form import Codec, check, check_flag
from fedsim.wire.codecs.levels import by_levels, power_above, rounded, table

NF4 = np.array([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def quantise(bits: int = 8, block: int = 0) -> Codec:
    """The nearest of 2^bits equal steps from least to largest of a leaf, or of a block of it.

    Least and step travel as float32.

    Guarantees: an error of at most half a step, beside float32's own rounding.
    """
    check("bits", bits, int, 1, 16, "give quantise(8)")
    check_block(block, f"quantise({bits}, 512)")
    top = 2**bits - 1

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        there = live.any(axis=1, keepdims=True)
        low = jnp.min(rows, axis=1, keepdims=True, initial=jnp.inf, where=live)
        high = jnp.max(rows, axis=1, keepdims=True, initial=-jnp.inf, where=live)
        low, high = (jnp.where(there, end, 0.0) for end in (low, high))  # nothing travels
        step = (high - low) / top
        return (low, step), jnp.clip(jnp.round((rows - low) / jnp.where(step > 0, step, 1.0)), 0, top)

    def decode(xp: Any, level: Any, low: Any, step: Any) -> Any:
        return low + rounded(xp, level.astype(xp.float32) * step)

    return by_levels(called("quantise", bits, block), bits, choose, decode, scales=2, block=block)


def qsgd(bits: int = 8, block: int = 512) -> Codec:
    """Sign and a random one of the two nearest equal steps up to the norm of a block; unbiased.

    Alistarh et al., arXiv 1610.02132, section 3.1: s = 2^(bits-1) - 1 steps for blocks of 512 entries (0: the leaf), with levels
    of a fixed number of bits in place of Elias codes. The norm divided by s travels as float32.

    Guarantees: unbiased; E|error|^2 <= min(d / s^2, sqrt(d) / s) |x|^2 for rows of d entries (lemma 3.1).
    """
    check("bits", bits, int, 2, 16, "give qsgd(8)")
    check_block(block, f"qsgd({bits}, 512)")
    top = 2 ** (bits - 1) - 1

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        unit = norm(rows, live) / top
        share = jnp.abs(rows) / jnp.where(unit > 0, unit, 1.0)
        below = jnp.floor(share)
        up = jax.random.uniform(key, rows.shape) < share - below
        size = jnp.clip(jnp.where(up, below + 1, below), 0, top)
        return (unit,), jnp.where(rows < 0, size + (top + 1), size)

    def decode(xp: Any, level: Any, unit: Any) -> Any:
        size = (level & top).astype(xp.float32)
        return xp.where(level > top, -size, size) * unit

    made = by_levels(called("qsgd", bits, block, 512), bits, choose, decode, block=block)
    return made._replace(overshoots=not block or min(block / top**2, math.sqrt(block) / top) >= 1)


def terngrad(clip: float = 2.5, block: int = 0) -> Codec:
    """A random one of -1, 0 and 1 times the largest, after clipping at 2.5 standard deviations.

    Wen et al., arXiv 1705.07878, section 3, with its clipping by layer; clip=0 clips nothing. Two bits each, the
    largest as float32.

    Guarantees: unbiased for the clipped entries; for all where clip=0.
    """
    check("clip", clip, float, 0, 1e6, "give terngrad(2.5), or terngrad(0) for none")
    check_block(block, f"terngrad({clip}, 512)")

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        if clip:
            count = jnp.maximum(live.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
            mean = jnp.sum(rows, axis=1, keepdims=True, where=live) / count
            deviation = jnp.sqrt(jnp.sum((rows - mean) ** 2, axis=1, keepdims=True, where=live) / count)
            # A constant leaf has no deviation, and nothing to clip.
            rows = jnp.where(deviation > 0, jnp.clip(rows, -clip * deviation, clip * deviation), rows)
        largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0.0, where=live)
        there = jax.random.uniform(key, rows.shape) < jnp.abs(rows) / jnp.where(largest > 0, largest, 1.0)
        return (largest,), jnp.where(there, jnp.where(rows < 0, 2, 1), 0)

    def decode(xp: Any, level: Any, largest: Any) -> Any:
        return table(xp, np.array([0.0, 1.0, -1.0, 0.0]), level) * largest

    name = "terngrad" if (clip, block) == (2.5, 0) else f"terngrad({clip}, {block})"
    return by_levels(name, 2, choose, decode, block=block, on_values=False)._replace(overshoots=True)


def sign(block: int = 0, feedback: bool = False) -> Codec:
    """One bit: the sign times the mean size of a leaf, or of a block; the error may be kept.

    Bernstein et al., arXiv 1802.04434; with feedback algorithm 1 of Karimireddy et al., arXiv 1901.09847, with its scale
    |x|_1 / d. Zero is positive.

    Guarantees: |error|^2 = |x|^2 - |x|_1^2 / d, the least that a sign with a scale can have.
    """
    check_block(block, "sign(512)")
    check_flag("feedback", feedback, "sign(feedback=True)")

    def scale(rows: Array, live: Array) -> Array:
        count = jnp.maximum(live.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
        return jnp.sum(jnp.abs(rows), axis=1, keepdims=True, where=live) / count

    options = [str(block)] * bool(block) + ["feedback=True"] * feedback
    name = f"sign({', '.join(options)})" if options else "sign"
    return closed(signs(name, scale, block), feedback)


def signs(name: str, scale: Any, block: int) -> Codec:
    """Signs with a scale by row: (rows, live) -> (R, 1)."""

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        return (scale(rows, live),), jnp.where(rows < 0, 1, 0)

    def decode(xp: Any, level: Any, size: Any) -> Any:
        return table(xp, np.array([1.0, -1.0]), level) * size

    return by_levels(name, 1, choose, decode, block=block, on_values=False)


def nf4(block: int = 64) -> Codec:
    """4 bits: the nearest of sixteen quantiles of a normal, times the largest of a block.

    Dettmers et al., arXiv 2305.14314, section 3 and appendix E.

    Guarantees: an error of at most 0.152 of the row's largest, half of the widest gap.
    """
    check("block", block, int, 1, 2**20, "give nf4(64)")
    between = (NF4[1:] + NF4[:-1]) / 2

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0.0, where=live)
        return (largest,), nearest_of(between, rows / jnp.where(largest > 0, largest, 1.0))

    def decode(xp: Any, level: Any, largest: Any) -> Any:
        return table(xp, NF4, level) * largest

    return by_levels(f"nf4({block})" if block != 64 else "nf4", 4, choose, decode, block=block)


def nnadq(beta: float = 0.01) -> Codec:
    """As many equal steps as a leaf's range is worth at beta, the price of a bit (FedOBD).

    Chen et al., arXiv 2208.05174, of the authors' code: entries are centred by o, and their size is one of s + 1 equal steps up
    to d, s = floor(max(1, sqrt(32 d ln 4 / beta))), and 2^15 - 1 at most. o, d / s and s travel as float32; an entry
    takes bit_length(s) bits and, unlike in the paper's count, its sign; nothing where the leaf is constant.

    Guarantees: an error of at most d / 2s beside float32's own rounding; a constant leaf arrives as it is.
    """
    check("beta", beta, float, 0, 1e6, "give nnadq(0.01)", open_=True)

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        there = live.any(axis=1, keepdims=True)
        low = jnp.min(rows, axis=1, keepdims=True, initial=jnp.inf, where=live)
        high = jnp.max(rows, axis=1, keepdims=True, initial=-jnp.inf, where=live)
        low, high = (jnp.where(there, end, 0.0) for end in (low, high))
        centre = low + (high - low) / 2
        size = jnp.maximum(high - centre, centre - low)
        steps = jnp.floor(jnp.clip(jnp.sqrt(size * (32 * math.log(4.0) / beta)), 1.0, 2**15 - 1))
        steps = jnp.where(size > 0, steps, 0.0)
        unit = size / jnp.maximum(steps, 1.0)
        level = jnp.round((rows - centre) / jnp.where(unit > 0, unit, 1.0))
        return (centre, unit, steps), jnp.clip(level, -steps, steps) + steps

    def decode(xp: Any, level: Any, centre: Any, unit: Any, steps: Any) -> Any:
        return centre + rounded(xp, (level.astype(xp.float32) - steps) * unit)

    def bits(xp: Any, centre: Any, unit: Any, steps: Any) -> Any:
        length = (steps >= 2.0 ** np.arange(15, dtype=np.float32)).sum()  # of `steps` as a whole number
        return xp.where(steps > 0, length + 1, 0)

    return by_levels("nnadq" if beta == 0.01 else f"nnadq({beta})", bits, choose, decode, scales=3)


def lloyd(name: str, bits: int, block: int) -> Codec:
    """The nearest of 2^bits centroids of a normal distribution, with the scale that makes EDEN unbiased, by row."""
    centroids = lloyd_max(bits)
    between = (centroids[1:] + centroids[:-1]) / 2

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        count = jnp.maximum(live.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
        length = norm(rows, live)
        level = nearest_of(between, rows * (jnp.sqrt(count) / jnp.where(length > 0, length, 1.0)))
        along = jnp.sum(table(jnp, centroids, level) * rows, axis=1, keepdims=True, where=live)
        return (length**2 / jnp.where(along > 0, along, 1.0),), level

    def decode(xp: Any, level: Any, scale: Any) -> Any:
        return table(xp, centroids, level) * scale

    return by_levels(name, bits, choose, decode, block=block)


@functools.cache
def lloyd_max(bits: int) -> np.ndarray:
    """The 2^bits levels that quantise a standard normal with the least mean squared error, ascending (Lloyd, Max)."""
    normal, count = NormalDist(), 2**bits
    points = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(100_000):
        ends = [-math.inf, *((points[1:] + points[:-1]) / 2), math.inf]
        density = np.array([normal.pdf(e) if math.isfinite(e) else 0.0 for e in ends])
        mass = np.diff([normal.cdf(e) if math.isfinite(e) else float(e > 0) for e in ends])
        moved = (density[:-1] - density[1:]) / mass  # the mean of the normal between two ends
        moved = (moved - moved[::-1]) / 2
        if np.abs(moved - points).max() < 1e-10:
            break
        points = moved
    return points


def nearest_of(between: np.ndarray, values: Array) -> Array:
    """How many of the bounds, ascending, a value is above: the number of its level."""
    return sum(((values > float(bound)).astype(jnp.int32) for bound in between), jnp.zeros(values.shape, jnp.int32))


def norm(rows: Array, live: Array) -> Array:
    """The 2-norm of each row, (R, 1), without overflow."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0.0, where=live)
    some = power_above(largest)
    return jnp.sqrt(jnp.sum((rows / some) ** 2, axis=1, keepdims=True, where=live)) * some


def check_block(block: int, remedy: str) -> None:
    """Raises `ValueError` for a length of rows that is none."""
    check("block", block, int, 0, 2**30, f"0 is the whole leaf; give {remedy}")


def called(name: str, bits: int, block: int, usual: int = 0) -> str:
    """How a codec of that many bits and rows is written."""
    return f"{name}({bits})" if block == usual else f"{name}({bits}, {block})"
