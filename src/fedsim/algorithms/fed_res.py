"""Federated residual learning (Agarwal, Langford, Wei, arXiv 2003.12880): a shared model and a residual of each client's own.

A client predicts with both, logits f(x; w) + g(x; beta_i), and its loss is that of the sum. It keeps beta_i for ever and
shares w. The schemes differ in how w is trained in a round of K local steps:

    avg      K steps on beta_i with w fixed, then K on w_i with beta_i fixed; w = mean w_i      (FedResAvg, option I)
    avg_ii   the same, with w_i <- w_i - lr (grad - c_i + c); c_i = mean of the K raw gradients, c = mean c_i    (II)
    sgd      K steps on beta_i, then one step on w with the gradient over all K batches             (FedResSGD)
    naive    K times a step on beta_i, then one on w_i, each on a batch of its own; w = mean w_i    (FedResNaive)

The paper's means are uniform (`--weighting uniform`). Bytes: P_w numbers each way, 2 P_w with controls; nothing of beta_i
travels. docs/algorithms/fed_res.md has the equations, the options, and where this departs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.tree_utils import tree_add, tree_sub, tree_zeros_like

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.algorithms.parts import HEAD, matched, own_passes, pick, rate, start
from fedsim.algorithms.scaffold import Sent, require_uniform
from fedsim.config import one_of
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Task, Tree
from fedsim.training.local import stepped
from fedsim.wire import again, coded

SCHEMES = ("sgd", "avg", "avg_ii", "naive")
MOMENTS = ("none", "residual", "both")


class Server(NamedTuple):
    """What the server keeps."""

    params: Params  # w
    control: Params  # c of avg_ii; {} else
    optimizer: Tree


class Kept(NamedTuple):
    """What a client keeps. Nothing of it is sent, but what c_i changes by."""

    residual: Params  # beta_i
    moments: Tree  # of its optimizer; () where they are not kept
    shared_moments: Tree  # of the optimizer of w_i; () where they are not kept
    control: Params  # c_i of avg_ii; {} else


class Training(NamedTuple):
    """A client in training: one part moves, or both in turn."""

    shared: Params  # w_i
    own: Kept  # with beta_i as it is now
    moments: Tree  # of the part that moves; of `naive` a pair (of beta_i, of w_i)
    lr: Array  # (), float32, of w
    total: Params  # gradients of w so far, weighted; {} where nobody asks
    weight: Array  # (), float32: of them


def fed_res(
    task: Task,
    scheme: str = "avg",
    residual: Sequence[str] = ("*",),
    residual_rate: float = 1.0,
    residual_epochs: int | None = None,
    moments: str = "residual",
    server_step: bool = False,
) -> Algorithm:
    """FedRes (Agarwal et al., arXiv 2003.12880): a shared model and a residual of each client's own predict together.

    Args:
        scheme: how w is trained: sgd, avg, avg_ii (corrected for drift), naive (both at once).
        residual: patterns of the paths that the residual has; ("head/*",) is a head of one's own on what the start reads.
        residual_rate: its learning rate, as a factor of the clients'.
        residual_epochs: passes over a client's data for it; default: as the run's. 0: it does not learn.
        moments: whose optimizer's state a client keeps from round to round: none, residual, both.
        server_step: of scheme sgd, whether --server-optimizer takes the one step instead of each client's own.
    """
    require(scheme, residual_epochs, moments, server_step)
    if scheme == "avg_ii":
        require_uniform(task, "fed_res(scheme='avg_ii')")
    model, factor, apart = Joint(task, residual), rate("residual_rate", residual_rate), scheme != "naive"
    passes, corrected = own_passes(task, residual_epochs, "residual_epochs"), scheme == "avg_ii"
    alone = residual_local(task, model, factor, moments)._replace(passes=passes)
    if scheme == "naive":
        local = naive_local(task, model, factor, moments)
    else:
        local = shared_local(task, model, scheme, moments == "both", server_step)

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, tree_zeros_like(params) if corrected else {}, task.server_optimizer.init(params))

    def memory(key: Array, held: Tree) -> Kept:
        def state(params: Params, kept: bool) -> Tree:
            return task.optimizer(0.0).init(params) if kept else ()

        shared = start(task)
        return Kept(
            model.begin(), state(model.begin(), moments != "none"), state(shared, moments == "both"),
            tree_zeros_like(shared) if corrected else {},
        )  # fmt: skip

    @jax.jit
    def update(server: Server, change: tuple[Params, Params], weight: Array, share: Array) -> Server:
        params, optimizer = descend(task.server_optimizer, Averaged(server.params, server.optimizer), change[0], weight)
        return Server(params, jax.tree.map(lambda c, d: c + share * d, server.control, change[1]), optimizer)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        message = coded(Sent(server.params, server.control), change=False)
        if apart and residual_epochs != 0:
            params = coded(server.params, change=False)
            cohort.exchange(Sent(params, {}), alone)
            message = Sent(again(server.params), coded(server.control, change=False))
        change, info = cohort.exchange(message, local)
        return update(server, change, info.weight, info.weight / cohort.population), info.metrics

    def predict(held: Tree, server: Server, memory: Any, x: Tree) -> Array:
        logits = task.logits(held, server.params, x)
        return logits + model.residual(held, memory.residual, x) if memory else logits

    return Algorithm(init, round, predict, memory, setup=lambda held: (held, model.begin()), answers="client")


def require(scheme: str, residual_epochs: int | None, moments: str, server_step: bool) -> None:
    """Raises `ValueError` for options that are none, or that the scheme does not read."""
    one_of(SCHEMES, scheme=scheme)
    one_of(MOMENTS, moments=moments)
    if scheme == "naive" and residual_epochs is not None:
        raise ValueError(
            f"Expected no residual_epochs={residual_epochs} for scheme='naive', whose steps are on both parts in turn; leave it "
            "out, or take scheme='avg'."
        )
    if scheme != "sgd" and server_step:
        raise ValueError(
            f"Expected no server_step=True for scheme={scheme!r}, whose clients take many steps; take scheme='sgd'."
        )


class Joint:
    """Both models, and the loss of their sum.

    The residual's outputs are zero at the start: its head is, or, in a task without one by that name, the outputs that it
    starts with are taken off. A model of zeros alone would not do, as factors and hidden layers would get no gradient.
    """

    def __init__(self, task: Task, residual: Sequence[str]) -> None:
        self.task, self.heads = task, tuple(p for p in task.trained if p.startswith(HEAD[0].rstrip("*")))
        self.paths = matched(task, residual, "residual", "fed_res", "leave it out for all")
        missing = sorted(set(self.heads) - set(self.paths))
        if missing:
            raise ValueError(
                f"Expected residual={residual!r} to cover the head, whose zeros it begins with, and {missing[0]} is not among "
                "it; add 'head/*'."
            )

    def begin(self) -> Params:
        """The residual's first parameters."""
        first = pick(start(self.task), self.paths)
        return {path: jnp.zeros_like(leaf) if path in self.heads else leaf for path, leaf in first.items()}

    def residual(self, held: Tree, beta: Params, x: Tree) -> Array:
        """g(x; beta); (B, ...), as the model's outputs."""
        first = start(self.task)
        outputs = self.task.logits(held, {**first, **beta}, x)
        return outputs if self.heads else outputs - self.task.logits(held, first, x)

    def loss(self, shared: Params, beta: Params, held: Tree, batch: Batch) -> tuple[Array, Metrics]:
        """Mean loss of the sum over a batch, and its metrics."""
        x = self.task.augment(batch.key, batch.x)
        outputs = self.task.logits(held, shared, x) + self.residual(held, beta, x)
        return self.task.criterion(outputs, batch)


# --- the phases on a client


def began(task: Task, lr: Array, kept: Tree, params: Params) -> Tree:
    """The state that an optimizer goes on from: what was kept, or a fresh one."""
    return kept if jax.tree.leaves(kept) else task.optimizer(lr).init(params)


def residual_local(task: Task, model: Joint, factor: float, moments: str) -> Local:
    """Steps on beta_i with w fixed. Nothing is replied."""

    def begin(held: Tree, message: Sent, client: Client, batch: Batch) -> Training:
        lr, own = task.lr(client, message), client.memory
        state = began(task, factor * lr, own.moments, own.residual)
        return Training({}, own, state, lr, {}, jnp.float32(0.0))

    def step(held: Tree, message: Sent, carry: Training, batch: Batch) -> tuple[Training, Metrics]:
        slope = jax.grad(model.loss, argnums=1, has_aux=True)
        grads, metrics = slope(message.params, carry.own.residual, held, batch)
        beta, state = stepped(task.optimizer(factor * carry.lr), grads, carry.moments, carry.own.residual)
        return carry._replace(own=carry.own._replace(residual=beta), moments=state), metrics

    def finish(held: Tree, message: Sent, carry: Training, client: Client) -> tuple[Tree, Kept, Metrics]:
        return (), carry.own._replace(moments=() if moments == "none" else carry.moments), {}

    return Local(begin, step, finish, task.passes)


def shared_local(task: Task, model: Joint, scheme: str, keeps: bool, server_step: bool) -> Local:
    """Steps on w_i with beta_i fixed, or the one of scheme sgd; the reply is what w_i and c_i have changed by.

    Args:
        keeps: the optimizer's state stays with the client.
        server_step: the reply is the gradient, downhill.
    """
    corrected, once = scheme == "avg_ii", scheme == "sgd"

    def begin(held: Tree, message: Sent, client: Client, batch: Batch) -> Training:
        lr, params = task.lr(client, message), message.params
        total = tree_zeros_like(params) if corrected or once else {}
        state = began(task, lr, client.memory.shared_moments, params)
        return Training(params, client.memory, state, lr, total, jnp.float32(0.0))

    def step(held: Tree, message: Sent, carry: Training, batch: Batch) -> tuple[Training, Metrics]:
        slope = jax.grad(model.loss, has_aux=True)
        grads, metrics = slope(carry.shared, carry.own.residual, held, batch)
        if corrected or once:  # the mean is over steps, or over examples
            weight = metrics.get("weight", batch.mask.sum()) if once else jnp.float32(1.0)
            total = jax.tree.map(lambda t, g: t + weight * g, carry.total, grads)
            carry = carry._replace(total=total, weight=carry.weight + weight)
        if once:
            return carry, metrics
        if corrected:
            grads = jax.tree.map(lambda g, mine, all_: g - mine + all_, grads, carry.own.control, message.control)
        shared, state = stepped(task.optimizer(carry.lr), grads, carry.moments, carry.shared)
        return carry._replace(shared=shared, moments=state), metrics

    def finish(held: Tree, message: Sent, carry: Training, client: Client) -> tuple[Tree, Kept, Metrics]:
        mean = jax.tree.map(lambda t: t / jnp.maximum(carry.weight, 1.0), carry.total)
        shared, state, own = carry.shared, carry.moments, carry.own
        if once:
            shared, state = stepped(task.optimizer(carry.lr), mean, state, shared)
        change = jax.tree.map(jnp.negative, mean) if server_step else tree_sub(shared, message.params)
        control = tree_sub(mean, own.control) if corrected else {}
        return coded((change, control)), own._replace(shared_moments=state if keeps else ()), {}

    def sent(own: Kept, reply: tuple[Params, Params], client: Client) -> Kept:
        return own._replace(control=tree_add(own.control, reply[1])) if corrected else own  # as the server decoded it

    return Local(begin, step, finish, task.passes, sent)


def naive_local(task: Task, model: Joint, factor: float, moments: str) -> Local:
    """Steps on beta_i and on w_i in turn, as many of each as the run has, on batches of their own."""
    passes, turns = task.passes, task.passes.steps
    twice: int | Callable[[Any], int] | None = 2 * turns if isinstance(turns, int) else turns
    if callable(turns):
        twice = lambda labels: 2 * turns(labels)  # noqa: E731 - one expression, named

    def begin(held: Tree, message: Sent, client: Client, batch: Batch) -> Training:
        lr, own, params = task.lr(client, message), client.memory, message.params
        both = began(task, factor * lr, own.moments, own.residual), began(task, lr, own.shared_moments, params)
        return Training(params, own, both, lr, {}, jnp.float32(0.0))

    def step(held: Tree, message: Sent, carry: Training, batch: Batch) -> tuple[Training, Metrics]:
        slope = jax.grad(model.loss, argnums=(0, 1), has_aux=True)
        grads, metrics = slope(carry.shared, carry.own.residual, held, batch)
        of_shared = stepped(task.optimizer(carry.lr), grads[0], carry.moments[1], carry.shared)
        of_own = stepped(task.optimizer(factor * carry.lr), grads[1], carry.moments[0], carry.own.residual)
        turn = batch.step % 2 == 0  # of beta_i; clients of a lane are at steps of their own, so both are computed

        def chosen(now: Array | bool, new: Tree, old: Tree) -> Tree:
            return jax.tree.map(partial(jnp.where, now), new, old)

        beta, state = chosen(turn, of_own, (carry.own.residual, carry.moments[0]))
        shared, of_w = chosen(~turn, of_shared, (carry.shared, carry.moments[1]))
        own = carry.own._replace(residual=beta)
        return carry._replace(shared=shared, own=own, moments=(state, of_w)), metrics

    def finish(held: Tree, message: Sent, carry: Training, client: Client) -> tuple[Tree, Kept, Metrics]:
        own = carry.own._replace(
            moments=() if moments == "none" else carry.moments[0],
            shared_moments=carry.moments[1] if moments == "both" else (),
        )
        return coded((tree_sub(carry.shared, message.params), {})), own, {}

    return Local(begin, step, finish, passes._replace(epochs=2 * passes.epochs, steps=twice))
