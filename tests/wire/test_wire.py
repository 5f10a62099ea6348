"""Prices against really serialised messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import wire

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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(max_examples=30)
@given(values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20))
def test_cast_packs_to_its_price_and_unpacks_to_its_value(dtype, values):
    codec, leaf = wire.cast(dtype), jnp.asarray(values, jnp.float32)
    packet = codec.encode({"w": leaf})["w"]
    packed = codec.pack(np.asarray(leaf))
    assert len(packed) == int(packet.nbytes) == 2 * len(values)
    np.testing.assert_array_equal(codec.unpack(packed, leaf.shape), np.asarray(packet.value))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_cast_error_is_half_a_unit_in_the_last_place(dtype, bits):
    leaf = jnp.asarray(np.random.default_rng(0).uniform(0.01, 100, 1000), jnp.float32)
    value = wire.cast(dtype).encode(leaf).value
    assert float(jnp.max(jnp.abs(value - leaf) / leaf)) <= 2.0**-bits


def test_cast_leaves_integers_and_packets_alone():
    once = wire.cast("bfloat16").encode({"n": jnp.arange(3), "w": jnp.ones(2)})
    assert not wire.is_packet(once["n"])
    assert wire.cast("float16").encode(once)["w"] is once["w"]
    assert wire.price(once) == {"n": 12, "w": 4}


def test_ranked_counts_the_rank_that_is_sent():
    packet = wire.ranked({"a": jnp.ones((10, 8)), "b": jnp.ones((8, 3))}, jnp.int32(2), axis=1)
    assert wire.price(packet) == {"a": 10 * 2 * 4, "b": 8 * 2 * 4}


@pytest.mark.parametrize("codec", [None, wire.cast("bfloat16"), wire.cast("float16")])
def test_price_of_shapes_is_the_price_of_the_message(codec):
    message = codec.encode(TREE) if codec else TREE
    found = wire.price_shapes(jax.eval_shape(lambda: TREE), codec)
    assert found == wire.price(message)
    assert sum(found.values()) == len(wire.serialise(message, codec))


def test_a_price_that_depends_on_values_is_refused():
    sparse = wire.Codec(
        lambda tree: jax.tree.map(lambda a: wire.Packet(a, jnp.count_nonzero(a).astype(jnp.uint32) * 8), tree),
        wire.to_bytes,
        lambda data, shape: np.frombuffer(data, np.float32).reshape(shape),
    )
    assert wire.price(sparse.encode({"w": jnp.ones(3)})) == {"w": 24}
    with pytest.raises(ValueError, match="price of packet 'w' to be a value"):
        wire.price_shapes({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, sparse)


def test_ranked_counts_a_cast_leaf_at_its_cast_size():
    packet = wire.ranked(wire.cast("bfloat16").encode({"a": jnp.ones((10, 8))}), jnp.int32(3), axis=1)
    assert wire.price(packet) == {"a": 10 * 3 * 2}


def test_a_broadcast_leaf_may_have_a_price_for_each_client():
    """Exact beyond what an int32 or a float32 holds."""
    prices = jnp.array([4_000_000_000, 0, 4_000_000_001], jnp.uint32)
    packet = wire.Packet(jnp.ones((2, 2)), prices)
    assert wire.for_each(packet, 3).sum() == 8_000_000_001
    assert wire.for_each(jnp.ones((2, 2)), 3).tolist() == [16, 16, 16]
    assert wire.for_each(wire.Packet(jnp.ones(4), jnp.uint32(7)), 3).tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="to have one price"):
        wire.price({"w": packet})


def test_unknown_price_is_refused():
    shapes = jax.eval_shape(lambda: wire.ranked(jnp.ones((2, 2)), jnp.int32(1), 0))
    with pytest.raises(ValueError, match="to be a value"):
        wire.price(shapes)


def test_for_client_picks_own_parts():
    message = {"all": jnp.ones(2), "own": wire.PerClient({"t": jnp.arange(4.0)})}
    mine = wire.for_client(message, 2)
    assert mine["own"]["t"] == 2.0
    assert mine["all"].shape == (2,)
