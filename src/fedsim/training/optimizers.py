"""Optimizers and schedules by name: `"adamw(weight_decay=0.01)"` is a call of optax."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.config import nearest, parse_call


def optimizer(text: str, option: str) -> Callable[[Any], optax.GradientTransformation]:
    """Learning rate -> the optax optimizer that `"adamw(weight_decay=0.01)"` names.

    Raises:
        ValueError: optax has no such optimizer, or it refuses the options.
    """
    name, args, options = parse_call(text, option)
    make = getattr(optax, name, None)
    known = [n for n in dir(optax) if callable(getattr(optax, n)) and _takes_rate(getattr(optax, n))]
    if name not in known or make is None:
        raise ValueError(
            f"Expected {option}={name!r} to be an optax optimizer with a learning_rate{nearest(name, known)}."
        )
    if args:
        raise ValueError(
            f"Expected {option}={text!r} to give options by name; the learning rate is an option of its own."
        )

    def made(rate: Any) -> optax.GradientTransformation:
        return make(learning_rate=rate, **options)

    def once() -> Any:
        w, transform = {"w": jnp.zeros(1)}, made(0.1)
        return transform.update(w, transform.init(w), w)

    try:
        with jax.numpy_dtype_promotion("standard"):  # as in training
            jax.eval_shape(once)
    except Exception as error:  # what optax raises at bad options has no common type
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Expected {option}={text!r} to be a call with which optax makes a step from a gradient; {reason}."
        ) from None
    return made


def _takes_rate(function: Any) -> bool:
    try:
        return "learning_rate" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def schedule(text: str, option: str, base: float) -> Callable[[Any], Any]:
    """Round (from 0) -> base times the optax schedule that `"cosine_decay_schedule(1.0, 20)"` names.

    Raises:
        ValueError: optax has no such schedule, or it refuses the arguments.
    """
    name, args, options = parse_call(text, option)
    known = [n for n in dir(optax) if n.endswith("_schedule") and callable(getattr(optax, n))]
    if name not in known:
        raise ValueError(f"Expected {option}={name!r} to be an optax schedule{nearest(name, known)}.")
    try:
        factor = getattr(optax, name)(*args, **options)
        float(factor(0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {option}={text!r} to be a call that optax takes; {error}.") from None

    def value(count: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(base * factor(count), jnp.float32)

    return value
