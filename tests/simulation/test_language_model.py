"""A federated language model from texts to its record: perplexity falls, ends the run, is compared, resumed, and per client."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import record
from fedsim.config import Config, Speed
from fedsim.core import Batch
from fedsim.report import tables
from fedsim.simulation import build, trainers

SPEED = Speed(devices=1, lanes=2, checkpoint_every=2)
PHRASES = ("the cat sat on the mat", "a dog ran in the park", "one bird flew to the tree")

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of three kinds, of one to three phrases: after a few words the next one is known."""
    rng = np.random.default_rng(0)
    rows = [(k, " ".join([PHRASES[k]] * rng.integers(1, 4))) for k in rng.integers(0, 3, 150).tolist()]
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    file.write_text("text,label\n" + "".join(f"{text},kind {k}\n" for k, text in rows))
    return file


@pytest.fixture(scope="module")
def config(texts: Path) -> Config:
    return Config(
        task="language_model", backbone="decoder_tiny", dataset=str(texts), tokens=20, peft="full", optimizer="adam",
        lr=0.01, clients=6, clients_per_round=3, rounds=4, steps=4, batch_size=8, min_size=4, alpha=0.5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> fedsim.Run:
    """The run that the others are compared with, with tests of each client's own."""
    tested = config.replace(local_test=0.3, personal_epochs=1)
    return fedsim.run(tested, SPEED, out=tmp_path_factory.mktemp("whole") / "run", quiet=True)


def perplexities(run: fedsim.Run) -> list[float]:
    return [line["validation"]["perplexity"] for line in run.rounds if line["validation"]]


def test_perplexity_falls_and_is_told_everywhere(whole: fedsim.Run) -> None:
    summary, seen = whole.summary or {}, perplexities(whole)
    start = summary["start"]["validation"]
    assert 300 < start["perplexity"] < 700, "of about 512 tokens, all alike at the start"
    assert seen[-1] < 0.25 * start["perplexity"] and seen[-1] == summary["final"]["validation"]["perplexity"]
    for scores in (*(line["validation"] for line in whole.rounds), summary["final"]["test"], *whole.rounds):
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"])) and 0 <= scores["accuracy"] <= 1
    for name in ("macro_f1", "balanced_accuracy", "top5", "auroc"):
        assert name not in summary["final"]["test"], "the labels are the partition's"
    assert summary["metric"] == "perplexity"
    assert summary["best"] == {"round": 1 + int(np.argmin(seen)), "perplexity": min(seen)}
    files = {file.name for file in whole.directory.iterdir()}
    assert {"perplexity_rounds.png", "perplexity_bytes.png", "perplexity_clients.png"} <= files
    assert list(whole.table()["validation_perplexity"]) == seen


def test_padding_without_a_token_is_no_part_of_a_loss(config: Config) -> None:
    """GPT-2's padding is -1: it is not asked for, and nothing of a text is taken for it."""
    gpt2 = config.replace(backbone="gpt2_tiny", tokens=24)
    problem = build.problem(gpt2, SPEED)
    ids = problem.dataset.x[:20]
    assert ids.min() == -1 and (ids == 0).sum() == len(ids), "0 is [CLS], at the beginning of each text"
    task = trainers.trainer(problem, build.phases(gpt2)[0]).task
    logits = np.random.default_rng(0).normal(size=(*ids.shape, 512)).astype(np.float32)
    found, metrics = task.criterion(logits, Batch(ids, np.zeros(20, np.int32), np.ones(20, np.float32), None, 0, True))
    now = ids[:, 1:]
    said = np.take_along_axis(logits[:, :-1], np.maximum(now, 0)[..., None], 2)[..., 0]
    losses = np.log(np.exp(logits[:, :-1]).sum(-1)) - said
    assert metrics["weight"] == (now >= 0).sum()
    assert found == pytest.approx(losses[now >= 0].mean(), rel=1e-4)


def test_each_client_has_scores_by_name(whole: fedsim.Run) -> None:
    rows, summary = whole.clients(), (whole.summary or {})["final"]["clients"]
    assert len(rows) == 6 and set(rows[0]) == {"client", "train", "test", "loss", "accuracy", "perplexity"}
    for kind in ("global", "tuned"):
        of_clients = [row["perplexity"][kind] for row in rows]
        assert of_clients == pytest.approx([math.exp(row["loss"][kind]) for row in rows])
        assert summary[kind]["worst"] == max(of_clients) and summary[kind]["best"] == min(of_clients)
    assert summary["tuned"]["mean"] < summary["global"]["mean"], "a client's own texts are of few kinds"


def test_labels_are_spread_and_not_learned(config: Config) -> None:
    """Dirichlet by label works; the task has no classes; a class that nobody trains on is no matter of a warning."""
    problem = build.problem(config.replace(alpha=0.05), SPEED)
    mixed = [len(set(problem.dataset.y[problem.partition.client(k)])) for k in range(6)]
    assert len(problem.dataset.classes) == 3 and min(mixed) < 3
    task = trainers.trainer(problem, build.phases(config)[0]).task
    assert (task.classes, task.metric, task.larger) == (0, "perplexity", False)
    assert task.features is not None and task.blocks("blocks/1/mlp/up/kernel") == 1
    found = task.features({}, task.init(None), problem.dataset.x[:3])  # pyrefly: ignore[bad-argument-type] - no key is read
    assert found.shape == (*problem.dataset.x[:3].shape, 64)


@pytest.mark.slow
def test_a_target_is_reached_from_above_and_patience_waits_for_less(
    config: Config, whole: fedsim.Run, tmp_path: Path
) -> None:
    seen = perplexities(whole)
    goal = 0.5 * (seen[0] + seen[1])
    run = fedsim.run(config.replace(target=goal, rounds=20), SPEED, out=tmp_path / "target", quiet=True)
    found = perplexities(run)
    assert (run.summary or {})["stopped"] == "target" and len(found) < 20
    assert found[-1] <= goal and all(value > goal for value in found[:-1])
    still = fedsim.run(config.replace(lr=1e-12, patience=2, rounds=20), SPEED, out=tmp_path / "still", quiet=True)
    assert (still.summary or {})["stopped"] == "patience" and len(still.rounds) <= 5


@pytest.mark.slow
def test_other_scores_may_judge(config: Config, tmp_path: Path) -> None:
    run = fedsim.run(config.replace(metric="accuracy", target=0.2, rounds=20), SPEED, out=tmp_path / "run", quiet=True)
    assert (run.summary or {})["stopped"] == "target" and run.rounds[-1]["validation"]["accuracy"] >= 0.2
    assert (run.directory / "accuracy_rounds.png").exists() and "accuracy" in (run.summary or {})["best"]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(whole: fedsim.Run, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.directory, stopped)
    shutil.rmtree(stopped / record.CHECKPOINTS / "4")
    (stopped / record.SUMMARY).unlink()
    again = fedsim.run(resume=stopped, quiet=True)
    times = {
        "seconds",
        "compile_seconds",
        "clients_per_second",
        "examples_per_second",
        "flops_per_second",
        "most_memory",
    }
    for a, b in zip(again.rounds, whole.rounds, strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}
    assert again.clients() == whole.clients()
    name = "trained.safetensors"
    assert (stopped / name).read_bytes() == (whole.directory / name).read_bytes()


@pytest.mark.slow
def test_two_runs_are_compared_by_perplexity(config: Config, whole: fedsim.Run, tmp_path: Path, capsys: Any) -> None:
    """LoRA in the upper block trains from kept features, which hold the ids that its loss needs."""
    lora = config.replace(peft="lora", rank=2, targets=("blocks/1/*",), rounds=2, lr=0.02)
    other = fedsim.run(lora, SPEED, out=tmp_path / "lora", quiet=True)
    assert perplexities(other)[-1] < (other.summary or {})["start"]["validation"]["perplexity"]
    plain = fedsim.run(lora, Speed(devices=1, lanes=2, cache="off"), out=tmp_path / "plain", quiet=True)
    assert perplexities(plain) == pytest.approx(perplexities(other), rel=1e-4)
    found = tables.print_comparison(whole, other)
    finals = tuple((run.summary or {})["final"]["test"]["perplexity"] for run in (whole, other))
    assert found["results"]["test perplexity"] == finals
    assert f"{finals[1] - finals[0]:+.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_of_two_tasks_are_compared_by_both_metrics(config: Config, whole: fedsim.Run, tmp_path: Path) -> None:
    classes = config.replace(task="classification", peft="head", rounds=1)
    other = fedsim.run(classes, SPEED, out=tmp_path / "classes", quiet=True)
    results = fedsim.compare(whole, other)["results"]
    assert results["test perplexity"][1] is None and results["test accuracy"][0] is None
    assert results["test accuracy"][1] == (other.summary or {})["final"]["test"]["accuracy"]


def test_what_a_language_model_cannot_is_refused(config: Config, whole: fedsim.Run, texts: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected task='classification' of .* to answer with classes"):
        whole.predict(["the cat"])
    with pytest.raises(ValueError, match="peft='head' of backbone='decoder_tiny' to have a head"):
        build.check(config.replace(peft="lora", head_rounds=1))
    with pytest.raises(ValueError, match="backbone='bert_tiny' to be a decoder"):
        build.check(config.replace(backbone="bert_tiny", weights="random"))
    with pytest.raises(ValueError, match=r"metric='top5' to be one of perplexity, loss, accuracy"):
        config.replace(metric="top5")
    classes = config.replace(task="classification", peft="head")
    for metric, rule in (("top5", "more than 5 classes, not 3"), ("auroc", "two classes, not 3")):
        with pytest.raises(ValueError, match=rf"metric='{metric}' with {rule}; take one of accuracy"):
            build.problem(classes.replace(metric=metric), SPEED)


@pytest.mark.slow
def test_a_decoder_classifies_too(config: Config, tmp_path: Path) -> None:
    classes = config.replace(task="classification", rounds=6, partition="iid", lr=3e-3)
    run = fedsim.run(classes, SPEED, out=tmp_path / "run", quiet=True)
    assert (run.summary or {})["final"]["test"]["accuracy"] > 0.9
    assert run.predict(["the cat sat", "a dog ran"]) == ["kind 0", "kind 1"]


@pytest.mark.slow
def test_progress_names_the_metric(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fedsim.run(config.replace(rounds=1), SPEED, out=tmp_path / "run")
    tables.print_summary(run.summary or {})
    said = capsys.readouterr().out
    assert "train and valid are the perplexity" in said and said.count("perplexity") == 2
    assert f"{perplexities(run)[0]:.1f}" in said
    assert json.loads((run.directory / record.SUMMARY).read_text())["metric"] == "perplexity"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "last_k"])
def test_a_loss_may_be_about_some_tokens_alone(config: Config, tmp_path: Path, kind: str) -> None:
    """Texts and masks through the whole run, from kept features too: only what is asked is learned and scored."""
    speed = Speed(devices=1, lanes=2, length_buckets=1)
    problem = build.problem(config.replace(peft=kind, rounds=3), speed)
    ids = problem.dataset.x
    masked = {"ids": ids, "loss": (np.arange(ids.shape[1]) < 6) * np.ones(ids.shape, np.float32)}
    run = fedsim.run(
        problem.config, speed, out=tmp_path / "run", quiet=True,
        problem=problem._replace(dataset=problem.dataset._replace(x=masked), cache={}),
    )  # fmt: skip
    plain = fedsim.run(problem.config, speed, out=tmp_path / "plain", quiet=True, problem=problem)
    assert run.rounds[-1]["validation"]["loss"] < (run.summary or {})["start"]["validation"]["loss"]
    model = trainers.trainer(problem, build.phases(problem.config)[0]).model
    frozen = build.peft.start(model, "random", problem.config.seed)[1]
    logits = np.asarray(model.apply(run.parameters, frozen, ids[problem.dataset.test]), np.float64)[:, :5]
    now = ids[problem.dataset.test][:, 1:6]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, now[..., None], 2)[..., 0]
    assert (run.summary or {})["final"]["test"]["loss"] == pytest.approx(losses[now > 0].mean(), rel=1e-4)
    assert plain.parameters.keys() == run.parameters.keys() and plain.rounds[0]["loss"] != run.rounds[0]["loss"]


@pytest.mark.slow
def test_pairs_are_learned_by_their_answers(config: Config, tmp_path: Path) -> None:
    """What a prompt is cannot be known, what its completion is can be learned: only the latter is scored."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"{rng.integers(10**6)} ", "completion": "so be it"} for _ in range(120)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = config.replace(dataset=str(file), turns="plain", rounds=3, partition="iid")
    problem = build.problem(talks, SPEED)
    run = fedsim.run(talks, SPEED, out=tmp_path / "run", quiet=True, problem=problem)
    assert (run.summary or {})["final"]["test"]["perplexity"] < 1.5
    x = build.problem(talks.replace(loss_on="all"), SPEED).dataset.x
    np.testing.assert_array_equal(x["loss"], x["ids"] > 0)
    assert problem.dataset.x["loss"].sum() < 0.7 * x["loss"].sum()
