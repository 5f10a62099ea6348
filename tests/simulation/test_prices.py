"""What an algorithm's round costs by shapes, against the bytes of the same round, run; leaf by leaf, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedsim
import serves
from brief import brief
from fedsim import algorithms, wire
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.config import Config, Speed
from fedsim.core import Algorithm, Client, Task
from fedsim.engine.pricing import Sends, Setting, Unknown, sends
from fedsim.folds import plain, uniform
from fedsim.simulation import build, prices
from fedsim.testing.tasks import suited, tiny_lora_task, tiny_task
from fedsim.testing.toys import COHORT, SIZES, run, tiny_problem
from fedsim.training.local import fit

ROOT = Path(__file__).parents[2]
EVERYBODY = tuple(range(len(SIZES)))
Make = Callable[[Task], Algorithm]


def named(text: str) -> Make:
    return algorithms.find(text.replace("FILE", str(ROOT)))


def priced(make: Make, task: Task, ids: tuple[int, ...] = COHORT, **options: Any) -> Sends:
    """The second round of the tiny task's clients, by shapes."""
    problem, key = tiny_problem(), jax.eval_shape(jax.random.key, 0)
    held = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, problem.held))
    example = jax.ShapeDtypeStruct(problem.x.shape[1:], problem.x.dtype)
    setting = Setting(
        ids=np.array(ids), sizes=np.array(SIZES)[list(ids)], population=len(SIZES),
        batch=prices.batch_of(example, task.passes.batch_size), average=plain(task.weight),
        **{"up": None, "down": None, "seed": 0, **options},
    )  # fmt: skip

    def rounds(given: Unknown) -> Any:
        return prices.second_round(given, make(task._replace(init=lambda key: given.start)), {"": setting}, 1)

    number = jax.ShapeDtypeStruct((), jnp.float32)
    return sends(rounds, Unknown(held, jax.eval_shape(task.init, key), key, number))


def real(
    make: Make, task: Task, ids: tuple[int, ...] = COHORT, **options: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes (down, up) by leaf of the second round that the same clients are in."""
    return run(make, tiny_problem(), (ids, ids), task=task, **options)[2][1].traffic()


def same(found: Sends, sent: tuple[dict[str, int], dict[str, int]]) -> None:
    down, up = ({name: int(each.sum()) for name, each in way.items()} for way in (found.down, found.up))
    assert (down, up) == sent
    assert (found.total_down.sum(), found.total_up.sum()) == tuple(sum(way.values()) for way in sent)


@pytest.mark.parametrize(
    "algorithm",
    brief(
        [
            "fed_avg",
            "flora(ranks=[1, 2])",
            "fed_sa_lora",
            "scaffold",
            "local_only",
            "ditto",
            "fed_res",
            "fed_prox(mu=0.5)",
            "fed_it",
            "flora",
            "het_lora(ranks=[1, 2])",
            "flex_lora(ranks=[2, 1, 1])",
            "fed_ex_lora",
            "fed_dyn",
            "fed_rep",
            "fed_res(scheme='avg_ii')",
            "fed_res(scheme='naive')",
        ],
        7,
    ),
)
def test_a_round_costs_what_it_sends(algorithm: str) -> None:
    make = named(algorithm)
    task = suited(make)
    found = priced(make, task)
    assert found.bounded == {"down": [], "up": []} and not found.guessed
    same(found, real(make, task))


def test_scaffold_sends_twice_what_fed_avg_sends_both_ways() -> None:
    once, twice = priced(fed_avg, tiny_task()), priced(named("scaffold"), tiny_task(weight=uniform))
    assert twice.total_up.tolist() == (2 * once.total_up).tolist() == [2 * 84] * len(COHORT)
    assert twice.total_down.tolist() == twice.total_up.tolist()


def test_clients_of_different_ranks_have_prices_of_their_own() -> None:
    found = priced(named("het_lora(ranks=[1, 2])"), tiny_lora_task())
    ranks = np.array([1, 2])[np.array(COHORT) % 2]
    assert found.total_up.tolist() == found.total_down.tolist() == (84 + 4 * 12 * ranks).tolist()


@pytest.mark.parametrize("graph", ["ring", "full", "exponential"])
def test_gossip_costs_every_transmission(graph: str) -> None:
    make = named(f"dfed_alt(graph='{graph}', personal=('bias',))")
    found = priced(make, tiny_task(), EVERYBODY)
    same(found, real(make, tiny_task(), EVERYBODY))
    each = {"ring": 2, "full": len(SIZES) - 1, "exponential": 4}[graph]
    assert found.total_up.tolist() == [72 * each] * len(SIZES)


@pytest.mark.parametrize("name", brief(["quantise(3)", "bfloat16", "nf4(16)"]))
def test_codecs_of_messages_and_replies(name: str) -> None:
    codecs: dict[str, Any] = {"up": wire.codec(name), "down": wire.codec(name)}
    same(priced(fed_avg, tiny_task(), **codecs), real(fed_avg, tiny_task(), **codecs))
    ranks = named("het_lora(ranks=[1, 2])")
    same(priced(ranks, tiny_lora_task(), **codecs), real(ranks, tiny_lora_task(), **codecs))


@pytest.mark.parametrize("name", ["topk(0.1)", "topk(0.95)", "topk(0.3)+quantise(8)", "topk(0.9)+quantise(3)"])
def test_a_codec_that_chooses_by_value_has_a_bound_by_its_share(name: str) -> None:
    codec = wire.codec(name)
    found = priced(fed_avg, tiny_task(), up=codec)
    _, up = real(fed_avg, tiny_task(), up=codec)
    assert found.bounded == {"down": [], "up": ["bias", "kernel"]}
    rounding = 2 if name.endswith("(3)") else 0  # a leaf ends at a whole byte
    scales = 8 if "quantise" in name else 0  # of a leaf of which a client sends nothing
    assert 0 <= found.total_up.sum() - sum(up.values()) <= (rounding + scales) * len(COHORT)
    assert all(found.up[leaf].sum() >= nbytes for leaf, nbytes in up.items())


@pytest.mark.parametrize("name", ["topk(0.3)", "topk(0.5)+quantise(8)", "randomk(0.4, feedback=True)"])
def test_a_message_of_changes_has_a_bound_where_its_price_follows_from_values(name: str) -> None:
    """Of the second round, in which the first difference travels."""
    down = wire.codec(name)
    found, (sent, _) = (
        priced(fed_avg, tiny_task(), EVERYBODY, down=down),
        real(fed_avg, tiny_task(), EVERYBODY, down=down),
    )
    assert found.bounded == {"down": ["bias", "kernel"], "up": []}
    assert 0 <= found.total_down.sum() - sum(sent.values()) <= 8 * len(EVERYBODY)
    assert all(found.down[leaf].sum() >= nbytes for leaf, nbytes in sent.items())
    assert found.total_down.sum() < 84 * len(EVERYBODY)


@pytest.mark.parametrize("name", brief(["powersgd(1)", "sign", "powersgd(1)+quantise(8)", "low_rank(1)"], 2))
@pytest.mark.parametrize("algorithm", brief(["fed_avg", "flora", "fed_res", "scaffold"], 2))
def test_a_message_of_changes_has_an_exact_price_where_values_do_not_matter(name: str, algorithm: str) -> None:
    make, down = named(algorithm), wire.codec(name)
    task = suited(make)
    same(priced(make, task, EVERYBODY, down=down), real(make, task, EVERYBODY, down=down))


def test_a_message_of_changes_to_some_clients_has_no_price() -> None:
    with pytest.raises(ValueError, match="Expected every client in every exchange for a codec_down"):
        priced(fed_avg, tiny_task(), down=wire.codec("topk(0.3)"))


@pytest.mark.parametrize("name", brief(["sketch(1)+quantise(8)", "eden(2)", "powersgd(1)", "qsgd(4, 5)"], 2))
def test_codecs_of_changes_have_exact_prices_where_values_do_not_matter(name: str) -> None:
    codec = wire.codec(name)
    found, (_, up) = priced(fed_avg, tiny_task(), up=codec), real(fed_avg, tiny_task(), up=codec)
    assert found.total_up.sum() == sum(up.values()) and not found.bounded["up"]


@pytest.mark.parametrize(
    "name",
    brief(
        [
            "topk(0.5)+nnadq(0.01)",
            "randomk(0.3)",
            "nnadq(0.01)",
            "topk(0.5)+eden(2)",
            "topk(0.9)+nf4(1)",
            "blocks(0.5, 4)+rotate+nf4",
        ],
        2,
    ),
)
def test_codecs_whose_prices_follow_from_values_have_bounds(name: str) -> None:
    codec = wire.codec(name)
    found, (_, up) = priced(fed_avg, tiny_task(), up=codec), real(fed_avg, tiny_task(), up=codec)
    assert found.bounded["up"]
    assert all(found.up[leaf].sum() >= nbytes for leaf, nbytes in up.items())
    assert found.total_up.sum() >= sum(up.values())


def masked(entries: Callable[[Any, Client, Any], Any], axis: int | None = None) -> Make:
    """FedAvg whose clients send a part of the kernel's change."""

    def make(task: Task) -> Algorithm:
        def reply(carry: Any, message: Any, client: Client) -> Any:
            change = jax.tree.map(jnp.subtract, carry.params, message)
            kept = wire.kept(change["kernel"], entries(change["kernel"], client, carry), axis)
            return {"bias": change["bias"], "kernel": wire.coded(kept)}, client.memory

        local = fit(task.loss, task.optimizer, task.lr, task.passes, reply=reply)

        def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
            change, info = cohort.exchange(server.params, local)
            return server._replace(params=jax.tree.map(jnp.add, server.params, change)), info.metrics

        return fed_avg(task)._replace(round=round)

    return make


@pytest.mark.slow
def test_masks_of_a_clients_own_are_exact_and_those_of_values_are_bounds() -> None:
    by_id = masked(lambda leaf, client, carry: client.id % 6 + 1, axis=0)
    found = priced(by_id, tiny_task())
    same(found, real(by_id, tiny_task()))
    assert found.up["kernel"].tolist() == [12 * (i % 6 + 1) for i in COHORT] and not found.bounded["up"]

    for by_value in (
        masked(lambda leaf, client, carry: leaf > 0),
        masked(lambda leaf, client, carry: (carry.params["bias"][0] > 0).astype(jnp.int32) + 1, axis=0),
    ):
        found = priced(by_value, tiny_task())
        assert found.bounded == {"down": [], "up": ["kernel"]}
        assert found.up["kernel"].tolist() == [72] * len(COHORT)
        assert real(by_value, tiny_task())[1]["kernel"] < 72 * len(COHORT)


@pytest.mark.parametrize("name", ["fed_pcl", "fed_dm(per_class=2, real=4, least=1, steps=1, server_epochs=0)"])
def test_what_classes_send_is_bounded_by_clients_that_have_all(name: str) -> None:
    """FedDM's batches have rows of their own number, which is not the run's."""
    make = named(name)
    task = suited(make)
    found, (down, up) = priced(make, task, (7, 2, 0)), real(make, task, (7, 2, 0))
    for claimed, sent in ((found.down, down), (found.up, up)):
        assert {path: int(each.sum()) >= sent[path] for path, each in claimed.items()} == dict.fromkeys(sent, True)
    whole = 3 * 3 * 4 * (4 if name == "fed_pcl" else 2 * 6)  # three classes of each of three clients
    path = "prototypes" if name == "fed_pcl" else "x"
    assert found.up[path].sum() == whole and up[path] == whole * 8 // 9  # the smallest lacks one


@pytest.mark.slow
def test_what_pruning_leaves_is_a_bound() -> None:
    found = priced(named("het_lora(ranks=[1, 2], gamma=0.5, penalty=0.1)"), tiny_lora_task())
    assert set(found.bounded["up"]) == set(found.bounded["down"]) == {"lora_a", "lora_b"}
    down, up = real(named("het_lora(ranks=[1, 2], gamma=0.5, penalty=0.1)"), tiny_lora_task())
    assert found.total_down.sum() >= sum(down.values()) and found.total_up.sum() >= sum(up.values())
    assert found.up["rank"].tolist() == [4] * len(COHORT)


def test_an_algorithm_that_looks_at_numbers_is_guessed_and_one_that_needs_them_is_refused() -> None:
    def looking(fetches: bool) -> Make:
        def make(task: Task) -> Algorithm:
            plain = fed_avg(task)

            def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
                new, metrics = plain.round(key, held, server, cohort)
                moved = cohort.fetch(new.params["bias"])[0] if fetches else float(new.params["bias"][0])
                return new, {**metrics, "moved": moved}

            return plain._replace(round=round)

        return make

    found = priced(looking(fetches=True), tiny_task())
    assert found.guessed and found.total_up.tolist() == [84] * len(COHORT)
    with pytest.raises(jax.errors.JAXTypeError):
        priced(looking(fetches=False), tiny_task())


def test_the_servers_own_training_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples without labels in the hand of the server; their number is unknown, or as the setting says."""
    found = priced(serves.fed_distilled, tiny_task())
    assert found.guessed and found.total_up.tolist() == [84] * len(COHORT)
    known = priced(serves.fed_distilled, tiny_task(), public=9, shard=0)
    assert not known.guessed and known.total_up.tolist() == [84] * len(COHORT)
    assert not priced(serves.fed_tuned, tiny_task(), public=0, shard=5).guessed


def test_nobody_costs_nothing() -> None:
    found = priced(fed_avg, tiny_task(), (2, -1, 7))
    assert found.total_up.tolist() == found.total_down.tolist() == [84, 0, 84]


@pytest.mark.slow
def test_a_server_that_learns_from_groups_costs_what_their_messages_cost(
    tmp_path: Path, blobs: Callable[..., Path]
) -> None:
    """The server's own training is on public examples of its own model, which is never sent."""
    groups = tuple(f"{n}(backbone='mlp', peft='{p}'{s})" for n, p, s in (
        ("small", "head", ", share=0.5"), ("large", "full", ", share=0.5"), ("server", "full", "")
    ))  # fmt: skip
    config = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", clients=6, clients_per_round=3, rounds=2, min_size=3, lr=0.1,
        optimizer="sgd", public_share=0.2, algorithm=f"{ROOT / 'tests' / 'serves.py'}:fed_two_sizes", groups=groups,
    )  # fmt: skip
    speed = Speed(devices=1, lanes=2, compilation_cache=False)
    problem, (phase,) = build.problem(config, speed), build.phases(config)
    models = prices.models_of(config, lambda one: build.split_model(one, problem.dataset))
    example = jax.ShapeDtypeStruct(problem.dataset.x.shape[1:], problem.dataset.x.dtype)
    found = prices.of_phase(phase, models, example, problem.partition.sizes, (38, 0))
    line = fedsim.run(config, speed, out=tmp_path / "run", quiet=True).rounds[1]
    assert {k: v.sum() for k, v in found.leaves.up.items()} == line["bytes_up_leaves"]
    assert {k: v.sum() for k, v in found.leaves.down.items()} == line["bytes_down_leaves"]
    assert found.up.certainty == "exact" and len(found.ids) == len(set(found.ids.tolist())) == line["clients"]
