"""FedDM by the letters of its oracles: pooled training, FedAvg, fixed points, rest, closed forms; its bytes and its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_dm import Learning, Matching, Recipe, apart, fed_dm
from fedsim.algorithms.synthetic import chosen, cut, perturbed, radius, steps_of
from fedsim.core import Batch, Client, Passes
from fedsim.folds import Stacked
from fedsim.testing.contract import same
from fedsim.testing.tasks import CLASSES, tiny_head_task
from fedsim.testing.toys import COHORT, run, tiny_problem
from fedsim.training import server as server_training

pytestmark = pytest.mark.usefixtures("compile_once")

EACH = 4  # examples of each class that a client of `even` has, and synthetic ones of each
START = tiny_head_task().init(jax.random.key(5))


def linear(**changes):
    """Features and logits without a nonlinearity, so that gradients have closed forms."""

    def features(held, params, x):
        return x @ params["hidden"]

    def logits(held, params, x):
        return features(held, params, x) @ params["head/kernel"] + params["head/bias"]

    def loss(held, params, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(logits(held, params, batch.x), batch.y)
        return (each * batch.mask).sum() / batch.mask.sum(), {}

    task = tiny_head_task(init=lambda key: START, optimizer=optax.sgd, lr=lambda client, message: jnp.float32(0.3))
    return task._replace(features=features, logits=logits, loss=loss, **changes)


TASK = linear()
STILL = linear(lr=lambda client, message: jnp.float32(0))
PROBLEM = tiny_problem()
QUICK = {"per_class": EACH, "real": EACH, "least": EACH, "steps": 2, "server_epochs": 2, "server_batch": 6}


def dm(**options):
    return lambda task: fed_dm(task, **{**QUICK, **options})


def even(classes=((0, 1, 2), (1, 2), (0, 1, 2))):
    """Clients with exactly `EACH` examples of each of their classes."""
    of = {c: iter(np.flatnonzero(PROBLEM.y == c)[1:]) for c in range(CLASSES)}
    rows = [[next(of[c]) for c in own for _ in range(EACH)] for own in classes]
    return PROBLEM._replace(
        rows=np.concatenate(rows).astype(np.int32), offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64)
    )


EVEN, ALL = even(), (0, 1, 2)


def shown(make, problem, cohorts, task):
    """The server's state, and the examples (x, y, weight) that it trained on in each round."""
    seen = []
    server, _, _ = run(
        lambda t: make(t, watch=lambda round, x, y, w: seen.append((x, y, w))), problem, cohorts, task=task
    )
    return server, seen


# --- the oracles


def test_a_of_all_real_examples_the_server_trains_on_the_pool():
    """As many synthetic examples as there are real ones, at a rate of zero: SGD on the pooled data, the same batches."""
    server, ((x, y, w),) = shown(lambda t, **o: fed_dm(t, **QUICK, **o), EVEN, (ALL,), STILL)
    pooled = {tuple(row) for row in np.round(EVEN.x[EVEN.rows], 5).tolist()}
    assert {tuple(row) for row in np.round(x[w > 0], 5).tolist()} == pooled and len(pooled) == int((w > 0).sum())
    from fedsim.engine.keys import key_for

    key, params = key_for(jax.random.key(0), "server", 1), START
    order = server_training.order(jax.random.split(key)[0], len(x), 6, 2 * -(-len(x) // 6))
    state = (optimizer := optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, 0.9))).init(params)
    for rows in np.asarray(order):

        def loss(params, rows=rows):
            each = optax.softmax_cross_entropy_with_integer_labels(TASK.logits((), params, x[rows]), y[rows])
            return (each * w[rows]).sum() / max(w[rows].sum(), 1e-9)

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    same(params, server.params, "training on the pool", rtol=1e-5)


@pytest.mark.slow
def test_b_one_step_on_the_pool_is_fed_avg_with_one_full_batch():
    """Clients of 12, 8 and 12 examples: the mean over the pool weighs them by their numbers."""
    task = STILL._replace(passes=Passes(1, None, 40))
    averaged = task._replace(lr=lambda client, message: jnp.float32(0.5))
    plain, _, _ = run(fed_avg, EVEN, (ALL,), task=averaged)
    once = dm(server_epochs=1, server_batch=100, server_rate=0.5, server_momentum=0.0, server_decay=0.0)
    found, _, _ = run(once, EVEN, (ALL,), task=task)
    same(plain.params, found.params, "one step", rtol=1e-5)


def test_c_without_a_ball_the_model_is_the_servers():
    same(perturbed(jax.random.key(0), START, 0.0), START, "rho = 0", rtol=0)
    moved = perturbed(jax.random.key(0), START, 2.0)
    length = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, moved, START))
    np.testing.assert_allclose(length, 2.0, rtol=1e-5)  # far more entries than rho^2 would do


def test_the_ball_of_a_small_model_is_small():
    """As far for each entry as in the paper's network, and never further than there."""
    sized = lambda n: radius({"w": jnp.zeros(n)})  # noqa: E731 - one expression, named
    assert sized(320_010) == sized(10**6) == 5
    np.testing.assert_allclose(sized(3_200) / np.sqrt(3_200), 5 / np.sqrt(320_010), rtol=1e-6)


@pytest.mark.parametrize("rho", [0.5, 1e3])
def test_c_the_ball_is_not_left(rho):
    for seed in range(5):
        moved = perturbed(jax.random.key(seed), START, rho)
        assert float(optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, moved, START))) <= rho * (1 + 1e-6)


def test_c_what_lies_in_the_ball_is_not_drawn_out_to_its_edge():
    near = perturbed(jax.random.key(0), START, 1e3)
    same(near, perturbed(jax.random.key(0), START, 1e6), "any larger ball", rtol=0)
    assert float(optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, near, START))) < 1e2


def test_d_the_real_examples_are_a_fixed_point():
    _, ((x, y, w),) = shown(lambda t, **o: fed_dm(t, **{**QUICK, "steps": 5}, **o), EVEN, (ALL,), TASK)
    real = EVEN.x[EVEN.rows]
    for one, label in zip(x[w > 0], y[w > 0], strict=True):
        gaps = np.abs(real - one).max(axis=1)
        assert gaps.min() < 1e-4 and EVEN.y[EVEN.rows][gaps.argmin()] == label


@pytest.mark.parametrize("options", [{"server_epochs": 0}, {"server_rate": 0.0}], ids=str)
def test_e_a_server_that_takes_no_step_keeps_its_model(options):
    server, _, _ = run(dm(**options), EVEN, (ALL,), task=TASK)
    same(START, server.params, str(options), rtol=0)


def test_f_a_rate_of_zero_sends_real_examples():
    _, ((x, y, w),) = shown(lambda t, **o: fed_dm(t, **{**QUICK, "per_class": 2}, **o), PROBLEM, (COHORT,), STILL)
    for one, label in zip(x[w > 0], y[w > 0], strict=True):
        (place,) = np.flatnonzero((PROBLEM.x == one).all(axis=1))
        assert PROBLEM.y[place] == label


def test_g_of_linear_features_the_gradient_has_a_closed_form():
    """(2 / I) of A'(mean h(S) - mean h(B)) + (A K)'(mean z(S) - mean z(B)), for each of a class' I examples."""
    rng = np.random.default_rng(0)
    s, real = (jnp.asarray(rng.normal(size=(1, n, 6)), jnp.float32) for n in (3, 5))
    mask, has = jnp.ones((1, 5)), jnp.ones(1, bool)

    def value(s):
        return apart(TASK, (), START, s, real, mask, has)

    found = jax.grad(value)(s)
    a, k = np.asarray(START["hidden"]), np.asarray(START["head/kernel"])
    gap = np.asarray(s[0].mean(axis=0) - real[0].mean(axis=0))
    expected = 2 / 3 * (a @ (a.T @ gap) + a @ k @ (k.T @ a.T @ gap))
    np.testing.assert_allclose(found[0], np.tile(expected, (3, 1)), rtol=1e-4, atol=1e-6)
    moved = [s]
    for _ in range(20):
        moved.append(moved[-1] - 0.05 * jax.grad(value)(moved[-1]))
    losses = [float(value(each)) for each in moved]
    assert losses == sorted(losses, reverse=True) and losses[-1] >= 0 and losses[-1] < 0.9 * losses[0]


# --- properties


def classes_of(problem, id, least):
    """Classes of which a client has enough."""
    y = problem.y[problem.rows[problem.offsets[id] : problem.offsets[id + 1]]]
    return [c for c in range(CLASSES) if (y == c).sum() >= least]


@pytest.mark.slow
def test_labels_and_bytes_are_those_of_the_classes_that_clients_have():
    own = {id: classes_of(PROBLEM, id, EACH) for id in COHORT}
    assert 0 < sum(map(len, own.values())) < CLASSES * len(COHORT)
    for options, more, entry in (({}, 0, 4), ({"weighted": True}, 4, 4)):
        _, _, (cohort,) = run(dm(**options), PROBLEM, (COHORT,), task=TASK)
        down, up = (sum(way.values()) for way in cohort.traffic())
        assert up == sum(len(each) * (EACH * 6 * entry + more) + 1 for each in own.values())
        assert down == len(COHORT) * 4 * sum(leaf.size for leaf in START.values())
    _, ((_, y, w),) = shown(lambda t, **o: fed_dm(t, **QUICK, **o), PROBLEM, (COHORT,), TASK)
    count = np.bincount(y[w > 0], minlength=CLASSES)
    assert count.tolist() == [EACH * sum(c in each for each in own.values()) for c in range(CLASSES)]


@pytest.mark.slow
def test_weights_by_examples_restore_fed_avgs_objective():
    """Of each class n / I, so that a client's examples weigh as much as it has real ones of these classes."""
    _, ((_, y, w),) = shown(lambda t, **o: fed_dm(t, **{**QUICK, "weighted": True}, **o), PROBLEM, (COHORT,), TASK)
    for place, id in enumerate(COHORT):
        labels = PROBLEM.y[PROBLEM.rows[PROBLEM.offsets[id] : PROBLEM.offsets[id + 1]]]
        own = w.reshape(len(COHORT), -1)[place]
        of = y.reshape(len(COHORT), -1)[place]
        for c in classes_of(PROBLEM, id, EACH):
            np.testing.assert_allclose(own[of == c].sum(), (labels == c).sum(), rtol=1e-6)


def test_rows_are_of_the_class_topped_up_with_replacement():
    labels = np.array([0] * 3 + [1] * 9 + [2] * 40)
    blocks = chosen(CLASSES, 16, 4)(labels, np.random.default_rng(0))
    for _ in range(3):
        of = next(blocks).reshape(CLASSES, 16)
        assert (of[0] == -1).all()  # three are fewer than four
        assert set(of[1]) == set(range(3, 12)) and len(set(of[2])) == 16 and (labels[of[2]] == 2).all()
    steps = steps_of(CLASSES, 7, 4)
    assert steps(labels) == 7 and steps(labels[:3]) == 1 and steps(labels[:0]) == 0


@pytest.mark.slow
def test_the_order_of_clients_does_not_matter_to_a_full_batch():
    make = dm(server_batch=200, server_epochs=1)
    a, _, _ = run(make, PROBLEM, (COHORT,), task=TASK)
    b, _, _ = run(make, PROBLEM, (COHORT[::-1],), task=TASK)
    same(a.params, b.params, "clients in another order", rtol=1e-5)


@pytest.mark.slow
def test_bytes_of_images_may_be_eight_bits():
    """Images come as bytes: what is learnt are intensities, and with uint8 they go back as bytes."""
    x = np.random.default_rng(0).integers(0, 256, PROBLEM.x.shape).astype(np.uint8)
    problem = EVEN._replace(x=x)
    task = STILL._replace(inputs=lambda x: 2 * x - 1)
    server, ((found, _, w),) = shown(lambda t, **o: fed_dm(t, **QUICK, uint8=True, **o), problem, (ALL,), task)
    assert found.dtype == np.uint8
    sent = {tuple(row) for row in found[w > 0].tolist()}
    assert sent == {tuple(row) for row in x[problem.rows].tolist()}
    _, _, (cohort,) = run(dm(uint8=True), problem, (ALL,), task=task)
    assert sum(cohort.traffic()[1].values()) == len(problem.rows) * 6 + 3
    floats, _, _ = run(dm(), problem, (ALL,), task=task)
    same(floats.params, server.params, "four bytes or one", rtol=1e-5)


def test_noise_is_added_to_a_gradient_that_was_cut():
    grads = {"x": jnp.full((50, 100), 3.0)}
    alone = cut(grads, jax.random.key(0), 0.5, 0.0)
    np.testing.assert_allclose(optax.tree_utils.tree_norm(alone), 0.5, rtol=2e-4)  # with the clip's slack
    small = {"x": jnp.full((50, 100), 1e-4)}
    same(cut(small, jax.random.key(0), 0.5, 0.0), small, "a short one", rtol=1e-6)
    noise = np.asarray(cut(grads, jax.random.key(0), 0.5, 1.4)["x"] - alone["x"])
    np.testing.assert_allclose(noise.std(), 1.4 * 0.5, rtol=0.05)
    assert abs(noise.mean()) < 0.05
    other = np.asarray(cut(grads, jax.random.key(1), 0.5, 1.4)["x"] - alone["x"])
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.05


@pytest.mark.slow
def test_privately_no_real_example_begins():
    """From noise, with a gradient cut to nothing: what is sent does not depend on the data."""
    options = {**QUICK, "clip": 1e-6, "noise": 0.0, "init": "noise"}
    _, ((x, _, w),) = shown(lambda t, **o: fed_dm(t, **options, **o), EVEN, (ALL,), TASK)
    other = EVEN._replace(x=EVEN.x + 1)
    _, ((y, _, _),) = shown(lambda t, **o: fed_dm(t, **options, **o), other, (ALL,), TASK)
    np.testing.assert_allclose(x[w > 0], y[w > 0], atol=1e-4)
    assert x[w > 0].std() > 0.5
    with pytest.raises(ValueError, match=r"Expected init='noise' with clip=1\.0"):
        dm(clip=1.0)(TASK)


def test_bytes_are_rounded_and_clamped():
    parts = Matching(TASK, Recipe(1, 1, 1, 0.0, "real", 1, True, False, None, 0.0))
    learnt = Learning(jnp.asarray([[[2.6 / 255, -1.0, 2.0]]] * CLASSES), jnp.ones(CLASSES, bool), (), jnp.float32(0))
    client = Client(*(jnp.int32(0),) * 2, (), jax.random.key(0), jnp.int32(1), jnp.float32(0), jnp.int32(1))
    reply = wire.unmarked(parts.end((), START, learnt, client)[0])
    np.testing.assert_array_equal(reply["x"], [[[3, 0, 255]]] * CLASSES)


@pytest.mark.slow
def test_masks_go_along_with_what_is_learnt():
    """Texts behind a frozen part are vectors of tokens and a mask of those that are real: the mask stays its example's."""

    def features(held, params, x):
        return jnp.where(x["mask"][..., None], x["x"], 0.0).sum(axis=1) @ params["hidden"]

    rng = np.random.default_rng(0)
    task = TASK._replace(
        features=features, logits=lambda held, params, x: features(held, params, x) @ params["head/kernel"]
    )
    parts = Matching(task, Recipe(1, 1, 2, 0.0, "real", 1, False, False, None, 0.0))
    x = {"x": jnp.asarray(rng.normal(size=(6, 5, 6)), jnp.float32), "mask": jnp.asarray(rng.random((6, 5)) > 0.5)}
    batch = Batch(x, jnp.arange(6) // 2, jnp.ones(6), jax.random.key(1), jnp.int32(0), jnp.bool_(True))
    client = Client(*(jnp.int32(0),) * 2, (), jax.random.key(0), jnp.int32(1), jnp.float32(0), jnp.int32(1))
    carry = parts.begin((), START, client, batch)
    moved, metrics = parts.step((), START, carry, batch)
    reply = wire.unmarked(parts.end((), START, moved, client)[0])
    assert float(metrics["matching"]) > 0 and reply["x"]["mask"].dtype == jnp.int8
    pooled, y, w = parts.pooled(Stacked(jax.tree.map(lambda leaf: leaf[None], reply), jnp.ones(1)), None)
    np.testing.assert_array_equal(pooled["mask"], x["mask"][::2])
    np.testing.assert_array_equal((y, w), ([0, 1, 2], [1, 1, 1]))
    gap = np.abs(np.asarray(pooled["x"]) - np.asarray(x["x"][::2])).max(axis=-1)
    assert (gap[np.asarray(x["mask"][::2])] > 0).all() and (gap[~np.asarray(x["mask"][::2])] == 0).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_dm(per_class=0)", r"Expected per_class=0 >= 1"),
        ("fed_dm(per_class=300)", r"Expected real=256 >= per_class=300"),
        ("fed_dm(rho=-1)", r"Expected rho=-1\.0 >= 0"),
        ("fed_dm(init='zeros')", r"init='zeros' to be one of real, noise"),
        ("fed_dm(noise=1.0)", r"Expected clip with noise=1\.0"),
        ("fed_dm(server_momentum=1)", r"server_momentum=1\.0 < 1"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)


def test_inputs_that_cannot_be_learnt_are_refused():
    with pytest.raises(ValueError, match="a language model has none"):
        fed_dm(TASK._replace(classes=0))
    with pytest.raises(ValueError, match=r"Expected a model with features"):
        fed_dm(TASK._replace(features=None))
    with pytest.raises(ValueError, match=r"to be images or numbers"):
        run(dm(), EVEN._replace(x=EVEN.x.astype(np.int32)), (ALL,), task=TASK)
    with pytest.raises(ValueError, match=r"uint8=True to meet images of bytes"):
        run(dm(uint8=True), EVEN, (ALL,), task=TASK)
