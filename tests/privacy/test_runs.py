"""Whole runs under privacy: what they spend, when they stop, what their record says, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import algorithms, core, record
from fedsim.cli import main as cli
from fedsim.config import Config, Speed
from fedsim.privacy import accounting
from fedsim.record import Run
from fedsim.report import tables
from fedsim.simulation import build, private
from fedsim.testing.tasks import tiny_task

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedsim-jax[privacy]'")
pytestmark = pytest.mark.usefixtures("compile_once")

LORA: dict[str, Any] = {"peft": "lora", "rank": 2, "targets": ("layers/*",)}
SPEED = Speed(devices=1, lanes=2, compilation_cache=False, checkpoint_every=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    """A task of a second with central privacy, accounted by RDP, which is quick."""
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"))), backbone="mlp", peft="full", clients=8,
        clients_per_round=4, rounds=3, optimizer="sgd", lr=0.05, min_size=3, dp="central", noise_multiplier=0.5,
        delta=1e-2, clip_norm=0.5, accountant="rdp",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """`run(config)` in a fresh folder."""
    count = itertools.count()
    return lambda config, speed=SPEED, **more: fedsim.run(
        config, speed, out=tmp_path / f"run-{next(count)}", quiet=True, **more
    )


def spent(run: Run) -> list[float]:
    return [line["privacy"]["epsilon"] for line in run.rounds]


def test_each_line_has_the_spent_epsilon(config: Config, run: Callable[..., Run]) -> None:
    """With all that it is of; the closing lines too, and both accountants at the end."""
    done = run(config)
    under = private.terms(config)
    assert spent(done) == pytest.approx([accounting.epsilon(under, 0.5, rounds) for rounds in (1, 2, 3)])
    line, summary = done.rounds[-1]["privacy"], done.summary["privacy"]
    for found in (line, summary):
        assert (found["unit"], found["relation"], found["accountant"]) == ("client", "add_or_remove_one", "rdp")
        assert (found["sampling"], found["delta"], found["noise_multiplier"]) == ("poisson", 1e-2, 0.5)
    assert summary["epsilon"] == summary["epsilon_rdp"] == line["epsilon"] > summary["epsilon_pld"] > 0
    said = " ".join(tables.said_of(done.summary, is_full=True, without=()))
    for word in (
        "epsilon",
        "delta 0.01",
        "RDP",
        "PLD",
        "one client",
        "add or remove one",
        "poisson",
        "Simulated noise",
    ):
        assert word in said
    assert done.table()["privacy_epsilon"].tolist() == spent(done)


def test_the_noise_is_calibrated_for_all_rounds(config: Config, run: Callable[..., Run]) -> None:
    done = run(config.replace(noise_multiplier=None, epsilon=3.0))
    assert 2.99 < spent(done)[-1] <= 3.0 and done.summary["stopped"] == "rounds"
    assert done.rounds[0]["privacy"]["noise_multiplier"] > 0.5


@pytest.mark.slow
def test_a_run_stops_before_it_overspends(config: Config, run: Callable[..., Run]) -> None:
    """Two rounds fit; the third would not."""
    two, three = (accounting.epsilon(private.terms(config), 0.5, rounds) for rounds in (2, 3))
    done = run(config.replace(epsilon=(two + three) / 2))
    assert done.summary["stopped"] == "epsilon" and len(done.rounds) == 2
    assert spent(done)[-1] == pytest.approx(two) and done.rounds[-1]["validation"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_resume_neither_spends_again_nor_forgets(
    config: Config, run: Callable[..., Run], tmp_path: Path, quantile: float | None
) -> None:
    """Cut back to round 1 and gone on with: the same clients, noise, norms, epsilons, bits."""
    whole = run(config.replace(clip_quantile=quantile))
    cut = tmp_path / "cut"
    shutil.copytree(whole.directory, cut)
    (cut / "summary.json").unlink()
    for later in (2, 3):
        shutil.rmtree(cut / "checkpoints" / str(later))
    again = fedsim.run(resume=cut, quiet=True)
    assert [line["privacy"] for line in again.rounds] == [line["privacy"] for line in whole.rounds]
    norms = {line["privacy"].get("next_clip_norm") for line in whole.rounds}
    assert norms == {None} if quantile is None else len(norms) == 3
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)


@pytest.mark.slow
def test_all_phases_are_accounted(config: Config, run: Callable[..., Run]) -> None:
    """The head's rounds count, and its noise is that of the whole run's rounds."""
    both = run(config.replace(head_rounds=1, peft="bias"))
    assert [line["phase"] for line in both.rounds] == ["head", "peft", "peft"]
    assert spent(both) == pytest.approx(
        [accounting.epsilon(private.terms(config), 0.5, rounds) for rounds in (1, 2, 3)]
    )
    assert len({line["privacy"]["noise_multiplier"] for line in both.rounds}) == 1


@pytest.mark.slow
def test_an_empty_round_adds_noise_and_spends(config: Config, run: Callable[..., Run]) -> None:
    """One of eight on average: some rounds have nobody, and move the server all the same."""
    alone = config.replace(clients_per_round=1, rounds=6, seed=1)
    done = run(alone)
    empty = [line["round"] for line in done.rounds if line["reported"] == 0]
    assert empty, [line["reported"] for line in done.rounds]
    losses = [done.summary["start"]["validation"]["loss"], *(line["validation"]["loss"] for line in done.rounds)]
    for round in empty:
        assert losses[round] != losses[round - 1]
        assert done.rounds[round - 1]["bytes_up"] == 0
    assert all(a < b for a, b in itertools.pairwise(spent(done)))


@pytest.mark.slow
def test_cohorts_are_poisson_samples(config: Config, run: Callable[..., Run]) -> None:
    done = run(config.replace(rounds=8, eval_every=8))
    assert len({line["clients"] for line in done.rounds}) > 1
    fixed = run(config.replace(sampling="fixed", accountant="rdp", rounds=2))
    assert {line["clients"] for line in fixed.rounds} == {4}
    assert fixed.rounds[0]["privacy"]["relation"] == "replace_one"


@pytest.mark.slow
def test_a_larger_cohort_than_compiled_loses_nobody(
    config: Config, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With places for two, four of eight on average: whoever was drawn reports, and the run says so."""
    many = config.replace(rounds=4, eval_every=4)
    usual = run(many)
    monkeypatch.setattr(core, "places", lambda size, chance: 2)
    monkeypatch.setattr(private, "places", lambda size, chance: 2)
    done = run(many)
    drawn = [line["clients"] for line in usual.rounds]
    assert [line["clients"] for line in done.rounds] == [line["reported"] for line in done.rounds] == drawn
    for name, value in usual.parameters.items():
        np.testing.assert_allclose(done.parameters[name], value, rtol=1e-4, atol=1e-5)
    found = private.spending(many)
    assert found is not None
    assert "round 2: more clients were drawn than the 2 places" in private.unusual(found, many, 2, 6)[0]
    assert not private.unusual(found, many, 2, 2)


@pytest.mark.slow
def test_every_client_counts_alike(config: Config, run: Callable[..., Run]) -> None:
    """A weight by examples would tell how many there are: under dp the option changes nothing."""
    one, other = run(config), run(config.replace(weighting="uniform"))
    for name, value in one.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], value)


@pytest.mark.slow
def test_no_use_of_unclipped_values(config: Config, run: Callable[..., Run]) -> None:
    """A step ten times as long is cut to the same change: whatever is called private is the same."""
    short = config.replace(steps=1, batch_size=64, lr=5.0, clip_norm=1e-3, noise_multiplier=0.1)
    one, ten = run(short), run(short.replace(lr=50.0))
    for a, b in zip(one.rounds, ten.rounds, strict=True):
        for name in private.PRIVATE:
            if name == "validation":
                assert b[name] == pytest.approx(a[name], rel=1e-4)
            elif name in a:
                assert b[name] == a[name], name
    for name, value in one.parameters.items():
        np.testing.assert_allclose(ten.parameters[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_is_logged_is_listed(config: Config, run: Callable[..., Run]) -> None:
    """Every field of a line is said to be private or not, and the summary names those that are not."""
    done = run(config.replace(rounds=1))
    fields = set(json.loads((done.directory / record.ROUNDS).read_text().splitlines()[0])) - {"schema", "checksum"}
    assert fields <= {*private.PRIVATE, *private.NOT_PRIVATE}, fields - {*private.PRIVATE, *private.NOT_PRIVATE}
    assert not {*private.PRIVATE} & {*private.NOT_PRIVATE}
    assert {"loss", "clients", "bytes_up", "seconds", "clients.json"} <= {*done.summary["privacy"]["not_private"]}


@pytest.mark.slow
def test_phases_and_runs_share_programs_not_noise(config: Config, run: Callable[..., Run]) -> None:
    """A shared problem keeps trainers for runs that differ in the cohort: each has its own noise and denominator."""
    problem = build.problem(config, SPEED)._replace(trainers={})
    calibrated = config.replace(noise_multiplier=None, epsilon=3.0)
    for few in (calibrated, calibrated.replace(clients_per_round=2), calibrated.replace(rounds=2)):
        alone, shared = run(few), run(few, problem=problem)
        assert spent(alone) == spent(shared)
        for name, value in alone.parameters.items():
            np.testing.assert_array_equal(shared.parameters[name], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "unit", "relation", "times"),
    [
        ({"dp": "local", "noise_multiplier": 0.02}, "client", "replace_one", 1),
        ({"dp": "local", "noise_multiplier": 0.02, "codec_up": "topk(0.1)+quantise(8)"}, "client", "replace_one", 1),
        ({"dp": "example", "epochs": 2}, "example", "zero_out", 2),
        (LORA | {"dp": "example", "epochs": 2, "algorithm": "flora"}, "example", "zero_out", 2),
    ],
)  # fmt: skip
def test_other_mechanisms(
    config: Config, run: Callable[..., Run], options: dict[str, Any], unit: str, relation: str, times: int
) -> None:
    """They run to the end, and account every round as if everybody were in it."""
    chosen = config.replace(clip_norm=0.1, **options)
    done = run(chosen)
    privacy = done.summary["privacy"]
    assert (privacy["unit"], privacy["relation"], privacy["sampling"]) == (unit, relation, "none")
    sure = accounting.terms(
        chosen.dp, clients=8, per_round=8, delta=1e-2, relation=relation, accountant="rdp", releases=times
    )
    assert spent(done)[-1] == pytest.approx(accounting.epsilon(sure, chosen.noise_multiplier or 0, 3))
    assert {line["clients"] for line in done.rounds} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("dp", ["central", "local", "example"])
def test_the_command_runs_to_its_table(
    dp: str, tmp_path: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without comparisons, whose options may not fit; the first words are of delta and epsilon, the last of what was spent.

    Before the first round, and in a dry run, which trains nothing.
    """
    text = f"--dataset {blobs(tmp_path)} --backbone mlp --peft full --clients 8 --clients-per-round 4 --rounds 2 --min-size 3 "
    text += (
        f"--dp {dp} --noise-multiplier 2 --delta 0.2 --accountant rdp --devices 1 --lanes 2 --out {tmp_path / 'run'}"
    )
    assert cli.main(["run", *text.split(), "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert f"dp={dp}: noise multiplier 2.0000, epsilon " in dry and "delta=0.2 is not below 1/N" in dry
    assert cli.main(["run", *text.split()]) == 0
    said = capsys.readouterr()
    doubt, promise, first = (
        (said.out + said.err).index(words)
        for words in ("delta=0.2 is not below 1/N", "noise multiplier 2.0000", "round 1")
    )
    assert doubt < promise < first, said
    assert f"Privacy, dp={dp}: epsilon " in said.out and not (tmp_path / "run" / "baselines").exists()
    assert cli.main(["run", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_other_noise_makes_other_programs(config: Config, run: Callable[..., Run]) -> None:
    """Calibrated noise of local privacy follows from the rounds, and is in the programs: a shared problem keeps them apart."""
    local = config.replace(dp="local", noise_multiplier=None, epsilon=50.0, clip_norm=0.1)
    problem = build.problem(local, SPEED)._replace(trainers={})
    run(local, problem=problem)
    fewer = local.replace(rounds=1)
    alone, shared = run(fewer), run(fewer, problem=problem)
    for name, value in alone.parameters.items():
        np.testing.assert_array_equal(shared.parameters[name], value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delta": None}, "0 < delta=None < 1 with dp='central'"),
        ({"delta": 1.0}, "0 < delta=1.0 < 1"),
        ({"noise_multiplier": None}, "Expected epsilon or noise_multiplier with dp='central'"),
        ({"noise_multiplier": 0.0}, "Expected noise_multiplier=0.0 > 0"),
        ({"clip_norm": 0.0}, "Expected clip_norm=0.0 > 0"),
        ({"epsilon": 0.0}, "Expected epsilon=0.0 > 0"),
        ({"over_selection": 1.5}, "over_selection=1.5 to be 1 with dp='central'"),
        ({"sampling": "fixed", "availability": "bernoulli(p=0.5)"}, "availability='bernoulli.p=0.5.' to be always"),
        ({"sampling": "fixed", "accountant": "pld"}, "relation=replace_one with accountant=rdp"),
        ({"sampling": "fixed", "relation": "add_or_remove_one"}, "nearest that it does"),
        ({"clip_quantile": 1.0}, "0 < clip_quantile=1.0 < 1"),
        ({"clip_quantile": 0.5, "dp": "local"}, "clip_quantile=0.5 with dp='central'"),
        ({"groups": ("a(share=1.0)",)}, "groups=.* to be empty with dp='central'"),
        ({"dp": "example", "steps": 3}, "steps=3 to be None with dp='example'"),
        ({"dp": "local", "relation": "add_or_remove_one"}, "another dp than local"),
        ({"dp": "local", "per_layer": True}, "per_layer=True with dp='central'"),
        ({"dp": "example", "sampling": "fixed"}, "sampling='fixed' with dp='central'"),
        ({"epsilon": 0.01}, "epsilon=0.01 to be enough for one round, which costs"),
    ],
)
def test_what_cannot_be_accounted_is_refused(config: Config, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build.check(config.replace(**options))


def test_a_deadline_that_others_shorten_is_refused(config: Config) -> None:
    """Of one exchange a client's own time decides; of the second what the others left."""
    timed = config.replace(deadline=5.0, compute="10")
    once = core.Algorithm(*[lambda *args: None] * 3)
    assert private.guarded(timed, once).select is not core.draw
    with pytest.raises(ValueError, match=r"deadline=5\.0 to be None with dp='central'"):
        private.guarded(timed, once._replace(releases=2))


def test_clients_that_take_more_gradients_than_are_accounted_are_refused_by_example(config: Config) -> None:
    """Several models one after the other; changes of clients are bounded all the same."""
    more = core.Algorithm(*[lambda *args: None] * 3)._replace(plain_steps=False)
    with pytest.raises(ValueError, match="more often than is accounted"):
        private.guarded(config.replace(dp="example"), more)
    assert private.guarded(config, more).select is not core.draw
    for text, plain in (("superior_soups", False), ("fed_ptr", True), ("fed_ptr(where='client', init='batch')", False)):
        assert algorithms.find(text)(tiny_task()).plain_steps == plain


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("chooses", "not to select clients by itself with dp='central'"),
        ("asks", "to answer by its server with dp='central'"),
        ("folds", "Expected average='private mean' to fold all replies"),
        ("sends", "is not marked by wire.coded"),
        ("twice", "to fold 1 exchanges a round"),
    ],
)
def test_algorithms_that_leak_are_refused(
    config: Config, run: Callable[..., Run], tmp_path: Path, algorithm: str, said: str
) -> None:
    (tmp_path / "leaks.py").write_text(LEAKS)
    with pytest.raises(ValueError, match=said):
        run(config.replace(algorithm=f"{tmp_path / 'leaks.py'}:{algorithm}", local_test=0.2))


@pytest.mark.slow
def test_training_twice_a_round_is_refused_by_example(config: Config, run: Callable[..., Run], tmp_path: Path) -> None:
    """The account counts one exchange over the run's epochs; more would be spent without a word. No round is recorded."""
    (tmp_path / "leaks.py").write_text(LEAKS)
    private_ = config.replace(dp="example", steps=None, epochs=1)
    for algorithm, said in (("twice", "not in 2 exchanges"), ("longer", "not in 2 epochs")):
        with pytest.raises(ValueError, match=said):
            run(private_.replace(algorithm=f"{tmp_path / 'leaks.py'}:{algorithm}"))
    assert run(private_).summary["privacy"]["dp"] == "example"


LEAKS = '''
"""FedAvg with one thing that privacy forbids."""

import jax

from fedsim.algorithms.fed_avg import fed_avg
from fedsim.core import Task, poisson
from fedsim.folds import stack
from fedsim.training.local import fit


def chooses(task: Task):
    return fed_avg(task)._replace(select=poisson(0.5))


def asks(task: Task):
    return fed_avg(task)._replace(answers="client")


def exchanging(task: Task, local, *more, times=1):
    plain = fed_avg(task)

    def round(key, held, server, cohort):
        for _ in range(times):
            _, info = cohort.exchange(server.params, local, *more)
        return server, info.metrics

    return plain._replace(round=round)


def folds(task: Task):
    return exchanging(task, fit(task.loss, task.optimizer, task.lr, task.passes), stack())


def sends(task: Task):
    whole = lambda carry, message, client: (carry.params, client.memory)
    return exchanging(task, fit(task.loss, task.optimizer, task.lr, task.passes, reply=whole))


def twice(task: Task):
    return exchanging(task, fit(task.loss, task.optimizer, task.lr, task.passes), times=2)


def longer(task: Task):
    return exchanging(task, fit(task.loss, task.optimizer, task.lr, task.passes._replace(epochs=2)))
'''
