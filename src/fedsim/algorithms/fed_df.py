"""FedDF (Lin et al., arXiv 2006.07242): clients' models are averaged by architecture, and each mean then learns from all of them.

    server   w_u <- weighted mean of the returned models of architecture u
             w_u <- steps on  CE( softmax mean_k s_k(x), softmax s(x; w_u) )  over public x, for every u

s_k are the logits of client k's model, of whatever architecture; labels of x are not known. It runs with one architecture, or with
groups; one that no client has, such as the server's own, learns from the others alone. Of the code the default is here the loss on
mean logits (`avg_logits`), which is the paper's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.algorithms.distillation import (
    Lesson,
    asking,
    exchanging,
    present,
    refuse_without_public,
    students,
    studying,
    told,
)
from fedsim.core import Algorithm, Cohort, Metrics, Params, Task, Tree


class Server(NamedTuple):
    """What the server keeps."""

    params: dict[str, Params]  # by architecture; "" where there is one


def fed_df(
    task: Task,
    server_steps: int = 1000,
    server_batch: int = 128,
    server_rate: float = 1e-3,
    server_optimizer: str = "adam",
    cosine: bool = True,
) -> Algorithm:
    """FedDF (Lin et al., arXiv 2006.07242): means by architecture, each of which then learns from all clients on public examples.

    Args:
        server_steps, server_batch: of each architecture in a round.
        server_rate, server_optimizer: of its training, which begins at rest in every round.
        cosine: the rate falls to 0 over the steps, as half a cosine.

    Raises:
        ValueError: numbers out of range, an unknown optimizer, a language model.
    """
    made = students(task, "fed_df", server_steps, server_batch, server_rate, server_optimizer)
    tasks = dict(task.groups) or {"": task}
    rate: Any = optax.cosine_decay_schedule(server_rate, server_steps) if cosine and server_steps else server_rate
    transform = made(rate)
    exchange, ask = exchanging(tasks), asking(tasks)
    learn = {name: studying(one, transform, server_batch, server_steps) for name, one in tasks.items()}
    answering = "server" if "server" in tasks else next(iter(tasks))

    @jax.jit
    def taught(logits: Array, returned: Any) -> Lesson:
        there = present(returned).astype(jnp.float32)
        shares = there / jnp.maximum(there.sum(), 1.0)
        target = jax.nn.softmax(jnp.einsum("m,qmc->qc", shares, logits, precision=jax.lax.Precision.HIGHEST))
        return Lesson(target, jnp.zeros_like(target), jnp.zeros(len(target)))

    @jax.jit
    def where_any(returned: Any, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(present(returned).any(), n, o), new, old)

    def init(key: Array, held: Tree) -> Server:
        return Server({name: one.init(key) for name, one in tasks.items()})

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        public = cohort.public
        refuse_without_public(public, "fed_df")
        held_by, x_by = (given if task.groups else {"": given} for given in (held, public))
        returned, infos = exchange(server.params, cohort.groups if task.groups else {"": cohort})
        lesson = taught(ask(held_by, returned, x_by), returned)
        params, metrics = dict(server.params), told(infos)
        for number, (name, run) in enumerate(learn.items()):
            start = returned[name].mean if name in returned else params[name]
            examples = {"x": x_by[name], "lesson": lesson}
            own = jax.random.fold_in(key, number) if number else key
            params[name], _, seen = run(held_by[name], start, transform.init(start), examples, (), own)
            metrics |= seen if name == answering and server_steps else {}
        return where_any(returned, Server(params), server), metrics

    def predict(held: Tree, server: Server, memory: Tree, x: Tree) -> Array:
        return tasks[answering].logits(held[answering] if task.groups else held, server.params[answering], x)

    return Algorithm(
        init, round, predict, params=lambda server: server.params[answering], groups=bool(task.groups)
    )  # fmt: skip
