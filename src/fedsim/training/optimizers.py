"""Optimizers and schedules by name: `"adamw(weight_decay=0.01)"` is a call of optax."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.config import nearest, parse_call

# Means over steps: from 1 on they grow without bound, or the correction of their start divides by zero.
DECAYS = ("b1", "b2", "b3", "beta", "decay", "momentum", "rho")
OWN_CHANCE = ("key", "seed")  # parameters of what draws by a generator of its own
TINY = (3,), (2, 3), (3, 3, 2, 3)  # shapes of biases, kernels, filters
SLACK = 1e-6  # of the largest factor: what a cosine is off by where it ends in zero


@functools.cache
def optimizer(text: str, option: str) -> Callable[[Any], optax.GradientTransformation]:
    """Learning rate -> the optax optimizer that `"adamw(weight_decay=0.01)"` names, tried on a tiny parameter's shapes.

    Raises:
        ValueError: optax has no such optimizer, it refuses the options, or it draws by a generator of its own.
    """
    name, args, options = parse_call(text, option)
    known = {n: make for n in dir(optax) if not n.startswith("_") and _takes_rate(make := getattr(optax, n))}
    if name not in known:
        raise ValueError(
            f"Expected {option}={name!r} to be an optax optimizer with a learning_rate{nearest(name, known)}."
        )
    make, parameters = known[name], inspect.signature(known[name]).parameters
    if any(chance in parameters for chance in OWN_CHANCE):
        raise ValueError(
            f"Expected {option}={name!r} to draw nothing by itself: its generator starts anew at every client in every round, "
            "so all would get the same noise, whatever the seed; take sgd, and add noise in an algorithm of your own, by "
            "the keys that its clients have (docs/own_algorithm.md)."
        )
    if args:
        raise ValueError(
            f"Expected {option}={text!r} to give options by name; the learning rate is an option of its own."
        )
    _check_numbers(options, parameters, f"{option}={text!r}")

    def made(rate: Any) -> optax.GradientTransformation:
        return make(learning_rate=rate, **options)

    _try(made, {str(len(shape)): jax.ShapeDtypeStruct(shape, jnp.float32) for shape in TINY}, f"{option}={text!r}")
    return made


def check_optimizer(text: str, option: str, trained: Mapping[str, Any]) -> None:
    """Tries the optimizer on the shapes of what is trained: some read no scalars, or no leaf that a mask does not name.

    Raises:
        ValueError: as `optimizer`.
    """
    _try(optimizer(text, option), trained, f"{option}={text!r}")


def _try(made: Callable[[Any], optax.GradientTransformation], shapes: Mapping[str, Any], where: str) -> None:
    """Refuses an optimizer that makes no step on leaves of these shapes; computes nothing."""

    def states() -> tuple[Any, Any]:
        w = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in shapes.items()}
        with jax.numpy_dtype_promotion("standard"):  # as in training
            transform = made(0.1)
            before = transform.init(w)
            updates, after = transform.update(w, before, w)
            optax.apply_updates(w, updates)
        return before, after

    try:
        before, after = jax.eval_shape(states)
        types = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] for state in (before, after)]
        if jax.tree.structure(before) != jax.tree.structure(after) or types[0] != types[1]:
            raise ValueError("its state changes its type from step to step, which no compiled loop can keep")
    except Exception as error:  # what optax raises at bad options has no common type
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"Expected {where} to be a call with which optax makes a step from a gradient; {reason}."
        ) from None


def _check_numbers(options: dict[str, Any], parameters: Any, where: str) -> None:
    """Refuses numbers that no optimizer means: negative ones, and means over steps that forget nothing."""
    for name, value in options.items():
        if not isinstance(value, (int, float)) or name not in parameters or (value is True and name not in DECAYS):
            continue
        default = parameters[name].default
        mean = name in DECAYS and not (isinstance(default, (int, float)) and default >= 1)
        if value < 0 or (mean and value >= 1):
            rule = f"0 <= {name}={value} < 1" if mean else f"{name}={value} >= 0"
            raise ValueError(f"Expected {rule} in {where}; leave it out for optax' own, or correct it.")


def _takes_rate(function: Any) -> bool:
    try:
        return not inspect.isclass(function) and "learning_rate" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _makes_schedule(function: Any) -> bool:
    """Whether a function of optax gives a schedule, as its annotation says."""
    wanted = inspect.signature(optax.constant_schedule).return_annotation
    try:
        return inspect.isfunction(function) and inspect.signature(function).return_annotation == wanted
    except (TypeError, ValueError):
        return False


@functools.cache
def schedule(text: str, option: str, base: float) -> Callable[[Any], Any]:
    """Round (from 0) -> base times the optax schedule that `"cosine_decay_schedule(1.0, 20)"` names.

    Raises:
        ValueError: optax has no such schedule, or it refuses the arguments.
    """
    name, args, options = parse_call(text, option)
    known = [n for n in dir(optax) if not n.startswith("_") and _makes_schedule(getattr(optax, n))]
    if name not in known:
        raise ValueError(f"Expected {option}={name!r} to be an optax schedule{nearest(name, known)}.")
    try:
        factor = getattr(optax, name)(*args, **options)
        float(factor(0))
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"Expected {option}={text!r} to be a call that optax takes; {reason}.") from None

    def value(count: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(base * factor(count), jnp.float32)

    return value


@functools.cache
def check_schedule(text: str, option: str, base: float, rounds: int) -> None:
    """Refuses a schedule whose rate is negative, infinite or NaN in a round of the run; zero is allowed.

    Raises:
        ValueError: as `schedule`, or names the first such round and its rate.
    """
    rate = schedule(text, option, base)
    with jax.numpy_dtype_promotion("standard"):
        try:
            rates = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(rounds)))
        except Exception as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(f"Expected {option}={text!r} to be a call that optax takes; {reason}.") from None
    wrong = np.flatnonzero(~np.isfinite(rates) | (rates < -SLACK * np.abs(rates).max(initial=0)))
    if len(wrong):
        raise ValueError(
            f"Expected {option}={text!r} to give every round a finite rate >= 0; in round {wrong[0] + 1} of {rounds} it is "
            f"{rates[wrong[0]]:g}: change its values, or the rounds."
        )
