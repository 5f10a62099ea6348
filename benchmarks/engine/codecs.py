"""The table of codecs: bits claimed, packed, entropy-coded and as others count them; errors, time, bias, accuracy.

    python benchmarks/engine/codecs.py             # MiniLM-L6 with LoRA on 20 Newsgroups, and digits (fedsim data fetch)
    python benchmarks/engine/codecs.py --small     # random weights and made-up classes, to see that it works

The message: what clients send in the round after `rounds` of FedAvg with LoRA, factors and head. Every codec gets the same
messages. Claimed is the price inside jit, packed the length of a real buffer, which has to be equal and to unpack to the
decoded values bit for bit, or the script stops. Entropy-coded is an extra figure that no record counts.

others: bits a parameter by the formulas of FedJAX (fedjax/aggregators/compression.py) and of google-research/federated
(compressed_communication/aggregators/comparison_methods); both count by leaf, and a rotation's padding not at all.
error: |arrived - sent|^2 / |sent|^2 of one message; of the mean over clients: where it falls with their number, the codec is
unbiased or nearly so. time: of encoding and decoding a client's message, vmapped over all clients as in a round; interleaved
medians. bias: of rotations, by dimension, from many keys, with the noise of so many. accuracy: test accuracy of a small run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import fedsim
from fedsim import wire
from fedsim.config import Config
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.folds import stack
from fedsim.simulation import build, needs, trainers
from fedsim.training.local import fit
from fedsim.wire.codecs import nbytes

sys.path.append(str(Path(__file__).parents[1]))
import report

CODECS = (
    *(
        "none",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "quantise(8)",
        "quantise(4)",
        "qsgd(8)",
        "qsgd(4)",
    ),
    *("nf4", "nnadq(0.01)", "nnadq(0.0001)", "terngrad", "terngrad(0)", "sign", "sign(feedback=True)"),
    *("topk(0.01)", "topk(0.1)", "topk(0.1)+quantise(8)", "randomk(0.1)", "randomk(0.1, feedback=True)", "blocks(0.1)"),
    *("rotate+quantise(4)", "rotate+quantise(4, 4096)", "rotate+qsgd(4)", "drive", "eden(2)", "eden(4)"),
    *("powersgd(2)", "powersgd(2)+quantise(8)", "low_rank(2)", "sketch(2)"),
)
LEARNING = (
    *(
        "none",
        "bfloat16",
        "float8_e4m3fn",
        "quantise(8)",
        "quantise(4)",
        "qsgd(4)",
        "nf4",
        "nnadq(0.01)",
        "terngrad",
        "sign",
    ),
    *("sign(feedback=True)", "topk(0.01)", "topk(0.01, feedback=False)", "randomk(0.1)", "randomk(0.1, feedback=True)"),
    *(
        "blocks(0.1, 32)",
        "rotate+quantise(4)",
        "drive",
        "eden(2)",
        "eden(4)",
        "powersgd(2)",
        "low_rank(2)",
        "sketch(2, feedback=True)",
    ),
)
BIASED = ("drive", "eden(2)", "eden(4)", "rotate+quantise(4)", "rotate+qsgd(4)")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    clients: int = 10
    """Of the message's run, all in every round."""
    rounds: int = 2
    """Before the message."""
    examples: int = 1000
    """Texts of the message's run."""
    repeats: int = 7
    """Timed repeats, after one that compiles."""
    dimensions: tuple[int, ...] = (8, 32, 128, 512, 2048)
    """Of the bias."""
    keys: int = 4000
    """Of the bias."""
    seeds: int = 3
    """Runs of the accuracy."""
    digits_rounds: int = 30
    """Rounds of each."""
    small: bool = False
    """Tiny sizes, to see that it works; no number worth reporting."""


def messages(o: Options) -> dict[str, np.ndarray]:
    """What the clients would send, (clients, ...) by leaf."""
    config = Config(
        dataset="20newsgroups", backbone="minilm_l6", peft="lora", rank=8, head_rounds=0, examples=o.examples, tokens=64,
        clients=o.clients, clients_per_round=o.clients, rounds=o.rounds + 1, lr=3e-3, partition="iid", min_size=1,
        steps=10, batch_size=16,
    )  # fmt: skip
    if o.small:
        config = config.replace(backbone="bert_tiny", weights="random", tokens=16, steps=1)
    needs.fetch_missing(config)
    problem = build.problem(config, report.speed())
    trainer = trainers.trainer(problem, build.phases(config)[0])
    engine, algorithm, task = trainer.engine, trainer.algorithm, trainer.task
    memory, ids = Memory(algorithm.memory, engine.held), np.arange(o.clients)
    server = algorithm.init(jax.random.key(0), engine.held)
    for round in range(1, o.rounds + 1):
        cohort = Cohort(engine, ids, round, memory, lr=trainer.lr(round))
        server, _ = algorithm.round(jax.random.key(round), engine.held, server, cohort)
    cohort = Cohort(engine, ids, o.rounds + 1, memory, lr=trainer.lr(o.rounds + 1))
    local = fit(task.loss, task.optimizer, task.lr, task.passes)
    replies, _ = cohort.exchange(algorithm.params(server), local, stack())
    return {name: np.asarray(leaf) for name, leaf in sorted(replies.replies.items())}


def encoding(name: str) -> Any:
    """(values of one client, key) -> what it sends, and what that costs."""
    codec = wire.codec(name)

    def encode(values: Any, key: Any) -> Any:
        sent = wire.changes(wire.coded(values))
        if codec is not None:
            sent, _ = codec.encode(sent, key, key, codec.init(key, values))
        return sent, sum(jnp.asarray(nbytes(one), jnp.uint32) for one in sent.values())

    return encode


def others(name: str, sizes: dict[str, int], share: float) -> dict[str, float]:
    """Bits a parameter by others' formulas, where they have the codec."""
    total, leaves = sum(sizes.values()), len(sizes)
    jax_, research = 32 * 2 * leaves, 32 * leaves  # scales: two a leaf in FedJAX whatever the codec, one in the other
    counts = {
        "terngrad": {"FedJAX": math.log2(3) * total + jax_, "google-research": 2 * total + research},
        "drive": {"FedJAX": total + jax_, "google-research": total + research},
        "sign": {"google-research": total + 64 * leaves},  # two means: one-bit SGD
        "quantise(8)": {"FedJAX": 8 * total + jax_},
        "quantise(4)": {"FedJAX": 4 * total + jax_},
        "rotate+quantise(4)": {"FedJAX": 4 * total + jax_},
    }
    counts["rotate+qsgd(4)"] = counts["quantise(4)"]
    if name.startswith("topk") and "+" not in name:  # one index for all entries of a leaf
        bits = sum(32 * math.ceil(share * n) + math.ceil(math.log2(max(n, 2))) for n in sizes.values())
        counts[name] = {"google-research": bits}
    return {who: bits / total for who, bits in counts.get(name, {}).items()}


def table(o: Options, sent: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each codec."""
    clients = len(next(iter(sent.values())))
    keys = jax.random.split(jax.random.key(1), clients)
    sizes = {name: leaf[0].size for name, leaf in sent.items()}
    total = sum(sizes.values())
    mean = np.concatenate([leaf.mean(axis=0).ravel() for leaf in sent.values()])
    rows, programs = [], {}
    for name in CODECS:
        many = jax.jit(jax.vmap(encoding(name)))
        after, price = jax.device_get(many(sent, keys))
        codec, lengths, coded, bound, errors, arrived = wire.codec(name), [], [], [], [], []
        for place in range(clients):
            own = jax.tree.map(lambda a, place=place: a[place], after)
            before = wire.changes(wire.coded({leaf: value[place] for leaf, value in sent.items()}))
            packed = wire.pack(own, codec)
            back = wire.unpack(packed, before, codec)
            if len(packed) != int(price[place]) or any(not np.array_equal(back[n], own[n].value) for n in own):
                raise SystemExit(f"{name}: the packed message is not what was claimed")
            lengths.append(len(packed))
            coded.append(wire.entropy_coded(own, codec))
            bound.append(wire.entropy_bound(own))
            found = np.concatenate([own[n].value.ravel() for n in sent])
            truth = np.concatenate([before[n].value.ravel() for n in sent])
            errors.append(float(((found - truth) ** 2).sum() / (truth**2).sum()))
            arrived.append(found)
        share = float(name.partition("(")[2].partition(")")[0].partition(",")[0]) if name.startswith("topk") else 0.0
        programs[name] = many
        rows.append(
            {
                "codec": name,
                "claimed": float(np.mean(price)) * 8 / total,
                "packed": statistics.mean(lengths) * 8 / total,
                "entropy_coded": statistics.mean(coded) * 8 / total,
                "level_entropy": statistics.mean(bound) * 8 / total,
                "others": others(name, sizes, share),
                "error": statistics.mean(errors),
                "error_of_mean": float(((np.mean(arrived, axis=0) - mean) ** 2).sum() / (mean**2).sum()),
            }
        )
        row = rows[-1]
        bits = f"{row['packed']:7.3f} bits, {row['entropy_coded']:7.3f} coded"
        print(f"{name:28} {bits}  error {row['error']:9.2e}, of the mean {row['error_of_mean']:9.2e}", flush=True)
    device = jax.device_put(sent)
    seconds = report.interleaved({n: lambda run=run: run(device, keys) for n, run in programs.items()}, o.repeats)
    bare = statistics.median(seconds["none"])
    for row in rows:
        row["ms_a_client"] = 1000 * (statistics.median(seconds[row["codec"]]) - bare) / clients
    return rows


def decoded_often(name: str, value: np.ndarray, keys: int) -> Any:
    """What arrives of a vector under so many keys, (keys, d)."""
    encode = encoding(name)
    run = jax.jit(jax.vmap(lambda key: encode({"x": jnp.asarray(value)}, key)[0]["x"].value))
    return run(jax.random.split(jax.random.key(2), keys))


def bias(o: Options) -> list[dict[str, Any]]:
    """|mean over keys - x| / |x| of rotations by dimension, of a vector with one large entry and of a normal one."""
    rows = []
    for d in o.dimensions:
        one = np.full(d, 0.1, np.float32)
        one[0] = 1.0
        some = np.random.default_rng(0).normal(size=d).astype(np.float32)
        for (kind, value), name in itertools.product((("one large entry", one), ("normal", some)), BIASED):
            found = np.asarray(decoded_often(name, value, o.keys), np.float64)
            size, mean = np.linalg.norm(value), found.mean(axis=0)
            noise = math.sqrt(((found - mean) ** 2).sum(axis=1).mean() / o.keys) / size
            apart = float(np.linalg.norm(mean - value) / size)
            rows.append({"dimension": d, "vector": kind, "codec": name, "bias": apart, "noise": noise})
    return rows


def accuracy(o: Options) -> list[dict[str, Any]]:
    """Test accuracy on digits, by codec and seed."""
    rows = []
    for name in LEARNING:
        found, losses, up = [], [], []
        for seed in range(o.seeds):
            config = Config(
                dataset="digits", backbone="mlp", peft="full", head_rounds=0, clients=10, clients_per_round=10, min_size=1,
                rounds=o.digits_rounds, optimizer="sgd", lr=0.1, epochs=2, batch_size=16, eval_every=o.digits_rounds,
                codec_up=name, seed=seed,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                run = fedsim.run(config, out=Path(folder) / "run", quiet=True)
            summary = run.summary or {}
            found.append(float(summary["final"]["test"]["accuracy"]))
            losses.append(float(summary["final"]["test"]["loss"]))
            up.append(run.rounds[-1]["total_bytes_up"])
        rows.append({"codec": name, "accuracy": found, "loss": losses, "bytes_up": statistics.mean(up)})
        print(f"digits {name:28} {statistics.mean(found):.4f}  {min(found):.4f} to {max(found):.4f}", flush=True)
    return rows


def main(o: Options) -> None:
    """Measures, prints, writes JSON."""
    if o.small:
        o = dataclasses.replace(
            o, clients=2, rounds=1, examples=100, repeats=2, dimensions=(8,), keys=20, seeds=1, digits_rounds=6
        )
    sent = messages(o)
    parameters = sum(leaf[0].size for leaf in sent.values())
    print(f"{parameters} parameters in {len(sent)} leaves, {o.clients} clients")
    rows = table(o, sent)
    for row in rows:
        print(f"{row['codec']:28} {row['ms_a_client']:8.2f} ms a client")
    biases = bias(o)
    for row in biases:
        print(f"{row['dimension']:5} {row['vector']:16} {row['codec']:20} {row['bias']:.4f}, noise {row['noise']:.4f}")
    shapes = {name: leaf.shape[1:] for name, leaf in sent.items()}
    results = {"parameters": parameters, "leaves": shapes, "table": rows, "bias": biases, "digits": accuracy(o)}
    report.write("codecs", o, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
