"""Every round's programs lower for a TPU where there is none, hold no call back to the host and no float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from fedsim import peft
from fedsim.algorithms import ALGORITHMS
from fedsim.backbones import BACKBONES, Row
from fedsim.backbones.resnet import Resnet, ResnetConfig
from fedsim.core import Passes
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.device_memory import Need
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.evaluation.evaluate import classification_loss, evaluator
from fedsim.folds import mean, plain
from fedsim.peft import precision
from fedsim.testing import toys as testing
from fedsim.training import features
from fedsim.training.local import fit

QUICK = ("fed_prox", "fed_sa_lora", "ia3")  # in every run of the tests; the others lower in the slow ones
SHAPES = {"image": (16, 16, 3), "text": (8,)}  # of an example
PRODUCT = re.compile(r"stablehlo\.dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> ")

Texts = dict[str, str]  # program -> its lowered text


def some(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, those that are not `QUICK` marked slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def lower(program: Any, *args: Any, **static: Any) -> str:
    """The text of a jitted program, lowered for TPU; nothing is compiled.

    Raises:
        AssertionError: the program calls back to the host, or computes in float64.
    """
    text = export.export(program, platforms=["tpu"])(*args, **static).mlir_module()
    assert "callback" not in text
    assert "f64" not in text
    return text


def zeros(shapes: Any) -> Any:
    """Arrays in these shapes, from the host: `jnp.zeros` would compile a program for each."""
    return jax.tree.map(lambda s: jnp.asarray(np.zeros(s.shape, s.dtype)), shapes)


def lowering(engine: Lanes) -> Texts:
    """Makes an engine lower its programs instead of compiling and running them; what they are, once it has."""
    made, texts = engine.programs, {}

    def programs(*args: Any) -> Any:
        real = made(*args)

        def call(name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                program = getattr(real, name)
                texts[name] = lower(program, *arguments)
                return zeros(jax.eval_shape(program, *arguments))

            return run

        return real._replace(begin=call("begin"), segment=call("segment"), end=call("end"))

    vars(engine).update(programs=programs, _compiled=lambda programs, *_: (programs, Need(0, 0)))
    return texts


@pytest.mark.parametrize("name", some(sorted(ALGORITHMS)))
def test_an_algorithms_programs_lower_for_tpu(name: str) -> None:
    make = ALGORITHMS[name]
    task = testing.suited(make)
    bench, algorithm = testing.bench(testing.tiny_problem(), task), make(task)
    engine = bench.whole
    server = engine.put(zeros(jax.eval_shape(algorithm.init, key_for(engine.root, "init"), engine.held)))
    texts = [lowering(each) for each in bench.groups.values() or (engine,)]
    averaging = bench.averaging(plain(task.weight))
    cohort = bench.cohort(testing.COHORT, 1, bench.memory(algorithm), algorithm, averaging, lr=0.1)
    algorithm.round(key_for(engine.root, "server", 1), engine.held, server, cohort)
    assert all({"begin", "segment", "end"} <= set(each) for each in texts)


class Case(NamedTuple):
    """A model to train, every leaf zero: a program does not depend on values."""

    model: peft.Model
    params: peft.Leaves
    engine: Lanes  # twelve examples of two clients


def case(backbone: str, kind: str, precise: str = "float32", remat: str = "none") -> Case:
    shape = SHAPES[BACKBONES[backbone].kind]
    model = precision.computed(peft.build(backbone, 3, input_shape=shape, peft=kind), precise, remat)
    params, frozen = (
        {k: np.zeros(s.shape, s.dtype) for k, s in part.items()} for part in (model.trained, model.frozen)
    )
    x = np.zeros((12, *shape), np.uint8 if len(shape) == 3 else np.int32)
    rows, offsets = np.arange(12, dtype=np.int32), np.array([0, 4, 12])
    held = precision.held(frozen, precise)
    engine = Lanes(held, x, np.arange(12) % 3, rows, offsets, lanes=2, devices=1, segment_steps=2)
    return Case(model, engine.put(params), engine)


def exchange(case: Case) -> Texts:
    """The programs of plain training, lowered."""
    passes = Passes(epochs=1, batch_size=4)
    local = fit(classification_loss(case.model.apply), optax.sgd, lambda client, message: client.lr, passes)
    texts = lowering(case.engine)
    cohort = Cohort(case.engine, np.arange(2), 1, Memory(lambda key, held: (), case.engine.held), lr=0.1)
    cohort.exchange(case.params, local, mean())
    assert {"begin", "segment", "end"} <= set(texts)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(sorted(peft.KINDS)))
def test_a_peft_kinds_programs_lower_for_tpu(kind: str) -> None:
    exchange(case("vit_tiny", kind))


@pytest.mark.slow
def test_a_text_models_programs_lower_for_tpu() -> None:
    exchange(case("bert_tiny", "lora"))


@pytest.mark.slow
def test_a_convolutional_models_programs_lower_for_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients train whole kernels; XLA's own convolution is taken, not what stands in for it on a CPU."""
    small = Row("image", Resnet, ResnetConfig(depths=(1, 1), stem=8, width=8))
    monkeypatch.setitem(BACKBONES, "small", small)
    assert "stablehlo.convolution" in exchange(case("small", "full"))["segment"]


def test_bfloat16_and_rematerialised_blocks_lower_for_tpu() -> None:
    """Products with frozen kernels, forward and backward, take bfloat16 on both sides; some is computed again."""
    this = case("vit_tiny", "lora", "bfloat16", "dots")
    text = exchange(this)["segment"]
    kernels = {"x".join(map(str, s.shape)) for s in this.model.frozen.values() if len(s.shape) == 2}
    products = [[side.rpartition("x") for side in sides] for sides in PRODUCT.findall(text)]
    frozen = [{kind for _, _, kind in sides} for sides in products if any(shape in kernels for shape, _, _ in sides)]
    assert len(frozen) > 2 * 6  # four of attention and two of the MLP in each of two blocks, and their gradients
    assert frozen == [{"bf16"}] * len(frozen)
    assert "optimization_barrier" in text, "what keeps XLA from computing once what is to be computed again"


def test_evaluation_and_frozen_stages_lower_for_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that `evaluator` and `run_stages` make by themselves."""
    model, params, engine = case("vit_tiny", "head")
    jit, texts = jax.jit, []

    def lowering_jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        program = jit(fn, **options)

        def run(*args: Any, **static: Any) -> Any:
            if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(args)):  # its shapes are asked for
                return program(*args, **static)
            texts.append(lower(program, *args, **static))
            return zeros(jax.eval_shape(partial(program, **static), *args))

        return run

    monkeypatch.setattr(jax, "jit", lowering_jit)
    evaluator(engine, lambda held, server, memory, x: model.apply(server, held, x), np.arange(12))(params)
    features.run_stages(model, jax.device_get(engine.held), np.asarray(engine.x), 0, model.cut)
    assert len(texts) == 2 and all("dot_general" in text for text in texts)


def test_a_call_back_to_the_host_would_be_noticed() -> None:
    def talks(a: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), a)

    with pytest.raises((AssertionError, NotImplementedError, ValueError), match=r"platform|callback"):
        lower(jax.jit(talks), jnp.float32(1.0))
