"""The split of a backbone: one rule a leaf, the same start, gradients where they should be, one shared matmul."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from brief import brief
from fedsim import peft
from fedsim.backbones import BACKBONES
from fedsim.backbones.layers import Linear
from fedsim.config import Config

COMBINATIONS = ["full", "head", "bias", "lora", "lora+bias", "head+bias"]  # the other kinds: test_peft_kinds.py
EVERY = list(itertools.product(["bert_tiny", "vit_tiny", "cnn", "mlp"], COMBINATIONS))
SHAPES = {"text": (6,), "image": (16, 16), "array": (4, 4)}
TARGETS = {"cnn": ("layers/2",), "mlp": ("layers/*",)}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No implicit promotion anywhere in backbones and PEFT."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def make(name: str, kind: str, classes: int = 3, **options: Any) -> peft.Model:
    options = {"rank": 4, "targets": TARGETS.get(name, ("query", "value")), **options}
    return peft.build(name, classes, peft=kind, input_shape=SHAPES[BACKBONES[name].kind], **options)


def batch(name: str, size: int = 5) -> jax.Array:
    """Inputs of the shape that `make` announces; texts of different lengths."""
    if BACKBONES[name].kind == "text":
        ids = jax.random.randint(jax.random.key(1), (size, 6), 1, 500)
        return jnp.where(jnp.arange(6) < jnp.arange(size)[:, None] + 2, ids, 0)
    return jax.random.normal(jax.random.key(1), (size, *SHAPES[BACKBONES[name].kind]))


def loss(model: peft.Model, trained: peft.Leaves, frozen: peft.Leaves, x: jax.Array) -> jax.Array:
    """Cross-entropy against class 0, 1, 2, 0, ..."""
    logits = jax.nn.log_softmax(model.apply(trained, frozen, x))
    labels = jax.nn.one_hot(jnp.arange(x.shape[0]) % model.classes, model.classes)
    return -jnp.mean(jnp.sum(logits * labels, axis=-1))


def expected_rule(path: str, kind: str) -> str:
    """The rules said a second time, leaf by leaf."""
    parts = kind.split("+")
    if path.split("/")[0] == "head":
        return "head"
    if path.endswith(("lora_a", "lora_b")):
        return "lora"
    if "full" in parts:
        return "full"
    return "bias" if "bias" in parts and path.endswith("bias") else "frozen"


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_exactly_one_rule_takes_each_leaf(name: str, kind: str) -> None:
    model = make(name, kind)
    module = nnx.eval_shape(lambda: BACKBONES[name].make(3, SHAPES[BACKBONES[name].kind], nnx.Rngs(0)))
    leaves = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    added = set(model.rules) - leaves
    assert leaves <= set(model.rules)
    assert all(path.endswith(("lora_a", "lora_b")) for path in added)
    assert bool(added) == ("lora" in kind)
    assert model.rules == {path: expected_rule(path, kind) for path in model.rules}
    assert set(model.trained) | set(model.frozen) == set(model.rules)
    assert not set(model.trained) & set(model.frozen)
    assert set(model.trained) == {path for path, taken in model.rules.items() if taken != "frozen"}
    assert {"head/kernel", "head/bias"} | added == model.fresh


def test_paths_of_other_leaves_do_not_change_when_lora_is_attached() -> None:
    assert set(make("bert_tiny", "lora").rules) > set(make("bert_tiny", "full").rules)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("head", 20 * 385),
        # Per block 4 attention biases, 2 LayerNorm betas and the MLP's second of 384, its first of 1536; one beta more.
        ("bias", 20 * 385 + 6 * (7 * 384 + 1536) + 384),
        ("lora", 20 * 385 + 6 * 2 * 8 * (384 + 384)),
        ("lora+bias", 20 * 385 + 6 * (7 * 384 + 1536) + 384 + 6 * 2 * 8 * (384 + 384)),
        ("full", 20 * 385 + 22_713_216 - 384 * 385),
    ],
)
def test_counts_of_minilm(kind: str, parameters: int) -> None:
    model = peft.build("minilm_l6", 20, peft=kind)
    assert sum(math.prod(leaf.shape) for leaf in model.trained.values()) == parameters
    if "lora" in kind:
        assert model.trained["blocks/5/attention/value/lora_a"].shape == (384, 8)
        assert model.trained["blocks/5/attention/value/lora_b"].shape == (8, 384)
        assert "blocks/5/attention/key/lora_a" not in model.trained


@pytest.mark.parametrize("name", ["bert_tiny", "mlp"])
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_starts_equal_to_the_backbone(name: str, kind: str) -> None:
    """Every kind begins with the very output of the backbone under the same head."""
    x = batch(name)
    plain, model = make(name, "head"), make(name, kind)
    expected = plain.apply(*peft.start(plain, "random", 7), x)
    np.testing.assert_array_equal(model.apply(*peft.start(model, "random", 7), x), expected)


def test_lora_equals_the_merged_kernel() -> None:
    """x W + s (x A) B = x (W + s A B), s = lora_alpha / rank."""
    model, plain = make("bert_tiny", "lora", lora_alpha=6.0), make("bert_tiny", "head")
    trained, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    trained = {p: rng.normal(size=v.shape).astype(np.float32) * np.float32(0.3) for p, v in trained.items()}
    merged = dict(frozen)
    for path in trained:
        if path.endswith("lora_a"):
            layer = path.removesuffix("/lora_a")
            merged[f"{layer}/kernel"] = frozen[f"{layer}/kernel"] + 6.0 / 4 * trained[path] @ trained[f"{layer}/lora_b"]
    head = {path: trained[path] for path in ("head/kernel", "head/bias")}
    x = batch("bert_tiny")
    got, expected = model.apply(trained, frozen, x), plain.apply(head, merged, x)
    assert not np.allclose(got, plain.apply(head, frozen, x), atol=1e-2)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["bert_tiny", "mlp"])
@pytest.mark.parametrize("kind", brief(COMBINATIONS, 3))
def test_gradients_are_where_they_should_be(name: str, kind: str) -> None:
    model = make(name, kind)
    trained, frozen = peft.start(model, "random", 0)
    gradients = jax.grad(lambda t: loss(model, t, frozen, batch(name)))(trained)
    assert set(gradients) == set(model.trained)
    for path, leaf in gradients.items():
        size = float(jnp.max(jnp.abs(leaf)))
        if path.endswith("lora_a"):
            assert size == 0, f"{path}: B is zero at the start"
        elif path.endswith("attention/key/bias"):
            assert size < 1e-6, f"{path}: softmax does not see what is added to all keys alike"
        else:
            assert size > 1e-6, path


def test_lora_a_has_gradients_after_one_step() -> None:
    model = make("bert_tiny", "lora")
    trained, frozen = peft.start(model, "random", 0)
    gradient = jax.jit(jax.grad(lambda t: loss(model, t, frozen, batch("bert_tiny"))))
    stepped = {path: leaf - 0.1 * gradient(trained)[path] for path, leaf in trained.items()}
    assert all(bool(jnp.any(leaf != 0)) for leaf in gradient(stepped).values())


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_frozen_is_bit_identical_after_a_step(kind: str) -> None:
    model = make("bert_tiny", kind)
    trained, frozen = jax.tree.map(jnp.asarray, peft.start(model, "random", 0))
    before = {path: np.array(leaf) for path, leaf in frozen.items()}
    gradients = jax.jit(jax.grad(lambda t, f: loss(model, t, f, batch("bert_tiny"))))(trained, frozen)
    stepped = {path: leaf - 0.1 * gradients[path] for path, leaf in trained.items()}
    model.apply(stepped, frozen, batch("bert_tiny"))
    assert not set(gradients) & set(frozen)
    assert all(np.array_equal(before[path], leaf) for path, leaf in frozen.items())


@pytest.mark.parametrize(
    ("name", "kind", "cut"),
    [
        ("bert_tiny", "head", 4),  # embeddings, two blocks and the pooling run once per example
        ("bert_tiny", "lora", 1),
        ("bert_tiny", "bias", 0),
        ("bert_tiny", "full", 0),
        ("mlp", "head", 2),
        ("mlp", "lora", 0),
    ],
)
def test_suffix_after_prefix_equals_apply(name: str, kind: str, cut: int) -> None:
    model = make(name, kind)
    trained, frozen = peft.start(model, "random", 0)
    x = batch(name)
    assert model.cut == cut
    h = model.prefix(frozen, x)
    assert all(leaf.shape[0] == x.shape[0] for leaf in jax.tree.leaves(h))
    np.testing.assert_array_equal(model.suffix(trained, frozen, h), model.apply(trained, frozen, x))
    if cut == 0:
        assert h is x
    if kind == "head":
        assert h.shape == (5, model.trained["head/kernel"].shape[0])


def test_targets_choose_the_first_trained_stage() -> None:
    model = make("bert_tiny", "lora", targets=("blocks/1/*/query", "1/mlp/*"))
    layers = {path.rpartition("/")[0] for path, taken in model.rules.items() if taken == "lora"}
    assert layers == {"blocks/1/attention/query", "blocks/1/mlp/up", "blocks/1/mlp/down"}
    assert model.cut == 2
    every = make("bert_tiny", "lora", targets=("*",))
    assert not any(path.startswith("head/lora") for path in every.rules)


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_vmap_over_clients_equals_a_loop(kind: str) -> None:
    model = make("bert_tiny", kind)
    _, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    clients = {p: rng.normal(size=(3, *v.shape)).astype(np.float32) * np.float32(0.1) for p, v in model.trained.items()}
    x = jax.random.randint(jax.random.key(0), (3, 4, 6), 1, 500)
    gradient = jax.jit(jax.grad(lambda t, f, x: loss(model, t, f, x)))
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0)))(clients, frozen, x)
    for i in range(3):
        alone = gradient({path: leaf[i] for path, leaf in clients.items()}, frozen, x[i])
        for path, leaf in alone.items():
            np.testing.assert_allclose(together[path][i], leaf, atol=1e-5, err_msg=path)


def shapes_within(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything that a jaxpr computes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_within(inner)


@pytest.mark.parametrize("kind", ["lora", "bias", "lora+bias"])
def test_no_frozen_matrix_is_made_per_client(kind: str) -> None:
    """Nothing of the size clients x a frozen kernel exists in the vmapped gradient: one matmul serves all clients."""
    model = make("bert_tiny", kind)
    clients = {path: jnp.zeros((7, *leaf.shape)) for path, leaf in model.trained.items()}
    frozen = {path: jnp.zeros(leaf.shape) for path, leaf in model.frozen.items()}
    gradient = jax.vmap(jax.grad(lambda t, f, x: loss(model, t, f, x)), in_axes=(0, None, 0))
    seen = set(shapes_within(jax.make_jaxpr(gradient)(clients, frozen, jnp.ones((7, 2, 6), jnp.int32)).jaxpr))
    kernels = {leaf.shape for path, leaf in model.frozen.items() if path.endswith("kernel")}
    assert kernels == {(32, 32), (32, 64), (64, 32)}
    assert (7, 2, 6, 64) in seen  # the walk does look inside
    assert not {(7, *shape) for kernel in kernels for shape in (kernel, kernel[::-1])} & seen


def test_init_makes_the_fresh_leaves_alone() -> None:
    lora, bias = make("bert_tiny", "lora"), make("bert_tiny", "bias")
    first = jax.jit(lora.init)(jax.random.key(3))
    assert set(first) == lora.fresh
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in first.items()} == {
        path: (lora.trained[path].shape, jnp.float32) for path in lora.fresh
    }
    head = bias.init(jax.random.key(3))
    assert set(head) == {"head/kernel", "head/bias"}
    np.testing.assert_array_equal(first["head/kernel"], head["head/kernel"])  # the same start under every kind
    a, b = (first[f"blocks/{i}/attention/query/lora_a"] for i in range(2))
    assert not np.array_equal(a, b)
    assert float(jnp.max(jnp.abs(a))) <= 1 / math.sqrt(32)
    assert not np.array_equal(first["head/kernel"], lora.init(jax.random.key(4))["head/kernel"])


def test_start_gives_every_leaf_its_value() -> None:
    model = make("bert_tiny", "lora+bias")
    trained, frozen = peft.start(model, "random", 0)
    for got, shapes in ((trained, model.trained), (frozen, model.frozen)):
        assert {p: (v.shape, v.dtype) for p, v in got.items()} == {p: (v.shape, v.dtype) for p, v in shapes.items()}


def test_build_allocates_nothing() -> None:
    before = {id(array) for array in jax.live_arrays()}
    model = peft.build("bert_base", 100, peft="lora")
    assert not {id(array) for array in jax.live_arrays()} - before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in {**model.trained, **model.frozen}.values())


def test_config_is_passed_on() -> None:
    config = Config(backbone="bert_tiny", peft="lora", rank=2, lora_alpha=3.0, targets=("up",))
    model = peft.from_config(config, 5, (16,))
    assert model.name == "bert_tiny"
    assert model.trained["blocks/0/mlp/up/lora_a"].shape == (32, 2)
    assert model.trained["head/kernel"].shape == (32, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone_name": "minilm"}, "did you mean minilm_l6"),
        ({"peft": "lara"}, "did you mean lora"),
        ({"peft": "lora+bais"}, "did you mean bias"),
        ({"peft": "bias+bias"}, "name each part once"),
        ({"peft": "full+bias"}, "full and bias both take"),
        ({"targets": ("querry",)}, "did you mean query"),
        ({"targets": ("query", "nothing")}, "targets='nothing' to match a linear layer"),
        ({"targets": ("head",)}, "targets='head' to match a linear layer"),
        ({"targets": ()}, "to name a linear layer"),
        ({"rank": 33}, "rank=33 <= 32, the rank of blocks/0/attention/query"),
        ({"rank": 0}, "rank=0 > 0"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0 > 0"),
        ({"classes": 0}, "classes=0 > 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    given = {"backbone_name": "bert_tiny", "classes": 3, "peft": "lora", **options}
    with pytest.raises(ValueError, match=words):
        peft.build(given.pop("backbone_name"), given.pop("classes"), **given)


def test_rank_and_targets_are_ignored_without_lora() -> None:
    model = peft.build("bert_tiny", 3, peft="bias", rank=1000, targets=("nothing",))
    assert model.trained.keys() == make("bert_tiny", "bias").trained.keys()


def test_linear_alone_is_an_ordinary_module() -> None:
    layer = Linear(3, 2, bias=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(jnp.eye(3)), layer.kernel[...])
