"""The work that every system is given: W1, W2, W3 and, for a GPU, G, as NumPy arrays that are the same in every environment.

W1: the CNN of federated EMNIST, all 1,206,590 parameters trained; 500 clients of 20-100 examples, 32 a round, batch 20.
W2: ViT-Tiny on 64 px images, 5,489,856 frozen parameters, LoRA r=4 on q and v and the head trained, 38,794 in all; 100
    clients of 32 examples, 16 a round, batch 16.
W3: W2's model and trained part across devices: 512 clients with log-normal sizes (median 9, sigma 0.9, clipped to 2-60),
    128 a round, local batch 4 (W3-4), 8 (W3-8) or 16 (W3-16).
G: for a GPU, 128 clients with W3's law of sizes, 32 a round, 224 px: ViT-B/16 with local batch 8 (G-B-8) or 16 (G-B-16),
    ViT-Ti/16 with 8 (G-Ti-8); trained as in W2. MiniLM-L6 on texts of 128 tokens with 8 (G-L-8), LoRA r=4 on query and
    value and the head over the mean of the tokens.

All: one epoch of SGD at each client, the mean of the clients' parameters weighted by their examples. Images are bytes, and a
model's first operation scales them; texts are token ids, all of one length, so that nothing is masked. Parameters have the
names and layouts of a torch model; LoRA adds x A B with A (in, r) and B (r, out). Everything is drawn from `SEED`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEED = 5
RANK, LORA_SCALE, EPS, PATCH = 4, 2.0, 1e-6, 16
POSITIONS, BERT_EPS = 512, 1e-12
KEPT = "FEDSIM_PEERS_DATA"  # names the folder in which run.py keeps a workload's examples, made once for all systems

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the definitions above."""

    name: str
    model: str
    """`cnn`, `vit` or `bert`."""
    clients: int
    cohort: int
    """Clients in a round."""
    batch_size: int
    lr: float
    """Of the clients' SGD; the server takes the mean as it is."""
    classes: int
    sizes: str
    """Law of the clients' sizes: `uniform`, `equal` or `lognormal`."""
    depth: int = 12
    """Blocks of the transformer."""
    width: int = 192
    heads: int = 3
    image: int = 64
    """Side of the ViT's images in pixels."""
    tokens: int = 128
    """Of each text."""
    vocabulary: int = 30_522
    probe: int = 256
    """Examples that no client has, on which the trained parameters are judged."""


WORKLOADS: dict[str, Workload] = {
    "W1": Workload("W1", "cnn", 500, 32, 20, 0.1, 62, "uniform"),
    "W2": Workload("W2", "vit", 100, 16, 16, 0.05, 10, "equal"),
    "W3-4": Workload("W3-4", "vit", 512, 128, 4, 0.05, 10, "lognormal"),
    "W3-8": Workload("W3-8", "vit", 512, 128, 8, 0.05, 10, "lognormal"),
    "W3-16": Workload("W3-16", "vit", 512, 128, 16, 0.05, 10, "lognormal"),
}

# The wide model and MiniLM get lower rates: at 0.05 the order within clients alone moves the one's loss by over a tenth of the
# fall, and the other's rises.
BASE = {"width": 768, "heads": 12, "image": 224}
GPU_WORKLOADS: dict[str, Workload] = {
    "G-B-8": Workload("G-B-8", "vit", 128, 32, 8, 0.01, 10, "lognormal", **BASE),
    "G-B-16": Workload("G-B-16", "vit", 128, 32, 16, 0.01, 10, "lognormal", **BASE),
    "G-Ti-8": Workload("G-Ti-8", "vit", 128, 32, 8, 0.05, 10, "lognormal", image=224),
    "G-L-8": Workload("G-L-8", "bert", 128, 32, 8, 0.003, 10, "lognormal", depth=6, width=384, heads=12),
}
ALL = WORKLOADS | GPU_WORKLOADS


class Data(NamedTuple):
    """Client i owns the examples offsets[i]:offsets[i + 1]."""

    x: np.ndarray  # (n, H, W, C) uint8, or (n, T) int32
    y: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (clients + 1,) int64
    probe_x: np.ndarray  # (probe, H, W, C) uint8, or (probe, T) int32
    probe_y: np.ndarray  # (probe,) int32

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, (clients,)."""
        return np.diff(self.offsets)

    def client(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """A client's examples in the order in which they lie."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.x[part], self.y[part]


def small(w: Workload) -> Workload:
    """The same work on a few clients and a transformer of one block on little input: seconds, to see that a system works."""
    return dataclasses.replace(w, clients=12, cohort=6, depth=1, image=64, tokens=32, vocabulary=1000, probe=64)


def find(name: str, is_small: bool = False) -> Workload:
    """A workload by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ALL:
        raise ValueError(f"Expected workload={name!r} to be one of {', '.join(ALL)}.")
    return small(ALL[name]) if is_small else ALL[name]


def client_sizes(w: Workload) -> np.ndarray:
    """Examples of each client, (clients,) int64."""
    rng = np.random.default_rng([SEED, 1])
    if w.sizes == "uniform":
        return rng.integers(20, 101, w.clients)
    if w.sizes == "equal":
        return np.full(w.clients, 32)
    return np.clip(np.round(np.exp(rng.normal(math.log(9), 0.9, w.clients))), 2, 60).astype(np.int64)


def data(w: Workload) -> Data:
    """The examples: read where they have been kept, else made."""
    folder = os.environ.get(KEPT)
    if folder is None:
        return made(w)
    with np.load(Path(folder) / f"{w.name}.npz") as kept:
        return Data(*(kept[name] for name in Data._fields))


def keep(w: Workload, folder: Path) -> Data:
    """Makes the examples and leaves them for `data`."""
    examples = made(w)
    np.savez(folder / f"{w.name}.npz", **examples._asdict())
    return examples


def made(w: Workload) -> Data:
    """Labels drawn at random, inputs by their class."""
    return texts(w) if w.model == "bert" else images(w)


def texts(w: Workload) -> Data:
    """Random tokens, half of them from thirty that the class prefers; none is 0, which pads."""
    rng = np.random.default_rng([SEED, 2])
    offsets = np.concatenate([[0], np.cumsum(client_sizes(w))])
    n = int(offsets[-1])
    shape = (n + w.probe, w.tokens)
    preferred = rng.integers(1, w.vocabulary, (w.classes, 30), np.int32)
    y = rng.integers(0, w.classes, shape[0]).astype(np.int32)
    own = preferred[y[:, None], rng.integers(0, preferred.shape[1], shape)]
    x = np.where(rng.random(shape) < 0.5, own, rng.integers(1, w.vocabulary, shape, np.int32))
    return Data(x[:n], y[:n], offsets, x[n:], y[n:])


def images(w: Workload) -> Data:
    """Noisy copies of one random pattern per class."""
    rng = np.random.default_rng([SEED, 2])
    side, channels, coarse = (28, 1, 4) if w.model == "cnn" else (w.image, 3, 8)
    offsets = np.concatenate([[0], np.cumsum(client_sizes(w))])
    count = int(offsets[-1]) + w.probe
    pattern = rng.normal(0, 1, (w.classes, side // coarse, side // coarse, channels)).astype(np.float32)
    pattern = pattern.repeat(coarse, axis=1).repeat(coarse, axis=2)
    y = rng.integers(0, w.classes, count).astype(np.int32)
    pattern = 128 + 30 * pattern
    x = np.empty((count, side, side, channels), np.uint8)
    for start in range(0, count, 16):  # so few stay in a processor's caches
        part = y[start : start + 16]
        noise = rng.standard_normal((len(part), side, side, channels), np.float32)
        noise *= 60
        noise += pattern[part]
        x[start : start + 16] = np.clip(noise, 0, 255, out=noise)
    n = int(offsets[-1])
    return Data(x[:n], y[:n], offsets, x[n:], y[n:])


def weights(w: Workload) -> tuple[Arrays, Arrays]:
    """(trained, frozen) before the first round, float32, under a torch model's names."""
    rng = np.random.default_rng([SEED, 3])

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> Arrays:
        kernel = normal(outputs, inputs, scale=1 / math.sqrt(inputs))
        return {f"{name}.weight": kernel, f"{name}.bias": np.zeros(outputs, np.float32)}

    if w.model == "cnn":
        kernels = {"conv1.weight": normal(32, 1, 3, 3, scale=1 / 3), "conv2.weight": normal(64, 32, 3, 3, scale=1 / 17)}
        biases = {"conv1.bias": np.zeros(32, np.float32), "conv2.bias": np.zeros(64, np.float32)}
        return kernels | biases | linear("dense", 128, 64 * 12 * 12) | linear("head", w.classes, 128), {}

    def norm(name: str) -> Arrays:
        return {f"{name}.weight": np.ones(w.width, np.float32), f"{name}.bias": np.zeros(w.width, np.float32)}

    def lora(attentions: list[str]) -> Arrays:
        found, bound = {}, 1 / math.sqrt(w.width)
        for name in attentions:
            for part in ("q", "v"):
                found[f"{name}.{part}_a"] = rng.uniform(-bound, bound, (w.width, RANK)).astype(np.float32)
                found[f"{name}.{part}_b"] = np.zeros((RANK, w.width), np.float32)
        return found

    def bert() -> Arrays:
        tables = {"word": w.vocabulary, "position": POSITIONS, "token_type": 2}
        found = {f"embeddings.{n}_embeddings.weight": normal(rows, w.width, scale=0.02) for n, rows in tables.items()}
        found |= norm("embeddings.LayerNorm")
        for i in range(w.depth):
            name = f"encoder.layer.{i}"
            for part in ("query", "key", "value"):
                found |= linear(f"{name}.attention.self.{part}", w.width, w.width)
            found |= linear(f"{name}.attention.output.dense", w.width, w.width)
            found |= norm(f"{name}.attention.output.LayerNorm") | linear(
                f"{name}.intermediate.dense", 4 * w.width, w.width
            )
            found |= linear(f"{name}.output.dense", w.width, 4 * w.width) | norm(f"{name}.output.LayerNorm")
        return found

    if w.model == "bert":
        names = [f"encoder.layer.{i}.attention.self" for i in range(w.depth)]
        frozen = bert()
        return lora(names) | linear("head", w.classes, w.width), frozen
    frozen = {
        "cls_token": normal(1, 1, w.width, scale=0.02),
        "pos_embed": normal(1, 1 + (w.image // PATCH) ** 2, w.width, scale=0.02),
        "patch_embed.proj.weight": normal(w.width, 3, PATCH, PATCH, scale=1 / math.sqrt(3 * PATCH * PATCH)),
        "patch_embed.proj.bias": np.zeros(w.width, np.float32),
    }
    for i in range(w.depth):
        frozen |= norm(f"blocks.{i}.norm1") | linear(f"blocks.{i}.attn.qkv", 3 * w.width, w.width)
        frozen |= linear(f"blocks.{i}.attn.proj", w.width, w.width) | norm(f"blocks.{i}.norm2")
        frozen |= linear(f"blocks.{i}.mlp.fc1", 4 * w.width, w.width) | linear(
            f"blocks.{i}.mlp.fc2", w.width, 4 * w.width
        )
    frozen |= norm("norm")
    trained = lora([f"blocks.{i}.attn" for i in range(w.depth)])
    return trained | linear("head", w.classes, w.width), frozen


def cohort(w: Workload, round: int) -> np.ndarray:
    """Clients of a round (from 1), without replacement; (cohort,) int64."""
    return np.random.default_rng([SEED, 4, round]).choice(w.clients, w.cohort, replace=False)


def batches(w: Workload, d: Data, round: int, client: int) -> list[np.ndarray]:
    """A client's batches in a round, as rows of the data; each row once, the last batch may be short."""
    start, stop = d.offsets[client : client + 2]
    rows = start + np.random.default_rng([SEED, 5, round, client]).permutation(int(stop - start))
    return [rows[at : at + w.batch_size] for at in range(0, len(rows), w.batch_size)]


def most_steps(w: Workload, d: Data) -> int:
    """Steps of the largest client."""
    return -(-int(d.sizes.max()) // w.batch_size)


def padded(w: Workload, d: Data, round: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The batches of clients padded to the largest client of all: rows (M, T, B), mask (M, T, B) float32."""
    rows = np.zeros((len(ids), most_steps(w, d), w.batch_size), np.int64)
    mask = np.zeros(rows.shape, np.float32)
    for i, client in enumerate(ids):
        for t, batch in enumerate(batches(w, d, round, int(client))):
            rows[i, t, : len(batch)], mask[i, t, : len(batch)] = batch, 1
    return rows, mask
