"""A user's own model, as an nnx module, a linen module and a bare function: what is trained, where it starts, whole runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedsim
from fedsim import peft
from fedsim.backbones import own
from fedsim.cli import cost
from fedsim.cli import main as cli
from fedsim.config import Config, Speed
from fedsim.peft import export
from fedsim.simulation import build

pytestmark = pytest.mark.usefixtures("compile_once")

# Three times 6 -> 8 -> relu -> 5, and the bare function once more in stages.
MODELS = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import fedsim


def bare(width: int = 5):
    rng = np.random.default_rng(0)
    layers = [{"kernel": rng.normal(size=s) / 2, "bias": rng.normal(size=s[1])} for s in ((6, 8), (8, width))]

    def apply(params, x):
        first, second = params
        return jax.nn.relu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]

    return fedsim.Backbone(apply, layers)


def staged():
    rng = np.random.default_rng(0)
    layers = [{"w": rng.normal(size=s) / 2, "b": rng.normal(size=s[1])} for s in ((6, 8), (8, 8), (8, 5))]
    layer = lambda params, x: jnp.tanh(x @ params["w"] + params["b"])
    return fedsim.Backbone([layer] * 3, layers, width=5)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(nnx.relu(self.first(x))))


def with_nnx():
    graph, params = nnx.split(Nnx(nnx.Rngs(0)))
    return fedsim.Backbone(lambda params, x: nnx.merge(graph, params)(x), params)


class Linen(linen.Module):
    width: int = 5

    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Dense(8)(x))
        x = linen.LayerNorm()(x)
        return linen.Dense(self.width)(x)


model = Linen()
with_linen = fedsim.Backbone(model.apply, model.init(jax.random.key(0), np.ones((1, 6), np.float32)))

changing = lambda: fedsim.Backbone(lambda params, x: x @ params["kernel"], {"kernel": np.random.normal(size=(6, 5))})
flat = fedsim.Backbone(lambda params, x: (x @ params["w"])[:, 0], {"w": np.ones((6, 5))})
broken = fedsim.Backbone(lambda params, x: x @ params["v"], {"w": np.ones((6, 5))})
narrow = fedsim.Backbone(lambda params, x: x @ params["w"], {"w": np.ones((6, 5))}, width=4)
nothing = 3
"""
FORMS = {
    "bare": ("model/0", "model/1", []),
    "with_nnx": ("model/first", "model/second", ["model/norm"]),
    "with_linen": ("model/params/Dense_0", "model/params/Dense_1", ["model/params/LayerNorm_0"]),
}
HEAD = {"head/kernel": (5, 3), "head/bias": (3,)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("own") / "my_model.py"
    written.write_text(MODELS)
    return written


def make(file: Path, name: str, kind: str, **options: Any) -> peft.Model:
    targets = {"targets": lora_targets(name)} if name in FORMS else {}
    return peft.build(f"{file}:{name}", 3, input_shape=(6,), peft=kind, **{"rank": 2, **targets, **options})


def lora_targets(name: str) -> tuple[str, ...]:
    """Both linear layers."""
    return FORMS[name][:2]


X = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)


def features(file: Path, name: str) -> Any:
    """What the user's own function gives."""
    given = own.find(f"{file}:{name}")
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), given.params)
    assert callable(given.apply)
    return given.apply(cast, X)


def loss(model: peft.Model, trained: Any, frozen: Any) -> Any:
    logits = jax.nn.log_softmax(model.apply(trained, frozen, X))
    return -jnp.mean(logits[jnp.arange(7), jnp.arange(7) % 3])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["full", "head", "bias", "norm", "lora", "ffa_lora", "lora+bias"])
def test_exactly_these_leaves_are_trained(file: Path, name: str, kind: str) -> None:
    first, second, norms = FORMS[name]
    kernels = {f"{first}/kernel": (6, 8), f"{second}/kernel": (8, 5)}
    biases = {f"{first}/bias": (8,), f"{second}/bias": (5,)} | {f"{norm}/bias": (8,) for norm in norms}
    scales = {f"{norm}/scale": (8,) for norm in norms}
    factors = {
        f"{first}/lora_a": (6, 2),
        f"{first}/lora_b": (2, 8),
        f"{second}/lora_a": (8, 2),
        f"{second}/lora_b": (2, 5),
    }
    expected = {
        "full": kernels | biases | scales,
        "head": {},
        "bias": biases,
        "norm": scales | {f"{norm}/bias": (8,) for norm in norms},
        "lora": factors,
        "ffa_lora": {path: shape for path, shape in factors.items() if path.endswith("lora_b")},
        "lora+bias": factors | biases,
    }[kind]
    if kind == "norm" and not norms:
        with pytest.raises(ValueError, match="'norm' to take leaves"):
            make(file, name, kind)
        return
    model = make(file, name, kind)
    assert {path: leaf.shape for path, leaf in model.trained.items()} == expected | HEAD
    assert all(leaf.dtype == jnp.float32 for leaf in {**model.trained, **model.frozen}.values())
    trained, frozen = peft.start(model, None, 7)
    head = {path: trained[path] for path in HEAD}
    plain = features(file, name) @ head["head/kernel"] + head["head/bias"]
    np.testing.assert_allclose(model.apply(trained, frozen, X), plain, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda t: loss(model, t, frozen))(trained)
    for path, gradient in grads.items():
        size = float(jnp.max(jnp.abs(gradient)))
        assert (size == 0) if path.endswith("lora_a") else (size > 1e-6), path  # B is zero at the start


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_lora_merges_to_the_same_output(file: Path, name: str, options: dict[str, Any]) -> None:
    model = make(file, name, "lora", **options)
    trained, frozen = peft.start(model, None, 0)
    start = model.apply(trained, frozen, X)
    head = make(file, name, "head")
    np.testing.assert_allclose(start, head.apply(*peft.start(head, None, 0), X), rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(0)
    trained = {p: (v + 0.3 * rng.normal(size=v.shape)).astype(np.float32) for p, v in trained.items()}
    merged = export.merge(model, trained, frozen)
    params = own.find(f"{file}:{name}").restore(merged)
    given = own.find(f"{file}:{name}")
    assert jax.tree.structure(params) == jax.tree.structure(given.params) and callable(given.apply)
    plain = given.apply(params, X) @ merged["head/kernel"] + merged["head/bias"]
    got = model.apply(trained, frozen, X)
    assert float(jnp.max(jnp.abs(got - start))) > 1e-2
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-4)


def test_stages_have_a_prefix_and_blocks(file: Path) -> None:
    model = make(file, "staged", "last_k", last_blocks=1)
    assert set(model.trained) == {"stages/2/w", "stages/2/b", *HEAD}
    assert (model.cut, model.stages) == (2, 4)
    trained, frozen = peft.start(model, None, 0)
    above = {path: leaf for path, leaf in frozen.items() if path not in model.below}
    assert not above
    np.testing.assert_allclose(
        model.suffix(trained, above, model.prefix(frozen, X)), model.apply(trained, frozen, X), rtol=1e-6
    )
    lora = make(file, "staged", "lora", targets=("stages/1/w",))
    assert {path for path in lora.trained if "lora" in path} == {"stages/1/w/lora_a", "stages/1/w/lora_b"}
    assert lora.cut == 1


def test_clients_share_the_backbone_under_vmap(file: Path) -> None:
    """Under `vmap` over clients LoRA's clients differ, the frozen part is one copy."""
    model = make(file, "bare", "lora")
    trained, frozen = peft.start(model, None, 0)
    rng = np.random.default_rng(0)
    clients = {p: rng.normal(size=(4, *v.shape)).astype(np.float32) for p, v in trained.items()}
    together = jax.vmap(model.apply, (0, None, None))(clients, frozen, X)
    for i in range(4):
        alone = model.apply({p: v[i] for p, v in clients.items()}, frozen, X)
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "options", "message"),
    [
        ("flat", "head", {}, r"Expected apply to give float features \(B, width\)"),
        ("broken", "head", {}, "Expected apply to take inputs float32"),
        ("narrow", "head", {}, "Expected width=4 of the own backbone to be 5"),
        ("nothing", "head", {}, "to give a fedsim.Backbone, not int"),
        ("bear", "head", {}, "did you mean bare"),
        ("bare(widht=3)", "head", {}, "did you mean width"),
        ("bare(3)", "head", {}, "to give its options by name"),
        ("bare", "lora", {"targets": ("query",)}, r"Expected targets='query' to match a linear layer.*model/\*"),
        ("bare", "lora", {"targets": ("1",), "rank": 6}, "Expected rank=6 <= 5, the rank of model/1"),
        ("bare", "adapter", {}, "Expected peft='adapter' of an own backbone to be one of full, head"),
        ("bare", "prompt", {}, "Expected peft='prompt' of an own backbone"),
        ("bare", "prefix", {}, "Expected peft='prefix' of an own backbone"),
        ("bare", "ia3", {}, "Expected peft='ia3' of an own backbone"),
        ("bare", "last_k", {}, "a function a block"),
        ("bare", "head", {"image_size": 8}, "Expected image_size=8 to be unset"),
        ("bare", "biass", {}, "did you mean bias"),
    ],
)
def test_what_does_not_fit_is_refused(file: Path, name: str, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.build(f"{file}:{name}", 3, input_shape=(6,), peft=kind, **options)


@pytest.mark.parametrize(
    ("params", "more", "message"),
    [
        ({}, {}, "at least one float array"),
        ({"w": np.ones(3, int)}, {}, "Expected leaf 'w' of params to be a float array, not int64"),
        ({"w": "x"}, {}, "Expected leaf 'w' of params to be a float array, not str"),
        ({"a": {"lora_a": np.ones(3)}}, {}, "Expected leaf 'a/lora_a' of params not to have a name of PEFT's own"),
        ({"a/b": np.ones(3), "a": {"b": np.ones(3)}}, {}, "to have a name of its own"),
        ({"w": np.ones(3)}, {"width": 0}, "Expected width=0 > 0"),
        ({"w": np.ones(3)}, {"tokenizer": "none.json"}, "Expected tokenizer='none.json' to be a file"),
    ],
)
def test_params_that_cannot_be_trained_are_refused(params: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedsim.Backbone(lambda params, x: x, params, **more)
    with pytest.raises(ValueError, match="as many trees in params"):
        fedsim.Backbone([lambda params, x: x], {"w": np.ones(3)})


def test_cost_counts_an_own_backbone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = ["--backbone", f"{file}:bare", "--targets", "0", "1", "--rank", "2", "--classes", "3"]
    assert cli.main(["cost", *bare, "--peft", "lora", "bias", "head", "full", "--input-shape", "6", "--json"]) == 0
    rows = {r["peft"]: r for r in json.loads(capsys.readouterr().out)}
    head, bias, factors, whole = 6 * 3, 8 + 5, 2 * (6 + 8 + 8 + 5), 6 * 8 + 8 + 8 * 5 + 5
    expected = {"lora": head + factors, "bias": head + bias, "head": head, "full": head + whole}
    assert {kind: r["trainable_parameters"] for kind, r in rows.items()} == expected
    assert {r["total_parameters"] for r in rows.values()} == {whole + head}
    assert rows["head"]["setup_bytes"] == 4 * whole
    assert cli.main(["cost", *bare]) == 2
    assert "Expected width of the own backbone to be known" in capsys.readouterr().err
    assert cost.cost(Config(backbone=f"{file}:staged", peft="head"), 3).trainable_parameters == head


def config(file: Path, data: Path, name: str = "bare", **more: Any) -> Config:
    options: dict[str, Any] = {
        "dataset": str(data), "backbone": f"{file}:{name}", "targets": ("0", "1"), "rank": 2, "rounds": 4, "clients": 6,
        "clients_per_round": 3, "min_size": 1, "optimizer": "sgd", "lr": 0.1,
    }  # fmt: skip
    return Config(**options | more)


@pytest.mark.slow
def test_cached_head_tuning_equals_uncached(file: Path, blobs: Callable[..., Path], tmp_path: Path) -> None:
    setting = config(file, blobs(tmp_path), peft="head")
    runs = {
        cache: fedsim.run(setting, Speed(cache=cache), out=tmp_path / cache, quiet=True) for cache in ("auto", "off")
    }
    problem = build.problem(setting, Speed())
    assert problem.cuts == (1,)  # by itself: all but the head
    for path, leaf in runs["off"].parameters.items():
        np.testing.assert_allclose(runs["auto"].parameters[path], leaf, rtol=1e-5, atol=1e-6)
        assert not np.allclose(leaf, peft.start(make(file, "bare", "head"), None, 0)[0][path])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [form if form == "bare" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_a_run_and_its_predictions(name: str, file: Path, blobs: Callable[..., Path], tmp_path: Path) -> None:
    setting = config(
        file, blobs(tmp_path), name, targets=lora_targets(name), head_rounds=1, rounds=12, lr=0.02, optimizer="adam"
    )
    run = fedsim.run(setting, out=tmp_path / "run", quiet=True)
    assert run.summary is not None and run.summary["final"]["test"]["accuracy"] > 0.6
    row = cost.cost(setting, 3, input_shape=(6,))
    assert (run.rounds[-1]["bytes_up"], run.rounds[-1]["total_bytes_down"]) == (row.round_bytes_up, row.run_bytes_down)
    model = make(file, name, "lora")
    frozen = peft.start(model, None, 0)[1]
    answers = fedsim.load(tmp_path / "run").predict(X)
    assert answers == [str(i) for i in np.argmax(model.apply(run.parameters, frozen, X), axis=1)]


def command(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.slow
def test_resume_and_predict_in_other_processes(
    file: Path, blobs: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    words = f"run --dataset {blobs(tmp_path)} --backbone {file}:bare --targets 0 1 --rank 2 --clients 6 --clients-per-round 3"
    words += " --min-size 1 --rounds 6 --quiet --no-head-baseline"
    dry = command(environment, *words.split(), "--dry-run")
    assert dry.returncode == 0 and "Nothing was trained" in dry.stdout, dry.stderr
    whole = command(environment, *words.split(), "--out", str(tmp_path / "whole"), "--checkpoint-every", "2")
    assert whole.returncode == 0, whole.stderr
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    for late in ("summary.json", "trained.safetensors"):
        (stopped / late).unlink()
    newest = max((p for p in (stopped / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    newest.rename(tmp_path / "lost")
    resumed = command(environment, "run", "--resume", str(stopped), "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    a, b = fedsim.load(tmp_path / "whole"), fedsim.load(stopped)
    assert len(a.rounds) == len(b.rounds) == 6
    for path in a.parameters:
        np.testing.assert_array_equal(a.parameters[path], b.parameters[path])
    assert a.predict(X) == b.predict(X)


@pytest.mark.slow
def test_other_parameters_are_noticed(file: Path, blobs: Callable[..., Path], tmp_path: Path) -> None:
    """A file that draws its parameters anew would give other answers in another process."""
    run = fedsim.run(config(file, blobs(tmp_path), "changing", peft="head"), out=tmp_path / "run", quiet=True)
    run.predict(X)
    own._find.cache_clear()  # as another process
    with pytest.raises(ValueError, match="draw them from a fixed seed"):
        run.predict(X)


def test_weights_beside_its_own_are_refused(file: Path, blobs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected weights='random' to be unset"):
        fedsim.run(config(file, blobs(tmp_path), weights="random"), out=tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"Expected backbone file 'none\.py' to exist"):
        fedsim.run(config(file, blobs(tmp_path)).replace(backbone="none.py:make"), out=tmp_path / "run", quiet=True)


TEXT = '''
import jax.numpy as jnp
import numpy as np

import fedsim


def bag():
    """The mean of the embeddings of all tokens that are not padding."""

    def apply(params, ids):
        real = (ids > 0).astype(jnp.float32)[..., None]
        return (params["embedding"][ids] * real).sum(1) / jnp.maximum(real.sum(1), 1)

    table = np.random.default_rng(0).normal(size=(40, 32))
    return fedsim.Backbone(apply, {"embedding": table}, tokenizer="words.json")
'''


@pytest.mark.slow
def test_texts_with_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(30)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("words.json")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        label = int(rng.integers(2))
        rows.append(" ".join(f"w{15 * label + int(i)}" for i in rng.integers(0, 15, 5)) + f",{label}")
    Path("texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    Path("bag.py").write_text(TEXT)
    setting = Config(
        dataset="texts.csv", backbone="bag.py:bag", peft="head", tokens=6, rounds=20, clients=4, clients_per_round=4,
        min_size=1, lr=0.05,
    )  # fmt: skip
    run = fedsim.run(setting, out=tmp_path / "run", quiet=True)
    assert fedsim.load(tmp_path / "run").predict(["w1 w2 w3", "w20 w21"]) == ["0", "1"]
    assert cost.cost(setting, 2).trainable_parameters == 2 * 33
    assert run.summary is not None and math.isfinite(run.summary["final"]["test"]["loss"])
