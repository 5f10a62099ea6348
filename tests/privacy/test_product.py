"""The product of algorithm, PEFT kind, codec and mechanism: each works, or is refused by the option's name; none is ignored."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fedsim import peft, wire
from fedsim.algorithms import ALGORITHMS
from fedsim.config import Config, Speed
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.peft.kinds import KINDS
from fedsim.simulation import build, prices, trainers
from fedsim.simulation.build import Problem
from fedsim.simulation.simulate import exchange_round

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedsim-jax[privacy]'")
pytestmark = pytest.mark.usefixtures("compile_once")

CODECS = ("none", "quantise(8)", "topk(0.1)+quantise(4)", "powersgd(2)")
MECHANISMS = ("none", "central", "local", "example")
OWN_FOLD = ("flora", "het_lora", "flex_lora", "fed_ex_lora")
SENDS_VALUES = ("flora", "het_lora", "flex_lora")  # their factors are no changes
FACTORS = ("fed_it", "ffa_lora", "flora", "het_lora", "flex_lora", "fed_sa_lora", "fed_ex_lora")
ONE_CHANGE = ("fed_avg", "fed_prox", "fed_it", "ffa_lora")  # their reply is a change of all that is trained
OWN_CODEC = ("fed_obd", "fed_paq")
ALL_CLIENTS = ("scaffold", "fed_dyn")  # whose server keeps the mean over all clients
PERSONAL = (
    "local_only",
    "fed_rep",
    "ditto",
    "fed_res",
    "dfed_alt",
    "dfed_salt",
)  # clients answer by models of their own
PROTOTYPES = ("fed_pcl", "fed_proto")  # whose clients answer by what they have learnt, and train what the head reads
PEERS = ("dfed_alt", "dfed_salt")  # which send values
ATTACHED = ("norm", "adapter", "prompt", "prefix", "ia3")  # what a perceptron has no place for
LORA: dict[str, Any] = {"rank": 2}
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)
NOISE = 1000.0  # so much that nobody overlooks it
Case = tuple[str, str, str, str]


def kinds(algorithm: str) -> tuple[str, ...]:
    """Kinds that an algorithm meets: all, or four where leaves are leaves to it."""
    return tuple(KINDS) if algorithm in ("fed_avg", *FACTORS) else ("full", "head", "bias", "lora")


def every() -> list[Case]:
    return [case for a in ALGORITHMS for case in itertools.product((a,), kinds(a), CODECS, MECHANISMS)]


def why_not(algorithm: str, kind: str, codec: str, mechanism: str) -> tuple[str, ...]:
    """Words of the refusal that may be expected, one of them at least; none where the combination is to work."""
    if algorithm not in FACTORS:
        return related(algorithm, kind, codec, mechanism)
    if kind == "head":  # has no factors, so that all are FedAvg there
        return ()
    if kind != ("ffa_lora" if algorithm == "ffa_lora" else "lora"):
        return ("--peft",)
    found = []
    if algorithm in SENDS_VALUES and codec in CODECS[2:]:
        found.append(f"codec_up='{codec}' to get changes alone")
    if algorithm in OWN_FOLD and mechanism == "central":
        found.append("choose dp=none")
    if algorithm in OWN_FOLD and mechanism == "local":
        found += [f"codec_up='dp=local{'' if codec == 'none' else f'+{codec}'}' to get changes alone", "choose dp=none"]
    return tuple(found)


def related(algorithm: str, kind: str, codec: str, mechanism: str) -> tuple[str, ...]:
    """As above, of algorithms that take any leaves."""
    if algorithm == "fed_sp":  # which trains prompts, that a perceptron has no place for
        return ("give --task language_model --peft prefix",)
    found = []
    if algorithm in (*PERSONAL, *PROTOTYPES) and mechanism != "none":
        found.append(f"algorithm={algorithm!r} to answer by its server with dp={mechanism!r}")
    if algorithm in ("fed_rep", *PEERS) and kind == "head":
        found.append(f"to leave {algorithm} something to share")
    if algorithm in PROTOTYPES and kind == "head":
        found.append("Expected more than the head to be trained")
    if algorithm in (*PEERS, *PROTOTYPES, "fed_dm") and codec in CODECS[2:]:
        found.append(f"codec_up='{codec}' to get changes alone")
    if algorithm == "fed_dm" and mechanism == "local":
        found.append(f"codec_up='dp=local{'' if codec == 'none' else f'+{codec}'}' to get changes alone")
    if algorithm == "fed_dm" and mechanism == "central":
        found.append("brings the fold stack; choose dp=none")
    if algorithm == "fed_et":
        return ("Expected groups=() of algorithm='fed_et'",)  # whatever else there is
    if algorithm == "fed_df" and mechanism in ("central", "local"):
        found.append("brings the fold stack; choose dp=none")
    if algorithm in OWN_CODEC and mechanism == "local":
        found.append("no codec of the algorithm's own")
    if algorithm == "fed_obd" and mechanism == "central":
        found.append("not to select clients by itself with dp='central'")
    if algorithm == "fed_dropout_avg" and mechanism in ("central", "local"):
        found.append("brings the fold mean_of_sent; choose dp=none")
    if algorithm == "fed_kseed" and mechanism in (
        "central",
        "local",
    ):  # of pairs; `sends="sums"` leaves the fold to the run
        found.append("brings the fold of_pairs; choose dp=none")
    if algorithm in ("superior_soups", "fed_dm", "fed_kseed") and mechanism == "example":
        found.append("reads them more often than is accounted")
    return tuple(found)


def covering() -> list[Case]:
    """All algorithms with their kinds, and all codecs with all mechanisms, so that any two values of different axes meet."""
    numbers = [(i, a, j, k) for i, a in enumerate(ALGORITHMS) for j, k in enumerate(kinds(a))]
    found = [(a, k, CODECS[(i + j) % 4], MECHANISMS[(3 * i + j + j // 4) % 4]) for i, a, j, k in numbers]
    met = set(found)
    for a in ALGORITHMS:  # an algorithm of few kinds does not meet all codecs and mechanisms with them
        for m in MECHANISMS:
            if not any(case[0] == a and case[3] == m for case in met):
                found.append((a, "bias", "none", m))
        for c in CODECS:
            if not any(case[0] == a and case[2] == c for case in met):
                found.append((a, "bias", c, "none"))
    return found + [("fed_avg", "bias", codec, mechanism) for codec, mechanism in itertools.product(CODECS, MECHANISMS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Path:
    """Two sets: rows of six numbers, and images of 16 x 16."""
    found = tmp_path_factory.mktemp("data")
    blobs(found)
    rng = np.random.default_rng(0)
    np.savez(found / "images.npz", x=rng.integers(0, 255, (64, 16, 16, 3)).astype(np.uint8), y=np.arange(64) % 3)
    return found


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    """Data and models that have been made, by backbone and kind."""
    return {}


def config_of(folder: Path, case: Case) -> Config:
    """The smallest run of a combination."""
    algorithm, kind, codec, mechanism = case
    small = (
        {"backbone": "vit_tiny", "weights": "random", "image_size": 16, "dataset": str(folder / "images.npz")}
        if kind in ATTACHED
        else {"backbone": "mlp", "dataset": str(folder / "blobs.npz")}
    )
    own = {"targets": ("layers/*",), **LORA} if kind in ("lora", "ffa_lora") else {}
    weighting = "uniform" if algorithm in ALL_CLIENTS and mechanism == "none" else "examples"
    private = {"noise_multiplier": NOISE, "delta": 1e-2, "accountant": "rdp"} if mechanism != "none" else {}
    if algorithm in PROTOTYPES:
        small["local_test"] = 0.2
    return Config(
        algorithm=algorithm, peft=kind, codec_up=codec, dp=mechanism, weighting=weighting, clients=8, clients_per_round=4, rounds=3,
        optimizer="sgd", lr=1e-3, min_size=1, **small, **own, **private,
    )  # fmt: skip


def problem_of(config: Config, kept: dict[str, Any]) -> Problem:
    if config.backbone not in kept:
        kept[config.backbone] = build.problem(config, SPEED)
    return kept[config.backbone]._replace(config=config)


def model_of(config: Config, problem: Problem, kept: dict[str, Any]) -> peft.Model:
    name = f"{config.backbone} {config.peft}"
    if name not in kept:
        kept[name] = build.split_model(config, problem.dataset, SPEED)
    return kept[name]


def packed(model: peft.Model, codec: str) -> int:
    """Bytes of a change of all that is trained, really packed."""
    return _packed(tuple(sorted((name, tuple(leaf.shape)) for name, leaf in model.trained.items())), codec)


@functools.cache
def _packed(shapes: tuple[tuple[str, tuple[int, ...]], ...], codec: str) -> int:
    key, made = jax.random.key(0), wire.codec(codec)
    change = {name: wire.Sent(jax.random.normal(key, shape)) for name, shape in shapes}
    if made is None:
        return len(wire.pack(change, None))
    state = made.init(key, {name: sent.value for name, sent in change.items()})
    return len(wire.pack(jax.jit(lambda sent: made.encode(sent, key, key, state)[0])(change), made))


def alike(nbytes: float, model: peft.Model, case: Case) -> None:
    """Bytes of a client are those of a packed change; how many entries of a leaf top-k takes, and so its last byte and whether it has
    a scale of 8, follows from values."""
    assert abs(nbytes - packed(model, case[2])) <= 9 * len(model.trained) * ("topk" in case[2]), case


def refusal(do: Callable[[], Any]) -> str:
    """What a combination is refused with; empty where it is not."""
    try:
        do()
    except ValueError as error:
        return str(error)
    return ""


def traced(case: Case, folder: Path, kept: dict[str, Any]) -> None:
    """A round of a combination without numbers; its bytes are packed ones where all that is trained is one change."""
    config = config_of(folder, case)
    build.check(config)
    problem = problem_of(config, kept)
    model, x = model_of(config, problem, kept), problem.dataset.x
    found = prices.of_phase(build.phases(config)[0], model, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    if case[0] in ONE_CHANGE:
        assert found.up.least == found.up.most
        alike(found.up.mean, model, case)


def checked(case: Case, do: Callable[[], Any]) -> None:
    """It works, or is refused for a reason that is known and named."""
    expected, said = why_not(*case), refusal(do)
    assert bool(said) == bool(expected), (case, said)
    assert not expected or any(words in said for words in expected), (case, said)


def test_pairs_are_covered() -> None:
    for one, other in itertools.combinations(range(4), 2):
        wanted = {(case[one], case[other]) for case in every()}
        assert {(case[one], case[other]) for case in covering()} == wanted, (one, other)


@pytest.mark.slow
def test_any_two_together(folder: Path, problems: dict[str, Any]) -> None:
    """Any two of algorithm, kind, codec and mechanism meet: traced with the right bytes, or refused by name."""
    for case in covering():
        checked(case, lambda case=case: traced(case, folder, problems))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_together(algorithm: str, folder: Path, problems: dict[str, Any]) -> None:
    """All codecs with all mechanisms, traced: of every kind under FedAvg, of LoRA under the others, whose leaves are leaves."""
    for case in every():
        if case[0] == algorithm and (algorithm == "fed_avg" or case[1] in ("lora", "ffa_lora")):
            checked(case, lambda case=case: traced(case, folder, problems))


def one_round(case: Case, folder: Path, kept: dict[str, Any]) -> tuple[float, float]:
    """A round with numbers: how far the parameters went, and bytes of a client up."""
    config = config_of(folder, case)
    build.check(config)
    trainer = trainers.trainer(problem_of(config, kept), build.phases(config)[0])
    engine, algorithm = trainer.engine, trainer.algorithm
    server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
    before = {name: np.asarray(leaf) for name, leaf in algorithm.params(server).items()}
    cohort = Cohort(
        engine, np.arange(4), 1, Memory(algorithm.memory, engine.held), lr=trainer.lr(1), average=trainer.average,
        averaging=engine.put(trainer.average.init()), releases=algorithm.releases,
    )  # fmt: skip
    server, _, _ = exchange_round(key_for(engine.root, "server", 1), trainer, server, cohort)
    after = {name: np.asarray(leaf) for name, leaf in algorithm.params(server).items()}
    assert all(np.isfinite(leaf).all() for leaf in after.values()), case
    moved = float(np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in after)))
    return moved, sum(cohort.traffic()[1].values()) / 4


# Each mechanism in every run of the tests; the others in the slow ones.
REAL: list[Case] = [
    ("fed_avg", "bias", "quantise(8)", "central"),
    ("fed_prox", "bias", "topk(0.1)+quantise(4)", "local"),
    ("ffa_lora", "ffa_lora", "powersgd(2)", "example"),
]
MORE: list[Case] = [
    ("fed_sa_lora", "lora", "none", "central"),
    ("fed_avg", "adapter", "topk(0.1)+quantise(4)", "central"),
    ("fed_avg", "prefix", "powersgd(2)", "local"),
    ("fed_avg", "last_k", "quantise(8)", "example"),
    ("fed_avg", "ia3", "none", "local"),
    ("fed_avg", "prompt", "powersgd(2)", "central"),
    ("fed_prox", "norm", "topk(0.1)+quantise(4)", "example"),
    ("fed_prox", "full", "quantise(8)", "local"),
    ("fed_it", "lora", "topk(0.1)+quantise(4)", "example"),
    ("fed_it", "head", "none", "example"),
    ("flora", "lora", "quantise(8)", "example"),
    ("het_lora", "lora", "none", "example"),
    ("flex_lora", "lora", "quantise(8)", "example"),
    ("fed_ex_lora", "lora", "powersgd(2)", "example"),
]


@pytest.mark.parametrize(
    "case", [REAL[0], *(pytest.param(c, marks=pytest.mark.slow) for c in REAL[1:] + MORE)], ids=" ".join
)
def test_nothing_is_ignored(case: Case, folder: Path, problems: dict[str, Any]) -> None:
    """Steps of 1e-3 alone move parameters by less than 0.1, noise a thousand times the norm by more; the bytes are packed ones."""
    moved, nbytes = one_round(case, folder, problems)
    config = config_of(folder, case)
    if case[0] in ONE_CHANGE:
        model = model_of(config, problem_of(config, problems), problems)
        alike(nbytes, model, case)
        if case[3] == "central":  # sum of squares of so many normal numbers, whose relative error is sqrt(2 / number)
            count = sum(leaf.size for leaf in model.trained.values())
            assert moved == pytest.approx(NOISE / 4 * np.sqrt(count), rel=4 / np.sqrt(2 * count))
    assert moved > 0.1
    quiet, uncoded = one_round((*case[:2], "none", "none"), folder, problems)
    assert quiet < 0.1 or case[0] == "flex_lora"  # which turns the factors, whose product stays
    assert (nbytes < uncoded) == (case[2] != "none")
