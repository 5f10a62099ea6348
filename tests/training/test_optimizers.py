"""Optimizers and schedules by name: what cannot step, draws by itself or gives no rate is refused before a run."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from fedsim.algorithms import find
from fedsim.testing.tasks import tiny_task
from fedsim.training.optimizers import check_optimizer, check_schedule, optimizer, schedule


def takes_rate(name: str) -> bool:
    make = getattr(optax, name)
    try:
        return not inspect.isclass(make) and "learning_rate" in inspect.signature(make).parameters
    except (TypeError, ValueError):
        return False


NAMES = [name for name in sorted(dir(optax)) if not name.startswith("_") and takes_rate(name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_optax_steps_or_is_refused(name: str) -> None:
    try:
        optimizer(name, "optimizer")
    except ValueError as error:
        assert name in ("lbfgs", "noisy_sgd") and str(error).startswith(f"Expected optimizer='{name}'")


def test_what_draws_by_a_generator_of_its_own_is_refused() -> None:
    for name in NAMES:
        if {"key", "seed"} & set(inspect.signature(getattr(optax, name)).parameters):
            with pytest.raises(ValueError, match="would get the same noise, whatever the seed; take sgd"):
                optimizer(name, "optimizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam(b1=2)", "0 <= b1=2 < 1"),
        ("adam(b2=1.0)", "0 <= b2=1.0 < 1"),
        ("sgd(momentum=-1)", "0 <= momentum=-1 < 1"),
        ("sgd(momentum=True)", "0 <= momentum=True < 1"),
        ("adamw(weight_decay=-0.1)", "weight_decay=-0.1 >= 0"),
        ("adam(eps=1e400)", "infinite or beyond float32"),
        ("adam(mu_dtype='float31')", "makes a step from a gradient; data type 'float31' not understood"),
        ("adamw(mask={'w': True})", "makes a step from a gradient"),
        ("x({[]: 1})", "to be a name or a call"),
        ("_deprecated_dpsgd", "to be an optax optimizer"),
        ("ScaleByZoomLinesearchState", "to be an optax optimizer"),
    ],
)
def test_numbers_that_no_optimizer_means_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="Expected ") as caught:
        optimizer(text, "optimizer")
    assert message in str(caught.value)


def test_the_shapes_that_are_trained_are_tried() -> None:
    """sm3 reads no scalars."""
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    check_optimizer("sm3", "server_optimizer", shapes)
    with pytest.raises(ValueError, match="Expected server_optimizer='sm3' to be a call with which optax makes a step"):
        check_optimizer("sm3", "server_optimizer", {**shapes, "scale": jax.ShapeDtypeStruct((), jnp.float32)})


@pytest.mark.parametrize(
    "text",
    [
        "exponential_decay(1.0, 10, 0.9)",
        "linear_schedule(1.0, 0.0, 5)",
        "cosine_decay_schedule(1.0, 20)",
        "linear_schedule(1.0, 0.1, 40, 400)",
        "piecewise_constant_schedule(1.0, {5: 0.1})",
        "warmup_cosine_decay_schedule(0.0, 1.0, 5, 20)",
    ],
)
def test_schedules_of_optax_are_taken(text: str) -> None:
    check_schedule(text, "lr_schedule", 0.1, 50)
    assert float(schedule(text, "lr_schedule", 0.1)(0)) >= 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constant_schedule(-1.0)", "in round 1 of 20 it is -0.1"),
        ("linear_schedule(1.0, -1.0, 5)", "in round 4 of 20 it is -0.02"),
        ("exponential_decay(1.0, 10, -0.9)", "in round 2 of 20 it is nan"),
        ("constant_schedule(3e38)", "it is inf"),
        ("constant_schedule(1e999)", "infinite or beyond float32"),
        ("sgdr_schedule([])", "to be a call that optax takes; list index out of range"),
        ("join_schedules([], [])", "to be a call that optax takes"),
        ("scale_by_schedule(1)", "to be an optax schedule"),
        ("constant_schedule(None)", "to be a call that optax takes"),
    ],
)
def test_schedules_without_a_rate_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="Expected lr_schedule=") as caught:
        check_schedule(text, "lr_schedule", 100.0 if "3e38" in text else 0.1, 20)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "fed_prox(mu=1e400)",
        "fed_prox(mu=-1)",
        "fed_prox(mu=True)",
        "fed_prox(mu='x')",
        "fed_prox(mu=None)",
        "fed_prox(mu=[])",
        "het_lora(gamma='x')",
        "het_lora(gamma=None)",
        "het_lora(penalty=True)",
        "het_lora(ranks='48')",
        "het_lora(ranks=4)",
        "flora(ranks={})",
        "flora(ranks=(1.5,))",
        "flex_lora(ranks=(True,))",
        "flex_lora(ranks=None)",
    ],
)
def test_numbers_of_algorithms_pass_the_gate(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expected (mu|gamma|penalty|ranks|algorithm)="):
        find(text)(tiny_task())
