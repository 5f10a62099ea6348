"""The phase that runs, and its state: what changes from round to round beside where the run stands (`rounds.Standing`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.config import Speed
from fedsim.engine import peaks, processes
from fedsim.engine.client_memory import Memory
from fedsim.engine.keys import key_for
from fedsim.record.checkpoint import KEEP
from fedsim.simulation import personal, trainers
from fedsim.simulation.build import Phase, Problem
from fedsim.simulation.rounds import Cost
from fedsim.simulation.trainers import Trainer
from fedsim.wire import Copy


class Current(NamedTuple):
    """A phase with the server's state and the clients' memory."""

    phase: Phase
    trainer: Trainer
    server: Any
    memory: Memory
    cost: Cost
    averaging: Any = ()  # state of the run's average, which goes where the server goes
    copies: Mapping[
        str, Copy
    ] = {}  # what all clients hold of messages, where `codec_down` sends changes of it; by exchange
    answering: personal.Answering | None = None  # where clients' own models are validated

    def validate(self) -> personal.Answers:
        """Scores of the server's model on the validation set, or of the clients' own on their test rows."""
        if self.answering is not None:
            return self.answering(self.server, self.memory)
        return personal.Answers(self.trainer.validate(self.server), [])

    def parameters(self) -> dict[str, np.ndarray]:
        """The trained part, on the host."""
        return processes.fetch(self.trainer.algorithm.params(self.server))


def prepare(
    problem: Problem, phase: Phase, overlay: dict[str, np.ndarray] | None, directory: Path | None = None
) -> Current:
    """A phase with the server's initial state and nothing in the clients' memory, which will lie in the run's folder.

    Args:
        overlay: what the phase before has trained, by path.
    """
    trainer = trainers.trainer(problem, phase, overlay)
    engine = trainer.engine
    server = engine.put(trainer.algorithm.init(key_for(engine.root, "init"), engine.held))
    cost = Cost(setup=trainers.setup_bytes(trainer), peak=peak(trainer, problem.speed))
    # Of several processes the first one has the folder; the others keep the same rows in main memory.
    file = directory / f"memory-{phase.name}.rows" if directory is not None and processes.is_first() else None
    init = (lambda key, held: ()) if trainer.groups else trainer.algorithm.memory
    memory = Memory(init, engine.held, file, problem.speed.keep_checkpoints or KEEP)
    for name, group in trainer.groups.items():  # what clients keep, by group
        memory.store(name, trainer.algorithm.memory, group.held)
    state = trainer.average.init()
    averaging = dict.fromkeys(trainer.groups, state) if trainer.groups else state
    answering = personal.Answering(problem, trainer) if trainer.algorithm.answers == "client" else None
    return Current(phase, trainer, server, memory, cost, engine.put(averaging), answering=answering)


def peak(trainer: Trainer, speed: Speed) -> float | None:
    """Published FLOP/s of all devices together; None where none is published, as of a CPU."""
    devices = trainer.engine.devices
    limit = peaks.known(devices[0].device_kind)
    return None if limit is None else len(devices) * limit.flops(speed.precision)
