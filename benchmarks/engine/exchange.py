"""What ends an exchange: `finish` with a costly codec in many lanes, and replies that go from peer to peer.

    python benchmarks/engine/exchange.py                   # two minutes
    python benchmarks/engine/exchange.py --small           # seconds, to see that it works

finish: 512 clients in 256 lanes whose replies are thinned out by topk(0.01), all lanes at once whenever one ends, or those
that end, some at a time (what the engine does); clients of one step, and of one to sixteen, which end at different steps.
peers: members of a ring, and of a graph in which each hears sixteen, without training: seconds a round against edges.
Repeats are interleaved; medians.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fedsim import wire
from fedsim.core import Graph, Local, Passes, Peers
from fedsim.engine import programs
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.host import tune_host
from fedsim.engine.lanes import Lanes
from fedsim.folds import mean, uniform

sys.path.append(str(Path(__file__).parents[1]))
import report


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    lanes: int = 256
    """Of the first part."""
    numbers: int = 20_000
    """In a reply."""
    members: tuple[int, ...] = (100, 1000, 10_000)
    """Of the second part."""
    heard: tuple[int, ...] = (2, 16)
    """Peers that each member hears."""
    repeats: int = 5
    """Timed repeats, after one that compiles."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def engine(sizes: np.ndarray, **options: Any) -> Lanes:
    """An engine over examples of four numbers."""
    total = int(sizes.sum())
    x, y = np.ones((total, 4), np.float32), np.zeros(total, np.int32)
    return Lanes((), x, y, np.arange(total, dtype=np.int32), np.concatenate([[0], np.cumsum(sizes)]), **options)


def replying(numbers: int) -> Local:
    """Clients that train nothing and reply with as many numbers."""
    return Local(
        start=lambda held, message, client, batch: jax.random.normal(client.key, (numbers,)),
        step=lambda held, message, carry, batch: (carry + batch.x.sum(), {}),
        finish=lambda held, message, carry, client: (wire.coded(carry), client.memory, {}),
        passes=Passes(batch_size=1),
    )


def finishing(o: Options) -> dict[str, Any]:
    """Seconds of an exchange, all lanes at once against those that end."""
    rng, fold, found = np.random.default_rng(0), mean(uniform), {}
    for name, sizes in {
        "one step": np.ones(2 * o.lanes, int),
        "1 to 16 steps": rng.integers(1, 17, 2 * o.lanes),
    }.items():
        rounds: dict[str, Callable[[], Any]] = {}
        for how, least in {"all lanes at once": o.lanes, "those that end": programs.FINISHING}.items():
            before, programs.FINISHING = programs.FINISHING, least
            lanes = engine(sizes, lanes=o.lanes, devices=1, up=wire.topk(0.01))
            local, memory = replying(o.numbers), Memory(lambda key, held: (), ())

            def round(lanes: Lanes = lanes, local: Local = local, memory: Memory = memory) -> Any:
                cohort = Cohort(lanes, np.arange(lanes.population), 1, memory)
                return cohort.exchange((), local, fold)[0]

            jax.block_until_ready(round())  # compiled while the number holds
            rounds[how], programs.FINISHING = round, before
        seconds = report.interleaved(rounds, o.repeats)
        found[name] = {how: statistics.median(each) for how, each in seconds.items()}
    return found


def mixing(o: Options) -> list[dict[str, Any]]:
    """Seconds of a round of peers, by members and by how many each hears."""
    rounds: dict[Any, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for members in o.members:
        lanes, local = engine(np.ones(members, int), lanes=16, devices=1), replying(1000)
        memory, fold = Memory(lambda key, held: jnp.zeros(1000), ()), mean(uniform)
        into = lambda memory, mixed, client: mixed  # noqa: E731 - one expression, named
        for heard in o.heard:
            whom = (np.arange(members)[:, None] + np.arange(1, heard + 1)) % members
            share = np.full((members, heard), 1 / (heard + 1), np.float32)
            link = Peers(Graph(whom, share, np.full(members, 1 / (heard + 1), np.float32)), into)

            def round(
                lanes: Any = lanes, local: Any = local, memory: Any = memory, fold: Any = fold, link: Any = link
            ) -> Any:
                cohort = Cohort(lanes, np.arange(lanes.population), 1, memory)
                return cohort.exchange((), local, fold, link=link)[0]

            rounds[members, heard] = round
            jax.block_until_ready(round())
    for (members, heard), seconds in report.interleaved(rounds, o.repeats).items():
        rows.append(
            {
                "members": members,
                "heard": heard,
                "edges": int(members) * int(heard),
                "seconds": statistics.median(seconds),
            }
        )
    return rows


def main(o: Options) -> None:
    """Measures, prints, keeps."""
    tune_host(report.speed())
    if o.small:
        o = dataclasses.replace(o, lanes=16, numbers=100, members=(20, 40), heard=(2,), repeats=2)
    ends, peers = finishing(o), mixing(o)
    for name, each in ends.items():
        print(f"{name:16}" + "".join(f"{how}: {1000 * seconds:8.1f} ms   " for how, seconds in each.items()))
    for row in peers:
        print(f"{row['members']:6} members hear {row['heard']:3}: {1000 * row['seconds']:8.1f} ms")
    print(report.write("exchange", o, {"finish": ends, "peers": peers}))


if __name__ == "__main__":
    main(tyro.cli(Options))
