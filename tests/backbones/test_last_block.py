"""The last block computes only the tokens that the pool reads; the whole block, cut afterwards, is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim import peft
from fedsim.backbones import BACKBONES, Row, bert, bert_row, vit
from fedsim.backbones.bert import BertConfig
from fedsim.backbones.vit import VitConfig

SIZES = {"width": 16, "depth": 2, "heads": 2, "hidden": 24}
ROWS = {
    "vit": Row("image", vit.Vit, VitConfig(**SIZES, patch=4, image=8, layer_scale=True)),
    "vit_mean": Row("image", vit.Vit, VitConfig(**SIZES, patch=4, image=8, pool="mean")),
    "bert": bert_row(BertConfig(**SIZES, vocabulary=50, positions=12, pool="cls")),
    "bert_pooler": bert_row(BertConfig(**SIZES, vocabulary=50, positions=12, pool="pooler")),
    "bert_mean": bert_row(BertConfig(**SIZES, vocabulary=50, positions=12, pool="mean")),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"targets": ("*/attention/query", "*/attention/value", "*/mlp/up")},
    "adapter": {},
    "prompt": {"prompt_tokens": 3},
    "shallow": {"peft": "prompt", "prompt_tokens": 3, "prompt_depth": "shallow"},
    "prefix+ia3": {},
}


def whole(block: Any) -> Callable[..., None]:
    """The block's `__init__`, reading all tokens wherever it stands."""
    make = block.__init__
    return lambda self, config, read=None, *, rngs: make(self, config, rngs=rngs)


def outcome(name: str, kind: str) -> tuple[Any, Any, Any]:
    """Logits, gradients and the shapes that enter the pool."""
    text = name.startswith("bert")
    options = {"peft": kind, **KINDS[kind]}
    model = peft.build(name, 3, input_shape=(7,) if text else (8, 8, 3), **options)
    trained, frozen = peft.start(model, "random", 0)
    rng = np.random.default_rng(0)
    trained = {path: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in trained.items()}
    if text:
        x = rng.integers(1, 50, (4, 7)).astype(np.int32) * (np.arange(7) < np.array([[7], [5], [2], [1]]))
    else:
        x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)

    def loss(trained: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(trained, frozen, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(trained)
    entering = jax.eval_shape(lambda h: model.run({**frozen, **trained}, h, 0, model.stages - 2), x)
    return logits, grads, jax.tree.map(lambda a: a.shape, entering)


BRIEF = {("vit", "lora"), ("bert", "prompt"), ("bert_pooler", "shallow"), ("vit_mean", "shallow")}
SLOW = {("vit", kind) for kind in KINDS} | {("bert_pooler", kind) for kind in KINDS} | {("bert_mean", "full")}
CASES = [*sorted(BRIEF), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW - BRIEF))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_and_gradients_equal_the_whole_block(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    for row in ROWS:
        monkeypatch.setitem(BACKBONES, row, ROWS[row])
    logits, grads, entering = outcome(name, kind)
    tokens = jax.tree.leaves(entering, is_leaf=lambda leaf: isinstance(leaf, tuple))[0][1]
    assert (tokens == 1) == ("mean" not in name)
    with monkeypatch.context() as patch:
        patch.setattr(vit.Block, "__init__", whole(vit.Block))
        patch.setattr(bert.Block, "__init__", whole(bert.Block))
        expected, expected_grads, all_tokens = outcome(name, kind)
    assert jax.tree.leaves(all_tokens, is_leaf=lambda leaf: isinstance(leaf, tuple))[0][1] > 1
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[path], atol=1e-5, err_msg=path)
