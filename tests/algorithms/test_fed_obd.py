"""FedOBD by the letters of its oracles: FedAvg where nothing is left out, a NumPy loop, bytes as really packed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_obd import fed_obd, first_fit, layer, of_block, ratio
from fedsim.core import Passes
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_wide_task
from fedsim.testing.toys import COHORT, SIZES, one_client, run, tiny_problem
from fedsim.wire.codecs.quantisers import nnadq

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = (COHORT, (3, 11, 10, 6, 5, 8))
EVERYBODY = tuple(range(len(SIZES)))
START = tiny_wide_task().init(jax.random.key(5))
WIDE = tiny_wide_task(init=lambda key: START)  # three leaves, each a block: 24, 12 and 3 entries


def obd(**options):
    return lambda task: fed_obd(task, **{"stage1": 100, **options})


def numpy_nnadq(leaf, beta):
    """The spec's equations: what the receiver decodes, d / s, and the bits of a level without its sign."""
    v = np.asarray(leaf, np.float64)
    o = -(v.max() + v.min()) / 2
    d = np.abs(v + o).max()
    if d == 0:
        return v, 0.0, 0
    s = int(np.floor(max(1.0, np.sqrt(d * 32 * np.log(4) / beta))))
    return np.sign(v + o) * np.round(np.abs(v + o) / d * s) * d / s - o, d / s, s.bit_length()


def numpy_first_fit(change, by_block, lam):
    """Blocks by |change|_2 / entries, largest first; each that still fits into (1 - lam) P is kept."""
    sizes, squares = {}, {}
    for path, leaf in change.items():
        block = by_block[path]
        sizes[block] = sizes.get(block, 0) + leaf.size
        squares[block] = squares.get(block, 0.0) + float((np.asarray(leaf, np.float64) ** 2).sum())
    kept, used = set(), 0
    for block in sorted(sizes, key=lambda b: -np.sqrt(squares[b]) / sizes[b]):
        if used + sizes[block] <= (1 - lam) * sum(sizes.values()) + 1e-9:
            kept.add(block)
            used += sizes[block]
    return kept


def changes(task, ids, round, w):
    """What each client changes of w, trained alone."""
    sent = []
    run(fed_avg, PROBLEM, (ids,), task=task, sent=sent)
    return [wire.unmarked(one_client(PROBLEM, sent[0].local, w, (), id, round)[0]) for id in ids]


def test_a_nothing_left_out_and_no_codec_is_fed_avg_bit_for_bit():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=WIDE)
    found, _, _ = run(obd(lam=0.0, beta=None), PROBLEM, COHORTS, task=WIDE)
    same(plain.params, found.params, "lam = 0 without a codec")


@pytest.mark.slow
def test_b_a_fine_codec_is_fed_avg_up_to_its_steps():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=WIDE)
    found, _, _ = run(obd(lam=0.0, beta=1e-9), PROBLEM, COHORTS, task=WIDE)
    same(plain.params, found.params, "a small beta", rtol=1e-3)
    coarse, _, _ = run(obd(lam=0.0, beta=10.0), PROBLEM, COHORTS, task=WIDE)
    assert float(jnp.abs(coarse.params["kernel"] - plain.params["kernel"]).max()) > 0.01


@pytest.mark.slow
def test_c_everything_left_out_moves_nothing_and_sends_nothing_up():
    found, _, (cohort, _) = run(obd(lam=1.0), PROBLEM, COHORTS, task=WIDE)
    same(START, found.params, "lam = 1")
    assert sum(cohort.traffic()[1].values()) == 0


def test_d_the_second_stage_is_fed_avg_of_everybody_an_epoch_a_round():
    sgd = WIDE._replace(optimizer=optax.sgd, lr=lambda client, message: jnp.float32(0.1))
    plain, _, _ = run(fed_avg, PROBLEM, (EVERYBODY,) * 2, task=sgd._replace(passes=Passes(1, None, 4)))
    found, _, _ = run(obd(beta=None, stage1=0, stage2=2), PROBLEM, (EVERYBODY,) * 2, task=sgd)
    same(plain.params, found.params, "stage two")


@pytest.mark.slow
def test_e_without_block_dropout_qsgd_is_fed_paq():
    codec = wire.codec("qsgd(9, 0)")
    paq, _, _ = run(find("fed_paq"), PROBLEM, COHORTS, task=WIDE)
    found, _, _ = run(obd(lam=0.0, beta=None), PROBLEM, COHORTS, task=WIDE, up=codec)
    same(paq.params, found.params, "255 levels")


@pytest.mark.slow
def test_f_one_client_is_plain_training():
    found, _, _ = run(obd(lam=0.0, beta=None), PROBLEM, ((7,),), task=WIDE)
    (change,) = changes(WIDE, (7,), 1, START)
    same({p: START[p] + change[p] for p in START}, found.params, "one client", rtol=1e-6)


@pytest.mark.parametrize("reference", ["server", "broadcast"])
def test_a_round_is_its_numpy_loop(reference):
    """Clients start from what arrives, send the blocks that fit, and the divisor is everybody's weight."""
    beta, lam = 0.05, 0.4  # of 39 entries 23 fit: 12 and 3, but not 24
    found, _, (cohort,) = run(obd(lam=lam, beta=beta, reference=reference), PROBLEM, task=WIDE)
    arrives = {path: np.float32(numpy_nnadq(leaf, beta)[0]) for path, leaf in START.items()}
    total = {path: np.zeros(leaf.shape) for path, leaf in START.items()}
    by_block, up = of_block(sorted(START)), 0
    for id, change in zip(COHORT, changes(WIDE, COHORT, 1, arrives), strict=True):
        kept = numpy_first_fit(change, by_block, lam)
        up += 4 * len(kept)
        for path, leaf in change.items():
            if by_block[path] in kept:
                value, _, bits = numpy_nnadq(leaf, beta)
                total[path] += SIZES[id] * value
                up += -(-leaf.size * (bits + 1 if bits else 0) // 8) + 12
    weight, base = sum(SIZES[id] for id in COHORT), START if reference == "server" else arrives
    for path, leaf in base.items():
        np.testing.assert_allclose(found.params[path], leaf + total[path] / weight, atol=2e-6)
    down, claimed = cohort.traffic()
    assert sum(claimed.values()) == up
    bits = [(leaf.size, numpy_nnadq(leaf, beta)[2]) for leaf in START.values()]
    assert sum(down.values()) == len(COHORT) * sum(-(-n * (b + (b > 0)) // 8) + 12 for n, b in bits)
    paper = float(ratio(nnadq(beta), START))  # the sign, the scales and the padding left out
    np.testing.assert_allclose(paper, sum(n * b for n, b in bits) / 39 / 32, rtol=1e-6)


def test_first_fit_passes_over_what_does_not_fit():
    """The spec's case: of sizes 4, 3, 2, 1 the second and the fourth are kept, and 4 of 5 entries used."""
    sizes, importance = (4, 3, 2, 1), (0.1, 0.4, 0.2, 0.3)
    change = {str(i): jnp.full(n, m * n / np.sqrt(n)) for i, (n, m) in enumerate(zip(sizes, importance, strict=True))}
    by_block = {str(i): i for i in range(4)}
    assert first_fit(change, by_block, 0.5).tolist() == [False, True, False, True]
    assert first_fit(change, by_block, 0.0).all() and not first_fit(change, by_block, 1.0).any()


@pytest.mark.parametrize("lam", [0.1, 0.3, 0.5, 0.9])
def test_first_fit_is_its_loop_and_never_takes_more_than_its_share(lam):
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = {f"l/{i}/w": jnp.asarray(rng.normal(size=rng.integers(1, 9)), jnp.float32) for i in range(6)}
        by_block = of_block(sorted(change))
        sent = np.flatnonzero(first_fit(change, by_block, lam))
        assert set(sent) == numpy_first_fit(change, by_block, lam)
        used = sum(leaf.size for path, leaf in change.items() if by_block[path] in sent)
        assert used <= (1 - lam) * sum(leaf.size for leaf in change.values()) + 1e-9


def test_a_block_that_did_not_change_goes_last():
    change = {"a": jnp.zeros(3), "b": jnp.full(3, 1e-3)}
    assert first_fit(change, of_block(["a", "b"]), 0.5).tolist() == [False, True]


def test_a_share_is_the_number_that_is_written():
    """1 - 0.9 is a little less than a tenth in binary; a tenth of ten entries is one."""
    change = {"a": jnp.ones(1), "b": jnp.ones(9)}
    assert first_fit(change, {"a": 0, "b": 1}, 0.9).tolist() == [True, False]


def test_blocks_are_the_backbones_layers():
    paths = [
        "blocks/0/mlp/up/bias",
        "blocks/0/prompt",
        "blocks/10/a",
        "blocks/2/a",
        "head/bias",
        "head/kernel",
        "stem/k",
    ]
    found = of_block(paths)
    assert [layer(path) for path in paths[:3]] == ["blocks/0", "blocks/0", "blocks/10"]
    assert len(set(found.values())) == 5 and found["head/bias"] == found["head/kernel"]
    assert of_block(["a/x", "a/y", "b"], ("a/*", "b")) == {"a/x": 0, "a/y": 0, "b": 1}


@pytest.mark.slow
def test_a_client_that_diverged_is_left_out_though_its_broken_block_is_not_sent():
    """NaN in a block that does not fit: the reply is not finite all the same. One step, as a second one would spread it."""
    once = Passes(1, None, 64)

    def loss(held, params, batch):
        value, metrics = WIDE.loss(held, params, batch)
        return value + jnp.where(batch.mask.sum() == 1, jnp.nan, 0.0) * params["hidden"].sum(), metrics

    sent = []
    broken = WIDE._replace(loss=loss, passes=once)
    run(obd(lam=0.5, beta=None), PROBLEM, ((1, 7),), task=broken, sent=sent)
    reply, _ = one_client(PROBLEM, sent[0].local, START, (), 1, 1)  # one example
    assert all(np.isnan(leaf.leaf).all() for leaf in reply["change"].tree.values())
    found, _, _ = run(obd(lam=0.5, beta=None), PROBLEM, ((1, 7),), task=broken)
    alone, _, _ = run(obd(lam=0.5, beta=None), PROBLEM, ((7,),), task=WIDE._replace(passes=once))
    same(alone.params, found.params, "without the one that diverged", rtol=1e-6)


def test_the_stages_follow_one_another():
    """A drawn cohort, then everybody, then the end; the second stage begins early where nothing is gained."""
    from fedsim.core import Population

    algorithm, population, rng = fed_obd(WIDE, stage1=2, stage2=1), Population(12, 5), np.random.default_rng(0)
    server, cohorts = algorithm.init(jax.random.key(0), PROBLEM.held), []
    for rounds in range(4):
        now = server._replace(rounds=np.int32(rounds))
        cohorts.append(len(algorithm.select(rng, now, population)))
        assert algorithm.finished(now) == (rounds >= 3)
    assert cohorts == [5, 5, 12, 12]
    early = fed_obd(WIDE, stage1=9, stage2=1, patience=2)
    server = early.init(jax.random.key(0), PROBLEM.held)
    for rounds, accuracy in enumerate((0.5, 0.6, 0.6005, 0.6009), 1):
        server = early.observe(server._replace(rounds=np.int32(rounds)), {"accuracy": accuracy})
        assert int(server.turn) == (4 if rounds == 4 else 9)
    server = early.observe(server._replace(rounds=np.int32(5)), {"accuracy": 0.9})
    assert int(server.turn) == 4


@pytest.mark.slow
def test_a_kept_optimizer_goes_on_in_the_second_stage():
    """Two rounds of one client with an epoch each are one run of its optimizer over two epochs, but for the batches' order."""
    task = WIDE._replace(optimizer=lambda rate: optax.sgd(rate, momentum=0.9), passes=Passes(1, None, 64))
    task = task._replace(lr=lambda client, message: jnp.float32(0.3))
    make = lambda keep: obd(beta=None, stage1=0, stage2=2, keep_optimizer=keep)  # noqa: E731 - one expression, named
    kept, _, _ = run(make(True), PROBLEM, ((7,), (7,)), task=task)
    fresh, _, _ = run(make(False), PROBLEM, ((7,), (7,)), task=task)
    twice, _, _ = run(fed_avg, PROBLEM, ((7,),), task=task._replace(passes=Passes(2, None, 64)))
    same(twice.params, kept.params, "momentum that goes on", rtol=1e-5)
    assert float(jnp.abs(fresh.params["kernel"] - kept.params["kernel"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_obd(lam=1.5)", r"Expected 0 <= lam=1\.5 <= 1"),
        ("fed_obd(beta=0)", r"Expected 0 < beta=0"),
        ("fed_obd(stage1=-1)", r"Expected stage1=-1 >= 0"),
        ("fed_obd(stage1=0, stage2=0)", r"stage1=0 \+ stage2=0 > 0"),
        ("fed_obd(patience=0)", r"Expected patience=0 >= 1"),
        ("fed_obd(reference='client')", r"to be 'server' or 'broadcast'"),
        ("fed_obd(reference='broadcast', beta=None)", r"Expected a beta for reference='broadcast'"),
        ("fed_obd(blocks=('bias', 'k*', '*n*'))", r"once, but hidden in 1|once, but kernel in 2"),
        ("fed_obd(blocks=('bias',))", r"once, but hidden in 0, kernel in 0"),
        ("fed_obd(blocks=('*', 'nose'))", r"'nose' matches none"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(WIDE)


@pytest.mark.slow
def test_a_codec_of_the_runs_beside_its_own_is_refused():
    with pytest.raises(ValueError, match=r"codec_up='quantise\(8\)' acts on; it marks nothing"):
        _, _, (cohort,) = run(obd(), PROBLEM, task=WIDE, up=wire.codec("quantise(8)"))
        cohort.settle()
