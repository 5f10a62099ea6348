"""Every round's programs lower for a TPU where there is none, and hold no call back to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from fedsim import peft, testing
from fedsim.algorithms import ALGORITHMS
from fedsim.cohort import Cohort
from fedsim.core import Passes, mean
from fedsim.device_memory import Need
from fedsim.evaluate import classification_loss
from fedsim.lanes import Lanes
from fedsim.local import fit
from fedsim.memory import Memory
from fedsim.programs import key_for

KINDS = ("head", "bias", "norm", "lora", "adapter", "prompt", "prefix", "ia3", "full")
QUICK = ("fed_prox", "fed_sa_lora", "ia3")  # in every run of the tests; the others lower in the slow ones


def some(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, those that are not `QUICK` marked slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def lower(program: Any, *args: Any) -> Any:
    """Lowers a jitted program for TPU; gives zeros in the shapes of its results, so that nothing is compiled.

    Raises:
        AssertionError: the program calls back to the host.
    """
    text = export.export(program, platforms=["tpu"])(*args).mlir_module()
    assert "callback" not in text
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(program, *args))


def lowering(engine: Lanes, done: list[str]) -> None:
    """Makes an engine lower its programs instead of compiling and running them."""
    made = engine.programs

    def programs(*args: Any) -> Any:
        real = made(*args)

        def call(name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                done.append(name)
                return lower(getattr(real, name), *arguments)

            return run

        return real._replace(begin=call("begin"), segment=call("segment"), end=call("end"))

    vars(engine).update(programs=programs, _compiled=lambda programs, *_: (programs, Need(0, 0)))


@pytest.mark.parametrize("name", some(sorted(ALGORITHMS)))
def test_an_algorithms_programs_lower_for_tpu(name: str) -> None:
    make, done = ALGORITHMS[name], []
    engine = testing.engine(testing.tiny_problem())
    algorithm = make(testing.suited(make))
    server = engine.put(algorithm.init(key_for(engine.root, "init"), engine.held))
    memory = Memory(algorithm.memory, engine.held)
    lowering(engine, done)
    cohort = Cohort(engine, np.array(testing.COHORT), 1, memory, lr=0.1)
    algorithm.round(key_for(engine.root, "server", 1), engine.held, server, cohort)
    assert {"begin", "segment", "end"} <= set(done)


@pytest.mark.parametrize("kind", some(KINDS))
def test_a_peft_kinds_programs_lower_for_tpu(kind: str) -> None:
    rng, done = np.random.default_rng(0), []
    model = peft.build("vit_tiny", 3, peft=kind)
    params, frozen = peft.start(model, "random", 0)
    x = rng.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    rows, offsets = np.arange(12, dtype=np.int32), np.array([0, 4, 12])
    engine = Lanes(frozen, x, np.arange(12) % 3, rows, offsets, lanes=2, devices=1, segment_steps=2)
    passes = Passes(epochs=1, batch_size=4)
    local = fit(classification_loss(model.apply), optax.sgd, lambda client: client.lr, passes)
    lowering(engine, done)
    cohort = Cohort(engine, np.arange(2), 1, Memory(lambda key, held: (), engine.held), lr=0.1)
    cohort.exchange(engine.put(params), local, mean())
    assert {"begin", "segment", "end"} <= set(done)


def test_a_call_back_to_the_host_would_be_noticed() -> None:
    def talks(a: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), a)

    with pytest.raises((AssertionError, NotImplementedError, ValueError), match=r"platform|callback"):
        lower(jax.jit(talks), jnp.float32(1.0))
