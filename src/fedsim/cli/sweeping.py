"""The command `fedsim sweep`: a file or options with several values, what is planned, what is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fedsim import own
from fedsim.cli import help
from fedsim.cli.forms import arities, check_form, values_of
from fedsim.cli.options import Options, Start, grouped, starting
from fedsim.config import RATES, Config, Speed, main_job, nearest, refuse_idle_everywhere

if TYPE_CHECKING:
    from fedsim.sweeps.cells import Sweep


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Run many runs: every combination of the values, resumable to the last cell.

    An option with several values varies: `fedsim sweep --peft lora bias full --clients-per-round 10 30 --seeds 0 1 2 --out
    study`. Or a file says it all: `fedsim sweep my.py` defines `sweep = fedsim.Sweep(...)`, or a function `sweep()` that
    yields a config for each cell; `fedsim sweep my.py:full` takes another name of the file. The same command goes on after
    any stop, and runs only what is new after a change.
    """

    seeds: tuple[int, ...] = ()
    """Seeds of every cell (default: that of the config)."""
    tune: tuple[str, ...] = ()
    """Options that are chosen on validation before the cells, once for each method: `lr=1e-4,1e-3,1e-2` (default: none)."""
    tune_by: tuple[str, ...] = ()
    """What makes a method (default: PEFT kind and other options of the model, the algorithm, the optimizers)."""
    repeat: int = 1
    """Times that every cell is run with the same seed."""
    out: Path | None = None
    """The sweep's folder (default: runs/sweep-<hash of the options>, or runs/<file>, runs/<file>-<name>)."""
    jobs: int = 1
    """Processes that share the cells, each with its part of this machine's cores or one of its GPUs; or jobs of a launcher."""
    launcher: str = "local"
    """Who starts them: local, slurm, submitit_local or ray, with options like "slurm(partition='gpu')" (docs/sweeps.md)."""
    retry: bool = False
    """Run failed cells again."""
    list: bool = False
    """Show how every cell stands, and run nothing."""
    dry_run: bool = False
    """Print cells, bytes, memory, time and what they share; train nothing."""
    yes: bool = False
    """Run more than 10,000 cells."""
    quiet: bool = False
    """Show nothing."""


SWEEP = "sweep"  # the name that a file gives its sweep, unless the command line says another
OWN = tuple(
    f.name for f in dataclasses.fields(SweepOptions) if f.name not in {o.name for o in dataclasses.fields(Options)}
)


def read(argv: Sequence[str]) -> tuple[SweepOptions, Sweep, Path]:
    """The options, the sweep that they ask for, and its folder.

    Raises:
        ValueError: an option that cannot vary, values that are none, a file that defines no sweep.
    """
    from fedsim.sweeps.cells import Sweep, refuse_many

    file, name = named(argv[0]) if argv else (None, SWEEP)
    words = list(argv[1:] if file else argv)
    given = from_file(file, name) if file else None
    flags = arities(SweepOptions)
    typed = dict.fromkeys(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    several = {flag: values for flag in typed if flags.get(flag) == 1 and len(values := values_of(flag, words)) > 1}
    once = first_values(words, several)
    check_form(once, flags)
    start = starting(once) if given is None else Start(str(file), given.base, given.speed)
    base, speed = start.config, start.speed
    options = value(once, base, speed)
    axes = {name_of(flag): axis(flag, values, base, speed) for flag, values in several.items()}
    together: dict[str, list[Any]] = {}
    usual = given is None and start.config.replace(lr=main_job().lr) == main_job()
    if usual and "peft" in axes and not values_of("--lr", words) and "lr" not in tuned(options.tune):
        # As `fedsim run --peft KIND` has it: in the main job each kind has a rate of its own.
        kinds = axes.pop("peft")
        together = {"peft": kinds, "lr": [RATES.get(kind, main_job().lr) for kind in kinds]}
    if given is not None:
        made = dataclasses.replace(
            given,
            base=given.base if given.configs else options.config(),
            speed=options.speed,
            grid={**given.grid, **axes},
            seeds=options.seeds or given.seeds,
            tune=tuned(options.tune) or given.tune,
            tune_by=options.tune_by or given.tune_by,
            repeat=max(options.repeat, given.repeat),
        )
        if given.configs and (axes or options.config() != base):
            raise ValueError(f"Expected {file} without other options, as it yields every config; change the file.")
    else:
        made = Sweep(
            base=options.config(),
            grid=axes,
            zip=together,
            seeds=options.seeds,
            repeat=options.repeat,
            tune=tuned(options.tune),
            tune_by=options.tune_by or None,
            speed=options.speed,
        )
    if not options.list:
        refuse_many(made, yes=options.yes)
        if not made.configs:
            refuse_idle_everywhere(first_and_all(made), start.config)
    return options, made, options.out or default_folder(made, file, name)


def first_and_all(made: Sweep) -> Iterator[Config]:
    """The base, which has the first value of each option, then the config of every cell, made only where it is asked for."""
    from fedsim.sweeps.cells import foreseen

    yield made.base
    yield from (cell.config for cell in foreseen(made)[1])


def named(word: str) -> tuple[Path | None, str]:
    """`my.py`, or `my.py:NAME`, as the file and the name that it gives the sweep; no file for an option."""
    path, colon, name = word.rpartition(":")
    if colon and path.endswith(".py"):
        return Path(path), name
    return (Path(word) if word.endswith(".py") else None), SWEEP


def name_of(flag: str) -> str:
    """The option of a flag."""
    return flag[2:].replace("-", "_")


def first_values(words: Sequence[str], several: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line with the first value alone of each option that varies.

    Raises:
        ValueError: an option of the sweep itself that has several values.
    """
    made: list[str] = []
    skip = 0
    for word in words:
        if word.startswith("--"):
            skip = 0
        elif skip == 1:
            continue
        made.append(word)
        flag, equals, _ = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in several:
            if name_of(flag) in OWN:
                raise ValueError(
                    f"Expected {flag} with one value, not {' '.join(several[flag])}; it is the sweep's own."
                )
            skip = 1 if equals else 2
        elif skip == 2:
            skip = 1
    return made


def value(words: Sequence[str], base: Config, speed: Speed) -> SweepOptions:
    """The options of a command line on top of a base; nothing is checked between them yet."""
    return help.read(tyro.conf.OmitArgPrefixes[SweepOptions], words, "fedsim sweep", grouped(SweepOptions, base, speed))


def axis(flag: str, values: Sequence[str], base: Config, speed: Speed) -> list[Any]:
    """The values of an option that varies, each read as if it stood alone."""
    return [option(value([flag, word], base, speed), name_of(flag)) for word in values]


def option(options: SweepOptions, name: str) -> Any:
    """An option out of its group."""
    return next(getattr(group, name) for group in (*options.of_config(), options.speed) if hasattr(group, name))


def tuned(words: Sequence[str]) -> dict[str, list[Any]]:
    """`lr=1e-4,1e-3` as {"lr": [0.0001, 0.001]}.

    Raises:
        ValueError: another form, or an unknown option.
    """
    found = {}
    names = {f.name: f for f in dataclasses.fields(Config)}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise ValueError(f"Expected --tune {word} to be an option with its values, like lr=1e-4,1e-3,1e-2.")
        if name not in names:
            raise ValueError(f"Expected --tune {name} to be an option{nearest(name, names)}.")
        flag = "--" + name.replace("_", "-")
        found[name] = axis(flag, values.split(","), Config(), Speed())
    return found


def from_file(file: Path, name: str = SWEEP) -> Sweep:
    """The sweep that a Python file defines under a name; the file may import those beside it.

    Raises:
        ValueError: no such file, it does not run, or it defines none.
    """
    from fedsim.sweeps.cells import Sweep

    try:
        module = own.execute(file, "sweep", beside=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(
            f"Expected {file} to run, not to end with {type(error).__name__}: {error}; correct it."
        ) from error
    found = getattr(module, name, None)
    if isinstance(found, Sweep):
        return found
    if callable(found):
        cells: dict[str, Config] = {}
        for number, one in enumerate(found()):
            name, config = one if isinstance(one, tuple) else (str(number), one)
            if not isinstance(config, Config) or name in cells:
                raise ValueError(
                    f"Expected {name}() of {file} to yield a Config, or (name, Config) with a new name; cell {number} is {one!r}."
                )
            cells[name] = config
        return Sweep(configs=cells, speed=getattr(module, "speed", Speed()))
    others = [other for other, value in vars(module).items() if isinstance(value, Sweep)]
    raise ValueError(
        f"Expected {file} to define {name} = fedsim.Sweep(...), or a function {name}() that yields configs"
        + (f"; it has {', '.join(others)}: name one, like {file}:{others[0]}." if others else ".")
    )


def default_folder(made: Sweep, file: Path | None, name: str = SWEEP) -> Path:
    """Where a sweep lies if nothing is said: the same command finds it again."""
    if file is not None:
        return Path("runs") / (file.stem if name == SWEEP else f"{file.stem}-{name}")
    told = json.dumps([made.base.hash(), made.grid, made.zip, made.seeds, made.tune], default=str)
    return Path("runs") / f"sweep-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def sweep(argv: Sequence[str]) -> int:
    """Run many runs: a file, or options with several values; resumable to the last cell."""
    options, made, where = read(argv)
    if options.list:
        from fedsim.sweeps.show import print_cells
        from fedsim.sweeps.study import load_sweep

        print_cells(load_sweep(where))
        return 0
    if options.dry_run:
        from fedsim.cli.forecast import forecast

        forecast(made, where, yes=options.yes)
        return 0
    from fedsim.sweeps.sweep import sweep as run

    study = run(
        made,
        out=where,
        jobs=options.jobs,
        launcher=options.launcher,
        retry=options.retry,
        quiet=options.quiet,
        yes=options.yes,
    )
    return 1 if any(row["state"] == "failed" for row in study.rows()) else 0


def compare_cells(folder: Path, target: float | None) -> None:
    """Prints a sweep's table over seeds, and draws its pictures into its folder."""
    from fedsim.sweeps.study import load_sweep

    study = load_sweep(folder)
    study.table(target=target)
    for x in ("rounds", "bytes"):
        print(f"drawn: {study.plot(folder / f'{study.metric}_{x}.png', x)}")
