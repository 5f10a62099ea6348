"""What `test_processes.py` runs in each of several processes: `python several_processes.py HOST:PORT PROCESSES ID FOLDER`.

Results go to FOLDER/ID.npz and FOLDER/ID.json; the test compares them with one process. More than two processes do the
engine's part only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.engine import processes

ROUNDS = 4
OPTIONS: dict[str, Any] = {
    "dataset": "blobs.npz", "backbone": "mlp", "peft": "full", "clients": 12, "clients_per_round": 4, "min_size": 3,
    "rounds": ROUNDS, "optimizer": "sgd", "lr": 0.05, "algorithm": "mine.py:fed_remembers",
}  # fmt: skip


def contract(devices: int | None) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Two rounds of the contract's tiny task with clients that remember; the bytes of each."""
    import optax

    from fedsim import algorithms
    from fedsim.testing import toys as testing
    from fedsim.testing.tasks import tiny_task

    task = tiny_task(optimizer=optax.sgd)
    make = algorithms.find("mine.py:fed_remembers")
    cohorts = (testing.COHORT, (2, 0, 3, 7, 5, 8))
    server, memory, done = testing.run(make, testing.tiny_problem(), cohorts, task=task, devices=devices)
    clients = np.sort(memory.state()[1])  # the order of first visits is that of the devices
    rows, seen = memory.gather(clients)
    assert seen.all()
    loss = done[-1].fetch(done[-1].done[0].info.metrics["loss"])
    arrays = {**processes.fetch(server.params), "visits": rows["visits"], "clients": clients, "loss": loss}
    arrays |= {f"memory {name}": kept for name, kept in rows["last"].items()}
    return arrays, [cohort.traffic() for cohort in done]


def frozen_features(devices: Any) -> tuple[np.ndarray, int]:
    """Features of 300 texts of mixed lengths, and how many rows this process has computed."""
    from fedsim import peft
    from fedsim.training import features, lengths

    rng, rows, program = np.random.default_rng(0), [], features.program
    ids = np.where(np.arange(32) < rng.integers(2, 33, (300, 1)), rng.integers(3, 60, (300, 32)), 0).astype(np.int32)
    model = peft.build("bert_tiny", 3, peft="head")
    _, frozen = peft.start(model, "random", 0)

    def noted(*args: Any) -> Any:
        run, *shardings = program(*args)

        def counted(held: Any, x: Any) -> Any:
            if not isinstance(x, processes.jax.core.Tracer):  # its shapes are asked for first
                rows.append(sum(shard.data.shape[0] for shard in x.addressable_shards))
            return run(held, x)

        return counted, *shardings

    features.program = noted
    found = features.run_stages(model, frozen, ids, 0, model.cut, lengths.measure(ids, 0, 2), devices)
    features.program = program
    return found, sum(rows)


def refused() -> dict[str, str]:
    """What processes that differ are told."""
    from fedsim.testing import toys as testing

    said: dict[str, str] = {}

    def note(name: str, action: Any) -> None:
        try:
            action()
        except (ValueError, OSError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    def missing() -> None:
        raise OSError("no such file")

    me = processes.jax.process_index()
    note("agree", lambda: processes.agree("the options", me))
    note("by_first", lambda: processes.by_first(missing))
    note("each", lambda: processes.each(missing if me == 1 else lambda: None))
    note("pmap", lambda: testing.engine(testing.tiny_problem(), parallel="pmap"))
    note("devices", lambda: testing.engine(testing.tiny_problem(), devices=99))
    said["shared"] = processes.share("x" * 5000 if me == 0 else "")
    return said


def runs(folder: Path) -> dict[str, Any]:
    """An uninterrupted run, examples streamed from the host, and one that Ctrl-C in process 1 alone stops, with its end."""
    import fedsim
    from fedsim.simulation import simulate

    config, speed = fedsim.Config(**OPTIONS), fedsim.Speed(checkpoint_every=2, lanes=2, resident="off")
    whole = fedsim.run(config, speed, out=folder / "whole")
    exchange = simulate.exchange_round
    if processes.jax.process_index() == 1:

        def interrupted(*args: Any) -> Any:
            if args[3].round == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return exchange(*args)

        simulate.exchange_round = interrupted
    try:
        fedsim.run(config, speed, out=folder / "stopped")
        stop = "never"
    except KeyboardInterrupt as stopped:
        stop = str(stopped)
    simulate.exchange_round = exchange
    resumed = fedsim.run(resume=folder / "stopped")
    return {
        "stop": stop,
        "lines": [whole.rounds, resumed.rounds],
        "summaries": [whole.summary, resumed.summary],
        "parameters": [{k: v.tolist() for k, v in run.parameters.items()} for run in (whole, resumed)],
    }


def short_of_memory(folder: Path) -> dict[str, Any]:
    """A run in which process 1 alone runs out of memory: in round 3 with two lanes, in evaluation with over ten rows."""
    import fedsim
    from fedsim.engine.cohort import Cohort
    from fedsim.engine.lanes import Lanes
    from fedsim.simulation import simulate

    segment, gather, exchange, asked, servers = Cohort._segment, Lanes.gather, simulate.exchange_round, [], []

    def exhausted() -> None:
        if processes.jax.process_index() == 1:
            raise processes.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    def of_round(cohort: Cohort, plan: Any, start: int, programs: Any) -> Any:
        asked.append((cohort.round, programs.lanes))
        if cohort.round == 3 and programs.lanes > 1:
            exhausted()
        return segment(cohort, plan, start, programs)

    def of_evaluation(engine: Lanes, rows: np.ndarray) -> Any:
        if rows.ndim == 2 and rows.shape[1] > 10:
            exhausted()
        return gather(engine, rows)

    def noted(*args: Any) -> Any:
        server, averaging, metrics = exchange(*args)
        servers.append(server)
        return server, averaging, metrics

    Cohort._segment, Lanes.gather, simulate.exchange_round = of_round, of_evaluation, noted
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = fedsim.run(fedsim.Config(**OPTIONS), fedsim.Speed(checkpoint_every=2, lanes=2), out=folder / "short")
    Cohort._segment, Lanes.gather, simulate.exchange_round = segment, gather, exchange
    return {
        "asked": asked,
        "warned": [str(w.message) for w in warned if "--eval-batch" in str(w.message)],
        "lines": run.rounds,
        "own": {k: np.asarray(v).tolist() for k, v in processes.local(servers[-1].params).items()},
    }


def main(coordinator: str, count: int, number: int, folder: Path) -> None:
    """All parts; standard output stays with process 0."""
    processes.distributed(coordinator, count, number)
    arrays, traffic = contract(None)
    arrays["features"], rows = frozen_features(processes.devices(None))
    told: dict[str, Any] = {"contract": traffic, "feature rows": rows}
    if count == 2:
        told |= {"refused": refused(), "runs": runs(folder), "short": short_of_memory(folder)}
    np.savez(folder / f"{number}.npz", **arrays)
    (folder / f"{number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
