"""Checkpoint files of three kinds as one thing: names with shapes first, arrays on demand.

Safetensors (Hugging Face, timm), whole or in shards, NumPy archives (Google's AugReg ViTs) and ONNX graphs (packaged
ViT-S/14). Nothing is unpickled: a `.pth` or `.bin` file must be converted once, where torch is.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from fedsim.backbones.json_files import read_object
from fedsim.backbones.layers import Shape

SUFFIXES = (".safetensors", ".npz", ".onnx")
INDEX = ".safetensors.index.json"  # how the name of a list of shards ends
FLOATS = ("float16", "bfloat16", "float32", "float64")
# What safetensors calls them; other types keep its names, such as F8_E4M3.
SAFETENSORS_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


class Source(NamedTuple):
    """An open checkpoint: the shapes and types of its leaves by their published names, and how to read one."""

    file: Path
    shapes: dict[str, Shape]
    kinds: dict[str, str]
    """Type of each leaf, float32 or as its file calls it."""
    read: Callable[[str], np.ndarray]
    """Raises `ValueError` with file and name for a leaf that cannot be read."""
    shards: tuple[Path, ...] = ()
    """The files that `file` lists, where it is an index."""


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint file, or a directory's `model.*` or only checkpoint; reads names and shapes.

    Raises:
        ValueError: there is no such file, or it is not in one of the three forms.
    """
    path = Path(path)
    file = _only_file(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"Expected weights={str(path)!r} to be a file or a directory with model.safetensors; give one."
        )
    if file.suffix in PICKLES:
        raise ValueError(
            f"Expected weights={str(file)!r} to be {', '.join(SUFFIXES)}; a pickle is not read, as that runs code: "
            "convert it once where torch is, by safetensors.torch.save_file(torch.load(FILE), 'model.safetensors')."
        )
    if file.name.endswith(INDEX):
        return _open_shards(file)
    opened = {".npz": _open_npz, ".onnx": _open_onnx}.get(file.suffix, _open_safetensors)
    try:
        source = opened(file)
    except Exception as error:  # each library raises its own classes, by version
        raise ValueError(
            f"Expected weights={str(file)!r} to be a readable {file.suffix.removeprefix('.') or 'safetensors'} file "
            f"({_reason(error)}); fetch or convert it again."
        ) from error

    def read(name: str) -> np.ndarray:
        try:
            return source.read(name)
        except Exception as error:
            raise ValueError(
                f"Expected tensor {name!r} of weights={str(file)!r} to be readable ({_reason(error)}); fetch or convert "
                "the file again."
            ) from error

    return source._replace(read=read)


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _only_file(folder: Path) -> Path:
    named = [folder / f"model{suffix}" for suffix in (*SUFFIXES, INDEX)]
    found = [file for file in named if file.is_file()]
    found = found or [file for suffix in (INDEX, *SUFFIXES) for file in sorted(folder.glob(f"*{suffix}"))]
    return found[0] if len(found) == 1 or found[:1] in ([named[0]], [named[-1]]) else named[0]


def _open_safetensors(file: Path) -> Source:
    with safe_open(file, framework="np") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        kinds = {name: SAFETENSORS_FLOATS.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}
        # One of two names for the same weights is left out of the file: its metadata say for which it is another.
        said = handle.metadata() or {}
    tied = {name: kept for name, kept in said.items() if kept in shapes and name not in shapes}
    shapes |= {name: shapes[kept] for name, kept in tied.items()}
    kinds |= {name: kinds[kept] for name, kept in tied.items()}

    def read(name: str) -> np.ndarray:
        with safe_open(file, framework="np") as handle:
            return handle.get_tensor(tied.get(name, name))

    return Source(file, shapes, kinds, read)


def _open_shards(index: Path) -> Source:
    """A checkpoint in several safetensors files, by the index that says which tensor lies in which.

    Raises:
        ValueError: the index lists no tensors, a file that is not beside it, or a tensor that its file has not.
    """
    remedy = "fetch the index and all its shards again"
    listed = read_object(index, remedy).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"Expected weight_map of {index} to say in which file each tensor lies; {remedy}.")
    shards: dict[str, Source] = {}
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ValueError(f"Expected shard {name!r} of {index} to be a .safetensors file beside it; {remedy}.")
        shards[name] = open_source(index.parent / name)
    lost = next((n for n, shard in listed.items() if n not in shards[shard].shapes), None)
    if lost is not None:
        raise ValueError(f"Expected tensor {lost!r} of {index} to lie in {listed[lost]}; {remedy}.")
    place = {name: shard for shard, source in shards.items() for name in source.shapes} | listed
    return Source(
        index,
        {name: shards[shard].shapes[name] for name, shard in place.items()},
        {name: shards[shard].kinds[name] for name, shard in place.items()},
        lambda name: shards[place[name]].read(name),
        tuple(source.file for source in shards.values()),
    )


def _open_npz(file: Path) -> Source:
    shapes: dict[str, Shape] = {}
    kinds: dict[str, str] = {}
    with zipfile.ZipFile(file) as archive:  # headers alone: numpy.load would read each array to tell its shape
        for entry in archive.namelist():
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                header = (
                    np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(stream)
                name = entry.removesuffix(".npy")
                shapes[name], kinds[name] = tuple(shape), dtype.name

    def read(name: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as archive:
            return archive[name]

    return Source(file, shapes, kinds, read)


ONNX_FLOATS = {1: "<f4", 10: "<f2"}  # data types of onnx.proto that are read


class Tensor(NamedTuple):
    """An initialiser of an ONNX graph: where its raw bytes lie in the file."""

    dtype: str  # "<f4" or "<f2"
    shape: Shape
    start: int
    stop: int


def _open_onnx(file: Path) -> Source:
    """The float32 and float16 initialisers under the names of the module that they came from, read as float32.

    An exporter keeps the names of biases and norms, but folds transposed kernels into anonymous constants: the node
    that multiplies by one is named after its module. Positions are split into the class token's and the patches'.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tensors, nodes = _onnx_graph(data)
    kernels: dict[str, str] = {}  # published name -> anonymous name of the transposed kernel
    positions: dict[str, str] = {}  # operation that takes it -> anonymous name
    for kind, name, inputs in nodes:
        for anonymous in (i for i in inputs if i.startswith("onnx::") and i in tensors):
            if kind == "MatMul":
                kernels[name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"] = anonymous
            elif name.rpartition("/")[0].endswith("/embeddings"):
                positions[kind] = anonymous
    shapes = {name: t.shape for name, t in tensors.items() if not name.startswith("onnx::")}
    shapes |= {name: tensors[anonymous].shape[::-1] for name, anonymous in kernels.items()}
    position = ""
    if {"Concat", "Reshape"} <= positions.keys():
        position = next(n for n in shapes if n.endswith("embeddings.cls_token")).replace(
            "cls_token", "position_embeddings"
        )
        first, rest = tensors[positions["Concat"]].shape, tensors[positions["Reshape"]].shape
        shapes[position] = (1, first[1] + rest[1], rest[2])

    def stored(name: str) -> np.ndarray:
        tensor = tensors[name]
        with file.open("rb") as stream:
            stream.seek(tensor.start)
            found = np.frombuffer(stream.read(tensor.stop - tensor.start), tensor.dtype)
        return found.astype(np.float32, copy=False).reshape(tensor.shape)

    def read(name: str) -> np.ndarray:
        if name == position:
            return np.concatenate([stored(positions["Concat"]), stored(positions["Reshape"])], axis=1)
        return stored(kernels[name]).T if name in kernels else stored(name)

    return Source(file, shapes, dict.fromkeys(shapes, "float32"), read)


def _onnx_graph(data: mmap.mmap) -> tuple[dict[str, Tensor], list[tuple[str, str, list[str]]]]:
    """Initialisers by name, and (operation, name, inputs) of every node. Field numbers are those of onnx.proto."""
    tensors: dict[str, Tensor] = {}
    nodes: list[tuple[str, str, list[str]]] = []

    def text(span: tuple[int, int]) -> str:
        return data[span[0] : span[1]].decode()

    graph = next(span for field, span in _fields(data, 0, len(data)) if field == 7 and isinstance(span, tuple))
    for field, span in _fields(data, *graph):
        if field == 1 and isinstance(span, tuple):  # NodeProto
            parts = [(f, text(s)) for f, s in _fields(data, *span) if f in (1, 3, 4) and isinstance(s, tuple)]
            nodes.append(
                (
                    next((s for f, s in parts if f == 4), ""),
                    next((s for f, s in parts if f == 3), ""),
                    [s for f, s in parts if f == 1],
                )
            )
        elif field == 5 and isinstance(span, tuple):  # TensorProto: 1 dims, 2 data type, 8 name, 9 raw data
            dims: list[int] = []
            kind, name, raw = 0, "", (0, 0)
            for f, value in _fields(data, *span):
                if f == 1:
                    dims += [value] if isinstance(value, int) else _varints(data, *value)
                elif f == 2 and isinstance(value, int):
                    kind = value
                elif f == 8 and isinstance(value, tuple):
                    name = text(value)
                elif f == 9 and isinstance(value, tuple):
                    raw = value
            dtype = ONNX_FLOATS.get(kind, "")
            if dtype and raw[1] - raw[0] == int(dtype[-1]) * math.prod(dims):  # stored in this file
                tensors[name] = Tensor(dtype, tuple(dims), *raw)
    return tensors, nodes


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Fields of a protocol-buffer message: (number, value), or (number, (start, stop)) for bytes; others are skipped."""
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field is longer than its message")
            yield key >> 3, (at, at + size)
            at += size
        elif wire in (1, 5):
            at += struct.calcsize("<q" if wire == 1 else "<i")
        else:
            raise ValueError(f"no protocol buffer: wire type {wire}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        if shift > 63:
            raise ValueError("no protocol buffer: a number is too long")
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(data: mmap.mmap, at: int, end: int) -> list[int]:
    values = []
    while at < end:
        value, at = _varint(data, at)
        values.append(value)
    return values


def hub(name: str, *, fetch: bool = True) -> Path:
    """Folder with a model of the Hugging Face hub (`google/vit-base-patch16-224`), downloaded if need be.

    Raises:
        ValueError: huggingface_hub is not installed, there is no way to the hub, or no such model; without `fetch`, it was
            not downloaded before.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"Expected weights={name!r} to be a file or a directory; a hub name needs huggingface_hub: "
            "pip install 'fedsim-jax[hub]'."
        ) from None
    try:
        wanted = ["*.json", "model.safetensors", "model-*-of-*.safetensors", "*.npz", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not fetch))
    except Exception as error:  # its own classes, those of its HTTP client, OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected weights={name!r} to be a file, a directory, or a model of the hub that can be reached ({reason}); "
            "download it where there is a network and give its directory."
        ) from error


def is_hub_name(weights: str) -> bool:
    """Whether it reads `owner/model` and is no path here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", weights)) and not (
        Path(weights).exists() or Path(weights).suffix in (*SUFFIXES, *PICKLES)
    )
