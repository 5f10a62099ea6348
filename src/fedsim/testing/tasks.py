"""Tiny tasks for the contract: softmax regression over a frozen linear map, with LoRA, a head or prompts where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.core import Algorithm, Factors, Params, Passes, Task
from fedsim.evaluation.evaluate import classification_criterion, classification_loss, classification_score
from fedsim.folds import by_examples, uniform

Make = Callable[[Task], Algorithm]

FEATURES, CLASSES = 6, 3
BLOCKS, TOKENS = 2, 2  # of a task with blocks, and of the prompt in each of them
LORA = Factors("frozen", "lora_a", "lora_b", scale=1.5, inputs=FEATURES, rank=2, outputs=FEATURES)
GROUPS = ("small", "large", "server")  # of algorithms with several architectures; the last is the server's own model


def tiny(apply: Callable[[Params, Params, Array], Array], init: Callable[[Array], Params]) -> Task:
    """A classifier `apply(params, held, x)`, trained by SGD."""
    return Task(
        init=init,
        loss=classification_loss(apply),
        logits=lambda held, params, x: apply(params, held, x),
        criterion=classification_criterion,
        score=classification_score,
        optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
        lr=lambda client, message: 0.1 / client.round.astype(jnp.float32),
        server_optimizer=optax.sgd(1.0),
        passes=Passes(epochs=2, batch_size=4),
        weight=by_examples,
        trained=frozenset(jax.eval_shape(init, jax.random.key(0))),
        classes=CLASSES,
    )


def tiny_task(**changes: Any) -> Task:
    """Softmax regression on frozen features; `changes` replaces fields of the `Task`."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        return jnp.tanh(x @ held["frozen"]) @ params["kernel"] + params["bias"]

    def init(key: Array) -> Params:
        return {"kernel": 0.1 * jax.random.normal(key, (FEATURES, CLASSES)), "bias": jnp.zeros((CLASSES,))}

    return tiny(apply, init)._replace(**changes)


def tiny_lora_task(trains_a: bool = True, **changes: Any) -> Task:
    """`tiny_task` with LoRA on its frozen map, A trained or held as FFA-LoRA has it."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        leaves = {**held, **params}
        h = x @ leaves["frozen"] + ((x @ leaves["lora_a"]) * LORA.scale) @ leaves["lora_b"]
        return jnp.tanh(h) @ leaves["kernel"] + leaves["bias"]

    def init(key: Array) -> Params:
        params = {**tiny_task().init(key), "lora_b": jnp.zeros((LORA.rank, FEATURES))}
        return {**params, "lora_a": jax.random.normal(key, (FEATURES, LORA.rank))} if trains_a else params

    return tiny(apply, init)._replace(factors=(LORA,))._replace(**changes)


def tiny_wide_task(**changes: Any) -> Task:
    """`tiny_task` with other leaves: a hidden layer instead of the frozen map."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        return jnp.tanh(x @ params["hidden"]) @ params["kernel"] + params["bias"]

    def init(key: Array) -> Params:
        shapes = {"hidden": (FEATURES, 4), "kernel": (4, CLASSES)}
        keys = jax.random.split(key, len(shapes))
        params = {name: 0.5 * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}
        return {**params, "bias": jnp.zeros((CLASSES,))}

    return tiny(apply, init)._replace(**changes)


def tiny_head_task(**changes: Any) -> Task:
    """`tiny_wide_task` whose last layer is a head by its name, for algorithms that treat it apart."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        return jnp.tanh(x @ params["hidden"]) @ params["head/kernel"] + params["head/bias"]

    def init(key: Array) -> Params:
        return {name if name == "hidden" else f"head/{name}": leaf for name, leaf in tiny_wide_task().init(key).items()}

    def features(held: Params, params: Params, x: Array) -> Array:
        return jnp.tanh(x @ params["hidden"])

    return tiny(apply, init)._replace(features=features)._replace(**changes)


def tiny_deep_task(width: int, **changes: Any) -> Task:
    """`tiny_head_task` above one hidden layer more, of so many outputs: another body below a head of the same shape."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        return tiny_head_task().logits(held, params, jnp.tanh(x @ params["first"]))

    def init(key: Array) -> Params:
        first, hidden = (0.5 * jax.random.normal(key, shape) for shape in ((FEATURES, width), (width, 4)))
        return tiny_head_task().init(key) | {"first": first, "hidden": hidden}

    return tiny(apply, init)._replace(**changes)


def shared_head() -> Task:
    """Three architectures whose heads have one shape: two of clients, and the server's own, which is the largest."""
    server = tiny_deep_task(8)
    return server._replace(groups={"small": tiny_head_task(), "large": tiny_deep_task(5), "server": server})


def tiny_prefix_task(**changes: Any) -> Task:
    """Frozen blocks, each with keys and values of a prompt, which alone is trained; outputs are the first features."""

    def features(held: Params, params: Params, x: Array) -> Array:
        leaves = {**held, **params}
        h = x @ leaves["frozen"]
        for b in range(BLOCKS):
            key, value = (leaves[f"blocks/{b}/prefix_{name}"] for name in ("key", "value"))
            h = h + jnp.tanh(h @ leaves[f"blocks/{b}/kernel"] / FEATURES) + jnp.tanh(h @ key.T) @ value
        return jnp.tanh(h)

    def init(key: Array) -> Params:
        paths = [f"blocks/{b}/prefix_{name}" for b in range(BLOCKS) for name in ("key", "value")]
        return dict(zip(paths, 0.1 * jax.random.normal(key, (len(paths), TOKENS, FEATURES)), strict=True))

    task = tiny(lambda params, held, x: features(held, params, x)[..., :CLASSES], init)
    return task._replace(features=features)._replace(**changes)


def suited(make: Make) -> Task:
    """The first of the tiny tasks that the constructor does not refuse; with groups where it trains several architectures.

    Raises:
        ValueError: it refuses all of them; what it says of the last one with LoRA, or with groups if it asks for them.
    """
    try:
        task = of_one(make)
    except ValueError as error:
        if "groups=" in str(error):
            return shared_head()
        raise
    if make(task).groups:
        task = task._replace(groups=dict(zip(GROUPS, (tiny_task(), tiny_wide_task(), task), strict=True)))
    return task


def of_one(make: Make) -> Task:
    """The first of the tiny tasks that the constructor does not refuse, without groups."""
    tasks = (
        tiny_task(), tiny_task(weight=uniform), tiny_task(optimizer=optax.sgd), tiny_head_task(), tiny_prefix_task(),
        tiny_lora_task(trains_a=False), tiny_lora_task(),
    )  # fmt: skip
    for task in tasks[:-1]:
        try:
            make(task)
        except ValueError:
            continue
        return task
    make(tasks[-1])
    return tasks[-1]
