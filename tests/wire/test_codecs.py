"""Codecs and marks against really packed messages, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim import wire
from fedsim.wire.codecs import nbytes

KEY = jax.random.key(3)


def message(rank: int = 4):
    """A LoRA factor of rank `rank`, padded to 8, a bias, and a scalar."""
    keys = jax.random.split(KEY, 3)
    return {
        "a": wire.kept(jax.random.normal(keys[0], (768, 8)), jnp.int32(rank), axis=1),
        "b": jax.random.normal(keys[1], (13,)),
        "c": jax.random.normal(keys[2], ()),
    }


@pytest.mark.parametrize(
    "name", ["none", "bfloat16", "float16", "quantise(8)", "quantise(3)", "topk(0.01)", "topk(0.3)+quantise(5)"]
)
@pytest.mark.parametrize("rank", [0, 4, 8])
def test_price_is_the_packed_length_and_the_value_comes_back_bit_for_bit(name, rank):
    codec = wire.codec(name)
    before = wire.changes(wire.coded(message(rank)))

    @jax.jit
    def encode(coded):
        return codec.encode(coded, KEY, KEY, codec.init(KEY, {n: s.value for n, s in coded.items()}))[0]

    after = encode_static(codec, before) if codec else before
    values = jax.tree.map(np.asarray, encode(before)) if codec else before
    packed = wire.pack(values if codec is None else {n: values[n]._replace(bits=after[n].bits) for n in values}, codec)
    assert sum(int(nbytes(sent)) for sent in after.values()) == len(packed)
    back = wire.unpack(packed, before, codec)
    for leaf, sent in values.items():
        np.testing.assert_array_equal(back[leaf], np.asarray(sent.value), err_msg=leaf)


@pytest.mark.parametrize("name", ["none", "float16", "quantise(8)"])
def test_each_leaf_comes_back_in_its_own_place_whatever_the_order_of_names(name):
    leaf = jax.random.normal(KEY, (4, 3))
    codec = wire.codec(name)
    before = dict(reversed(wire.changes(wire.coded({"params": leaf, "control": -leaf})).items()))
    assert list(before) == ["params", "control"]
    after = encode_static(codec, before) if codec else before
    back = wire.unpack(wire.pack(after, codec), before, codec)
    for name, sent in after.items():
        np.testing.assert_array_equal(back[name], np.asarray(sent.value), err_msg=name)


def encode_static(codec, coded):
    """The same without jit, so that bits are numbers."""
    return codec.encode(coded, KEY, KEY, codec.init(KEY, {n: s.value for n, s in coded.items()}))[0]


def test_scales_are_paid_whole_whatever_the_rank():
    """A fault of the first pricing: rank 4 of 8 halved the side data, too."""
    tree = wire.coded({"a": wire.kept(jnp.ones((768, 8)), jnp.int32(4), axis=1)})
    reply, _ = wire.arrive(tree, wire.codec("quantise(8)"), KEY, KEY)
    assert wire.price(reply) == {"a": 768 * 4 + 8}


def test_statistics_leave_padding_out():
    """Of [1, 3] padded with zeros the steps go from 1 to 3; with the padding they would begin at 0."""
    tree = wire.coded(wire.kept(jnp.array([1.0, 3.0, 0.0, 0.0]), jnp.int32(2), axis=0))
    reply, _ = wire.arrive(tree, wire.codec("quantise(1)"), KEY, KEY)
    np.testing.assert_array_equal(wire.unwrap(reply), [1, 3, 0, 0])
    third = wire.kept(jnp.array([1.0, 1.4, 3.0, 0.0]), jnp.int32(3), axis=0)
    reply, _ = wire.arrive(wire.coded(third), wire.codec("quantise(1)"), KEY, KEY)
    np.testing.assert_array_equal(wire.unwrap(reply), [1, 1, 3, 0])


@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_quantise_errs_by_half_a_step_at_most(bits):
    value = jax.random.normal(KEY, (1000,))
    sent = encode_static(wire.quantise(bits), wire.changes(wire.coded(value)))[""]
    step = float(value.max() - value.min()) / (2**bits - 1)
    assert float(jnp.abs(sent.value - value).max()) <= step / 2 + 1e-6


def test_topk_sends_the_largest_and_feeds_the_rest_back():
    """Against a loop in NumPy, three times."""
    codec, rng = wire.topk(0.25), np.random.default_rng(0)
    state = codec.init(KEY, {"x": jnp.zeros(8), "y": jnp.zeros((2, 2))})
    kept = np.zeros(12, np.float32)
    for _ in range(3):
        new = rng.normal(size=12).astype(np.float32)
        coded = wire.changes(wire.coded({"x": jnp.asarray(new[:8]), "y": jnp.asarray(new[8:].reshape(2, 2))}))
        sent, state = codec.encode(coded, KEY, KEY, state)
        kept = kept + new
        expected = np.zeros(12, np.float32)
        largest = np.argsort(-np.abs(kept), kind="stable")[:3]
        expected[largest] = kept[largest]
        kept = kept - expected
        got = np.concatenate([np.asarray(sent[name].value).reshape(-1) for name in ("x", "y")])
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(np.concatenate([np.asarray(state[n]).reshape(-1) for n in ("x", "y")]), kept)


def test_a_mask_says_what_travels():
    value, mask = jnp.arange(6.0).reshape(2, 3), jnp.array([[True, False, True], [False, False, True]])
    reply, _ = wire.arrive({"w": wire.kept(value, mask), "n": jnp.ones(2)}, None, KEY, KEY)
    assert wire.price(reply) == {"n": 8, "w": 12}
    np.testing.assert_array_equal(wire.unwrap(reply)["w"], [[0, 0, 2], [0, 0, 5]])


def test_a_marked_leaf_without_codec_costs_its_array_and_needs_no_value():
    shapes = jax.eval_shape(lambda: wire.arrive(wire.coded({"w": jnp.ones((3, 5))}), None, KEY, KEY)[0])
    assert wire.price(shapes) == {"w": 60}


def test_ranks_of_a_broadcast_message_are_a_price_for_each_client():
    ranks = jnp.array([1, 0, 8])
    tree = {"a": wire.kept(jnp.ones((10, 8)), ranks, axis=1), "head": jnp.ones(3)}
    for codec, each in ((None, 40), ("bfloat16", 20), ("quantise(4)", 5)):
        out = wire.depart(codec and wire.codec(codec), wire.coded(tree), KEY)
        side = 8 if codec == "quantise(4)" else 0
        assert wire.message_bytes(out, 3)["a"].tolist() == [each + side, side, 8 * each + side], codec
        np.testing.assert_array_equal(wire.unwrap(out)["a"], 1.0)


def test_own_parts_are_coded_client_by_client():
    tree = wire.PerClient(wire.coded({"w": wire.kept(jnp.arange(12.0).reshape(3, 4), jnp.array([4, 2, 0]), axis=0)}))
    out = wire.depart(wire.codec("quantise(8)"), tree, KEY)
    assert wire.message_bytes(out, 3)["w"].tolist() == [12, 10, 0]  # of nothing not even scales


@pytest.mark.parametrize(
    ("tree", "codec", "words"),
    [
        (wire.coded({"n": jnp.arange(3)}), "quantise(8)", "leaf 'n', marked by wire.coded, to hold floating"),
        (wire.coded({"w": jnp.ones(3)}, change=False), "topk(0.1)", "'w' is a value"),
    ],
)
def test_what_a_codec_cannot_act_on_is_refused(tree, codec, words):
    with pytest.raises(ValueError, match=words):
        wire.arrive(tree, wire.codec(codec), KEY, KEY)


def test_a_thinning_codec_on_the_way_down_is_refused():
    with pytest.raises(ValueError, match=r"codec_down='topk\(0.1\)' to act on values"):
        wire.depart(wire.codec("topk(0.1)"), wire.coded(jnp.ones(3)), KEY)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bfloat61", "did you mean bfloat16"),
        ("quantise(0)", "1 <= bits=0 <= 16"),
        ("topk(2)", "0 < share=2 <= 1"),
        ("topk()", "call that topk takes"),
        ("bfloat16+", "codec"),
    ],
)
def test_unknown_codecs_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        wire.codec(text, "codec_up")


def test_the_options_name_the_codecs_that_there_are():
    from fedsim.config.checks import CODECS

    assert sorted(CODECS) == sorted(wire.CODECS)


def test_a_codec_that_the_method_brings_acts_in_the_runs_place() -> None:
    own, leaf = wire.codec("quantise(4)"), jnp.arange(12.0)
    for other in (None, wire.codec("topk(0.1)")):  # which keeps what it leaves out: of the other part alone
        state = () if other is None else other.init(KEY, {"b": leaf})
        reply, kept = wire.arrive({"a": wire.coded(leaf, by=own), "b": wire.coded(leaf)}, other, KEY, KEY, state)
        assert wire.price(reply)["a"] == 6 + 8
        np.testing.assert_array_equal(reply["a"].value, wire.arrive(wire.coded(leaf), own, KEY, KEY)[0].value)
        alone, _ = wire.arrive({"b": wire.coded(leaf)}, other, KEY, KEY, state)
        assert wire.price(reply)["b"] == wire.price(alone)["b"] <= 48
        assert set(kept) == (set() if other is None else {"b"})
    assert wire.brings({"a": wire.coded(leaf, by=own)}) and not wire.is_coded({"a": wire.coded(leaf, by=own)})
    assert not wire.brings(wire.coded(leaf)) and wire.is_coded(wire.PerClient(wire.coded(leaf)))


@pytest.mark.parametrize("name", ["topk(0.1)", "sign(feedback=True)", "powersgd(1)"])
def test_a_method_cannot_bring_a_codec_that_leaves_out_or_remembers(name: str) -> None:
    with pytest.raises(ValueError, match="to keep nothing and to leave nothing out"):
        wire.coded(jnp.ones(3), by=wire.codec(name))
