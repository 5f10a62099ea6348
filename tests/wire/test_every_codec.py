"""What every codec promises, alone and in sensible company, against really packed messages, bit for bit."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import wire
from fedsim.wire.codecs import nbytes

ALONE = [
    *("bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fn(scale=False)", "float8_e5m2", "float8_e5m2(scale=False)"),
    *("quantise(8)", "quantise(3, 32)", "quantise(16)", "qsgd(4)", "qsgd(8, 32)", "terngrad", "terngrad(0, 32)"),
    *("sign", "sign(32, feedback=True)", "nf4(16)", "nnadq", "nnadq(1e-6)"),
    *("topk(0.1)", "topk(0.1, feedback=False)", "randomk(0.1)", "randomk(0.1, feedback=True)", "randomk(1.0)"),
    *("blocks(0.3, 16)", "blocks(0.3, feedback=False)", "rotate", "drive", "eden(1)", "eden(4, 128)"),
    *("powersgd(2)", "low_rank(2)", "low_rank(2, feedback=True)", "sketch(2)", "sketch(2, feedback=True)"),
]
TOGETHER = [
    *("topk(0.3)+quantise(5)", "topk(0.3)+nnadq(0.01)", "randomk(0.5)+nf4(16)", "topk(0.3)+rotate+sign(128)"),
    *("rotate+quantise(4)", "powersgd(2)+quantise(8)", "sketch(2)+qsgd(8)"),
]
MORE = [
    *("qsgd(2, 0)", "sign(32)", "nf4", "nnadq(100.0)", "drive(128)", "eden(6)", "powersgd(1)", "powersgd(3)"),
    *(
        "topk(0.3)+qsgd(4, 16)",
        "topk(0.3)+bfloat16",
        "topk(0.3)+eden(2)",
        "randomk(0.3)+float8_e4m3fn",
        "rotate+qsgd(4)",
    ),
    *(
        "blocks(0.5, 16)+quantise(4)",
        "randomk(0.5)+topk(0.2)",
        "rotate(128)+nf4",
        "powersgd(2)+eden(4)",
    ),
    *("low_rank(2)+nf4", "topk(0.5)+powersgd(1)"),
]
REMEMBER = [
    *(
        "topk(0.1)",
        "randomk(0.1, feedback=True)",
        "blocks(0.3, 16)",
        "sign(feedback=True)",
        "powersgd(2)",
        "low_rank(1, feedback=True)",
    ),
    *("sketch(2, feedback=True)", "topk(0.3)+quantise(5)", "powersgd(2)+eden(4)", "topk(0.5)+powersgd(1)"),
]
CLIENTS = 5
NAN, INF, ZERO = 2, 3, 4  # which of them sends what
KEYS = jax.random.split(jax.random.key(3), CLIENTS)


class Sending(NamedTuple):
    """What the clients of one program send."""

    before: list[Any]
    after: list[Any]
    prices: list[Any]


def message(keys: Any) -> Any:
    """Leaves of rank 0 to 3, of which some entries travel, all, or none."""
    a, b, d = (jax.random.normal(key, shape) for key, shape in zip(keys, ((24, 8), (13,), (2, 3, 40)), strict=True))
    some = jnp.arange(240).reshape(2, 3, 40) % 3 > 0
    return {
        "a": wire.kept(a * 0.01, jnp.int32(5), axis=1),
        "b": b,
        "c": b[0] * 3,
        "d": wire.kept(d, some),
        "e": wire.kept(jnp.ones((5, 2)), jnp.int32(0), axis=0),
        "f": jnp.concatenate([d.reshape(-1, 6), a.reshape(-1, 6)]),
    }


@functools.cache
def clients() -> Any:
    """What the clients would send: their values (CLIENTS, ...), and what of them travels."""

    def one(key: Any, factor: Any) -> Any:
        leaves = wire.changes(wire.coded(message(jax.random.split(key, 3))))
        leaves["d"] = leaves["d"]._replace(value=leaves["d"].value.at[1, 2, 5].set(factor))
        return {n: (jnp.where(factor == 0, 0.0, s.value), s.mask) for n, s in leaves.items()}

    leaves = jax.jit(jax.vmap(one))(KEYS, jnp.array([1.5, -20.0, jnp.nan, jnp.inf, 0.0]))
    masks = {name: None if mask is None else mask[0] for name, (_, mask) in leaves.items()}
    return jax.device_get(({name: value for name, (value, _) in leaves.items()}, masks))


def sent(values: Any, masks: Any) -> Any:
    return {name: wire.Sent(value, masks[name]) for name, value in values.items()}


def encoding(name: str) -> Any:
    """(values of one client, its key) -> what it sends, and what that costs."""
    codec, masks = wire.codec(name), clients()[1]
    assert codec is not None

    def encode(values: Any, key: Any) -> Any:
        after, _ = codec.encode(sent(values, masks), key, key, codec.init(key, values))
        return after, {n: jnp.asarray(nbytes(s), jnp.uint32) for n, s in after.items()}

    return encode


@functools.cache
def sending(name: str) -> Sending:
    """Compiled once, under vmap, and run twice."""
    run = jax.jit(jax.vmap(encoding(name)))
    values, masks = clients()
    after, prices = jax.device_get(run(values, KEYS))
    # The same key, the same bytes.
    jax.tree.map(np.testing.assert_array_equal, (after, prices), jax.device_get(run(values, KEYS)))
    each = [[row(tree, place) for place in range(CLIENTS)] for tree in (values, after, prices)]
    return Sending([sent(values, masks) for values in each[0]], each[1], each[2])


def row(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda a: a[place], tree)


def arrived(sent: Any) -> np.ndarray:
    return np.concatenate([np.asarray(one.value).reshape(-1) for one in sent.values()])


@pytest.mark.parametrize("name", brief([*ALONE[::2], *TOGETHER[::2], *ALONE[1::2], *TOGETHER[1::2], *MORE], 20))
def test_the_price_is_the_packed_length_and_the_value_comes_back_bit_for_bit(name: str) -> None:
    """For every client of a vmap, whatever its values, under jit; nothing travels of what is masked out."""
    s, codec = sending(name), wire.codec(name)
    for before, after, prices in zip(s.before, s.after, s.prices, strict=True):
        data = wire.pack(after, codec)
        assert len(data) == sum(int(price) for price in prices.values())
        back = wire.unpack(data, before, codec)
        for leaf, sent in after.items():
            np.testing.assert_array_equal(back[leaf], sent.value, err_msg=leaf)
            assert sent.value.dtype == before[leaf].value.dtype
            if before[leaf].mask is not None:
                assert not sent.value[~before[leaf].mask].any()


@pytest.mark.parametrize("name", brief([*TOGETHER, *ALONE, *MORE], 14))
def test_a_client_that_diverged_is_seen_and_touches_no_other(name: str) -> None:
    s = sending(name)
    for place in (NAN, INF):
        assert not np.isfinite(arrived(s.after[place])).all(), "the server would count this reply"
    for place in (0, 1, ZERO):
        assert np.isfinite(arrived(s.after[place])).all()
    assert not arrived(s.after[ZERO]).any(), "from zeros come zeros"


@pytest.mark.parametrize("name", ["quantise(8)", "qsgd(4)", "randomk(0.1)", "eden(4, 128)", "powersgd(2)+quantise(8)"])
def test_a_client_sends_the_same_alone_and_among_others(name: str) -> None:
    """Up to the order of sums, which a scale is made of."""
    values = row(clients()[0], 1)
    alone, _ = jax.jit(encoding(name))(values, KEYS[1])
    np.testing.assert_allclose(arrived(sending(name).after[1]), arrived(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", brief(["topk(0.2)+qsgd(4)", "none", "quantise(8)", "eden(4, 128)", "sketch(2)", "powersgd(1)"], 2)
)
def test_leaves_of_one_shape_come_back_each_in_its_place_whatever_the_order_of_their_names(name: str) -> None:
    """Fields of a NamedTuple stand as they are declared, on the wire they are sorted."""

    class Change(NamedTuple):
        up: Any
        down: Any
        bias: Any

    codec, rng = wire.codec(name), np.random.default_rng(0)
    change = Change(*(jnp.asarray(rng.normal(size=(12, 6)), jnp.float32) for _ in Change._fields))
    before = {field: wire.Sent(leaf) for field, leaf in change._asdict().items()}
    state = codec.init(KEYS[2], change._asdict()) if codec else ()
    arrived, _ = wire.arrive(wire.coded(change), codec, KEYS[0], KEYS[1], state)
    after = wire.changes(wire.coded(change))
    after = codec.encode(after, KEYS[0], KEYS[1], state)[0] if codec else after
    back = wire.unpack(wire.pack(after, codec), before, codec)
    for field in Change._fields:
        np.testing.assert_array_equal(back[field], wire.unwrap(getattr(arrived, field)), err_msg=field)


def test_every_codec_of_the_table_is_tested() -> None:
    names = {call.partition("(")[0] for text in (*ALONE, *TOGETHER) for call in text.split("+")}
    assert names == set(wire.CODECS)


@pytest.mark.parametrize("name", REMEMBER)
def test_what_arrives_and_what_is_kept_add_up_to_the_change(name: str) -> None:
    """Over three rounds, rounding and scales included; what is masked out now is kept as it was."""
    codec = wire.codec(name)
    assert codec is not None
    rng = np.random.default_rng(0)
    shapes = {"w": (12, 6), "v": (7,)}
    state = codec.init(jax.random.key(1), {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()})
    encode = jax.jit(codec.encode)
    total = {n: np.zeros(s) for n, s in shapes.items()}
    for turn in range(3):
        change = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        there = {"w": 2 if turn == 1 else 6, "v": 7}  # in the second round four columns do not travel
        given = {n: wire.kept(change[n], jnp.int32(there[n]), axis=-1) for n in shapes}
        sent, state = encode(wire.changes(wire.coded(given)), jax.random.key(turn), jax.random.key(9), state)
        rest = state[0] if isinstance(state, tuple) else state
        for leaf in shapes:
            travels = np.arange(shapes[leaf][-1]) < there[leaf]
            total[leaf] = total[leaf] + change[leaf] * travels - np.asarray(sent[leaf].value, np.float64)
            np.testing.assert_allclose(rest[leaf], total[leaf], atol=1e-5)
            assert not np.asarray(sent[leaf].value)[..., ~travels].any()
    assert any(np.abs(rest[leaf]).max() > 1e-3 for leaf in shapes), "something was left out"


@pytest.mark.parametrize(
    "name", ["bfloat16", "quantise(8)", "qsgd(4)", "nf4", "eden(2)", "powersgd(1)", "topk(0.2)", "nnadq"]
)
def test_leaves_of_16_bits_keep_their_type(name: str) -> None:
    codec, key = wire.codec(name), jax.random.key(0)
    assert codec is not None
    values = {n: v.astype(jnp.bfloat16) for n, v in {"w": jax.random.normal(key, (20, 8)), "b": jnp.ones(3)}.items()}
    before = wire.changes(wire.coded(values))
    sent = jax.device_get(jax.jit(lambda c: codec.encode(c, key, key, codec.init(key, values))[0])(before))
    back = wire.unpack(wire.pack(sent, codec), before, codec)
    for leaf in values:
        assert back[leaf].dtype == sent[leaf].value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back[leaf], sent[leaf].value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantise(8)+topk(0.1)", r"quantise\(8\) at the end of .*; write topk\(0.1\)\+quantise\(8\)"),
        ("bfloat16+nf4", "bfloat16 at the end"),
        ("topk(0.1)+topk(0.1)", "once in"),
        ("powersgd(2)+topk(0.1)", r"behind powersgd\(2\) .*only codecs that round, not topk\(0.1\); write topk"),
        ("rotate+low_rank(2)", "leave one of them away"),
        ("rotate+nnadq", r"a codec whose bits are known, .* not nnadq; write quantise\(8\)"),
        ("qsgd(1)", "2 <= bits=1 <= 16"),
        ("qsgd(8, -1)", "0 <= block=-1"),
        ("nf4(0)", "1 <= block=0"),
        ("nnadq(0)", "0 < beta=0"),
        ("eden(7)", "1 <= bits=7 <= 6"),
        ("drive(1000)", "block=1000 to be a power of two"),
        ("powersgd(0)", "1 <= rank=0 <= 64"),
        ("randomk(0)", "0 < share=0 <= 1"),
        ("blocks(0.1, size=0)", "1 <= size=0"),
        ("sign(feedback=1)", "feedback=1 to be True or False"),
        ("float8_e5m2(scale=2)", "scale=2 to be True or False"),
        ("terngrad(clip=-1)", "0 <= clip=-1"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wire.codec(text, "codec_up")


def test_a_codec_of_more_bits_than_the_leaf_is_refused() -> None:
    tree = wire.coded({"w": jnp.ones(3, jnp.float8_e4m3fn)})
    with pytest.raises(
        ValueError, match=r"leaf 'w' to have at least the 16 bits of codec bfloat16, not the 8 of float8_e4m3fn"
    ):
        wire.arrive(tree, wire.codec("bfloat16"), jax.random.key(0), jax.random.key(0))
