"""What a run trained, in the forms in which others use it: a merged backbone, or a LoRA that Hugging Face `peft` loads.

`merge` folds LoRA, DoRA and (IA)^3 into the kernels; `export_backbone` writes the result in the format in which the
checkpoint came. `export_lora` and `read_lora` speak `peft`'s two files, adapter_model.safetensors and
adapter_config.json; neither needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fedsim.backbones import Row, row
from fedsim.backbones.formats import FORMATS
from fedsim.backbones.layouts import Format
from fedsim.backbones.load import Weights, check_finite, check_kinds, find
from fedsim.backbones.own import kernel_of
from fedsim.backbones.sources import open_source
from fedsim.peft.adapter_config import CONFIG, lora_options
from fedsim.peft.kinds import lora_scale
from fedsim.peft.split import Model, published

Arrays = Mapping[str, Any]
Folder = str | os.PathLike[str]

HUGGING_FACE = ("bert", "roberta", "vit", "dinov2", "llama", "gpt2")
HEAD = "head.safetensors"
ADAPTER = "adapter_model.safetensors"
BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)  # go along with a backbone
MERGED = ("lora_a", "lora_b", "magnitude", "ia3")
# `peft` says lora_magnitude_vector, and some of its versions add .weight to it.
LORA_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def merge(model: Model, trained: Arrays, frozen: Arrays) -> dict[str, np.ndarray]:
    """Every published leaf and the head, with what was attached folded in: a backbone of kind `full` gives the same.

    Raises:
        ValueError: something is attached that no kernel can hold (adapters, prompts, prefixes); a leaf is not finite.
    """
    _require_finite(trained, "trained")
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
            kernel = kernel * _per_length(part["magnitude"], np.linalg.norm(kernel, axis=0))
        if "ia3" in part and layer.endswith("/down"):  # it scales what enters
            kernel = part["ia3"][:, None] * kernel
        elif "ia3" in part:
            kernel = kernel * part["ia3"]
            if f"{layer}/bias" in leaves:
                merged[f"{layer}/bias"] = leaves[f"{layer}/bias"] * part["ia3"]
        merged[name] = kernel.astype(np.float32)
    _require_finite(merged, "merged")
    return merged


def _per_length(magnitude: np.ndarray, length: np.ndarray) -> np.ndarray:
    """As `layers.per_length`: 0 for a column without a direction."""
    there = np.square(length) >= np.finfo(np.float32).tiny
    return np.divide(magnitude, length, out=np.zeros_like(magnitude), where=there)


def _require_finite(leaves: Arrays, what: str) -> None:
    """Raises `ValueError` for a leaf that is not finite: whoever reads it would get NaN for everything."""
    for path, leaf in leaves.items():
        wrong = np.size(leaf) - int(np.count_nonzero(np.isfinite(np.asarray(leaf))))
        if wrong:
            raise ValueError(
                f"Expected {what} leaf {path!r} to be finite, but {wrong:,} of {np.size(leaf):,} values are NaN or infinite; "
                "export a run that did not diverge (a lower learning rate helps)."
            )


def export_backbone(folder: Folder, model: Model, trained: Arrays, frozen: Arrays, weights: Weights) -> Path:
    """Writes the merged backbone as the checkpoint came, our head beside it; returns the checkpoint's file.

    Leaves that we do not have stay as they were, but for the head of the checkpoint's own task, which is left out.
    config.json and the tokenizer are copied. A graph (.onnx) becomes safetensors with the names of its modules, random
    weights the first published layout of their backbone, shards one file. Our head is head.safetensors: kernel (in, classes),
    bias. Positions keep the checkpoint's grid.

    Args:
        weights: the option with which the run started.

    Raises:
        ValueError: it cannot be merged, the backbone has no published layout, `weights` no longer fits it or lies in
            `folder`, a leaf is not finite, or the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    values, shapes, row = merge(model, trained, frozen), published(model), _row(model)
    if not row.formats:
        raise ValueError(f"Expected backbone={model.name!r} to have a published layout; keep its leaves as they are.")
    stored: dict[str, Any] = {}
    archive = False
    beside: list[Path] = []
    if weights is not None and os.fspath(weights) == "random":
        layout = FORMATS[row.formats[0]]
        places = {path: layout.place(path, row.config) for path in shapes}
    else:
        found = find(model.name, weights, shapes)
        layout, places, source = found.layout, found.places, found.source
        archive = source.file.suffix == ".npz"
        for name in source.shapes:
            if not found.is_unused(name, "head"):
                stored[name] = np.array(source.read(name))  # a copy: its parts are written below
        beside = [file for name in BESIDE if (file := source.file.parent / name).is_file()]
        _refuse_over(folder, ["model.npz", "model.safetensors", HEAD, *BESIDE], source.file)
    for path, place in places.items():
        leaf = place.layout.theirs(values[path], row.config)
        if place.parts == 1:
            stored[place.name] = leaf
        else:
            whole = stored.get(place.name)
            whole = np.concatenate([np.zeros_like(leaf)] * place.parts, place.axis) if whole is None else whole
            whole = stored[place.name] = whole.astype(np.float32, copy=False)  # whatever the checkpoint's type was
            np.split(whole, place.parts, place.axis)[place.part][...] = leaf
    file = folder / ("model.npz" if archive else "model.safetensors")
    with _writing(folder):
        for copied in beside:
            shutil.copyfile(copied, folder / copied.name)
        if archive:
            np.savez(file, **stored)
        else:
            _save(stored, file)
        _save_head(values, folder)
    return file


def export_lora(
    folder: Folder,
    model: Model,
    trained: Arrays,
    frozen: Arrays,
    *,
    base: Weights = None,
    transformers: Literal[4, 5] = 5,
) -> Path:
    """Writes the trained LoRA as Hugging Face `peft` saves one; returns its file.

    Where transformers' model for classification computes what ours does (BERT's pooler, ViT's class token) the names
    are that model's, and the head goes along as its classifier; a language model's are those of its model for next tokens;
    else the names are those of the bare backbone, and the head is head.safetensors.

    Args:
        base: name or path of the checkpoint, for adapter_config.json.
        transformers: major version of the library that will read it: 5 renamed the modules of ViT and DINOv2, not
            their files; those of BERT and RoBERTa are the same in both.

    Raises:
        ValueError: the backbone has no Hugging Face names, more than LoRA and the head was trained, a leaf is not finite,
            the weights lie in `folder`, or it cannot be written.
    """
    folder = Path(folder).expanduser()
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
    _require_finite(trained, "trained")
    for weights in (model.options.weights, base):
        if weights is not None and Path(weights).expanduser().exists():
            _refuse_over(folder, [ADAPTER, CONFIG, HEAD], Path(weights).expanduser())
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in {**frozen, **trained}.items()}
    prefix, classifier = _task(layout, row)
    causal = model.options.task == "language_model"
    if parts := [layer for layer in layers if layout.place(f"{layer}/kernel", row.config).parts > 1]:
        raise ValueError(
            f"Expected LoRA on layers that others have apart, not on {parts[0]}, which is a part of one of theirs: export the "
            "merged backbone, or train LoRA on others (targets=mlp/*)."
        )
    arrays: dict[str, np.ndarray] = {}
    names = [prefix + layout.place(f"{layer}/kernel", row.config).name.removesuffix(".weight") for layer in layers]
    for published_part, otherwise in layout.renamed if transformers == 5 and row.kind == "image" else ():
        names = [name.replace(published_part, otherwise) for name in names]
    for layer, name in zip(layers, names, strict=True):
        for role, theirs in LORA_NAMES.items():
            if f"{layer}/{role}" in leaves:
                arrays[f"base_model.model.{name}.{theirs}"] = leaves[f"{layer}/{role}"].T
    if classifier:
        arrays[f"base_model.model.{classifier}.weight"] = leaves["head/kernel"].T
        arrays[f"base_model.model.{classifier}.bias"] = leaves["head/bias"]
    options = model.options
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "r": options.rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": names,
        "modules_to_save": [classifier] if classifier else None,
        "task_type": "CAUSAL_LM" if causal else "SEQ_CLS" if classifier and row.kind == "text" else None,
        "inference_mode": True,
    }
    with _writing(folder):
        if not classifier:
            _save_head(leaves, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _save(arrays, folder / ADAPTER)
    return folder / ADAPTER


def read_lora(folder: Folder, model: Model) -> dict[str, np.ndarray]:
    """LoRA's leaves, and the head where it was saved, from what Hugging Face `peft` saved.

    Raises:
        ValueError: rank, alpha or kind are not the model's, leaves are missing, left over, misshapen or not finite, or the
            files are not those of a LoRA (see `lora_options`).
    """
    folder = Path(folder).expanduser()
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
    if not (folder / ADAPTER).is_file():
        raise ValueError(
            f"Expected {folder / ADAPTER} to be a file; save the adapter with safe_serialization=True, a pickle is not read."
        )
    source = open_source(folder / ADAPTER)
    check_kinds(source, source.shapes)
    for stored, stored_shape in source.shapes.items():
        name = stored.removeprefix("base_model.model.").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        name = layout.spelling(next((name.removeprefix(p) for p in prefixes if p and name.startswith(p)), name))
        path = wanted.get(name)
        shape = (model.trained.get(path) or model.frozen[path]).shape if path else None
        if path is None or path in values:
            problems.append(f"{stored} left over" if path is None else f"{stored} there in two spellings")
        elif stored_shape[::-1] != shape:
            problems.append(f"{stored} is {stored_shape}, our {path} {shape}")
        else:
            values[path] = np.ascontiguousarray(source.read(stored).T, np.float32)
            check_finite(source, stored, values[path])
    problems += [
        f"{name} (our {path}) missing"
        for name, path in wanted.items()
        if path not in values and not path.startswith("head/")
    ]
    if problems:
        raise ValueError(
            f"Expected the LoRA in {folder} to fit backbone={model.name!r} leaf by leaf; {'; '.join(problems[:20])}: "
            "build the model with its targets and classes."
        )
    return values


def _row(model: Model) -> Row:
    if ":" in model.name:
        raise ValueError(
            f"Expected backbone={model.name!r} to have a published layout; merge the leaves, and Backbone.restore them."
        )
    o = model.options
    return row(model.name, pool=o.pool, image_size=o.image_size, interpolation=o.interpolation, task=o.task)


def _hugging_face(model: Model) -> Format:
    known = [name for name in _row(model).formats if name in HUGGING_FACE]
    if not known:
        raise ValueError(f"Expected backbone={model.name!r} to have Hugging Face names; those of {HUGGING_FACE} have.")
    return FORMATS[known[0]]


def _task(layout: Format, row: Row) -> tuple[str, str]:
    """Prefix and head of transformers' model for the task where it computes what ours does; a prefix alone, or two times ""."""
    if getattr(row.config, "language_model", False):
        return layout.causal, ""
    if layout.task is None or row.config.pool != layout.task[2]:
        return "", ""
    return layout.task[:2]


def _refuse_over(folder: Path, names: Iterable[str], weights: Path) -> None:
    """Raises `ValueError` if the folder is that of the weights, or one of the names in it is a file of theirs, by whatever link."""
    sources = {weights} if weights.is_dir() else {weights.parent, weights.resolve().parent}
    files = {(s.st_dev, s.st_ino) for source in sources for f in source.iterdir() if f.is_file() for s in (f.stat(),)}
    targets = [(folder / name).stat() for name in names if (folder / name).exists()]
    inside = folder.exists() and any(folder.samefile(source) for source in sources)
    if inside or any((s.st_dev, s.st_ino) in files for s in targets):
        raise ValueError(
            f"Expected folder={str(folder)!r} to be another than that of weights={str(weights)!r}, which an export would write "
            "over; give a new folder."
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder; whatever goes wrong while it is filled is a `ValueError` that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected folder={str(folder)!r} to be one that can be written ({error}); give another folder, or make room there."
        ) from error


def _save_head(leaves: Arrays, folder: Path) -> None:
    """Writes our head beside the rest; a language model has none."""
    if "head/kernel" in leaves:
        _save({"kernel": leaves["head/kernel"], "bias": leaves["head/bias"]}, folder / HEAD)


def _save(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    # safetensors writes what lies in memory: transposed views must be copied first.
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata={"format": "pt"})
