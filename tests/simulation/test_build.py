"""From options to values: what a library is asked for by name, phases, the split of the work that caching makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedsim
from fedsim import peft, wire
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.backbones.load import random
from fedsim.config import Config, Speed
from fedsim.core import Client
from fedsim.engine import host
from fedsim.simulation import build, needs, tasks, trainers
from fedsim.testing.tasks import tiny_task
from fedsim.training import features, optimizers


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sgd", lambda rate: optax.sgd(rate)),
        ("sgd(momentum=0.9, nesterov=True)", lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)),
        ("adam", lambda rate: optax.adam(rate)),
        ("adamw(weight_decay=0.01)", lambda rate: optax.adamw(rate, weight_decay=0.01)),
        ("yogi(eps=1e-2)", lambda rate: optax.yogi(rate, eps=1e-2)),
    ],
)
def test_optimizers_are_optax_s(text: str, reference: Callable[[float], optax.GradientTransformation]) -> None:
    params = {"w": jnp.array([1.0, -2.0])}
    results = []
    for made in (optimizers.optimizer(text, "optimizer")(0.1), reference(0.1)):
        now, state = params, made.init(params)
        for k in range(3):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = made.update({"w": jnp.array([0.5 + k, 0.25])}, state, now)
                now = optax.apply_updates(now, updates)
        results.append(np.asarray(now["w"]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adm", r"to be an optax optimizer with a learning_rate \(did you mean adam"),
        ("chain", "to be an optax optimizer"),
        ("constant_schedule", "to be an optax optimizer"),
        ("sgd(0.1)", "to give options by name"),
        ("sgd(momentun=0.9)", "momentun"),
        ("adam(b1='x')", "makes a step from a gradient"),
        ("lbfgs", "makes a step from a gradient"),
        ("os.system('true')", "to be an optax optimizer"),
    ],
)
def test_impossible_optimizers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected server_optimizer=.*{message}"):
        optimizers.optimizer(text, "server_optimizer")


@pytest.mark.parametrize(
    "text", ["constant_schedule(1.0)", "cosine_decay_schedule(1.0, 20)", "linear_schedule(1, 0, 8)"]
)
def test_schedules_are_optax_s_times_the_rate(text: str) -> None:
    reference = eval(f"optax.{text}", {"optax": optax})
    value = optimizers.schedule(text, "lr_schedule", 0.02)
    traced = jax.jit(value)
    for k in (0, 1, 7, 30):
        assert traced(jnp.int32(k)).dtype == jnp.float32
        np.testing.assert_allclose(traced(jnp.int32(k)), 0.02 * np.float32(reference(k)), rtol=1e-6)


@pytest.mark.parametrize(
    "text", ["cosine_schedule(1.0, 20)", "cosine_decay_schedule()", "sgd(0.1)", "linear_schedule(x=1)"]
)
def test_impossible_schedules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected lr_schedule="):
        optimizers.schedule(text, "lr_schedule", 1.0)


def test_phases_cover_all_rounds() -> None:
    config = Config(rounds=20, head_rounds=5, head_lr=0.1, peft="lora")
    head, rest = build.phases(config)
    assert (head.name, head.first, head.last, rest.name, rest.first, rest.last) == ("head", 1, 5, "peft", 6, 20)
    assert head.config.peft == "head" and head.config.lr == 0.1 and rest.config is config
    assert [p.name for p in build.phases(config.replace(head_rounds=0))] == ["peft"]
    (only,) = build.phases(config.replace(peft="head"))
    assert (only.name, only.first, only.last) == ("head", 1, 20)
    assert build.phases(config.replace(head_lr=None))[0].config.lr == config.lr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "minilm"}, "backbone='minilm'.*did you mean minilm_l6"),
        ({"peft": "lorra"}, "lorra.*did you mean lora"),
        ({"optimizer": "adm"}, "optimizer='adm'"),
        ({"server_optimizer": "adm"}, "server_optimizer='adm'"),
        ({"lr_schedule": "cosine"}, "lr_schedule='cosine'"),
        ({"algorithm": "fed_prx"}, "algorithm='fed_prx'.*did you mean fed_prox"),
        ({"algorithm": "fed_prox(nu=1)"}, "'nu'.*did you mean mu"),
        ({"algorithm": "fed_prox(1)"}, "options by name"),
        ({"algorithm": "none.py:fed_mine"}, "none.py"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs'"),
        ({"targets": ("querry",)}, "querry.*did you mean query"),
        ({"rank": 1000}, "rank=1000"),
        ({"backbone": "vit_b16"}, "weights of backbone='vit_b16' to be given"),
    ],
    ids=lambda o: str(o) if isinstance(o, dict) else "",
)
def test_what_no_data_is_needed_for_is_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        build.check(Config(**options))


def test_backbones_without_a_checkpoint_start_at_random(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    config = Config(dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=4, clients_per_round=2)
    build.check(config)
    assert needs.weights(config) == "random" and needs.weights(Config()) is None
    assert needs.weights(config.replace(weights="file.npz")) == "file.npz"
    problem = build.problem(config, Speed())
    trained = trainers.trainer(problem, build.phases(config)[0]).start
    again = trainers.trainer(problem, build.phases(config.replace(weights="random"))[0]).start
    assert all(np.array_equal(trained[k], again[k]) for k in trained) and len(trained) == 6


def test_needed_assets() -> None:
    assert needs.needed_assets(Config()) == ("20newsgroups", "minilm_l6")
    assert needs.needed_assets(Config(weights="random")) == ("20newsgroups", "minilm_l6"), "the tokenizer is beside it"
    assert needs.needed_assets(Config(dataset="a.csv", weights="my")) == ()
    assert needs.needed_assets(Config(dataset="ids.npz", weights="random")) == (), "ids need no tokenizer"
    assert needs.needed_assets(Config(dataset="a.npz", backbone="mlp")) == ()


def test_a_text_backbone_does_not_read_arrays(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    config = Config(
        dataset=str(blobs(tmp_path)), backbone="bert_tiny", weights="random", clients=4, clients_per_round=2
    )
    with pytest.raises(ValueError, match=r"blobs.npz' to hold text for backbone='bert_tiny'.*mlp"):
        build.problem(config, Speed())


def test_the_tokenizer_lies_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    config = Config(backbone="bert_base", weights=str(tmp_path))
    assert needs.tokenizer(config) == tmp_path / "tokenizer.json"
    monkeypatch.setattr(needs.load, "hub", lambda name, fetch=True: tmp_path / name.rpartition("/")[2])
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="to come with a tokenizer"):
        needs.tokenizer(config.replace(weights="owner/model"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert needs.tokenizer(config.replace(weights="owner/model")) == tmp_path / "model" / "tokenizer.json"


def test_a_text_backbone_reads_token_ids_without_a_tokenizer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 500, (80, 12)), rng.integers(0, 2, 80)
    np.savez(tmp_path / "ids.npz", x=x, y=y)
    config = Config(dataset=str(tmp_path / "ids.npz"), backbone="bert_tiny", weights="random", clients=10, min_size=1)
    assert build.problem(config, Speed()).dataset.kind == "text"
    assert build.problem(config.replace(dataset="arrays"), Speed(), fedsim.arrays(x, y)).dataset.kind == "text"


def test_local_tests_are_cut_from_what_clients_train_on(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    config = Config(dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=6, clients_per_round=2)
    whole = build.problem(config, Speed())
    cut = build.problem(config.replace(local_test=0.25), Speed())
    assert whole.local_test is None and cut.local_test is not None
    for i in range(6):
        both = [cut.partition.client(i), cut.local_test.client(i)]
        assert np.array_equal(np.concatenate(both), whole.partition.client(i))
        assert len(both[1]) == round(len(whole.partition.client(i)) / 4) > 0
    own, held = (trainers.trainer(p, build.phases(config)[0]).engine.rows for p in (cut, whole))
    assert set(own) == set(held) - set(cut.local_test.rows)


def test_features_equal_the_prefix_and_build_on_one_another(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    """The deeper cut is computed from the shallower one; a last batch that is not full is no exception."""
    config = Config(dataset=str(blobs(tmp_path, rows=150)), backbone="mlp", peft="head", clients=4, clients_per_round=2)
    problem = build.problem(config, Speed(cache="on"))
    assert problem.cuts == (2,) and len(problem.dataset.y) % features.FEATURE_BATCH
    model = build.split_model(config, problem.dataset)
    frozen = peft.start(model, "random", 0)[1]
    expected = np.asarray(model.prefix(frozen, problem.dataset.x))
    np.testing.assert_allclose(trainers.features(problem, model, frozen), expected, rtol=1e-5, atol=1e-6)
    two = problem._replace(cuts=(1, 2), cache={})
    np.testing.assert_allclose(trainers.features(two, model, frozen), expected, rtol=1e-5, atol=1e-6)
    assert sorted(two.cache) == [("float32", 1), ("float32", 2)]
    assert trainers.features(two, model, {}) is two.cache["float32", 2], "nothing is computed twice"


def test_when_features_are_cached() -> None:
    x = np.zeros((10, 6), np.float32)
    head, full = (peft.build("mlp", 3, peft=p, input_shape=(6,)) for p in ("head", "full"))
    assert [features.use_cache(Speed(cache=c), head, x) for c in ("auto", "on", "off")] == [True, True, False]
    assert [features.use_cache(Speed(cache=c), full, x) for c in ("auto", "on", "off")] == [False, False, False]
    large = np.broadcast_to(np.zeros((1, 6), np.float32), (features.CACHE_LIMIT // (4 * 64) + 1, 6))
    assert not features.use_cache(Speed(), head, large) and features.use_cache(Speed(cache="on"), head, large)


def test_full_bytes_are_those_of_full_fine_tuning() -> None:
    """Whatever is trained, full fine-tuning would send the backbone and the head, and no LoRA."""
    sizes = {
        build.full_bytes(peft.build("bert_tiny", 3, peft=p)) for p in ("full", "head", "lora", "bias", "lora+bias")
    }
    full = peft.build("bert_tiny", 3, peft="full")
    assert sizes == {4 * sum(int(np.prod(s.shape)) for s in full.trained.values())}


def test_the_task_of_a_config(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    config = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", clients=4, clients_per_round=2, peft="head", epochs=3, batch_size=5,
        lr=0.5, lr_schedule="linear_schedule(1.0, 0.0, 10)", weighting="uniform", codec_up="bfloat16",
    )  # fmt: skip
    model = peft.build("mlp", 3, peft="head", input_shape=(6,))
    trained, frozen = peft.start(model, "random", 0)
    task = tasks.task(config, model, trained, cached=False)
    assert (task.passes.epochs, task.passes.steps, task.passes.batch_size) == (3, None, 5)
    client = Client(jnp.int32(0), jnp.int32(9), (), jax.random.key(0), jnp.int32(1), jnp.float32(0.5), jnp.int32(2))
    assert float(task.lr(client, ())) == 0.5
    assert float(task.weight(client, ())) == 1
    examples = tasks.task(config.replace(weighting="examples"), model, trained, cached=False)
    assert float(examples.weight(client, ())) == 9
    assert {k: v.tolist() for k, v in task.init(jax.random.key(0)).items()} == {
        k: v.tolist() for k, v in trained.items()
    }
    x = np.ones((2, 6), np.float32)
    whole = task.logits(frozen, trained, x)
    cached = tasks.task(config, model, trained, cached=True)
    held = {k: v for k, v in frozen.items() if k not in model.below}
    np.testing.assert_allclose(cached.logits(held, trained, model.prefix(frozen, x)), whole, rtol=1e-6)


def test_the_engine_of_a_config_has_its_codecs_and_the_run_its_average(
    tmp_path: Path, blobs: Callable[..., Path]
) -> None:
    config = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", clients=4, clients_per_round=2, min_size=3, peft="head",
        weighting="uniform", codec_up="bfloat16",
    )  # fmt: skip
    trainer = trainers.trainer(build.problem(config, Speed(devices=1)), build.phases(config)[0])
    assert trainer.engine.up is not None and trainer.engine.down is None
    reply, key = wire.coded({"a": jnp.array([1 / 3], jnp.float32)}), jax.random.key(0)
    packet = wire.arrive(reply, trainer.engine.up, key, key)[0]["a"]
    assert int(packet.nbytes) == 2 and float(packet.value[0]) == float(jnp.bfloat16(1 / 3))
    client = Client(*(jnp.int32(n) for n in (0, 9)), (), key, jnp.int32(1), jnp.float32(0.5), jnp.int32(2))
    assert float(trainer.average.reduce.weight(client, ())) == 1


def test_phases_hand_on_what_was_trained(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    config = Config(
        dataset=str(blobs(tmp_path)),
        backbone="mlp",
        clients=4,
        clients_per_round=2,
        peft="bias",
        rounds=4,
        head_rounds=2,
        head_lr=0.5,
        lr=0.1,
        lr_schedule="linear_schedule(1.0, 0.0, 10)",
    )
    problem = build.problem(config, Speed())
    head, rest = build.phases(config)
    rates = [trainers.trainer(problem, phase).lr for phase in (head, rest)]
    np.testing.assert_allclose([rates[0](1), rates[0](2), rates[1](6)], [0.5, 0.45, 0.05], rtol=1e-6)
    trained = {k: v + 1 for k, v in trainers.trainer(problem, head).start.items()}
    start = trainers.trainer(problem, rest, trained).start
    assert set(trained) < set(start) and all(np.array_equal(start[k], trained[k]) for k in trained)
    backbone = random({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in start.items()}, config.seed)
    assert all(np.array_equal(start[k], backbone[k]) for k in start if k not in trained)


def test_an_idle_accelerator_is_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    monkeypatch.delenv("JAX_PLATFORMS")  # who asks for the CPU is not told about a GPU
    monkeypatch.setattr(Path, "exists", lambda p: str(p) == "/dev/nvidia0" or exists(p))
    with pytest.warns(UserWarning, match=r"/dev/nvidia0.*pip install -e '\.\[cuda13\]'") as caught:
        host.warn_idle_accelerator()
    assert len(caught) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    host.warn_idle_accelerator()


EVERYBODY = {"backbone": "mlp", "clients": 8, "clients_per_round": 8, "codec_down": "topk(0.1)"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients_per_round": 7}, r"clients_per_round=7 to be clients=8 with .* Give clients_per_round=8, or choose"),
        ({"availability": "bernoulli(p=0.8)"}, r"availability='bernoulli\(p=0.8\)' to be 'always'"),
        ({"dropout": 0.1}, "dropout=0.1 to be 0"),
        ({"deadline": 5.0, "latency": "20"}, "deadline=5.0 to be None"),
        (
            {"dp": "central", "noise_multiplier": 1.0, "delta": 1e-3},
            "sampling='poisson' to be 'fixed' .* Give sampling=fixed",
        ),
        ({"groups": ("a(backbone='mlp', share=1.0)",)}, "groups=.* to be empty"),
    ],
)
def test_whatever_lets_a_client_miss_a_message_of_changes_is_refused(changes: dict[str, Any], words: str) -> None:
    """Before data are read, and where rounds are priced; a codec of values takes all of it."""
    config = Config(**{**EVERYBODY, **changes})
    with pytest.raises(ValueError, match=rf"{words}.*a codec that acts on values: bfloat16, quantise\(8\), eden\(4\)"):
        build.check(config)
    build.check_everybody(config.replace(codec_down="eden(4)"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latency": "20"},
        {"dp": "central", "noise_multiplier": 1.0, "delta": 1e-3, "sampling": "fixed"},
        {"codec_down": "powersgd(2)+quantise(8)", "codec_up": "topk(0.1)"},
    ],
)
def test_messages_of_changes_are_taken_where_everybody_is_there(changes: dict[str, Any]) -> None:
    build.check_everybody(Config(**{**EVERYBODY, **changes}))


def test_over_selection_invites_more_than_there_are() -> None:
    """So that it needs no word of its own where every client is in every round."""
    with pytest.raises(ValueError, match=r"over_selection=1.3 to invite at most clients=8"):
        Config(**EVERYBODY, over_selection=1.3)


def test_an_algorithm_that_selects_by_itself_is_refused_with_messages_of_changes() -> None:
    config, task = Config(**EVERYBODY), tiny_task()
    build.refuse_missing(config, fed_avg(task))
    own = fed_avg(task)._replace(select=lambda rng, server, population: np.arange(8))
    with pytest.raises(
        ValueError, match=r"algorithm='fed_avg' not to select clients by itself with codec_down='topk\(0.1\)'"
    ):
        build.refuse_missing(config, own)
    build.refuse_missing(config.replace(codec_down="eden(4)"), own)


def test_a_codec_of_messages_that_errs_by_more_than_it_is_given_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codec_down='randomk\(0.1\)' to err by less than what it is given"):
        build.check(Config(**{**EVERYBODY, "codec_down": "randomk(0.1)"}))


def test_error_feedback_of_clients_that_never_come_back_is_refused() -> None:
    rare = Config(backbone="mlp", clients=100, clients_per_round=10, rounds=10, codec_up="topk(0.1)+quantise(8)")
    with pytest.raises(
        ValueError, match=r"rounds=10 x clients_per_round=10 > clients=100 for codec_up='topk\(0.1\)\+quan"
    ):
        build.check_feedback(rare)
    for config in (
        rare.replace(rounds=11),
        rare.replace(codec_up="topk(0.1, feedback=False)"),
        rare.replace(codec_up="nf4"),
    ):
        build.check_feedback(config)
