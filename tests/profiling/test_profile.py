"""`fedsim profile`: the pieces of a round, memory by part, the sweep, the recommendation, the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fedsim.config import Config, Speed
from fedsim.core import Passes
from fedsim.engine import peaks
from fedsim.engine import plan as planning
from fedsim.profiling import profile
from fedsim.profiling import report as profile_report
from fedsim.profiling import rounds as profile_round
from fedsim.simulation import build, current


@pytest.fixture
def config(blobs: Callable[..., Path], tmp_path: Path) -> Config:
    return Config(
        dataset=str(blobs(tmp_path)),
        backbone="mlp",
        peft="full",
        clients=12,
        clients_per_round=6,
        rounds=2,
        batch_size=4,
    )


@pytest.mark.slow
def test_a_profile_adds_up_and_is_written(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    speed = Speed(lanes=2, devices=1, compilation_cache=False)
    out = tmp_path / "out"
    result = profile.profile(config, speed, out, sweep=("lanes=1,3",), repeats=2, trace=False)
    seconds, base = result["seconds"], result["base"]
    assert seconds["forward"] + seconds["backward"] + seconds["update"] == pytest.approx(seconds["segments"])
    assert min(seconds[name] for name in ("plan", "gather", "begin", "segments", "fold", "host", "forward")) > 0
    assert seconds["backward"] >= 0 and seconds["update"] >= -1e-9
    assert base["lanes"] == 2 and base["examples"] > 0
    assert base["flops_per_second"] == pytest.approx(base["examples_per_second"] * sum(result["flops"].values()))
    assert base["mfu"] == pytest.approx(base["flops_per_second"] / result["peak"]["float32"])
    assert [row["changes"] for row in result["sweep"]] == [{"lanes": 1}, {"lanes": 3}]
    assert {row["lanes"] for row in result["sweep"]} == {1, 3}
    assert all(row["examples"] == base["examples"] for row in result["sweep"])
    trained = 4 * (base["lanes"] * 1)  # at least one float a lane
    assert result["memory"]["lanes (trained, optimizer)"] > trained
    assert result["memory"]["examples"] == 240 * (6 * 4 + 4)
    written = json.loads((out / "profile.json").read_text())
    assert written["seconds"] == seconds
    for name in ("profile.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for part in ("a round, piece by piece", "memory of a device", "one option at a time", "recommended", "lanes=3"):
        assert part in shown


def test_a_profile_leaves_the_engine_as_it_was(config: Config) -> None:
    problem = build.problem(config, Speed(lanes=2, compilation_cache=False))
    now = current.prepare(problem, build.phases(config)[-1], None)
    engine, make = now.trainer.engine, profile_round.planning.make
    with profile_round.stopwatch(engine) as seen:
        profile_round.run_round(now)
    assert set(seen.spent) == {"plan", "gather", "begin", "segments", "fold"}
    assert "programs" not in vars(engine) and "gather" not in vars(engine) and profile_round.planning.make is make


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lane=1", "did you mean lanes"),
        ("lanes", "write lanes=1,2,4"),
        ("lanes=0", "lanes=0 > 0"),
        ("rank=2", "'rank'"),
    ],
)
def test_a_bad_sweep_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        profile.parse_sweep([text])


def test_values_of_a_sweep() -> None:
    found = profile.parse_sweep(["lanes=1,2", "parallel=pmap", "batch_size=8"])
    assert found == {"lanes": (1, 2), "parallel": ("pmap",), "batch_size": (8,)}


def test_a_cpu_is_divided_into_as_many_devices_as_any_setting_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(profile, "divide_cpu", lambda devices: asked.append(devices) or True)
    monkeypatch.setattr(profile, "cpu_devices", lambda: 2)
    assert profile.divided(Speed(), {"devices": (1, 4)}) == Speed(devices=2), "as set, it is what it would be"
    assert profile.divided(Speed(devices=1), {"devices": (1, 2)}) == Speed(devices=1)
    assert profile.divided(Speed(), {}) == Speed()
    assert asked == [4, 2, 2]


def row(name: str, value: object, rate: float) -> dict:
    return {"changes": {name: value}, "examples_per_second": rate}


def test_only_clear_gains_of_speed_are_recommended() -> None:
    base, asked = {"examples_per_second": 100.0}, []

    def confirm(rate: float) -> Callable[[dict], dict]:
        return lambda changes: asked.append(changes) or {"examples_per_second": rate}

    rows = [row("lanes", 2, 104.0), row("batch_size", 64, 300.0), {"changes": {"devices": 2}, "error": "too large"}]
    assert profile.recommend(base, rows, confirm(0)) == {}
    rows += [row("lanes", 4, 120.0), row("lanes", 8, 130.0)]
    assert profile.recommend(base, rows, confirm(0)) == {"lanes": 8} and not asked
    rows += [row("parallel", "pmap", 110.0)]
    assert profile.recommend(base, rows, confirm(150.0)) == {"lanes": 8, "parallel": "pmap"}
    assert profile.recommend(base, rows, confirm(125.0)) == {"lanes": 8}
    assert asked == [{"lanes": 8, "parallel": "pmap"}] * 2


def test_shapes_that_a_tpu_pads_are_named() -> None:
    def model(width: int) -> SimpleNamespace:
        return SimpleNamespace(frozen={"w": np.zeros((3, width)), "b": np.zeros(5)})

    assert profile_round.tile_notes(model(256), 16) == []
    notes = profile_round.tile_notes(model(192), 12)
    assert "12 rows" in notes[0] and "192" in notes[1]
    assert "9, 15 rows" in profile_round.tile_notes(model(256), 9, 15, 24)[0]


def test_every_width_of_a_plan_is_looked_at() -> None:
    """Three lanes of full, narrow and empty steps; 24 rows fill tiles, 9 do not."""
    sizes, passes = np.array([11, 11, 11, 0]), Passes(1, None, 8)
    rows, offsets = np.arange(33, dtype=np.int32), np.concatenate([[0], np.cumsum(sizes)])
    plan = planning.make(np.arange(4), rows, offsets, passes, 0, 1, 1, 3, widths=(0, 3, 8))
    assert profile_round.step_rows([plan]) == [9, 24]


@pytest.mark.parametrize(
    ("kind", "name", "bfloat16"),
    [
        ("TPU v4", "TPU v4", 275e12),
        ("TPU v5 lite", "TPU v5e", 197e12),
        ("TPU v5", "TPU v5p", 459e12),
        ("TPU v5p", "TPU v5p", 459e12),
        ("TPU v6 lite", "TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H200", "H200", 989.4e12),
        ("NVIDIA B200", "B200", 2250e12),
    ],
)
def test_peaks_are_found_by_the_names_that_jax_gives(kind: str, name: str, bfloat16: float) -> None:
    found = peaks.known(kind)
    assert found is not None and (found.name, found.flops("bfloat16")) == (name, bfloat16)
    assert 0 < found.float32 <= found.bfloat16 and 1e11 < found.bandwidth < 1e13 and found.source


@pytest.mark.slow
def test_an_unknown_device_is_measured() -> None:
    assert peaks.known("cpu") is None and peaks.known("TPU v4 lite") is None and peaks.known("NVIDIA H100 NVL") is None
    assert peaks.known("NVIDIA GH200 480GB") is None and peaks.known("NVIDIA GB200") is None
    found = peaks.of(jax.devices("cpu")[0])
    assert found.source == "measured" and min(found.bfloat16, found.float32, found.bandwidth) > 1e7


def test_devices_of_a_cpu_share_its_peak() -> None:
    devices = jax.devices("cpu")[:4]
    whole, quarter = peaks.of(devices[0]), peaks.share(devices)
    assert 4 * quarter.float32 == pytest.approx(whole.float32) and 4 * quarter.bandwidth == pytest.approx(
        whole.bandwidth
    )
    gpus = [SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB", platform="gpu")] * 4
    assert peaks.share(devices[:1]) == whole and peaks.share(gpus) == peaks.known("NVIDIA A100-SXM4-80GB")


def test_utilisation_is_a_share_of_all_devices_peaks() -> None:
    def trainer(kind: str, count: int) -> Any:
        return SimpleNamespace(engine=SimpleNamespace(devices=[SimpleNamespace(device_kind=kind)] * count))

    assert 156e12 / current.peak(trainer("NVIDIA A100-SXM4-80GB", 2), Speed()) == pytest.approx(0.5)
    assert current.peak(trainer("cpu", 1), Speed()) is None


def test_a_row_that_could_not_run_is_shown_as_such() -> None:
    table = profile_report.sweep_table(
        {
            "base": {
                "clients_per_second": 1.0, "examples_per_second": 2.0, "flops_per_second": 1e9, "mfu": 0.1,
                "lane_occupancy": 1.0, "row_occupancy": 1.0, "compile_seconds": 1.0,
            },
            "sweep": [{"changes": {"lanes": 512}, "error": "RESOURCE_EXHAUSTED"}],
        }
    )  # fmt: skip
    assert "RESOURCE_EXHAUSTED" in list(table.columns[1].cells)
