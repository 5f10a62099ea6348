"""Options: what is impossible is refused with name, value, rule and remedy; equal options have equal hashes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.config import Config, Speed, differences, nearest, one_of, parse_call, positive, require_known

IMPOSSIBLE = [
    {"rounds": 0},
    {"rounds": -3},
    {"rounds": True},
    {"clients": 0},
    {"clients_per_round": 0},
    {"clients_per_round": 101},
    {"epochs": 0},
    {"steps": 0},
    {"batch_size": -1},
    {"lr": 0.0},
    {"lr": float("nan")},
    {"lr": float("inf")},
    {"head_lr": -1e-3},
    {"server_lr": 0},
    {"alpha": 0.0},
    {"min_size": -1},
    {"classes_per_client": 0},
    {"local_test": -0.1},
    {"local_test": 1.0},
    {"server_share": 1.0},
    {"server_share": -0.1},
    {"public_share": 1.5},
    {"public_share": 0.5, "server_share": 0.5},
    {"size_law": "lognorm"},
    {"size_law": "lognormal"},
    {"size_law": "lognormal(1.0)"},
    {"size_law": "lognormal(sigma=-1)"},
    {"size_law": "power(sigma=1)"},
    {"size_law": "power(exponent='steep')"},
    {"tokens": 0},
    {"examples": 0},
    {"validation": 0.0},
    {"validation": 1.0},
    {"target": 62.0},
    {"target": 0.0},
    {"target": 1.0, "task": "language_model"},
    {"target": -0.5, "metric": "loss"},
    {"metric": "perplexity"},
    {"metric": "macro_f1", "task": "language_model"},
    {"task": "regression"},
    {"patience": 0},
    {"eval_every": 0},
    {"rank": 0},
    {"lora_alpha": 0.0},
    {"head_rounds": 20},
    {"head_rounds": -1},
    {"partition": "dirichelt"},
    {"weighting": "sizes"},
    {"codec_up": "bf16"},
    {"codec_down": "int8"},
    {"adapter": "triple"},
    {"prompt_depth": "wide"},
    {"pool": "max"},
    {"optimizer": "sgd(momentum=x)"},
    {"optimizer": "(0.1)"},
    {"lr_schedule": "cosine_decay_schedule(1.0"},
    {"algorithm": ""},
]


@pytest.mark.parametrize("options", IMPOSSIBLE, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_impossible_options_are_refused_by_name_and_value(options: dict) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        Config(**options)
    message = str(caught.value)
    assert name in message and (str(value) in message or repr(value) in message)
    assert len(message) < 300


@pytest.mark.parametrize(
    "options",
    [
        {"lanes": 0},
        {"devices": -1},
        {"segment_steps": 0},
        {"eval_batch": 0},
        {"checkpoint_every": 0},
        {"parallel": "threads"},
        {"cache": "maybe"},
        {"lanes": "many"},
    ],
    ids=str,
)
def test_impossible_speeds_are_refused(options: dict) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"Expected {name}={value!r}"):
        Speed(**options)


def test_names_that_are_close_are_offered() -> None:
    with pytest.raises(ValueError, match="did you mean dirichlet"):
        Config(partition="dirichelt")
    with pytest.raises(ValueError, match=r"Expected option 'batchsize' to be a known one \(did you mean batch_size"):
        Config().replace(batchsize=3)
    assert nearest("zzz", ["sgd", "adam"]) == ""
    with pytest.raises(ValueError, match="Expected option 'b'"):
        require_known(["a", "b"], ["a"], "option")


def test_replace_checks_again() -> None:
    assert Config().replace(rounds=3).rounds == 3
    with pytest.raises(ValueError, match="clients_per_round=10 <= clients=5"):
        Config().replace(clients=5)


def test_the_hash_is_that_of_the_options() -> None:
    assert Config().hash() == Config().hash() == Config(rounds=20).hash()
    hashes = {Config().hash()}
    for change in ({"rounds": 21}, {"seed": 1}, {"targets": ("query",)}, {"lr": 2.0000001e-3}, {"steps": 1}):
        hashes.add(Config(**change).hash())
    assert len(hashes) == 6 and all(len(h) == 12 for h in hashes)


def test_options_survive_json() -> None:
    from fedsim.record import options

    config, speed = Config(targets=("key", "value"), steps=3, lr=0.1 + 0.2), Speed(lanes=4, devices=2)
    again = options(Config, json.loads(json.dumps(dataclasses.asdict(config))), Path("here"))
    assert again == config and again.hash() == config.hash()
    assert options(Speed, json.loads(json.dumps(dataclasses.asdict(speed))), Path("here")) == speed


def test_every_option_says_what_it_is() -> None:
    """Each field of the groups is followed by its own docstring: `--help` and the documentation show it."""
    import ast
    import inspect

    from fedsim.config import options

    found = 0
    for node in ast.parse(inspect.getsource(options)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                assert isinstance(text, str) and text.rstrip().endswith("."), f"{node.name}.{ast.unparse(field.target)}"
                found += 1
    assert found == len(dataclasses.fields(Config)) + len(dataclasses.fields(Speed))


def test_calls_in_strings() -> None:
    assert parse_call("adam", "optimizer") == ("adam", [], {})
    assert parse_call("adamw(weight_decay=0.01)", "optimizer") == ("adamw", [], {"weight_decay": 0.01})
    assert parse_call("cosine_decay_schedule(1.0, 20)", "lr_schedule") == ("cosine_decay_schedule", [1.0, 20], {})
    assert parse_call("a/my-file.py:fed_mine(mu=-1, names=('a', None))", "algorithm") == (
        "a/my-file.py:fed_mine",
        [],
        {"mu": -1, "names": ("a", None)},
    )


@pytest.mark.parametrize("text", ["f(x)", "f(1)(2)", "f(__import__('os'))", "f(*[1])", "f(1", "", "f(1) + g(2)"])
def test_only_literals_are_read(text: str) -> None:
    with pytest.raises(ValueError, match="Expected optimizer="):
        parse_call(text, "optimizer")


def test_positive_and_one_of_pass_what_is_not_set() -> None:
    positive(a=None, b="auto", c=1, d=0.5)
    one_of(("a", "b"), x="a")


def test_differences() -> None:
    assert differences(Config(), Config(rounds=5, seed=2)) == {"rounds": (20, 5), "seed": (0, 2)}
    assert differences(Config(), Config()) == {}


def test_config_needs_no_jax() -> None:
    code = "import sys, fedsim; fedsim.Config(rounds=3); assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_kind_starts_at_a_rate_of_its_own() -> None:
    """The same from Python and from the command line; one that is named stays."""
    from fedsim.cli.options import RunOptions, parse_from
    from fedsim.config import MAIN_JOB, RATES, main_job
    from fedsim.peft import KINDS

    assert set(RATES) <= set(KINDS) and "lora" not in RATES
    for kind, rate in RATES.items():
        options, start = parse_from(RunOptions, ["--peft", kind], "fedsim run")
        assert options.config() == main_job(peft=kind) and main_job(peft=kind).lr == rate
        assert rate == MAIN_JOB["lr"] or f"lr={rate:g}, the rate of {kind}" in start.name
        assert main_job(peft=kind, lr=0.5).lr == 0.5
        assert parse_from(RunOptions, ["--peft", kind, "--lr", "0.5"], "fedsim run")[0].config().lr == 0.5
    assert main_job().lr == main_job(peft="lora").lr == MAIN_JOB["lr"]
