"""Published decoders: files of the reference library give its outputs, and what ours do not compute is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsim import peft
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.backbones.load import load
from fedsim.peft import export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
LLAMA = DecoderConfig("llama", 40, 16, 2, 4, 2, 24, positions=20, theta=100.0)
CONFIGS = {
    "llama": LLAMA,
    "llama_untied": dataclasses.replace(LLAMA, tied=False),
    "gpt2": DecoderConfig("gpt2", 40, 16, 2, 4, 4, 64, positions=20),
}
FORMATS = {"llama": ("llama", "llama_bare"), "llama_untied": ("llama", "llama_bare"), "gpt2": ("gpt2",)}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., peft.Model]:
    """Makes a fixture's model a known backbone and builds it."""

    def make(name: str, kind: str = "full", changes: Any = None, **options: Any) -> peft.Model:
        row = decoder_row(dataclasses.replace(CONFIGS[name], **(changes or {})), FORMATS[name])
        monkeypatch.setitem(BACKBONES, "small", row)
        return peft.build("small", 3, peft=kind, **{"task": "language_model", "rank": 2, **options})

    return make


def copied(name: str, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """The fixture, with its config.json changed."""
    shutil.copytree(FIXTURES / name, folder)
    if change is not None:
        said = json.loads((folder / "config.json").read_text())
        change(said)
        (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_reference(known, name: str) -> None:
    model, expected = known(name), np.load(FIXTURES / name / "expected.npz")
    leaves = load("small", FIXTURES / name, peft.published(model))
    ids, real = expected["ids"], expected["ids"] != 0
    found = np.asarray(model.apply(leaves, {}, ids))
    np.testing.assert_allclose(found[real], expected["logits"][real], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_either_side_and_outside_the_vocabulary_changes_nothing(known, name: str) -> None:
    """Learned positions count the real tokens; -1 is looked at by none."""
    model = known(name)
    leaves = load("small", FIXTURES / name, peft.published(model))
    right = np.array([[5, 6, 7, 2, 0, 0]], np.int32)
    before = np.asarray(model.apply(leaves, {}, right))[0, :4]
    after = np.asarray(model.apply(leaves, {}, np.roll(right, 2, axis=1)))[0, 2:]
    np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)
    outside = known(name, changes={"pad": -1})
    again = np.asarray(outside.apply(leaves, {}, np.where(right == 0, -1, right)))[0, :4]
    np.testing.assert_array_equal(again, before)


def bare(name: str) -> dict[str, np.ndarray]:
    """The fixture's leaves as the model without its output has them."""
    front = "transformer." if name == "gpt2" else "model."
    found: dict[str, np.ndarray] = {}
    for file in sorted((FIXTURES / name).glob("*.safetensors")):
        found |= load_file(file)
    return {leaf.removeprefix(front): value for leaf, value in found.items()}


FORMS: dict[str, Callable[[dict[str, np.ndarray], str], dict[str, np.ndarray]]] = {
    "bare": lambda leaves, table: leaves,
    "a copy of the embedding": lambda leaves, table: leaves | {"lm_head.weight": leaves[table].copy()},
    "buffers": lambda leaves, table: (
        leaves
        | {
            "layers.0.self_attn.rotary_emb.inv_freq" if table == "embed_tokens.weight" else "h.0.attn.bias": np.ones(
                (2,), np.float32
            )
        }
    ),
    "half": lambda leaves, table: {name: leaf.astype(np.float16) for name, leaf in leaves.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_published_forms_are_read(known, tmp_path: Path, name: str, form: str) -> None:
    model = known(name)
    table = "wte.weight" if name == "gpt2" else "embed_tokens.weight"
    save_file(FORMS[form](bare(name), table), tmp_path / "model.safetensors")
    expected = load("small", FIXTURES / name, peft.published(model))
    got = load("small", tmp_path, peft.published(model))
    half = form == "half"
    assert all(np.array_equal(got[p], expected[p].astype(np.float16) if half else expected[p]) for p in expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_output_of_its_own_is_no_copy(known, tmp_path: Path, name: str) -> None:
    leaves = bare(name)
    table = "wte.weight" if name == "gpt2" else "embed_tokens.weight"
    save_file(leaves | {"lm_head.weight": leaves[table] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' of weights=.* to be a copy of .*choose a backbone whose output"
    ):
        load("small", tmp_path, peft.published(known(name)))


def test_an_untied_output_is_published_and_frozen(known, tmp_path: Path) -> None:
    model = known("llama_untied", "lora", targets=("*",))
    assert model.rules["lm_head/kernel"] == "frozen" and "lm_head/kernel" in peft.published(model)
    assert not [p for p in model.trained if p.startswith("lm_head")], "LoRA is on no output"
    assert known("llama_untied", "last_k").rules["lm_head/kernel"] == "last_k"
    save_file({n: v for n, v in bare("llama_untied").items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: lm_head.weight \(our lm_head/kernel\)"):
        load("small", tmp_path, peft.published(known("llama_untied")))
    classifier = known("llama_untied", "head", task="classification")
    assert "lm_head/kernel" not in load("small", FIXTURES / "llama_untied", peft.published(classifier))


UNCOMPUTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "Expected rope scaling 'llama3' of .*take a checkpoint"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Expected rope scaling 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0}}, "Expected rope scaling 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, r"rope_theta=50.0, not 100.0"),
    ("llama", {"rope_parameters": None}, r"rope_theta=10000.0, not 100.0"),
    ("llama", {"hidden_act": "gelu"}, "Expected hidden_act='gelu' of .*config.json to be 'silu'"),
    ("llama", {"attention_bias": True}, "Expected attention_bias=True of .* to be False"),
    ("llama", {"mlp_bias": True}, "Expected mlp_bias=True of .* to be False"),
    ("llama", {"head_dim": 8}, "Expected head_dim=8 of .* to be 16 / 4"),
    ("llama", {"sliding_window": 4096}, "Expected sliding_window=4096 of .* to be absent"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps=1e-06, not 1e-05"),
    ("llama", {"tie_word_embeddings": False}, "tie_word_embeddings=False, not True"),
    ("llama", {"num_key_value_heads": None}, "num_key_value_heads=4, not 2"),
    ("llama", {"model_type": "mistral"}, "model_type='mistral', not 'llama'"),
    ("llama", {"max_position_embeddings": 10}, "Expected max_position_embeddings=10 of .* >= 20"),
    ("llama", {"quantization_config": {"bits": 4}}, "Expected quantization_config="),
    ("llama_untied", {"tie_word_embeddings": True}, "tie_word_embeddings=True, not False"),
    ("gpt2", {"activation_function": "relu"}, "Expected activation_function='relu' of .* to be 'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "Expected scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"scale_attn_weights": False}, "Expected scale_attn_weights=False"),
    ("gpt2", {"n_head": 2}, "n_head=2, not 4"),
    ("gpt2", {"tie_word_embeddings": False}, "Expected tie_word_embeddings=False of .* to be True"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), UNCOMPUTED, ids=[next(iter(c)) for _, c, _ in UNCOMPUTED])
def test_what_is_not_computed_is_refused(known, tmp_path: Path, name: str, change: dict, message: str) -> None:
    folder = copied(name, tmp_path / "d", lambda said: said.update(change))
    with pytest.raises(ValueError, match=message):
        load("small", folder, peft.published(known(name)))


def test_older_files_say_theta_by_itself(known, tmp_path: Path) -> None:
    def older(said: dict[str, Any]) -> None:
        del said["rope_parameters"], said["head_dim"], said["mlp_bias"]
        said.update(rope_theta=100.0, rope_scaling=None, max_position_embeddings=64)

    load("small", copied("llama", tmp_path / "d", older), peft.published(known("llama")))


@pytest.mark.parametrize("name", CONFIGS)
def test_another_vocabulary_is_refused(known, name: str) -> None:
    with pytest.raises(ValueError, match=r"misshapen: .*\(40, 16\), not \(48, 16\)"):
        load("small", FIXTURES / name, peft.published(known(name, changes={"vocabulary": 48})))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_lora_is_a_checkpoint_again(known, tmp_path: Path, name: str) -> None:
    """In its own names and shapes; nothing of a head is beside it."""
    model = known(name, "lora", targets=("query", "mlp/*"))
    trained, frozen = peft.start(model, FIXTURES / name, 0)
    trained = {path: leaf + np.float32(0.1) for path, leaf in trained.items()}
    file = export.export_backbone(tmp_path / "out", model, trained, frozen, FIXTURES / name)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    merged = load("small", file, peft.published(model))
    ids = np.load(FIXTURES / name / "expected.npz")["ids"]
    plain = known(name)
    np.testing.assert_allclose(plain.apply(merged, {}, ids), model.apply(trained, frozen, ids), rtol=1e-4, atol=1e-4)
    shapes = {n: v.shape for n, v in load_file(file).items()}
    assert shapes == {
        n if "lm_head" in n else f"{'transformer' if name == 'gpt2' else 'model'}.{n}": v.shape
        for n, v in bare(name).items()
    }


@pytest.mark.parametrize(
    ("name", "targets", "layer"),
    [
        ("llama", ("query", "mlp/gate"), "model.layers.0.self_attn.q_proj"),
        ("llama_untied", ("*",), "model.layers.0.self_attn.o_proj"),
        ("gpt2", ("mlp/*", "output"), "transformer.h.0.mlp.c_fc"),
    ],
)
def test_a_lora_has_the_names_of_the_model_for_next_tokens(
    known, tmp_path: Path, name: str, targets: tuple[str, ...], layer: str
) -> None:
    model = known(name, "lora", targets=targets)
    trained, frozen = peft.start(model, FIXTURES / name, 0)
    trained = {path: leaf + np.float32(0.1) for path, leaf in trained.items()}
    file = export.export_lora(tmp_path, model, trained, frozen, base=str(FIXTURES / name))
    stored, said = load_file(file), json.loads((tmp_path / "adapter_config.json").read_text())
    assert f"base_model.model.{layer}.lora_A.weight" in stored and len(stored) == len(trained)
    assert said["task_type"] == "CAUSAL_LM" and layer in said["target_modules"]
    assert not (tmp_path / "head.safetensors").exists()
    again = export.read_lora(tmp_path, model)
    assert again.keys() == trained.keys() and all(np.array_equal(again[p], trained[p]) for p in again)


def test_a_lora_on_a_part_of_another_layer_is_refused(known, tmp_path: Path) -> None:
    """GPT-2 has query, key and value in one matrix: a LoRA of two of them has no place in its file."""
    model = known("gpt2", "lora")
    with pytest.raises(
        ValueError, match="not on blocks/0/attention/query, which is a part of one of theirs: export the merged"
    ):
        export.export_lora(tmp_path, model, *peft.start(model, FIXTURES / "gpt2", 0))


PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "tinyllama_1_1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    """From shapes alone, as `fedsim cost` counts."""
    model = peft.build(name, 2, peft="full", task="language_model")
    assert sum(math.prod(leaf.shape) for leaf in model.trained.values()) == PUBLISHED[name]


@pytest.mark.slow
def test_the_page_s_counts_are_those_of_the_shapes() -> None:
    """The table of docs/language_models.md, row by row; a dash is a kind that is refused."""
    page = (Path(__file__).parents[2] / "docs" / "language_models.md").read_text()
    head, _, *rows = page[page.index("| kind | `gpt2`") :].split("\n\n")[0].splitlines()
    names = re.findall(r"`(\w+)`", head)
    assert len(rows) == 10 and len(names) == 4
    for line in rows:
        kind, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        for name, cell in zip(names, cells, strict=True):
            if cell == "–":
                with pytest.raises(ValueError, match="to take leaves"):
                    peft.build(name, 2, peft=kind, task="language_model")
                continue
            model = peft.build(name, 2, peft=kind, task="language_model")
            assert f"{sum(math.prod(leaf.shape) for leaf in model.trained.values()):,}" == cell, (name, kind)
