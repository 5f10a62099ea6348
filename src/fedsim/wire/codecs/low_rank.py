"""Codecs that send two thin factors, or one and a seed, in place of a matrix.

A leaf (..., m) is a matrix of n rows and m columns. What has no two axes, or would cost as much as factors, goes on as it is.
Factors may be rounded by a codec behind: powersgd(4)+quantise(8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedsim.wire.codecs.chains import closed
from fedsim.wire.codecs.form import (
    Codec,
    Coded,
    Read,
    Sent,
    Write,
    check,
    check_flag,
    filled,
    key_read,
    key_written,
    nbytes,
    noted,
    random_signs,
    travelling,
)
from fedsim.wire.codecs.levels import rounded
from fedsim.wire.prices import Tree

Factor = Callable[[Array, Array, Any], tuple[Array, Array, Any]]
"""(matrix (n, m), key, what was kept) -> left (n, r), right (m, r), what is kept."""


def powersgd(rank: int = 4) -> Codec:
    """Two factors, by one power iteration from the last ones; the rest is kept.

    Vogels et al., arXiv 1905.13727, algorithms 1 and 2: P = M Q orthonormalised, Q = M^T P; both travel, scaled alike, and Q
    starts the next iteration. There P is averaged over workers before Q is computed; here clients do it each by themselves.

    Guarantees: what arrives and what is kept add up to the change and what was kept before, up to rounding.
    """
    check("rank", rank, int, 1, 64, "give powersgd(4)")

    def init(key: Array, shapes: Mapping[str, Any]) -> dict[str, Array]:
        large = [name for name, leaf in shapes.items() if split(leaf.shape, rank)]
        keys = jax.random.split(key, max(len(large), 1))
        return {n: jax.random.normal(k, (matrix(shapes[n].shape)[1], rank)) for n, k in zip(large, keys, strict=False)}

    def factor(value: Array, key: Array, kept: Any) -> tuple[Array, Array, Any]:
        kept = jax.random.normal(key, (value.shape[1], rank)) if kept is None else kept
        left, _ = orthonormal(times(value, kept))
        right = times(value.T, left)
        return left, right, jnp.where((right != 0).any(axis=0), right, kept)  # from zero nothing would start

    return factored(f"powersgd({rank})", rank, factor, init=init, remembers=True)


def low_rank(rank: int = 4, feedback: bool = False) -> Codec:
    """Two factors, nearly the best of that rank; the rest may be kept.

    Subspace iteration, sixteen times (Halko et al., arXiv 0909.4061, section 4.5), from a fixed start.

    Guarantees: |error|^2 is near the sum of the squared singular values behind the first, the least that there is, and the
    nearer the more they fall.
    """
    check("rank", rank, int, 1, 64, "give low_rank(4)")
    check_flag("feedback", feedback, "low_rank(4, feedback=True)")

    def factor(value: Array, key: Array, kept: Any) -> tuple[Array, Array, Any]:
        def turn(_: int, right: Array) -> Array:
            return orthonormal(times(value.T, times(value, right)))[0]

        right = lax.fori_loop(0, 16, turn, jax.random.normal(jax.random.key(0), (value.shape[1], rank)))
        return times(value, right), right, kept

    name = f"low_rank({rank}, feedback=True)" if feedback else f"low_rank({rank})"
    return factored(name, rank, factor, remembers=feedback)


def sketch(rank: int = 4, feedback: bool = False) -> Codec:
    """One factor, and a seed in place of the other, random one; unbiased, or the rest is kept.

    M (n, m) arrives as A B with random signs A (n, r) and B = A^T M / r; with feedback B is that of least squares, and the rest
    is kept for the next time. The low-rank updates of Konecny et al., arXiv 1610.05492, made after training.

    Guarantees: unbiased, E|error|^2 = (n - 1) / r |M|^2; with feedback a projection, so |error| <= |M|.
    """
    check("rank", rank, int, 1, 64, "give sketch(4)")
    check_flag("feedback", feedback, "sketch(4, feedback=True)")

    def factor(value: Array, key: Array, kept: Any) -> tuple[Array, Array, Any]:
        left = random_signs(key, (len(value), rank))
        right = times(value.T, left)
        if feedback:
            _, by = orthonormal(left)
            return left, times(right, times(by, by.T)), kept  # left @ by is orthonormal
        return left, right / rank, kept

    name = f"sketch({rank}, feedback=True)" if feedback else f"sketch({rank})"
    return factored(name, rank, factor, remembers=feedback, seed=True)


def factored(
    name: str,
    rank: int,
    factor: Factor,
    init: Callable[[Array, Mapping[str, Any]], Tree] = lambda key, shapes: (),
    remembers: bool = False,
    seed: bool = False,
) -> Codec:
    """A codec of factors.

    Args:
        seed: the left factor is `random_signs` of the client's key and does not travel.
    """

    def large(coded: Coded) -> dict[str, int]:
        """The leaves that are factored, with their numbers."""
        return {n: number for number, (n, s) in enumerate(coded.items()) if split(np.shape(s.value), rank, seed)}

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        given, kept = {n: sent for n, sent in coded.items() if n not in large(coded)}, {}
        for leaf, number in large(coded).items():
            value = coded[leaf].value.astype(jnp.float32).reshape(matrix(coded[leaf].value.shape))
            finite = jnp.isfinite(value).all()
            start = state[leaf] if state else None
            own = jax.random.fold_in(key, number)
            left, right, kept[leaf] = factor(jnp.where(finite, value, 0.0), own, start)
            left, right = (left, right) if seed else balanced(left, right)
            given |= {right_of(leaf): Sent(jnp.where(finite, right, jnp.nan))}
            given |= {} if seed else {left_of(leaf): Sent(left)}
        given = dict(sorted(given.items()))
        if seed and large(coded):
            first, one = next(iter(given.items()))
            given[first] = one._replace(aux=noted(one, name, jax.random.key_data(key)))
        return given, kept if state else state

    def back(coded: Coded, after: Coded) -> dict[str, Sent]:
        found, paid, key = {}, 0, None
        if seed and large(coded):
            words = dict(next(iter(after.values())).aux)[name]
            key, paid = jax.random.wrap_key_data(words), 4 * words.size
        for leaf, sent in coded.items():
            if leaf not in large(coded):
                found[leaf] = after[leaf]
                continue
            parts = {n: after[n] for n in (left_of(leaf), right_of(leaf)) if n in after}
            if key is not None:
                left = random_signs(jax.random.fold_in(key, large(coded)[leaf]), (matrix(sent.value.shape)[0], rank))
            else:
                left = parts[left_of(leaf)].value
            value = product(jnp, left, parts[right_of(leaf)].value)
            value = value.reshape(sent.value.shape).astype(sent.value.dtype)
            value = value if sent.mask is None else jnp.where(sent.mask, value, jnp.zeros_like(value))
            side = sum((nbytes(part) for part in parts.values()), sent.side)
            found[leaf] = sent._replace(value=value, bits=0, side=side, aux=noted(sent, name, parts))
        first = next(iter(found))
        return found | {first: found[first]._replace(side=found[first].side + paid)}

    def pack(coded: Coded, write: Write) -> bytes:
        given = {n: sent for n, sent in coded.items() if n not in large(coded)}
        for leaf in large(coded):
            given |= dict(coded[leaf].aux)[name]
        given = dict(sorted(given.items()))
        words = dict(next(iter(given.values())).aux)[name] if seed and large(coded) else np.zeros(0, np.uint32)
        return key_written(words) + write(given)

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        key = None
        if seed and large(like):
            key, data = key_read(data)
        given = {n: sent for n, sent in like.items() if n not in large(like)}
        for leaf in large(like):
            n, m = matrix(np.shape(like[leaf].value))
            blank = {right_of(leaf): m} if seed else {left_of(leaf): n, right_of(leaf): m}
            given |= {part: Sent(np.zeros((count, rank), np.float32)) for part, count in blank.items()}  # type: ignore[arg-type] - arrays of NumPy's
        values = read(data, dict(sorted(given.items())))
        found = {}
        for leaf, sent in like.items():
            if leaf not in large(like):
                found[leaf] = values[leaf]
                continue
            shape = np.shape(sent.value)
            if key is not None:
                left = np.asarray(random_signs(jax.random.fold_in(key, large(like)[leaf]), (matrix(shape)[0], rank)))
            else:
                left = values[left_of(leaf)]
            value = product(np, left, values[right_of(leaf)]).reshape(shape).astype(np.asarray(sent.value).dtype)
            found[leaf] = filled(travelling(sent, value), sent)
        return found

    return closed(Codec(name, encode, pack, unpack, init, back=back, overshoots=seed and not remembers), remembers)


def product(xp: Any, left: Any, right: Any) -> Any:
    """left (n, r) times right (m, r) transposed, float32, column by column: the same sum everywhere."""
    total = rounded(xp, left[:, 0][:, None] * right[:, 0][None, :])
    for column in range(1, left.shape[1]):
        total = total + rounded(xp, left[:, column][:, None] * right[:, column][None, :])
    return total


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """The same product of factors whose columns are of one length, so that a codec behind rounds both alike."""
    a, b = (jnp.linalg.norm(factor, axis=0) for factor in (left, right))
    both = (a > 0) & (b > 0)
    ratio = jnp.where(both, jnp.sqrt(jnp.where(both, b, 1.0) / jnp.where(both, a, 1.0)), 0.0)
    return left * ratio, jnp.where(both, right / jnp.where(both, ratio, 1.0), 0.0)


def orthonormal(a: Array) -> tuple[Array, Array]:
    """Orthonormal columns of the same span, (n, r), and the (r, r) by which `a` becomes them; zero for what depends on others.

    Gram and Schmidt, each column twice. Not by LAPACK: its calls wait for threads of a CPU's pool, and where those of several
    leaves wait for one another, a round stands still (jax 0.10.2).
    """
    basis = jnp.eye(a.shape[1])

    def column(k: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        q, by = done
        v, c = a[:, k], basis[:, k]
        size = jnp.linalg.norm(v)
        for _ in range(2):
            along = times(q.T, v)
            v, c = v - times(q, along), c - times(by, along)
        length = jnp.linalg.norm(v)
        scale = jnp.where(length > 1e-5 * size, 1.0 / jnp.where(length > 0, length, 1.0), 0.0)
        return q.at[:, k].set(v * scale), by.at[:, k].set(c * scale)

    return lax.fori_loop(0, a.shape[1], column, (jnp.zeros_like(a), jnp.zeros_like(basis)))


def times(a: Array, b: Array) -> Array:
    """A matrix product in full float32, on accelerators too."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a leaf: all axes but the last, and the last."""
    return math.prod(shape[:-1]), shape[-1]


def split(shape: tuple[int, ...], rank: int, seed: bool = False) -> bool:
    """Whether factors of this rank are less than the leaf, and of its size."""
    if len(shape) < 2:
        return False
    rows, columns = matrix(shape)
    return rank <= min(rows, columns) and rank * (columns if seed else rows + columns) < rows * columns


def left_of(leaf: str) -> str:
    """The name of a leaf's left factor on the wire."""
    return f"{leaf}|left"


def right_of(leaf: str) -> str:
    """The name of a leaf's right factor on the wire."""
    return f"{leaf}|right"
