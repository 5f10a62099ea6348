"""Local privacy, a codec: what leaves a client is cut and noisy, whatever comes behind it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_central import QUIET, TABLE, exchanged, saying

from fedsim import wire
from fedsim.core import Tree
from fedsim.privacy.local import average, noised
from fedsim.testing.toys import COHORT, SIZES
from fedsim.wire.codecs import Sent, read, write

pytestmark = pytest.mark.usefixtures("compile_once")


def coded(values: dict[str, Any], codec: wire.Codec, key: int = 0, mask: Any = None) -> dict[str, Sent]:
    given = {name: Sent(jnp.asarray(value, jnp.float32), mask) for name, value in values.items()}
    return dict(codec.encode(given, jax.random.key(key), jax.random.key(99), ())[0])


@pytest.mark.parametrize("broken", [0.0, 1e30, np.nan, np.inf])
def test_bounded_norm_whatever_the_reply(broken: float) -> None:
    """All leaves are one vector, and no NaN leaves the client."""
    values = {"a": np.ones(50), "b": np.r_[np.ones(5), broken]}
    sent = coded(values, noised(0.5, QUIET))
    vector = np.concatenate([np.asarray(s.value, np.float64).reshape(-1) for s in sent.values()])
    assert np.isfinite(vector).all() and np.linalg.norm(vector) <= 0.5 * (1 + 1e-6)


def test_noise_variance() -> None:
    """Standard deviation z C on every entry that travels, within five standard errors; nothing where nothing travels."""
    mask = jnp.arange(5000) < 4000
    sent = coded({"a": np.zeros(5000), "b": np.zeros(5000)}, noised(0.3, 2.0), mask=mask)
    for one in sent.values():
        value = np.asarray(one.value)
        assert value[:4000].std() == pytest.approx(0.6, rel=5 / np.sqrt(8000)) and not value[4000:].any()


def test_noise_independence() -> None:
    """Of leaves, clients, rounds and exchanges; and the mean over a cohort has its variance over the members."""
    sent = coded({"a": np.zeros(2000), "b": np.zeros(2000)}, noised(1.0, 1.0))
    assert abs(np.corrcoef(sent["a"].value, sent["b"].value)[0, 1]) < 5 / np.sqrt(2000)
    zeros = saying(np.zeros_like(TABLE))
    real = [i for i in COHORT if SIZES[i]]
    up = noised(1.0, 1.0)
    rounds = [exchanged(average(), local=zeros, round=r, up=up)[0] for r in (1, 2)]
    two, _, _ = exchanged(average(), local=zeros, times=2, up=up)
    for found in rounds:  # not sqrt(1): every client has noise of its own
        assert found.std() * np.sqrt(len(real)) == pytest.approx(1.0, rel=5 / np.sqrt(2 * found.size))
    for other in (rounds[1], two[1]):
        assert abs(np.corrcoef(rounds[0], other)[0, 1]) < 5 / np.sqrt(2000)


@pytest.mark.parametrize("grid", [(1, 1), (3, 8)])
def test_the_mean_is_of_cut_changes(grid: tuple[int, int]) -> None:
    real = [i for i in COHORT if SIZES[i]]
    found, info, _ = exchanged(average(), up=noised(2.0, QUIET), grid=grid)
    rows = TABLE[real].astype(np.float64)
    expected = (rows * np.minimum(1, 2.0 / np.linalg.norm(rows, axis=1))[:, None]).mean(axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert int(info.reported) == len(real) == float(info.weight)


@pytest.mark.parametrize(
    "behind", ["bfloat16", "quantise(4)", "topk(0.1)", "topk(0.1)+quantise(8)", "sign(feedback=True)"]
)
def test_a_codec_behind_it_sees_noise_alone(behind: str) -> None:
    """Two clients whose changes differ a thousandfold send what differs by no more than the norm; prices are the codec's."""
    second = wire.codec(behind)
    assert second is not None
    both = noised(1.0, 1e-3, second)
    shapes = {"a": jnp.zeros(400)}
    state = both.init(jax.random.key(0), shapes)
    change = {"a": Sent(jnp.asarray(TABLE[0, :400]))}
    large = {"a": Sent(1000 * jnp.asarray(TABLE[0, :400]))}
    keys = jax.random.key(1), jax.random.key(2)
    one, kept = both.encode(change, *keys, state)
    other, kept_large = both.encode(large, *keys, state)
    np.testing.assert_allclose(one["a"].value, other["a"].value, atol=2e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), kept, kept_large)
    alone = second.encode(change, *keys, second.init(jax.random.key(0), shapes))[0]
    assert int(wire.codecs.nbytes(one["a"])) == int(wire.codecs.nbytes(alone["a"]))
    data = both.pack(one, write)
    assert len(data) == int(wire.codecs.nbytes(one["a"]))
    np.testing.assert_array_equal(both.unpack(data, {"a": Sent(jnp.zeros(400))}, read)["a"], one["a"].value)


def test_values_that_are_no_changes_are_refused() -> None:
    def finish(held: Tree, message: Tree, carry: Tree, client: Any) -> Any:
        return wire.coded({"w": jnp.zeros(3)}, change=False), client.memory, {}

    with pytest.raises(
        ValueError, match=r"Expected codec_up='dp=local' to get changes alone.*choose dp=none, dp=example where"
    ):
        exchanged(average(), local=saying()._replace(finish=finish), up=noised(1.0, 1.0))
    with pytest.raises(ValueError, match=r"average='mean of private messages', but .* is not marked"):
        exchanged(average(), local=saying(marked=False), up=noised(1.0, 1.0))


@pytest.mark.parametrize("behind", [None, "quantise(8)"])
def test_no_part_goes_around_the_noise(behind: str | None) -> None:
    """A part that the algorithm codes by itself is refused."""
    reply = (wire.coded({"a": jnp.ones(4)}), wire.coded({"b": jnp.ones(4)}, by=wire.codec("nnadq")))
    codec, key = noised(1.0, 1.0, wire.codec(behind) if behind else None), jax.random.key(0)
    with pytest.raises(ValueError, match=r"no codec of the algorithm's own \(nnadq.*around the noise"):
        wire.arrive(reply, codec, key, key)
