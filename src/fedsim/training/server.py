"""The server's own training: minibatch steps on examples that it holds, on what clients sent, or on no data at all.

A trainer is made when the algorithm is constructed, like a `Local`, and its `run` is called in `round`. What it trains on
comes as an argument - `cohort.public`, `cohort.shard`, arrays of the algorithm's own - so nothing is captured, and a run
is one compiled program. Of accelerators each computes its part of every batch, over the engine's mesh; of host devices the
first one trains alone, since a collective of theirs may stand still (`engine.lanes.Lanes.together`).

What takes long, such as thousands of steps that prepare a model, belongs into round 1 and not into `Algorithm.init`: that
is called where nothing is to be trained, too, and the record counts seconds and FLOPs of rounds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedsim.config import whole_number
from fedsim.core import Batch, Metrics, Params, Tree
from fedsim.engine import processes
from fedsim.engine.device_memory import exhausted
from fedsim.engine.flops import all_products
from fedsim.engine.host import compile_clock
from fedsim.training.local import stepped

Loss = Callable[[Tree, Params, Batch, Tree], tuple[Array, Metrics]]  # (held, params, batch, args) -> mean loss, metrics
Run = Callable[[Tree, Params, Tree, Tree, Tree, Array], tuple[Params, Tree, Metrics]]

READ = 64  # examples that are read at a time where nothing is learnt


def trainer(loss: Loss, optimizer: optax.GradientTransformation, batch: int, steps: int) -> Run:
    """A function `run(held, params, state, examples, args, key) -> params, state, metrics` that takes `steps` steps.

    `state` is the optimizer's, at first `optimizer.init(params)`; an algorithm keeps it between rounds or makes it anew,
    and optax' schedules count in it. `examples` are x (n, ...), or a tuple of x and y (n,), or () for steps without data;
    an x of several arrays is a dict. `args` go to the loss as they are. Metrics are means over the steps.

    Batches are drawn without replacement, epoch after epoch, each in an order of its own; one may straddle two epochs, so
    that all are full. They follow from `key` alone, whatever the devices. `Batch.y` is () where there are no labels.

    Args:
        loss: made once; what changes from round to round is in `args`.
        batch: examples of a step, of all devices together.
        steps: of a run; 0 changes nothing.

    Raises:
        ValueError: impossible numbers; of `run`: no examples, or of different lengths; a batch that does not fit into a
            device's memory.
    """
    whole_number(batch=(batch, 1), steps=(steps, 0))

    @functools.cache
    def program(mesh: Mesh | None) -> Any:
        """The run, compiled for devices that split its batches; None for one device."""
        whole, split = shardings(mesh)
        return jax.jit(functools.partial(trained, loss, optimizer, batch, steps, split), out_shardings=whole)

    def run(
        held: Tree, params: Params, state: Tree, examples: Tree, args: Tree, key: Array
    ) -> tuple[Params, Tree, Metrics]:
        length(examples)  # refuses before anything is traced
        inputs = (held, params, state, examples, args, key)
        return carried_out(program, inputs, batch, lambda shapes: (params, state, ones(shapes[2])))

    return run


def reader(read: Callable[[Tree, Tree, Tree], Tree], batch: int = READ) -> Callable[[Tree, Tree, Tree], Tree]:
    """A function `ask(held, args, x) -> answers (n, ...)`: what `read(held, args, x (B, ...))` says of x (n, ...), in batches.

    It runs where a trainer's steps do, and counts as the server's training. Memory holds all answers and one batch's work.

    Args:
        read: of one example whatever the others are; made once.
        batch: examples at a time, of all devices together.

    Raises:
        ValueError: of `ask`: no examples, or of different lengths; a batch that does not fit into a device's memory.
    """

    @functools.cache
    def program(mesh: Mesh | None) -> Any:
        """All batches, compiled for devices that split each; None for one device."""
        whole, split = shardings(mesh)
        return jax.jit(functools.partial(answered, read, batch, split), out_shardings=whole)

    def ask(held: Tree, args: Tree, x: Tree) -> Tree:
        length(x)
        return carried_out(program, (held, args, x), batch, ones)

    return ask


def answered(
    read: Callable[[Tree, Tree, Tree], Tree], batch: int, split: NamedSharding | None, held: Tree, args: Tree, x: Tree
) -> Tree:
    """Answers to all examples, (n, ...); the last batch is filled up with its last example."""
    count = length(x)
    rows = jnp.minimum(jnp.arange(-(-count // batch) * batch), count - 1).reshape(-1, batch)

    def of(rows: Array) -> Tree:
        return read(held, args, jax.tree.map(lambda a: spread(a[rows], split), x))

    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], lax.map(of, rows))


def trained(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: int,
    steps: int,
    split: NamedSharding | None,
    held: Tree,
    params: Params,
    state: Tree,
    examples: Tree,
    args: Tree,
    key: Array,
) -> tuple[Params, Tree, Metrics]:
    """Parameters and optimizer's state after the steps, and the means of their metrics; `run` without devices and clock.

    Args:
        split: how a batch lies on the devices.
    """
    x, y = examples if type(examples) is tuple and examples else (examples, ())
    for_order, for_steps = jax.random.split(key)
    rows = order(for_order, length(examples), batch, max(steps, 1))  # of no step, too, one is traced

    def step(carry: tuple[Params, Tree], number: Array) -> tuple[tuple[Params, Tree], Metrics]:
        params, state = carry
        drawn: Any = jax.tree.map(lambda a: spread(a[rows[number]], split), (x, y))
        mask, own = spread(jnp.ones(batch, jnp.float32), split), jax.random.fold_in(for_steps, number)
        seen = Batch(*drawn, mask=mask, key=own, step=number, last=number == steps - 1)
        grads, metrics = jax.grad(loss, argnums=1, has_aux=True)(held, params, seen, args)
        return stepped(optimizer, grads, state, params), metrics

    (params, state), metrics = lax.scan(step, (params, state), jnp.arange(steps))
    return params, state, jax.tree.map(lambda m: m.mean(axis=0), metrics)


def order(key: Array, count: int, batch: int, steps: int) -> Array:
    """Which of `count` examples each step sees, (steps, batch) int32: all of them in an order of its own, again and again."""
    epochs = -(-steps * batch // max(count, 1))
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    orders = jax.vmap(lambda key: jax.random.permutation(key, max(count, 1)))(keys)
    return orders.reshape(-1)[: steps * batch].reshape(steps, batch)


def length(examples: Tree) -> int:
    """Number of examples; 0 for steps without data.

    Raises:
        ValueError: None, a tuple that is not (x, y), arrays of other or no length.
    """
    if examples is None:
        raise ValueError(
            "Expected examples for the server's training, not None: this run holds none back for it; give public_share=0.1 "
            "for cohort.public, server_share=0.1 for cohort.shard."
        )
    if type(examples) is tuple and len(examples) not in (0, 2):
        raise ValueError(
            f"Expected examples of the server's training to be x or (x, y), not a tuple of {len(examples)}; put several "
            "arrays of x into a dict."
        )
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(examples)]
    found = {shape[:1] for shape in shapes}
    if len(found) > 1 or found & {(), (0,)}:
        raise ValueError(
            f"Expected examples of the server's training to have one leading axis n > 0, not the shapes {shapes}; what is no "
            "example goes into args."
        )
    return next(iter(found), (0,))[0]


def ones(shapes: Tree) -> Tree:
    """Ones of these shapes, which a rehearsal has for numbers."""
    return jax.tree.map(lambda one: np.ones(one.shape, one.dtype), shapes)


# --- where it runs


def carried_out(
    program: Callable[[Mesh | None], Any], inputs: tuple[Any, ...], batch: int, rehearsed: Callable[[Tree], Tree]
) -> Any:
    """What the program for these devices gives, timed; of a rehearsal what `rehearsed` makes of its shapes."""
    watch, mesh = _watch.get() or Watch(), mesh_of(inputs)
    alone = mesh is not None and on_host(mesh)
    if alone:
        inputs = jax.tree.map(of_first, inputs)
    make = program(None if alone else mesh)
    if not watch.trains:
        return rehearsed(jax.eval_shape(make, *inputs))
    with watch.timed(make, inputs):
        result = waited_for(make, inputs, batch)
    return processes.put(result, NamedSharding(mesh, P())) if alone else result


def shardings(mesh: Mesh | None) -> tuple[NamedSharding | None, NamedSharding | None]:
    """How what all devices hold lies on them, and how a batch that they split; None for one device."""
    return (None, None) if mesh is None else (NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names)))


def spread(a: Array, split: NamedSharding | None) -> Array:
    """A batch's array, split over the devices."""
    return a if split is None else lax.with_sharding_constraint(a, split)


def mesh_of(tree: Tree) -> Mesh | None:
    """The engine's devices, over which its values lie; None for values of no engine."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    shardings = [
        leaf.sharding for leaf in arrays if not isinstance(leaf, jax.core.Tracer)
    ]  # of a round that is only traced
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


def on_host(mesh: Mesh) -> bool:
    """Whether the devices are a CPU's."""
    return mesh.devices.flat[0].platform == "cpu"


def of_first(leaf: Any) -> Any:
    """A replicated value as this process' first device has it; nothing is copied."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return leaf
    return leaf.addressable_data(0) if leaf.is_fully_replicated else processes.fetch(leaf)


def waited_for(program: Any, inputs: tuple[Any, ...], batch: int) -> Any:
    """The program's result, once it is there.

    Raises:
        ValueError: a device's memory ran out.
    """
    try:
        return jax.block_until_ready(program(*inputs))
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        why = str(error).partition("\n")[0]
    raise ValueError(
        f"Expected batch={batch} of the server's training to fit into the device's memory ({why}); lower it in the algorithm, "
        "or take --remat blocks or --precision bfloat16."
    )


# --- what it takes


@dataclass
class Watch:
    """What the server's training took while this watched it."""

    trains: bool = True
    seconds: float = 0.0  # without compiling
    flops: float = 0.0

    @contextmanager
    def timed(self, program: Any, inputs: tuple[Any, ...]) -> Iterator[None]:
        """Adds the block's time, and the FLOPs of the program that it runs."""
        jax.block_until_ready(inputs)  # what came before is not the server's training
        clock = compile_clock()
        began, compiled = time.perf_counter(), clock.seconds
        self.flops += all_products(program.trace(*inputs).jaxpr.jaxpr)
        yield
        self.seconds += max(time.perf_counter() - began - (clock.seconds - compiled), 0.0)


_watch: ContextVar[Watch | None] = ContextVar("who watches the server's training", default=None)


@contextmanager
def watched(*, trains: bool = True) -> Iterator[Watch]:
    """While it is open, what the server's training takes is added up.

    Args:
        trains: False for a rehearsal: a run is traced and not run, parameters and state come back as they were, metrics
            are ones.
    """
    watch = Watch(trains)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
