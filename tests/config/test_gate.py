"""The gate: every option against every odd value, from every door, ends in a right value or a `ValueError` that names it."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.cli import options as cli
from fedsim.config import (
    MAIN_JOB,
    Config,
    Speed,
    at_most,
    idle_alone,
    main_job,
    nearest,
    parse_call,
    plan_fits,
    refuse_idle,
)
from fedsim.config.limits import FROM_ZERO, POSITIVE

ODD = {
    "None": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "empty": "",
    "blank": " ",
    "x": "x",
    "2^31": 2**31,
    "2^70": 2**70,
    "10^400": 10**400,
    "10^5000": 10**5000,
    "True": True,
    "list": [],
    "[1]": [1],
    "dict": {},
    "bytes": b"x",
    "1e-300": 1e-300,
    "1e300": 1e300,
    "NUL": "a\0b",
    "surrogate": "a\ud800",
    "nested call": "f(g(1))",
    "unhashable key": "x({[]: 1})",
    "deep": "f" + "(" * 5000,
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "bool_": np.bool_(True),
    "array": np.array([1, 2]),
}
FIELDS = [(kind, field.name) for kind in (Config, Speed) for field in dataclasses.fields(kind)]


def plain(value: Any) -> bool:
    """Whether a value is Python's own, as JSON and hashes need it."""
    return value is None or type(value) in (int, float, str, bool) or (type(value) is tuple and all(map(plain, value)))


def clear(message: str, name: str) -> bool:
    """Whether a refusal has the form of all."""
    named = name in message.replace("--", "").replace("-", "_")
    return message.startswith("Expected ") and named and len(message) < 450 and "?." not in message and ".." not in (
        message.replace("...", "")
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_option_against_every_odd_value_in_python(kind: type, name: str, tmp_path: Path) -> None:
    from fedsim.record import options

    for value in ODD.values():
        try:
            made = kind(**{name: value})
        except ValueError as error:
            assert clear(str(error), name), str(error)
            continue
        assert plain(getattr(made, name)) and hash(made) is not None
        stored = json.loads(json.dumps(dataclasses.asdict(made), allow_nan=False))
        assert options(kind, stored, tmp_path) == made


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_option_against_every_odd_value_of_a_loaded_config(kind: type, name: str, tmp_path: Path) -> None:
    from fedsim.record import options

    for value in (None, -1, 1.5, "", [], [1], {}, [[]], {"a": []}, True, 1e308, 10**30, float("nan")):
        stored = json.loads(json.dumps(dataclasses.asdict(kind()) | {name: value}))
        try:
            assert plain(getattr(options(kind, stored, tmp_path), name))
        except ValueError as error:
            assert clear(str(error), name), str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", ["nan", "-1", "", "9" * 30, "x({[]: 1})"]
)  # the other odd ones meet the options above
def test_every_option_against_odd_values_on_the_command_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro ends with status 2 and names the option where a word cannot be read at all."""
    for _, name in FIELDS:
        flag = "--" + name.replace("_", "-")
        try:
            cli.parse(cli.RunOptions, [f"{flag}={value}"], "fedsim run").config()
        except ValueError as error:
            assert clear(str(error), name), str(error)
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code == 2 and (flag in said or name in said), said


def test_an_experiment_file_goes_through_the_same_gate(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for line, message in {
        "config = fedsim.Config(batch_size=None)": "Expected batch_size=None to be a whole number",
        "config = fedsim.Config(); speed = fedsim.Speed(lanes=1.5)": "Expected lanes=1.5 to be a whole number or 'auto'",
        "config = fedsim.Config(); speed = 3": "to define speed = fedsim.Speed",
        "config = {}": "to define config = fedsim.Config",
        "config = 1 / 0": "line 2 with ZeroDivisionError",
        "config = (": "line 2 with SyntaxError",
    }.items():
        file.write_text(f"import fedsim\n{line}\n")
        with pytest.raises(ValueError, match="Expected") as caught:
            cli.parse(cli.RunOptions, [str(file)], "fedsim run")
        assert message in str(caught.value)


def test_scalars_of_numpy_and_whole_numbers_are_pythons() -> None:
    made = Config(
        rounds=np.int64(30), lr=np.float64(0.5), alpha=1, dora=np.bool_(True), targets=["key"], dataset=Path("d.npz")
    )
    same = Config(rounds=30, lr=0.5, alpha=1.0, dora=True, targets=("key",), dataset="d.npz")
    assert made == same and made.hash() == same.hash()
    assert Config(server_lr=1).hash() == Config().hash()


@pytest.mark.parametrize("name", POSITIVE | FROM_ZERO)
def test_sizes_beyond_every_machine_are_refused_at_once(name: str) -> None:
    kind = Config if hasattr(Config(), name) else Speed
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=f"Expected {name}=") as caught:
        kind(**{name: 2 * (POSITIVE | FROM_ZERO)[name]})
    assert "lower it" in str(caught.value) and time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 10**6, "batch_size": 100},
        {"epochs": 10**6, "batch_size": 100},
        {"partition": "shards", "clients": 10**5, "classes_per_client": 10**5},
    ],
    ids=str,
)
def test_products_of_sizes_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected .* lower "):
        Config(**options)
    plan_fits(10, 100, 16, "steps")
    at_most(3, a="auto", b=None, c=3)


def test_call_strings_at_random() -> None:
    """Whatever the text is, it is read as a call of plain, finite literals, or refused by the option's name."""
    rng = random.Random(16)
    parts = ["sgd", "(", ")", "[", "]", "{", "}", ",", "=", ":", "1", "1e400", "-", "x", "'a'", "None", "*", "**", ".", " ",
             "\n", "\0", "lambda", "1j", "b'a'", "...", "é", "9" * 30, "nan", "momentum=", "\ud800", "#", "\\", "f'{1}'"]  # fmt: skip
    read = 0
    for _ in range(4000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 9)))
        text = f"sgd({text})" if rng.random() < 0.5 else text
        try:
            name, args, options = parse_call(text, "optimizer")
        except ValueError as error:
            assert str(error).startswith("Expected optimizer=")
            continue
        read += 1
        assert name and isinstance(args, list) and all(isinstance(key, str) for key in options)
    assert read > 100


# --- options that mean nothing


def test_what_nothing_reads_is_refused_where_it_was_asked_for() -> None:
    for options in (
        {"peft": "bias", "rank": 4},
        {"peft": "lora", "prompt_tokens": 4},
        {"partition": "iid", "alpha": 0.5},
        {"personal_lr": 0.5},
        {"steps": 3, "epochs": 2},
        {"dataset": "d.npz", "text_column": "words"},
    ):
        with pytest.raises(ValueError, match=r"it means nothing; leave it out, or change "):
            refuse_idle(Config(**options), Config())
        assert len(idle_alone(Config(**options))) == 1
    with pytest.raises(ValueError, match="Expected tokens=8 with a backbone that reads texts"):
        refuse_idle(Config(tokens=8), Config(), "array")
    refuse_idle(Config(tokens=8), Config())  # whose backbone's kind is unknown
    refuse_idle(Config(peft="lora+bias", rank=4, bias_patch=False), Config())
    assert idle_alone(main_job(peft="bias")) == idle_alone(main_job()) == []


# --- where a run starts from


@pytest.mark.slow
def test_naming_a_default_changes_nothing() -> None:
    usual = main_job()
    for name in (f.name for f in dataclasses.fields(Config)):
        value = getattr(usual, name)
        flag = "--" + name.replace("_", "-")
        if value is None or value == ():
            continue
        if isinstance(value, bool):
            argv = [flag if value else "--no-" + flag[2:]]
        else:
            argv = [flag, *(value if isinstance(value, tuple) else [str(value)])]
        assert cli.parse(cli.RunOptions, argv, "fedsim run").config() == usual, name


def test_what_a_run_starts_from_has_a_name() -> None:
    def start(*argv: str) -> tuple[str, Config]:
        options, found = cli.parse_from(cli.RunOptions, argv, "fedsim run")
        return found.name, options.config()

    assert start() == start("--backbone", "minilm_l6") == start("--preset", "main_job") == ("the main job", main_job())
    assert start("--preset", "plain") == ("plain FedAvg", Config())
    name, config = start("--backbone", "vit_b16")
    assert name.startswith("plain FedAvg (the main job is made for minilm_l6;") and config == Config(backbone="vit_b16")
    assert start("--backbone", "mlp", "--preset=main_job")[1] == main_job(backbone="mlp")
    with pytest.raises(ValueError, match=r"Expected my\.py without --preset plain"):
        cli.parse(cli.RunOptions, ["my.py", "--preset", "plain"], "fedsim run")


def test_cost_prices_what_run_trains() -> None:
    (config,) = cli.CostOptions.parsed([]).configs()
    assert {name: getattr(config, name) for name in ("targets", "rounds", "head_rounds")} == {
        name: MAIN_JOB[name] for name in ("targets", "rounds", "head_rounds")
    }
    assert cli.CostOptions.parsed(["--preset", "plain"]).configs() == [Config()]
    assert cli.CostOptions.parsed(["--backbone", "vit_b16"]).configs() == [Config(backbone="vit_b16")]


def test_no_sentence_ends_twice() -> None:
    assert nearest("lorra", ["lora"]) == " (did you mean lora?)"
    source = Path(cli.__file__).parents[1]
    for file in source.rglob("*.py"):
        assert '?."' not in file.read_text(), file
