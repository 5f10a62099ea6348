"""bfloat16 and rematerialisation: the same model, its logits and gradients within what the numbers' width allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedsim
from brief import brief
from fedsim import peft
from fedsim.config import Config, Speed
from fedsim.engine.flops import equations
from fedsim.peft import precision
from fedsim.simulation import build, tasks, trainers

CASES = [("vit_tiny", (16, 16, 3), kind) for kind in ("bias", "lora", "adapter", "prompt", "prefix", "ia3", "full")] + [
    ("bert_tiny", (8,), "lora+bias"),
    ("cnn", (8, 8), "full"),
    ("resnet18_gn", (32, 32, 3), "norm"),
    ("resnet18", (32, 32, 3), "bias"),
    ("shufflenet_v2_x0_5", (32, 32, 3), "head"),
    ("mlp", (5,), "full"),
]


def parts(name: str, shape: tuple[int, ...], kind: str) -> tuple[peft.Model, Any, Any, Any, Callable[..., Any]]:
    """A model with its leaves, four inputs, and a function model -> a loss of the trained leaves."""
    model = peft.build(name, 3, input_shape=shape, peft=kind, prompt_tokens=2, prefix_tokens=2, adapter_width=4)
    trained, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    # Fresh factors are zero at the start, and so would be half of the gradients.
    trained = {p: v + 0.05 * rng.standard_normal(v.shape).astype(np.float32) for p, v in trained.items()}
    x = rng.standard_normal((4, *shape), np.float32) if name == "mlp" else rng.integers(1, 99, (4, *shape))
    x = x if name == "mlp" else x.astype(np.int32 if name.startswith("bert") else np.uint8)

    def loss(model: peft.Model) -> Callable[..., Any]:
        return lambda t, f: -jax.nn.log_softmax(model.apply(t, f, jnp.asarray(x)))[:, 0].mean()

    return model, trained, frozen, x, loss


@pytest.mark.parametrize(("name", "shape", "kind"), brief(CASES, 8))
def test_bfloat16_leaves_float32(name: str, shape: tuple[int, ...], kind: str) -> None:
    """Under strict promotion: float32 logits, loss and gradients; a frozen part of half the size."""
    model, trained, frozen, _, loss = parts(name, shape, kind)
    half = precision.held(frozen, "bfloat16")
    assert sum(v.nbytes for v in half.values()) * 2 == sum(v.nbytes for v in frozen.values())
    low = precision.computed(model, "bfloat16")
    found = jax.eval_shape(jax.value_and_grad(loss(low)), trained, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(loss(low))(trained, half).jaxpr
    assert {v.aval.dtype for eqn, _ in equations(jaxpr) for v in eqn.invars} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("name", "shape", "kind"), [CASES[1], CASES[-1]])
def test_bfloat16_is_close(name: str, shape: tuple[int, ...], kind: str) -> None:
    model, trained, frozen, _, loss = parts(name, shape, kind)
    half = precision.held(frozen, "bfloat16")

    @jax.jit
    def both(trained: Any, frozen: Any, half: Any) -> Any:
        low = precision.computed(model, "bfloat16")
        return [jax.value_and_grad(loss(m))(trained, f) for m, f in ((model, frozen), (low, half))]

    exact, got = both(trained, frozen, half)
    assert float(got[0]) == pytest.approx(float(exact[0]), rel=0.05)
    a, b = (jnp.concatenate([g.ravel() for g in tree[1].values()]) for tree in (exact, got))
    assert float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.98


@pytest.mark.parametrize("remat", ["blocks", "dots"])
@pytest.mark.parametrize(("name", "shape", "kind"), [CASES[1]])
def test_remat_computes_again_and_changes_nothing(name: str, shape: tuple[int, ...], kind: str, remat: str) -> None:
    model, trained, frozen, _, loss = parts(name, shape, kind)
    again = precision.computed(model, "float32", remat)
    want, got = jax.jit(lambda t, f: [jax.value_and_grad(loss(m))(t, f) for m in (model, again)])(trained, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)

    def products(model: peft.Model) -> int:
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss(model)))(trained, frozen).jaxpr
        return sum(times for _, times in equations(jaxpr))

    once, all_again = products(model), products(precision.computed(model, "float32", "blocks"))
    assert once < products(again) <= all_again


def test_a_cached_prefix_is_that_of_the_precision(tmp_path: Path, blobs: Callable[..., Path]) -> None:
    """Features are kept in bfloat16, and never mixed with those of float32."""
    config = Config(dataset=str(blobs(tmp_path)), backbone="mlp", peft="head", clients=4, clients_per_round=2)
    problem = build.problem(config, Speed(cache="on"))
    kept = {}
    for kind in ("float32", "bfloat16"):
        shared = problem._replace(speed=Speed(cache="on", precision=kind, compilation_cache=False))
        kept[kind] = trainers.trainer(shared, build.phases(config)[0]).engine
    assert [engine.shapes[0].dtype for engine in kept.values()] == [jnp.float32, jnp.bfloat16]
    assert set(problem.cache) == {("float32", 2), ("bfloat16", 2)}


@pytest.mark.slow
def test_what_an_algorithm_writes_stays_float32() -> None:
    """FedEx starts from the frozen kernels and sends them: they keep their width, and so their price."""
    config = Config(backbone="vit_tiny", peft="lora", algorithm="fed_ex_lora", clients=4, clients_per_round=2)
    model = precision.computed(peft.build("vit_tiny", 3, peft="lora"), "bfloat16")
    trained, frozen = peft.start(model, "random", 0)
    algorithm = build.check(config)(tasks.task(config, model, trained, cached=False))
    written = trainers.written(algorithm, frozen)
    assert written == {f.kernel for f in peft.factors(model)}
    held = precision.held(frozen, "bfloat16", written)
    server = algorithm.init(jax.random.key(0), held)
    assert all(v.dtype == jnp.float32 for v in algorithm.params(server).values())
    assert algorithm.predict(held, server, (), jnp.zeros((2, 16, 16, 3), jnp.uint8)).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fed_avg", "flora", "fed_ex_lora"])
def test_a_run_in_bfloat16_sends_the_same_bytes(tmp_path: Path, images: Path, algorithm: str) -> None:
    config = Config(
        dataset=str(images), backbone="vit_tiny", peft="lora", algorithm=algorithm, weights="random", clients=4,
        clients_per_round=2, rounds=2, epochs=1, batch_size=4, min_size=1, targets=("query",),
    )  # fmt: skip
    speed = Speed(devices=1, lanes=2, compilation_cache=False)
    runs = [
        fedsim.run(config, speed, out=tmp_path / kind, quiet=True)
        for kind, speed in (("a", speed), ("b", Speed(**{**vars(speed), "precision": "bfloat16", "remat": "blocks"})))
    ]
    for plain, low in zip(*(run.rounds for run in runs), strict=True):
        assert plain["bytes_up_leaves"] == low["bytes_up_leaves"]
        assert plain["bytes_down_leaves"] == low["bytes_down_leaves"]
        assert plain["setup_bytes"] == low["setup_bytes"]
        assert low["loss"] == pytest.approx(plain["loss"], rel=0.1)
        assert low["loss"] != plain["loss"]
    assert runs[1].speed.precision == "bfloat16" and runs[1].speed.remat == "blocks"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 3 classes, as an .npz file."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("images") / "images.npz"
    y = np.arange(24) % 3
    np.savez(file, x=(rng.integers(0, 60, (24, 16, 16, 3)) + 60 * y[:, None, None, None]).astype(np.uint8), y=y)
    return file
