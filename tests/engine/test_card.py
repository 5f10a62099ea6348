"""The idea of fedsim, literally: equal clients on axis 0, `vmap` over one backbone, `pmap` over devices, a mean.

Twenty lines of plain JAX stand here; the engine with its lanes, plans and segments has to give the same parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from brief import brief
from fedsim.algorithms import ALGORITHMS
from fedsim.core import Batch, Passes
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.lanes import Lanes
from fedsim.engine.plan import batches
from fedsim.testing.tasks import CLASSES, FEATURES, tiny_task

CLIENTS, EXAMPLES, BATCH, STEPS, RATE = 16, 12, 4, 3, 0.2
DEVICES = 8

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def stacked():
    """Equal clients: x (C, S, B, F), y (C, S, B) in the order of the plan, and the flat arrays that the engine gets."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(CLIENTS * EXAMPLES, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, CLIENTS * EXAMPLES).astype(np.int32)
    offsets = np.arange(CLIENTS + 1, dtype=np.int64) * EXAMPLES
    passes = Passes(epochs=1, batch_size=BATCH)
    ids = np.arange(CLIENTS)
    who, step, column, example = batches(ids, np.full(CLIENTS, EXAMPLES), passes, 0, 1)  # seed 0, round 1, exchange 0
    rows = np.zeros((CLIENTS, STEPS, BATCH), np.int64)
    rows[who, step, column] = offsets[who] + example
    held = {"frozen": rng.normal(size=(FEATURES, FEATURES)).astype(np.float32)}
    task = tiny_task(optimizer=optax.sgd, lr=lambda client, message: jnp.float32(RATE), passes=passes)
    return held, x, y, offsets, rows, task


def card(held, x, y, rows, task):
    """The whole system in its simplest form."""
    start = task.init(jax.random.key(3))

    def client(held, params, x, y):  # (S, B, F), (S, B)
        for s in range(STEPS):
            batch = Batch(x[s], y[s], jnp.ones(BATCH), jax.random.key(0), jnp.int32(s), jnp.asarray(s == STEPS - 1))
            grads, _ = jax.grad(lambda p, b=batch: task.loss(held, p, b), has_aux=True)(params)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return params

    per_device = jax.pmap(jax.vmap(client, in_axes=(None, None, 0, 0)), in_axes=(None, None, 0, 0))
    shape = (DEVICES, CLIENTS // DEVICES)
    stack = per_device(
        held, start, x[rows].reshape(*shape, STEPS, BATCH, FEATURES), y[rows].reshape(*shape, STEPS, BATCH)
    )
    weights = jnp.full(shape, 1 / CLIENTS)
    mean = jax.jit(lambda stack: jax.tree.map(lambda p: jnp.tensordot(weights, p, axes=2), stack))
    return start, mean(stack)


@pytest.mark.parametrize("parallel", brief(["shard_map", "pmap"]))
@pytest.mark.parametrize("devices", [1, DEVICES])
@pytest.mark.parametrize("lanes", brief([3, 1, CLIENTS]))
def test_engine_equals_the_card(stacked, lanes, devices, parallel):
    held, x, y, offsets, rows, task = stacked
    start, expected = card(held, x, y, rows, task)
    engine = Lanes(
        held, x, y, np.arange(len(y)), offsets, lanes=lanes, devices=devices, parallel=parallel, segment_steps=2
    )
    algorithm = ALGORITHMS["fed_avg"](task._replace(init=lambda key: start))
    server = engine.put(algorithm.init(jax.random.key(0), engine.held))
    cohort = Cohort(engine, np.arange(CLIENTS), 1, Memory(algorithm.memory, engine.held))
    server, _ = algorithm.round(jax.random.key(0), engine.held, server, cohort)
    for name, leaf in expected.items():
        np.testing.assert_allclose(server.params[name], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_256_lanes_hold_one_backbone():
    """256 clients train side by side in one program, whose memory holds the frozen backbone once."""
    width, lanes = 512, 256
    rng = np.random.default_rng(0)
    held = {"frozen": rng.normal(size=(FEATURES, width)).astype(np.float32), "deep": np.eye(width, dtype=np.float32)}
    x = rng.normal(size=(lanes * 2, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, lanes * 2).astype(np.int32)

    def loss(held, params, batch):
        hidden = jnp.tanh(jnp.tanh(batch.x @ held["frozen"]) @ held["deep"])
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["kernel"], batch.y)
        return (losses * batch.mask).mean(), {}

    task = tiny_task(
        init=lambda key: {"kernel": jnp.zeros((width, CLASSES))}, loss=loss, passes=Passes(epochs=1, batch_size=2)
    )
    engine = Lanes(held, x, y, np.arange(len(y)), np.arange(lanes + 1) * 2, lanes=lanes, devices=1, segment_steps=1)
    algorithm = ALGORITHMS["fed_avg"](task)
    programs = []
    make = engine.programs

    def keep(*args):
        programs.append(make(*args))
        return programs[-1]

    engine.programs = keep
    server = engine.put(algorithm.init(jax.random.key(0), engine.held))
    cohort = Cohort(engine, np.arange(lanes), 1, Memory(algorithm.memory, engine.held))

    algorithm.round(jax.random.key(0), engine.held, server, cohort)
    assert programs[0].lanes == lanes
    assert cohort.done[0].occupancy == (1.0, 1.0), "all 256 lanes are alive"

    used = programs[0].segment.memory_analysis()  # of the very program that ran
    backbone = sum(leaf.nbytes for leaf in held.values())
    assert used.temp_size_in_bytes + used.argument_size_in_bytes < 12 * backbone, "256 copies would be 256 backbones"
