"""A whole sweep: cells as single commands would run them, its tables, its choices, going on after a stop."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedsim
from fedsim.config import Config, Speed
from fedsim.sweeps import folder, pictures, sweep
from fedsim.sweeps.cell import Shared, in_order
from fedsim.sweeps.cells import Sweep, cells
from fedsim.sweeps.show import print_cells

pytestmark = pytest.mark.usefixtures("compile_once")
SPEED = Speed(lanes=2, devices=1)


@pytest.fixture(scope="module")
def base(blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three rounds over twelve clients."""
    file = blobs(tmp_path_factory.mktemp("data"))
    return Config(
        dataset=str(file), backbone="mlp", peft="full", clients=12, clients_per_round=4, min_size=3, rounds=3, lr=5e-3
    )


@pytest.fixture(scope="module")
def asked(base: Config) -> Sweep:
    """Two kinds, two seeds; the rate is chosen."""
    return Sweep(base=base, grid={"peft": ["full", "head"]}, seeds=2, tune={"lr": [1e-6, 2e-2]}, speed=SPEED)


@pytest.fixture(scope="module")
def study(asked: Sweep, tmp_path_factory: pytest.TempPathFactory) -> fedsim.sweeps.study.Study:
    """That sweep, run."""
    return fedsim.sweep(asked, out=tmp_path_factory.mktemp("sweep") / "study", quiet=True)


@pytest.mark.slow
def test_cells_that_share_are_as_single_commands_would_run_them(
    study: fedsim.sweeps.study.Study, tmp_path: Path
) -> None:
    for number, cell in enumerate(study.cells):
        alone = fedsim.run(cell.config, cell.speed, out=tmp_path / str(number), quiet=True)
        shared = fedsim.load(study.places[cell.key])
        assert shared.parameters.keys() == alone.parameters.keys()
        for name, value in alone.parameters.items():
            assert np.array_equal(shared.parameters[name], value), name
        assert [line["total_bytes_up"] for line in shared.rounds] == [line["total_bytes_up"] for line in alone.rounds]
        assert shared.summary["final"] == alone.summary["final"]


def test_the_rate_is_chosen_on_validation_for_each_method_and_the_test_set_is_not_read(
    study: fedsim.sweeps.study.Study,
) -> None:
    assert study.chosen == {"peft=full": {"lr": 2e-2}, "peft=head": {"lr": 2e-2}}
    assert {cell.config.lr for cell in study.cells} == {2e-2}
    tried = [fedsim.load(place) for place in (study.directory / "tuning").iterdir()]
    assert len(tried) == 4
    for run in tried:  # what stands as test are the validation rows
        final = run.summary["final"]
        assert final["test"] == pytest.approx(final["validation"])
    assert study.edges == {"peft=full": ["lr"], "peft=head": ["lr"]}


def test_rows_and_tables_say_what_the_runs_say(study: fedsim.sweeps.study.Study) -> None:
    rows = study.rows()
    assert [(row["peft"], row["seed"], row["state"]) for row in rows] == [
        (kind, seed, "done") for kind in ("full", "head") for seed in (0, 1)
    ]
    runs = study.runs()
    for row, run in zip(rows, runs, strict=True):
        assert row["test"] == run.summary["final"]["test"]["accuracy"]
        assert row["bytes"] == sum(line["bytes_up"] + line["bytes_down"] for line in run.rounds)
    with (study.directory / "cells.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(w["test"]) for w in written] == [row["test"] for row in rows]
    assert [w["name"] for w in written] == [row["name"] for row in rows]
    lines = study.rounds()
    assert len(lines) == 4 * 3
    assert list(lines["total_bytes_up"]) == [line["total_bytes_up"] for run in runs for line in run.rounds]
    import pandas as pd

    for name in ("cells", "rounds"):
        packed, plain = (
            pd.read_parquet(study.directory / f"{name}.parquet"),
            pd.read_csv(study.directory / f"{name}.csv"),
        )
        assert list(packed.columns) == list(plain.columns) and len(packed) == len(plain)
        for column in ("seed", "validation_accuracy" if name == "rounds" else "validation"):
            assert packed[column].dtype == plain[column].dtype
            assert packed[column].equals(plain[column])


def test_the_list_tells_of_tuning_and_of_cells(
    study: fedsim.sweeps.study.Study, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    print_cells(study)
    assert capsys.readouterr().out.splitlines()[-2:] == ["4 done of 4 runs of tuning.", "4 done of 4 cells."]
    folder.write(tmp_path, study.base, [], study.tuning, {})
    print_cells(fedsim.load_sweep(tmp_path))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "4 waiting of 4 runs of tuning.",
        "The cells come once tuning is over.",
    ]


def test_settings_have_mean_and_deviation_over_seeds(study: fedsim.sweeps.study.Study) -> None:
    full, head = study.settings()
    assert full.varied == {"peft": "full", "lr": 2e-2}
    values = [row["test"] for row in study.rows()[:2]]
    assert full.over_seeds("test") == (statistics.mean(values), statistics.stdev(values))
    best = study.best()
    assert best["validation"] == max(row["validation"] for row in study.rows())
    target = study.target()
    assert target == min(s.over_seeds("validation")[0] for s in (full, head))
    reached = [next((sent for _, sent, v in study.curve(c) if v >= target), None) for c in full.cells]
    known = [sent for sent in reached if sent is not None]
    assert study.bytes_to(full, target) == (round(statistics.mean(known)) if known else None, len(known))


def test_the_table_and_the_picture(
    study: fedsim.sweeps.study.Study, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study.table()
    said = capsys.readouterr().out
    mean, deviation = study.settings()[0].over_seeds("test")
    assert f"{mean:.3f} ± {deviation:.3f}" in said
    assert "Chosen on validation for peft=full: lr=0.02 (at the edge of its values)" in said
    for x in ("rounds", "bytes"):
        assert study.plot(tmp_path / f"{x}.png", x=x).stat().st_size > 5000
    with pytest.raises(ValueError, match="x='time' to be one of rounds, bytes"):
        study.plot(tmp_path / "no.png", x="time")


def test_lines_look_different_where_colours_go_round() -> None:
    assert len({pictures.look(method, 0) for method in range(30)}) == 30
    assert pictures.look(0, 1) != pictures.look(0, 0)


def test_nothing_is_run_twice_and_a_larger_sweep_runs_only_what_is_new(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = sweep.folder.claim

    def counted(place: Path):
        ran.append(place.name)
        return run(place)

    monkeypatch.setattr(folder, "claim", counted)
    small = Sweep(base=base, grid={"lr": [1e-3]}, seeds=2, speed=SPEED)
    first = fedsim.sweep(small, out=tmp_path / "s", quiet=True)
    assert len(ran) == 2
    fedsim.sweep(small, out=tmp_path / "s", quiet=True)
    assert len(ran) == 2
    larger = Sweep(base=base, grid={"lr": [1e-3, 1e-2]}, seeds=3, speed=SPEED)
    second = fedsim.sweep(larger, out=tmp_path / "s", quiet=True)
    assert len(ran) == 6
    assert {row["name"]: row["test"] for row in first.rows()}.items() <= {
        row["name"]: row["test"] for row in second.rows()
    }.items()
    with pytest.raises(ValueError, match=r"its rounds is 3, not 5; choose another --out"):
        fedsim.sweep(Sweep(base=base.replace(rounds=5), seeds=2), out=tmp_path / "s", quiet=True)
    with pytest.raises(ValueError, match="to hold no single run"):
        fedsim.sweep(small, out=second.places[second.cells[0].key], quiet=True)


@pytest.mark.slow
def test_a_failed_cell_keeps_its_error_and_ends_nothing_else(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.sweeps import cell as one

    run, broken = one.run, [True]

    def fails(cell, place, shared):
        if cell.config.seed == 1 and broken:
            raise RuntimeError("the disk is on fire")
        return run(cell, place, shared)

    monkeypatch.setattr(one, "run", fails)
    asked = Sweep(base=base, seeds=3, speed=SPEED)
    found = fedsim.sweep(asked, out=tmp_path / "s", quiet=True)
    assert [row["state"] for row in found.rows()] == ["done", "failed", "done"]
    assert found.rows()[1]["error"] == "RuntimeError: the disk is on fire"
    place = found.places[found.cells[1].key]
    assert "the disk is on fire" in json.loads((place / "error.json").read_text())["traceback"]
    broken.clear()
    again = fedsim.sweep(asked, out=tmp_path / "s", quiet=True)
    assert [row["state"] for row in again.rows()] == ["done", "failed", "done"]  # not without being asked
    again = fedsim.sweep(asked, out=tmp_path / "s", quiet=True, retry=True)
    assert [row["state"] for row in again.rows()] == ["done", "done", "done"]
    assert (place / "error-1.json").is_file()


def test_tuning_whose_runs_all_fail_says_why(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.sweeps import cell as one

    def fails(cell, place, shared):
        raise RuntimeError("no room")

    monkeypatch.setattr(one, "run", fails)
    with pytest.raises(ValueError, match=r"to end with a score, but RuntimeError: no room; .*--retry"):
        fedsim.sweep(Sweep(base=base, tune={"lr": [1e-3]}, speed=SPEED), out=tmp_path / "s", quiet=True)


def test_what_is_impossible_is_refused_before_anything_is_written(base: Config, tmp_path: Path) -> None:
    for asked, said in (
        (Sweep(base=base, grid={"algorithm": ["fed_avg", "fed_avgg"]}), "In the cell algorithm=fed_avgg"),
        (Sweep(base=base.replace(dataset="arrays"), seeds=2), "data=fedsim.arrays"),
        (Sweep(base=base, grid={"dataset": ["digits", "no.csv"]}), "'no.csv' to be an existing file"),
        (Sweep(base=base, grid={"dataset": ["digits", "digit"]}), "did you mean digits"),
        (Sweep(base=base), "a sweep with cells"),
        (Sweep(base=base, seeds=10_001), "10,001 cells <= 10,000"),
        (Sweep(base=base, seeds=10**6, grid={"lr": [1e-3 * k for k in range(1, 1000)]}), "999,000,000 cells <= 10,000"),
        (Sweep(base=base, tune={"lr": [1e-4 * k for k in range(1, 10_001)]}), "10,001 cells <= 10,000"),
    ):
        with pytest.raises(ValueError, match="Expected") as error:
            fedsim.sweep(asked, out=tmp_path / "s", quiet=True)
        assert said in str(error.value)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="to hold a sweep"):
        fedsim.load_sweep(tmp_path)


def test_cells_run_in_the_order_in_which_they_share_the_most(base: Config) -> None:
    made = cells(Sweep(base=base, grid={"lr": [1e-3, 1e-2], "peft": ["full", "head"]}, seeds=2))
    order = [(c.config.seed, c.config.peft) for c in in_order(made)]
    assert len(order) == 8
    assert len({order.index(pair) for pair in order}) == 4  # equal pairs stand together:
    assert all(order[i] == order[i + 1] for i in range(0, 8, 2))


def test_what_is_shared_is_the_same_object_and_memory_stays_bounded(base: Config) -> None:
    made = in_order(
        cells(
            Sweep(base=base.replace(peft="head"), grid={"lr": [1e-3, 1e-2], "alpha": [0.5, 5.0]}, seeds=3, speed=SPEED)
        )
    )
    shared = Shared()
    problems = [shared.problem(c) for c in made]
    assert len({id(p.trainers) for p in problems}) == 1
    by_seed = {c.config.seed: p.dataset.y for c, p in zip(made, problems, strict=True)}
    for c, p in zip(made, problems, strict=True):
        assert p.dataset.y is by_seed[c.config.seed]
    kept = problems[0].trainers
    for number in range(5):
        kept[number] = number
    assert list(kept) == [3, 4]


def test_cells_given_one_by_one(base: Config, tmp_path: Path) -> None:
    found = fedsim.sweep(
        Sweep(configs={"slow": base, "quick": base.replace(rounds=1)}, speed=SPEED), out=tmp_path / "s", quiet=True
    )
    assert [(row["name"].rpartition("-")[0], row["rounds"]) for row in found.rows()] == [
        ("cell=slow", 3),
        ("cell=quick", 1),
    ]


@pytest.mark.slow
def test_data_of_another_content_than_finished_cells_have_read_are_refused(
    base: Config, blobs: Callable[..., Path], tmp_path: Path
) -> None:
    """A new cell would stand in one table with cells of the old file; the old file brought back, the sweep goes on."""
    file = blobs(tmp_path)
    own = base.replace(dataset=str(file), rounds=1)
    fedsim.sweep(base=own, grid={"lr": [0.01]}, speed=SPEED, out=tmp_path / "study", quiet=True)
    before = file.read_bytes()
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "x": arrays["x"] + 1})
    with pytest.raises(
        ValueError, match=rf"sha256=.* of {file}, the dataset of .*lr=0\.01.*, to be .*, as when the run"
    ):
        fedsim.sweep(base=own, grid={"lr": [0.01, 0.1]}, speed=SPEED, out=tmp_path / "study", quiet=True)
    file.write_bytes(before)
    grown = fedsim.sweep(base=own, grid={"lr": [0.01, 0.1]}, speed=SPEED, out=tmp_path / "study", quiet=True)
    assert [folder.state(grown.places[cell.key]) for cell in grown.cells] == ["done", "done"]
