"""A round that is not trained sends what a trained one sends, and shows what does not fit before anything has run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fedsim
from fedsim import record
from fedsim.cli.estimate import dry_run
from fedsim.config import Config, Speed
from fedsim.engine import lanes as lanes_module
from fedsim.simulation import build, prices, rehearsal, trainers
from fedsim.simulation.rehearsal import Rehearsal, rehearse

pytestmark = pytest.mark.usefixtures("compile_once")
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)


@pytest.fixture
def config(blobs: Callable[..., Path], tmp_path: Path) -> Config:
    return Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=8, clients_per_round=8, rounds=2, head_rounds=1,
        optimizer="sgd", lr=0.05, min_size=3,
    )  # fmt: skip


def rehearsed(config: Config, speed: Speed = SPEED) -> list[Rehearsal]:
    problem = build.problem(config, speed)
    return [rehearse(problem, phase, np.arange(8)) for phase in build.phases(config)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"codec_up": "float16"}, id="codec", marks=pytest.mark.slow),
        pytest.param({"algorithm": "fed_sa_lora", "head_rounds": 0}, id="clients keep B"),
        pytest.param({"algorithm": "fed_ex_lora", "head_rounds": 0}, id="another message", marks=pytest.mark.slow),
        pytest.param({"algorithm": "flora(ranks=[2, 8])", "head_rounds": 0}, id="stacked", marks=pytest.mark.slow),
        pytest.param({"algorithm": "het_lora(ranks=[8, 4])", "head_rounds": 0}, id="ranks", marks=pytest.mark.slow),
    ],
)
def test_it_sends_what_a_trained_round_sends(config: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "algorithm" in changes:
        x = np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3)).astype(np.uint8)
        np.savez(tmp_path / "images.npz", x=x, y=np.arange(64) % 2)
        changes |= {
            "dataset": str(tmp_path / "images.npz"),
            "backbone": "vit_tiny",
            "weights": "random",
            "peft": "lora",
        }
    config = dataclasses.replace(config, **changes)
    phases = build.phases(config)
    run = fedsim.run(config, SPEED, out=tmp_path / "run", quiet=True)
    parts, problem = rehearsed(config), build.problem(config, SPEED)
    shape, dtype = trainers.example(problem)
    example = jax.ShapeDtypeStruct(shape, dtype)
    for part, phase in zip(parts, phases, strict=True):
        line = run.rounds[phase.last - 1]  # of the rules, the second round: the first has no stack to send yet
        ranks = "ranks" in config.algorithm  # of which a rehearsal counts the padded leaves
        assert 8 * part.down == line["bytes_down"]
        assert 8 * part.up > line["bytes_up"] if ranks else 8 * part.up == line["bytes_up"]
        found = prices.of_phase(
            phase, build.split_model(phase.config, problem.dataset), example, problem.partition.sizes
        )
        for way, each in (("down", found.leaves.down), ("up", found.leaves.up)):
            assert {name: nbytes.sum() for name, nbytes in each.items()} == line[f"bytes_{way}_leaves"]
        assert (found.down.together, found.up.together) == (line["bytes_down"], line["bytes_up"])
        assert len(found.ids) == 8 and found.up.certainty == "exact"
    assert run.rounds[0]["setup_bytes"] == 8 * parts[0].setup
    assert parts[-1].flops == run.rounds[-1]["flops"]


@pytest.mark.slow
def test_lanes_that_do_not_fit_in_a_phase_are_refused_before_the_first(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head, full = (part.need.lanes for part in rehearsed(config))
    assert head < full
    monkeypatch.setattr(rehearsal, "LONG", 0)
    appended: list[int] = []
    append = record.append
    monkeypatch.setattr(record, "append", lambda folder, line: (appended.append(line["round"]), append(folder, line)))
    for free in (int(0.9 * head), int(head + full) // 2):
        monkeypatch.setattr(lanes_module, "free_memory", lambda device, sharing, free=free: free)
        with pytest.raises(
            ValueError, match=r"Expected lanes=2 with batch_size=\d+ to fit .* lower --lanes to about 1"
        ):
            fedsim.run(config, SPEED, out=tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="Expected lanes=2"):
        dry_run(config, SPEED)
    assert appended == [] and not (tmp_path / "run").exists()
    auto = dataclasses.replace(SPEED, lanes="auto")
    assert [phase.lanes for phase in dry_run(config, auto)] != [2, 2], "nobody asked for them: fewer are taken"
    assert "each device" not in capsys.readouterr().out
    fedsim.run(config, auto, out=tmp_path / "run", quiet=True)  # into the same folder
    assert appended == [1, 2]


@pytest.mark.slow
def test_a_batch_too_large_for_one_lane_is_refused_before_the_first_phase(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for lanes; it is compiled to know where a generous bound says that it may not fit, and only there."""
    one = dataclasses.replace(SPEED, lanes=1)
    need = rehearsed(config, one)[1].need.lanes
    looked: list[str] = []
    real = rehearsal.rehearse
    monkeypatch.setattr(
        rehearsal, "rehearse", lambda problem, phase, ids: (looked.append(phase.name), real(problem, phase, ids))
    )
    monkeypatch.setattr(rehearsal, "LONG", 0)
    free = int(0.9 * need)
    for module in (lanes_module, rehearsal):
        monkeypatch.setattr(module, "free_memory", lambda device, sharing: free)
    auto = dataclasses.replace(SPEED, lanes="auto")
    with pytest.raises(ValueError, match=r"Expected lanes=1 with batch_size=\d+ to fit .* lower batch_size=\d+, or"):
        fedsim.run(config, auto, out=tmp_path / "run", quiet=True)
    assert looked[-1] == "peft" and not (tmp_path / "run").exists()
    free, looked[:] = 2**40, []
    fedsim.run(config, auto, out=tmp_path / "run", quiet=True)
    assert not looked, "far from the limit nothing is compiled twice"


@pytest.mark.slow
def test_a_codec_that_keeps_something_can_be_rehearsed(config: Config, tmp_path: Path) -> None:
    """What it keeps at clients is brought to the host after an exchange, as in a real one."""
    owing = config.replace(codec_up="topk(0.1)", head_rounds=0)
    (found,), run = dry_run(owing, SPEED), fedsim.run(owing, SPEED, out=tmp_path / "run", quiet=True)
    assert found.up.certainty == "at most" and found.up.together >= run.rounds[1]["bytes_up"] > 0
    assert found.down.together == run.rounds[1]["bytes_down"]


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "certainty"), [("powersgd(2)", "exact"), ("topk(0.1)", "at most")])
def test_a_message_of_changes_can_be_rehearsed(config: Config, tmp_path: Path, codec: str, certainty: str) -> None:
    """Each phase's second round, in which the first change travels."""
    changes = config.replace(codec_down=codec, rounds=4, head_rounds=2)
    found, run = dry_run(changes, SPEED), fedsim.run(changes, SPEED, out=tmp_path / "run", quiet=True)
    down = [line["bytes_down"] for line in run.rounds]
    assert down[2] > 2 * down[3], "the first message of a phase travels whole"
    for phase, (whole, change) in zip(found, (down[:2], down[2:]), strict=True):
        assert phase.down.certainty == certainty or phase.down.together == change
        assert change <= phase.down.together <= change + 8 * 16
        assert whole + change <= phase.down.over(2) <= whole + change + 8 * 16, "all rounds, the whole message counted"


# --- several architectures


GROUPS = (
    "small(backbone='mlp', peft='head', share=0.25)", "large(backbone='mlp', peft='full', share=0.75)",
    "server(backbone='mlp', peft='bias')",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "certainty"),
    [
        ({}, "exact"),
        ({"codec_up": "quantise(8)", "codec_down": "float16"}, "exact"),
        ({"codec_up": "topk(0.2)"}, "at most"),
    ],
)
def test_a_round_of_groups_sends_what_the_dry_run_says(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], certainty: str
) -> None:
    """Bytes by leaf and in all, the set-up of those who are met, and FLOPs, of rounds of two groups and a server's own model."""
    toys = Path(__file__).parents[1] / "algorithms" / "toys.py"
    several = config.replace(
        algorithm=f"{toys}:by_group", groups=GROUPS, head_rounds=0, clients_per_round=4, rounds=3, **changes
    )
    run = fedsim.run(several, SPEED, out=tmp_path / "run", quiet=True)
    (found,) = dry_run(several, SPEED)
    said = capsys.readouterr().out
    assert "small: head on mlp (25% of the clients)" in said and "server: bias on mlp (the server's)" in said
    assert found.members == 4 and found.lanes == {"small": 2, "large": 2}
    problem, (phase,) = build.problem(several, SPEED), build.phases(several)
    models = prices.models_of(several, lambda one: build.split_model(one, problem.dataset))
    shape, dtype = trainers.example(problem)
    priced = prices.of_phase(phase, models, jax.ShapeDtypeStruct(shape, dtype), problem.partition.sizes)
    line = run.rounds[0]  # in round 2 others are there, who are as many of each group
    assert line["bytes_down"] == run.rounds[1]["bytes_down"] == found.down.together == priced.down.together
    assert {k: v.sum() for k, v in priced.leaves.down.items()} == line["bytes_down_leaves"]
    assert found.up.certainty == priced.up.certainty == certainty and found.down.certainty == "exact"
    if certainty == "exact":
        assert line["bytes_up"] == found.up.together
        assert {k: v.sum() for k, v in priced.leaves.up.items()} == line["bytes_up_leaves"]
    else:
        assert found.up.together / 2 < line["bytes_up"] <= found.up.together
    assert line["setup_bytes"] == sum(priced.setup[name] * len(ids) for name, ids in priced.cohorts.items())
    assert found.flops * sum(problem.partition.sizes[priced.ids]) == pytest.approx(
        rehearse(problem, phase, priced.cohorts).flops
    )
    assert len(priced.up.words()) and (found.up.least, found.up.most) == (priced.up.least, priced.up.most)
    assert found.up.least < found.up.mean < found.up.most, "the groups' messages differ"
