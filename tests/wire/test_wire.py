"""Prices against really serialised messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import wire

KEY = jax.random.key(0)  # of codecs, which draw nothing here
TREE = {
    "a": jnp.ones((3, 5)),
    "b": (jnp.zeros((), jnp.int32), jnp.ones((2, 0))),
    "c": jnp.ones(7, jnp.bfloat16),
    "key": jax.random.key(1),
    "mask": jnp.ones(9, bool),
}


def test_price_is_the_length_of_the_payload():
    prices = wire.price(TREE)
    assert prices == {"a": 60, "b/0": 4, "b/1": 0, "c": 14, "key": 8, "mask": 9}
    assert sum(prices.values()) == len(wire.serialise(TREE))
    assert wire.price(jax.eval_shape(lambda: TREE)) == prices


def test_a_bare_array_is_called_message():
    assert wire.price(jnp.ones(3)) == {"message": 12}
    assert wire.price(()) == {}


def test_payload_is_little_endian():
    assert wire.serialise(np.array([1], ">i4")) == b"\x01\0\0\0"


def arrived(tree, codec=None):
    """A reply as the server decodes it."""
    return wire.arrive(tree, codec, KEY, KEY)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(max_examples=30)
@given(values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20))
def test_cast_packs_to_its_price_and_unpacks_to_its_value(dtype, values):
    codec, before = wire.cast(dtype), wire.changes(wire.coded({"w": jnp.asarray(values, jnp.float32)}))
    packet = arrived(wire.coded({"w": jnp.asarray(values, jnp.float32)}), codec)["w"]
    packed = wire.pack(codec.encode(before, KEY, KEY, ())[0], codec)
    assert len(packed) == int(packet.nbytes) == 2 * len(values)
    np.testing.assert_array_equal(wire.unpack(packed, before, codec)["w"], np.asarray(packet.value))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_cast_error_is_half_a_unit_in_the_last_place(dtype, bits):
    leaf = jnp.asarray(np.random.default_rng(0).uniform(0.01, 100, 1000), jnp.float32)
    value = arrived(wire.coded(leaf), wire.cast(dtype)).value
    assert float(jnp.max(jnp.abs(value - leaf) / leaf)) <= 2.0**-bits


def test_codecs_leave_what_is_not_marked_and_packets_alone():
    own = wire.Packet(jnp.ones(3), jnp.uint32(5))
    once = arrived(
        {"n": jnp.arange(3), "w": wire.coded(jnp.ones(2)), "v": jnp.ones(2), "own": own}, wire.cast("bfloat16")
    )
    assert not wire.is_packet(once["n"]) and not wire.is_packet(once["v"])
    assert once["own"] is own
    assert wire.price(once) == {"n": 12, "w": 4, "v": 8, "own": 5}


def test_the_rank_that_is_sent_is_what_counts():
    tree = wire.kept({"a": jnp.ones((10, 8)), "b": jnp.ones((8, 3))}, jnp.int32(2), axis=1)
    assert wire.price(arrived(tree)) == {"a": 10 * 2 * 4, "b": 8 * 2 * 4}
    cast = wire.kept(wire.coded({"a": jnp.ones((10, 8))}), jnp.int32(3), axis=1)
    assert wire.price(arrived(cast, wire.cast("bfloat16"))) == {"a": 10 * 3 * 2}


def test_a_broadcast_leaf_may_have_a_price_for_each_client():
    """Exact beyond what an int32 or a float32 holds."""
    prices = jnp.array([4_000_000_000, 0, 4_000_000_001], jnp.uint32)
    packet = wire.Packet(jnp.ones((2, 2)), prices)
    assert wire.message_bytes(packet, 3)["message"].sum() == 8_000_000_001
    assert wire.message_bytes(jnp.ones((2, 2)), 3)["message"].tolist() == [16, 16, 16]
    assert wire.message_bytes(wire.Packet(jnp.ones(4), jnp.uint32(7)), 3)["message"].tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="to have one price"):
        wire.price({"w": packet})


def test_unknown_price_is_refused():
    shapes = jax.eval_shape(lambda: arrived(wire.kept(jnp.ones((2, 2)), jnp.int32(1), 0)))
    with pytest.raises(ValueError, match="to be a value"):
        wire.price(shapes)


def test_for_client_picks_own_parts():
    message = {"all": jnp.ones(2), "own": wire.PerClient({"t": jnp.arange(4.0)})}
    mine = wire.for_client(message, 2)
    assert mine["own"]["t"] == 2.0
    assert mine["all"].shape == (2,)


def test_a_packet_is_not_serialised_as_its_array():
    with pytest.raises(ValueError, match=r"without packets; .* wire.pack"):
        wire.serialise({"w": wire.Packet(jnp.ones(2), jnp.uint32(3))})
