"""What a run trained, in the forms in which others use it: a merged backbone, or a LoRA that Hugging Face `peft` loads.

`merge` folds LoRA, DoRA and (IA)^3 into the kernels; `export_backbone` writes the result in the format in which the
checkpoint came. `export_lora` and `read_lora` speak `peft`'s two files, adapter_model.safetensors and
adapter_config.json; neither needs torch.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from fedsim.backbones import Row, row
from fedsim.backbones.formats import FORMATS, Format
from fedsim.backbones.load import find
from fedsim.backbones.own import kernel_of
from fedsim.peft.kinds import lora_scale
from fedsim.peft.split import Model, published

Arrays = Mapping[str, Any]

HUGGING_FACE = ("bert", "roberta", "vit", "dinov2")
MERGED = ("lora_a", "lora_b", "magnitude", "ia3")
# `peft` says lora_magnitude_vector, and some of its versions add .weight to it.
LORA_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def merge(model: Model, trained: Arrays, frozen: Arrays) -> dict[str, np.ndarray]:
    """Every published leaf and the head, with what was attached folded in: a backbone of kind `full` gives the same.

    Raises:
        ValueError: something is attached that no kernel can hold (adapters, prompts, prefixes).
    """
    leaves = {path: np.asarray(leaf) for path, leaf in {**frozen, **trained}.items()}
    attached = {path for path in model.fresh if not path.startswith("head/")}
    rest = sorted({path.rpartition("/")[2] for path in attached} - set(MERGED))
    if rest:
        raise ValueError(
            f"Expected peft={model.options.peft!r} to fold into the backbone; {', '.join(rest)} cannot: keep the trained "
            "part beside it."
        )
    merged = {path: leaf for path, leaf in leaves.items() if path not in attached}
    for layer in sorted({path.rpartition("/")[0] for path in attached}):
        part = {path.rpartition("/")[2]: leaves[path] for path in attached if path.rpartition("/")[0] == layer}
        name = kernel_of(layer, leaves)
        kernel = leaves[name]
        if "lora_a" in part:
            kernel = kernel + lora_scale(model.options) * part["lora_a"] @ part["lora_b"]
        if "magnitude" in part:
            kernel = kernel * (part["magnitude"] / np.linalg.norm(kernel, axis=0))
        if "ia3" in part and layer.endswith("/down"):  # it scales what enters
            kernel = part["ia3"][:, None] * kernel
        elif "ia3" in part:
            kernel = kernel * part["ia3"]
            merged[f"{layer}/bias"] = leaves[f"{layer}/bias"] * part["ia3"]
        merged[name] = kernel.astype(np.float32)
    return merged


def export_backbone(folder: Path, model: Model, trained: Arrays, frozen: Arrays, weights: str | None) -> Path:
    """Writes the merged backbone as the checkpoint came, our head beside it; returns the checkpoint's file.

    Leaves that we do not have stay as they were, but for the head of the checkpoint's own task, which is left out.
    config.json and the tokenizer are copied. A graph (.onnx) becomes safetensors with the names of its modules, random
    weights the first published layout of their backbone. Our head is head.safetensors: kernel (in, classes), bias.

    Args:
        weights: the option with which the run started.

    Raises:
        ValueError: it cannot be merged, the backbone has no published layout, or `weights` no longer fits it.
    """
    values, shapes, row = merge(model, trained, frozen), published(model), _row(model)
    if not row.formats:
        raise ValueError(f"Expected backbone={model.name!r} to have a published layout; keep its leaves as they are.")
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {}
    archive = False
    if weights == "random":
        layout = FORMATS[row.formats[0]]
        places = {path: layout.place(path, row.config) for path in shapes}
    else:
        found = find(model.name, weights, shapes)
        layout, places, source = found.layout, found.places, found.source
        archive = source.file.suffix == ".npz"
        heads = [
            found.prefix * optional + q for q, why in layout.unused.items() if "head" in why for optional in (0, 1)
        ]
        for name in source.shapes:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in heads):
                stored[name] = np.array(source.read(name))  # a copy: its parts are written below
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (source.file.parent / name).is_file():
                shutil.copyfile(source.file.parent / name, folder / name)
    for path, place in places.items():
        leaf = place.layout.theirs(values[path], row.config)
        rows = leaf.shape[0]
        if place.parts == 1:
            stored[place.name] = leaf
        else:
            whole = stored.setdefault(place.name, np.zeros((rows * place.parts, *leaf.shape[1:]), np.float32))
            whole[place.part * rows : (place.part + 1) * rows] = leaf
    file = folder / ("model.npz" if archive else "model.safetensors")
    if archive:
        np.savez(file, **stored)
    else:
        _save(stored, file)
    _save({"kernel": values["head/kernel"], "bias": values["head/bias"]}, folder / "head.safetensors")
    return file


def export_lora(
    folder: Path,
    model: Model,
    trained: Arrays,
    frozen: Arrays,
    *,
    base: str | None = None,
    transformers: Literal[4, 5] = 5,
) -> Path:
    """Writes the trained LoRA as Hugging Face `peft` saves one; returns its file.

    Where transformers' model for classification computes what ours does (BERT's pooler, ViT's class token) the names
    are that model's, and the head goes along as its classifier; else the names are those of the bare backbone, and the
    head is head.safetensors.

    Args:
        base: name or path of the checkpoint, for adapter_config.json.
        transformers: major version of the library that will read it: 5 renamed the modules of ViT and DINOv2, not
            their files; those of BERT and RoBERTa are the same in both.

    Raises:
        ValueError: the backbone has no Hugging Face names, or more than LoRA and the head was trained.
    """
    written = sorted(set(trained) - set(model.trained))
    if written:
        raise ValueError(
            f"Expected the run to have left the backbone as it was; its algorithm wrote into {written[0]}: export the "
            "merged backbone by export_backbone."
        )
    layout, row = _hugging_face(model), _row(model)
    others = sorted(set(model.rules.values()) - {"frozen", "head", "lora", "ffa_lora"})
    layers = sorted({path.rpartition("/")[0] for path in model.fresh if path.endswith("/lora_a")})
    if others or not layers:
        raise ValueError(
            f"Expected peft={model.options.peft!r} to train LoRA alone; export the merged backbone by export_backbone."
        )
    if "embeddings/patch" in layers:
        raise ValueError(
            "Expected LoRA on linear layers; the patch embedding is a convolution to others: leave it out."
        )
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in {**frozen, **trained}.items()}
    prefix, classifier = _task(layout, row)
    arrays: dict[str, np.ndarray] = {}
    names = [prefix + layout.place(f"{layer}/kernel", row.config).name.removesuffix(".weight") for layer in layers]
    for published_part, otherwise in layout.renamed if transformers == 5 and row.kind == "image" else ():
        names = [name.replace(published_part, otherwise) for name in names]
    for layer, name in zip(layers, names, strict=True):
        for role, theirs in LORA_NAMES.items():
            if f"{layer}/{role}" in leaves:
                arrays[f"base_model.model.{name}.{theirs}"] = leaves[f"{layer}/{role}"].T
    folder.mkdir(parents=True, exist_ok=True)
    if classifier:
        arrays[f"base_model.model.{classifier}.weight"] = leaves["head/kernel"].T
        arrays[f"base_model.model.{classifier}.bias"] = leaves["head/bias"]
    else:
        _save({"kernel": leaves["head/kernel"], "bias": leaves["head/bias"]}, folder / "head.safetensors")
    options = model.options
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": names,
        "modules_to_save": [classifier] if classifier else None,
        "task_type": "SEQ_CLS" if classifier and row.kind == "text" else None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    file = folder / "adapter_model.safetensors"
    _save(arrays, file)
    return file


def lora_options(folder: Path) -> dict[str, Any]:
    """Options with which `peft.build` makes the model that a saved LoRA fits, but for the targets.

    Raises:
        ValueError: it is no LoRA, or one of a kind that is not known here.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    known = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    if not known or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(
            f"Expected {folder}/adapter_config.json to be of a LoRA with one rank and alpha and bias='none'; merge it "
            "where it was made."
        )
    return {
        "rank": config["r"],
        "lora_alpha": float(config["lora_alpha"]),
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
    }


def read_lora(folder: Path, model: Model) -> dict[str, np.ndarray]:
    """LoRA's leaves, and the head where it was saved, from what Hugging Face `peft` saved.

    Raises:
        ValueError: rank, alpha or kind are not the model's, or leaves are missing, left over or misshapen.
    """
    options = lora_options(folder)
    wrong = [
        f"{name}={value!r}, not {getattr(model.options, name)!r}"
        for name, value in options.items()
        if value != getattr(model.options, name)
    ]
    if wrong:
        raise ValueError(f"Expected the LoRA in {folder} to be the model's; it has {'; '.join(wrong)}: build it so.")
    layout, row = _hugging_face(model), _row(model)
    prefixes = sorted({*layout.prefixes, _task(layout, row)[0]}, key=len, reverse=True)
    wanted: dict[str, str] = {}
    for path in model.fresh:
        layer, _, role = path.rpartition("/")
        if role in LORA_NAMES:
            module = layout.place(f"{layer}/kernel", row.config).name.removesuffix(".weight")
            wanted[f"{module}.{LORA_NAMES[role]}"] = path
    wanted |= {"classifier.weight": "head/kernel", "classifier.bias": "head/bias"}
    values: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for stored, leaf in load_file(folder / "adapter_model.safetensors").items():
        name = stored.removeprefix("base_model.model.").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        name = layout.spelling(next((name.removeprefix(p) for p in prefixes if p and name.startswith(p)), name))
        path = wanted.get(name)
        shape = (model.trained.get(path) or model.frozen[path]).shape if path else None
        if path is None:
            problems.append(f"{stored} left over")
        elif leaf.T.shape != shape:
            problems.append(f"{stored} is {leaf.shape}, our {path} {shape}")
        else:
            values[path] = np.ascontiguousarray(leaf.T, np.float32)
    problems += [
        f"{name} (our {path}) missing"
        for name, path in wanted.items()
        if path not in values and not path.startswith("head/")
    ]
    if problems:
        raise ValueError(
            f"Expected the LoRA in {folder} to fit backbone={model.name!r} leaf by leaf; {'; '.join(problems[:20])}: "
            "build the model with its targets."
        )
    return values


def _row(model: Model) -> Row:
    if ":" in model.name:
        raise ValueError(
            f"Expected backbone={model.name!r} to have a published layout; merge the leaves, and Backbone.restore them."
        )
    o = model.options
    return row(model.name, pool=o.pool, image_size=o.image_size, interpolation=o.interpolation)


def _hugging_face(model: Model) -> Format:
    known = [name for name in _row(model).formats if name in HUGGING_FACE]
    if not known:
        raise ValueError(f"Expected backbone={model.name!r} to have Hugging Face names; those of {HUGGING_FACE} have.")
    return FORMATS[known[0]]


def _task(layout: Format, row: Row) -> tuple[str, str]:
    """Prefix and head of transformers' model for classification where it computes what ours does, or two times ""."""
    if layout.task is None or row.config.pool != layout.task[2]:
        return "", ""
    return layout.task[:2]


def _save(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    # safetensors writes what lies in memory: transposed views must be copied first.
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata={"format": "pt"})
