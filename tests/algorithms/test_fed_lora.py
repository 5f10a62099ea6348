"""The federated LoRA rules against NumPy algebra on the clients' own replies, and their bytes against real messages."""

import functools
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedsim
from brief import brief
from fedsim import peft, record, wire
from fedsim.algorithms import find
from fedsim.algorithms.lora.factors import means
from fedsim.algorithms.lora.flex_lora import leading
from fedsim.core import Algorithm, Client, Factors, Info, Passes
from fedsim.engine.keys import key_for
from fedsim.evaluation.evaluate import classification_loss
from fedsim.folds import by_examples, mean, uniform
from fedsim.peft import export
from fedsim.simulation import needs, tasks
from fedsim.testing.contract import CHECKS, same
from fedsim.testing.tasks import CLASSES, tiny_task
from fedsim.testing.toys import SIZES, one_client, run, tiny_problem
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")

RANK, SCALE = 2, 0.75
SHAPES = {"one": (24, 20), "two": (20, 16)}
FACTORS = tuple(Factors(f"{n}/kernel", f"{n}/lora_a", f"{n}/lora_b", SCALE, i, RANK, o) for n, (i, o) in SHAPES.items())
HEAD = 4 * (16 * CLASSES + CLASSES)  # bytes
# Client 3 has no examples; client 2 misses two rounds; 8 comes late. With ranks=(1, 2) even clients have rank 1.
COHORTS = ((2, 0, 7), (4, 9, 3), (0, 4, 6), (2, 0, 8))


@functools.cache
def problem():
    """The tiny clients with wider inputs and two frozen matrices; A for the rule that does not train it."""
    tiny, rng = tiny_problem(), np.random.default_rng(1)
    x = rng.normal(size=(len(tiny.y), SHAPES["one"][0])).astype(np.float32)
    held = {}
    for name, (i, o) in SHAPES.items():
        held[f"{name}/kernel"] = (rng.normal(size=(i, o)) / np.sqrt(i)).astype(np.float32)
        held[f"{name}/lora_a"] = (rng.normal(size=(i, RANK)) / np.sqrt(i)).astype(np.float32)
    return tiny._replace(x=x, held=held)


def lora_task(trains_a=True, **changes):
    """Two layers with LoRA and a head, plain SGD."""

    def apply(params, held, x):
        leaves = {**held, **params}
        for f in FACTORS:
            x = jnp.tanh(x @ leaves[f.kernel] + ((x @ leaves[f.a]) * f.scale) @ leaves[f.b])
        return x @ leaves["head/kernel"] + leaves["head/bias"]

    def init(key):
        params = {"head/kernel": 0.3 * jax.random.normal(key, (16, CLASSES)), "head/bias": jnp.zeros(CLASSES)}
        for f in FACTORS:
            params[f.b] = jnp.zeros((f.rank, f.outputs))
            if trains_a:
                params[f.a] = jax.random.normal(jax.random.fold_in(key, f.inputs), (f.inputs, f.rank)) / 5
        return params

    return tiny_task()._replace(
        init=init,
        loss=classification_loss(apply),
        logits=lambda held, params, x: apply(params, held, x),
        optimizer=optax.sgd,
        lr=lambda client, message: jnp.float32(0.3),
        passes=Passes(2, None, 8),
        trained=frozenset(jax.eval_shape(init, jax.random.key(0))),
        factors=FACTORS,
        **changes,
    )


class Round(NamedTuple):
    """One round as it was: what the server had and sent, what each client replied alone, what the server made of it."""

    number: int
    ids: tuple[int, ...]
    before: Any
    after: Any
    message: Any
    local: Any
    replies: list[Any]
    memories: list[Any]  # before the round
    cohort: Any
    algorithm: Algorithm


@functools.cache
def rounds(text: str, weight=by_examples, cohorts=COHORTS) -> list[Round]:
    """A few rounds of a rule through the engine, each client's reply computed again alone."""
    made = find(text)(lora_task(trains_a=text != "ffa_lora", weight=weight))
    states: list[Any] = []
    kept: list[Any] = []

    def recorded(key, held, server, cohort):
        rows, seen = cohort.memory.gather(cohort.ids)
        fresh = [made.memory(key_for(jax.random.key(0), "memory", int(i)), held) for i in cohort.ids]
        own = [jax.tree.map(lambda a, i=i: a[i], rows) if seen[i] else fresh[i] for i in range(len(seen))]
        after, metrics = made.round(key, held, server, cohort)
        states.append((server, after))
        kept.append(own)
        return after, metrics

    sent: list[Any] = []
    task = lora_task(weight=weight)
    _, _, done = run(lambda task: made._replace(round=recorded), problem(), cohorts, task=task, sent=sent)
    out = []
    for r, (ids, (before, after), cohort) in enumerate(zip(cohorts, states, done, strict=True), 1):
        exchanges = len(cohort.done)
        message, local = wire.unmarked(sent[r * exchanges - 1].message), sent[r * exchanges - 1].local
        args = [
            (wire.for_client(message, place), kept[r - 1][place], id, r, 0, exchanges - 1)
            for place, id in enumerate(ids)
        ]
        replies = [decoded(one_client(problem(), local, *a)[0]) for a in args]
        out.append(Round(r, ids, before, after, message, local, replies, kept[r - 1], cohort, made))
    return out


def decoded(reply):
    """A reply as the server decodes it without a codec; zero where nothing travels."""
    key = jax.random.key(0)  # of codecs, of which there is none
    return jax.tree.map(np.asarray, wire.unwrap(wire.arrive(reply, None, key, key)[0]))


def shares(ids, weight=by_examples):
    """p_k, float64."""
    w = np.array([SIZES[i] if weight is by_examples else float(SIZES[i] > 0) for i in ids], np.float64)
    return w / w.sum()


def effective(algorithm, server):
    """W + s A B of every adapted matrix as the model has it, float64."""
    leaves = {k: np.asarray(v, np.float64) for k, v in {**problem().held, **algorithm.params(server)}.items()}
    return {f.kernel: leaves[f.kernel] + f.scale * leaves[f.a] @ leaves[f.b] for f in FACTORS}


def trained(text, one: Round):
    """Every client's factors after training: [{path: (..)}], float64; from changes or values, as the rule replies."""
    out = []
    for reply in one.replies:
        own = {}
        for f in FACTORS:
            for path in (f.a, f.b):
                if path not in reply:  # FFA-LoRA's A
                    own[path] = np.asarray(problem().held[path], np.float64)
                elif text.split("(")[0] in ("fed_it", "ffa_lora", "fed_ex_lora"):
                    own[path] = np.asarray(one.message[path], np.float64) + reply[path]
                else:
                    own[path] = np.asarray(reply[path], np.float64)
        out.append(own)
    return out


def ideal(text, one: Round, p):
    """W + s sum_k p_k A_k B_k, W as it was sent."""
    own, sent = trained(text, one), wire.unwrap(one.message)
    base = {f.kernel: np.asarray(sent.get(f.kernel, problem().held[f.kernel]), np.float64) for f in FACTORS}
    return {
        f.kernel: base[f.kernel] + f.scale * sum(p_k * o[f.a] @ o[f.b] for p_k, o in zip(p, own, strict=True))
        for f in FACTORS
    }


def gap(a, b):
    """Largest difference, relative to what training moved."""
    moved = max(np.abs(b[k] - problem().held[k]).max() for k in b)
    return max(np.abs(a[k] - b[k]).max() for k in b) / moved


# --- exactness


@pytest.mark.parametrize("weight", brief([by_examples, uniform]))
@pytest.mark.parametrize("text", ["ffa_lora", "flora", "flora(ranks=(1, 2))", "fed_ex_lora"])
def test_exact_rules_reach_the_mean_of_products(text, weight):
    """For the weights that were used, those of equal clients among them; in every round, a client without examples too."""
    for one in rounds(text, weight):
        reached = effective(one.algorithm, one.after)
        assert gap(reached, ideal(text, one, shares(one.ids, weight))) < 2e-5, f"round {one.number}"


def test_fed_it_is_the_product_of_means():
    for one in rounds("fed_it"):
        p, own = shares(one.ids), trained("fed_it", one)
        for f in FACTORS:
            for path in (f.a, f.b):
                mean = sum(p_k * o[path] for p_k, o in zip(p, own, strict=True))
                np.testing.assert_allclose(one.after.params[path], mean, atol=2e-6)
        assert gap(effective(one.algorithm, one.after), ideal("fed_it", one, p)) > 1e-3, "FedIT is not exact"


ALL = ["fed_it", "flora", "het_lora", "flex_lora", "fed_ex_lora"]


@pytest.mark.parametrize("text", brief([*ALL, "ffa_lora"], 3))
def test_with_one_client_every_rule_is_exact(text):
    for one in rounds(text, cohorts=((7,), (0,))):
        assert gap(effective(one.algorithm, one.after), ideal(text, one, np.ones(1))) < 2e-5


def test_with_one_client_the_rules_agree():
    """From the same start with the same batches; FLoRA's clients draw an A of their own, FFA's do not train theirs."""
    results = {text: rounds(text, cohorts=((7,), (0,)))[0] for text in ALL if text != "flora"}
    plain = effective(results["fed_it"].algorithm, results["fed_it"].after)
    for text, one in results.items():
        assert gap(effective(one.algorithm, one.after), plain) < 2e-5, text


@pytest.mark.slow
def test_a_server_optimizer_moves_what_is_averaged():
    """A rate of zero: head and FedIT's factors stay, what FLoRA writes into the kernels does not depend on it."""
    still = lora_task(server_optimizer=optax.sgd(0.0))
    server, _, _ = run(find("flora"), problem(), COHORTS[:1], task=still)
    before = rounds("flora")[0].before
    np.testing.assert_array_equal(server.params["head/kernel"], before.params["head/kernel"])
    same(server.kernels, rounds("flora")[0].after.kernels, "kernels", rtol=1e-6)


# --- stacks and folds


def random_replies(clients, ranks=(1, 2)):
    """Made-up replies by path, padded with zeros to the largest rank."""
    rng, out = np.random.default_rng(3), {}
    rank = np.array([ranks[k % len(ranks)] for k in range(clients)])
    inside = np.arange(RANK) < rank[:, None]
    for f in FACTORS:
        out[f.a] = rng.normal(size=(clients, f.inputs, RANK)).astype(np.float32) * inside[:, None, :]
        out[f.b] = rng.normal(size=(clients, RANK, f.outputs)).astype(np.float32) * inside[:, :, None]
    return {k: v.astype(np.float32) for k, v in out.items()}, rank


def stacked(f, a, b, p, ranks):
    """FLoRA's equation: A = [p_1 A_1, ..., p_K A_K] (in, R), B = [B_1; ...; B_K] (R, out); without padding."""
    left = [p[k] * a[k][:, : ranks[k]] for k in range(len(p)) if p[k] > 0]
    right = [b[k][: ranks[k]] for k in range(len(p)) if p[k] > 0]
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def test_the_fold_gives_the_product_of_the_stacks():
    replies, ranks = random_replies(7)
    weights = np.array([3.0, 1, 0, 2, 5, 1, 4])
    reduce = means(FACTORS, by_examples)
    total = reduce.zero(jax.tree.map(lambda r: r[0], replies), 7)
    for lanes in ([0, 1, 2], [3, 4, 5], [6]):
        part = {k: jnp.asarray(v[lanes]) for k, v in replies.items()}
        total = reduce.add(total, part, jnp.asarray(weights[lanes], jnp.float32), jnp.asarray(lanes), ())
    found = reduce.done(total, (), jax.random.key(0))
    p = weights / weights.sum()
    for f in FACTORS:
        left, right = stacked(f, replies[f.a], replies[f.b], p, ranks)
        assert left.shape[1] == right.shape[0] == ranks[weights > 0].sum()
        np.testing.assert_allclose(found.products[f.kernel], left @ right, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.leaves[f.a], np.tensordot(p, replies[f.a], 1), rtol=1e-4, atol=1e-5)
    assert found.weight.tolist() == weights.tolist()


def test_the_fold_does_not_grow_with_the_cohort():
    reply, _ = random_replies(1)
    reply = {k: v[0] for k, v in reply.items()}
    small, large = (jax.eval_shape(lambda m=m: means(FACTORS, uniform).zero(reply, m)) for m in (4, 4000))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731 - one expression, used twice
    assert size(large) - size(small) == 4000 - 4, "one weight per client, and nothing else"


# --- HetLoRA


def test_het_lora_weighs_by_the_norm_of_the_product():
    text = "het_lora(ranks=(1, 2))"
    for one in rounds(text):
        own = trained(text, one)
        norm = np.array([np.sqrt(sum(np.square(o[f.a] @ o[f.b]).sum() for f in FACTORS)) for o in own])
        norm = norm * np.array([SIZES[i] > 0 for i in one.ids])
        p = norm / norm.sum()
        for f in FACTORS:
            for path in (f.a, f.b):
                mean = sum(p_k * o[path] for p_k, o in zip(p, own, strict=True))  # zeros beyond each one's rank count
                np.testing.assert_allclose(one.after.params[path], mean, atol=2e-6)
        change = sum(p_k * reply["head/bias"] for p_k, reply in zip(p, one.replies, strict=True))
        np.testing.assert_allclose(one.after.params["head/bias"] - one.before.params["head/bias"], change, atol=2e-6)


class Given:
    """A cohort whose replies are given: the rule's own arithmetic alone. The run's average is the plain mean."""

    def __init__(self, replies, clients):
        self.ids, self.sizes, self.round = np.arange(clients), np.ones(clients, np.int64), 1
        self.last, self.replies, self.fetch = np.zeros(clients, np.int64), replies, jax.device_get

    def exchange(self, message, local, reduce=None, args=()):
        members, number = len(self.ids), jnp.asarray(self.ids, jnp.int32)
        keys, reduce = jax.random.split(jax.random.key(0), members), reduce or mean(uniform)
        clients = Client(number, jnp.ones_like(number), (), keys, number, number, number)
        weights = jax.vmap(reduce.weight)(clients, self.replies)
        total = reduce.add(
            reduce.zero(jax.tree.map(lambda r: r[0], self.replies), members), self.replies, weights, number, args
        )
        info = Info({}, {}, weights.sum(), jnp.int32(members), jnp.int32(0))
        return reduce.done(total, args, jax.random.key(0)), info


def test_het_lora_with_equal_ranks_and_norms_is_fed_it():
    values, _ = random_replies(3, ranks=(RANK,))
    norm = np.sqrt(sum(np.square(values[f.a] @ values[f.b]).sum(axis=(1, 2)) for f in FACTORS))
    for f in FACTORS:
        values[f.b] = values[f.b] / norm[:, None, None].astype(np.float32)
    head = {"head/kernel": np.ones((3, 16, CLASSES), np.float32), "head/bias": np.ones((3, CLASSES), np.float32)}
    task = lora_task(weight=uniform)
    het, plain = find("het_lora")(task), find("fed_it")(task)
    start = plain.init(jax.random.key(2), problem().held)
    changes = {k: v - np.asarray(start.params[k]) for k, v in values.items()}
    one, _ = het.round(jax.random.key(0), problem().held, start, Given({**values, **head}, 3))
    other, _ = plain.round(jax.random.key(0), problem().held, start, Given({**changes, **head}, 3))
    same(one.params, other.params, "equal norms", rtol=1e-5)


@pytest.mark.slow
def test_pruned_ranks_are_kept_told_and_paid():
    """A client whose tail shrinks goes on with half its rank; the server asks, 4 bytes each, and sends no more than that."""
    text = "het_lora(gamma=0.5, penalty=0.1)"
    cohorts = ((2, 0, 7), (2, 0, 7), (2, 0, 4))
    done = rounds(text, cohorts=cohorts)
    ranks = [[int(m) or RANK for m in one.memories] for one in done]
    assert ranks[0] == ranks[1] == [2, 2, 2], "nobody prunes in round 1, when B was zero"
    assert ranks[2] == [1, 2, 2], "client 2 has pruned, client 0 not, and client 4 is new"
    for one, before in zip(done, ranks, strict=True):
        down, up = one.cohort.traffic()
        after = [int(r[FACTORS[0].a].any(axis=0).sum()) for r in one.replies]
        assert all(a in (b, 1) for a, b in zip(after, before, strict=True))
        for f in FACTORS:
            assert (down[f.a], down[f.b]) == (4 * f.inputs * sum(before), 4 * f.outputs * sum(before))
            assert (up[f.a], up[f.b]) == (4 * f.inputs * sum(after), 4 * f.outputs * sum(after))
        assert up["rank"] == 4 * len(one.ids)
    assert done[2].cohort.done[1].info.metrics["rank"] == np.mean(after)


@pytest.mark.slow
def test_the_penalty_pulls_at_the_tail():
    """What training leaves of the last rank is less with a pull, for every client; without pruning there is no tail."""

    def tails(penalty):
        one = rounds(f"het_lora(gamma=0.5, penalty={penalty})", cohorts=((2, 0, 7), (2, 0, 7), (2, 0, 4)))[0]
        last = [[(r[f.a][:, 1:], r[f.b][1:]) for f in FACTORS] for r in one.replies]
        return [sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs) for pairs in last]

    assert all(pulled < free for pulled, free in zip(tails(0.1), tails(0.0), strict=True))
    with pytest.raises(ValueError, match="zero without pruning"):
        find("het_lora(penalty=0.1)")(lora_task())


# --- FlexLoRA


def test_flex_lora_is_the_best_approximation():
    """Beyond rank 2 something is lost, and no less is possible (Eckart and Young); with two clients of rank 1, nothing."""
    text = "flex_lora(ranks=(1, 2))"
    for one in rounds(text):
        whole = ideal(text, one, shares(one.ids))
        reached = effective(one.algorithm, one.after)
        lost = 0.0
        for f in FACTORS:
            w = np.asarray(problem().held[f.kernel], np.float64)
            u, s, vt = np.linalg.svd(whole[f.kernel] - w)
            np.testing.assert_allclose(reached[f.kernel] - w, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=2e-6)
            lost += s[RANK:].sum()
            np.testing.assert_allclose(
                np.asarray(one.after.params[f.a]).T @ one.after.params[f.a], np.eye(RANK), atol=1e-5
            )
        assert lost > 1e-4
    for one in rounds(text, cohorts=((2, 0), (4, 6))):
        assert gap(effective(one.algorithm, one.after), ideal(text, one, shares(one.ids))) < 2e-5


def test_leading_directions_are_the_same_on_every_machine():
    whole = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    a, b = leading(jnp.asarray(whole), 4)
    np.testing.assert_allclose(a @ b, whole, atol=1e-5)
    assert all(column[np.abs(column).argmax()] > 0 for column in np.asarray(a).T)
    dead, _ = leading(jnp.zeros((5, 4)), 2)
    np.testing.assert_allclose(dead.T @ dead, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("text", ["flex_lora(ranks=(1, 2))", "het_lora(ranks=(1, 2))"])
def test_a_client_reads_no_more_than_its_rank(text):
    """With anything else beyond its rank in the message its reply is the same, and there are zeros in it."""
    one = rounds(text)[1]
    for place, id in enumerate(one.ids):
        rank = 1 + id % 2
        message = dict(wire.for_client(one.message, place))
        for f in FACTORS:
            message[f.a] = jnp.where(jnp.arange(RANK) < rank, message[f.a], 1e6)
            message[f.b] = jnp.where(jnp.arange(RANK)[:, None] < rank, message[f.b], -1e6)
        reply, _ = one_client(problem(), one.local, message, one.memories[place], id, one.number)
        same(decoded(reply), one.replies[place], f"client {id}")
        for f in FACTORS:
            assert not one.replies[place][f.a][:, rank:].any() and not one.replies[place][f.b][rank:].any()


# --- FedSA-LoRA


def test_fed_sa_lora_keeps_b_at_home():
    cohorts = ((2, 0, 7), (4, 0, 7), (0, 4, 6))
    done = rounds("fed_sa_lora", cohorts=cohorts)
    for one in done:
        down, up = one.cohort.traffic()
        assert not [name for name in (*down, *up) if "lora_b" in name]
        p = shares(one.ids)
        for f in FACTORS:
            mean = one.message[f.a] + sum(p_k * r[f.a] for p_k, r in zip(p, one.replies, strict=True))
            np.testing.assert_allclose(one.after.params[f.a], mean, atol=2e-6)
    # Client 0 took part in all three rounds: its B is that of three rounds of training, each from the one before.
    kept: Any = done[0].memories[1]
    assert not any(np.asarray(b).any() for b in kept.values())
    for one in done:
        place = one.ids.index(0)
        same(jax.tree.map(np.asarray, one.memories[place]), jax.tree.map(np.asarray, kept), "kept B", rtol=1e-5)
        _, kept = one_client(problem(), one.local, one.message, kept, 0, one.number)
    server, algorithm = done[-1].after, done[-1].algorithm
    x = jnp.asarray(problem().x[:5])
    mine = algorithm.predict(problem().held, server, kept, x)
    joined = algorithm.predict(problem().held, server, (), x)
    assert np.abs(mine - joined).max() > 1e-3
    plain = lora_task().logits(problem().held, algorithm.params(server), x)
    np.testing.assert_array_equal(joined, plain)


# --- bytes


def numbers(*, a=True, b=True):
    """Numbers of rank 1, all matrices together."""
    return sum(f.inputs * a + f.outputs * b for f in FACTORS)


@pytest.mark.parametrize(
    ("text", "up", "down"),
    [
        ("fed_it", lambda r: RANK * numbers(), lambda r: RANK * numbers()),
        ("ffa_lora", lambda r: RANK * numbers(a=False), lambda r: RANK * numbers(a=False)),
        ("fed_sa_lora", lambda r: RANK * numbers(b=False), lambda r: RANK * numbers(b=False)),
        ("het_lora(ranks=(1, 2))", lambda r: r * numbers(), lambda r: r * numbers()),
        ("flex_lora(ranks=(1, 2))", lambda r: r * numbers(), lambda r: r * numbers()),
        ("flora(ranks=(1, 2))", lambda r: r * numbers(), None),
        ("fed_ex_lora", lambda r: RANK * numbers(), None),
    ],
)
def test_bytes_are_those_of_the_formula(text, up, down):
    """Every round and client, mixed ranks included; rules that write kernels have a test of their own for the downlink."""
    for one in rounds(text):
        ranks = [1 + id % 2 for id in one.ids]
        sent_down, sent_up = (sum(side.values()) for side in one.cohort.traffic())
        assert sent_up == sum(4 * up(r) + HEAD for r in ranks)
        if down is not None:
            assert sent_down == sum(4 * down(r) + HEAD for r in ranks)


@pytest.mark.parametrize("text", ["het_lora(ranks=(1, 2))", "flex_lora(ranks=(1, 2))", "flora(ranks=(1, 2))"])
def test_bytes_of_mixed_ranks_are_those_of_real_messages(text):
    """Each client's factors are cut, serialised, and give the padded ones back."""
    for one in rounds(text):
        packed = {f.kernel: 0 for f in FACTORS}
        for id, reply in zip(one.ids, one.replies, strict=True):
            rank = 1 + id % 2
            for f in FACTORS:
                data = wire.to_bytes(reply[f.a][:, :rank]) + wire.to_bytes(reply[f.b][:rank])
                got = np.frombuffer(data, "<f4")
                a, b = got[: f.inputs * rank].reshape(-1, rank), got[f.inputs * rank :].reshape(rank, -1)
                np.testing.assert_array_equal(np.pad(a, [(0, 0), (0, RANK - rank)]), reply[f.a])
                np.testing.assert_array_equal(np.pad(b, [(0, RANK - rank), (0, 0)]), reply[f.b])
                packed[f.kernel] += len(data)
        _, up = one.cohort.traffic()
        assert packed == {f.kernel: up[f.a] + up[f.b] for f in FACTORS}


def flora_additions(one: Round, f: Factors):
    """The stacks of a round as they would be sent."""
    ranks = [1 + id % 2 for id in one.ids]
    own = [r[f.a] for r in one.replies], [r[f.b] for r in one.replies]
    return stacked(f, *own, shares(one.ids), ranks)


def residual(one: Round, f: Factors):
    """FedEx-LoRA's residual as (K - 1) r directions: sum_{k<K} p_k (dA_k - mean) (dB_k - dB_K)."""
    p = shares(one.ids)
    counted = [k for k in range(len(p)) if p[k] > 0]
    a, b = ([np.asarray(r[path], np.float64) for r in one.replies] for path in (f.a, f.b))
    mean, last = sum(p[k] * a[k] for k in counted), counted[-1]
    left = [p[k] * (a[k] - mean) for k in counted[:-1]]
    right = [b[k] - b[last] for k in counted[:-1]]
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


@pytest.mark.parametrize(("text", "additions"), [("flora(ranks=(1, 2))", flora_additions), ("fed_ex_lora", residual)])
def test_bytes_of_kernels_are_those_of_what_was_missed(text, additions):
    """What every client is sent is really packed, and from it and what it holds the client gets the server's kernel."""
    done = rounds(text)
    kinds = set()
    for one in done:
        down, _ = one.cohort.traffic()
        for f in FACTORS:
            prices = np.asarray(one.message[f.kernel].nbytes).tolist()
            now = np.asarray(one.message[f.kernel].value)
            assert down[f.kernel] == sum(prices)
            for place, id in enumerate(one.ids):
                last = max([r.number for r in done[: one.number - 1] if id in r.ids], default=0)
                assert one.cohort.last[place] == last
                missed = [additions(r, f) for r in done[max(last, 1) - 1 : one.number - 1]]
                factors = b"".join(wire.to_bytes(side.astype(np.float32)) for both in missed for side in both)
                whole = wire.to_bytes(now)
                kinds.add((len(factors) > 0, len(factors) > len(whole)))
                assert prices[place] == min(len(factors), len(whole)), f"round {one.number}, client {id}, {f.kernel}"
                holds = done[last - 1].message[f.kernel].value if last else problem().held[f.kernel]
                moved = sum((left @ right for left, right in missed), np.zeros_like(now))
                np.testing.assert_allclose(np.asarray(holds) + f.scale * moved, now, atol=5e-6)
    assert kinds == {(False, False), (True, False), (True, True)}, "nothing, factors, and a whole kernel were sent"


def test_the_residual_has_the_rank_that_is_paid():
    """(K - 1) r for K replies, no more and no less; FedEx-LoRA's authors bound it by more."""
    for one in rounds("fed_ex_lora"):
        counted = sum(SIZES[i] > 0 for i in one.ids)
        for f in FACTORS:
            before, after = one.before.kernels[f.kernel], one.after.kernels[f.kernel]
            s = np.linalg.svd(np.asarray(after, np.float64) - before, compute_uv=False)
            assert (s > 1e-6).sum() == (counted - 1) * RANK


@pytest.mark.slow
def test_codecs_and_ranks_multiply():
    codec = wire.cast("bfloat16")
    for text in ("flora(ranks=(1, 2))", "flex_lora(ranks=(1, 2))"):
        _, _, (cohort,) = run(find(text), problem(), COHORTS[:1], task=lora_task(), up=codec, down=codec)
        _, up = rounds(text)[0].cohort.traffic()
        assert cohort.traffic()[1] == {name: n // 2 for name, n in up.items()}


# --- the contract with the options that the registered names do not show


@pytest.mark.slow
@pytest.mark.parametrize("check", ["structure kept, nothing recompiles", "resumed equals uninterrupted"])
@pytest.mark.parametrize("text", ["flora(ranks=(1, 2))", "het_lora(ranks=(1, 2), gamma=0.5, penalty=0.01)"])
def test_contract_with_options(text, check):
    CHECKS[check](find(text))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["flora(ranks=(1, 2))", "het_lora(gamma=0.5)", "flex_lora(ranks=(1, 2))"])
def test_bytes_with_options(text):
    CHECKS["bytes equal the packed messages"](find(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "up"),
    [
        ("fed_avg", "topk(0.1)+quantise(5)"),
        pytest.param("fed_sa_lora", "topk(0.1)+quantise(5)", marks=pytest.mark.slow),
        pytest.param("fed_ex_lora", "topk(0.1)+quantise(5)", marks=pytest.mark.slow),
        ("het_lora(ranks=(1, 2), gamma=0.5)", "quantise(3)"),
        pytest.param("flora(ranks=(1, 2))", "quantise(3)", marks=pytest.mark.slow),
        pytest.param("flex_lora(ranks=(1, 2))", "quantise(3)", marks=pytest.mark.slow),
    ],
)
def test_bytes_under_codecs(text, up):
    CHECKS["bytes equal the packed messages"](find(text), up=wire.codec(up), down=wire.codec("quantise(8)"))


@pytest.mark.slow
def test_a_packet_that_claims_too_little_is_found():
    """The check of bytes can fail, for a reply and for a message, and for a codec that packs more than it says."""
    check = CHECKS["bytes equal the packed messages"]

    def cheaper(tree):
        return jax.tree.map(lambda a: wire.Packet(a, jnp.uint32(a.size)), tree)

    def sending(message=lambda tree: tree, reply=lambda tree: tree):
        def make(task):
            changed = lambda carry, message, client: (jax.tree.map(jnp.subtract, carry.params, message), ())  # noqa: E731 - one expression, named
            local = fit(
                task.loss, task.optimizer, task.lr, task.passes, reply=lambda *now: (reply(changed(*now)[0]), ())
            )

            def round(key, held, server, cohort):
                change, info = cohort.exchange(message(server), local)
                return jax.tree.map(jnp.add, server, change), info.metrics

            return Algorithm(lambda key, held: task.init(key), round, lambda *given: None)

        return make

    check(sending())
    for ways in ({"message": cheaper}, {"reply": cheaper}):
        with pytest.raises(AssertionError, match="from which its value does not come back"):
            check(sending(**ways))
    codec = wire.cast("float16")

    def half_the_bits(*given):
        coded, state = codec.encode(*given)
        return {name: sent._replace(bits=8) for name, sent in coded.items()}, state

    check(find("fed_avg"), up=codec, down=codec)
    for ways in ({"up": codec._replace(encode=half_the_bits)}, {"down": codec._replace(encode=half_the_bits)}):
        with pytest.raises(AssertionError, match=r"bytes claimed, \d+ packed"):
            check(find("fed_avg"), **ways)


# --- refusals


def of(**options):
    """The task of a small perceptron."""
    config = fedsim.Config(
        backbone="mlp", targets=("layers/*",), rank=2, **{"peft": "lora", "algorithm": "fed_it", **options}
    )
    model = peft.from_config(config, 3, (6,))
    return tasks.task(config, model, {}, cached=False)


def test_the_model_tells_its_factors():
    first, second = of().factors
    assert first == Factors("layers/0/kernel", "layers/0/lora_a", "layers/0/lora_b", 8.0, 6, 2, 128)
    assert (second.kernel, second.inputs, second.outputs) == ("layers/1/kernel", 128, 64)
    assert of(rslora=True).factors[0].scale == pytest.approx(16 / 2**0.5)
    assert of(peft="bias").factors == ()


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("flora", {"peft": "bias"}, "give --peft lora"),
        ("fed_it", {"peft": "full"}, "give --peft lora"),
        ("fed_sa_lora", {"peft": "ffa_lora"}, "A to be trained"),
        ("ffa_lora", {"peft": "lora"}, "give --peft ffa_lora"),
        ("flora", {"dora": True}, "drop --dora"),
        ("flex_lora", {"dora": True}, "drop --dora"),
        ("flora", {"peft": "lora+last_k"}, "layers/1/kernel is trained"),
        ("flora(ranks=(1, 4))", {}, "give --rank 4"),
        ("het_lora(ranks=(0, 2))", {}, "numbers >= 1"),
        ("het_lora(gamma=0)", {}, "0 < gamma"),
    ],
)
def test_tasks_that_a_rule_cannot_combine_are_refused(text, options, says):
    with pytest.raises(ValueError, match=says):
        find(text)(of(**options))


def test_dora_is_fed_it_too():
    assert find("fed_it")(of(dora=True)).round


@pytest.mark.parametrize("text", ["fed_it", "ffa_lora", "flora", "het_lora", "flex_lora", "fed_sa_lora", "fed_ex_lora"])
def test_the_head_alone_is_fed_avg(text):
    """Head rounds, and the head's run in the closing table, have no factors to combine."""
    head = {"head/kernel", "head/bias"}
    task = tiny_task(trained=frozenset(head))
    task = task._replace(
        init=lambda key: {f"head/{k}": v for k, v in tiny_task().init(key).items()},
        loss=lambda held, params, batch: tiny_task().loss(held, {k[5:]: v for k, v in params.items()}, batch),
    )
    assert type(find(text)(task).init(jax.random.key(0), {})).__module__ == "fedsim.algorithms.fed_avg"


# --- whole runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory, blobs):
    """`ran(algorithm)`: a small run, one round of it the head alone."""
    folder = tmp_path_factory.mktemp("lora")
    data = blobs(folder)

    @functools.cache
    def once(text):
        config = fedsim.Config(
            dataset=str(data),
            backbone="mlp",
            peft="ffa_lora" if text == "ffa_lora" else "lora",
            rank=4,
            targets=("layers/*",),
            clients=6,
            clients_per_round=3,
            min_size=4,
            rounds=4,
            head_rounds=1,
            optimizer="sgd",
            lr=0.05,
            algorithm=text,
        )
        speed = fedsim.Speed(lanes=2, checkpoint_every=1, devices=1)
        return fedsim.run(config, speed, out=folder / text.partition("(")[0], quiet=True)

    return once


def last_model(run):
    model = peft.from_config(run.config, len(run.about["classes"]), tuple(run.about["input_shape"]))
    _, frozen = peft.start(model, needs.weights(run.config), run.config.seed)
    return model, frozen


@pytest.mark.slow
@pytest.mark.parametrize("text", ["flora(ranks=(2, 4))", "fed_ex_lora"])
def test_a_run_that_wrote_kernels_predicts_and_merges(ran, text):
    run = fedsim.load(ran(text).directory)
    assert {"layers/0/kernel", "layers/1/kernel"} < set(run.parameters)
    model, frozen = last_model(run)
    assert np.abs(run.parameters["layers/0/kernel"] - frozen["layers/0/kernel"]).max() > 1e-4
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    logits = model.apply(run.parameters, frozen, x)
    assert run.predict(x) == [run.about["classes"][i] for i in np.asarray(logits).argmax(axis=1)]
    assert np.abs(logits - model.apply({k: run.parameters[k] for k in model.trained}, frozen, x)).max() > 1e-4
    merged = export.merge(model, run.parameters, frozen)
    whole = peft.from_config(run.config.replace(peft="full"), len(run.about["classes"]), (6,))
    np.testing.assert_allclose(whole.apply(merged, {}, x), logits, atol=1e-5)
    with pytest.raises(ValueError, match="export_backbone"):
        export.export_lora(run.directory, model, run.parameters, frozen)


@pytest.mark.slow
def test_a_stopped_flora_goes_on_bit_for_bit(ran, tmp_path):
    """Kernels, what was written when, and who was there last come from the checkpoint: the same bytes and bits."""
    whole = ran("flora(ranks=(2, 4))")
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.directory, stopped)
    for name in (record.SUMMARY, record.TRAINED):
        (stopped / name).unlink()
    for later in ("3", "4"):
        shutil.rmtree(stopped / record.CHECKPOINTS / later, ignore_errors=True)
    assert (stopped / record.CHECKPOINTS / "2").is_dir()
    resumed = fedsim.run(resume=stopped, quiet=True)
    assert (stopped / record.TRAINED).read_bytes() == (whole.directory / record.TRAINED).read_bytes()
    for a, b in zip(whole.rounds, resumed.rounds, strict=True):
        timeless = [
            {k: v for k, v in json.loads(json.dumps(line)).items() if "second" not in k and k != "most_memory"}
            for line in (a, b)
        ]
        assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_run_of_fed_sa_lora_is_that_of_a_new_client(ran):
    """What is evaluated and kept has B zero: the averaged head on the backbone."""
    run = ran("fed_sa_lora")
    assert not run.parameters["layers/0/lora_b"].any() and run.parameters["layers/0/lora_a"].any()
    assert not [name for line in run.rounds for name in line["bytes_up_leaves"] if "lora_b" in name]
    model, frozen = last_model(run)
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    head = {k: v for k, v in run.parameters.items() if k.startswith("head/")}
    bare = peft.from_config(run.config.replace(peft="head"), len(run.about["classes"]), (6,))
    leaves = {k: v for k, v in frozen.items() if k in bare.frozen}
    np.testing.assert_allclose(model.apply(run.parameters, frozen, x), bare.apply(head, leaves, x), atol=1e-6)
