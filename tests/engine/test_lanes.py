"""The engine against a client-by-client loop, and its promises: nothing recompiles, nothing empty counts."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim import network, wire
from fedsim.algorithms import ALGORITHMS, find
from fedsim.core import Algorithm, Local, Passes, Reduce
from fedsim.engine import lane_count
from fedsim.engine import lanes as lanes_module
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import Need
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Request
from fedsim.folds import by_examples, mean, stack, uniform
from fedsim.testing.contract import CHECKS, same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, SIZES, engine, one_client, run, tiny_problem
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")


BRIEF = ("fed_avg",)  # the others, and what takes long, run with -m slow
LONG = "lanes and devices agree"
AND = {("fed_avg", LONG), *((name, "bytes equal the packed messages") for name in ("fed_res", "dfed_salt", "fed_pcl"))}
CONTRACT = [
    pytest.param(
        name, check, marks=() if (name in BRIEF and check != LONG) or (name, check) in AND else pytest.mark.slow
    )
    for name in ALGORITHMS
    for check in CHECKS
]


# Soups' pulls of constant length 3, under the toy's SGD of rate 0.1, throw models to and fro about a kink, which multiplies
# what was rounded by 1,000; at a tenth of these weights lanes agree as those of others do (docs/algorithms/superior_soups.md).
MILD = {"superior_soups": "superior_soups(lambda_a=0.3, lambda_d=0.3)"}
# Far fewer steps than the paper's, which take minutes.
MILD["fed_dm"] = "fed_dm(per_class=2, real=4, least=4, steps=3, server_epochs=2, server_batch=6)"
MILD |= {name: f"{name}(server_steps=8, server_batch=4)" for name in ("fed_et", "fed_df")}
MILD["fed_sp"] = "fed_sp(distil_steps=3, distil_batch=4, server_steps=2, server_batch=4)"
# A rounding of the loss is divided by 2 epsilon: with 1e-3 lanes agree to 1e-4 of what moved (docs/algorithms/fed_kseed.md).
MILD["fed_kseed"] = "fed_kseed(seeds=64, epsilon=0.25)"
made = functools.cache(lambda name: find(MILD[name]) if name in MILD else ALGORITHMS[name])


@pytest.mark.parametrize(("algorithm", "check"), CONTRACT)
def test_contract(algorithm, check):
    CHECKS[check](made(algorithm))


def counting(task):
    """FedAvg whose clients count their visits, and tell the server their count: exercises memory and metrics."""
    plain = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        reply=lambda carry, message, client: (
            {"change": jax.tree.map(jnp.subtract, carry.params, message), "visits": client.memory + 1.0},
            client.memory + 1.0,
        ),
    )
    finish = plain.finish

    def counted(held, message, carry, client):
        reply, memory, _ = finish(held, message, carry, client)
        return reply, memory, {"visits": memory, "key": jax.random.uniform(client.key)}

    local, reduce = plain._replace(finish=counted), mean(task.weight)

    def round(key, held, server, cohort):
        result, info = cohort.exchange(server, local, reduce)
        return add(server, result["change"]), info.metrics

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    return Algorithm(
        lambda key, held: task.init(key),
        round,
        lambda held, server, memory, x: task.logits(held, server, x),
        memory=lambda key, held: jnp.zeros(()),
        params=lambda server: server,
    )


@pytest.mark.parametrize("check", [pytest.param(c, marks=pytest.mark.slow) if c == LONG else c for c in CHECKS])
def test_contract_of_an_algorithm_with_memory(check):
    CHECKS[check](counting)


@pytest.mark.parametrize("passes", [Passes(2, None, 4), Passes(1, 3, 8), Passes(1, None, 64), Passes(3, None, 1)])
def test_engine_equals_client_by_client(passes):
    problem, task = tiny_problem(), tiny_task(passes=passes)
    sent = []
    server, memory, _ = run(counting, problem, task=task, sent=sent, lanes=3)
    message, local = sent[0].message, sent[0].local
    replies = [one_client(problem, local, message, jnp.zeros(()), id, 1) for id in COHORT]
    weights = np.array([SIZES[id] for id in COHORT], np.float64)
    for name in message:
        changes = np.stack([np.asarray(reply["change"][name], np.float64) for reply, _ in replies])
        expected = np.asarray(message[name]) + np.tensordot(weights / weights.sum(), changes, axes=1)
        np.testing.assert_allclose(server[name], expected, rtol=1e-5, atol=1e-6)
    assert memory.state()[0].tolist() == [1.0] * len(COHORT)


@pytest.mark.parametrize("resident", ["on", "off"])
def test_batches_of_two_segments_at_most_are_under_way(monkeypatch, resident):
    """Before the batches of segment k are made, segment k - 2 has been waited for, and k - 1 has not."""
    made, ended, waited = [], [], []
    gather, copy, wait = lanes_module.Lanes.gather, jnp.copy, jax.block_until_ready

    def gathered(engine, rows):
        if ended:
            made.append((len(ended), len(waited)))
        return gather(engine, rows)

    def marked(value):
        ended.append(copy(value))
        return ended[-1]

    def ready(values):
        waited.extend(v for v in jax.tree.leaves(values) if any(v is end for end in ended))
        return wait(values)

    monkeypatch.setattr(lanes_module.Lanes, "gather", gathered)
    monkeypatch.setattr(jnp, "copy", marked)
    monkeypatch.setattr(jax, "block_until_ready", ready)
    passes = Passes(2, None, 4)
    run(counting, tiny_problem(), (COHORT,), task=tiny_task(passes=passes), lanes=2, segment_steps=3, resident=resident)
    assert made == [(k, k - 1) for k in range(1, len(ended))] and len(made) > 2


@pytest.mark.parametrize("devices", [1, 2])
def test_examples_streamed_from_the_host_give_the_same_bits(devices):
    """Batches of the host go through the resident path's program, segment by segment: every bit is the same."""
    problem, task = tiny_problem(), tiny_task(passes=Passes(2, None, 4))
    options = {"lanes": 2, "segment_steps": 3, "devices": devices}
    kept, streamed = (run(counting, problem, task=task, resident=where, **options) for where in ("on", "off"))
    engines = [result[2][0].engine for result in (kept, streamed)]
    assert isinstance(engines[0].x, jax.Array) and isinstance(engines[1].x, np.ndarray)
    assert max(cohort.done[0].steps for cohort in streamed[2]) > 3, "one segment would show nothing"
    jax.tree.map(np.testing.assert_array_equal, kept[0], streamed[0])
    jax.tree.map(np.testing.assert_array_equal, kept[1].state(), streamed[1].state())
    infos = [jax.device_get([cohort.done[0].info for cohort in result[2]]) for result in (kept, streamed)]
    jax.tree.map(np.testing.assert_array_equal, *infos)


def test_examples_stay_on_the_host_where_they_do_not_fit(monkeypatch):
    problem = tiny_problem()
    assert engine(problem).resident
    monkeypatch.setattr(lanes_module, "device_memory", lambda device: problem.x.nbytes)
    assert not engine(problem).resident


@pytest.mark.slow
def test_auto_halves_the_lanes_until_the_program_fits(monkeypatch):
    """The program's own analysis decides: with memory for little more than one lane, few remain, and nothing else changes."""
    problem, task = tiny_problem(), tiny_task(passes=Passes(1, 3, 4))
    needs, refuse = [], lanes_module.refuse_too_large
    monkeypatch.setattr(lanes_module, "refuse_too_large", lambda need, *more: (needs.append(need), refuse(need, *more)))

    def lanes_and_result(memory, lanes="auto"):
        monkeypatch.setattr(lanes_module, "free_memory", lambda device, sharing: memory)
        server, _, cohorts = run(counting, problem, (COHORT,), task=task, lanes=lanes)
        return cohorts[0].engine.lanes, server

    many, wide = lanes_and_result(2**40)
    lanes_and_result(2**40, lanes=1)
    few, narrow = lanes_and_result(needs[-1].lanes)
    assert many > 1 and few == 1
    same(wide, narrow, "lanes", rtol=1e-5)
    assert needs[0].lanes > needs[1].lanes and needs[0].there == needs[1].there >= problem.x.nbytes
    for lanes in ("auto", many):
        with pytest.raises(ValueError, match=r"Expected lanes=\d with batch_size=4 to fit .* lower "):
            lanes_and_result(needs[1].lanes - 1, lanes)


def test_lanes_are_halved_at_once_to_what_should_fit():
    """Each try compiles a program, which takes minutes for a large one."""
    assert lanes_module.halved(256, Need(1600, 0), 800.0) == 128
    assert lanes_module.halved(256, Need(1600, 0), 120.0) == 16
    assert lanes_module.halved(3, Need(1600, 0), 1.0) == 1
    assert lanes_module.halved(256, Need(math.inf, 0), 120.0) == 128, "how much too large it is is not known"


@pytest.mark.slow
def test_fewer_lanes_take_longer_segments(monkeypatch):
    """The steps of a segment follow from the lanes that fit, not from those that were tried first."""
    problem, task = tiny_problem(), tiny_task(passes=Passes(1, 3, 4))
    monkeypatch.setattr(lanes_module, "PREFETCH_BYTES", 8 * 4 * problem.x[0].nbytes)
    monkeypatch.setattr(lanes_module, "free_memory", lambda device, sharing: 2**40)
    wide = run(counting, problem, (COHORT,), task=task, lanes="auto", segment_steps="auto")[2][0].engine
    compiled = lanes_module.Lanes._compiled

    def too_large(self, programs, *more):
        programs, need = compiled(self, programs, *more)
        return programs, need if programs.lanes == 1 else need._replace(lanes=math.inf)

    monkeypatch.setattr(lanes_module.Lanes, "_compiled", too_large)
    narrow = run(counting, problem, (COHORT,), task=task, lanes="auto", segment_steps="auto")[2][0].engine
    assert wide.lanes > 1 and wide.segment_steps == 8 // wide.lanes
    assert (narrow.lanes, narrow.segment_steps) == (1, 8)


@pytest.mark.parametrize("lanes", ["auto", 4])
def test_a_compiler_that_refuses_is_a_program_that_does_not_fit(monkeypatch, lanes):
    """A TPU's compiler knows the device's memory: here two lanes fit, more do not."""
    make, tried = lanes_module.make_programs, []

    class Segment:
        def __init__(self, jitted, lanes):
            self.jitted, self.lanes = jitted, lanes

        def lower(self, *args):
            tried.append(self.lanes)
            self.lowered = self.jitted.lower(*args)
            return self

        def compile(self):
            if self.lanes > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
            return self.lowered.compile()

    def made(*args):
        programs = make(*args)
        return programs._replace(segment=Segment(programs.segment, programs.lanes))

    monkeypatch.setattr(lanes_module, "make_programs", made)
    monkeypatch.setattr(lanes_module, "choose_lanes", lambda *args, **options: 4)
    if lanes == "auto":
        assert run(counting, tiny_problem(), (COHORT,), lanes=lanes)[2][0].engine.lanes == 2
        assert tried == [4, 2]
    else:
        with pytest.raises(ValueError, match=r"lanes=4 .* more than its compiler accepts .* lower --lanes to about 2"):
            run(counting, tiny_problem(), (COHORT,), lanes=lanes)


def test_an_engine_that_may_not_refuse_tries(monkeypatch):
    """A test after the last round, where an error would lose the run."""
    monkeypatch.setattr(lanes_module, "free_memory", lambda device, sharing: 0)
    run(counting, tiny_problem(), (COHORT,), lanes=2, may_refuse=False)


@pytest.mark.parametrize(
    ("sizes", "devices", "platform", "lanes"),
    [
        ([40] * 10, 1, "cpu", 5),  # two turns of five, not three of four
        ([40] * 10, 2, "cpu", 1),  # of three lanes at most, two and three would stand idle in the last turn
        ([40] * 12, 2, "cpu", 3),
        ([40] * 256, 1, "gpu", 256),
        ([40] * 257, 1, "gpu", 160),  # two turns of 160 lanes stand idle less than two of 256
        ([400, 8, 8, 8], 1, "cpu", 1),  # nothing beside the long one would be busy
        ([0, 0], 1, "cpu", 2),
    ],
)
def test_auto_lanes_end_together(sizes, devices, platform, lanes):
    found = lanes_module.choose_lanes(np.array(sizes), Passes(1, None, 8), devices, platform)
    assert found == lanes


def test_auto_lanes_of_convolutions_on_a_cpu():
    """Clients' own kernels under vmap are a grouped convolution; LoRA's factors and dense kernels are not."""
    few, many = (
        lanes_module.choose_lanes(np.full(16, 32), Passes(1, None, 16), 1, "cpu", convolutions=own)
        for own in (True, False)
    )
    assert (few, many) == (lane_count.CONVOLUTION_LANES, 4)
    assert lanes_module.own_convolutions({"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)})
    assert not lanes_module.own_convolutions({"lora_a": jnp.zeros((192, 4)), "head": jnp.zeros((192, 10))})


def test_keys_of_another_round_and_exchange_are_others():
    """Else augmentation would draw the same crops in all of them."""
    sent = []
    cohorts = run(counting, tiny_problem(), (COHORT, COHORT), sent=sent)[2]
    held = cohorts[0].engine
    again = Cohort(held, np.array(COHORT), 1, Memory(lambda key, held: jnp.zeros(()), held.held))
    for _ in range(2):
        again.exchange(sent[0].message, sent[0].local)
    first, second, same, exchange = (
        np.asarray(done.info.clients["key"]).tolist() for done in (*(c.done[0] for c in cohorts), *again.done)
    )
    assert same == first
    assert len({*first, *second, *exchange}) == 3 * len(COHORT)


@pytest.mark.slow
def test_keys_depend_on_round_and_client_only():
    problem = tiny_problem()
    a = run(counting, problem, lanes=1)[2][0].done[0].info.clients["key"]
    b = run(counting, problem, ((*COHORT[::-1], 3),), lanes=5, devices=None)[2][0].done[0].info.clients["key"]
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[:6][::-1])
    assert len(set(np.asarray(b).tolist())) == 7


def test_a_key_folds_in_purpose_and_numbers_one_after_the_other():
    root = jax.random.key(3)
    expected = jax.random.fold_in(root, zlib.crc32(b"reduce"))
    for number in (7, 2):
        expected = jax.random.fold_in(expected, number)
    for found in (key_for(root, "reduce", 7, 2), jax.jit(lambda n: key_for(root, "reduce", n, 2))(7)):
        np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))


def test_memory_of_new_and_old_clients():
    _, memory, _ = run(counting, tiny_problem(), ((0, 1, 2), (2, 3, 4), (2, 4, 0)))
    rows, ids = memory.state()
    assert dict(zip(ids.tolist(), rows.tolist(), strict=True)) == {0: 2.0, 1: 1.0, 2: 3.0, 3: 1.0, 4: 2.0}


def test_metrics_are_means_over_examples():
    problem = tiny_problem()
    _, _, cohorts = run(counting, problem, ((0, 3, 7),), task=tiny_task(passes=Passes(1, None, 4)))
    info = jax.device_get(cohorts[0].done[0].info)
    assert np.isnan(info.clients["loss"][1]), "a client without examples has no loss"
    expected = (SIZES[0] * info.clients["loss"][0] + SIZES[7] * info.clients["loss"][2]) / (SIZES[0] + SIZES[7])
    assert info.metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert info.metrics["visits"] == 1.0
    assert info.weight == SIZES[0] + SIZES[7]


def number(client):
    """The client's id as float32."""
    return client.id.astype(jnp.float32)


def exchange(local, message=(), reduce=None, cohort=COHORT, reports=None, **options):
    """One exchange of a bare `Local`."""
    lanes = engine(tiny_problem(), **options)
    reports = np.ones(len(cohort), bool) if reports is None else reports
    conditions = network.reliable(np.array(cohort))._replace(drops=~reports)
    made = Cohort(lanes, np.array(cohort), 1, Memory(lambda key, held: (), lanes.held), conditions)
    result, info = made.exchange(message, local, reduce)
    return result, jax.device_get(info), made


def replying(reply, passes=None):
    """A `Local` that trains nothing and replies with a function of the client."""
    return Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry + batch.mask.sum(), {}),
        lambda held, message, carry, client: (reply(message, carry, client), (), {}),
        passes or Passes(1, None, 4),
    )


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_an_empty_step_does_not_happen(lanes):
    """A client's carry moves once for each of its batches, also where a step would move it without an example."""
    local = Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry + 1.0, {}),
        lambda held, message, carry, client: (carry, (), {}),
        Passes(2, None, 4),
    )
    cohort = (*COHORT, 3)  # 3 has no example
    result, _, _ = exchange(local, reduce=stack(lambda client, reply: jnp.ones(())), cohort=cohort, lanes=lanes)
    assert result.replies.tolist() == [2 * -(-SIZES[id] // 4) for id in cohort]
    assert result.replies[-1] == 0 and result.weight.tolist() == [1.0] * len(cohort)


def test_non_finite_reply_is_left_out_and_counted():
    local = replying(lambda message, carry, client: jnp.where(client.id == 7, jnp.nan, number(client)))
    result, info, _ = exchange(local)
    kept = [id for id in COHORT if id != 7]
    weights = [SIZES[id] for id in kept]
    assert float(result) == pytest.approx(np.average(kept, weights=weights))
    assert (info.reported, info.nonfinite) == (len(COHORT) - 1, 1)


def test_dropped_client_returns_nothing_but_is_sent_the_message():
    reports = np.array([True, False, True, True, True, True])
    local = replying(lambda message, carry, client: number(client) + 0.0 * message)
    result, info, cohort = exchange(local, jnp.zeros(()), reports=reports)
    kept = [id for id, r in zip(COHORT, reports, strict=True) if r]
    assert float(result) == pytest.approx(np.average(kept, weights=[SIZES[i] for i in kept]))
    assert cohort.traffic() == ({"message": 4 * 6}, {"message": 4 * 5})
    assert info.reported == 5


def test_uniform_weights_count_clients_with_examples():
    local = replying(lambda message, carry, client: number(client))
    result, info, _ = exchange(local, reduce=mean(uniform), cohort=(0, 3, 7))
    assert float(result) == pytest.approx(3.5)
    assert info.weight == 2.0


@pytest.mark.slow
def test_nobody_with_examples_changes_nothing():
    """A round of total weight zero leaves the server as it was, its optimizer's momentum included."""
    task = tiny_task(server_optimizer=optax.adam(0.1))
    problem = tiny_problem()
    before, _, _ = run(ALGORITHMS["fed_avg"], problem, ((0, 1),), task=task)
    after, _, cohorts = run(ALGORITHMS["fed_avg"], problem, ((0, 1), (3,)), task=task)
    same(before, after, "the server")
    assert sum(cohorts[1].traffic()[0].values()) > 0, "the message was sent all the same"


def test_stack_keeps_the_cohorts_order():
    local = replying(lambda message, carry, client: {"id": number(client), "rows": carry})
    result, _, _ = exchange(local, reduce=stack(), devices=2, lanes=2)
    assert np.asarray(result.replies["id"]).tolist() == list(COHORT)
    assert np.asarray(result.replies["rows"]).tolist() == [SIZES[id] for id in COHORT]
    assert np.asarray(result.weight).tolist() == [SIZES[id] for id in COHORT]


def test_per_client_messages_reach_their_clients():
    ranks = jnp.arange(1, 7)
    message = {
        "all": jnp.ones((3,)),
        "own": wire.PerClient({"tag": jnp.asarray(COHORT, jnp.float32) * 10}),
        "factor": wire.PerClient(wire.kept(jnp.ones((6, 5, 8)), ranks, 1)),
    }
    local = replying(
        lambda m, carry, client: m["own"]["tag"] - 10.0 * number(client) + m["all"].sum() + 0 * m["factor"][0, 0]
    )
    result, _, cohort = exchange(local, message, stack(), devices=2, lanes=1)
    assert np.asarray(result.replies).tolist() == [3.0] * 6
    down, _ = cohort.traffic()
    assert down == {"all": 12 * 6, "own/tag": 4 * 6, "factor": 4 * 5 * int(ranks.sum())}


def test_a_broadcast_leaf_is_priced_by_client():
    """One value for all, of which each client pays its own part: no copy per client, exact sums."""
    message = {"w": wire.Packet(jnp.ones((3, 5)), jnp.arange(6, dtype=jnp.uint32) * 11), "b": jnp.zeros(2)}
    local = replying(lambda m, carry, client: m["w"].sum() + 0.0 * m["b"].sum())
    result, _, cohort = exchange(local, message, devices=2)
    assert float(result) == 15.0
    assert cohort.traffic()[0] == {"w": 11 * 15, "b": 8 * 6}
    with pytest.raises(ValueError, match=r"leading axis of per-client part 'w' to be 6"):
        exchange(local, {"w": wire.Packet(jnp.ones((3, 5)), jnp.ones(5, jnp.uint32)), "b": jnp.zeros(2)})


def test_cohort_knows_when_each_member_was_there_last():
    lanes = engine(tiny_problem())
    met = np.array([0, 0, 1, 0, 8, 0, 0, 3, 0, 0, 0, 0])
    cohort = Cohort(lanes, np.array([4, 0, 7]), 9, Memory(NOTHING, lanes.held), met=met)
    assert cohort.last.tolist() == [8, 0, 3]
    _, _, cohorts = run(ALGORITHMS["fed_avg"], tiny_problem(), ((0, 1), (1, 2), (0, 1)))
    assert [c.last.tolist() for c in cohorts] == [[0, 0], [1, 0], [1, 2]]


def test_packets_are_priced_by_client():
    local = replying(lambda message, carry, client: wire.kept({"a": jnp.ones((4, 7))}, client.id % 3, 1))
    _, _, cohort = exchange(local, devices=2)
    assert cohort.traffic()[1] == {"a": sum(4 * 4 * (id % 3) for id in COHORT)}


def test_two_exchanges_in_a_round_add_up():
    local = replying(lambda message, carry, client: jnp.ones((2,)))
    lanes = engine(tiny_problem())
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(lambda key, held: (), lanes.held))
    cohort.exchange({"w": jnp.zeros((5,))}, local)
    cohort.exchange((), local)
    assert cohort.traffic() == ({"w": 6 * 20}, {"message": 2 * 6 * 8})


def test_memory_of_the_program_does_not_grow_with_the_cohort():
    """The mean is a fold: four times the cohort needs the same temporaries, a few bytes per slot apart."""

    def temporaries(members):
        sizes = np.full(members, 4)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        problem = tiny_problem()._replace(
            x=np.zeros((members * 4, 6), np.float32),
            y=np.zeros(members * 4, np.int32),
            rows=np.arange(members * 4, dtype=np.int32),
            offsets=offsets,
        )
        lanes = engine(problem, lanes=4, segment_steps=4)
        width = 4096
        local = Local(
            lambda held, message, client, batch: message,
            lambda held, message, carry, batch: (carry + batch.mask.sum(), {}),
            lambda held, message, carry, client: (carry, (), {}),
            Passes(1, None, 4),
        )
        programs = lanes.programs(Request(local, MEAN, False, NOTHING, jnp.zeros(width)), members, sizes)
        used = programs.segment.memory_analysis()  # compiled ahead of its first call
        return used.temp_size_in_bytes + used.output_size_in_bytes

    small, large = temporaries(16), temporaries(64)
    assert large - small < 48 * 64, f"{large - small} bytes more for 48 more clients of 16 KiB each"


MEAN, NOTHING = mean(by_examples), lambda key, held: ()


def test_reduce_done_runs_once_with_args():
    calls = Reduce(
        zero=lambda reply, clients: jnp.zeros(reply.shape),
        add=lambda total, replies, weights, slots, args: (
            total + (weights[:, None] * replies).sum(0) if replies.ndim > 1 else total + weights @ replies
        ),
        done=lambda total, args, key: total / args,
        weight=uniform,
    )
    local = replying(lambda message, carry, client: number(client))
    lanes = engine(tiny_problem(), devices=4, lanes=1)
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(NOTHING, lanes.held))
    result, _ = cohort.exchange((), local, calls, args=jnp.float32(2.0))
    assert float(result) == sum(COHORT) / 2


def test_too_many_devices_is_refused():
    with pytest.raises(ValueError, match=rf"Expected devices=99 <= {jax.device_count()}"):
        engine(tiny_problem(), devices=99)
