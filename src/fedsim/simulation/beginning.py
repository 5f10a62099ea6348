"""The beginning of a run: what its folder is told of options, data and files, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fedsim import record
from fedsim.backbones.own import identity as backbone_hash
from fedsim.config import Config, Speed, answering
from fedsim.data import partition
from fedsim.engine import processes
from fedsim.simulation import inputs, needs
from fedsim.simulation.build import Problem


def begin(directory: Path, config: Config, speed: Speed, problem: Problem, read: str, about: Mapping[str, Any]) -> None:
    """Writes `config.json` of a new run, and the tokenizer that it has trained, where it has.

    Args:
        read: a hash of all that was read (`resuming.fingerprint`).
        about: further facts to keep.
    """
    told = facts(config, speed, problem, read) | dict(about)

    def written() -> None:
        record.start(directory, config, speed, told)
        needs.keep_tokenizer(directory, problem.dataset.tokenizer)

    processes.by_first(written)


def facts(config: Config, speed: Speed, problem: Problem, read: str) -> dict[str, Any]:
    """What `config.json` keeps of the data, of all files that were read, and of a user's own backbone.

    Args:
        read: a hash of all that was read (`resuming.fingerprint`).
    """
    shape = list(jax.tree.leaves(problem.dataset.x)[0].shape[1:])
    own = backbone_hash(answering(config).backbone)
    held = partition.holders(config, problem.dataset.train)
    return {
        "classes": list(problem.dataset.classes),
        "input_shape": shape,
        "data_hash": read.partition("-")[0],
        "identity": record.checksum([config.hash(), dataclasses.asdict(speed), read]),
        "files": inputs.files(config),
        **({"backbone_hash": own} if own else {}),
        "server_examples": {"public": len(held.public), "shard": len(held.shard)},
    }
