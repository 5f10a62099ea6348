"""The commands behind `fedsim run`: fetch what is missing, run, run the comparisons, print the closing table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedsim import record
from fedsim.config import RELIABLE, Config, Speed, nearest
from fedsim.engine import processes
from fedsim.report import tables as report

HEAD_ROUNDS, HEAD_PATIENCE = 500, 100  # the head run ends when its validation accuracy stands still
FULL_LR = 1e-4  # of full fine-tuning in --baselines: a LoRA's rate destroys a pre-trained encoder
CENTRAL_LR = 4e-3  # of the centralised run there, which lacks the mean over a cohort that bears a higher one


def head_config(config: Config) -> Config:
    """The head alone, run to convergence, with the rest of the config as it is."""
    return config.replace(
        peft="head",
        head_rounds=0,
        lr=config.head_lr or config.lr,
        rounds=config.rounds if config.traced else HEAD_ROUNDS,  # a trace may say nothing of later rounds
        patience=HEAD_PATIENCE,
        target_accuracy=None,
        eval_every=1,
    )


def baseline_configs(config: Config, examples: int) -> dict[str, Config]:
    """The runs of `--baselines`: PEFT kinds in all layers under the config's options, and all `examples` at one client."""
    others = {kind: config.replace(peft=kind, targets=("query", "value")) for kind in ("bias", "lora", "full")}
    others["full"] = others["full"].replace(lr=min(config.lr, FULL_LR))
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
    build.check(config, speed)
    processes.by_first(lambda: record.refuse_used(out))
    needs.fetch_in_turn(config)
    problem = processes.each(lambda: build.problem(config, speed))
    if central:
        config = centralised(config, len(problem.partition.rows))
        problem = owned_by(problem, config)
    if start and not quiet and processes.is_first():
        print(start, flush=True)
    done = simulate.run(config, speed, out=out, quiet=quiet, problem=problem)
    others = {"head to convergence": head_config(config)} if head and config.peft != "head" else {}
    if baselines:
        others |= baseline_configs(config, len(problem.partition.rows))
    rows: list[report.Row] = []
    try:
        for name, other in others.items():
            rows += _comparison(problem, speed, done.directory, name, other, quiet)
    finally:  # the run itself is done: its table is due, whatever happens to what it is compared with
        close(done, rows)
    return done


def _comparison(
    problem: Any, speed: Speed, directory: Path, name: str, config: Config, quiet: bool
) -> list[report.Row]:
    """One run for the closing table on the same data and features; nothing if it fails, which is said."""
    from fedsim.simulation import simulate

    if not quiet and processes.is_first():
        print(f"for comparison: {name}", flush=True)
    shared = owned_by(problem, config)  # the centralised run's client owns everything
    folder = directory / "baselines" / name.replace(" ", "-")
    try:
        ran = simulate.run(config, speed, out=folder, quiet=quiet or name.startswith("head"), problem=shared)
    except Exception as error:
        if processes.several():
            raise  # it may have failed here alone, and the others wait
        print(f"The comparison {name} failed and is left out: {error}", file=sys.stderr)
        return []
    return [_row(name, ran)]


def resume_job(directory: Path, *, quiet: bool = False, trust_code: bool = False) -> record.Run:
    """Goes on with a stopped run and prints its closing table; the head's run is made if it is missing."""
    from fedsim.engine.host import divide_cpu
    from fedsim.simulation import build, inputs, needs, simulate

    stopped = processes.by_first(lambda: record.load(directory)._replace(trust_code=trust_code))
    divide_cpu(stopped.speed.devices or stopped.about.get("device", {}).get("count"))
    config = processes.each(lambda: inputs.placed(stopped, resumed=True))  # before any of its code runs
    needs.fetch_in_turn(config)
    problem = processes.each(lambda: build.problem(config, stopped.speed))
    done = simulate.run(resume=directory, quiet=quiet, problem=problem, trust_code=trust_code)

    def compared() -> tuple[list[report.Row], bool]:
        others = sorted(p for p in (directory / "baselines").glob("*") if (p / record.SUMMARY).is_file())
        rows = [_row(p.name.replace("-", " "), record.load(p)) for p in others]
        return rows, (directory / "baselines" / "head-to-convergence").exists()

    rows, has_head = processes.by_first(compared)
    if done.config.peft != "head" and not has_head:
        rows += _comparison(problem, done.speed, directory, "head to convergence", head_config(config), quiet)
    close(done, rows)
    return done


def _row(name: str, run: record.Run) -> report.Row:
    result = run.summary or {}
    sent = result["bytes"]
    accuracy = {split: (result["final"][split] or {}).get("accuracy") for split in ("validation", "test")}
    return report.Row(
        name, accuracy["validation"], accuracy["test"], result["rounds"], sent["up"], sent["down"], result["seconds"]
    )


def close(run: record.Run, rows: list[report.Row]) -> None:
    """Prints the closing table, the gap to the head, and where everything is; process 0 does."""
    if not processes.is_first():
        return
    if run.summary is None:
        raise ValueError(f"Expected {run.directory} to hold a finished run; go on with it by --resume.")
    report.print_summary(run.summary, more=rows, name=f"{run.config.peft} (this run)")
    head = next((row for row in rows if row.name.startswith("head")), None)
    final = run.summary["final"]["test"]["accuracy"]
    if head is not None and head.test is not None:
        gap = final - head.test
        verdict = " The head alone wins on this task at this budget." if gap < 0 else ""
        print(f"{run.config.peft} minus head, test accuracy: {gap:+.4f}.{verdict}")
    if run.config.clients == 1:
        print(
            "One client holds everything: the bytes are what it exchanges with the server; training in one place sends none."
        )
    print(f"Folder: {run.directory}")


def listing(what: str | None) -> None:
    """Prints the names that options take.

    Raises:
        ValueError: an unknown kind of name.
    """
    from fedsim import backbones, data, peft
    from fedsim.algorithms import ALGORITHMS
    from fedsim.data import assets

    tables = {
        "algorithms": {name: (make.__doc__ or "").splitlines()[0] for name, make in ALGORITHMS.items()},
        "backbones": {name: f"{row.kind}" for name, row in backbones.BACKBONES.items()},
        "peft": dict.fromkeys(peft.KINDS, ""),
        "data": {name: assets.ASSETS[name].what for name in data.PACKAGED} | data.FORMS,
    }
    if what is not None and what not in tables:
        raise ValueError(f"Expected fedsim list {what!r} to be one of {', '.join(tables)}{nearest(what, tables)}.")
    for title, names in tables.items():
        if what in (None, title):
            print(f"{title}:", file=sys.stdout)
            for name, about in names.items():
                print(f"  {name:20} {about}".rstrip())
