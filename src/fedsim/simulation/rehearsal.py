"""A round without training: what it sends and needs. The algorithm runs; its programs are compiled, and answer with ones.

The server's own training is traced, and gives back what it got.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim.config import Config, Speed, answering, invited
from fedsim.core import Tree
from fedsim.engine import processes
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import Need, free_memory
from fedsim.engine.flops import all_equations
from fedsim.engine.groups import GroupedCohort
from fedsim.engine.host import zeros
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import MEMORY_SHARE, Lanes, Request
from fedsim.engine.programs import Programs
from fedsim.engine.state import State
from fedsim.simulation import build, groups, prices, trainers
from fedsim.simulation.build import Phase, Problem
from fedsim.training import lengths
from fedsim.training.features import use_cache
from fedsim.training.server import watched
from fedsim.wire import array_bytes

LONG = 1000  # examples whose frozen features take longer than tracing and compiling a phase's programs once more
COPIES = 6  # of the trained leaves, for a lane: parameters, gradients, an optimizer's two moments, the fold, what comes and goes


class Rehearsal(NamedTuple):
    """What a round of a phase does."""

    down: float  # bytes of a client in the second round, all exchanges together: the first one may have less to tell
    up: float  # bytes; a packet whose price depends on values counts as not encoded
    setup: int  # bytes that a client is given once; of several architectures the mean
    lanes: dict[str, int]  # of each device, by group; "" where there is one architecture
    widths: dict[str, tuple[int, ...]]  # of the first exchange's batches, by group; none of one that is not asked
    need: Need  # of the last exchange; of several groups the largest
    flops: float  # of the second round


class Asked(NamedTuple):
    """One exchange, as the algorithm asked for it."""

    up: float  # bytes of a client
    widths: tuple[int, ...]


def rehearse(problem: Problem, phase: Phase, ids: np.ndarray | dict[str, np.ndarray]) -> Rehearsal:
    """What a round of a phase sends and needs with this cohort, which meets twice; nothing is trained.

    Args:
        ids: (M,); of several architectures by group, as `prices.cohorts` gives them.

    Raises:
        ValueError: lanes that were asked for and do not fit into the memory; see `device_memory.refuse_too_large`.
    """
    trainer = trainers.trainer(
        stand_in(problem, phase, lambda count, shape, dtype: zeros((count, *shape), dtype)), phase
    )
    engine, algorithm = trainer.engine, trainer.algorithm
    given = ids if isinstance(ids, dict) else {"": ids}
    engines = trainer.groups or {"": engine}
    asked = {name: answer_ones(engines[name]) for name in given}
    server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
    averaging = {name: engine.put(trainer.average.init()) for name in given}
    copies: dict[str, Any] = dict.fromkeys(given)
    memories = {name: Memory(algorithm.memory, engines[name].held) for name in given}
    met = np.zeros(engine.population, np.int32)
    for round in (phase.first, phase.first + 1):
        for each in asked.values():
            each.clear()
        cohorts = {
            name: Cohort(
                engines[name], given[name], round, memories[name], met=met, lr=trainer.lr(round),
                average=trainer.average, averaging=averaging[name], releases=algorithm.releases,
                copies=copies[name],
            )
            for name in given
        }  # fmt: skip
        cohort: Any = GroupedCohort(engine, round, cohorts) if trainer.groups else cohorts[""]
        with watched(trains=False):
            server, _ = algorithm.round(key_for(engine.root, "server", round), engine.held, server, cohort)
        cohort.settle()
        averaging = {name: one.averaging for name, one in cohorts.items()}
        copies = {name: one.copies for name, one in cohorts.items()}
        for each in given.values():
            met[each] = round
    members = {name: len(one.places) for name, one in cohorts.items()}
    down = sum(sum(exchange.down.values()) for exchange in cohort.done) / max(sum(members.values()), 1)
    up = sum(members[name] * one.up for name, each in asked.items() for one in each) / max(sum(members.values()), 1)
    needs = [engines[name].need for name in given]
    return Rehearsal(
        down,
        up,
        prices.mean_setup(phase.config, problem.partition.clients, trainers.setup_bytes(trainer)),
        {name: int(engines[name].lanes) for name in given},
        {name: each[0].widths for name, each in asked.items() if each},
        Need(lanes=max(need.lanes for need in needs), there=max(need.there for need in needs)),
        cohort.flops(),
    )


def may_be_too_large(problem: Problem, phase: Phase) -> bool:
    """Whether a batch might not even fit in one lane: then it is worth compiling to know.

    By a generous estimate: every result of a forward pass, as if nothing of it were fused or freed, and the trained leaves
    several times over. What is missing, such as a segment's batches, matters where both are small.
    """
    speed, x = problem.speed, problem.dataset.x
    model = build.split_model(answering(phase.config), problem.dataset, speed)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    program = jax.make_jaxpr(model.apply)(model.trained, model.frozen, one).jaxpr
    results = sum(times * array_bytes(out.aval) for eqn, times in all_equations(program) for out in eqn.outvars)
    trained = sum(array_bytes(leaf) for leaf in jax.tree.leaves(model.trained))
    own = [d for d in processes.devices(speed.devices) if d.process_index == jax.process_index()]
    sharing = len(own) if own[0].platform == "cpu" else 1  # host devices share the machine's memory
    about = phase.config.batch_size * results + COPIES * trained
    return processes.any_true(about > MEMORY_SHARE * free_memory(own[0], sharing))


def answer_ones(engine: Lanes) -> list[Asked]:
    """Has the engine compile its programs and not run them; a list of the exchanges, as they are asked for.

    Ones as the answer: a server that counts replies by their weight finds that all have come.
    """
    made, asked = engine.programs, []

    def programs(request: Request, *cohort: Any) -> Programs:
        real = made(request, *cohort)
        asked.append(Asked(engine.reply_bytes(request), real.widths))

        def ones(shapes: Tree) -> Tree:
            return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)

        def begin(*args: Any) -> State:
            state = jax.eval_shape(real.begin, *args)
            brought = (state.weight, state.memory, state.nbytes, state.coding)  # what is read on the host
            weight, memory, nbytes, coding = engine.split(ones(brought))
            return state._replace(weight=weight, memory=memory, nbytes=nbytes, coding=coding)

        def end(*args: Any) -> Any:
            return engine.put(ones(jax.eval_shape(real.end, *args)))

        return real._replace(begin=begin, segment=lambda *args: args[7], end=end)

    engine.programs = programs  # pyrefly: ignore[bad-assignment] - this engine answers with ones
    return asked


def stand_in(problem: Problem, phase: Phase, make: Callable[[int, tuple[int, ...], Any], np.ndarray]) -> Problem:
    """The problem with other numbers in place of the phase's cached features, where it has such.

    Args:
        make: (examples, shape of one, dtype) -> an array of them.
    """
    if phase.config.groups:  # which cache nothing
        return problem
    model = build.split_model(phase.config, problem.dataset, problem.speed)
    if not use_cache(problem.speed, model, problem.dataset.x, phase.config):
        return problem
    x, texts = problem.dataset.x, lengths.entering(problem.texts, model, 0)
    one = jax.tree.map(lambda a: a[:1], x)
    one = texts.cut(one, texts.longest) if texts else one
    count = len(problem.dataset.y)
    features = jax.tree.map(
        lambda s: make(count, s.shape[1:], s.dtype), jax.eval_shape(model.prefix, model.frozen, one)
    )
    return problem._replace(cuts=(model.cut,), cache={(problem.speed.precision, model.cut): features})


def refuse_lanes(config: Config, speed: Speed, problem: Problem) -> None:
    """Has lanes and batches refused that do not fit in one of the phases, before any of them begins.

    A first phase without many frozen features to compute is left out: before its first round, which refuses, nothing takes
    as long as looking would. Lanes that nobody asked for are halved until they fit, so that only a batch that may be too
    large for a single one is looked at.

    Raises:
        ValueError: see `rehearse`.
    """
    first, *later = build.phases(config)
    model = build.split_model(answering(first.config), problem.dataset, speed)
    long = (
        not config.groups and len(problem.dataset.y) > LONG and use_cache(speed, model, problem.dataset.x, first.config)
    )
    for phase in [first, *later] if long else later:
        if speed.lanes == "auto" and not may_be_too_large(problem, phase):
            continue
        ids: Any = np.arange(min(invited(config), problem.partition.clients))
        if config.groups:
            every = groups.members(config, problem.partition.clients)
            shares = groups.shares(every)
            ids = {name: every[name][: groups.asked(invited(config), share)] for name, share in shares.items()}
        rehearse(problem._replace(trainers=None), phase, ids)
        gc.collect()  # its engine, which refers to itself, before the first phase needs the memory
