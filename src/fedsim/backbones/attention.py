"""Softmax attention of queries over keys: with the scores in memory, or by cuDNN's flash attention where that runs.

Both are the same function, with softmax in float32. The plain form is what CPUs and TPUs compute, and every float32 model.
On an NVIDIA GPU in bfloat16 the scores of a ViT-B/16 cost a fifth of the time, and cuDNN never writes them
(`docs/accelerators.md` has the measurement).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedsim.backbones.forms import takes, wide

FEW = 16  # queries up to which the scores are small anyway
MOST_DEPTH, EIGHT = 128, 8  # of cuDNN's heads; their depths are multiples of eight
HIDDEN = -30_000.0  # added to a score that is not to count: bfloat16 holds it, and exp of it is zero


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    keys: int | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Mixes values by softmax(query key^T).

    Args:
        query: (B, Q, H, d), scaled.
        key, value: (B, K, H, d).
        mask: (B, K) bool, true where a key may be looked at.
        keys: only so many of the keys, the first ones, count (default: all); fewer where `may_take_cudnn` alone.
        causal: the queries are the last Q of the K tokens, and none looks at a token behind its own.

    Returns:
        (B, Q, H, d).
    """
    if not causal and may_take_cudnn(query.shape[1], query.shape[3], query.dtype):
        return by_cudnn(query, key, value, mask, keys)
    return plain(query, key, value, mask, causal=causal)


def plain(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
    """As `attend`; the scores are materialised, so that the mask may be (B, Q, K), another one for each query."""
    size, _, heads, depth = query.shape

    def split(y: jax.Array) -> jax.Array:
        """(B, T, H, d) -> (B H, T, d): one batch axis of small matrices, the cheapest form on a CPU."""
        return y.transpose(0, 2, 1, 3).reshape(size * heads, y.shape[1], depth)

    query, key, value = split(query), split(key), split(value)
    scores = wide(jnp.einsum("nqd,nkd->nqk", query, key))
    seen = None if mask is None else jnp.repeat(mask if mask.ndim == 3 else mask[:, None, :], heads, axis=0)
    if causal:
        past = jnp.tril(jnp.ones(scores.shape[1:], bool), scores.shape[2] - scores.shape[1])
        seen = past if seen is None else seen & past
    if seen is not None:
        # Finite, so that a row without any token (an empty slot of a batch) has no NaN, nor its gradient.
        scores = jnp.where(seen, scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("nqk,nkd->nqd", weights, value)
    return mixed.reshape(size, heads, -1, depth).transpose(0, 2, 1, 3)


def may_take_cudnn(queries: int, depth: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN computes attention of so many queries, in heads of that depth, on this process's devices."""
    fits = dtype == jnp.bfloat16 and queries > FEW and depth % EIGHT == 0 and depth + EIGHT <= MOST_DEPTH
    return fits and takes("attention")


def by_cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, keys: int | None = None
) -> jax.Array:
    """As `attend`, by cuDNN.

    JAX lets it train on even numbers of queries and keys only, so that one of each may have to be added. Its own masks have
    the size of the scores, or hide an end of the keys. So a mask goes in as eight further channels: all queries are 1 in the
    first of them, a key is 0 there or `HIDDEN`.
    """
    queries, keys, depth = query.shape[1], keys or key.shape[1], query.shape[-1]
    if mask is not None:
        hidden = jnp.where(mask, 0.0, HIDDEN).astype(key.dtype)[:, :, None]
        query, key = more(query, jnp.ones((1, 1, 1), query.dtype)), more(key, hidden)
        value = more(value, jnp.zeros((1, 1, 1), value.dtype))
    query, key, value = even(query), even(key), even(value)
    lengths = None
    if keys < key.shape[1]:  # the same for all, but under vmap JAX wants them to be of the clients as the keys are
        lengths = jnp.where(key[:, 0, 0, 0] > 0, keys, keys).astype(jnp.int32)
    mixed = jax.nn.dot_product_attention(
        query, key, value, scale=1.0, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, :queries, :, :depth]


def more(x: jax.Array, first: jax.Array) -> jax.Array:
    """x (B, T, H, d) with eight channels more, of which only the first, (B, T, H) or broadcast to it, is not zero."""
    channels = jnp.zeros((*x.shape[:-1], EIGHT), x.dtype).at[..., 0].set(jnp.broadcast_to(first, x.shape[:-1]))
    return jnp.concatenate([x, channels], axis=-1)


def even(x: jax.Array) -> jax.Array:
    """x (B, T, ...), with a row of zeros at the end where T is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0) for _ in x.shape[2:])))
