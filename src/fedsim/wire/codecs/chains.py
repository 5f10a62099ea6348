"""How codecs are joined, and how a client remembers what it did not send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.wire.codecs.form import Codec, Coded, Read, Sent, Write
from fedsim.wire.prices import Tree


def chain(*codecs: Codec) -> Codec:
    """One codec after the other: each gets what the one before gave, and writes only what is its own.

    Where one of them remembers, the memory is of what the whole chain left out: of rounding, too.

    Raises:
        ValueError: an order that cannot be written.
    """
    if len(codecs) == 1:
        return codecs[0]
    links = [codec.link or codec for codec in codecs]
    check_order(links)
    return closed(linked(links), any(codec.remembers for codec in codecs))


def check_order(links: Sequence[Codec]) -> None:
    """Raises `ValueError` for codecs that cannot stand in this order."""
    names = [link.name for link in links]
    text = "+".join(names)
    for place, link in enumerate(links):
        before = links[:place]
        if link.last and link is not links[-1]:
            raise ValueError(
                f"Expected {link.name} at the end of {text!r}, as it writes all entries itself; write "
                f"{'+'.join([*(n for n in names if n != link.name), link.name])}, or leave {names[place + 1]} away."
            )
        if link.name in names[:place]:
            raise ValueError(f"Expected {link.name} once in {text!r}; leave the second away.")
        other = next((one.name for one in before if one.back is not None), None)
        if other is not None and (link.thins or link.back is not None):
            remedy = f"write {link.name} in front of it" if link.thins else "leave one of them away"
            raise ValueError(f"Expected behind {other} in {text!r} only codecs that round, not {link.name}; {remedy}.")
        if other is not None and link.adapts:
            raise ValueError(
                f"Expected behind {other} in {text!r} a codec whose bits are known, as nothing else bounds the price, not "
                f"{link.name}; write quantise(8), or {link.name} alone."
            )


def closed(link: Codec, remembers: bool = False) -> Codec:
    """A codec that stands alone, of one that does not decode or remember by itself."""
    codec = decoding(link) if link.back is not None else link
    return (fed_back(codec) if remembers else codec)._replace(link=link, remembers=remembers)


def linked(links: Sequence[Codec]) -> Codec:
    """One link after the other."""
    first, *others = links
    if not others:
        return decoding(first) if first.back is not None else first
    rest = linked(others)

    def init(key: Array, shapes: Mapping[str, Any]) -> Tree:
        states = first.init(key, shapes), rest.init(key, shapes)
        return states if jax.tree.leaves(states) else ()

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        of_first, of_rest = state or ((), ())
        keys = (jax.random.fold_in(key, 0), jax.random.fold_in(common, 0))
        given, of_first = first.encode(coded, *keys, of_first)
        keys = (jax.random.fold_in(key, 1), jax.random.fold_in(common, 1))
        sent, of_rest = rest.encode(given, *keys, of_rest)
        sent = first.back(coded, sent) if first.back is not None else sent
        return sent, (of_first, of_rest) if state else state

    def pack(coded: Coded, write: Write) -> bytes:
        return first.pack(coded, lambda coded: rest.pack(coded, write))

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        return first.unpack(data, like, lambda data, like: rest.unpack(data, like, read))

    return Codec(
        "+".join(link.name for link in links),
        encode,
        pack,
        unpack,
        init,
        on_values=all(link.on_values for link in links),
        most=lambda entries: rest.most(first.most(entries)),
        thins=any(link.thins for link in links),
        last=rest.last,
        bits=rest.bits,
        adapts=rest.adapts,
        overshoots=any(link.overshoots for link in links),
        links=tuple(links),
    )


def decoding(link: Codec) -> Codec:
    """A codec that sends other leaves, with its own decoding."""
    back = link.back
    assert back is not None

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        sent, state = link.encode(coded, key, common, state)
        return back(coded, sent), state

    return link._replace(encode=encode, back=None)


def fed_back(codec: Codec) -> Codec:
    """The codec with a memory: what did not arrive is added to the next change (error feedback).

    Seide et al. 2014; Stich et al., arXiv 1809.07599, algorithm 1; Karimireddy et al., arXiv 1901.09847, algorithm 2.

    Guarantees: what arrives and what is kept add up to the change and what was kept before, up to one rounding.
    """

    def init(key: Array, shapes: Mapping[str, Any]) -> Tree:
        rest = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        own = codec.init(key, shapes)
        return (rest, own) if jax.tree.leaves(own) else rest

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        if not jax.tree.leaves(state):
            return codec.encode(coded, key, common, ())
        rest, own = state if isinstance(state, tuple) else (state, ())
        whole = {name: sent.value + rest[name] for name, sent in coded.items()}
        given = {
            name: sent._replace(value=v if sent.mask is None else jnp.where(sent.mask, v, jnp.zeros_like(v)))
            for (name, sent), v in zip(coded.items(), whole.values(), strict=True)
        }
        sent, own = codec.encode(given, key, common, own)
        rest = {name: value - sent[name].value for name, value in whole.items()}
        return sent, (rest, own) if isinstance(state, tuple) else rest

    return codec._replace(init=init, encode=encode, on_values=False)
