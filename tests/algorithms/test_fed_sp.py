"""FedSP by the letters of its oracles: FedPrompt, prefix tuning, rest, the mean, frozen clients; its properties and bytes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedsim
from fedsim import Config, Speed, own, peft, wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_sp import SoftPrompts, fed_sp
from fedsim.algorithms.tied import Shape, shape_of, thinned, tied, tiled, uniques
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.core import Batch
from fedsim.engine.keys import key_for
from fedsim.evaluation import language
from fedsim.testing.contract import same
from fedsim.testing.tasks import BLOCKS, FEATURES, TOKENS, tiny, tiny_prefix_task
from fedsim.testing.toys import COHORT, one_client, run, tiny_problem, visits
from fedsim.training.local import stepped

pytestmark = pytest.mark.usefixtures("compile_once")

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "fed_sp" / "speakers.py"
START = tiny_prefix_task().init(jax.random.key(5))
PROBLEM = tiny_problem()
HELD = PROBLEM.held
ALONE: dict[str, Any] = {"distil_steps": 0, "server_steps": 0}  # clients' work, and nothing of the server's
SAME: dict[str, Any] = {"unique": BLOCKS, "freeze_aux": True, **ALONE}  # A is G, and stage A is off
P = 4 * TOKENS * 2 * BLOCKS * FEATURES  # bytes of all prompts


def task_of(**changes):
    """The tiny task with prompts, by plain SGD, from one start."""
    options = {"init": lambda key: START, "optimizer": optax.sgd, "lr": lambda client, message: jnp.float32(0.3)}
    return tiny_prefix_task(**{**options, **changes})


TASK = task_of()
TWICE = (COHORT, (7, 5, 3, 2, 8, 10))


def sp(**options):
    return functools.partial(fed_sp, **options)


def parts(task=TASK, unique=1, depth=None, trains=("*",), frozen=False, mixed=False, keep=True, reparam=0):
    return SoftPrompts(task, shape_of(task, unique, depth), trains, frozen, mixed, keep, reparam)


@functools.cache
def whole():
    """Two rounds with everything on: the server's state, memories, cohorts, and what was sent."""
    sent: list[Any] = []
    make = sp(distil_steps=3, distil_batch=4, server_steps=2, server_batch=4)
    return *run(make, PROBLEM, TWICE, task=TASK, sent=sent), sent


# --- the oracles


def test_a_of_the_same_model_without_stage_a_and_server_steps_it_is_fed_prompt():
    plain, _, done = run(fed_avg, PROBLEM, TWICE, task=TASK)
    found, _, own = run(sp(**SAME), PROBLEM, TWICE, task=TASK)
    same(plain.params, found.params, "FedAvg of the prompts", rtol=1e-6)
    assert [sum(way.values()) for c in own for way in c.traffic()] == [
        sum(w.values()) for c in done for w in c.traffic()
    ]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain.params, START)
    assert min(moved.values()) > 1e-3


@pytest.mark.slow
def test_b_of_one_client_it_is_prefix_tuning_with_one_optimizer():
    """Adam's state goes on from round to round; `keep_optimizers=False` begins anew."""
    task, cohorts = task_of(optimizer=optax.adam, lr=lambda client, message: jnp.float32(0.05)), ((7,), (7,), (7,))
    found, _, _ = run(sp(**SAME), PROBLEM, cohorts, task=task)
    params, adam = START, optax.adam(0.05)
    state = adam.init(params)
    grad = jax.jit(jax.grad(lambda p, batch: task.loss(HELD, p, batch)[0]))
    for round in (1, 2, 3):
        for rows in visits(PROBLEM, task.passes, 7, round):
            real = jnp.asarray(rows >= 0, jnp.float32)
            x, y = (jnp.asarray(each[np.maximum(rows, 0)]) for each in (PROBLEM.x, PROBLEM.y))
            seen = Batch(x, y, real, jax.random.key(0), jnp.int32(0), jnp.asarray(False))
            params, state = stepped(adam, grad(params, seen), state, params)
    same(params, found.params, "prefix tuning", rtol=1e-4)
    anew, _, _ = run(sp(**SAME, keep_optimizers=False), PROBLEM, cohorts, task=task)
    assert max(float(jnp.abs(anew.params[path] - leaf).max()) for path, leaf in params.items()) > 1e-3


@pytest.mark.slow
def test_c_at_a_rate_of_zero_the_prompts_rest():
    still = task_of(lr=lambda client, message: jnp.float32(0))
    found, _, _ = run(sp(**ALONE), PROBLEM, TWICE, task=still)
    same(START, found.params, "the prompts", rtol=0)


def by_hand(sent, ids, round=1, kept=None):
    """Replies and memories of clients in a round, each computed alone: after stage A and after stage B."""
    (first, second), found = sent, {}
    algorithm = fed_sp(TASK, distil_steps=0, server_steps=0)
    for id in ids:
        memory = kept[id] if kept else algorithm.memory(key_for(jax.random.key(0), "memory", id), HELD)
        read = wire.unmarked(first.message)
        _, aligned = one_client(PROBLEM, first.local, read, memory, id, round)
        reply, after = one_client(PROBLEM, second.local, read, aligned, id, round)
        found[id] = wire.unmarked(reply), aligned, after
    return found


def test_d_without_server_steps_the_server_has_the_weighted_mean():
    """Of E_i that two clients' two stages give, computed one by one."""
    sent: list[Any] = []
    pair = (2, 4)
    found, _, _ = run(sp(**ALONE), PROBLEM, (pair,), task=TASK, sent=sent)
    alone = by_hand(sent, pair)
    sizes = {id: int(PROBLEM.offsets[id + 1] - PROBLEM.offsets[id]) for id in pair}
    weight = {id: size / sum(sizes.values()) for id, size in sizes.items()}
    mean = {path: START[path] + sum(weight[id] * alone[id][0][path] for id in pair) for path in START}
    same(mean, found.params, "the weighted mean", rtol=1e-5)


@pytest.mark.slow
def test_e_frozen_clients_are_fed_avg_over_the_auxiliary_model():
    options = {"distil_steps": 3, "distil_batch": 4, "server_steps": 0, "freeze_aux": True}
    found, _, _ = run(sp(**options), PROBLEM, TWICE, task=TASK)
    auxiliary, shape = found.auxiliary, shape_of(TASK, 1, None)
    of_a = TASK._replace(loss=lambda held, p, batch: TASK.loss(tied(held, auxiliary, shape), p, batch))
    plain, _, _ = run(fed_avg, PROBLEM, TWICE, task=of_a)
    same(plain.params, found.params, "FedAvg over the auxiliary model", rtol=1e-5)
    of_g, _, _ = run(fed_avg, PROBLEM, TWICE, task=TASK)
    assert max(float(jnp.abs(of_g.params[path] - leaf).max()) for path, leaf in plain.params.items()) > 1e-3


# --- properties


@pytest.mark.slow
def test_each_stage_moves_its_own_part_alone():
    _, _, _, sent = whole()
    first = sent[0]
    for reply, aligned, after in by_hand(sent[:2], (2, 4)).values():
        same(aligned.auxiliary, after.auxiliary, "A_i in stage B")
        assert bool(aligned.auxiliary.there) and all(float(jnp.abs(leaf).max()) > 0 for leaf in reply.values())
    nothing, _ = one_client(PROBLEM, first.local, wire.unmarked(first.message), fresh(2), 2, 1)
    assert not jax.tree.leaves(nothing), "stage A sends nothing"
    same(wire.unmarked(first.message)["prompts"], START, "the prompts that stage B begins with")


def fresh(id):
    return fed_sp(TASK, **ALONE).memory(key_for(jax.random.key(0), "memory", id), HELD)


@pytest.mark.slow
def test_clients_keep_auxiliary_models_of_their_own():
    """They differ after the first round; what the server sent is not changed by them, and G by nobody."""
    server, memory, cohorts, sent = whole()
    rows, ids = memory.state()
    assert np.asarray(rows.auxiliary.there)[[list(ids).index(id) for id in COHORT]].all()
    a, b = (np.asarray(rows.auxiliary.value["blocks/0/kernel"])[list(ids).index(id)] for id in (2, 4))
    assert np.abs(a - b).max() > 1e-3
    for one in sent[1:]:
        same(wire.unmarked(sent[0].message)["auxiliary"], wire.unmarked(one.message)["auxiliary"], "A as it was sent")
    same(server.auxiliary, wire.unmarked(sent[0].message)["auxiliary"], "A at the server")
    same(HELD, jax.device_get(cohorts[-1].engine.held), "G")


def test_a_client_goes_on_from_its_own_auxiliary_model():
    """The engine's memory after two rounds is that of the client alone."""
    _, memory, _, sent = whole()
    first = by_hand(sent[:2], (7,))
    second = by_hand(sent[2:], (7,), 2, {7: first[7][2]})
    rows, ids = memory.state()
    own = jax.tree.map(lambda leaf: leaf[list(ids).index(7)], rows)
    same(second[7][2], own, "what client 7 keeps", rtol=1e-5)


def test_the_first_stage_by_hand():
    """SGD on the one kernel that both blocks have, and on the map before them, prompts fixed; later from the client's own."""
    first, shared = whole()[3][0], ("frozen", "blocks/0/kernel")
    read = wire.unmarked(first.message)
    memory = fresh(2)
    for start in (read["auxiliary"], {path: leaf + 0.1 for path, leaf in read["auxiliary"].items()}):
        w = {path: start[path] for path in shared}

        def loss(w, batch):
            return TASK.loss(
                {**{path: w[path] for path in shared}, "blocks/1/kernel": w["blocks/0/kernel"]}, START, batch
            )[0]

        slope = jax.jit(jax.grad(loss))
        for rows in visits(PROBLEM, first.local.passes, 2, 1):
            x, y = (jnp.asarray(each[np.maximum(rows, 0)]) for each in (PROBLEM.x, PROBLEM.y))
            real = jnp.asarray(rows >= 0, jnp.float32)
            seen = Batch(x, y, real, jax.random.key(0), jnp.int32(0), jnp.asarray(False))
            w = jax.tree.map(lambda a, g: a - 0.3 * g, w, slope(w, seen))
        _, after = one_client(PROBLEM, first.local, read, memory, 2, 1)
        same(w, {path: after.auxiliary.value[path] for path in shared}, "A_i", rtol=1e-5)
        moved = {path: leaf + 0.1 for path, leaf in read["auxiliary"].items()}
        memory = memory._replace(auxiliary=memory.auxiliary._replace(value=moved, there=jnp.asarray(True)))


def test_the_first_stage_has_a_rate_of_its_own():
    """At a factor of zero A_i stays what was sent, while it is the client's own from then on."""
    read = wire.unmarked(whole()[3][0].message)
    still = SoftPrompts(TASK, shape_of(TASK, 1, None), ("*",), False, False, True, 0, factors=(0.0, 1.0))
    _, after = one_client(PROBLEM, still.aligning(), read, fresh(2), 2, 1)
    same(after.auxiliary.value, read["auxiliary"], "A_i")
    assert bool(after.auxiliary.there)


def test_clients_read_nothing_of_the_servers_later_blocks():
    sent = whole()[3]
    first = sent[0]
    other = PROBLEM._replace(held={**HELD, "blocks/1/kernel": HELD["blocks/1/kernel"] * np.nan})
    read = wire.unmarked(first.message)
    for one in sent[:2]:
        found = [one_client(problem, one.local, read, fresh(2), 2, 1) for problem in (PROBLEM, other)]
        same(wire.unmarked(found[0]), wire.unmarked(found[1]), "a client of another G")


@pytest.mark.parametrize("options", [{}, {"unique": 2}, {"freeze_aux": True}, {"trains": ("blocks/*",)}], ids=str)
def test_bytes_are_the_prompts_and_the_auxiliary_model_once(options):
    """Neither c nor |G| nor what moves is in a round's bytes; the set-up has A's unique leaves."""
    algorithm = fed_sp(TASK, **options)
    own = {path for path in HELD if path != "blocks/1/kernel" or options.get("unique") == 2}
    assert sum(wire.price(jax.eval_shape(algorithm.setup, HELD)).values()) == sum(HELD[path].nbytes for path in own)
    if not options:
        for cohort in whole()[2]:
            assert [sum(way.values()) for way in cohort.traffic()] == [6 * P, 6 * P]
        assert len(wire.serialise(wire.unmarked(whole()[3][0].message)["prompts"])) == P


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_bytes_of_a_table_and_its_map(hidden):
    """b (p d + d h + h + 2 L d h + 2 L d) each way, and the exported prompts are those that it makes."""
    make = sp(**{**ALONE, "freeze_aux": True, "reparam": hidden})
    server, _, (cohort,) = run(make, PROBLEM, ((2, 4),), task=TASK)
    p, d, deep = TOKENS, FEATURES, 2 * BLOCKS * FEATURES
    expected = 4 * (p * d + d * hidden + hidden + deep * hidden + deep)
    assert [sum(way.values()) for way in cohort.traffic()] == [2 * expected, 2 * expected]
    table = np.tanh(
        server.params["reparam/embedding"] @ server.params["reparam/inner/kernel"] + server.params["reparam/inner/bias"]
    )
    made = table @ server.params["reparam/outer/kernel"] + server.params["reparam/outer/bias"]
    found = make(TASK).params(server)
    assert set(found) == set(START)
    np.testing.assert_allclose(
        np.concatenate([found[path] for path in sorted(found)], axis=1), made, rtol=1e-5, atol=1e-7
    )


def test_prompts_of_several_blocks_become_their_mean_and_come_back():
    shape = Shape(layers=6, unique=1, depth=2)
    rng = np.random.default_rng(0)
    deep = {f"blocks/{b}/prefix_key": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for b in range(6)}
    few = thinned(deep, shape)
    assert set(few) == {"blocks/0/prefix_key", "blocks/1/prefix_key"}
    expected = np.mean([deep[f"blocks/{b}/prefix_key"] for b in (1, 3, 5)], axis=0)
    np.testing.assert_allclose(few["blocks/1/prefix_key"], expected, rtol=1e-6)
    same(few, thinned(tiled(few, shape), shape), "tile, then mean", rtol=1e-6)
    assert set(tiled(few, shape)) == set(deep)


@pytest.mark.slow
def test_a_shallower_auxiliary_model_gets_fewer_prompts():
    """Half of them go each way, and both blocks of G then have the same."""
    server, _, (cohort,) = run(sp(depth=1, **ALONE), PROBLEM, ((2, 4),), task=TASK)
    assert [sum(way.values()) for way in cohort.traffic()] == [P, P]
    for name in ("key", "value"):
        np.testing.assert_allclose(
            server.params[f"blocks/0/prefix_{name}"], server.params[f"blocks/1/prefix_{name}"], rtol=1e-5
        )
        assert np.abs(server.params[f"blocks/0/prefix_{name}"] - START[f"blocks/0/prefix_{name}"]).max() > 1e-3


def batch_of(x, y=()):
    rows = len(jax.tree.leaves(x)[0])
    return Batch(x, y, jnp.ones(rows), jax.random.key(0), jnp.int32(0), jnp.asarray(False))


def test_distillation_is_zero_of_the_same_model_and_falls_of_another():
    seen = batch_of(jnp.asarray(PROBLEM.x[21:33]), jnp.asarray(PROBLEM.y[21:33]))
    for mixed in (False, True):
        equal, tiedly = parts(unique=2, mixed=mixed), parts(mixed=mixed)
        found = float(equal.apart(HELD, equal.moving(HELD), seen, START)[0])
        assert found == 0 if not mixed else found > 0
        assert float(tiedly.apart(HELD, tiedly.moving(HELD), seen, START)[0]) > found
    model = parts()
    moved = first = model.moving(HELD)
    slope = jax.jit(jax.value_and_grad(lambda a: model.apart(HELD, a, seen, START)[0]))
    for _ in range(30):
        moved = jax.tree.map(lambda a, g: a - 0.3 * g, moved, slope(moved)[1])
    assert float(slope(moved)[0]) < 0.7 * float(slope(first)[0])


def test_the_server_trains_on_its_own_examples():
    server = whole()[0]
    without, _, _ = run(sp(distil_steps=3, distil_batch=4, server_steps=0), PROBLEM, TWICE, task=TASK)
    same(without.auxiliary, server.auxiliary, "A, which is distilled once, before any of the server's steps")
    gaps = [float(jnp.abs(without.params[path] - leaf).max()) for path, leaf in server.params.items()]
    assert 0 < max(gaps) < 0.1, "two rounds of two steps of AdamW"


# --- decoders

SMALL = DecoderConfig(vocabulary=40, width=16, depth=4, heads=4, kv_heads=2, hidden=24, positions=12, theta=100.0)
GPT2 = pytest.param("small_gpt2", marks=pytest.mark.slow)
IDS = np.array([[1, 5, 6, 7, 2, 3, 4], [1, 9, 8, 7, 6, 5, 2]], np.int32)


@pytest.fixture
def decoders(monkeypatch):
    """Small decoders by name, of two layouts and depths."""
    for name, config in {
        "small": SMALL,
        "short": dataclasses.replace(SMALL, depth=2),
        "small_gpt2": dataclasses.replace(SMALL, layout="gpt2", kv_heads=4),
        "short_gpt2": dataclasses.replace(SMALL, layout="gpt2", kv_heads=4, depth=2),
    }.items():
        monkeypatch.setitem(BACKBONES, name, decoder_row(config))


def made(name, **options):
    """A decoder with a prefix as a task, its prompts, and G with every leaf moved from its start."""
    model = peft.build(name, 3, peft="prefix", task="language_model", prefix_tokens=3, **options)
    rng = np.random.default_rng(0)
    trained, frozen = (
        {path: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in part.items()}
        for part in peft.start(model, "random", 0)
    )
    task = tiny(model.apply, lambda key: trained)._replace(
        features=lambda held, p, x: model.run({**held, **p}, x, 0, model.stages - 1)["x"],
        real=language.real(0), criterion=language.criterion(0), score=language.score(0), classes=0,
    )  # fmt: skip
    return task, trained, frozen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", GPT2])
def test_without_prompts_the_model_is_the_plain_one(decoders, name):
    name = name.replace("small", "short")
    task, prompts, held = made(name)
    plain = peft.build(name, 3, peft="full", task="language_model")
    none = {path: leaf[:0] for path, leaf in prompts.items()}
    np.testing.assert_allclose(task.logits(held, none, IDS), plain.apply(held, {}, IDS), rtol=1e-5, atol=1e-5)
    assert np.abs(task.logits(held, prompts, IDS) - task.logits(held, none, IDS)).max() > 1e-2


@pytest.mark.parametrize("name", ["short", pytest.param("short_gpt2", marks=pytest.mark.slow)])
def test_every_token_sees_every_prompt(decoders, name):
    task, prompts, held = made(name)
    slope = jax.jit(jax.grad(lambda p, at: jnp.abs(task.logits(held, p, IDS)[0, at]).sum()))
    for place in (0, IDS.shape[1] - 1):
        for path, leaf in slope(prompts, jnp.int32(place)).items():
            assert (np.abs(leaf).max(axis=1) > 1e-8).all(), f"{path} at place {place}"


@pytest.mark.parametrize("name", ["small", GPT2])
def test_the_tied_model_has_as_many_blocks_of_its_own_as_it_should(decoders, name):
    task, _, held = made(name)
    for unique in (1, 2, 4):
        shape = shape_of(task, unique, None)
        a = tied(held, {}, shape)
        assert set(a) == set(held)
        assert len({id(a[f"blocks/{b}/mlp/up/kernel"]) for b in range(4)}) == unique
        own = uniques(held, shape)
        assert {path.split("/")[1] for path in own if path.startswith("blocks/")} == {str(b) for b in range(unique)}
        assert {path for path in held if not path.startswith("blocks/")} <= set(own)


@pytest.mark.parametrize(
    ("name", "short"), [("small", "short"), pytest.param("small_gpt2", "short_gpt2", marks=pytest.mark.slow)]
)
def test_blocks_behind_the_depth_do_nothing(decoders, name, short):
    task, prompts, held = made(name)
    of_short, _, shapes = made(short)
    shape = shape_of(task, 1, 2)
    model = parts(task, depth=2)
    few = thinned(prompts, shape)
    a = tied(held, {}, shape)
    expected = of_short.logits({path: a[path] for path in shapes}, few, IDS)
    np.testing.assert_allclose(task.logits(a, model.on_client(few), IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_distillation_is_about_real_tokens(decoders):
    """What A makes of padding counts for nothing."""
    task, prompts, held = made("small")
    padded = np.concatenate([IDS, np.zeros((2, 4), np.int32)], axis=1)
    model = parts(task)
    gaps = [model.apart(held, model.moving(held), batch_of(jnp.asarray(ids)), prompts)[0] for ids in (IDS, padded)]
    np.testing.assert_allclose(*gaps, rtol=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unique": 3}, "unique=3 to divide 2, the blocks of the auxiliary model"),
        ({"unique": 0}, "unique=0 >= 1"),
        ({"depth": 4}, "depth=4 to divide 2, the blocks of the server's model"),
        ({"depth": 1, "unique": 2}, "unique=2 to divide 1"),
        ({"depth": 1, "reparam": 4}, "no depth=1 with reparam=4"),
        ({"reparam": -1}, "reparam=-1 >= 0"),
        ({"distil_steps": -1}, "distil_steps=-1 >= 0"),
        ({"distil_rate": -1.0}, "distil_rate=-1.0 >= 0"),
        ({"server_steps": 1.5}, "server_steps=1.5 >= 0"),
        ({"server_rate": float("nan")}, "server_rate=nan >= 0"),
        ({"distil": "logits"}, "hidden, mixed"),
        ({"aux_rate": -1.0}, "aux_rate=-1.0 >= 0"),
    ],
    ids=str,
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match="Expected") as error:
        fed_sp(TASK, **options)
    assert said in str(error.value)


def test_a_model_that_trains_more_than_its_prefix_is_refused():
    more = TASK._replace(trained=TASK.trained | {"head/kernel"})
    with pytest.raises(ValueError, match="not head/kernel; give --task language_model --peft prefix"):
        fed_sp(more)
    with pytest.raises(ValueError, match="algorithm='fed_sp' trains"):
        find("fed_sp")(tiny(lambda p, h, x: x, lambda key: {"kernel": jnp.ones(2)}))


@pytest.mark.parametrize(
    ("held", "options", "said"),
    [
        (
            {**HELD, "blocks/1/kernel": np.ones((6, 7), np.float32)},
            {},
            "blocks/1/kernel of the server's model to be shaped as",
        ),
        ({**HELD, "blocks/1/bias": np.ones(6, np.float32)}, {}, "take a decoder of equal blocks, or unique=2"),
        (HELD, {"trains": ("blocks/*", "mlp/*")}, "'mlp/*' matches none of"),
    ],
    ids=["shapes", "leaves", "trains"],
)
def test_a_server_model_that_cannot_be_tied_is_refused_before_work(held, options, said):
    with pytest.raises(ValueError, match="Expected") as error:
        fed_sp(TASK, **options).init(jax.random.key(0), held)
    assert said in str(error.value)


def test_a_server_without_examples_is_refused():
    with pytest.raises(ValueError, match=r"server_share > 0 .*give --server-share 0.1"):
        run(sp(server_steps=0), PROBLEM, (COHORT,), task=TASK, shard=None)


CONFIG = Config(
    task="language_model", backbone="decoder_tiny", tokens=20, peft="prefix", prefix_tokens=4, optimizer="adam", lr=0.03,
    clients=4, clients_per_round=4, rounds=2, steps=4, batch_size=8, min_size=4, partition="iid", server_share=0.2,
    algorithm="fed_sp(distil_steps=4, server_steps=2, server_batch=8)",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefix_tokens": 0}, "prefix_tokens=0"),
        ({"tokens": 600}, "tokens=600 <= 512"),
        ({"peft": "lora"}, "give --task language_model --peft prefix"),
        ({"server_share": 0.0}, "--server-share 0.1"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused(texts, changes, said, tmp_path):
    with pytest.raises(ValueError, match="Expected") as error:
        fedsim.run(CONFIG.replace(dataset=str(texts), **changes), Speed(devices=1), out=tmp_path / "run", quiet=True)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of three kinds, of one to three phrases."""
    rng = np.random.default_rng(0)
    phrases = ("the cat sat on the mat", "a dog ran in the park", "one bird flew to the tree")
    rows = [(k, " ".join([phrases[k]] * rng.integers(1, 4))) for k in rng.integers(0, 3, 150).tolist()]
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    file.write_text("text,label\n" + "".join(f"{text},kind {k}\n" for k, text in rows))
    return file


@pytest.mark.slow
def test_a_run_of_a_decoder(texts, tmp_path):
    """Bytes and set-up of the record, and losses of the server's that fall; a decoder at random learns nothing by its prompts."""
    run = fedsim.run(
        CONFIG.replace(dataset=str(texts), rounds=4, eval_every=1),
        Speed(devices=1, lanes=2),
        out=tmp_path / "run",
        quiet=True,
    )
    each = 4 * 4 * 2 * 2 * 32  # bytes of four tokens' keys and values, 32 wide, in two blocks
    assert [(line["bytes_up"], line["bytes_down"]) for line in run.rounds] == [(4 * each, 4 * each)] * 4
    model = peft.build("decoder_tiny", 3, peft="prefix", task="language_model")
    own = sum(leaf.size for path, leaf in model.frozen.items() if not path.startswith("blocks/1"))
    assert [line["setup_bytes"] for line in run.rounds] == [4 * 4 * own, 0, 0, 0]
    told = [line["metrics"] for line in run.rounds]
    assert "distillation" in told[0] and "distillation" not in told[1], "A is distilled once"
    assert told[-1]["auxiliary_loss"] < 0.8 * told[0]["auxiliary_loss"] and np.isfinite(told[-1]["server_loss"])


@pytest.mark.slow
@pytest.mark.assets
def test_the_experiment_in_its_small_form(tmp_path):
    """All methods have a row; rivals' bytes are those of prompts, and A is less to send than G."""
    found = own.execute(EXPERIMENT, "experiment", beside=True).main(tmp_path, small=True)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["FedPrompt", "FedSP", "central prefix", "server alone", "zero-shot"]
    assert (
        rows["FedSP"]["bytes"] == rows["FedPrompt"]["bytes"] == 2 * 4 * 4 * 2 * 2 * 4 * 32
    )  # 4 clients, blocks 2, p 4, d 32
    assert all(row["bytes"] == row["setup"] == 0 for row in found["rows"][2:])
    assert rows["FedSP"]["setup"] < rows["FedPrompt"]["setup"] and all(
        np.isfinite(row["scores"]).all() for row in found["rows"]
    )
