"""What a checkpoint holds and must agree with, so that a run goes on bit for bit; what a stop says of the way on."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim import network, record, stops, wire
from fedsim.backbones.own import file_of, identity
from fedsim.config import Config, Speed, groups_of
from fedsim.engine import processes
from fedsim.engine.client_memory import Memory, Table
from fedsim.record.shared_checkpoints import SharedCheckpoints
from fedsim.simulation import inputs as read
from fedsim.simulation.build import Problem
from fedsim.simulation.current import Current
from fedsim.simulation.rounds import Standing
from fedsim.simulation.trainers import Trainer
from fedsim.wire import copies


def restore_memory(memory: Memory, table: Table) -> None:
    """Goes on from a checkpoint's table; the rows are in process 0's file, and the other processes get them from it."""
    if processes.is_first():
        memory.restore(table)
    if processes.several():
        rows, ids = processes.by_first(memory.state)
        if not processes.is_first():
            memory.scatter(ids, rows)


def expected(config: Config, speed: Speed, trainer: Trainer, inputs: str) -> dict[str, Any]:
    """What a checkpoint must agree with for the run to go on bit for bit: options, inputs, devices, what `auto` chose."""
    engine = trainer.engine
    return {
        "config": config.hash(),
        "inputs": inputs,
        "parallel": engine.parallel,
        "precision": speed.precision,
        "remat": speed.remat,
        "devices": [len(engine.own)] * jax.process_count() if processes.several() else len(engine.devices),
        "device": engine.devices[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        **chosen(trainer),
    }


def chosen(trainer: Trainer) -> dict[str, Any]:
    """What `auto` chose: numbers, or of several groups each one's by name."""
    engines = trainer.groups
    if not engines:
        return {"lanes": trainer.engine.lanes, "segment_steps": trainer.engine.segment_steps}
    return {
        "lanes": {name: engine.lanes for name, engine in engines.items()},
        "segment_steps": {name: engine.segment_steps for name, engine in engines.items()},
    }


def fingerprint(config: Config, problem: Problem) -> str:
    """A hash of examples, partition and, where they are files, algorithm, backbones, network: edits are noticed on resuming.

    Behind a dash that of weights and tokenizer, where the run reads them from files.
    """
    data, owned = problem.dataset, problem.partition
    digest = hashlib.sha256()
    for part in (
        *jax.tree.leaves(data.x),
        data.y,
        data.train,
        data.validation,
        data.test,
        *owned,
        *(problem.local_test or ()),
    ):
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    backbones = (config.backbone, *(group.config.backbone for group in groups_of(config)))
    for file in (file_of(config.algorithm), *map(file_of, backbones), *network.files(config)):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for backbone in backbones:
        digest.update((identity(backbone) or "").encode())
    return "-".join(filter(None, (digest.hexdigest()[:16], read.read_hash(config))))


def shapes(now: Current, extra: dict[str, Any]) -> dict[str, Any]:
    """Shapes of a checkpoint's arrays: the server's are known, the number of clients with a memory stands in `extra`."""
    memory, described = now.memory, extra.get("beside", {})
    memory.make_beside(described)
    return {
        "server": now.server,
        "memory": memory.shapes(extra["memory_count"]),
        "met": np.zeros(now.trainer.engine.population, np.int32),
        **where_any("averaging", now.averaging),
        **where_any("copies", copy_shapes(now.trainer, extra.get("copies", {}))),
        **where_any("beside", {name: memory.beside[name].shapes(one["count"]) for name, one in described.items()}),
    }


def where_any(name: str, tree: Any) -> dict[str, Any]:
    """An entry of a checkpoint, where it holds anything: runs that need none are as those of before it was there."""
    return {name: tree} if jax.tree.leaves(tree) else {}


def described(held: Mapping[str, wire.Copy]) -> dict[str, Any]:
    """Shapes and dtypes of the copies that all clients hold, by exchange and leaf; JSON."""
    return {
        name: {leaf: [list(each.shape), each.dtype.name] for leaf, each in copy.values.items()}
        for name, copy in held.items()
    }


def copy_shapes(trainer: Trainer, known: Mapping[str, Any]) -> dict[str, wire.Copy]:
    """The copies that a checkpoint describes, as shapes; what the codec keeps beside follows from them."""
    codec, root = trainer.engine.downlink.changes, trainer.engine.root
    if codec is None:
        return {}
    return {
        name: jax.eval_shape(
            partial(copies.first, codec),
            {leaf: jax.ShapeDtypeStruct(shape, dtype) for leaf, (shape, dtype) in leaves.items()},
            root,
        )
        for name, leaves in known.items()
    }


def sealed(memory: Memory) -> tuple[Table, dict[str, Table]]:
    """The clients' memory, and what else they keep, as tables."""
    return memory.seal(), {name: store.seal() for name, store in memory.beside.items()}


def checkpoint(
    config: Config, speed: Speed, inputs: str, stand: Standing, now: Current
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds: (arrays, all else). Seals the clients' memory, which must stay as it is until it is saved."""
    memory = now.memory
    memory.settle()
    table, beside = processes.by_first(lambda: sealed(memory))
    arrays = {
        "server": now.server,
        "memory": table,
        "met": stand.met,
        **where_any("averaging", now.averaging),
        **where_any("copies", dict(now.copies)),
        **where_any("beside", beside),
    }
    extra = {
        **expected(config, speed, now.trainer, inputs),
        "bitwise": stand.bitwise,
        "totals": stand.totals,
        "best": stand.best,
        "stale": stand.stale,
        "start": stand.start,
        "stopped": stand.stopped,
        "elapsed": stand.elapsed,
        "memory_count": memory.count,
        **where_any("beside", memory.described()),
        **where_any("copies", described(now.copies)),
    }
    return arrays, extra


def restore(
    checkpoints: SharedCheckpoints,
    config: Config,
    speed: Speed,
    inputs: str,
    ready: Callable[[int], Current],
    *,
    reduced: bool,
) -> tuple[Standing, Current] | None:
    """Where the last good checkpoint stands, and its phase; None where there is no checkpoint.

    Args:
        ready: (round) -> the phase of that round, anew.
        reduced: memory ran out, and `speed` has fewer lanes than the checkpoint.
    """
    tried: dict[str, Current] = {}

    def template(round: int, extra: dict[str, Any]) -> dict[str, Any]:
        # A damaged checkpoint makes `restore` go back to an older one, perhaps of the phase before.
        tried["now"] = ready(round)
        trainer = tried["now"].trainer
        for name, engine in (trainer.groups or {"": trainer.engine}).items():
            lanes, steps = (extra[key][name] if name else extra[key] for key in ("lanes", "segment_steps"))
            engine.reuse(lanes, steps)
            engine.may_refuse = False  # it fitted before
            if not (extra.get("bitwise", True) or reduced):  # what an earlier process found to fit
                engine.lanes = lanes
        return shapes(tried["now"], extra)

    def wanted(round: int, extra: dict[str, Any]) -> dict[str, Any]:
        ours = expected(config, speed, tried["now"].trainer, inputs)
        if "-" not in str(extra.get("inputs")):  # of before weights and tokenizer were in it
            ours["inputs"] = ours["inputs"].partition("-")[0]
        return ours | ({"lanes": extra["lanes"]} if reduced else {})

    def damage(arrays: dict[str, Any]) -> str | None:
        memory = tried["now"].memory
        stores = {"": arrays["memory"], **arrays.get("beside", {})}
        return next(filter(None, ((memory.beside[n] if n else memory).damage(t) for n, t in stores.items())), None)

    found = checkpoints.restore(template, wanted, damage)
    if found is None:
        return None
    round, arrays, extra = found
    now = tried["now"]
    engine = now.trainer.engine
    now = now._replace(
        server=engine.put(arrays["server"]), averaging=engine.put(arrays.get("averaging", now.averaging)),
        copies=engine.put(arrays.get("copies", {})),
    )  # fmt: skip
    restore_memory(now.memory, arrays["memory"])
    for name, table in arrays.get("beside", {}).items():
        restore_memory(now.memory.beside[name], table)
    kept = {name: extra[name] for name in ("totals", "best", "stale", "start", "stopped", "elapsed")}
    bitwise = extra.get("bitwise", True) and not reduced
    return Standing(met=np.array(arrays["met"]), round=round, bitwise=bitwise, **kept), now


# --- what a stop says


def newest(directory: Path) -> int:
    """The round of the newest checkpoint in a run's folder, good or damaged; 0 where there is none."""
    folder = directory / record.CHECKPOINTS
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def unbegun(directory: Path | None) -> str:
    """What a stop before a round says: the way on, and what is kept."""
    if directory is None or not (directory / record.CONFIG).is_file():
        return stops.ANEW
    kept = newest(directory)
    return f"Stopped {f'after round {kept}' if kept else 'before the first round'}; {stops.way_on(directory)}"


def compiling(directory: Path) -> AbstractContextManager[None]:
    """The first round of a phase, most of which is compiling: a stop is at once, for nothing is lost but this round.

    With several processes it is after the round, as always: one alone would leave the others waiting.
    """
    return nullcontext() if processes.several() else stops.at_once(lambda: unbegun(directory))


def stopped_after(round: int, directory: Path, number: int | None) -> stops.Stop:
    """The stop that a signal asked for, in all processes."""
    return stops.Stop(f"Stopped after round {round}; {stops.way_on(directory)}", number, shared=True)
