"""How large an option may be: compared before anything is allocated, compiled or looped over.

The limits are far above what has been simulated, and far below what a machine dies of. `docs/sharp_edges.md` lists them.
"""

from __future__ import annotations

from typing import Any

from fedsim.config.words import positive, shown

COUNT = 2**31 - 1  # clients, rounds and steps are numbered in int32
ROWS = 2**28  # of a round's plan, 4 bytes each: a GiB

# Options above zero, and the most that they may be.
POSITIVE: dict[str, float] = {
    "tokens": 2**16,
    "examples": COUNT,
    "image_store": 2**12,
    "clients": 10**8,  # 12 bytes each
    "alpha": 1e9,
    "classes_per_client": 2**20,
    "rank": 2**16,
    "lora_alpha": 1e9,
    "adapter_width": 2**14,
    "prompt_tokens": 2**12,
    "prefix_tokens": 2**12,
    "last_blocks": 2**12,
    "image_size": 2**12,  # attention over (side / patch)^2 tokens
    "rounds": 10**7,
    "clients_per_round": 10**7,
    "epochs": 10**6,
    "steps": 10**7,
    "batch_size": 2**16,
    "lr": 1e37,
    "head_lr": 1e37,
    "server_lr": 1e37,
    "personal_lr": 1e37,
    "deadline": 1e12,
    "eval_every": COUNT,
    "eval_clients": 10**8,
    "patience": COUNT,
    "epsilon": 100,  # beyond it nothing is promised
    "noise_multiplier": 1e6,
    "clip_norm": 1e30,
    "bands": 10**4,
    # of Speed
    "lanes": 2**16,
    "devices": 2**12,
    "segment_steps": 2**20,
    "eval_batch": 2**16,
    "length_buckets": 2**10,
    "checkpoint_every": COUNT,
}
FROM_ZERO: dict[str, float] = {"min_size": COUNT, "personal_epochs": 10**6, "keep_checkpoints": COUNT}


def in_range(options: Any) -> None:
    """Refuses sizes of `Config` or `Speed` that are zero, negative or beyond every machine.

    Raises:
        ValueError: names option, value, limit and remedy.
    """
    for name in (n for n in POSITIVE if hasattr(options, n)):
        positive(**{name: getattr(options, name)})
    for name, most in (POSITIVE | FROM_ZERO).items():
        if hasattr(options, name):
            at_most(most, **{name: getattr(options, name)})


def at_most(most: float, **values: Any) -> None:
    """Raises `ValueError` for a number above the limit; what is no number ("auto", None) passes."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and value > most:
            raise ValueError(f"Expected {name}={shown(value)} <= {most}, the most that is simulated; lower it.")


def plan_fits(invited: int, passes: int, batch_size: int, option: str) -> None:
    """Refuses a round whose plan has more rows than `ROWS`, before it is made.

    Args:
        invited: clients of a round.
        passes: local steps of each, at least.
        option: what gives the passes, for the message: "steps" or "epochs".

    Raises:
        ValueError: names the options and the number.
    """
    rows = invited * passes * batch_size
    if rows > ROWS:
        raise ValueError(
            f"Expected {option}={passes} x batch_size={batch_size} x {invited} clients of a round = {rows} <= {ROWS} rows of "
            f"its plan; lower {option}, or the others."
        )
