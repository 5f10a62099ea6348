"""The commands behind `fedsim run`: fetch what is missing, run, run the comparisons, print the closing table."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim import record, stops
from fedsim.config import RATES, RELIABLE, SMALLER, USUAL, Config, Speed, metric_of, nearest
from fedsim.engine import processes
from fedsim.report import tables as report
from fedsim.units import size, words

HEAD, BASELINES = (
    "head to convergence",
    ("bias", "lora", "full", "centralised"),
)  # names of comparisons, and of their folders
COMPARISONS = "comparisons"  # field of config.json: what the run is compared with, so that a resumed one is too
HEAD_ROUNDS, HEAD_PATIENCE = 500, 100  # the head run ends when its metric on validation stands still
CENTRAL_LR = 4e-3  # of the centralised run there, which lacks the mean over a cohort that bears a higher one


def head_config(config: Config) -> Config:
    """The head alone, run to convergence, with the rest of the config as it is."""
    return config.replace(
        peft="head",
        head_rounds=0,
        lr=config.head_lr or config.lr,
        rounds=config.rounds if config.traced else HEAD_ROUNDS,  # a trace may say nothing of later rounds
        patience=HEAD_PATIENCE,
        target=None,
        eval_every=1,
    )


def baseline_configs(config: Config, examples: int) -> dict[str, Config]:
    """The runs of `--baselines`: PEFT kinds in all layers under the config's options, and all `examples` at one client."""
    others = {kind: config.replace(peft=kind, targets=("query", "value")) for kind in ("bias", "lora", "full")}
    # Each at a rate that its kind bears: a LoRA's destroys a pre-trained encoder that is trained in full.
    others = {kind: made.replace(lr=min(config.lr, RATES.get(kind, config.lr))) for kind, made in others.items()}
    others["centralised"] = centralised(config, examples).replace(lr=min(config.lr, CENTRAL_LR))
    return others


def centralised(config: Config, examples: int) -> Config:
    """The same run with one client that holds everything: no federation, the same code and the same curves.

    A round sees as many examples as a cohort of M of N clients: M * steps full batches, or with epochs, on average,
    epochs * examples * M / N examples, as full batches too.

    Args:
        examples: that all clients together train on.
    """
    seen = config.epochs * examples * config.clients_per_round / config.clients
    steps = config.steps * config.clients_per_round if config.steps else max(1, round(seen / config.batch_size))
    return config.replace(clients=1, clients_per_round=1, partition="iid", steps=steps, **RELIABLE)


def owned_by(problem: Any, config: Config) -> Any:
    """The same `build.Problem`, data and features, under a config whose clients own them differently."""
    from fedsim.data import partition

    own, local_test = partition.split_local(partition.make(config, problem.dataset), config.local_test)
    return problem._replace(config=config, partition=own, local_test=local_test)


def run_job(
    config: Config,
    speed: Speed,
    *,
    out: Path | None = None,
    head: bool = True,
    baselines: bool = False,
    central: bool = False,
    quiet: bool = False,
    start: str = "",
) -> record.Run:
    """Runs `config` (or, if `central`, its centralised form), then what it is compared with; prints the closing table.

    `start` is printed before: what the options start from.

    The comparisons are whole runs of their own, in the folder `baselines/` of the run.
    """
    from fedsim.simulation import build, needs, simulate

    if central and baselines:
        raise ValueError(
            "Expected --centralized or --baselines, not both; --baselines has a centralised run of its own."
        )
    if config.dp != "none" and (central or baselines):
        option = "centralized" if central else "baselines"
        raise ValueError(
            f"Expected dp={config.dp!r} without --{option}: each comparison would spend a budget of its own on the same clients; "
            "run them apart."
        )
    build.check(config, speed)
    processes.by_first(lambda: record.refuse_used(out))
    needs.fetch_in_turn(config)
    problem = processes.each(lambda: build.problem(config, speed))
    if central:
        config = centralised(config, len(problem.partition.rows))
        problem = owned_by(problem, config)
    if start and not quiet and processes.is_first():
        print(start, flush=True)
    # The outputs of a language model are its token embedding's; under privacy a comparison would cost as much again.
    has_head = config.task == "classification" and config.dp == "none"
    names = [HEAD] * (head and has_head and config.peft != "head") + [*BASELINES] * baselines
    done = simulate.run(config, speed, out=out, quiet=quiet, problem=problem, about={COMPARISONS: names})
    _compared(done, config, problem, speed, names, quiet)
    return done


def _compared(done: record.Run, config: Config, problem: Any, speed: Speed, names: Sequence[str], quiet: bool) -> None:
    """Makes the runs that a finished one is compared with, or what is missing of them, and prints the closing table."""
    configs: dict[str, Config] = {}
    if names:  # else its options may fit no other run, as those of example-level privacy do not
        configs = {HEAD: head_config(config), **baseline_configs(config, len(problem.partition.rows))}
    rows: list[report.Row] = []
    try:
        for name in names:
            rows += _comparison(problem, speed, done.directory, name, configs[name], quiet)
    except KeyboardInterrupt as stop:
        words = f"Stopped in what the run is compared with; {stops.way_on(done.directory)}"
        raise stops.reworded(stop, words) from None
    finally:  # the run itself is done: its table is due, whatever happens to what it is compared with
        close(done, rows)


def _comparison(
    problem: Any, speed: Speed, directory: Path, name: str, config: Config, quiet: bool
) -> list[report.Row]:
    """One run for the closing table on the same data and features, made, gone on with, or read; nothing if it fails."""
    from fedsim.simulation import simulate

    folder = directory / "baselines" / name.replace(" ", "-")

    def found() -> tuple[bool, bool]:
        return (folder / record.CONFIG).is_file(), (folder / record.SUMMARY).is_file()

    try:
        begun, ended = processes.by_first(found)
        if ended:
            return [_row(name, processes.by_first(lambda: record.load(folder)))]
        if not quiet and processes.is_first():
            print(f"for comparison: {name}", flush=True)
        shared = owned_by(problem, config)  # the centralised run's client owns everything
        asked: dict[str, Any] = {"resume": folder} if begun else {"config": config, "speed": speed, "out": folder}
        return [_row(name, simulate.run(**asked, quiet=quiet or name == HEAD, problem=shared))]
    except Exception as error:
        if processes.several():
            raise  # it may have failed here alone, and the others wait
        print(f"The comparison {name} failed and is left out: {words(error)}", file=sys.stderr)
        return []


def resume_job(directory: Path, *, quiet: bool = False, trust_code: bool = False) -> record.Run:
    """Goes on with a stopped run and prints its closing table; comparisons that were asked for and are missing are made."""
    from fedsim.engine.host import divide_cpu
    from fedsim.simulation import build, inputs, needs, simulate

    stopped = processes.by_first(lambda: record.load(directory)._replace(trust_code=trust_code))
    divide_cpu(stopped.speed.devices or stopped.about.get("device", {}).get("count"))
    config = processes.each(lambda: inputs.placed(stopped, resumed=True))  # before any of its code runs
    needs.fetch_in_turn(config)
    problem = processes.each(lambda: build.problem(config, stopped.speed))
    done = simulate.run(resume=directory, quiet=quiet, problem=problem, trust_code=trust_code)

    def planned() -> list[str]:
        """What the run's record says; for one made without this command, the head and what is there."""
        there = [name for name in BASELINES if (directory / "baselines" / name / record.SUMMARY).is_file()]
        has_head = stopped.config.task == "classification" and stopped.config.peft != "head" and config.dp == "none"
        return stopped.about.get(COMPARISONS, [HEAD] * has_head + there)

    known = (HEAD, *BASELINES)
    names = [name for name in processes.by_first(planned) if name in known]
    _compared(done, config, problem, done.speed, names, quiet)
    return done


def _row(name: str, run: record.Run) -> report.Row:
    return report.rows(run.summary or {}, name, is_full=True)[-1]


def close(run: record.Run, rows: list[report.Row]) -> None:
    """Prints the closing table, the gap to the head, and where everything is; process 0 does."""
    if not processes.is_first():
        return
    if run.summary is None:
        raise ValueError(f"Expected {run.directory} to hold a finished run; go on with it by --resume.")
    name = f"{run.config.peft} (this run)"
    codecs = run.config.codec_up, run.config.codec_down
    is_full = run.config.peft == "full" and codecs == ("none", "none")
    try:
        report.print_summary(run.summary, more=rows, name=name, is_full=is_full)
    except Exception as error:  # a table that cannot be shown takes nothing from the run
        why = words(str(error).partition("\n")[0])
        print(
            f"The table could not be shown ({why}); {run.directory / record.SUMMARY} holds all of it.", file=sys.stderr
        )
    head = next((row for row in rows if row.name == HEAD), None)
    own = next(row for row in report.rows(run.summary, name, is_full=True) if row.name == name)
    if head is not None and (said := beside_head(run.config.peft, own, head, metric_of(run.config))):
        print(said)
    if run.config.clients == 1:
        print(
            "One client holds everything: the bytes are what it exchanges with the server; training in one place sends none."
        )
    print(f"Folder: {words(run.directory)}")


def beside_head(peft: str, own: report.Row, head: report.Row, metric: str = USUAL) -> str:
    """The gap of the run to the head alone, and both budgets; a verdict only where the head wins with no larger one."""
    if own.test is None or head.test is None:
        return ""
    sent, of_head = report.total(own) or 0, report.total(head) or 0
    gap = own.test - head.test
    wins = (gap > 0 if metric in SMALLER else gap < 0) and (head.rounds or 0) <= (own.rounds or 0) and of_head <= sent
    verdict = " The head alone wins, with no larger budget." if wins else ""
    return (
        f"{peft} minus head, test {metric}: {gap:+.4f}, after {own.rounds} rounds and {size(sent)} against {head.rounds} rounds "
        f"and {size(of_head)}.{verdict}"
    )


def listing(what: str | None) -> None:
    """Prints the names that options take.

    Raises:
        ValueError: an unknown kind of name.
    """
    from fedsim import backbones, data, peft, wire
    from fedsim.algorithms import ALGORITHMS
    from fedsim.data import assets

    tables = {
        "algorithms": {name: (make.__doc__ or "").splitlines()[0] for name, make in ALGORITHMS.items()},
        "backbones": {name: f"{row.kind}" for name, row in backbones.BACKBONES.items()},
        "peft": dict.fromkeys(peft.KINDS, ""),
        "data": {name: assets.ASSETS[name].what for name in data.PACKAGED} | data.FORMS,
        "codecs": {called(name, make): (make.__doc__ or "").splitlines()[0] for name, make in wire.CODECS.items()},
    }
    if what is not None and what not in tables:
        raise ValueError(f"Expected fedsim list {what!r} to be one of {', '.join(tables)}{nearest(what, tables)}.")
    for title, names in tables.items():
        if what in (None, title):
            print(f"{title}:", file=sys.stdout)
            width = max(20, *map(len, names))
            for name, about in names.items():
                print(f"  {name:{width}} {about}".rstrip())


def called(name: str, make: Callable[..., Any]) -> str:
    """A call with its arguments and their defaults."""
    options = inspect.signature(make).parameters.values()
    shown = [o.name if o.default is o.empty else f"{o.name}={o.default}" for o in options]
    return f"{name}({', '.join(shown)})" if shown else name
