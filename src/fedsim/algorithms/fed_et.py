"""Fed-ET (Cho et al., arXiv 2204.12703): clients train small models of several architectures, the server a larger one from them.

Client k has architecture u(k), the server a larger model W that never travels. All models share the shapes of some layers h, the
representation; here that is the head, by default. s_k(x) are the logits of client k's returned model on a public example x:

    in         h of W <- mean of the clients' h
    consensus  a_k = v_k / sum_j v_j,  v_k = variance of s_k(x) over the classes;  y^ = argmax of s^ = sum_k a_k s_k
               D = { k : argmax s_k /= y^ },  s_div = sum over D of a'_k s_k,  a' = v normalised over D
    server     W <- steps on  mean_x [ CE(s(x; W), y^) + lam 1[D is not empty] KL(softmax s_div || softmax s(x; W)) ]
    out        w_u <- mean of the returned models of architecture u,  its h <- h of W

Who has no clients in a round keeps its body and gets h. Means weigh as the run does (`--weighting`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.distillation import (
    Lesson,
    Returned,
    asking,
    exchanging,
    present,
    refuse_without_public,
    students,
    studying,
    told,
)
from fedsim.algorithms.parts import matched, pick
from fedsim.config import one_of
from fedsim.core import Algorithm, Cohort, Metrics, Params, Task, Tree
from fedsim.folds import weighted_sum

LARGE = "server"  # the group of the server's own model
LIKE = "--groups \"small(peft='bias', share=1.0)\" \"server(peft='full')\""


class Server(NamedTuple):
    """What the server keeps: a model of each architecture, its own among them."""

    params: dict[str, Params]


def fed_et(
    task: Task,
    lam: float = 0.05,
    shared: Sequence[str] = ("head/*",),
    server_steps: int = 128,
    server_batch: int = 64,
    server_rate: float = 5e-3,
    server_optimizer: str = "sgd(momentum=0.9)",
    weights: str = "variance",
    target: str = "hard",
) -> Algorithm:
    """Fed-ET (Cho et al., arXiv 2204.12703): small models of several architectures at clients teach a larger one of the server.

    Args:
        lam: strength of the diversity term.
        shared: patterns of the paths of the layers that all models share, the same shapes in each.
        server_steps, server_batch, server_rate, server_optimizer: of the server's training, from rest in every round.
        weights: of clients in the consensus, by "variance" of their logits, or "uniform".
        target: the "hard" label of the consensus, or its "soft" probabilities.

    Raises:
        ValueError: numbers out of range, words that are none, a run without groups or without one called server, layers that
            not all architectures have; of `init`, layers of different shapes.
    """
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < math.inf:
        raise ValueError(f"Expected lam={lam!r} >= 0, the strength of the diversity term; leave it out for 0.05.")
    one_of(("variance", "uniform"), weights=weights)
    one_of(("hard", "soft"), target=target)
    transform = students(task, "fed_et", server_steps, server_batch, server_rate, server_optimizer)(server_rate)
    paths = common(task.groups, shared)
    tasks = {name: one for name, one in task.groups.items() if name != LARGE}
    large = task.groups[LARGE]
    exchange, ask = exchanging(tasks), asking(tasks)
    learn = studying(large, transform, server_batch, server_steps, float(lam))

    @jax.jit
    def taught(logits: Array, returned: Mapping[str, Returned]) -> tuple[Lesson, Array]:
        lesson = lesson_of(logits, present(returned), weights == "variance", target == "hard")
        return lesson, lesson.split.mean()

    @jax.jit
    def received(returned: Mapping[str, Returned], own: Params) -> Params:
        return own | mean_of([(pick(one.models, paths), one.weight) for one in returned.values()], pick(own, paths))

    @jax.jit
    def handed_out(returned: Mapping[str, Returned], own: Params, old: Server) -> Server:
        means = {name: returned[name].mean if name in returned else old.params[name] for name in tasks}
        new = Server({**{name: mean | pick(own, paths) for name, mean in means.items()}, LARGE: own})
        return jax.tree.map(lambda n, o: jnp.where(present(returned).any(), n, o), new, old)

    def init(key: Array, held: Tree) -> Server:
        params = {name: one.init(key) for name, one in task.groups.items()}
        refuse_other_shapes(params, paths)
        return Server({name: each | pick(params[LARGE], paths) for name, each in params.items()})

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        x = cohort.public
        refuse_without_public(x, "fed_et")
        if LARGE in cohort.groups:
            raise ValueError(
                f"Expected group {LARGE!r} of algorithm='fed_et' to have no clients, as its model never travels; leave out its share."
            )
        returned, infos = exchange(server.params, cohort.groups)
        lesson, split = taught(ask(held, returned, x), returned)
        own = received(returned, server.params[LARGE])
        examples = {"x": x[LARGE], "lesson": lesson}
        own, _, metrics = learn(held[LARGE], own, transform.init(own), examples, (), key)
        said = {**told(infos), **(metrics if server_steps else {}), "dissent": split}
        return handed_out(returned, own, server), said

    def predict(held: Tree, server: Server, memory: Tree, x: Tree) -> Array:
        return large.logits(held[LARGE], server.params[LARGE], x)

    return Algorithm(init, round, predict, params=lambda server: server.params[LARGE], groups=True)


# --- what clients say together


def confidence(logits: Array) -> Array:
    """v_k: the variance of logits (..., C) over the classes, (...). A constant that is added to them changes nothing."""
    return jnp.var(logits, axis=-1)


def shares(votes: Array, among: Array) -> Array:
    """Votes (..., M) over their sum among these clients, (..., M); equal shares where none of them has any, 0 for all others."""
    votes = jnp.where(among, votes, 0.0)
    total = votes.sum(axis=-1, keepdims=True)
    alike = among.astype(votes.dtype)
    number = jnp.maximum(alike.sum(axis=-1, keepdims=True), 1.0)
    return jnp.where(total > 0, votes / jnp.where(total > 0, total, 1.0), alike / number)


def together(share: Array, logits: Array) -> Array:
    """Logits (..., M, C) weighed by shares (..., M), (..., C)."""
    return jnp.einsum("...m,...mc->...c", share, logits, precision=jax.lax.Precision.HIGHEST)


def lesson_of(logits: Array, there: Array, by_variance: bool = True, hard: bool = True) -> Lesson:
    """What the server is taught of each public example.

    Args:
        logits: (Q, M, C), of the clients' models; `there` (M,) says whose count.
        by_variance: clients weigh by their confidence; else each alike.
        hard: towards the consensus' label; else its probabilities.
    """
    there = there & jnp.isfinite(confidence(logits))  # (Q, M): a client that has diverged does not count where it shows
    logits = jnp.where(there[..., None], logits, 0.0)
    sure = confidence(logits)
    votes = sure if by_variance else jnp.ones_like(sure)
    said = together(shares(votes, there), logits)  # (Q, C)
    label = said.argmax(axis=-1)
    # Who says the same of all classes says nothing, and does not dissent.
    dissents = there & (sure > 0) & (logits.argmax(axis=-1) != label[:, None])  # (Q, M)
    other = together(shares(votes, dissents), logits)
    target = jax.nn.one_hot(label, logits.shape[-1]) if hard else jax.nn.softmax(said)
    return Lesson(target, jax.nn.softmax(other), dissents.any(axis=-1).astype(jnp.float32))


# --- what all models share


def mean_of(parts: Sequence[tuple[Params, Array]], old: Params) -> Params:
    """The weighted mean of leaves (M, ...) of several architectures' clients, weights (M,); `old` where all of them are 0."""
    total = sum((weight.sum() for _, weight in parts), start=jnp.float32(0))

    def of(path: str) -> Array:
        sums = [weighted_sum(weight, leaves[path]) for leaves, weight in parts]
        mean = sum(sums[1:], start=sums[0]) / jnp.where(total > 0, total, 1.0)
        return jnp.where(total > 0, mean, old[path])

    return {path: of(path) for path in old}


def common(groups: Mapping[str, Task], shared: Sequence[str]) -> tuple[str, ...]:
    """Paths of the shared layers.

    Raises:
        ValueError: no groups, none that is the server's, no clients, an architecture without these layers.
    """
    if not groups or LARGE not in groups or len(groups) == 1:
        raise ValueError(
            f"Expected groups={tuple(groups)!r} of algorithm='fed_et' to be architectures of clients, and one called {LARGE!r} "
            f"without a share; give --groups, like {LIKE}."
        )
    found = {
        name: matched(one, shared, "shared", f"group {name!r} of fed_et", "train what they name") for name, one in groups.items()
    }  # fmt: skip
    for name, paths in found.items():
        if paths != found[LARGE]:
            only = sorted(set(paths) ^ set(found[LARGE]))
            raise ValueError(
                f"Expected shared={tuple(shared)!r} to be the same layers in group {name!r} and in {LARGE!r}, but only one of them "
                f"trains {', '.join(only)}; choose patterns or a PEFT kind so that both do."
            )
    if not found[LARGE]:
        raise ValueError(f"Expected shared={tuple(shared)!r} to name layers; leave it out for the head.")
    return found[LARGE]


def refuse_other_shapes(params: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Raises `ValueError` where a shared leaf has another shape in one architecture."""
    for name, leaves in params.items():
        for path in paths:
            if leaves[path].shape != params[LARGE][path].shape:
                raise ValueError(
                    f"Expected {path} of group {name!r} to have the shape {params[LARGE][path].shape} that it has in {LARGE!r}, not "
                    f"{leaves[path].shape}, as fed_et shares it; give all the same width, like backbone=\"fused('cnn', width=64)\"."
                )
