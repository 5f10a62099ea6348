"""An audit: canaries that try to be seen in the model of a whole run, and what they show of its epsilon.

Every other client replies with an axis of its own, far too long, and the rest with nothing, as if they were not there: so all
clients together are as many canaries, of which half were left out by neighbouring data sets, and a client's score is its entry
of the final model. How well the scores tell who was there bounds epsilon from below: Jagielski et al., arXiv 2006.07709, with
the auditor of jax-privacy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from brief import brief
from fedsim.config import Config, Speed
from fedsim.privacy import central

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedsim-jax[privacy]'")
auditing = pytest.importorskip("jax_privacy.auditing", reason="needs jax-privacy: pip install 'fedsim-jax[test]'")
pytestmark = pytest.mark.usefixtures("compile_once")

CANARIES = 384  # as many as the first layer has entries
DELTA = 1e-2
SPEED = Speed(devices=1, lanes=8, compilation_cache=False)
SHOUTING = '''
"""FedAvg in which every other client replies with an axis of its own, and nobody trains."""

import jax
import jax.numpy as jnp

from fedsim import wire
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.core import Task
from fedsim.training.local import fit


def shouting(task: Task):
    plain = fed_avg(task)

    def reply(carry, message, client):
        loud = {name: jnp.zeros(leaf.shape) for name, leaf in message.items()}
        largest = max(loud, key=lambda name: loud[name].size)
        axis = jax.nn.one_hot(client.id, loud[largest].size) * jnp.where(client.id % 2 == 0, 1e6, 0.0)
        loud[largest] = axis.reshape(loud[largest].shape)
        return wire.coded(loud), client.memory

    local = fit(task.loss, task.optimizer, task.lr, task.passes, reply=reply)
    add = jax.jit(lambda server, change: server._replace(params=jax.tree.map(jnp.add, server.params, change)))

    def init(key, held):
        server = plain.init(key, held)
        return server._replace(params=jax.tree.map(jnp.zeros_like, server.params))

    def round(key, held, server, cohort):
        change, info = cohort.exchange(wire.coded(server.params, change=False), local)
        return add(server, change), info.metrics

    return plain._replace(init=init, round=round)
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "shouting.py").write_text(SHOUTING)
    return Config(
        dataset=str(blobs(folder, rows=800)), backbone="mlp", peft="full", partition="iid", clients=CANARIES,
        clients_per_round=CANARIES // 2, rounds=4, steps=1, batch_size=4, min_size=1, lr=0.01, optimizer="sgd",
        head_rounds=0, eval_every=4, algorithm=f"{folder / 'shouting.py'}:shouting", dp="central", delta=DELTA,
        noise_multiplier=1.5,
    )  # fmt: skip


def audited(config: Config, out: Path) -> tuple[float, float]:
    """Epsilon as accounted, and what the canaries show, with a chance of 5 % to show too much."""
    done = fedsim.run(config, SPEED, out=out, quiet=True)
    largest: Any = max(done.parameters.values(), key=np.size)
    scores = np.asarray(largest).reshape(-1)[:CANARIES]
    auditor = auditing.CanaryScoreAuditor(scores[::2], scores[1::2])
    return done.summary["privacy"]["epsilon"], float(auditor.epsilon_clopper_pearson(0.05, DELTA))


CASES: tuple[dict[str, Any], ...] = (
    {},
    {"clip_quantile": 0.5},
    {"bands": 2},
    {"dp": "local", "noise_multiplier": 8.0},
)


@pytest.mark.slow
def test_canaries_show_no_more_than_is_accounted(config: Config, tmp_path: Path) -> None:
    """Central and local privacy, a fixed norm and one that adapts, and noise that is correlated."""
    for number, options in enumerate(CASES):
        accounted, shown = audited(config.replace(**options), tmp_path / str(number))
        assert shown <= accounted, options


@pytest.mark.parametrize("fault", brief(["noise of the mean on the sum", "no norm"]))
def test_canaries_catch_what_is_mis_scaled(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Noise that was divided by the cohort once more, and changes that are not cut, while the account stays as it was."""
    right = central.noisy
    central.fold.cache_clear()
    if fault == "no norm":
        monkeypatch.setattr(central, "clip", lambda tree, bound: (tree, bound))
    else:
        monkeypatch.setattr(
            central, "noisy", lambda total, deviation, key: right(total, deviation / (CANARIES // 2), key)
        )
    accounted, shown = audited(config, tmp_path / "run")
    central.fold.cache_clear()
    assert shown > accounted
