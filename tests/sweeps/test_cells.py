"""Cells: which there are, their names, what tuning looks at, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedsim.config import Config, Speed
from fedsim.sweeps.cells import Sweep, cells, method_of, tuning

BASE = Config(backbone="mlp", peft="full", rounds=3)
TEXT = Config(rounds=3)  # LoRA on MiniLM


def test_every_combination_of_grid_zip_and_seeds() -> None:
    made = cells(Sweep(base=BASE, grid={"lr": [1e-3, 1e-2]}, zip={"clients": [10, 20], "alpha": [1.0, 2.0]}, seeds=3))
    found = [(c.config.lr, c.config.clients, c.config.alpha, c.config.seed) for c in made]
    assert found == [(lr, n, a, s) for lr in (1e-3, 1e-2) for n, a in ((10, 1.0), (20, 2.0)) for s in range(3)]
    assert made[0].varied == {"lr": 1e-3, "clients": 10, "alpha": 1.0, "seed": 0}


def test_named_choices_set_several_options_and_stand_in_the_tables_by_name() -> None:
    methods = {"LoRA 4": {"peft": "lora", "rank": 4}, "bias": {"peft": "bias"}}
    made = cells(Sweep(base=TEXT, grid={"method": methods}, seeds=[7]))
    assert [(c.config.peft, c.config.rank, c.config.seed) for c in made] == [("lora", 4, 7), ("bias", TEXT.rank, 7)]
    assert [c.varied["method"] for c in made] == ["LoRA 4", "bias"]


def test_a_name_is_readable_and_depends_on_its_own_config_alone() -> None:
    few = cells(Sweep(base=BASE, grid={"lr": [1e-3]}))
    more = cells(Sweep(base=BASE, grid={"lr": [1e-3, 1e-2], "clients": [BASE.clients, 20]}))
    assert few[0].name.startswith("lr=0.001-")
    assert few[0].key == few[0].config.hash() == more[0].key  # so a cell that was run is known in a larger sweep
    other_base = cells(Sweep(base=BASE.replace(lr=5.0), grid={"lr": [1e-3]}))
    assert other_base[0].name == few[0].name
    assert len({c.name for c in more}) == 4
    odd = cells(Sweep(base=BASE.replace(dataset="a b/c d.csv"), grid={"dataset": ["a b/c d.csv", "x" * 300]}))
    assert all("/" not in c.name and " " not in c.name and len(c.name) < 120 for c in odd)


def test_speed_counts_only_where_it_varies() -> None:
    plain = cells(Sweep(base=BASE, speed=Speed(lanes=4)))[0]
    assert plain.key == cells(Sweep(base=BASE))[0].key
    assert plain.speed.keep_checkpoints == 0  # the disk of a large sweep stays small
    kept = cells(Sweep(base=BASE, speed=Speed(keep_checkpoints=2)))[0]
    assert kept.speed.keep_checkpoints == 2
    lanes = cells(Sweep(base=BASE, grid={"lanes": [1, 2]}))
    assert [c.speed.lanes for c in lanes] == [1, 2]
    assert lanes[0].key != lanes[1].key


def test_repeats_are_cells_of_one_config() -> None:
    made = cells(Sweep(base=BASE, seeds=2, repeat=2))
    assert [(c.config.seed, c.repeat) for c in made] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [c.key for c in made[:2]] == [made[0].config.hash(), made[0].config.hash() + ".2"]


def test_draws_follow_their_laws_and_a_longer_sweep_keeps_the_first_ones() -> None:
    laws = {
        "lr": "log_uniform(1e-4, 1e-1)",
        "batch_size": "integers(2, 4)",
        "alpha": "uniform(0.5, 2)",
        "optimizer": "choice('sgd', 'adam')",
    }
    few, many = (cells(Sweep(base=BASE, random=laws, draws=n)) for n in (5, 400))
    assert [c.key for c in few] == [c.key for c in many[:5]]
    lr = np.log([c.config.lr for c in many])
    low, high = math.log(1e-4), math.log(1e-1)
    assert low <= lr.min() and lr.max() <= high
    assert abs(lr.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 400)  # four standard errors
    assert {c.config.batch_size for c in many} == {2, 3, 4}
    assert all(0.5 <= c.config.alpha <= 2 for c in many)
    assert abs(sum(c.config.optimizer == "sgd" for c in many) - 200) < 4 * 10


def test_tuning_looks_at_each_method_once_in_the_first_cell_of_the_rest() -> None:
    sweep = Sweep(
        base=TEXT,
        grid={"peft": ["lora", "bias"], "clients_per_round": [3, 6]},
        seeds=[5, 6],
        tune={"lr": [1e-3, 1e-2]},
        repeat=2,
    )
    found = tuning(sweep)
    assert list(found) == ["peft=lora", "peft=bias"]
    assert [(c.config.peft, c.config.clients_per_round, c.config.seed, c.config.lr) for c in found["peft=bias"]] == [
        ("bias", 3, 5, 1e-3), ("bias", 3, 5, 1e-2)
    ]  # fmt: skip
    made = cells(sweep, {"peft=lora": {"lr": 1e-2}, "peft=bias": {"lr": 1e-3}})
    assert {(c.config.peft, c.config.lr) for c in made} == {("lora", 1e-2), ("bias", 1e-3)}
    assert len(made) == 2 * 2 * 2 * 2


def test_what_makes_a_method_can_be_said() -> None:
    sweep = Sweep(
        base=TEXT,
        grid={"peft": ["lora", "bias"], "dataset": ["a.csv", "b.csv"]},
        tune={"lr": [1e-3]},
        tune_by=["dataset"],
    )
    assert list(tuning(sweep)) == ["dataset=a.csv", "dataset=b.csv"]
    points = tuple(axis.points[1] for axis in sweep.axes)
    assert method_of(sweep, points) == "dataset=b.csv"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"grid": {"lrr": [1]}}, "'lrr' in grid to be one of Config's or Speed's (did you mean lr?)"),
        ({"grid": {"method": {"a": {"pef": "lora"}}}}, "'pef'"),
        ({"grid": {"lr": []}}, "lr to have a value on its axis"),
        ({"grid": {"peft": "lora"}}, "to be a list of values"),
        ({"grid": {"lr": {"small": {"lr": 1e-3}}}}, "under a name that no option has"),
        ({"grid": {"devices": [1, 2]}}, "devices not to vary"),
        ({"zip": {"lr": [1, 2], "clients": [3]}}, "as many values for each option of zip, got lr 2, clients 1"),
        ({"grid": {"lr": [1e-3]}, "zip": {"lr": [1e-2]}}, "lr on one axis, not on lr and lr"),
        ({"grid": {"seed": [1]}, "seeds": 2}, "seed on one axis"),
        ({"grid": {"lr": [1e-3]}, "tune": {"lr": [1e-2]}}, "chosen by tune or to vary"),
        ({"tune": {"lanes": [1]}}, "tune to choose an option of Config"),
        ({"tune": {"lr": [1.0]}, "tune_by": ["method"]}, "tune_by 'method' to be an axis"),
        ({"random": {"lr": "uniform(0, 1)"}}, "draws=0 > 0"),
        ({"random": {"lr": "normal(0, 1)"}, "draws": 1}, "to be one of uniform(low, high)"),
        ({"random": {"lr": "log_uniform(0, 1)"}, "draws": 1}, "from a lower to a higher number"),
        ({"repeat": 0}, "repeat=0 >= 1"),
        ({"configs": {"a": BASE}, "seeds": 2}, "configs without seeds"),
    ],
)  # fmt: skip
def test_impossible_axes_are_refused(asked: dict, said: str) -> None:
    with pytest.raises(ValueError, match="Expected") as error:
        cells(Sweep(base=BASE, **asked))
    assert said in str(error.value)


def test_twins_and_options_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="the same run"):
        cells(Sweep(base=BASE, grid={"lr": [1e-3, 1e-3]}))
    with pytest.raises(ValueError, match=r"Expected rank=4 .*In the cell peft=bias, rank=4"):
        cells(Sweep(base=TEXT, grid={"peft": ["lora", "bias"], "rank": [4, 8]}))
    with pytest.raises(ValueError, match="clients_per_round=200"):
        cells(Sweep(base=BASE, grid={"clients_per_round": [200]}))
