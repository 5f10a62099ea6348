"""Every PEFT kind on every transformer: exact counts and shapes, the start, the gradients, the rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import peft

TRANSFORMERS = ("vit_tiny", "bert_tiny", "roberta_tiny")
# Name -> (peft, options, whether the start must equal the backbone's output)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "norm": ("norm", {}, True),
    "bias without patch": ("bias", {"bias_patch": False}, True),
    "adapter": ("adapter", {}, True),
    "houlsby": ("adapter", {"adapter": "houlsby"}, True),
    "parallel": ("adapter", {"adapter": "parallel"}, True),
    "prompt": ("prompt", {"prompt_tokens": 3}, False),
    "shallow prompt": ("prompt", {"prompt_tokens": 3, "prompt_depth": "shallow"}, False),
    "prefix": ("prefix", {"prefix_tokens": 3}, False),
    "lora": ("lora", {}, True),
    "rslora": ("lora", {"rslora": True}, True),
    "dora": ("lora", {"dora": True}, True),
    "lora everywhere": ("lora", {"targets": ("*",)}, True),
    "ffa_lora": ("ffa_lora", {}, True),
    "ia3": ("ia3", {}, True),
    "last_k": ("last_k", {}, True),
    "lora+bias+adapter": ("lora+bias+adapter", {}, True),
    "last_k+norm": ("last_k+norm", {}, True),
}
# What differs from another variant by a factor or a filter runs on one transformer only.
ONCE = ("bias without patch", "rslora", "lora everywhere", "last_k+norm")
EVERY = [(name, variant) for name in TRANSFORMERS for variant in VARIANTS if name == "vit_tiny" or variant not in ONCE]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No implicit promotion anywhere in backbones and PEFT."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def make(name: str, variant: str, classes: int = 3) -> peft.Model:
    kind, options, _ = VARIANTS[variant]
    return peft.build(name, classes, peft=kind, **{"rank": 4, **options})


def batch(name: str, size: int = 4) -> jax.Array:
    if name.startswith("vit"):
        return jax.random.normal(jax.random.key(1), (size, 16, 16, 3))
    ids = jax.random.randint(jax.random.key(1), (size, 6), 2, 500)
    return jnp.where(jnp.arange(6) < jnp.arange(size)[:, None] + 2, ids, 1 if name.startswith("roberta") else 0)


def count(model: peft.Model) -> int:
    return sum(math.prod(leaf.shape) for leaf in model.trained.values())


def gradient_and_logits(model: peft.Model, name: str) -> Any:
    """(trained, frozen) -> gradients of the cross-entropy against class 0, 1, 2, 0, ...; and the logits."""
    x = batch(name)
    labels = jax.nn.one_hot(jnp.arange(x.shape[0]) % model.classes, model.classes)

    def loss(trained: peft.Leaves, frozen: peft.Leaves) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(trained, frozen, x)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1)), logits

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    """Logits of each backbone under the same head, nothing attached."""
    answer = {}
    for name in TRANSFORMERS:
        model = peft.build(name, 3, peft="head")
        answer[name] = np.asarray(model.apply(*peft.start(model, "random", 7), batch(name)))
    return answer


@pytest.mark.parametrize(("name", "variant"), brief(EVERY, 13))
def test_start_and_gradients(name: str, variant: str, plain: dict[str, np.ndarray]) -> None:
    """The promised start; a gradient for every trained leaf at the start, or after a step where one factor is zero."""
    model = make(name, variant)
    trained, frozen = peft.start(model, "random", 7)
    run = gradient_and_logits(model, name)
    first, logits = run(trained, frozen)
    if VARIANTS[variant][2]:
        np.testing.assert_allclose(logits, plain[name], atol=2e-6, rtol=0)
    else:
        assert float(jnp.max(jnp.abs(logits - plain[name]))) > 1e-4
    # One factor of a product is zero at the start, so the other's gradient is too: it must be there after a step.
    waits = ("lora_a", "down_kernel", "down_bias")
    second, _ = run({path: leaf - 0.1 * first[path] for path, leaf in trained.items()}, frozen)
    for path in trained:
        size, later = (float(jnp.max(jnp.abs(g[path]))) for g in (first, second))
        if path.endswith("attention/key/bias"):
            assert size < 1e-6, f"{path}: softmax does not see what is added to all keys alike"
        elif path.endswith(waits):
            assert size == 0, path
            assert later > 0, path
        else:
            assert size > 1e-7, path


@pytest.mark.parametrize(
    ("variant", "roles", "leaves"),
    [
        ("norm", {"scale", "bias"}, 10),
        ("adapter", {"down_kernel", "down_bias", "up_kernel", "up_bias"}, 8),
        ("houlsby", {"down_kernel", "down_bias", "up_kernel", "up_bias"}, 16),
        ("parallel", {"down_kernel", "down_bias", "up_kernel", "up_bias"}, 8),
        ("prompt", {"prompt"}, 2),
        ("shallow prompt", {"prompt"}, 1),
        ("prefix", {"prefix_key", "prefix_value"}, 4),
        ("dora", {"lora_a", "lora_b", "magnitude"}, 12),
        ("ffa_lora", {"lora_b"}, 4),
        ("ia3", {"ia3"}, 6),
    ],
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_each_kind_trains(name: str, variant: str, roles: set[str], leaves: int) -> None:
    model = make(name, variant)
    own = [path for path in model.trained if not path.startswith("head/")]
    assert {path.rpartition("/")[2] for path in own} == roles
    assert len(own) == leaves
    assert {model.rules[path] for path in own} == {VARIANTS[variant][0]}
    assert set(model.rules) == set(model.trained) | set(model.frozen)


# Trained parameters of ViT-B/16 beside the head, 769 per class; the spec's table for 100, 45 and 2 classes.
COUNTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "full": ("full", {}, 85_798_656),
    "head": ("head", {}, 0),
    "bias": ("bias", {}, 102_912),
    "bias without patch": ("bias", {"bias_patch": False}, 102_144),
    "norm": ("norm", {}, 38_400),
    "adapter": ("adapter", {}, 156_768),
    "houlsby": ("adapter", {"adapter": "houlsby"}, 313_536),
    "parallel": ("adapter", {"adapter": "parallel", "adapter_width": 64}, 1_189_632),
    "prompt": ("prompt", {}, 92_160),
    "prompt 16": ("prompt", {"prompt_tokens": 16}, 147_456),
    "shallow": ("prompt", {"prompt_depth": "shallow"}, 7_680),
    "prefix": ("prefix", {}, 184_320),
    "lora": ("lora", {"rank": 4}, 147_456),
    "dora": ("lora", {"rank": 4, "dora": True}, 165_888),
    "ffa_lora": ("ffa_lora", {"rank": 8}, 147_456),
    "ia3": ("ia3", {}, 55_296),
    "last_k": ("last_k", {"last_blocks": 2}, 14_177_280),
}
SPEC = {
    "full": (85_875_556, 85_833_261, 85_800_194),
    "head": (76_900, 34_605, 1_538),
    "bias": (179_812, 137_517, 104_450),
    "bias without patch": (179_044, 136_749, 103_682),
    "adapter": (233_668, 191_373, 158_306),
    "prompt": (169_060, 126_765, 93_698),
    "lora": (224_356, 182_061, 148_994),
}


@pytest.mark.parametrize("row", COUNTS)
def test_counts_of_vit_b16(row: str) -> None:
    kind, options, expected = COUNTS[row]
    for classes, total in zip((100, 45, 2), SPEC.get(row, (None,) * 3), strict=True):
        counted = count(peft.build("vit_b16", classes, peft=kind, **options))
        assert counted == expected + 769 * classes
        assert total is None or counted == total


def test_shapes_of_vit_b16() -> None:
    """Counts collide (LoRA r=4, FFA-LoRA r=8 and prompt 16 train 147,456 numbers each); shapes do not."""

    def shapes(row: str) -> dict[str, tuple[int, ...]]:
        kind, options, _ = COUNTS[row]
        trained = peft.build("vit_b16", 100, peft=kind, **options).trained
        assert {path: trained[path].shape for path in ("head/kernel", "head/bias")} == {
            "head/kernel": (768, 100),
            "head/bias": (100,),
        }
        return {path: leaf.shape for path, leaf in trained.items() if not path.startswith("head/")}

    def every(**layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"blocks/{i}/{path.replace('__', '/')}": shape for i in range(12) for path, shape in layers.items()}

    assert shapes("lora") == every(
        attention__query__lora_a=(768, 4),
        attention__query__lora_b=(4, 768),
        attention__value__lora_a=(768, 4),
        attention__value__lora_b=(4, 768),
    )
    assert shapes("ffa_lora") == every(attention__query__lora_b=(8, 768), attention__value__lora_b=(8, 768))
    assert shapes("prompt 16") == every(prompt=(16, 768))
    assert shapes("adapter") == every(
        mlp__adapter__down_kernel=(768, 8),
        mlp__adapter__down_bias=(8,),
        mlp__adapter__up_kernel=(8, 768),
        mlp__adapter__up_bias=(768,),
    )
    assert shapes("ia3") == every(attention__key__ia3=(768,), attention__value__ia3=(768,), mlp__down__ia3=(3072,))
    assert shapes("prefix") == every(attention__prefix_key=(10, 768), attention__prefix_value=(10, 768))
    norms = every(norm1__scale=(768,), norm1__bias=(768,), norm2__scale=(768,), norm2__bias=(768,))
    assert shapes("norm") == norms | {"norm/scale": (768,), "norm/bias": (768,)}
    biases = every(
        **{f"attention__{part}__bias": (768,) for part in ("query", "key", "value", "output")},
        norm1__bias=(768,),
        norm2__bias=(768,),
        mlp__up__bias=(3072,),
        mlp__down__bias=(768,),
    )
    assert shapes("bias without patch") == biases | {"norm/bias": (768,)}
    assert shapes("bias") == biases | {"norm/bias": (768,), "embeddings/patch/bias": (768,)}


def test_last_k_counts_from_the_top() -> None:
    model = peft.build("vit_tiny", 3, peft="last_k", last_blocks=1)
    stages = {
        "/".join(path.split("/")[:2]) if path.startswith("blocks") else path.split("/")[0] for path in model.trained
    }
    assert stages == {"blocks/1", "norm", "head"}
    assert model.cut == 2  # embeddings and the first block run once per example
    both = peft.build("vit_tiny", 3, peft="last_k", last_blocks=2)
    assert {path.split("/")[0] for path in both.frozen} == {"embeddings"}
    with pytest.raises(ValueError, match="last_blocks=3 <= 2"):
        peft.build("vit_tiny", 3, peft="last_k", last_blocks=3)


def test_first_part_takes_what_two_claim() -> None:
    model = peft.build("vit_tiny", 3, peft="last_k+bias")
    assert model.rules["blocks/1/mlp/up/bias"] == "last_k"
    assert model.rules["blocks/0/mlp/up/bias"] == "bias"
    assert peft.build("vit_tiny", 3, peft="bias+norm").rules["norm/bias"] == "bias"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("vit_tiny", "full+bias", "full and bias both take"),
        ("vit_tiny", "lora+ffa_lora", "lora and ffa_lora both take"),
        ("vit_tiny", "adaptor", "did you mean adapter"),
        ("resnet18", "prompt", "'prompt' to meet a transformer"),
        ("resnet18", "lora", "no linear layer but the head"),
        ("cnn", "norm", "'norm' to take leaves of backbone='cnn'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peft.build(name, 3, peft=kind)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": "houlsbi"}, "did you mean houlsby"),
        ({"adapter_width": 0}, "adapter_width=0 > 0"),
        ({"prompt_depth": "deeep"}, "did you mean deep"),
        ({"ranks": 4}, "did you mean rank"),
        ({"pool": "pooler"}, "pool='pooler' to be one of"),
        ({"input_shape": (30, 32)}, "image size=30x32 to divide by the patch of 4"),
        ({"input_shape": (16, 16, 2)}, "1 or 3"),
        ({"image_size": 15}, "image size=15x15 to divide"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peft.build("vit_tiny", 3, **{"peft": "adapter", **options})


def test_ffa_lora_keeps_a_frozen_at_its_start() -> None:
    """A is not trained and not published: it comes from the run's seed, the very A with which LoRA starts."""
    ffa, lora = make("vit_tiny", "ffa_lora"), make("vit_tiny", "lora")
    (trained, frozen), (both, _) = peft.start(ffa, "random", 5), peft.start(lora, "random", 5)
    path = "blocks/1/attention/value/lora_a"
    assert path in frozen
    assert path not in trained
    assert path not in peft.published(ffa)
    np.testing.assert_array_equal(frozen[path], both[path])
    assert float(np.max(np.abs(frozen[path]))) > 0
    assert ffa.cut == lora.cut == 1


def test_dora_equals_the_normalised_matrix() -> None:
    """x (W + s A B) with each column scaled to its trained length, as the paper's equation 5 says."""
    model, plain = make("vit_tiny", "dora"), peft.build("vit_tiny", 3, peft="head")
    trained, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    trained = {p: v + rng.normal(size=v.shape).astype(np.float32) * np.float32(0.1) for p, v in trained.items()}
    merged = dict(frozen)
    for path in [path for path in trained if path.endswith("/lora_a")]:
        layer = path.removesuffix("/lora_a")
        matrix = frozen[f"{layer}/kernel"] + 4.0 * trained[path] @ trained[f"{layer}/lora_b"]
        merged[f"{layer}/kernel"] = matrix / np.linalg.norm(matrix, axis=0) * trained[f"{layer}/magnitude"]
    head = {path: trained[path] for path in ("head/kernel", "head/bias")}
    x = batch("vit_tiny")
    expected = plain.apply(head, {path: merged[path] for path in plain.frozen}, x)
    np.testing.assert_allclose(model.apply(trained, frozen, x), expected, atol=2e-5)


def test_rslora_scales_by_the_root() -> None:
    """s = alpha / sqrt(r): with r = 4 the very model of twice the alpha."""
    root = peft.build("vit_tiny", 3, peft="lora", rank=4, lora_alpha=8.0, rslora=True)
    twice = peft.build("vit_tiny", 3, peft="lora", rank=4, lora_alpha=16.0)
    trained, frozen = peft.start(root, "random", 0)
    trained = {path: leaf + np.float32(0.1) for path, leaf in trained.items()}
    x = batch("vit_tiny")
    np.testing.assert_array_equal(root.apply(trained, frozen, x), twice.apply(trained, frozen, x))


def test_prefix_equals_attention_over_more_keys() -> None:
    """Keys and values that are copies of what a token gives count that token twice: mixing by hand shows the same."""
    from flax import nnx

    from fedsim.backbones.layers import Attention

    attention = Attention(8, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    attention.attach_prefix(3, nnx.Rngs(1))
    key = jnp.concatenate([attention.key(x)[0], attention.prefix_key[...]]).reshape(8, 2, 4)
    value = jnp.concatenate([attention.value(x)[0], attention.prefix_value[...]]).reshape(8, 2, 4)
    query = attention.query(x)[0].reshape(5, 2, 4) / 2
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key), axis=-1)
    expected = attention.output(jnp.einsum("hqk,khd->qhd", weights, value).reshape(5, 8))
    np.testing.assert_allclose(attention(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["prompt", "shallow prompt", "prefix"])
def test_padding_changes_nothing_under_added_tokens(variant: str) -> None:
    model = make("bert_tiny", variant)
    trained, frozen = peft.start(model, "random", 0)
    ids = np.random.default_rng(0).integers(1, 60, (2, 5)).astype(np.int32)
    padded = np.pad(ids, ((0, 0), (0, 4)))
    np.testing.assert_allclose(model.apply(trained, frozen, padded), model.apply(trained, frozen, ids), atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_prompts_come_after_the_patches_and_are_cut_off(pool: str) -> None:
    """Mean pooling over patches alone: with every value path through attention cut, prompts change nothing."""
    for variant in ("prompt", "shallow prompt"):
        kind, options, _ = VARIANTS[variant]
        model = peft.build("vit_tiny", 3, peft=kind, pool=pool, **options)
        plain = peft.build("vit_tiny", 3, peft="head", pool=pool)
        trained, frozen = peft.start(model, "random", 0)
        silent = {p: v * 0 if p.endswith("attention/output/kernel") else v for p, v in frozen.items()}
        head = {path: trained[path] for path in ("head/kernel", "head/bias")}
        x = batch("vit_tiny")
        got, expected = model.apply(trained, silent, x), plain.apply(head, silent, x)
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("variant", brief(["prefix", "ffa_lora", "adapter", "prompt", "dora", "ia3"], 2))
def test_vmap_over_clients_equals_a_loop(variant: str) -> None:
    model = make("vit_tiny", variant)
    trained, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    clients = {p: v + rng.normal(size=(3, *v.shape)).astype(np.float32) * np.float32(0.1) for p, v in trained.items()}
    x = jax.random.normal(jax.random.key(0), (3, 2, 16, 16, 3))
    gradient = jax.grad(lambda t, f, x: jnp.sum(jnp.sin(model.apply(t, f, x))))
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0)))(clients, frozen, x)
    alone = jax.jit(gradient)
    for i in range(3):
        for path, leaf in alone({path: leaf[i] for path, leaf in clients.items()}, frozen, x[i]).items():
            np.testing.assert_allclose(together[path][i], leaf, atol=2e-5, err_msg=path)


def test_full_of_a_backbone_that_is_its_head_is_the_head() -> None:
    full, head = (peft.build("linear", 3, peft=kind, input_shape=(6,)) for kind in ("full", "head"))
    assert set(full.trained) == set(head.trained) and not full.frozen
