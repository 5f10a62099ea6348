"""Local privacy: every client cuts its change and adds noise before it sends it, so that the server need not be trusted.

It is a codec, the first of the run's: what others, such as top-k, do to a noisy change tells no more than the change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.core import Average, Averaged, Tree
from fedsim.folds import mean, uniform
from fedsim.privacy.clipping import clip
from fedsim.wire import Codec, Sent


def noised(clip_norm: float, noise_multiplier: float) -> Codec:
    """Cuts all marked changes of a message, as one vector, to `clip_norm` and adds Gaussian noise to what travels.

    Guarantees:
        bounded norm whatever the reply, before the noise.
        noise independence: of clients, rounds, exchanges and leaves.
    """

    def encode(coded: Mapping[str, Sent], key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        kept, _ = clip({name: sent.value for name, sent in coded.items()}, clip_norm)
        keys = jax.random.split(key, len(coded))  # of this client in this exchange

        def one(sent: Sent, value: Array, key: Array) -> Sent:
            noisy = value + clip_norm * noise_multiplier * jax.random.normal(key, value.shape, jnp.float32)
            noisy = noisy if sent.mask is None else jnp.where(sent.mask, noisy, 0.0)
            return sent._replace(value=noisy.astype(sent.value.dtype))

        return {name: one(coded[name], kept[name], keys[i]) for i, name in enumerate(coded)}, state

    def pack(coded: Mapping[str, Sent], write: object) -> bytes:
        return write(coded)  # pyrefly: ignore[not-callable] - `wire.codecs.Write`, as the codecs behind it write

    def unpack(data: bytes, like: Mapping[str, Sent], read: object) -> dict[str, np.ndarray]:
        return read(data, like)  # pyrefly: ignore[not-callable] - `wire.codecs.Read`, likewise

    return Codec("dp=local", encode, pack, unpack)


@functools.cache  # one fold, so that runs that share programs do
def average() -> Average:
    """The mean of private messages, all alike. No plain one: a fold of an algorithm's own, or what is not marked, might read more."""
    fold = mean(uniform)

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        return Averaged(fold.done(total, args, key), total[1])

    return Average("mean of private messages", fold._replace(done=done))
