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

INSTEAD = "choose dp=none, dp=example where the algorithm takes it, or an algorithm whose replies are changes"


def noised(clip_norm: float, noise_multiplier: float, behind: Codec | None = None) -> Codec:
    """Cuts all marked changes of a message, as one vector, to `clip_norm` and adds Gaussian noise to what travels.

    Args:
        behind: the codec that sends it. What that one remembers is of the noisy change: nothing else is fed back.

    Guarantees:
        bounded norm whatever the reply, before the noise.
        noise variance: each entry that travels gets noise of standard deviation `noise_multiplier` x `clip_norm`.
        noise independence: of clients, rounds, exchanges and leaves.
    """

    def encode(coded: Mapping[str, Sent], key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        kept, _ = clip({name: sent.value for name, sent in coded.items()}, clip_norm)
        keys = jax.random.split(jax.random.fold_in(key, 0), len(coded))  # of this client in this exchange

        def one(sent: Sent, value: Array, key: Array) -> Sent:
            noisy = value + clip_norm * noise_multiplier * jax.random.normal(key, value.shape, jnp.float32)
            noisy = noisy if sent.mask is None else jnp.where(sent.mask, noisy, 0.0)
            return sent._replace(value=noisy.astype(sent.value.dtype))

        noisy = {name: one(coded[name], kept[name], keys[i]) for i, name in enumerate(coded)}
        if behind is None:
            return noisy, state
        return behind.encode(noisy, jax.random.fold_in(key, 1), jax.random.fold_in(common, 1), state)

    if behind is not None:  # without its link, as a longer chain would take that one and leave the noise out
        return behind._replace(
            name=f"dp=local+{behind.name}", encode=encode, on_values=False, link=None, instead=INSTEAD, private=True
        )

    def pack(coded: Mapping[str, Sent], write: object) -> bytes:
        return write(coded)  # pyrefly: ignore[not-callable] - `wire.codecs.Write`, as the codecs behind it write

    def unpack(data: bytes, like: Mapping[str, Sent], read: object) -> dict[str, np.ndarray]:
        return read(data, like)  # pyrefly: ignore[not-callable] - `wire.codecs.Read`, likewise

    return Codec("dp=local", encode, pack, unpack, instead=INSTEAD, private=True)


@functools.cache  # one fold, so that runs that share programs do
def average() -> Average:
    """The mean of private messages, all alike. No plain one: a fold of an algorithm's own, or what is not marked, might read more."""
    fold = mean(uniform)

    def done(total: Tree, args: Tree, key: Array) -> Averaged:
        return Averaged(fold.done(total, args, key), total[1])

    return Average("mean of private messages", fold._replace(done=done))
