"""What each codec makes of values: published cases, closed forms, error bounds, and unbiasedness by many keys."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import wire
from fedsim.wire.codecs import entropy_bound, entropy_coded, low_rank, nbytes, quantisers, rotations
from fedsim.wire.codecs.form import levels_read, written

KEY = jax.random.key(5)
TRIES = 4000


def encoded(name: str, leaves: object, key: jax.Array = KEY) -> dict[str, wire.Sent]:
    """What arrives of changes, from a new client."""
    codec, before = wire.codec(name), wire.changes(wire.coded(leaves))
    assert codec is not None
    return codec.encode(before, key, key, codec.init(key, {n: s.value for n, s in before.items()}))[0]


def decoded(name: str, value: object, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(encoded(name, jnp.asarray(value, jnp.float32), key)[""].value)


@functools.cache
def many(name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A change, and what arrives of it under `TRIES` keys."""
    value = jax.random.normal(jax.random.key(1), shape) + 0.3
    keys = jax.random.split(jax.random.key(2), TRIES)
    found = jax.jit(jax.vmap(lambda key: encoded(name, value, key)[""].value))(keys)
    return np.asarray(value, np.float64), np.asarray(found, np.float64)


# --- casts


def test_fp8_saturates_and_rounds_as_published() -> None:
    """OCP: largest 448 and 57344; 0.1 is 0.1015625 in e4m3 and 0.09375 in e5m2; what is tiny is zero."""
    values = [1e6, -1e6, 448.0, 0.1, 1e-9, 464.0]
    np.testing.assert_array_equal(decoded("float8_e4m3fn(scale=False)", values), [448, -448, 448, 0.1015625, 0, 448])
    values = [1e6, -1e6, 57344.0, 0.1, 1e-9]
    np.testing.assert_array_equal(decoded("float8_e5m2(scale=False)", values), [57344, -57344, 57344, 0.09375, 0])


@pytest.mark.parametrize(("name", "digits"), [("float8_e4m3fn", 4), ("float8_e5m2", 3)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e30])
def test_scaled_fp8_is_as_good_for_small_changes_as_for_large_ones(name: str, digits: int, scale: float) -> None:
    value = np.asarray(jax.random.normal(KEY, (4000,))) * np.float32(scale)
    value = value[np.abs(value) > np.abs(value).max() * 2.0**-13]
    relative = np.abs(decoded(name, value) / value - 1)
    assert relative.max() <= 2.0**-digits and relative.mean() > 2.0 ** -(digits + 3)


# --- quantisers


def test_qsgd_of_levels_is_exact() -> None:
    """The norm of [2, 3, 6] is 7, and there are 7 steps: the case of QSGD's papers' tests."""
    np.testing.assert_array_equal(decoded("qsgd(4)", [2.0, -3.0, 6.0]), [2, -3, 6])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (30,)) for name in ("qsgd(2)", "qsgd(4, 8)", "terngrad(0)", "randomk(0.2)", "randomk(0.2)+qsgd(3)")),
        *(
            ("randomk(0.1)", (13,)),
            ("sketch(2)", (6, 5)),
            ("rotate+qsgd(3)", (130,)),
            ("eden(2)", (256,)),
            ("drive", (512,)),
        ),
    ],
)
def test_unbiased(name: str, shape: tuple[int, ...]) -> None:
    """Every entry's mean is within 5 standard errors; a chance of 6e-7 each. Rotations: of high dimension."""
    value, found = many(name, shape)
    error = found.std(axis=0) / math.sqrt(TRIES)
    slack = 0.02 if name in ("eden(2)", "drive") else 1e-6  # the bias of a Hadamard rotation: see below
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - value), 5 * error + slack)
    assert error.max() > 1e-3


@pytest.mark.parametrize(
    ("name", "shape"), [("quantise(2)", (30,)), ("nf4", (30,)), ("sign", (30,)), ("low_rank(1)", (6, 5))]
)
def test_the_others_are_biased_so_that_the_test_can_fail(name: str, shape: tuple[int, ...]) -> None:
    value, found = many(name, shape)
    assert np.abs(found.mean(axis=0) - value).max() > 0.05 and found.std(axis=0).max() < 1e-5


def test_qsgd_errs_as_lemma_3_1_says() -> None:
    for bits, block in ((2, 0), (4, 0), (4, 16)):
        value, found = many(f"qsgd({bits}, {block})", (64,))
        d, s = block or 64, 2 ** (bits - 1) - 1
        error = ((found - value) ** 2).sum(axis=1).mean() / (value**2).sum()
        assert 0.05 * min(d / s**2, math.sqrt(d) / s) < error <= min(d / s**2, math.sqrt(d) / s)


@pytest.mark.slow
def test_terngrad_clips_at_so_many_deviations() -> None:
    value = np.zeros(100, np.float32)
    value[[0, 1]] = 100, -100
    np.testing.assert_allclose(decoded("terngrad", value)[:2], [35.355339, -35.355339], rtol=1e-6)
    np.testing.assert_array_equal(decoded("terngrad", [-1.0, 0.0, 1.0]), [-1, 0, 1])
    np.testing.assert_array_equal(decoded("terngrad", np.full(4, 2.0)), 2.0)


def test_sign_has_the_best_scale() -> None:
    np.testing.assert_array_equal(decoded("sign", [0.0, 2.0, -1.0]), [1, 1, -1])
    value = np.asarray(jax.random.normal(KEY, (1000,)))
    error = ((decoded("sign", value) - value) ** 2).sum()
    np.testing.assert_allclose(error, (value**2).sum() - np.abs(value).sum() ** 2 / 1000, rtol=1e-4)


def test_nf4_has_the_published_levels() -> None:
    """Dettmers et al. 2023: quantiles of a normal from offset 0.9677083 down, eight of them positive, seven negative."""
    normal, offset = NormalDist(), 0.9677083
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    np.testing.assert_allclose(quantisers.NF4, levels, atol=2e-7)
    np.testing.assert_array_equal(decoded("nf4", 3 * quantisers.NF4), np.float32(3) * quantisers.NF4.astype(np.float32))
    value = np.asarray(jax.random.normal(KEY, (64,)))
    assert np.abs(decoded("nf4", value) - value).max() <= 0.152 * np.abs(value).max()


def test_nf4_costs_four_bits_and_a_scale_for_each_block() -> None:
    assert nbytes(encoded("nf4", jnp.ones(640))[""]) == 320 + 40
    masked = wire.kept(jnp.ones((80, 8)), jnp.int32(4), axis=1)
    assert int(nbytes(encoded("nf4", masked)[""])) == 160 + 20, "blocks of what travels"


def test_nnadq_reproduces_the_authors_case() -> None:
    """v = [1, 3], beta = 0.01: o = -2, d = 1, s = 66, 7 bits and a sign, and both come back exactly."""
    one = encoded("nnadq", jnp.array([1.0, 3.0]))[""]
    np.testing.assert_array_equal(one.value, [1, 3])
    assert int(one.bits) == 8 and int(nbytes(one)) == 2 + 12
    centre, unit, steps = dict(one.aux)["nnadq"].scales[0].tolist()
    assert (centre, steps) == (2.0, 66.0) and unit == np.float32(1) / np.float32(66)
    np.testing.assert_array_equal(decoded("nnadq", [-3.0, -1.0]), [-3, -1])  # the same for what is negative alone
    np.testing.assert_array_equal(decoded("nnadq", np.full(5, 0.7)), np.float32(0.7))
    assert int(nbytes(encoded("nnadq", jnp.full(5, 0.7))[""])) == 12


@pytest.mark.parametrize("beta", [1e-4, 0.01, 1.0])
def test_nnadq_errs_by_half_a_step_and_is_idempotent(beta: float) -> None:
    value = np.asarray(jax.random.normal(KEY, (500,))) * 0.1 + 1
    name = f"nnadq({beta})"
    d = (value.max() - value.min()) / 2
    s = math.floor(max(1, math.sqrt(d * 32 * math.log(4) / beta)))
    once = decoded(name, value)
    assert np.abs(once - value).max() <= d / (2 * s) + 1e-6
    assert int(encoded(name, jnp.asarray(value))[""].bits) == s.bit_length() + 1
    np.testing.assert_allclose(decoded(name, once), once, atol=1e-6)


def test_nnadq_never_takes_more_bits_than_a_leaf_has() -> None:
    """16 is the most: of bfloat16, too."""
    value = jax.random.normal(KEY, (50,)) * 100
    for leaf in (value, value.astype(jnp.bfloat16)):
        assert int(encoded("nnadq(1e-12)", leaf)[""].bits) == 16


def test_block_scales_are_paid_whole_by_clients_of_lower_rank() -> None:
    """The server encodes once: who reads some columns needs the scales of all blocks."""
    tree = {"a": wire.kept(jnp.ones((64, 8)), jnp.array([1, 0, 8]), axis=1)}
    out = wire.depart(wire.codec("nf4"), wire.coded(tree), KEY)
    assert wire.message_bytes(out, 3)["a"].tolist() == [32 + 32, 32, 256 + 32]


# --- sparse


def test_topk_without_feedback_forgets() -> None:
    """[1, 2, 3, 4], half: [0, 0, 3, 4]; two values of 32 bits and two places of 2."""
    one = encoded("topk(0.5, feedback=False)", jnp.arange(1.0, 5.0))[""]
    np.testing.assert_array_equal(one.value, [0, 0, 3, 4])
    assert int(nbytes(one)) == 8 + 1
    codec = wire.codec("topk(0.5, feedback=False)")
    assert codec is not None and codec.init(KEY, {"": jnp.zeros(4)}) == () and not codec.remembers


def test_randomk_draws_every_entry_equally_often() -> None:
    _, found = many("randomk(0.2)", (30,))
    often = (found != 0).mean(axis=0)
    assert ((found != 0).sum(axis=1) == 6).all()
    np.testing.assert_allclose(often, 0.2, atol=5 * math.sqrt(0.16 / TRIES))
    value, _ = many("randomk(0.2)", (30,))
    error = ((found - value) ** 2).sum(axis=1).mean() / (value**2).sum()
    np.testing.assert_allclose(error, 30 / 6 - 1, rtol=0.05)


def test_randomk_pays_a_seed_and_no_indices() -> None:
    sent = encoded("randomk(0.1)", {"a": jnp.ones((10, 10)), "b": jnp.ones(50)})
    assert sum(int(nbytes(one)) for one in sent.values()) == 15 * 4 + 8


def test_blocks_send_the_largest_whole_and_pay_an_index_for_each() -> None:
    value = np.zeros(40, np.float32)
    value[8:16], value[33] = 1.0, 2.0
    sent = encoded("blocks(0.2, 8)", jnp.asarray(value))[""]  # one of five blocks: its norm is sqrt(8) > 2
    np.testing.assert_array_equal(sent.value, np.where(np.arange(40) // 8 == 1, value, 0))
    assert int(nbytes(sent)) == 8 * 4 + 1


# --- rotations


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_edens_levels_are_those_of_lloyd_and_max(bits: int) -> None:
    """Published values, and for four bits the condition that makes them: each is the mean of what is nearest to it."""
    half = quantisers.lloyd_max(bits)[2 ** (bits - 1) :]
    known = {
        1: [0.7978845608],
        2: [0.4527800399, 1.5104176087],
        3: [0.2450941631, 0.7560052490, 1.3439092614, 2.1519456699],
    }
    if bits in known:
        np.testing.assert_allclose(half, known[bits], atol=1e-7)
    normal, ends = NormalDist(), [0.0, *((half[1:] + half[:-1]) / 2), 40.0]
    for low, high, level in zip(ends[:-1], ends[1:], half, strict=True):
        mean = (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
        np.testing.assert_allclose(level, mean, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "expected"), [("drive", 0.571), ("eden(1)", 0.571), ("eden(2)", 0.133), ("eden(4)", 0.0096)]
)
def test_rotations_err_as_the_papers_say(name: str, expected: float) -> None:
    value = jax.random.normal(KEY, (4096,)) ** 3  # far from normal before it is rotated
    error = np.mean([((decoded(name, value, key) - value) ** 2).sum() for key in jax.random.split(KEY, 5)])
    np.testing.assert_allclose(error / (value**2).sum(), expected, rtol=0.06)


@pytest.mark.parametrize(
    ("value", "mean"),
    [
        ([1, 2, 3, 0], (7 / 6, 7 / 6, 7 / 2, 0)),
        ([1, 3, 5, 0], (0, 0, 7, 0)),
        ([1, 2, 3, 4], (0.5625, 2.4375, 2.4375, 4.3125)),
    ],
)
def test_the_bias_of_drive_in_four_dimensions(value: list[float], mean: tuple[float, ...]) -> None:
    """Over all signs, exactly: a rotation by Hadamard matrices is not uniform, and in few dimensions this shows."""
    found = []
    for signs in itertools.product((1.0, -1.0), repeat=4):
        turned = rotations.hadamard(np, np.array([value]) * signs) / 2
        turned = turned.astype(np.float64)
        scale = (turned**2).sum() / np.abs(turned).sum()
        found.append(rotations.hadamard(np, scale * np.where(turned < 0, -1.0, 1.0))[0] / 2 * signs)
    if value != [1, 3, 5, 0]:  # here a rotated entry is zero, and its sign a matter of taste
        np.testing.assert_allclose(np.mean(found, axis=0)[:3], mean[:3], atol=1e-6)
    assert np.abs(np.mean(found, axis=0) - value).max() > 0.1


@pytest.mark.slow
def test_the_bias_of_drive_falls_with_the_dimension() -> None:
    """Of one large entry among small ones, the worst of what was tried."""
    found = {}
    for d in (8, 128, 2048):
        value = np.full(d, 0.1, np.float32)
        value[0] = 1.0
        run = jax.jit(jax.vmap(lambda key, value=value: encoded("drive", jnp.asarray(value), key)[""].value))
        mean = np.asarray(run(jax.random.split(KEY, 2000))).mean(axis=0)
        found[d] = np.linalg.norm(mean - value) / np.linalg.norm(value)
    noise = math.sqrt(0.571 / 2000)
    assert found[8] > 3 * noise and found[2048] < 1.3 * noise


@pytest.mark.parametrize(
    ("entries", "width"),
    brief([(4097, 512), (128, 128), (3, 8), (100, 128), (200, 256), (4096, 4096), (224_356, 4096)], 2),
)
def test_a_message_is_padded_once_and_by_little(entries: int, width: int) -> None:
    assert rotations.width_of(entries, 4096) == width
    padded = -(-entries // width) * width
    assert padded <= max(entries * 9 / 8, 128, entries + 127 if entries > 128 else 0)
    sent = encoded("eden(2)", jnp.ones(entries))[""]
    assert int(nbytes(sent)) == padded * 2 // 8 + 4 * (padded // width) + 8


@pytest.mark.slow
def test_rotate_alone_gives_back_what_it_got() -> None:
    value = jax.random.normal(KEY, (3, 50))
    np.testing.assert_allclose(encoded("rotate", value)[""].value, value, atol=1e-5)
    uneven = np.asarray(jax.random.normal(KEY, (300,))).copy()
    uneven[0] = 30.0
    rotated, plain = (np.abs(decoded(name, uneven) - uneven) for name in ("rotate+quantise(3)", "quantise(3)"))
    assert np.linalg.norm(rotated) < 0.7 * np.linalg.norm(plain), "what one large entry spoils, a rotation mends"


# --- low rank


def test_low_rank_is_nearly_the_best_of_its_rank() -> None:
    value = np.asarray(jax.random.normal(KEY, (20, 12)))
    sizes = np.linalg.svd(value, compute_uv=False)
    best, error = (sizes[3:] ** 2).sum(), ((decoded("low_rank(3)", value) - value) ** 2).sum()
    assert best * 0.9999 < error < best * 1.02
    sharp = value[:, :3] @ value[:3]
    np.testing.assert_allclose(decoded("low_rank(3)", sharp), sharp, atol=1e-4)


def test_powersgd_finds_the_best_factors_in_time() -> None:
    """With the same change round after round and its memory aside, power iteration converges to the leading space."""
    value = np.asarray(jax.random.normal(KEY, (20, 3)) @ jax.random.normal(jax.random.key(9), (3, 12)))
    codec = wire.codec("powersgd(3)")
    assert codec is not None
    before = wire.changes(wire.coded({"w": jnp.asarray(value)}))
    state = codec.init(KEY, {"w": before["w"].value})
    for _ in range(3):
        sent, (rest, own) = codec.encode(before, KEY, KEY, state)
        state = (jax.tree.map(jnp.zeros_like, rest), own)
    np.testing.assert_allclose(sent["w"].value, value, atol=1e-4)
    assert int(nbytes(sent["w"])) == 4 * 3 * 32


def test_powersgd_starts_from_the_last_factors_and_again_after_zero() -> None:
    """Singular values near one another: one iteration is far from the best, ten are near it; a change of zero starts anew."""
    value = jax.random.normal(KEY, (30, 20))
    sizes = np.linalg.svd(np.asarray(value), compute_uv=False)
    codec = wire.codec("powersgd(2)")
    assert codec is not None
    before = wire.changes(wire.coded({"w": value}))
    errors, state = [], codec.init(KEY, {"w": value})
    for turn in range(12):
        given = before if turn != 4 else {"w": wire.Sent(jnp.zeros_like(value))}
        sent, (rest, own) = codec.encode(given, KEY, KEY, state)
        state = (jax.tree.map(jnp.zeros_like, rest), own)
        errors.append(float(((sent["w"].value - given["w"].value) ** 2).sum()))
    best = (sizes[2:] ** 2).sum()
    assert errors[0] > 1.1 * best and errors[4] == 0 and best * 0.9999 < errors[-1] < 1.05 * best


def test_powersgd_saves_nothing_on_a_leaf_of_its_own_rank() -> None:
    """A LoRA factor (768, 4) at rank 4 goes as it is, at its price; so do vectors."""
    value = jax.random.normal(KEY, (768, 4))
    sent = encoded("powersgd(4)", {"a": value, "b": jnp.ones(7)})
    np.testing.assert_array_equal(sent["a"].value, value)
    assert (nbytes(sent["a"]), nbytes(sent["b"])) == (768 * 16, 28)


def test_a_sketch_pays_one_factor_and_a_seed() -> None:
    sent = encoded("sketch(2)", {"a": jnp.ones((50, 6)), "b": jnp.ones(3)})
    assert sum(int(nbytes(one)) for one in sent.values()) == 2 * 6 * 4 + 8 + 12


def test_a_sketch_errs_as_it_says() -> None:
    value, found = many("sketch(2)", (6, 5))
    error = ((found - value) ** 2).sum(axis=(1, 2)).mean() / (value**2).sum()
    np.testing.assert_allclose(error, 5 / 2, rtol=0.1)
    value, found = many("sketch(2, feedback=True)", (6, 5))
    assert ((found - value) ** 2).sum(axis=(1, 2)).max() <= (value**2).sum() * 1.001


# --- bits, and what entropy coding would make of them


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 22])
def test_levels_are_written_without_gaps(bits: int) -> None:
    levels = np.random.default_rng(0).integers(0, 2**bits, 77)
    data = written(levels, bits)
    assert len(data) == math.ceil(77 * bits / 8)
    np.testing.assert_array_equal(levels_read(b"x" + data, 77, bits, 1), levels)


def test_entropy_coding_is_between_its_bound_and_the_packed_length() -> None:
    """Ternary levels, of which nine in ten are zero: H(0.9, 0.05, 0.05) = 0.569 bits, of the 2 that are packed."""
    value = np.zeros(8000, np.float32)
    value[:400], value[400:800] = 1.0, -1.0
    value = np.random.default_rng(0).permutation(value)
    codec, sent = wire.codec("terngrad(0)"), encoded("terngrad(0)", jnp.asarray(value))
    bound = entropy_bound(sent)
    np.testing.assert_allclose(bound * 8 / 8000, 0.5690, atol=1e-3)
    assert bound < entropy_coded(sent, codec) < 0.75 * len(wire.pack(sent, codec))


@pytest.mark.parametrize(
    "name", brief(["topk(0.3)+nf4(16)", "none", "bfloat16", "powersgd(2)+quantise(12)", "eden(3)", "nnadq"], 2)
)
def test_entropy_coded_is_never_more_than_packed(name: str) -> None:
    codec = wire.codec(name)
    before = wire.changes(wire.coded({"w": jax.random.normal(KEY, (40, 20)), "b": jnp.zeros(300)}))
    sent = before if codec is None else encoded(name, {"w": before["w"].value, "b": before["b"].value})
    packed = wire.pack(sent, codec)
    assert entropy_bound(sent) <= entropy_coded(sent, codec) <= len(packed)
    assert codec is not None or entropy_coded(sent, codec) == len(zlib.compress(packed, 9))


@pytest.mark.slow
def test_columns_become_orthonormal_and_the_same_span() -> None:
    a = jax.random.normal(KEY, (30, 4)).at[:, 2].set(0.0)
    a = a.at[:, 3].set(a[:, 0] - 2 * a[:, 1])  # of three columns, one is nothing and one depends on others
    q, by = low_rank.orthonormal(a)
    np.testing.assert_allclose(q.T @ q, np.diag([1.0, 1, 0, 0]), atol=1e-5)
    np.testing.assert_allclose(a @ by, q, atol=1e-5)
    np.testing.assert_allclose(q @ (q.T @ a), a, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["powersgd(2)", "low_rank(2)", "sketch(2, feedback=True)"])
def test_many_leaves_of_many_clients_do_not_wait_for_one_another(name: str) -> None:
    """With LAPACK's QR, 24 leaves of ten clients at once stood still on two cores."""
    leaves = {f"{n:02}": jax.random.normal(jax.random.key(n), (10, 384, 8)) for n in range(24)}
    run = jax.jit(jax.vmap(lambda leaves, key: sum(one.value.sum() for one in encoded(name, leaves, key).values())))
    for turn in range(5):
        assert np.isfinite(run(leaves, jax.random.split(jax.random.key(turn), 10))).all()
