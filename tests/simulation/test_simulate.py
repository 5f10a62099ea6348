"""Whole runs: when they stop, what they leave alone, what they count, and that neither speed nor chance is in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fedsim
from fedsim import peft, record
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.config import Config, Speed
from fedsim.record import Run
from fedsim.report import plots, tables
from fedsim.simulation import build, simulate, trainers
from fedsim.testing import contract

pytestmark = pytest.mark.usefixtures("compile_once")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)
TIMES = {"seconds", "compile_seconds", "clients_per_second", "examples_per_second", "flops_per_second", "mfu"}
TIMES |= {"most_memory"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    """A task of a second: 3 classes of points, 8 clients, an MLP of 9,347 parameters, SGD."""
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"))), backbone="mlp", peft="full", clients=8,
        clients_per_round=4, rounds=3, optimizer="sgd", lr=0.05, min_size=3,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """`run(config, speed)` in a fresh folder."""
    count = iter(range(99))
    return lambda config, speed=SPEED, **more: fedsim.run(
        config, speed, out=tmp_path / f"run-{next(count)}", quiet=True, **more
    )


@pytest.fixture(scope="module")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of `config`, for the tests that only look at it."""
    return fedsim.run(config, SPEED, out=tmp_path_factory.mktemp("done") / "run", quiet=True)


def without_times(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.rounds]


def assert_close(a: Run, b: Run) -> None:
    assert set(a.parameters) == set(b.parameters)
    for name, value in a.parameters.items():
        np.testing.assert_allclose(b.parameters[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_run_learns_and_leaves_its_folder(done: Run, config: Config) -> None:
    assert done.config == config and done.speed == SPEED
    assert [line["round"] for line in done.rounds] == [1, 2, 3] and done.summary["stopped"] == "rounds"
    assert done.summary["final"]["validation"] == done.rounds[-1]["validation"]
    assert done.summary["final"]["test"]["loss"] < 0.75 * done.summary["start"]["validation"]["loss"]
    files = {p.name for p in done.directory.iterdir()}
    assert {"config.json", "rounds.jsonl", "summary.json", "trained.safetensors", "checkpoints"} <= files
    assert {"accuracy_rounds.png", "accuracy_bytes.png"} <= files
    assert done.parameters["head/kernel"].shape == (64, 3)


def test_the_same_seed_gives_the_same_bits(done: Run, config: Config, run: Callable[..., Run]) -> None:
    again = run(config)
    assert without_times(again) == without_times(done)
    assert all(again.parameters[k].tobytes() == v.tobytes() for k, v in done.parameters.items())


def test_another_seed_gives_another_run(done: Run, config: Config, run: Callable[..., Run]) -> None:
    other = run(config.replace(seed=1, rounds=1))
    assert other.rounds[0]["loss"] != done.rounds[0]["loss"]


@pytest.fixture(scope="module")
def one(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round."""
    return fedsim.run(config.replace(rounds=1), SPEED, out=tmp_path_factory.mktemp("one") / "run", quiet=True)


@pytest.mark.parametrize(
    "speed",
    [
        Speed(lanes=1, devices=1, compilation_cache=False),
        pytest.param(Speed(lanes=16, devices=1, segment_steps=3, compilation_cache=False), marks=pytest.mark.slow),
        pytest.param(Speed(lanes=1, devices=8, compilation_cache=False), marks=pytest.mark.slow),
        Speed(lanes=3, devices=2, eval_batch=7, compilation_cache=False),
        pytest.param(
            Speed(lanes=2, devices=2, parallel="pmap", compilation_cache=False),
            marks=pytest.mark.filterwarnings("ignore:.*pmap"),
        ),
    ],
    ids=lambda s: f"{s.lanes}-lanes-{s.devices}-devices-{s.parallel}",
)
def test_speed_changes_no_result(one: Run, config: Config, run: Callable[..., Run], speed: Speed) -> None:
    """One round of SGD on the same plan, summed in another order."""
    other = run(config.replace(rounds=1), speed)
    assert_close(one, other)
    for name in ("loss", "accuracy"):
        assert one.rounds[0][name] == pytest.approx(other.rounds[0][name], rel=1e-5)
        assert one.summary["final"]["test"][name] == pytest.approx(other.summary["final"]["test"][name], rel=1e-5)
    exact = ("bytes_up_leaves", "bytes_down_leaves", "examples", "clients", "reported", "setup_bytes")
    assert all(one.rounds[0][k] == other.rounds[0][k] for k in exact)


def test_cached_features_change_no_result(config: Config, run: Callable[..., Run]) -> None:
    head = config.replace(peft="head")
    whole, cached = (run(head, Speed(cache=c, devices=1, compilation_cache=False)) for c in ("off", "on"))
    assert_close(whole, cached)
    for a, b in zip(whole.rounds, cached.rounds, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["bytes_up"] == b["bytes_up"]
        assert a["setup_bytes"] == b["setup_bytes"]
    assert cached.rounds[0]["setup_bytes"] > 0, "caching is the simulator's: clients are given the backbone"


@pytest.mark.slow
def test_a_shared_problem_changes_no_result(done: Run, config: Config, run: Callable[..., Run]) -> None:
    problem = build.problem(config, SPEED)
    for _ in range(2):  # the second one finds what the first one has computed
        assert without_times(run(config.replace(rounds=1), problem=problem)) == without_times(done)[:1]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[trainers.Trainer, list[str]]]:
    """Every trainer that a run makes, with what was asked of it in order."""
    made: list[tuple[trainers.Trainer, list[str]]] = []
    original = trainers.trainer

    def trainer(*args: Any) -> trainers.Trainer:
        real, calls = original(*args), []

        def noted(name: str) -> Callable[..., Any]:
            return lambda server: (calls.append(name), getattr(real, name)(server))[1]

        made.append((real, calls))
        return real._replace(validate=noted("validate"), test=noted("test"))

    monkeypatch.setattr(trainers, "trainer", trainer)
    return made


def test_the_backbone_is_untouched_and_the_test_set_read_once(
    config: Config, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_made = watched(monkeypatch)
    result = run(config.replace(peft="bias", head_rounds=1, optimizer="adam", server_optimizer="adam", server_lr=0.1))
    rehearsed, *made = all_made  # the lanes were asked for: whether they fit in the second phase is looked at first
    assert rehearsed[1] == [] and len(made) == 2
    asked = [call for _, calls in made for call in calls]
    assert asked.count("test") == 1 and asked[-1] == "test"
    assert asked.count("validate") == 1 + 3, "the start, and every round"
    for trainer, _ in made:
        frozen = peft.start(trainer.model, "random", config.seed)[1]
        held = jax.device_get(trainer.engine.held)
        assert all(held[name].tobytes() == frozen[name].tobytes() for name in held)
        assert set(held) <= set(frozen) and not set(held) & set(result.parameters)
    assert set(made[-1][0].engine.held) == {"layers/0/kernel", "layers/1/kernel"}


def test_the_head_comes_first(config: Config, run: Callable[..., Run]) -> None:
    result = run(config.replace(peft="bias", rounds=4, head_rounds=2))
    assert [line["phase"] for line in result.rounds] == ["head", "head", "peft", "peft"]
    leaves = [set(line["bytes_up_leaves"]) for line in result.rounds]
    head, biases = {"head/kernel", "head/bias"}, {"layers/0/bias", "layers/1/bias"}
    assert leaves == [head, head, head | biases, head | biases]
    assert set(result.parameters) == head | biases
    alone = run(config.replace(peft="head", rounds=2))
    assert [line["validation"] for line in alone.rounds] == [line["validation"] for line in result.rounds[:2]]
    assert result.rounds[2]["validation"]["loss"] < result.rounds[0]["validation"]["loss"]


def test_a_target_stops_the_run(config: Config, run: Callable[..., Run]) -> None:
    result = run(config.replace(rounds=50, target=0.8))
    seen = [line["validation"]["accuracy"] for line in result.rounds]
    assert result.summary["stopped"] == "target" and len(seen) < 50
    assert seen[-1] >= 0.8 and all(a < 0.8 for a in seen[:-1])


@pytest.mark.slow
def test_a_run_recorded_before_metrics_had_names_goes_on(
    config: Config, run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options are `target_accuracy` and neither task nor metric, its summary names no metric; it means what it meant."""
    whole = run(config.replace(rounds=4, target=0.999, lr=1e-3), dataclasses.replace(SPEED, checkpoint_every=2))
    older = tmp_path / "older"
    shutil.copytree(whole.directory, older)
    about = json.loads((older / record.CONFIG).read_text())
    about["config"]["target_accuracy"] = about["config"].pop("target")
    del about["config"]["task"], about["config"]["metric"], about["checksum"]
    (older / record.CONFIG).write_text(json.dumps(about))
    summary = json.loads((older / record.SUMMARY).read_text())
    del summary["metric"], summary["checksum"]
    (older / record.SUMMARY).write_text(json.dumps(summary))

    found = fedsim.load(older)
    assert found.config == whole.config and found.summary is not None and found.summary["best"] == summary["best"]
    compared = fedsim.compare(whole, found)
    assert not compared["config"] and len(set(compared["results"]["test accuracy"])) == 1
    tables.print_summary(found.summary)
    assert f"{summary['final']['test']['accuracy']:.3f}" in capsys.readouterr().out
    (older / record.SUMMARY).unlink()
    shutil.rmtree(older / record.CHECKPOINTS / "4")
    again = fedsim.run(resume=older, quiet=True)
    assert without_times(again) == without_times(whole)
    assert (again.summary or {})["best"] == summary["best"] and (again.summary or {})["metric"] == "accuracy"


def test_patience_stops_the_run(config: Config, run: Callable[..., Run]) -> None:
    """Nothing moves at this rate: the first evaluation is the best, two more are waited for."""
    result = run(config.replace(rounds=50, lr=1e-12, patience=2))
    assert result.summary["stopped"] == "patience" and len(result.rounds) == 3


@pytest.mark.slow
def test_patience_begins_anew_after_the_head(config: Config, run: Callable[..., Run]) -> None:
    """What the head has used up of it does not count: the second phase has its own two evaluations."""
    result = run(config.replace(rounds=50, head_rounds=4, peft="bias", lr=1e-12, patience=2))
    assert [line["phase"] for line in result.rounds] == ["head"] * 4 + ["peft"] * 2


def test_evaluations_are_as_rare_as_asked(config: Config, run: Callable[..., Run]) -> None:
    result = run(config.replace(rounds=5, eval_every=2))
    assert [line["validation"] is not None for line in result.rounds] == [False, True, False, True, True]


def test_bytes_of_a_round_are_cohort_times_message_both_ways(done: Run, config: Config) -> None:
    message = sum(v.nbytes for v in done.parameters.values())
    for line in done.rounds:
        assert line["bytes_up"] == line["bytes_down"] == config.clients_per_round * message
        assert line["bytes_up_leaves"] == {k: 4 * v.nbytes for k, v in done.parameters.items()}
        assert line["clients"] == line["reported"] == 4 and line["nonfinite"] == 0


def test_the_summary_is_the_sum_of_the_lines(done: Run) -> None:
    total = lambda name: sum(line[name] for line in done.rounds)  # noqa: E731 - used a few lines long
    bytes_ = done.summary["bytes"]
    assert (bytes_["up"], bytes_["down"]) == (total("bytes_up"), total("bytes_down"))
    assert bytes_["total"] == bytes_["up"] + bytes_["down"]
    assert bytes_["setup"] == total("setup_bytes") and bytes_["with_setup"] == bytes_["total"] + bytes_["setup"]
    assert (done.rounds[-1]["total_bytes_up"], done.rounds[-1]["total_bytes_down"]) == (bytes_["up"], bytes_["down"])
    assert done.summary["examples"] == total("examples") and done.summary["clients"] == total("clients")
    assert done.summary["full_fine_tuning_bytes"]["total"] == bytes_["total"], "this run is full fine-tuning"
    assert done.summary["seconds"] >= done.summary["seconds_in_rounds"] == total("seconds")


def test_a_client_is_given_the_backbone_once(config: Config, run: Callable[..., Run]) -> None:
    result = run(config.replace(peft="bias", rounds=4))
    backbone = 4 * (6 * 128 + 128 * 64)
    given = [line["setup_bytes"] for line in result.rounds]
    assert given[0] == 4 * backbone and all(g % backbone == 0 for g in given)
    assert 4 < sum(given) // backbone <= config.clients


@pytest.mark.slow
def test_a_cast_halves_the_bytes(done: Run, config: Config, run: Callable[..., Run]) -> None:
    """Each way by itself, and what is learned stays about the same."""
    whole = done.rounds[0]
    up = run(config.replace(rounds=1, codec_up="bfloat16")).rounds[0]
    assert (2 * up["bytes_up"], up["bytes_down"]) == (whole["bytes_up"], whole["bytes_down"])
    down = run(config.replace(rounds=1, codec_down="float16")).rounds[0]
    assert (down["bytes_up"], 2 * down["bytes_down"]) == (whole["bytes_up"], whole["bytes_down"])
    assert down["loss"] == pytest.approx(whole["loss"], rel=0.05)


BROKEN = """
import jax
import jax.numpy as jnp

import fedsim
from fedsim.algorithms.fed_avg import Server


def fed_broken(task, broken=()):
    plain = fedsim.fit(task.loss, task.optimizer, task.lr, task.passes)

    def finish(held, message, carry, client):
        reply, memory, metrics = plain.finish(held, message, carry, client)
        bad = jnp.isin(client.id, jnp.array((-1, *broken), jnp.int32))
        return jax.tree.map(lambda r: jnp.where(bad, r * jnp.float32(jnp.nan), r), reply), memory, metrics

    local, reduce = plain._replace(finish=finish), fedsim.mean(task.weight)

    def init(key, held):
        return Server(task.init(key), ())

    def round(key, held, server, cohort):
        change, info = cohort.exchange(server.params, local, reduce)
        return Server(jax.tree.map(jnp.add, server.params, change), ()), info.metrics

    return fedsim.Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x))
"""


@pytest.mark.slow
def test_replies_that_are_not_finite_are_left_out(config: Config, run: Callable[..., Run], tmp_path: Path) -> None:
    """As if their weight were zero, which a reply of zero change with everybody's weight would not be."""
    (tmp_path / "mine.py").write_text(BROKEN)
    everyone = config.replace(rounds=1, clients_per_round=8)
    result = run(everyone.replace(algorithm=f"{tmp_path}/mine.py:fed_broken(broken=(2, 5))"))
    assert (result.rounds[0]["nonfinite"], result.rounds[0]["reported"]) == (2, 8)
    assert result.rounds[0]["bytes_up"] == result.rounds[0]["bytes_down"], "they were sent all the same"
    assert all(np.isfinite(v).all() for v in result.parameters.values())
    problem = build.problem(everyone, SPEED)
    kept = np.delete(np.arange(8), [2, 5])
    rows = np.concatenate([problem.partition.client(i) for i in kept])
    offsets = np.concatenate([[0], np.cumsum(problem.partition.sizes * np.isin(np.arange(8), kept))])
    without = problem._replace(partition=problem.partition._replace(rows=rows, offsets=offsets))
    assert_close(run(everyone.replace(algorithm=f"{tmp_path}/mine.py:fed_broken()"), problem=without), result)


@pytest.mark.slow
def test_a_round_in_which_nobody_counts_changes_nothing(
    config: Config, run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    everyone = tuple(range(8))
    algorithm = f"{tmp_path}/mine.py:fed_broken(broken={everyone})"
    result = run(config.replace(algorithm=algorithm, rounds=1))
    assert (result.rounds[0]["nonfinite"], result.rounds[0]["reported"]) == (4, 4)
    assert result.rounds[0]["validation"] == result.summary["start"]["validation"]


def test_what_is_refused_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no arrays")
    for bad in ({"dataset": str(tmp_path / "bad.npz")}, {"algorithm": "fed_prox(mu=-1)"}):
        with pytest.raises(ValueError, match="Expected"):
            fedsim.run(config.replace(**bad), SPEED, out=tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_shared_problem_takes_the_run_s_own_speed(
    config: Config, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = trainers.trainer, []
    monkeypatch.setattr(trainers, "trainer", lambda *args: seen.append(made(*args)) or seen[-1])
    run(config.replace(rounds=1), Speed(lanes=3, devices=1), problem=build.problem(config, Speed(lanes=2, devices=1)))
    assert [trainer.engine.lanes for trainer in seen] == [3]


def test_a_used_folder_is_refused_before_the_data_are_read(done: Run, config: Config) -> None:
    with pytest.raises(ValueError, match="to hold no run"):
        fedsim.run(config.replace(dataset="missing.npz"), SPEED, out=done.directory, quiet=True)


def test_resume_takes_no_options(done: Run, config: Config) -> None:
    with pytest.raises(ValueError, match="Expected resume alone"):
        simulate.run(config, resume=done.directory)
    with pytest.raises(ValueError, match=r"Expected out=.* to hold no run; go on with it by --resume"):
        fedsim.run(config, SPEED, out=done.directory, quiet=True)


TRACED = """
import json
import sys
from collections import Counter

PACKAGES = ("jax", "flax", "optax", "orbax.checkpoint", "tensorflow_datasets", "numpy")
calls = {name: Counter() for name in PACKAGES}


def note(module, function):
    for name in PACKAGES:
        if module == name or module.startswith(name + "."):
            calls[name][function] += 1


def ours(frame):
    # inside a function of fedsim: what runs while a module is imported does not count
    return frame is not None and frame.f_globals.get("__name__", "").startswith("fedsim.") and (
        frame.f_code.co_name != "<module>"
    )


def profile(frame, event, arg):
    if event == "call" and ours(frame.f_back):
        note(frame.f_globals.get("__name__", ""), frame.f_code.co_name)
    elif event == "c_call" and ours(frame):
        note(getattr(arg, "__module__", None) or "", getattr(arg, "__name__", ""))


from fedsim.__main__ import main

sys.setprofile(profile)
status = main(sys.argv[1:])
sys.setprofile(None)
print("CALLS " + json.dumps({name: dict(found) for name, found in calls.items()}))
sys.exit(status)
"""


@pytest.mark.slow
def test_a_run_uses_all_six_core_dependencies(tmp_path: Path, environment: dict[str, str]) -> None:
    """One `fedsim run` from a prepared TFDS set; each library is called by fedsim's own functions, not only imported."""
    options = f"--dataset tfds:fedsim_quadrants --data-dir {FIXTURES} --backbone mlp --peft bias --clients 8"
    more = f"--clients-per-round 3 --rounds 2 --head-rounds 0 --no-head-baseline --quiet --out {tmp_path / 'run'}"
    command = [sys.executable, "-c", TRACED, "run", *options.split(), *more.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout.split("CALLS ")[1])
    for package, function in (
        ("jax", "device_put"),
        ("flax", "split"),
        ("optax", "apply_updates"),
        ("orbax.checkpoint", "save"),
        ("tensorflow_datasets", "__getitems__"),
        ("numpy", "lexsort"),
    ):
        assert calls[package].get(function), f"{package}: {calls[package]}"
    assert fedsim.load(tmp_path / "run").summary["rounds"] == 2


def diverging(**changes: Any) -> tuple[Config, Any]:
    """Softmax regression with a server's rate beyond float32: its parameters are NaN or infinite after round 1."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)).astype(np.float32), (np.arange(400) % 10 >= 9).astype(int)  # 90 % class 0
    options: dict[str, Any] = {
        "dataset": "arrays", "backbone": "linear", "peft": "head", "clients": 10, "clients_per_round": 5, "rounds": 3,
        "lr": 1e3, "min_size": 1, "server_lr": 1e37,
    }  # fmt: skip
    return Config(**{**options, **changes}), fedsim.arrays(x, y)


@pytest.mark.slow
def test_a_model_that_is_no_number_has_no_scores_and_reaches_no_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = diverging(target=0.8)
    run = fedsim.run(config, out=tmp_path / "run", data=data)
    summary = run.summary or {}
    assert summary["stopped"] == "rounds" and len(run.rounds) == 3 and summary["best"] is None
    assert set(summary["final"]["test"].values()) == {None}, "null by every metric"
    assert [set(line["validation"].values()) for line in run.rounds] == [{None}] * 3
    said = capsys.readouterr().out
    assert said.count("the model's outputs are not finite") == 1, "said while it runs, once"
    assert "could not be drawn" in said and "Traceback" not in said
    with pytest.raises(ValueError, match=r"Expected the outputs of the model of .* to be finite"):
        run.predict(np.zeros((2, 6), np.float32))


def test_a_round_without_a_finite_example_has_no_training_loss(tmp_path: Path) -> None:
    """Where nothing counted there is no mean, instead of 0."""
    config, data = diverging()
    run = fedsim.run(config, out=tmp_path / "run", data=data, quiet=True)
    assert run.rounds[0]["loss"] is not None, "the first round starts from finite parameters"
    assert [line["loss"] for line in run.rounds[1:]] == [None, None]
    assert [line["accuracy"] for line in run.rounds[1:]] == [None, None]


def test_a_picture_that_cannot_be_drawn_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsim.simulation import ending

    def broken(*args: Any) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(ending.plots, "save", broken)
    monkeypatch.setattr(ending, "draw_partition", broken)
    config, data = diverging(server_lr=1.0)
    run = fedsim.run(config, out=tmp_path / "run", data=data)
    assert run.summary is not None and run.parameters
    said = capsys.readouterr().out
    assert "the picture of the accuracy could not be drawn (no font)" in said and "of the partition" in said


def test_names_are_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Formulas, markup and escape codes in class names and folders end neither a run nor its table."""
    config, _ = diverging(server_lr=1.0)
    rng = np.random.default_rng(0)
    names = ["$x_$", "cls[/b]", "\x1b[31mred"]
    y = [names[i % 3] for i in range(300)]
    data = fedsim.arrays(rng.normal(size=(300, 6)).astype(np.float32), np.array(y))
    run = fedsim.run(config, out=tmp_path / "_$a_$[b]", data=data)
    assert {"accuracy_rounds.png", "accuracy_bytes.png"} <= {path.name for path in run.directory.glob("*.png")}
    other = run._replace(directory=tmp_path / "x[bold]")
    tables.print_comparison(run, other)
    said = capsys.readouterr().out
    assert "x[bold]" in said and "\x1b" not in said
    assert plots.overview([run, other], str(tmp_path / "both.png")).is_file()


def test_a_run_draws_and_exports_itself(tmp_path: Path) -> None:
    config, data = diverging(server_lr=1.0)
    run = fedsim.run(config, out=tmp_path / "run", data=data, quiet=True)
    assert [path.parent for path in run.plots(str(tmp_path / "pictures"))] == [tmp_path / "pictures"] * 2
    with pytest.raises(ValueError, match="Expected kind='lora' to be"):
        run.export("lora", tmp_path / "lora")  # type: ignore[arg-type] # what is refused
    assert fedsim.compare(str(run.directory), run.directory, run)["config"] == {}


@pytest.mark.slow
def test_a_run_of_a_text_backbone_exports_its_lora_and_the_merged_backbone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    ids = rng.integers(1000, 2000, (200, 8)).astype(np.int32)
    config = Config(
        dataset="arrays", backbone="bert_tiny", weights="random", tokens=8, peft="lora", rank=2, clients=4,
        clients_per_round=2, rounds=1, steps=1, min_size=2,
    )  # fmt: skip
    run = fedsim.run(config, SPEED, out=tmp_path / "run", quiet=True, data=fedsim.arrays(ids, y))
    assert run.export("peft", str(tmp_path / "lora")).name == "adapter_model.safetensors"
    assert run.export("merged", tmp_path / "merged").name == "model.safetensors"
    assert {"adapter_config.json", "head.safetensors"} & {path.name for path in (tmp_path / "lora").iterdir()}


def test_a_check_refuses_an_algorithm_whose_parameters_are_no_numbers() -> None:
    """Every comparison calls NaN equal to NaN."""

    def broken(task: Any) -> Any:
        made = fed_avg(task)
        return made._replace(params=lambda server: {k: v * np.nan for k, v in made.params(server).items()})

    with pytest.raises(AssertionError, match="the parameters are not finite in"):
        contract.check_structure(broken)
