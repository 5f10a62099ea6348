"""Texts in batches of similar length, each cut to a bucket, against all of them padded to `tokens`.

    python benchmarks/data/length_buckets.py             # MiniLM-L6 on 20 Newsgroups (fedsim data fetch brings both)
    python benchmarks/data/length_buckets.py --small     # a tiny BERT on random ids, to see that it works

Timed is what a run computes of every text once or at each evaluation: the frozen encoder, in batches. Compiling is left
out; every further bucket in use compiles one program. Processor time stands beside the wall's: it says more on a shared
machine. For training, where a step's length would be that of its longest text in any lane, the sum of lengths is computed
from plans: as they are, with each client's batches grouped by length, and with the grouped batches in the same order
(longest first) for all clients.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from fedsim import data, peft
from fedsim.config import Config, Speed
from fedsim.core import Passes
from fedsim.data import partition
from fedsim.engine import plan
from fedsim.simulation import build, needs
from fedsim.training import features, lengths
from fedsim.training.lengths import Lengths

sys.path.append(str(Path(__file__).parents[1]))
import report


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "minilm_l6"
    """The frozen encoder."""
    dataset: str = "20newsgroups"
    """Texts."""
    tokens: tuple[int, ...] = (32, 128, 256)
    """Lengths to which texts are cut."""
    examples: int = 1000
    """Texts that are encoded."""
    repeats: int = 3
    """Interleaved repeats."""
    lanes: tuple[int, ...] = (1, 4, 6)
    """Lanes of the plans."""
    small: bool = False
    """Tiny sizes, to see that it works; no timing worth reporting."""


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(o, backbone="bert_tiny", tokens=(64,), examples=200, repeats=2)
    results = [measured(o, tokens) for tokens in o.tokens]
    report.write("length_buckets", o, results)


def measured(o: Options, tokens: int) -> dict[str, Any]:
    """One length to which texts are cut."""
    config = Config(dataset=o.dataset, backbone=o.backbone, tokens=tokens, weights="random", peft="head")
    pad = build.backbone(o.backbone).pad  # type: ignore[union-attr]  # of the table: a user's own has none
    if o.small:
        rng = np.random.default_rng(0)
        of = np.minimum(1 + rng.geometric(0.05, 1000), tokens)
        ids, parts = np.where(np.arange(tokens) < of[:, None], 7, pad).astype(np.int32), None
    else:
        needs.fetch_missing(config)
        dataset = data.load(config, needs.tokenizer(config))
        ids, parts = dataset.x, partition.make(config, dataset)
    texts = lengths.measure(ids, pad, Speed().length_buckets)
    some = np.random.default_rng(0).choice(len(ids), o.examples, replace=False)
    model = peft.build(o.backbone, 20, peft="head", input_shape=(tokens,))
    _, frozen = peft.start(model, "random", 0)
    run = jax.jit(model.prefix)
    held = jax.device_put(frozen)
    of_some = texts._replace(of=texts.of[some])

    def encoded(texts: Lengths | None) -> np.ndarray:
        out = np.empty((len(some), *jax.eval_shape(run, held, ids[:1]).shape[1:]), np.float32)
        for rows, length in lengths.batches(np.arange(len(some)), features.FEATURE_BATCH, texts):
            batch = np.pad(rows, (0, features.FEATURE_BATCH - len(rows)), mode="edge")
            out[rows] = np.asarray(run(held, ids[some[batch], :length]))[: len(rows)]
        return out

    apart = float(np.abs(encoded(None) - encoded(of_some)).max())  # compiles, too
    processor: dict[str, list[float]] = {"padded": [], "buckets": []}

    def timed(name: str, texts: Lengths | None) -> None:
        start = time.process_time()
        encoded(texts)
        processor[name].append(time.process_time() - start)

    variants = {"padded": lambda: timed("padded", None), "buckets": lambda: timed("buckets", of_some)}
    seconds = report.interleaved(variants, o.repeats)
    ratio, processor_ratio = (float(np.median(s["padded"]) / np.median(s["buckets"])) for s in (seconds, processor))
    used = [length or tokens for _, length in lengths.batches(np.arange(len(some)), features.FEATURE_BATCH, of_some)]
    found = {
        "tokens": tokens, "padding": float(1 - texts.of.mean() / tokens), "buckets": texts.buckets,
        "buckets_in_use": sorted(set(used)), "tokens_ratio": float(tokens / np.mean(used)), "seconds": seconds,
        "processor_seconds": processor, "ratio": ratio, "processor_ratio": processor_ratio, "difference": apart,
        "training": [] if parts is None else [in_training(texts, tokens, parts, n) for n in o.lanes],
    }  # fmt: skip
    print(
        f"tokens={tokens}: {found['padding']:.0%} padding, buckets in use {found['buckets_in_use']} of {texts.buckets}"
    )
    print(f"  encoder: {ratio:.2f} times faster, {processor_ratio:.2f} by processor time, {apart:.1e} apart", end="; ")
    print(f"{found['tokens_ratio']:.2f} times fewer tokens")
    for line in found["training"]:
        print(
            "  training, lanes={lanes}: {as_planned:.2f}, grouped {grouped:.2f}, same order {ordered:.2f}".format(
                **line
            )
        )
    if apart > 1e-4:
        raise SystemExit("the buckets give another result")
    return found


def in_training(texts: Lengths, tokens: int, parts: partition.Partition, lanes: int) -> dict[str, float]:
    """How many times fewer tokens ten rounds of ten clients would compute, batches of 8, one epoch."""
    sums = {"padded": 0, "as_planned": 0, "grouped": 0, "ordered": 0}
    for round in range(1, 11):
        rng = np.random.default_rng(round)
        ids = rng.choice(parts.clients, 10, replace=False)
        made = plan.make(ids, parts.rows, parts.offsets, Passes(batch_size=8), 0, round, 1, lanes)
        count, rows, slot = made.count[0], made.rows[0], made.slot[0]
        real = np.arange(8) < count[..., None]  # (T, L, B)
        of = np.where(real, texts.of[rows], 1)
        longest = {
            "as_planned": of.max(axis=2),
            "grouped": np.ones(slot.shape, int),
            "ordered": np.ones(slot.shape, int),
        }
        for lane in range(lanes):
            for one in range(made.member.shape[1]):
                at = np.flatnonzero(slot[:, lane] == one)
                if len(at):
                    falling = np.sort(of[at, lane][real[at, lane]])[::-1][::8]  # the longest of each batch
                    falling = np.pad(falling, (0, len(at) - len(falling)), constant_values=1)
                    longest["ordered"][at, lane], longest["grouped"][at, lane] = falling, rng.permutation(falling)
        sums["padded"] += len(slot) * tokens
        for name, grid in longest.items():
            sums[name] += int(np.take(texts.buckets, np.searchsorted(texts.buckets, grid.max(axis=1))).sum())
    return {"lanes": lanes, **{name: sums["padded"] / value for name, value in sums.items() if name != "padded"}}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
