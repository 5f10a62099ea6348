"""Checkpoint files of three kinds as one thing: names with shapes first, arrays on demand.

Safetensors (Hugging Face, timm), NumPy archives (Google's AugReg ViTs) and ONNX graphs (packaged ViT-S/14). Nothing is
unpickled: a `.pth` or `.bin` file must be converted once, where torch is.
"""

from __future__ import annotations

import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from fedsim.backbones.layers import Shape

SUFFIXES = (".safetensors", ".npz", ".onnx")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


class Source(NamedTuple):
    """An open checkpoint: the shapes of its leaves by their published names, and how to read one."""

    file: Path
    shapes: dict[str, Shape]
    read: Callable[[str], np.ndarray]


def open_source(path: Path) -> Source:
    """Opens a checkpoint file, or a directory's `model.*` or only checkpoint; reads names and shapes.

    Raises:
        ValueError: there is no such file, or it is not in one of the three forms.
    """
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
    opened = {".npz": _open_npz, ".onnx": _open_onnx}.get(file.suffix, _open_safetensors)
    try:
        return opened(file)
    except Exception as error:  # each library raises its own classes, by version
        raise ValueError(
            f"Expected weights={str(file)!r} to be a readable {file.suffix.removeprefix('.') or 'safetensors'} file "
            f"({error})."
        ) from error


def _only_file(folder: Path) -> Path:
    named = [folder / f"model{suffix}" for suffix in SUFFIXES]
    found = [file for file in named if file.is_file()]
    found = found or [file for suffix in SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    return found[0] if len(found) == 1 or named[0] in found else named[0]


def _open_safetensors(file: Path) -> Source:
    with safe_open(file, framework="np") as handle:
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 (no mapping)

    def read(name: str) -> np.ndarray:
        with safe_open(file, framework="np") as handle:
            return handle.get_tensor(name)

    return Source(file, shapes, read)


def _open_npz(file: Path) -> Source:
    shapes: dict[str, Shape] = {}
    with zipfile.ZipFile(file) as archive:  # headers alone: numpy.load would read each array to tell its shape
        for entry in archive.namelist():
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                header = (
                    np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
                )
                shapes[entry.removesuffix(".npy")] = tuple(header(stream)[0])

    def read(name: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as archive:
            return archive[name]

    return Source(file, shapes, read)


class Tensor(NamedTuple):
    """A float32 initialiser of an ONNX graph: where its raw bytes lie in the file."""

    shape: Shape
    start: int
    stop: int


def _open_onnx(file: Path) -> Source:
    """The float32 initialisers under the names of the module that they came from.

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
            return np.frombuffer(stream.read(tensor.stop - tensor.start), "<f4").reshape(tensor.shape)

    def read(name: str) -> np.ndarray:
        if name == position:
            return np.concatenate([stored(positions["Concat"]), stored(positions["Reshape"])], axis=1)
        return stored(kernels[name]).T if name in kernels else stored(name)

    return Source(file, shapes, read)


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
            if kind == 1 and raw[1] - raw[0] == 4 * int(np.prod(dims)):  # float32, stored in this file
                tensors[name] = Tensor(tuple(dims), *raw)
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


def hub(name: str) -> Path:
    """Folder with a model of the Hugging Face hub (`google/vit-base-patch16-224`), downloaded if need be.

    Raises:
        ValueError: huggingface_hub is not installed, there is no way to the hub, or no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"Expected weights={name!r} to be a file or a directory; a hub name needs huggingface_hub: "
            "pip install 'fedsim-jax[hub]'."
        ) from None
    try:
        wanted = ["*.json", "model.safetensors", "*.npz", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=wanted))
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
