"""`fedsim sweep` and `fedsim compare STUDY` as a user types them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.cli.sweeping import option, read, value
from fedsim.config import RATES, Config, Speed, main_job
from fedsim.sweeps.cells import cells

TINY = ["--backbone", "mlp", "--peft", "full", "--clients", "12", "--min-size", "3", "--rounds", "2", "--lanes", "2"]


def configs(*argv: str) -> list:
    """The configs that a command line asks for."""
    return [c.config for c in cells(read(argv)[1])]


def test_an_option_with_several_values_is_an_axis() -> None:
    found = configs(*TINY, "--lr", "1e-3", "1e-2", "--batch-size", "4", "8", "--seeds", "0", "1")
    assert [(c.lr, c.batch_size, c.seed) for c in found] == [
        (lr, size, seed) for lr in (1e-3, 1e-2) for size in (4, 8) for seed in (0, 1)
    ]
    assert {c.rounds for c in found} == {2}


def test_every_option_of_config_and_speed_can_be_an_axis() -> None:
    """Each is found in its group; one that nobody finds would end in an internal error."""
    found = value([], Config(), Speed())
    for part in (Config(), Speed()):
        for field in dataclasses.fields(part):
            assert option(found, field.name) == getattr(part, field.name)


def test_the_budget_of_privacy_is_an_axis() -> None:
    private = ["--dp", "central", "--delta", "1e-3", "--clients-per-round", "6"]
    assert [c.epsilon for c in configs(*TINY, *private, "--epsilon", "1", "5")] == [1.0, 5.0]


def test_the_main_job_gives_each_kind_its_own_rate_unless_one_is_given_or_chosen() -> None:
    found = configs("--peft", "lora", "bias", "full", "--seeds", "0", "1")
    assert {(c.peft, c.lr) for c in found} == {
        ("lora", main_job().lr),
        ("bias", main_job().lr),
        ("full", RATES["full"]),
    }
    assert {c.lr for c in configs("--peft", "lora", "full", "--lr", "1e-3")} == {1e-3}
    _, sweep, _ = read(["--peft", "lora", "full", "--tune", "lr=1e-4,1e-3"])
    assert dict(sweep.tune) == {"lr": [1e-4, 1e-3]}


def test_options_that_take_several_values_keep_them() -> None:
    found = configs("--targets", "query", "value", "--seeds", "0", "1")
    assert [c.targets for c in found] == [("query", "value")] * 2


def test_a_file_defines_a_sweep_and_options_change_it(tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text(
        'import fedsim\nbase = fedsim.Config(backbone="mlp", peft="full")\n'
        'sweep = fedsim.Sweep(base=base, grid={"lr": [1e-3, 1e-2]}, seeds=2)\n'
    )
    found = configs(str(file), "--rounds", "5", "--batch-size", "4", "8")
    assert [(c.lr, c.batch_size, c.seed, c.rounds) for c in found] == [
        (lr, size, seed, 5) for lr in (1e-3, 1e-2) for size in (4, 8) for seed in (0, 1)
    ]
    assert read([str(file)])[2] == Path("runs/my")
    file.write_text(
        "import fedsim\ndef sweep():\n    for n in (1, 2):\n"
        '        yield f"{n} rounds", fedsim.Config(backbone="mlp", peft="full", rounds=n)\n'
    )
    assert [c.rounds for c in configs(str(file))] == [1, 2]
    with pytest.raises(ValueError, match="yields every config"):
        read([str(file), "--rounds", "5"])


def test_options_beside_a_file_mean_something(tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text(
        'import fedsim\nbase = fedsim.Config(backbone="mlp", peft="full")\n'
        'sweep = fedsim.Sweep(base=base, grid={"batch_size": [4, 8]}, seeds=2)\n'
    )
    _, sweep, _ = read([str(file), "--tune", "lr=0.1,1", "--tune-by", "batch_size"])
    assert dict(sweep.tune) == {"lr": [0.1, 1.0]} and sweep.methods == ["batch_size"]
    with pytest.raises(ValueError, match=r"Expected rank=4 with peft=lora"):
        read([str(file), "--rank", "4"])
    assert {c.rank for c in configs(str(file), "--rank", "4", "--peft", "lora", "bias")} == {4}


def test_the_same_command_finds_the_same_folder() -> None:
    one, same, other = (
        read([*TINY, "--lr", *values])[2] for values in (["1e-3", "1e-2"], ["0.001", "0.01"], ["1e-3", "1"])
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out", "a", "b"], "--out with one value"),
        (["--tune", "lr"], "an option with its values, like lr=1e-4"),
        (["--tune", "lrr=1"], "--tune lrr to be an option"),
        (["no.py"], "'no.py' to exist"),
        (["--lr", "1", "--lr", "2"], "--lr once"),
        (["--peft", "bias", "--rank", "4", "--seeds", "0", "1"], "rank=4"),
        (["--peft", "bias", "full", "--rank", "4"], "rank=4"),
        ([], "a sweep with cells; give an option several values"),
        (["--seeds", *map(str, range(10_001))], "10,001 cells <= 10,000"),
        (["--dataset", "mine.csv", "--seeds", "0", "1"], "'mine.csv' to be an existing file"),
        (["--list", "--out", "nowhere"], "to hold a sweep"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedsim.cli.main import main

    monkeypatch.setattr("fedsim.sweeps.cell.run", lambda *_: pytest.fail("a cell runs"))
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *argv]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_option_that_some_cell_reads_is_taken() -> None:
    assert [(c.peft, c.rank) for c in configs("--peft", "bias", "lora", "--rank", "4")] == [("bias", 4), ("lora", 4)]


def test_a_file_that_defines_none_or_fails_is_named(tmp_path: Path) -> None:
    file = tmp_path / "my.py"
    for text, said in (
        ("x = 1", "to define sweep ="),
        ("1 / 0", "ZeroDivisionError"),
        ("def sweep(): yield 3", "cell 0 is 3"),
    ):
        file.write_text(text + "\n")
        with pytest.raises(ValueError, match="Expected") as error:
            read([str(file)])
        assert said in str(error.value)


@pytest.mark.slow
def test_the_whole_way(blobs: Callable[..., Path], environment: dict[str, str], tmp_path: Path) -> None:
    blobs(tmp_path)

    def fedsim(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fedsim", *argv],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = [
        "sweep",
        "--dataset",
        "blobs.npz",
        *TINY,
        "--clients-per-round",
        "3",
        "6",
        "--seeds",
        "0",
        "1",
        "--out",
        "study",
    ]
    planned = fedsim(*command, "--dry-run")
    assert "cells: 4" in planned
    assert "make 4 sets of programs" not in planned  # two seeds, whose cohorts share them
    assert "Shared: 4 runs read 1 set of examples" in planned
    assert not (tmp_path / "study").exists()
    said = fedsim(*command)
    assert "4/4" in said
    assert "Folder: study" in said
    assert "4 done of 4 cells" in fedsim(*command, "--list")
    assert "cells: 4 (4 done)" in fedsim(*command)
    compared = fedsim("compare", "study")
    assert "clients per round" in compared and "over the 2 cells of a line" in compared
    assert (tmp_path / "study" / "accuracy_bytes.png").is_file()
    kept = {file.name for file in (tmp_path / "study" / "cells").glob("*/*")}
    assert kept >= {"config.json", "rounds.jsonl", "summary.json", "trained.safetensors"}
    assert not list((tmp_path / "study" / "cells").glob("*/checkpoints/*"))
