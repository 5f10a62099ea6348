"""Odd option sets: each makes a config that can be built, or is refused by a sentence that names an option."""

from __future__ import annotations

import dataclasses
import math
import random
import time
import warnings
from typing import Any

import numpy as np

import fedsim
from fedsim.simulation import build

from .common import REFUSED, RIGHT, UNCLEAR, Tally, clear

NUMBERS = (None, -1, 0, 1, 2, 3, 1.5, 1e-9, 1e400, -math.inf, math.nan, 2**31, 2**63, 10**12, True)
NUMBERS += (np.int64(3), np.float32(0.5))
WORDS = (
    "",
    " ",
    "x",
    "auto",
    "nan",
    "1e400",
    "\x00",
    "😀",
    "../x",
    "my.py:make",
    "a(b",
    "(",
    "f()()",
    "__import__('os')",
)
WORDS += (
    "adam",
    "sgd",
    "adam(b1=2)",
    "sgd(momentum=0.9)",
    "x({[]: 1})",
    "noisy_sgd",
    "sm3",
    "bfloat16",
    "flora",
    "fed_prox(mu=1e400)",
)
WORDS += (
    "sgdr_schedule([])",
    "constant_schedule(-1)",
    "cosine_decay_schedule(1.0, 20)",
    "exponential_decay(1.0, 10, 0.5)",
)
WORDS += ("lora", "lora+bias", "full", "head", "mlp", "bert_tiny", "vit_tiny", "iid", "shards")
WORDS += ("uniform(5, 50)", "uniform(50, 5)", "lognormal(1)", "bernoulli(p=2)")
OTHERS: tuple[Any, ...] = ((), ("query",), ("*",), ("",), ["query"], {"a": 1}, b"x", ("flip", "crop(padding=4)"))


def odd(rng: random.Random) -> Any:
    """A value that somebody could give."""
    return rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, WORDS, OTHERS)))


def tried(changes: dict[str, Any], speed: dict[str, Any]) -> tuple[str, str]:
    """How a set of options ends."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = fedsim.Config(**changes)
            build.check(config, fedsim.Speed(**speed))
    except ValueError as error:
        return (REFUSED if clear(str(error)) else UNCLEAR), str(error)
    except Exception as error:
        return UNCLEAR, f"{type(error).__name__}: {error}"
    return RIGHT, ""


def campaign(seconds: float, seed: int, most: int = 10**9) -> Tally:
    """Option sets for about so many seconds: one to three odd values among ordinary ones."""
    until, rng, tally = time.monotonic() + seconds, random.Random(seed), Tally("option sets")
    fields = [f.name for f in dataclasses.fields(fedsim.Config)]
    speeds = [f.name for f in dataclasses.fields(fedsim.Speed)]
    while time.monotonic() < until and tally.cases < most:
        changes: dict[str, Any] = {"backbone": "mlp", "dataset": "blobs.npz"} if rng.random() < 0.7 else {}
        changes |= {rng.choice(fields): odd(rng) for _ in range(rng.randint(1, 3))}
        speed = {rng.choice(speeds): odd(rng)} if rng.random() < 0.2 else {}
        end, said = tried(changes, speed)
        tally.add(f"{changes} {speed}", end, said)
    return tally
