"""The command line: every option can be set, nonsense is refused before any work, and help does not wait for JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from fedsim import wire
from fedsim.cli import main as cli
from fedsim.cli.forms import arities
from fedsim.cli.options import CostOptions, ProfileOptions, RunOptions, ShowOptions, parse
from fedsim.config import RATES, Config, Speed, main_job

pytestmark = pytest.mark.usefixtures("compile_once")

# Options whose values are names: any other value than the default that their check takes.
NAMES = {
    "dataset": "tfds:mnist",
    "backbone": "mlp",
    "peft": "lora+bias",
    "algorithm": "my.py:fed_mine(mu=0.5)",
    "optimizer": "sgd(momentum=0.9)",
    "lr_schedule": "cosine_decay_schedule(1.0, 20)",
    "server_optimizer": "adam",
    "server_lr_schedule": "linear_schedule(1.0, 0.0, 5)",
    "size_law": "power(exponent=1.5)",
    "codec_up": "topk(0.01)+quantise(8)",
    "codec_down": "bfloat16",
    "metric": "loss",
}
# Options that are refused alone: what they go with.
WITH = {
    "deadline": {"compute": "5"},
    "late": {"compute": "5", "deadline": 9.0},
    "personal_epochs": {"local_test": 0.2},
    "personal_lr": {"personal_epochs": 1, "local_test": 0.2},
    "eval_clients": {"local_test": 0.2},
    "epochs": {"steps": None},
    "adapter": {"peft": "adapter"},
    "adapter_width": {"peft": "adapter"},
    "prompt_tokens": {"peft": "prompt"},
    "prompt_depth": {"peft": "prompt"},
    "prefix_tokens": {"peft": "prefix"},
    "bias_patch": {"peft": "bias"},
    "last_blocks": {"peft": "last_k"},
    "data_dir": {"dataset": "tfds:mnist"},
    "groups": {"head_rounds": 0},
    "domain_column": {"partition": "domain"},
    "classes_per_client": {"partition": "shards"},
    "size_law": {"partition": "quantity"},
    "dp": {"delta": 1e-5, "noise_multiplier": 2.0},
    "delta": {"dp": "central", "noise_multiplier": 2.0},
    "noise_multiplier": {"dp": "central", "delta": 1e-5},
    **{
        name: {"dp": "central", "delta": 1e-5, "noise_multiplier": 2.0}
        for name in ("epsilon", "clip_norm", "clip_quantile", "per_layer", "sampling", "relation", "accountant")
    },
    "bands": {"dp": "central", "delta": 1e-5, "noise_multiplier": 2.0},
    **{name: {"task": "language_model"} for name in ("turns", "loss_on", "too_long", "packing")},
}


def other(name: str, hint: Any, default: Any) -> tuple[Any, list[str]]:
    """A value that is not the default, and the arguments that set it."""
    flag = "--" + name.replace("_", "-")
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if hint is bool:
        return not default, [flag if not default else flag.replace("--", "--no-", 1)]
    if name in NAMES:
        return NAMES[name], [flag, NAMES[name]]
    if get_origin(hint) is tuple:
        values = ("small(share=1)",) if name == "groups" else ("key", "blocks/*/up")
        return values, [flag, *values]
    if float in kinds:
        value = 0.75 if default is None else default * 1.5 or 0.25
        return value, [flag, str(value)]
    if int in kinds:
        value = 3 if default in (None, "auto") else default + 1
        return value, [flag, str(value)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            value = next(v for v in get_args(kind) if v != default)
            return value, [flag, value]
    assert str in kinds, f"the test knows no value for {name}: {hint}"
    return "other", [flag, "other"]


FIELDS = [(kind, field.name) for kind in (Config, Speed) for field in dataclasses.fields(kind)]
DEFAULTS = {Config: main_job(), Speed: Speed()}


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_option_can_be_set(kind: type, name: str) -> None:
    value, argv = other(name, typing.get_type_hints(kind)[name], getattr(DEFAULTS[kind], name))
    needed = WITH.get(name, {})
    argv = argv + [part for k, v in needed.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    options = parse(RunOptions, argv, "fedsim run")
    config, speed = options.config(), options.speed
    if name == "backbone":  # another backbone starts from Config(), not from the main job that is made for MiniLM
        assert config == Config(backbone=value)
        return
    changed = {f"{k.__name__}.{f.name}" for k, found in ((Config, config), (Speed, speed))
               for f in dataclasses.fields(k) if getattr(found, f.name) != getattr(DEFAULTS[k], f.name)}  # fmt: skip
    rate = ("lr",) if needed.get("peft") in RATES else ()  # a kind's own
    assert changed == {f"{kind.__name__}.{option}" for option in (name, *needed, *rate)}
    assert getattr(config if kind is Config else speed, name) == value


def test_no_option_is_named_twice() -> None:
    names = [name for _, name in FIELDS] + [f.name for f in dataclasses.fields(RunOptions)]
    assert len(names) == len(set(names))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--rounds", "0"], "Expected rounds=0 > 0"),
        (["run", "--clients", "5"], "Expected clients_per_round=10 <= clients=5"),
        (["run", "--target", "62"], "Expected 0 < target=62.0 <= 1 of metric=accuracy; write 62 % as 0.62."),
        (["run", "--metric", "acuracy"], "the scores of task=classification (did you mean accuracy"),
        (["run", "--task", "language_model"], "Expected backbone='minilm_l6' to be a decoder"),
        (["run", "--backbone", "minilm"], "did you mean minilm_l6"),
        (["run", "--optimizer", "adm"], "Expected optimizer='adm'"),
        (["run", "--optimizer", "sgd(momentum=x)"], "Expected optimizer='sgd(momentum=x)'"),
        (["run", "--algorithm", "fed_avgg"], "did you mean fed_avg"),
        (["run", "--algorithm", "none.py:mine"], "Expected algorithm file 'none.py' to exist"),
        (["run", "--dry-run", "--peft", "lorra"], "did you mean lora"),
        (["run", "--dataset", "none.npz", "--backbone", "mlp", "--peft", "full"], "Expected dataset='none.npz'"),
        (["run", "--dataset", "20newsgroop", "--backbone", "mlp", "--peft", "full"], "did you mean 20newsgroups"),
        (["run", "--resume", "nowhere"], "Expected 'nowhere' to hold a run"),
        (["run", "--resume", "nowhere", "--rounds", "3"], "Expected --resume without --rounds"),
        (["run", "none.py"], "Expected experiment file 'none.py' to exist"),
        (
            ["rnu"],
            "Expected command 'rnu' to be one of run, sweep, profile, cost, privacy, compare, check, data, list (did you mean run?)",
        ),
        (["list", "pefts"], "did you mean peft"),
        (["data", "lits"], "did you mean list"),
        (["data", "fetch", "minilm"], "minilm"),
        (["compare", "a", "b"], "Expected 'a' to hold a run"),
        (["compare", "a", "b", "c"], "Expected 'a' to hold a run"),
        (["compare"], "Expected fedsim compare with two or more folders of runs, not 0"),
        (["compare", "a"], "Expected fedsim compare with two or more folders of runs, not 1"),
        (["run", "--lr", "0.1", "--rounds", "3", "--lr=0.2"], "Expected --lr once; leave out all but one."),
        (["run", "--head_rounds", "3", "--head-rounds", "2"], "Expected --head-rounds once"),
        (["run", "--dora", "--no-dora"], "Expected --dora once"),
        (["run", "--targets", "a", "--targets", "b"], "Expected --targets once; put all its values behind it, as in"),
        (["check", "fed_avg", "--x", "1", "--x", "2"], "Expected --x once"),
        (["data", "fetch", "--accept-licence", "a", "--accept-licence", "b"], "Expected --accept-licence once"),
        (
            ["run", "--seed", "0", "1", "2"],
            "Expected --seed with one value, not 0 1 2; start the command once for each",
        ),
        (["run", "--rank", "4", "--peft", "bias"], "Expected rank=4 with peft=lora or ffa_lora: under peft='bias' it"),
        (["run", "--epochs", "2"], "Expected epochs=2 with steps=None: under steps=4 it means nothing"),
        (["run", "--alpha", "0.5", "--partition", "iid"], "under partition='iid' it means nothing"),
        (["run", "--personal-lr", "0.5"], "Expected personal_lr=0.5 with personal_epochs above 0"),
        (
            ["run", "--backbone", "mlp", "--peft", "full", "--tokens", "8"],
            "Expected tokens=8 with a backbone that reads",
        ),
        (["cost", "--rank", "4", "--peft", "bias", "head"], "Expected rank=4 with peft=lora or ffa_lora"),
        (["cost", "--classes", "1000000000"], "Expected classes=1000000000 <= 10000000"),
        (["cost", "--backbone", "mlp", "--peft", "full", "--input-shape", "0"], "Expected input_shape=0 > 0"),
        (["run", "--devices", "99"], "Expected devices=99 <= "),
        (["run", "--lr", "1e400"], "Expected lr=inf to be 0 or a finite number"),
        (
            ["run", "--rounds", "1" + "0" * 30],
            "Expected rounds=1" + "0" * 30 + " to be a whole number that fits an array",
        ),
        (["run", "--steps", "2147483648"], "Expected steps=2147483648 <= 10000000"),
        (["run", "--image-size", "1048576", "--backbone", "vit_b16"], "Expected image_size=1048576 <= 4096"),
        (
            ["run", "--lr-schedule", "sgdr_schedule([])"],
            "Expected lr_schedule='sgdr_schedule([])' to be a call that optax",
        ),
        (["run", "--optimizer", "x({[]: 1})"], "Expected optimizer='x({[]: 1})' to be a name or a call"),
        (["run", "--optimizer", "noisy_sgd"], "Expected optimizer='noisy_sgd' to draw nothing by itself"),
        (["run", "--dataset", ""], "Expected dataset='' to be a text that is not empty"),
        (["list", "peft", "data"], "Expected fedsim list with one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_nonsense_is_refused_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fedsim: Expected ") and message in said.err and said.out == ""
    assert list(here.iterdir()) == [], "no folder is left behind"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--roundz", "3"], "--rounds"),
        (["run", "--partition", "dirichelt"], "dirichlet"),
        (["run", "--rounds", "many"], "--rounds"),
        (["run", "--lr"], "--lr"),
        (["run", "--lanes", "0"], "Expected lanes=0 > 0"),
        (["run", "--pool", "clss"], "not clss"),
        (["run", "--devices", "many"], "--devices"),
        (["data", "list", "--all"], "--all"),
        (["data", "prepare"], "tfds:NAME"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_unknown_options_are_refused_and_the_nearest_named(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("leaf"), TypeError("first line\nsecond line"), ZeroDivisionError()])
def test_an_unexpected_error_is_one_line_that_says_whose_fault_it_is(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where its traceback is to be had."""

    def broken(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "list", broken)
    assert cli.main(["list"]) == 2
    said = capsys.readouterr()
    first = str(error).partition("\n")[0]
    assert said.err.startswith(f"fedsim: internal error: {type(error).__name__}: {first}; run with --debug")
    assert "a fault of fedsim" in said.err and said.err.count("\n") == 1 and said.out == ""
    for argv in (["--debug", "list"], ["list", "--debug"]):
        assert cli.main(argv) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback (most recent call last):") and "in broken" in shown
        assert shown.endswith(said.err), "the line is the last"


def test_debug_shows_the_traceback_of_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a command as a user gives it, which is handed on without the word."""
    assert cli.main(["run", "--rounds", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedsim: Expected rounds=0 > 0") and said.count("\n") == 1
    assert cli.main(["run", "--rounds", "0", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "parse_from" in shown and shown.endswith(said)


@pytest.mark.slow
def test_debug_in_a_process_of_its_own(environment: dict[str, str], here: Path) -> None:
    """A fault in code of the user's own is shown with the line of its file."""
    (here / "mine.py").write_text("def fed_mine(task):\n    return 1 // 0\n")
    (here / "d.csv").write_text("text,label\n" + "a b c,x\nd e f,y\n" * 60)
    options = "--dataset d.csv --backbone bert_tiny --weights random --clients 4 --clients-per-round 2 --quiet"
    command = [sys.executable, "-m", "fedsim", "run", "--algorithm", "mine.py:fed_mine", *options.split()]
    plain, debug = (
        subprocess.run([*command, *more], env=environment, cwd=here, capture_output=True, text=True, check=False)
        for more in ([], ["--debug"])
    )
    assert plain.returncode == debug.returncode == 2
    assert "Traceback" not in plain.stderr and "internal error: ZeroDivisionError" in plain.stderr.splitlines()[-1]
    assert "Traceback" in debug.stderr and 'mine.py", line 2, in fed_mine' in debug.stderr
    assert debug.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


HELP = """
import sys
from fedsim.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
loaded = [m for m in ("jax", "numpy", "flax", "optax", "orbax", "tensorflow_datasets", "matplotlib") if m in sys.modules]
print(loaded, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["run", "--help"], ["compare", "--help"], ["check", "--help"], ["data"]], ids=" ".join
)
def test_help_is_immediate_and_without_jax(environment: dict[str, str], argv: list[str]) -> None:
    """Processor time, not wall time, and the least of five at most: other tests run beside this one."""
    command, spent = [sys.executable, "-c", HELP, *argv], []
    while len(spent) < 5 and min(spent, default=1.0) >= 0.5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "[]\n")
        assert "usage: fedsim" in done.stdout
        spent.append((after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime))
    assert min(spent) < 0.5, spent


def test_help_shows_every_option_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for _, name in FIELDS:
        assert f"-{name.replace('_', '-')}" in text, name
    assert "--dry-run" in text and "--resume" in text and "Communication rounds" in text


HELPS = [
    *([command] for command in cli.COMMANDS),
    *(["data", action] for action in cli.ACTIONS),
]


def help_of(argv: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `--help` prints, without frames and line breaks."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with contextlib.suppress(SystemExit):
        assert cli.main([*argv, "--help"]) == 0
    return re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("argv", HELPS, ids=" ".join)
def test_help_says_what_no_value_means(
    argv: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option is shown as `{None}|PATH` or with a default of None."""
    text = help_of(argv, columns, capsys, monkeypatch)
    assert text.startswith(f"usage: fedsim {' '.join(argv)}")
    assert "None" not in text and "(default: )" not in text and "True" not in text


@pytest.mark.parametrize("kind", [RunOptions, ProfileOptions, ShowOptions, CostOptions], ids=lambda k: k.__name__)
def test_every_option_says_its_default_once(
    kind: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {RunOptions: ["run"], ProfileOptions: ["profile"], ShowOptions: ["data", "show"], CostOptions: ["cost"]}
    text = help_of(names[kind], 100, capsys, monkeypatch)
    flags = arities(kind)
    assert all(flag + " " in text or flag + "," in text for flag in flags)
    assert text.count("(default: ") == text.count("(default") == len(flags)


def test_help_of_what_a_file_sets(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value in the place of what no value means; the word None takes it back."""
    (here / "mine.py").write_text('import fedsim\nconfig = fedsim.Config(pool="cls", steps=4, examples=300)\n')
    text = help_of(["run", "mine.py"], 100, capsys, monkeypatch)
    assert "that the head reads. (default: cls)" in text and "drawn by seed. (default: 300)" in text
    assert "the backbone's own" not in text
    options = parse(RunOptions, ["mine.py", "--pool", "None", "--steps", "None", "--examples", "9"], "fedsim run")
    assert (options.config().pool, options.config().steps, options.config().examples) == (None, None, 9)


EXPERIMENT = """
import fedsim

config = fedsim.Config(dataset="d.npz", backbone="mlp", peft="full", rounds=7, targets=("key",), lr=0.5)
speed = fedsim.Speed(lanes=3)
"""


def test_an_experiment_file_and_options_that_override_it(here: Path) -> None:
    (here / "mine.py").write_text(EXPERIMENT)
    options = parse(RunOptions, ["mine.py", "--rounds", "5", "--eval-batch", "9"], "fedsim run")
    wanted = Config(dataset="d.npz", backbone="mlp", peft="full", rounds=5, targets=("key",), lr=0.5)
    assert options.config() == wanted and options.speed == Speed(lanes=3, eval_batch=9)
    (here / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"Expected empty.py to define config = fedsim.Config"):
        parse(RunOptions, ["empty.py"], "fedsim run")
    (here / "wrong.py").write_text("import fedsim\nconfig = fedsim.Config(rounds=0)\n")
    with pytest.raises(ValueError, match="Expected rounds=0 > 0"):
        parse(RunOptions, ["wrong.py"], "fedsim run")


def arguments(data: Path, *more: str) -> list[str]:
    text = (
        f"run --dataset {data} --backbone mlp --peft full --clients 8 --clients-per-round 3 --rounds 2 --head-rounds 0"
    )
    return [*text.split(), "--no-compilation-cache", "--devices", "1", "--quiet", *more]


def test_dry_run_trains_nothing(here: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = blobs(here.parent)
    argv = arguments(data, "--dry-run")
    argv[argv.index("--head-rounds") + 1] = "1"
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert list(here.iterdir()) == []
    for part in (
        "Starting from: plain FedAvg (the main job is made for minilm_l6;",
        "Nothing was trained",
        "rounds 1 to 1: head",
        "rounds 2 to 2: full",
        "1 lane 100% full",
        "time",
        "memory",
    ):
        assert part in said, part
    # layers 6-128-64 and a head of 3 classes: 9,347 parameters, of them 195 in the head, 3 clients each way
    assert "37,388 B" in said and "780 B" in said
    assert f"{2 * 3 * 780:,} B" in said and f"{2 * 3 * 37388:,} B" in said


def test_run_compare_and_the_closing_table(
    here: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.cli import job

    data = blobs(here.parent)
    monkeypatch.setattr(job, "HEAD_ROUNDS", 3)
    assert cli.main(arguments(data, "--out", "a")) == 0
    said = capsys.readouterr().out
    for part in ("start", "head to convergence", "full (this run)", "minus head, test accuracy", "Folder: a"):
        assert part in said, part
    assert (here / "a" / "baselines" / "head-to-convergence" / "summary.json").is_file()
    assert cli.main(arguments(data, "--out", "b", "--seed", "1", "--no-head-baseline")) == 0
    assert not (here / "b" / "baselines").exists()
    capsys.readouterr()
    assert cli.main(["compare", "a", "b"]) == 0
    said = capsys.readouterr().out
    assert "seed" in said and "batch_size" not in said and "bytes" in said.lower() and "accuracy" in said
    assert cli.main(arguments(data, "--out", "b")) == 2
    assert "Expected out='b' to hold no run; go on with it by --resume b" in capsys.readouterr().err


def test_data_list_and_show(here: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 0 and "fedsim data fetch" in capsys.readouterr().out
    assert cli.main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert "20newsgroups" in said and "minilm_l6" in said and "licence" in said
    show = f"data show --dataset {blobs(here.parent)} --clients 8 --clients-per-round 3 --out p.png".split()
    assert cli.main(show) == 0
    assert "blobs" in capsys.readouterr().out and (here / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_profile_and_data_show_say_what_they_start_from(
    here: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of `fedsim run`, and nothing where the options are refused."""
    options = f"--dataset {blobs(here.parent)} --clients 8 --clients-per-round 3".split()
    (here / "mine.py").write_text(
        "import fedsim\nconfig = fedsim.Config(alpha=0.5, rank=3, peft='head', backbone='mlp')\n"
    )
    show = ["data", "show", *options]
    for argv, said in (
        (show, "Starting from: the main job."),
        ([*show, "--preset", "plain"], "Starting from: plain FedAvg."),
        ([*show, "--backbone", "mlp"], "Starting from: plain FedAvg (the main job is made for minilm_l6;"),
        (["data", "show", "mine.py", *options], "Starting from: mine.py.\nNot read: rank=3 with peft=lora or ffa_lora"),
    ):
        assert cli.main(argv) == 0 and capsys.readouterr().out.startswith(said)
    profile = f"profile --backbone mlp --peft full --repeats 1 --sweep lanes=2 --no-trace {' '.join(options)}".split()
    assert cli.main(profile) == 0
    assert capsys.readouterr().out.startswith("Starting from: plain FedAvg (the main job is made for minilm_l6;")
    for argv in (
        [*profile, "--tokens", "8"],
        [*profile, "--devices", "99"],
        ["data", "show", "--dataset", "none.npz"],
    ):
        assert cli.main(argv) == 2 and capsys.readouterr().out == ""


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsim import peft
    from fedsim.algorithms import ALGORITHMS
    from fedsim.backbones import BACKBONES

    assert cli.main(["list"]) == 0
    words = set(capsys.readouterr().out.split())
    assert {*ALGORITHMS, *BACKBONES, *peft.KINDS, "20newsgroups"} <= words
    assert cli.main(["list", "peft"]) == 0
    only = capsys.readouterr().out
    assert "lora" in only and "fed_avg" not in only
    assert cli.main(["list", "codecs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0].partition("(")[0] for line in lines[1:]} == set(wire.CODECS)
    assert any("topk(share, feedback=True)" in line for line in lines)


def test_without_a_command_the_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in cli.COMMANDS)


@pytest.mark.slow
def test_a_resumed_run_is_compared_as_it_was_asked(
    here: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--no-head-baseline is kept in the record; a comparison that was stopped is gone on with."""
    from fedsim.cli import job
    from fedsim.simulation import ending

    data = blobs(here.parent)
    monkeypatch.setattr(job, "HEAD_ROUNDS", 3)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    finish = ending.record.finish
    for out, more in (("a", []), ("b", ["--no-head-baseline"])):
        monkeypatch.setattr(ending.record, "finish", stop)
        assert cli.main(arguments(data, "--out", out, *more)) == 130
        monkeypatch.setattr(ending.record, "finish", finish)
        assert cli.main(["run", "--resume", out]) == 0
        assert (here / out / "baselines").exists() == (out == "a")
    (here / "a" / "baselines" / "head-to-convergence" / "summary.json").unlink()
    capsys.readouterr()
    assert cli.main(["run", "--resume", "a"]) == 0
    said = capsys.readouterr().out
    assert (here / "a" / "baselines" / "head-to-convergence" / "summary.json").is_file()
    assert "minus head, test accuracy" in said and "against 3 rounds and" in said


def test_a_verdict_is_of_equal_budgets() -> None:
    from fedsim.cli.job import beside_head
    from fedsim.report.tables import Row

    own = Row("lora", 0.5, 0.5, 5, 0, 1000)
    longer = beside_head("lora", own, Row("head", 0.6, 0.6, 500, 2000, 1500))
    assert "wins" not in longer and "after 5 rounds and 1000 B against 500 rounds and 3.42 KiB" in longer
    assert "The head alone wins, with no larger budget." in beside_head("lora", own, Row("head", 0.6, 0.6, 5, 0, 900))
    assert beside_head("lora", own._replace(test=None), own) == ""
