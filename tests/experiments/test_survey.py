"""The survey's axes as pure functions, by hand and beside a run's own record; its rows, tables and picture."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import Config

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "experiments" / "results" / "survey_front_small.json"
MODULES = ("axes", "front", "efficiency", "counted", "methods")
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a file of the experiment, as its scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "survey"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def place_of(axes: Any, **changes: float) -> Any:
    usual = {"download": 20, "upload": 5, "latency": 50, "peak": 1e11, "reached": 0.3, "computing": 5, "sending": 2}
    return axes.Place(**{**usual, **changes})


def test_5_3_c_times_granularity_and_energy_are_their_formulas(here: Any) -> None:
    """T_comm = 2 latency + 8 down / download + 8 up / upload, T_comp = FLOPs / (peak MFU), G their ratio, J = W s of each."""
    axes = here("axes")
    found = axes.times(axes.Work(down=2.5e6, up=1.25e6, flops=6e10, steps=4), place_of(axes))
    assert found.communication == pytest.approx(0.1 + 1.0 + 2.0)
    assert found.computation == pytest.approx(2.0)
    assert found.granularity == pytest.approx(2.0 / 3.1)
    assert found.energy == pytest.approx(2 * 3.1 + 5 * 2.0)
    assert axes.mfu(3e10, 2.0, 1e11) == pytest.approx(0.15)
    nothing = axes.times(axes.Work(0, 0, 0, 4), place_of(axes))
    assert nothing.communication == pytest.approx(0.1) and nothing.computation < 1e-9


def test_5_5_bytes_and_times_are_additive_over_rounds(here: Any) -> None:
    """Two rounds at once are two rounds, but for the latency of one."""
    axes = here("axes")
    one, both = (axes.times(axes.Work(n * 1e6, n * 5e5, n * 1e9, n * 4), place_of(axes)) for n in (1, 2))
    assert both.communication == pytest.approx(2 * one.communication - 0.1)
    assert both.computation == pytest.approx(2 * one.computation)


@pytest.mark.parametrize("wrong", [{"upload": 0.0}, {"reached": 1.5}, {"peak": -1.0}])
def test_a_place_that_cannot_be_is_refused(here: Any, wrong: dict[str, float]) -> None:
    axes = here("axes")
    with pytest.raises(ValueError, match=r"positive numbers, and reached <= 1"):
        axes.times(axes.Work(1, 1, 1, 1), place_of(axes, **wrong))


@pytest.mark.slow
def test_5_3_c_a_run_with_the_same_place_records_the_same_times(
    here: Any, blobs: Callable[..., Path], tmp_path: Path
) -> None:
    """Of the record's bytes and FLOPs; `--compute` is the place's FLOP/s over those of a step."""
    axes = here("axes")
    config = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=6, clients_per_round=2, min_size=2, rounds=1,
        steps=3, validation=0.2, optimizer="sgd",
    )  # fmt: skip
    plain = fedsim.run(config, out=tmp_path / "plain", quiet=True).rounds[0]
    each = axes.Work(plain["bytes_down"] / 2, plain["bytes_up"] / 2, plain["flops"] / 2, 3)
    place = place_of(axes)
    found = axes.times(each, place)
    timed = config.replace(
        download="20", upload="5", latency="50", compute=repr(place.rate / (each.flops / each.steps))
    )
    line = fedsim.run(timed, out=tmp_path / "timed", quiet=True).rounds[0]["simulated"]
    assert line["communication_seconds"] == pytest.approx(found.communication)
    assert line["computation_seconds"] == pytest.approx(found.computation)
    assert line["granularity"] == pytest.approx(found.granularity)


def test_5_3_e_memory_is_weights_training_and_activations(here: Any) -> None:
    """e P_total, e P_train (1 + the optimizer's slots), and what the backward pass of a batch needs; without it nothing."""
    axes = here("axes")
    full = Config(dataset="digits", backbone="vit_tiny", weights="random", image_size=16, peft="full", optimizer="adam")
    parts, head = axes.memory(full, 10), axes.memory(full.replace(peft="head"), 10)
    count = axes.cost.count(axes.peft.parameters(axes.cost.split(full, 10, None)))
    trained = axes.cost.count(axes.cost.split(full.replace(peft="head"), 10, None).trained)
    assert parts.weights == head.weights == 4 * count
    assert (parts.training, head.training) == (3 * 4 * count, 3 * 4 * trained)
    assert axes.memory(full.replace(optimizer="sgd"), 10).training == 4 * count
    assert 0 < head.activations < parts.activations / 20
    assert axes.memory(full.replace(batch_size=16), 10).activations == 2 * parts.activations
    assert axes.memory(full, 10, gradients=False) == (4 * count, 4 * count, 0)
    assert parts.total == sum(parts)


def test_5_4_bytes_of_the_peft_kinds_are_their_formulas(here: Any) -> None:
    """e = 4 bytes, L blocks of width d, C classes, MLPs of width f; the head travels with all of them."""
    counted = here("counted")
    d, depth, f, classes, r, b, t = 384, 12, 1536, counted.CLASSES, 4, 8, 4
    head = 4 * (d + 1) * classes
    upper = {**counted.front.LORA}
    formulas = {
        "head": ({"peft": "head"}, head),
        "LoRA": (upper, 4 * r * 4 * (d + d) + head),
        "FFA-LoRA": ({**upper, "peft": "ffa_lora", "algorithm": "ffa_lora"}, 4 * r * 4 * d + head),
        "adapter": ({"peft": "adapter", "adapter_width": b}, 4 * depth * (2 * d * b + b + d) + head),
        "prompt": ({"peft": "prompt", "prompt_tokens": t}, 4 * depth * t * d + head),
        "prefix": ({"peft": "prefix", "prefix_tokens": t}, 4 * 2 * depth * t * d + head),
        "IA3": ({"peft": "ia3"}, 4 * depth * (d + d + f) + head),
    }
    for name, (options, nbytes) in formulas.items():
        found = counted.row("kind", name, counted.front.base.replace(**options))
        assert (found["up"], found["down"]) == (nbytes, nbytes), name


def test_what_cannot_be_priced_on_this_task_says_so(here: Any) -> None:
    counted = here("counted")
    found = counted.row("algorithm", "fed_kseed", counted.front.base.replace(algorithm="fed_kseed"))
    assert "--optimizer sgd" in found["refused"]
    assert counted.part_table("algorithms", [found]).row_count == 1


def test_the_front_is_what_no_other_point_beats(here: Any) -> None:
    axes = here("axes")
    assert axes.front([(3, 0.6), (1, 0.5), (2, 0.4), (2, 0.6), (1, 0.4), (9, 0.61)]) == [1, 3, 5]
    assert axes.front([(1, 0.5)]) == [0] and axes.front([]) == []


def row(**changes: Any) -> dict[str, Any]:
    """A row as it is kept."""
    usual = {
        "method": "full", "family": "full model", "scores": [0.75], "rate": 0.003, "at_the_edge": True, "parameters": 100,
        "total": 1000, "up": 400.0, "down": 400.0, "flops": 2e9, "memory": {"weights": 4000, "training": 800, "activations": 48},
        "steps": 4, "mfu": 0.25, "rounds_to_target": 6, "bytes_to_target": 2048, "bytes": 4096.0,
    }  # fmt: skip
    return usual | changes


def test_the_tables_say_what_is_measured_and_what_is_given(here: Any, tmp_path: Path) -> None:
    rows = here("efficiency")
    other = row(
        method="FedKSeed, head", family="seeds", rounds_to_target=None, bytes_to_target=None, up=32.0, bytes=64.0
    )
    found = {"rows": [row(), other], "target": 0.5}
    lines = rows.measured(found).splitlines()
    numbers = "0.750 | 0.003 (edge) | 10.000% | 400 B | 400 B | 10.0x | 2 | 4.73 KiB | 4 | 0.25 | 6 | 2.00 KiB | 24"
    assert lines[2] == f"| full | full model | {numbers} |"
    assert lines[3].endswith("| – | – | – |")
    given = rows.given(found).splitlines()
    assert len(given) == 4 and given[0].count("T_comm") == len(rows.PLACES)
    phone = rows.PLACES["phone"]
    one = rows.axes.times(rows.Work(400, 400, 2e9, 4), phone)
    assert (
        f"| full | {rows.short(one.communication)} | {rows.short(one.computation)} | {rows.number(one.granularity)} |"
        in given[2]
    )
    assert rows.draw(found, tmp_path / "front.png").stat().st_size > 10_000


def test_names_of_near_points_do_not_lie_on_one_another(here: Any) -> None:
    from matplotlib.figure import Figure

    rows, figure = here("efficiency"), Figure()
    axis = figure.subplots()
    axis.scatter([1, 1, 1, 2], [0.1, 0.5, 0.501, 0.9])
    rows.label(figure, axis, [(1, 0.501, "c"), (1, 0.1, "a"), (1, 0.5, "b"), (2, 0.9, "d")])
    heights = {t.get_text(): axis.transData.transform(t.xy)[1] * 72 / figure.dpi + t.xyann[1] for t in axis.texts}
    assert sorted(heights, key=heights.__getitem__) == ["a", "b", "c", "d"]
    assert heights["c"] - heights["b"] == pytest.approx(10)
    assert axis.texts[0].xyann == pytest.approx((-7, 3))  # where there is room, a name stays beside its point


def test_every_method_has_a_family_and_a_colour(here: Any) -> None:
    front, rows = here("front"), here("efficiency")
    assert list(front.FAMILIES) == list(front.methods())
    assert set(front.FAMILIES.values()) == set(rows.COLOURS)


def test_what_is_kept_is_whole_and_the_page_prints_it(here: Any) -> None:
    front, rows = here("front"), here("efficiency")
    found = json.loads(KEPT.read_text())
    assert [one["method"] for one in found["rows"]] == list(front.FAMILIES)
    assert found["target"] == front.TARGET and not any("+" in commit for commit in found["git"])
    assert all(math.isfinite(one[name]) for one in found["rows"] for name in ("up", "down", "flops", "mfu", "bytes"))
    page = (ROOT / "docs" / "efficiency.md").read_text(encoding="utf-8")
    for part in (rows.measured(found), rows.given(found)):
        assert part in page
    least = min(found["rows"], key=lambda one: one["up"])
    assert least["family"] == "seeds"


@pytest.mark.slow
def test_everything_is_counted(here: Any) -> None:
    """All kinds, codecs and algorithms; none costs more than the whole model's bytes, seeds cost the least of what learns."""
    counted = here("counted")
    found = counted.rows()
    assert [one["name"] for one in found if one["part"] == "kind"] == list(counted.KINDS)
    assert [one["name"] for one in found if one["part"] == "algorithm"] == list(counted.ALGORITHMS)
    priced = [one for one in found if "refused" not in one]
    assert all(one["up"] + one["down"] <= 2 * 4 * 22_060_042 for one in priced)
    assert {one["name"] for one in found if "refused" in one} <= {"fed_et", "fed_sp"}  # several architectures; language
    assert len(counted.tables(found)) == 3


@pytest.mark.slow
def test_the_little_sweep_gives_rows(here: Any, tmp_path: Path) -> None:
    """Bytes of a client by the formula, FLOPs and memory of three kinds, the target reached by who reaches it."""
    front, rows = here("front"), here("efficiency")
    study = fedsim.sweep(replace(front.little), out=tmp_path / "little")
    found = rows.result(study, target=0.0, peak=1e12)
    full, head, kseed = found["rows"]
    assert full["up"] == full["down"] == 4 * full["parameters"] == 4 * full["total"]
    assert head["up"] == head["down"] == 4 * head["parameters"] < full["up"] / 10
    assert kseed["down"] == 4 * 16 and 8 <= kseed["up"] <= 8 * 4
    assert full["flops"] > head["flops"] and kseed["memory"]["activations"] == 0 < head["memory"]["activations"]
    assert {one["rounds_to_target"] for one in found["rows"]} == {2} and full["mfu"] == full["flops_per_second"] / 1e12
    assert rows.table(found).count("\n") == 2 * 5
