"""Fed-ET by the letters of its oracles, beside FedAvg and FedDF; a round in NumPy; votes, labels that nobody reads, bytes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedsim
from fedsim import record
from fedsim.algorithms import find
from fedsim.algorithms.distillation import Lesson, asking, studying
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_df import fed_df
from fedsim.algorithms.fed_et import common, confidence, fed_et, shares, together
from fedsim.algorithms.fed_et import lesson_of as fed_et_lesson
from fedsim.cli import cost
from fedsim.config import Config, Speed
from fedsim.core import Passes
from fedsim.data import partition
from fedsim.engine.keys import key_for
from fedsim.simulation import build
from fedsim.testing.contract import same
from fedsim.testing.tasks import CLASSES, FEATURES, shared_head, tiny_deep_task, tiny_head_task
from fedsim.testing.toys import run, tiny_problem, visits
from fedsim.training import server as server_training

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)
ONE = ((2, 0, 4), (10, 6, 8), (2, 8, 10))  # of one architecture: even ids, which the toy puts into the first group
BOTH = ((2, 7, 9, 0),)
PLAIN = {
    "optimizer": optax.sgd,
    "lr": lambda client, message: jnp.float32(0.3),
    "passes": Passes(1, None, 8),
}
QUICK = {"server_steps": 6, "server_batch": 5, "server_rate": 0.2}


def fixed(task, seed=5):
    """The task with one start whatever the key, as a run has it."""
    start = task.init(jax.random.key(seed))
    return task._replace(init=lambda key: start)


def alone(task, name="small"):
    """The task without groups, whose clients draw their batches as those of this group do."""
    return task._replace(passes=task.passes._replace(stream=name))


@functools.cache
def et(**options):
    """Fed-ET with these options, whose programs are compiled once for each task."""
    made = functools.cache(lambda name: fed_et(TASKS[name], **{**QUICK, **options}))
    return lambda task: made(next(name for name, one in TASKS.items() if one is task))


SMALL = fixed(tiny_head_task(**PLAIN))
DEEP = fixed(tiny_deep_task(5, **PLAIN), 6)
LARGE = fixed(tiny_deep_task(8, **PLAIN), 7)
ALIKE = SMALL._replace(groups={"small": SMALL, "server": SMALL})
OTHER = LARGE._replace(groups={"small": SMALL, "server": LARGE})
TASK = LARGE._replace(groups={"small": SMALL, "large": DEEP, "server": LARGE})
TASKS = {"alike": ALIKE, "other": OTHER, "both": TASK}
lesson_of = jax.jit(fed_et_lesson, static_argnums=(2, 3))


def logits_of(m=4, q=7, seed=0):
    """Logits (Q, M, C) of m clients, as different as those of different models are."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(q, m, 5)) * rng.uniform(0.5, 3, size=(1, m, 1)), jnp.float32)


def everybody(m=4):
    return jnp.ones(m, bool)


def learnt(lesson, lam, rate=0.5):
    """The large model after two steps on a lesson of the problem's first examples."""
    optimizer, start = optax.sgd(rate), LARGE.init(jax.random.key(0))
    x = jnp.asarray(PROBLEM.x[: len(lesson.split)])
    learn = studying(LARGE._replace(classes=5), optimizer, len(x), 2, lam)
    params = start | {"head/kernel": jnp.ones((4, 5)) * jnp.arange(4.0)[:, None], "head/bias": jnp.zeros(5)}
    return learn((), params, optimizer.init(params), {"x": x, "lesson": lesson}, (), jax.random.key(1))[0]


# --- the oracles


@pytest.mark.slow
def test_a_of_one_architecture_all_of_it_shared_and_no_step_it_is_fed_avg():
    plain, _, before = run(fed_avg, PROBLEM, ONE, task=alone(SMALL))
    found, _, after = run(et(shared=("*",), server_steps=0), PROBLEM, ONE, task=ALIKE)
    same(plain.params, found.params["server"], "the server's model", rtol=1e-6)
    same(found.params["small"], found.params["server"], "the clients' and the server's", rtol=0)
    for one, other in zip(before, after, strict=True):
        assert [sum(way.values()) for way in one.traffic()] == [sum(way.values()) for way in other.traffic()]


@pytest.mark.slow
def test_b_of_one_architecture_and_no_step_the_clients_model_is_fed_avgs():
    plain, _, _ = run(fed_avg, PROBLEM, ONE, task=alone(SMALL)._replace(init=lambda key: with_head_of(SMALL, LARGE)))
    found, _, _ = run(et(server_steps=0), PROBLEM, ONE, task=OTHER)
    same(plain.params, found.params["small"], "the clients' model", rtol=1e-6)
    start = LARGE.init(jax.random.key(0))
    for path in ("first", "hidden"):
        same(start[path], found.params["server"][path], f"the server's {path}", rtol=0)
    same(found.params["small"]["head/kernel"], found.params["server"]["head/kernel"], "the head", rtol=0)


def with_head_of(task, other):
    start, head = task.init(jax.random.key(0)), other.init(jax.random.key(0))
    return {path: (head if path.startswith("head/") else start)[path] for path in start}


@pytest.mark.slow
def test_c_without_diversity_and_votes_towards_probabilities_it_is_fed_df():
    options = {**QUICK, "server_optimizer": "sgd(momentum=0.9)"}
    expected, _, _ = run(lambda task: fed_df(task, cosine=False, **options), PROBLEM, ONE[:2], task=alone(SMALL))
    made = et(lam=0.0, weights="uniform", target="soft", shared=("*",))
    found, _, _ = run(made, PROBLEM, ONE[:2], task=ALIKE)
    same(expected.params[""], found.params["server"], "FedDF's model", rtol=1e-5)
    same(expected.params[""], found.params["small"], "what clients get", rtol=1e-5)
    plain, _, _ = run(fed_avg, PROBLEM, ONE[:2], task=alone(SMALL))
    with pytest.raises(AssertionError, match="differs"):  # it has learnt something
        same(plain.params, found.params["server"], "FedAvg", rtol=1e-2)


def test_d_one_client_is_followed_by_its_label():
    logits = logits_of(m=1)
    lesson = lesson_of(logits, everybody(1))
    np.testing.assert_array_equal(lesson.target.argmax(-1), logits[:, 0].argmax(-1))
    assert not lesson.split.any()


@pytest.mark.slow
def test_d_one_client_in_a_round_has_nobody_to_dissent():
    weak, strong = (run(et(lam=lam), PROBLEM, ((2,),), task=OTHER)[0] for lam in (0.0, 5.0))
    same(weak.params, strong.params, "any diversity", rtol=0)


def test_e_identical_clients_do_not_dissent():
    lesson = lesson_of(jnp.repeat(logits_of(m=1), 4, axis=1), everybody())
    assert not lesson.split.any()
    same(learnt(lesson, 0.0), learnt(lesson, 5.0), "any diversity", rtol=0)


def test_f_without_diversity_a_minority_moves_nothing():
    logits = jnp.asarray([[[4.0, 0, 0, 0, 0], [5.0, 1, 0, 0, 0], [0, 0.9, 0, 0, 0]]] * 7)
    changed = logits.at[:, 2].set(jnp.asarray([0, 0, 0, 1.1, 0]))
    one, other = lesson_of(logits, everybody(3)), lesson_of(changed, everybody(3))
    assert one.split.all() and other.split.all() and not np.array_equal(one.other, other.other)
    same(learnt(one, 0.0), learnt(other, 0.0), "another minority", rtol=0)
    with pytest.raises(AssertionError, match="differs"):
        same(learnt(one, 0.5), learnt(other, 0.5), "another minority, with diversity", rtol=1e-6)


# --- a round in NumPy


def forward(w, x):
    """All layers' outputs of a tanh network whose last one is the head."""
    outputs = [x.astype(np.float64)]
    for name in ("first", "hidden"):
        if name in w:
            outputs.append(np.tanh(outputs[-1] @ w[name]))
    return outputs, outputs[-1] @ w["head/kernel"] + w["head/bias"]


def backward(w, outputs, g):
    """Gradients of all leaves, from those of the logits (B, C)."""
    grads = {"head/kernel": outputs[-1].T @ g, "head/bias": g.sum(axis=0)}
    g = g @ w["head/kernel"].T
    for name, below, above in zip(
        [n for n in ("hidden", "first") if n in w], outputs[-2::-1], outputs[:0:-1], strict=True
    ):
        g = g * (1 - above**2)
        grads[name] = below.T @ g
        g = g @ w[name].T
    return grads


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(cohort, lam, momentum=0.9):
    """One round of TASK in float64: the models by architecture."""
    doubles = lambda tree: {n: np.asarray(leaf, np.float64) for n, leaf in tree.items()}  # noqa: E731 - one expression, named
    start = {n: doubles(t.init(jax.random.key(0))) for n, t in TASK.groups.items()}
    head = {path: start["server"][path] for path in ("head/kernel", "head/bias")}
    returned = []
    for id in cohort:
        name = "large" if id % 2 else "small"
        w = start[name] | head
        for rows in visits(PROBLEM, PLAIN["passes"]._replace(stream=name), id, 1):
            rows = rows[rows >= 0]
            outputs, z = forward(w, PROBLEM.x[rows])
            grads = backward(w, outputs, (softmax(z) - np.eye(CLASSES)[PROBLEM.y[rows]]) / len(rows))
            w = {n: leaf - 0.3 * grads[n] for n, leaf in w.items()}
        returned.append((name, int(PROBLEM.offsets[id + 1] - PROBLEM.offsets[id]), w))

    def mean(paths, names):
        own = [(n, w) for name, n, w in returned if name in names]
        return {p: sum(n * w[p] for n, w in own) / sum(n for n, _ in own) for p in paths}

    x = PROBLEM.x[1:21]
    s = np.stack([forward(w, x)[1] for _, _, w in returned], axis=1)  # (Q, M, C)
    v = s.var(axis=-1)
    y = np.einsum("qm,qmc->qc", v / v.sum(axis=1, keepdims=True), s).argmax(axis=-1)
    dissents = s.argmax(axis=-1) != y[:, None]
    assert 0 < dissents.any(axis=1).sum() < len(x)  # both kinds of examples are there
    votes = np.where(dissents, v, 0)
    other = softmax(np.einsum("qm,qmc->qc", votes / np.maximum(votes.sum(axis=1, keepdims=True), 1e-9), s))
    gate = dissents.any(axis=1)[:, None]
    w = start["server"] | mean(head, ("small", "large"))
    speed = {n: np.zeros_like(leaf) for n, leaf in w.items()}
    for_order = jax.random.split(key_for(jax.random.key(0), "server", 1))[0]
    for rows in np.asarray(server_training.order(for_order, len(x), QUICK["server_batch"], QUICK["server_steps"])):
        outputs, z = forward(w, x[rows])
        p = softmax(z)
        g = (p - np.eye(CLASSES)[y[rows]]) + lam * gate[rows] * (p - other[rows])
        grads = backward(w, outputs, g / len(rows))
        speed = {n: momentum * leaf + grads[n] for n, leaf in speed.items()}
        w = {n: leaf - QUICK["server_rate"] * speed[n] for n, leaf in w.items()}
    out = {path: w[path] for path in head}
    return {"server": w, **{name: mean(start[name], (name,)) | out for name in ("small", "large")}}


@pytest.mark.parametrize("lam", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_a_round_is_what_numpy_says(lam):
    found, _, _ = run(et(lam=lam), PROBLEM, BOTH, task=TASK)
    expected = by_hand(BOTH[0], lam)
    for name, leaves in expected.items():
        for path, leaf in leaves.items():
            np.testing.assert_allclose(found.params[name][path], leaf, rtol=2e-4, atol=2e-5, err_msg=f"{name} {path}")


# --- what clients say together


@pytest.mark.parametrize("seed", range(3))
def test_shares_sum_to_one(seed):
    votes = confidence(logits_of(seed=seed))
    among = jnp.asarray(np.random.default_rng(seed).random(votes.shape) < 0.5)
    some = np.asarray(among.any(axis=-1))
    assert some.any()
    found = shares(votes, among)
    np.testing.assert_allclose(found.sum(axis=-1), some, rtol=1e-6)
    assert not found[~among].any()


def test_a_constant_that_is_added_to_a_clients_logits_changes_nothing():
    logits = logits_of()
    one, other = (lesson_of(each, everybody()) for each in (logits, logits.at[:, 1].add(3.0)))
    normalised = lesson_of(jax.nn.log_softmax(logits), everybody())  # which are logits less a constant
    for a, b, c in zip(one, other, normalised, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_a_client_whose_logits_are_c_times_as_large_votes_c_cubed_as_much():
    logits = logits_of(m=1)
    vote = lambda s: confidence(s)[..., None] * s  # noqa: E731 - one expression, named
    np.testing.assert_allclose(vote(2 * logits), 8 * vote(logits), rtol=1e-5)


def test_the_order_of_clients_does_not_matter():
    logits, order = logits_of(), np.array([2, 0, 3, 1])
    for a, b in zip(lesson_of(logits, everybody()), lesson_of(logits[:, order], everybody()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_who_says_nothing_has_no_weight():
    """The same logit for every class: no vote, no dissent. Nor who did not reply, nor who has diverged."""
    logits = logits_of()
    flat = logits.at[:, 0].set(2.0).at[3, 1].set(jnp.inf)
    expected = lesson_of(logits[:, 1:], everybody(3))
    silent = lesson_of(logits.at[:, 0].set(2.0), everybody())
    for a, b in zip(silent, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    absent = lesson_of(flat, jnp.asarray([False, True, True, True]))
    assert all(np.isfinite(leaf).all() for leaf in absent)
    np.testing.assert_allclose(absent.target[:3], expected.target[:3])
    np.testing.assert_allclose(absent.target[3], lesson_of(logits[3:4, 2:], everybody(2)).target[0])
    agreed = jnp.asarray([[[0, 3.0, 0, 0, 0], [0, 2.0, 0, 0, 0], [1.0, 1, 1, 1, 1]]])
    assert not lesson_of(agreed, everybody(3)).split.any()  # its first class is no other opinion
    nothing = lesson_of(jnp.ones((2, 3, 5)), everybody(3))
    assert all(np.isfinite(leaf).all() for leaf in nothing) and not nothing.split.any()
    np.testing.assert_allclose(shares(jnp.zeros((1, 3)), everybody(3)), 1 / 3)


def test_dissent_weighs_by_the_sum_of_votes_and_not_their_mean():
    """Shares of three dissenters that said the same give just that, not three times as much."""
    same_ = jnp.asarray([0, 2.0, 0, 0, 0])
    logits = jnp.stack([jnp.asarray([9.0, 0, 0, 0, 0]), same_, same_, same_])[None]
    lesson = lesson_of(logits, everybody())
    np.testing.assert_allclose(lesson.other[0], jax.nn.softmax(same_), rtol=1e-5)
    np.testing.assert_allclose(together(jnp.ones((1, 4)) / 4, logits)[0], logits[0].mean(axis=0), rtol=1e-6)


def test_where_nobody_dissents_the_server_is_not_pulled_to_the_uniform():
    """The gate: without it a vector of zeros would be the second teacher."""
    lesson = lesson_of(jnp.repeat(10 * logits_of(m=1), 4, axis=1), everybody())
    ungated = lesson._replace(split=jnp.ones_like(lesson.split), other=jnp.full_like(lesson.other, 1 / 5))
    same(learnt(lesson, 0.0), learnt(lesson, 1.0), "gated", rtol=0)
    with pytest.raises(AssertionError, match="differs"):
        same(learnt(lesson, 0.0), learnt(ungated, 1.0), "not gated", rtol=1e-3)


def test_the_loss_is_a_mean_over_examples_of_sums_over_classes():
    """And its divergence is of the teacher from the model, which is 0 where both say the same."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, CLASSES)), jnp.float32)
    task = SMALL._replace(logits=lambda held, params, x: x + params["b"])
    p, q = jax.nn.softmax(z[::-1]), np.asarray(jax.nn.softmax(z), np.float64)
    lesson = Lesson(jnp.eye(CLASSES)[jnp.asarray([0, 2, 1])], p, jnp.asarray([1.0, 0, 1]))
    optimizer, params = optax.sgd(0.0), {"b": jnp.zeros(CLASSES)}
    learn = studying(task, optimizer, 3, 1, 0.5)
    _, _, metrics = learn((), params, optimizer.init(params), {"x": z, "lesson": lesson}, (), jax.random.key(0))
    each = -np.log(q[[0, 1, 2], [0, 2, 1]])
    apart = (np.asarray(p, np.float64) * np.log(np.asarray(p, np.float64) / q)).sum(axis=1) * [1, 0, 1]
    np.testing.assert_allclose(metrics["server_loss"], (each + 0.5 * apart).mean(), rtol=1e-5)


# --- the round


def with_public(labels):
    """The problem with twenty examples more that no client has, and their labels."""
    rng = np.random.default_rng(3)
    x = np.concatenate([PROBLEM.x, rng.normal(size=(20, FEATURES)).astype(np.float32)])
    return PROBLEM._replace(x=x, y=np.concatenate([PROBLEM.y, labels]).astype(np.int32))


def test_labels_of_public_examples_are_never_read():
    """Permuted, or of no class at all: bit for bit the same models. Other examples: others."""
    rows, labels = np.arange(len(PROBLEM.y), len(PROBLEM.y) + 20), np.arange(20) % CLASSES
    runs = [
        run(et(lam=0.7), with_public(y), BOTH, task=TASK, public=rows)[0]
        for y in (labels, np.random.default_rng(0).permutation(labels), np.full(20, -7))
    ]
    for other in runs[1:]:
        same(runs[0], other, "other labels", rtol=0)
    with pytest.raises(AssertionError, match="differs"):
        same(runs[0], run(et(lam=0.7), PROBLEM, BOTH, task=TASK)[0], "other examples", rtol=1e-4)


@pytest.mark.slow
def test_all_models_share_their_head_and_clients_models_learn_nothing_else():
    """Bit for bit after a round; the bodies of clients' models are the plain means, whatever the server learns."""
    still, _, _ = run(et(server_steps=0), PROBLEM, BOTH, task=TASK)
    moved, _, _ = run(et(lam=0.7), PROBLEM, BOTH, task=TASK)
    for path in ("head/kernel", "head/bias"):
        for name in ("small", "large"):
            same(moved.params[name][path], moved.params["server"][path], f"{path} of {name}", rtol=0)
    for name, paths in {"small": ("hidden",), "large": ("first", "hidden")}.items():
        for path in paths:
            same(moved.params[name][path], still.params[name][path], f"{path} of {name}", rtol=0)


def test_an_architecture_that_nobody_trained_keeps_its_body_and_gets_the_head():
    found, _, _ = run(et(lam=0.7), PROBLEM, ((2, 0),), task=TASK)  # nobody of the second group
    start = DEEP.init(jax.random.key(0))
    for path in ("first", "hidden"):
        same(found.params["large"][path], start[path], path, rtol=0)
    same(found.params["large"]["head/kernel"], found.params["server"]["head/kernel"], "the head", rtol=0)


def test_bytes_are_those_of_each_clients_architecture():
    """The server's model, the public examples and logits never travel."""
    _, _, (cohort,) = run(et(lam=0.7), PROBLEM, BOTH, task=TASK)
    sizes = {n: sum(leaf.size for leaf in t.init(jax.random.key(0)).values()) for n, t in TASK.groups.items()}
    for way in cohort.traffic():
        by = {name: sum(n for leaf, n in way.items() if leaf.startswith(f"{name}/")) for name in sizes}
        assert by == {"small": 2 * 4 * sizes["small"], "large": 2 * 4 * sizes["large"], "server": 0}
        assert sum(way.values()) == sum(by.values())


def test_answers_are_those_of_each_model_whatever_the_batches():
    """More examples than are read at a time, and no multiple of it; models of several architectures in the order of names."""
    tasks = {"small": SMALL, "large": DEEP}
    starts = {name: task.init(jax.random.key(0)) for name, task in tasks.items()}
    twice = {name: jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), start) for name, start in starts.items()}
    returned = {name: types.SimpleNamespace(models=models) for name, models in twice.items()}
    x = jnp.asarray(np.tile(PROBLEM.x, (2, 1))[:150])
    found = asking(tasks)(dict.fromkeys(tasks, ()), returned, dict.fromkeys(tasks, x))
    each = [(name, times) for name in ("large", "small") for times in (1, 2)]
    expected = [tasks[n].logits((), jax.tree.map(lambda leaf, k=k: k * leaf, starts[n]), x) for n, k in each]
    assert found.shape == (150, 4, CLASSES)
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_three_architectures_reads_no_public_label(blobs, tmp_path):
    """Whole runs, bit for bit alike with other labels there; bytes by architecture; a head that is shared; what the server took."""
    arrays = np.load(blobs(tmp_path))
    given = fedsim.arrays(arrays["x"], arrays["y"])
    parts = (("small", "head", ", share=0.25"), ("lora", "lora', rank=2, targets=['layers/*'], backbone='mlp", ", share=0.25"),
             ("large", "bias", ", share=0.5"), ("server", "full", ""))  # fmt: skip
    config = Config(
        dataset="arrays", backbone="mlp", peft="full", clients=8, clients_per_round=4, rounds=2, optimizer="sgd", lr=0.05,
        min_size=3, public_share=0.2, algorithm="fed_et(server_steps=5, server_batch=8)",
        groups=tuple(f"{name}(peft='{kind}'{share})" for name, kind, share in parts),
    )  # fmt: skip
    problem = build.problem(config, SPEED, given)
    held = partition.holders(config, problem.dataset.train)

    def trained(name, rows):
        y = problem.dataset.y.copy()
        y[rows] = (y[rows] + 1) % 3
        other = problem._replace(dataset=problem.dataset._replace(y=y))
        return fedsim.run(config, SPEED, out=tmp_path / name, quiet=True, problem=other, data=given)

    changed = {"plain": held.public[:0], "public": held.public, "clients": held.clients}
    runs = {name: trained(name, rows) for name, rows in changed.items()}
    files = {name: (one.directory / record.TRAINED).read_bytes() for name, one in runs.items()}
    assert files["plain"] == files["public"] != files["clients"]
    line = runs["plain"].rounds[-1]
    assert {leaf.partition("/")[0] for leaf in line["bytes_up_leaves"]} == {"small", "lora", "large"}
    assert line["bytes_up_leaves"] == line["bytes_down_leaves"]
    assert line["server_flops"] > 0 and 0 <= line["metrics"]["dissent"] <= 1
    priced = cost.cost(config, 3, input_shape=(6,))
    assert (priced.round_bytes_up, priced.round_bytes_down) == (line["bytes_up"], line["bytes_down"])


# --- FedDF


@pytest.mark.slow
def test_fed_df_without_a_step_is_fed_avg_by_architecture():
    groups = SMALL._replace(groups={"small": SMALL, "large": DEEP})
    found, _, _ = run(lambda task: fed_df(task, server_steps=0), PROBLEM, BOTH, task=groups)
    for name, task, ids in (("small", SMALL, (2, 0)), ("large", DEEP, (7, 9))):
        plain, _, _ = run(fed_avg, PROBLEM, (ids,), task=alone(task, name))
        same(plain.params, found.params[name], name, rtol=1e-6)


@pytest.mark.slow
def test_fed_df_teaches_every_architecture_what_all_say_on_average():
    """The mean of logits, each client alike; the first step's loss, in NumPy, of the answering model."""
    groups = SMALL._replace(groups={"small": SMALL, "large": DEEP})
    still, _, _ = run(lambda task: fed_df(task, server_steps=0), PROBLEM, BOTH, task=groups)
    options = {"server_steps": 1, "server_batch": 20, "server_rate": 0.5, "server_optimizer": "sgd", "cosine": False}
    found, _, _ = run(lambda task: fed_df(task, **options), PROBLEM, BOTH, task=groups)
    x = PROBLEM.x[1:21]
    said = []
    for name, task, ids in (("small", SMALL, (2, 0)), ("large", DEEP, (7, 9))):
        for id in ids:  # FedAvg of one client is that client's model
            model = run(fed_avg, PROBLEM, ((id,),), task=alone(task, name))[0].params
            said.append(forward({n: np.asarray(leaf) for n, leaf in model.items()}, x)[1])
    target = softmax(np.mean(said, axis=0))
    for name in ("small", "large"):
        w = {n: np.asarray(leaf, np.float64) for n, leaf in still.params[name].items()}
        outputs, z = forward(w, x)
        grads = backward(w, outputs, (softmax(z) - target) / len(x))
        for path, leaf in w.items():
            np.testing.assert_allclose(found.params[name][path], leaf - 0.5 * grads[path], rtol=1e-4, atol=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_et(lam=-1)", r"Expected lam=-1\.0 >= 0"),
        ("fed_et(weights='mean')", r"weights='mean' to be one of variance, uniform"),
        ("fed_et(target='label')", r"target='label' to be one of hard, soft"),
        ("fed_et(server_steps=-1)", r"Expected server_steps=-1 >= 0"),
        ("fed_et(server_batch=0)", r"Expected server_batch=0 >= 1"),
        ("fed_et(server_rate=-0.1)", r"Expected server_rate=-0\.1 >= 0"),
        ("fed_et(server_optimizer='sdg')", r"server_optimizer='sdg' to be an optax optimizer"),
        ("fed_et(shared=('representation/*',))", r"to match trained leaves of group 'small'"),
        ("fed_et(shared=())", r"Expected shared=\(\) to name layers"),
        ("fed_et(shared=('*',))", r"only one of them trains first"),
        ("fed_df(server_steps=2.5)", r"Expected server_steps=2\.5 "),
        ("fed_df(server_optimizer='dog')", r"server_optimizer='dog' to be an optax optimizer"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)


def test_architectures_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"Expected groups=\(\) of algorithm='fed_et'.*--groups"):
        fed_et(SMALL)
    with pytest.raises(ValueError, match=r"and one called 'server' without a share"):
        common({"small": SMALL, "large": DEEP}, ("head/*",))
    with pytest.raises(ValueError, match=r"to be architectures of clients"):
        common({"server": SMALL}, ("head/*",))
    with pytest.raises(ValueError, match="a language model has none"):
        fed_et(TASK._replace(groups={**TASK.groups, "large": DEEP._replace(classes=0)}))
    wide = LARGE.init(jax.random.key(0)) | {"head/kernel": jnp.zeros((9, CLASSES)), "hidden": jnp.zeros((8, 9))}
    made = fed_et(TASK._replace(groups={**TASK.groups, "server": LARGE._replace(init=lambda key: wide)}))
    with pytest.raises(ValueError, match=r"Expected head/kernel of group 'small' to have the shape \(9, 3\)"):
        made.init(jax.random.key(0), ())


@pytest.mark.parametrize("make", [fed_et, fed_df])
def test_a_run_without_public_examples_is_refused_before_a_client_trains(make):
    cohort = types.SimpleNamespace(public=None, groups={})
    with pytest.raises(ValueError, match=r"Expected public_share > 0 for algorithm='fed_.t?f?'.*--public-share"):
        make(TASK).round(jax.random.key(0), (), None, cohort)


def test_a_server_with_clients_is_refused():
    cohort = types.SimpleNamespace(public={}, groups={"small": None, "server": None})
    with pytest.raises(ValueError, match=r"Expected group 'server' of algorithm='fed_et' to have no clients"):
        fed_et(shared_head()).round(jax.random.key(0), (), None, cohort)
