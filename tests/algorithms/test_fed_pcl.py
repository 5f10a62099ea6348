"""FedPCL by the letters of its oracles: FedAvg's probe, nearest class means, identical clients, one client, softmax, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from brief import brief
from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_pcl import Bank, code_loss, fed_pcl, paper_loss
from fedsim.algorithms.prototypes import bits, flags, means, unit
from fedsim.core import Passes
from fedsim.folds import uniform
from fedsim.testing.contract import same
from fedsim.testing.tasks import CLASSES, tiny_head_task
from fedsim.testing.toys import COHORT, one_client, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = (COHORT, (3, 11, 10, 6, 5, 8), (7, 5, 3, 2, 8, 10))
START = tiny_head_task().init(jax.random.key(5))
TASK = tiny_head_task(init=lambda key: START)
WIDTH, BITS = 4, 1  # of a prototype, and bytes that say which of three classes there are
EVERYBODY = tuple(id for id in range(12) if id != 3)


def kept(memory, *ids):
    """What these clients keep, side by side."""
    return jax.tree.map(jnp.asarray, memory.gather(np.array(ids))[0])


def pcl(**options):
    return lambda task: fed_pcl(task, **options)


def example(m=3, classes=4, batch=9, seed=0):
    """Features, labels, a mask and a bank with holes: client 0 lacks class 1, and nobody has the last class."""
    rng = np.random.default_rng(seed)
    rows = lambda *shape: unit(jnp.asarray(rng.uniform(size=shape), jnp.float32))  # noqa: E731 - one expression, named
    has = np.ones((m, classes), bool)
    has[0, 1] = False
    has[:, -1] = False
    sets = jnp.where(has[..., None], rows(m, classes, 5), 0)
    mean, known = means(sets, jnp.asarray(has))
    mask = np.ones(batch, np.float32)
    mask[-2:] = 0
    y = rng.integers(0, classes - 1, batch)
    return rows(batch, 5), jnp.asarray(y, jnp.int32), jnp.asarray(mask), Bank(sets, jnp.asarray(has), mean, known)


def filled(bank):
    """Every client's prototypes, those that it has not got the mean's, NumPy."""
    sets, has, mean = (np.asarray(leaf) for leaf in (bank.sets, bank.has, bank.mean))
    return np.where(has[..., None], sets, mean)


# --- the oracles


@pytest.mark.slow
def test_a_it_is_not_fed_avg_but_cross_entropy_and_shared_parameters_are():
    plain, _, before = run(fed_avg, PROBLEM, COHORTS, task=TASK)
    probe, _, after = run(pcl(loss="ce"), PROBLEM, COHORTS, task=TASK)
    same(plain.params, probe.params, "cross-entropy, parameters shared", rtol=1e-6)
    assert [c.traffic() for c in before] == [
        tuple({name.removeprefix("params/"): n for name, n in way.items()} for way in c.traffic()) for c in after
    ]
    own, _, _ = run(pcl(), PROBLEM, COHORTS, task=TASK)
    same(START, own.params, "no parameter of FedPCL's ever reaches the server", rtol=0)


def nearest(params, id, x):
    """Class of the nearest mean of a client's examples behind the projection, in NumPy."""
    rows = PROBLEM.rows[PROBLEM.offsets[id] : PROBLEM.offsets[id + 1]]

    def z(x):
        features = np.tanh(x @ np.asarray(params["hidden"]))
        return features / np.linalg.norm(features, axis=-1, keepdims=True)

    far = np.full((len(x), CLASSES), np.inf)
    for c in range(CLASSES):
        own = rows[PROBLEM.y[rows] == c]
        if len(own):
            far[:, c] = ((z(x) - z(PROBLEM.x[own]).mean(axis=0)) ** 2).sum(axis=-1)
    return far.argmin(axis=1)


@pytest.mark.parametrize("loss", ["paper", "code"])
def test_b_without_a_step_it_is_the_nearest_class_mean_of_the_first_projection(loss):
    still = TASK._replace(lr=lambda client, message: jnp.float32(0))
    make = pcl(loss=loss)
    server, memory, _ = run(make, PROBLEM, (COHORT,), task=still)
    both = kept(memory, 7, 1)
    for place, id in enumerate((7, 1)):
        own = jax.tree.map(lambda leaf, at=place: leaf[at], both)
        same(own.params, {"hidden": START["hidden"]}, "a rate of zero", rtol=0)
        found = make(still).predict(PROBLEM.held, server, own, PROBLEM.x[:60]).argmax(axis=1)
        np.testing.assert_array_equal(found, nearest(START, id, PROBLEM.x[:60]))


def alike(copies):
    """As many clients with the same seven examples."""
    rows = np.tile(PROBLEM.rows[:7], copies)
    return PROBLEM._replace(rows=rows, offsets=np.arange(copies + 1) * 7)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "scale"), [("paper", 1), ("code", 3)])
def test_c_identical_clients_train_as_one_alone(loss, scale):
    """The sum over sets of the code's form is three times as long, which a third of the rate undoes."""
    task = TASK._replace(optimizer=optax.sgd, passes=Passes(2, None, 8, shuffle=False))
    rated = lambda rate: task._replace(lr=lambda client, message: jnp.float32(rate))  # noqa: E731 - one expression, named
    _, one, _ = run(pcl(loss=loss), alike(1), ((0,),) * 2, task=rated(0.3))
    _, three, _ = run(pcl(loss=loss), alike(3), ((0, 1, 2),) * 2, task=rated(0.3 / scale))
    alone, together = kept(one, 0), kept(three, 0, 1, 2)
    assert float(jnp.abs(alone.params["hidden"][0] - START["hidden"]).max()) > 1e-3
    for id in range(3):
        same(
            jax.tree.map(lambda leaf: leaf[0], alone),
            jax.tree.map(lambda leaf, id=id: leaf[id], together),
            "three",
            rtol=1e-4,
        )
    sets = jnp.broadcast_to(unit(jnp.eye(3, 4) + 0.2), (3, 3, 4))
    z, y = unit(jnp.abs(jax.random.normal(jax.random.key(0), (6, 4)))), jnp.arange(6) % 3
    bank, every = Bank(sets, jnp.ones((3, 3), bool), sets[0], jnp.ones(3, bool)), jnp.ones(6)
    both, shared = (
        paper_loss(z, y, every, of, 0.07, True) for of in (bank, bank._replace(sets=sets[:0], has=bank.has[:0]))
    )
    np.testing.assert_allclose(both, 2 * shared, rtol=1e-6)  # L_p is L_g


@pytest.mark.slow
def test_d_of_one_client_the_mean_is_its_prototype():
    server, _, _ = run(pcl(), PROBLEM, ((7,),), task=TASK)
    y, rows = PROBLEM.y, PROBLEM.rows[PROBLEM.offsets[7] : PROBLEM.offsets[8]]
    z = np.asarray(unit(TASK.features(PROBLEM.held, START, jnp.asarray(PROBLEM.x[rows]))))
    for c in range(CLASSES):
        np.testing.assert_allclose(server.mean[c], z[y[rows] == c].mean(axis=0), rtol=1e-5)


@pytest.mark.slow
def test_e_of_the_mean_alone_it_is_softmax_with_its_prototypes_as_weights():
    z, y, mask, bank = example()
    alone = bank._replace(sets=bank.sets[:0], has=bank.has[:0])
    found = paper_loss(z, y, mask, alone, 0.07, True)
    known = np.flatnonzero(np.asarray(bank.known))
    logits = z @ bank.mean[known].T / 0.07  # labels are below the class that nobody has
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    np.testing.assert_allclose(found, (expected * mask).sum() / mask.sum(), rtol=1e-5)


@pytest.mark.parametrize(("positive", "limit"), [(True, np.log(3)), (False, np.log(2))])
def test_f_a_high_temperature_leaves_the_number_of_classes_and_no_gradient(positive, limit):
    z, y, mask, bank = example()
    alone = bank._replace(sets=bank.sets[:0], has=bank.has[:0])
    value, grads = jax.value_and_grad(paper_loss)(z, y, mask, alone, 1e6, positive)
    np.testing.assert_allclose(value, limit, rtol=1e-5)
    assert float(jnp.abs(grads).max()) < 1e-6


# --- both losses against plain loops


def by_hand_paper(z, y, mask, bank, tau, positive):
    z, y, mask = (np.asarray(leaf, np.float64) for leaf in (z, y, mask))
    known, total = np.flatnonzero(np.asarray(bank.known)), 0.0
    of_each = filled(bank)
    for one, label, real in zip(z, y.astype(int), mask, strict=True):

        def term(prototypes, one=one, label=label):
            others = [c for c in known if positive or c != label]
            below = sum(np.exp(one @ prototypes[c] / tau) for c in others)
            return -np.log(np.exp(one @ prototypes[label] / tau) / below)

        total += real * (term(np.asarray(bank.mean)) + np.mean([term(p) for p in of_each]))
    return total / mask.sum()


def by_hand_code(z, y, mask, bank, tau):
    """SupCon with a prototype of the anchor's class in its place, both views, summed over the clients."""
    z, y = (np.concatenate([np.asarray(leaf)[np.asarray(mask) > 0]] * 2).astype(np.float64) for leaf in (z, y))
    total = 0.0
    for prototypes in filled(bank):
        each = []
        for a in range(len(y)):
            anchor, others = prototypes[int(y[a])], [q for q in range(len(y)) if q != a]
            below = np.log(sum(np.exp(anchor @ z[q] / tau) for q in others))
            positives = [q for q in others if y[q] == y[a]]
            each.append(-np.mean([anchor @ z[q] / tau - below for q in positives]))
        total += np.mean(each)
    return total


@pytest.mark.parametrize("positive", [True, False])
def test_the_papers_loss_is_its_loop(positive):
    z, y, mask, bank = example()
    found = paper_loss(z, y, mask, bank, 0.1, positive)
    np.testing.assert_allclose(found, by_hand_paper(z, y, mask, bank, 0.1, positive), rtol=1e-5)


def test_the_codes_loss_is_its_loop():
    z, y, mask, bank = example()
    found = code_loss(jnp.stack([z, z]), y, mask, bank, 0.1)
    np.testing.assert_allclose(found, by_hand_code(z, y, mask, bank, 0.1), rtol=1e-5)


@pytest.mark.parametrize("loss", brief(["paper", "code"]))
def test_a_client_descends_the_loss_of_what_it_was_sent(loss):
    """One step of SGD on all of its examples: the gradient is that of the loss with the prototypes fixed."""
    task = TASK._replace(
        optimizer=optax.sgd, passes=Passes(1, None, 40, shuffle=False), lr=lambda client, message: jnp.float32(0.2)
    )
    _, memory, _ = run(pcl(loss=loss), PROBLEM, (COHORT,), task=task)
    sets, has = [], []
    z_of = lambda hidden, rows: unit(jnp.tanh(PROBLEM.x[rows] @ hidden))  # noqa: E731 - one expression, named
    for id in COHORT:
        rows = PROBLEM.rows[PROBLEM.offsets[id] : PROBLEM.offsets[id + 1]]
        labels = PROBLEM.y[rows]
        z = np.asarray(z_of(START["hidden"], rows))
        has.append([(labels == c).any() for c in range(CLASSES)])
        sets.append([z[labels == c].mean(axis=0) if (labels == c).any() else np.zeros(WIDTH) for c in range(CLASSES)])
    sets, has = jnp.asarray(np.array(sets), jnp.float32), jnp.asarray(np.array(has))
    bank, rows = Bank(sets, has, *means(sets, has)), PROBLEM.rows[PROBLEM.offsets[7] : PROBLEM.offsets[8]]

    def value(hidden):
        z, y, mask = z_of(hidden, rows), jnp.asarray(PROBLEM.y[rows]), jnp.ones(len(rows))
        return (
            paper_loss(z, y, mask, bank, 0.07, True)
            if loss == "paper"
            else code_loss(jnp.stack([z, z]), y, mask, bank, 0.07)
        )

    expected = START["hidden"] - 0.2 * jax.grad(value)(START["hidden"])
    np.testing.assert_allclose(
        kept(memory, 7).params["hidden"][0], expected, rtol=1e-3, atol=1e-4 * (6 if loss == "code" else 1)
    )


# --- properties


def test_bytes_are_the_formulas():
    """Up 4 d |C_i|, down 4 d (sum_p |C_p| + |union|), and a bit for each class of each set."""
    of = {
        id: len(set(PROBLEM.y[PROBLEM.rows[PROBLEM.offsets[id] : PROBLEM.offsets[id + 1]]].tolist())) for id in COHORT
    }
    together = sum(of.values())
    assert together < CLASSES * len(COHORT)  # one client lacks a class
    cohorts = {name: run(make, PROBLEM, (COHORT,), task=TASK)[2][0] for name, make in {
        "all": pcl(), "mean": pcl(bank="global_only"), "two": pcl(most=2)}.items()}  # fmt: skip
    down, up = ({name: sum(c.traffic()[way].values()) for name, c in cohorts.items()} for way in (0, 1))
    assert set(up.values()) == {4 * WIDTH * together + BITS * len(COHORT)}
    whole = 4 * WIDTH * (together + CLASSES) + BITS * (len(COHORT) + 1)
    assert down["all"] == len(COHORT) * whole
    assert down["mean"] == len(COHORT) * (4 * WIDTH * CLASSES + BITS)
    assert down["mean"] < down["two"] < down["all"]


@pytest.mark.slow
def test_clients_may_come_in_any_order():
    server, memory, _ = run(pcl(), PROBLEM, (COHORT,), task=TASK)
    other, turned, _ = run(pcl(), PROBLEM, (COHORT[::-1],), task=TASK)
    same(server.mean, other.mean, "the mean", rtol=1e-5)
    same(kept(memory, *COHORT), kept(turned, *COHORT), "what clients keep", rtol=1e-4)


@pytest.mark.slow
def test_prototypes_do_not_depend_on_batches():
    small, _, _ = run(pcl(), PROBLEM, (EVERYBODY,), task=TASK)
    large, _, _ = run(pcl(), PROBLEM, (EVERYBODY,), task=TASK._replace(passes=Passes(1, None, 50)))
    same(small.mean, large.mean, "batches of 4 and 50", rtol=1e-5)


def test_a_class_that_nobody_has_shifts_nothing():
    z, y, mask, bank = example()
    less = Bank(bank.sets[:, :3], bank.has[:, :3], bank.mean[:3], bank.known[:3])
    for positive in (True, False):
        np.testing.assert_allclose(
            paper_loss(z, y, mask, bank, 0.07, positive), paper_loss(z, y, mask, less, 0.07, positive), rtol=1e-6
        )
    views = jnp.stack([z, z])
    np.testing.assert_allclose(code_loss(views, y, mask, bank, 0.07), code_loss(views, y, mask, less, 0.07), rtol=1e-6)


def test_means_are_of_those_that_have_the_class():
    sets = jnp.arange(12.0).reshape(3, 2, 2)
    has = jnp.asarray([[True, False], [True, False], [False, False]])
    mean, known = means(sets, has)
    np.testing.assert_array_equal(mean, [[2, 3], [0, 0]])  # unweighted: of the first two
    np.testing.assert_array_equal(known, [True, False])


def test_features_have_length_one_or_none():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


@pytest.mark.parametrize("classes", [3, 8, 10, 17])
def test_flags_survive_their_bits(classes):
    has = jax.random.bernoulli(jax.random.key(0), 0.5, (4, classes))
    packed = bits(has)
    assert packed.dtype == jnp.uint8 and packed.shape == (4, -(-classes // 8))
    np.testing.assert_array_equal(flags(packed, classes), has)


def test_a_lone_example_without_a_second_is_no_positive():
    """Of one class each, with a single view: nothing to pull at, and no 0 / 0."""
    z, y, _, bank = example(batch=3)
    one = code_loss(z[None, :1], y[:1], jnp.ones(1), bank, 0.07)
    assert float(one) == 0
    assert np.isfinite(jax.grad(lambda z: code_loss(z[None, :1], y[:1], jnp.ones(1), bank, 0.07))(z)).all()


def test_one_known_class_pulls_at_nothing():
    z, _, mask, bank = example()
    y, has = jnp.zeros(len(z), jnp.int32), bank.has.at[:, 1:].set(False)
    bank = Bank(bank.sets, has, *means(bank.sets, has))
    for positive in (True, False):
        value, grads = jax.value_and_grad(paper_loss)(z, y, mask, bank, 0.07, positive)
        assert float(value) == 0 and float(jnp.abs(grads).max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["paper", "code"])
def test_without_a_prototype_not_even_weight_decay_moves_a_client(loss):
    """As in the code's first round, whose Adam shrinks all weights before there is anything to learn from."""
    task = TASK._replace(optimizer=lambda rate: optax.adamw(rate, weight_decay=0.5))
    sent = []
    run(pcl(loss=loss), PROBLEM, (COHORT,), task=task, sent=sent)
    training = sent[1]
    message = wire.unmarked(training.message)
    nothing = jax.tree.map(jnp.zeros_like, message)
    own = fed_pcl(task, loss=loss).memory(jax.random.key(0), PROBLEM.held)
    _, before = one_client(PROBLEM, training.local, nothing, own, 7, 1)
    same(before.params, own.params, "no prototype", rtol=0)
    _, after = one_client(PROBLEM, training.local, message, own, 7, 1)
    assert float(jnp.abs(after.params["hidden"] - own.params["hidden"]).max()) > 1e-3


@pytest.mark.slow
def test_classes_that_a_client_has_not_got_are_never_its_answer():
    y, rows = PROBLEM.y.copy(), PROBLEM.rows[PROBLEM.offsets[7] : PROBLEM.offsets[8]]
    y[rows] = 1
    server, memory, _ = run(pcl(), PROBLEM._replace(y=y), (COHORT,), task=TASK)
    own = jax.tree.map(lambda leaf: leaf[0], kept(memory, 7))
    found = fed_pcl(TASK).predict(PROBLEM.held, server, own, PROBLEM.x[:40])
    assert np.isfinite(found).all() and (np.asarray(found).argmax(axis=1) == 1).all()


@pytest.mark.slow
def test_random_views_are_two_in_the_codes_form():
    """With changes of inputs the two views differ; without them they are alike."""
    noisy = TASK._replace(augment=lambda key, x: x + 0.5 * jax.random.normal(key, x.shape))
    _, plain, _ = run(pcl(loss="code"), PROBLEM, (COHORT,), task=TASK)
    _, changed, _ = run(pcl(loss="code"), PROBLEM, (COHORT,), task=noisy)
    a, b = (kept(found, 7).params["hidden"] for found in (plain, changed))
    assert float(jnp.abs(a - b).max()) > 1e-4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_pcl(tau=0)", r"Expected tau=0\.0 > 0"),
        ("fed_pcl(loss='mse')", r"loss='mse' to be one of paper, code, ce"),
        ("fed_pcl(bank='none')", r"bank='none' to be one of all, global_only"),
        ("fed_pcl(most=0)", r"Expected most=0 >= 1"),
        ("fed_pcl(most=2, bank='global_only')", r"Expected most=2 to be unset with bank='global_only'"),
        ("fed_pcl(loss='code', include_positive=False)", r"Expected include_positive=True with loss='code'"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)


def test_models_that_have_nothing_to_project_are_refused():
    with pytest.raises(ValueError, match=r"Expected classes for algorithm='fed_pcl'"):
        fed_pcl(TASK._replace(classes=0))
    with pytest.raises(ValueError, match=r"Expected more than the head to be trained"):
        fed_pcl(TASK._replace(trained=frozenset({"head/kernel", "head/bias"})))
    with pytest.raises(ValueError, match=r"Expected a model with features"):
        fed_pcl(TASK._replace(features=None, weight=uniform))
