"""What `test_processes.py` runs in each of two processes: `python two_processes.py HOST:PORT ID FOLDER`.

Results go to FOLDER/ID.npz and FOLDER/ID.json; the test compares them with one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import processes

ROUNDS = 4
OPTIONS: dict[str, Any] = {
    "dataset": "blobs.npz", "backbone": "mlp", "peft": "full", "clients": 12, "clients_per_round": 4, "min_size": 3,
    "rounds": ROUNDS, "optimizer": "sgd", "lr": 0.05, "algorithm": "mine.py:fed_remembers",
}  # fmt: skip


def contract(devices: int | None) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Two rounds of the contract's tiny task with clients that remember; the bytes of each."""
    import optax

    from fedsim import algorithms, testing

    task = testing.tiny_task(optimizer=optax.sgd)
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


def refused() -> dict[str, str]:
    """What processes that differ are told."""
    from fedsim import testing

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
    from fedsim import simulate

    config, speed = fedsim.Config(**OPTIONS), fedsim.Speed(checkpoint_every=2, lanes=2, resident="off")
    whole = fedsim.run(config, speed, out=folder / "whole")
    if processes.jax.process_index() == 1:
        exchange = simulate.exchange_round

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
    resumed = fedsim.run(resume=folder / "stopped")
    return {
        "stop": stop,
        "lines": [whole.rounds, resumed.rounds],
        "summaries": [whole.summary, resumed.summary],
        "parameters": [{k: v.tolist() for k, v in run.parameters.items()} for run in (whole, resumed)],
    }


def main(coordinator: str, number: int, folder: Path) -> None:
    """Both parts; standard output stays with process 0."""
    processes.distributed(coordinator, 2, number)
    arrays, traffic = contract(None)
    told = {"contract": traffic, "refused": refused(), "runs": runs(folder)}
    np.savez(folder / f"{number}.npz", **arrays)
    (folder / f"{number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
