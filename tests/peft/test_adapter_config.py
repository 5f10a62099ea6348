"""Adapters of others are read where they are plain LoRAs; every other form is refused by the key that says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsim import peft
from fedsim.backbones import BACKBONES, Row
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.peft import export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VIT = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A writable copy of a LoRA that peft saved."""
    shutil.copytree(FIXTURES / "vit_lora", tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> peft.Model:
    monkeypatch.setitem(BACKBONES, "small", Row("image", Vit, VIT, formats=BACKBONES["vit_b16"].formats))
    return peft.build("small", 3, peft="lora", rank=2, lora_alpha=6.0)


def say(folder: Path, **entries: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


OTHER_FORMS: list[tuple[str, Any]] = [
    *(
        ("init_lora_weights", v)
        for v in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", 1.5, [])
    ),
    ("peft_type", "ADALORA"),
    ("bias", "all"),
    ("bias", False),
    ("use_qalora", True),
    ("alora_invocation_tokens", [1, 2]),
    ("arrow_config", {"top_k": 1}),
    ("use_bdlora", {"a": 1}),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("target_parameters", ["x"]),
    ("kasa_config", {"x": 1}),
    ("loftq_config", {"bits": 4}),
    ("eva_config", {"rho": 2.0}),
    ("corda_config", {"x": 1}),
    ("lora_ga_config", {"x": 1}),
    ("velora_config", {"x": 1}),
    ("monteclora_config", {"x": 1}),
    ("megatron_config", {"x": 1}),
    ("lora_bias", True),
    ("fan_in_fan_out", True),
    ("trainable_token_indices", [1]),
    ("trainable_token_indices", {"embed": [1]}),
    ("modules_to_save", ["pooler"]),
    ("modules_to_save", "classifier"),
    ("modules_to_save", ["classifier", 3]),
    ("rank_pattern", {"query": 4}),
    ("alpha_pattern", {"query": 4}),
    ("ensure_weight_tying", True),
    ("of_a_newer_version", 1),
    ("of_a_newer_version", 0),
    ("of_a_newer_version", "on"),
]


@pytest.mark.parametrize(("key", "value"), OTHER_FORMS, ids=lambda v: json.dumps(v))
def test_every_other_form_is_refused_by_name(adapter: Path, model: peft.Model, key: str, value: Any) -> None:
    say(adapter, **{key: value})
    for read in (export.lora_options, lambda folder: export.read_lora(folder, model)):
        with pytest.raises(ValueError, match="with one rank and alpha") as refused:
            read(adapter)
        assert f"{key}={value!r}" in str(refused.value)
        assert str(adapter / "adapter_config.json") in str(refused.value)
        assert "DoRA" in str(refused.value) and "merge it where it was made" in str(refused.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"modules_to_save": ["classifier", "score"]},
        {"of_a_newer_version": None, "another": False, "third": {}, "fourth": [], "fifth": ""},
        {"lora_dropout": 0.1, "task_type": "SEQ_CLS", "peft_version": "0.30.0", "revision": "main"},
        {"target_modules": "q_proj|v_proj", "layers_to_transform": [0, 1], "exclude_modules": ["key"]},
    ],
)
def test_what_changes_nothing_is_read(adapter: Path, model: peft.Model, entries: dict[str, Any]) -> None:
    expected = export.read_lora(adapter, model)
    read = export.read_lora(say(adapter, **entries), model)
    assert read.keys() == expected.keys() == model.trained.keys()
    assert all(np.array_equal(read[path], expected[path]) for path in read)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", v) for v in (None, "2", 2.0, True, 0, -1, [2])),
        *(("lora_alpha", v) for v in (None, "6", True, float("nan"), float("inf"), {}, 0)),
        *((flag, v) for flag in ("use_dora", "use_rslora") for v in ("yes", 1, [])),
    ],
    ids=lambda v: json.dumps(v),
)
def test_numbers_and_flags_of_another_type_are_refused(adapter: Path, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected {key}=.*adapter_config.json to be"):
        export.lora_options(say(adapter, **{key: value}))


def test_config_without_a_type_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    with pytest.raises(ValueError, match="no peft_type"):
        export.lora_options(adapter)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.astype(ml_dtypes.float8_e4m3fn), "F8_E4M3"),
        (lambda a: a.astype(np.int8), "I8"),
        (lambda a: a * np.float32(np.nan), "NaN or infinite"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(adapter: Path, model: peft.Model, change: Any, words: str) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: change(leaf) for name, leaf in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=words) as refused:
        export.read_lora(adapter, model)
    assert str(file) in str(refused.value)


def test_pickled_adapter_and_a_tensor_of_two_names_are_refused(adapter: Path, model: peft.Model) -> None:
    file = adapter / "adapter_model.safetensors"
    leaves = load_file(file)
    name = next(n for n in leaves if "lora_A" in n)
    save_file(leaves | {name.replace("base_model.model.vit.", "base_model.model."): leaves[name] + 1}, file)
    with pytest.raises(ValueError, match="there in two spellings"):
        export.read_lora(adapter, model)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safe_serialization=True"):
        export.read_lora(adapter, model)
