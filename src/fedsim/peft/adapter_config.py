"""`adapter_config.json` of Hugging Face `peft`, read by an allow-list: what is not understood is refused, not ignored.

Many adapters share LoRA's two factors and mean something else by them: PiSSA, OLoRA and CorDA change the base weights,
QA-LoRA, aLoRA and Arrow the forward pass. New ones come with every version of `peft`, each with keys of its own. So a key
that is not known here may only say nothing: null, false or empty.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.backbones.json_files import read_object

CONFIG = "adapter_config.json"

UNDERSTOOD = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "modules_to_save", "init_lora_weights")
# They say where the adapter comes from, how it was trained, or which modules it chose: the names of its tensors say that.
# qalora_group_size and megatron_core are read by peft only beside use_qalora and megatron_config.
NO_MATTER = (
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("qalora_group_size", "megatron_core"),
)
HEADS = ("classifier", "score")  # peft names both for every classification of sequences
REMEDY = "merge it where it was made, or train a plain LoRA"


def lora_options(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Options with which `peft.build` makes the model that a saved LoRA fits, but for the targets.

    Raises:
        ValueError: it is no LoRA, or one of a kind that is not known here; every key that says so is named.
    """
    file = Path(folder).expanduser() / CONFIG
    config = read_object(file, "give a folder to which peft saved a LoRA")
    wrong = [f"{key}={value!r}" for key, value in config.items() if not _harmless(key, value)]
    if "peft_type" not in config:
        wrong.append("no peft_type")
    if wrong:
        raise ValueError(
            f"Expected {file} to be of a LoRA with one rank and alpha and bias='none' (also rsLoRA or DoRA, no other form), "
            f"but it says {', '.join(wrong)}; {REMEDY}."
        )
    return {
        "rank": _number(file, config, "r"),
        "lora_alpha": float(_number(file, config, "lora_alpha")),
        "rslora": _flag(file, config, "use_rslora"),
        "dora": _flag(file, config, "use_dora"),
    }


def _harmless(key: str, value: Any) -> bool:
    """Whether a LoRA with this entry is what fedsim computes."""
    if key == "peft_type":
        return value == "LORA"
    if key == "bias":
        return value in ("none", None)
    if key == "init_lora_weights":  # the others change the base weights or choose a rank for each matrix
        return value is None or isinstance(value, bool) or value == "gaussian"
    if key == "modules_to_save":
        return value is None or (isinstance(value, list) and all(name in HEADS for name in value))
    return key in UNDERSTOOD or key in NO_MATTER or value is None or value is False or value in ("", [], {})


def _number(file: Path, config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    kinds = int if key == "r" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value <= 0:
        what = "a whole number" if key == "r" else "a number"
        raise ValueError(f"Expected {key}={value!r} of {file} to be {what} > 0; save the adapter again.")
    return value


def _flag(file: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"Expected {key}={value!r} of {file} to be true or false; save the adapter again.")
    return bool(value)
