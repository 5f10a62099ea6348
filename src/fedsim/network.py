"""Clients that are absent, drop out or are slow, and the simulated time of a round. NumPy only, cost in the cohort.

A `Fleet` holds laws, not clients: whether client i is there in round t, and how fast it is, follow from hashes of
(seed, purpose, t, i), so that nothing grows with the population and a resumed run meets the same clients. `Conditions`
are the fleet as one cohort meets it. `outcome` is one exchange under these conditions: who reports, after how many
steps, and when. docs/network.md has the equations.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.config import Config, nearest, parse_call
from fedsim.plan import mix
from fedsim.traces import read_devices, read_trace

Law = Callable[[np.ndarray], np.ndarray]  # client ids (K,) -> a value of each, (K,) float64
UNITS = {"download": 1e6, "upload": 1e6, "latency": 1e-3, "compute": 1.0}  # an option's unit in bit/s, s, steps/s
FREE = {"download": np.inf, "upload": np.inf, "latency": 0.0, "compute": np.inf}  # where nothing is said


class Fleet(NamedTuple):
    """All clients of a run, as laws."""

    seed: int
    wanted: int  # replies that a round waits for
    available: Callable[[np.ndarray, int], np.ndarray] | None  # (ids (K,), round) -> (K,) bool; None: always
    dropout: float
    laws: Mapping[str, Law]  # of download, upload (bit/s), latency (s), compute (steps/s), where they are given
    deadline: float  # s; inf for none
    partial: bool  # late clients report what they have


class Conditions(NamedTuple):
    """What one cohort meets in one round."""

    present: np.ndarray  # (M,), bool: can be reached
    drops: np.ndarray  # (M,), bool: gets the message and never replies
    download: np.ndarray  # (M,), bit/s
    upload: np.ndarray  # (M,), bit/s
    latency: np.ndarray  # (M,), s, each way
    compute: np.ndarray  # (M,), local steps/s
    wanted: int  # replies that the round waits for
    deadline: float  # s
    partial: bool
    timed: bool  # whether anything takes time


class Outcome(NamedTuple):
    """One exchange: who reported, with how many steps, and what time it took."""

    reports: np.ndarray  # (M,), bool
    steps: np.ndarray  # (M,), int64: local steps in the reply; 0 where there is none
    late: np.ndarray  # (M,), bool: not ready by the deadline, whether it reported in part or not
    surplus: np.ndarray  # (M,), bool: would have reported, after enough others had
    communication: np.ndarray  # (M,), s: both messages and their latency
    computation: np.ndarray  # (M,), s
    seconds: float  # until the server goes on


def fleet(config: Config) -> Fleet:
    """The clients that the config describes; reads its files.

    Raises:
        ValueError: an unknown law or impossible values; a file with holes, which is named with line or client.
    """
    laws = {name: law(text, name, config.seed) for name in UNITS if (text := getattr(config, name)) is not None}
    if config.device_table is not None:
        for name, values in read_devices(Path(config.device_table), config.clients).items():
            if name in laws:
                raise ValueError(
                    f"Expected {name}={getattr(config, name)!r} or a column {name} in {config.device_table}, not both; "
                    "leave one out."
                )
            laws[name] = values.__getitem__
    return Fleet(
        seed=config.seed,
        wanted=config.clients_per_round,
        available=availability(config),
        dropout=config.dropout,
        laws={name: _scaled(found, UNITS[name]) for name, found in laws.items()},
        deadline=math.inf if config.deadline is None else config.deadline,
        partial=config.late == "partial",
    )


def reachable(fleet: Fleet, round: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Who can be reached in this round, for `Population.available`."""
    available = fleet.available
    return None if available is None else lambda ids: available(ids, round)


def conditions(fleet: Fleet, ids: np.ndarray, round: int) -> Conditions:
    """What these clients (M,) meet in this round (from 1)."""
    ids = np.asarray(ids, np.int64)
    present = np.ones(len(ids), bool) if fleet.available is None else fleet.available(ids, round)
    values = {name: fleet.laws[name](ids) if name in fleet.laws else np.full(len(ids), FREE[name]) for name in UNITS}
    return Conditions(
        present=present,
        drops=present & (chance(fleet.seed, "dropout", round, ids) < fleet.dropout),
        **values,
        wanted=fleet.wanted,
        deadline=fleet.deadline,
        partial=fleet.partial,
        timed=bool(fleet.laws),
    )


def reliable(members: int) -> Conditions:
    """Everybody is there, reports, and takes no time."""
    everybody = np.ones(members, bool)
    values = {name: np.full(members, FREE[name]) for name in UNITS}
    return Conditions(everybody, ~everybody, **values, wanted=members, deadline=np.inf, partial=False, timed=False)


def outcome(
    conditions: Conditions, invited: np.ndarray, down: np.ndarray, up: np.ndarray, steps: np.ndarray, left: float
) -> Outcome:
    """Who of the invited reports, and when.

    A client takes 2 latency + 8 down / download + steps / compute + 8 up / upload seconds. The server goes on when as
    many as it wants have reported; else at the deadline; without one, when the last reply is there and the last message
    to a client that drops out has arrived.

    Args:
        invited: (M,) bool, who is still in the round.
        down, up: (M,) bytes of the message and of the reply.
        steps: (M,) local steps that each is asked for.
        left: seconds to the deadline; inf for none.
    """
    c = conditions
    arrival = c.latency + 8 * down / c.download
    communication = arrival + c.latency + 8 * up / c.upload
    time_for_steps = left - communication
    in_time = time_for_steps >= steps / c.compute
    done = np.asarray(steps, np.int64)
    if c.partial:
        with np.errstate(invalid="ignore"):  # no time left, and computing takes none
            fit = np.floor(time_for_steps * c.compute)
        done = np.where(in_time, steps, np.clip(np.nan_to_num(fit), 0, steps)).astype(np.int64)
    computation = done / c.compute
    ready = np.minimum(communication + computation, left)

    alive = invited & ~c.drops
    late = alive & ~in_time
    able = alive & (in_time | (done > 0) if c.partial else in_time)
    enough = min(c.wanted, int(invited.sum()))
    first = np.lexsort((np.where(able, ready, np.inf), ~able))[: min(enough, int(able.sum()))]
    reports = np.zeros(len(invited), bool)
    reports[first] = True
    if len(first) == enough:
        seconds = ready[reports].max(initial=0.0)
    elif np.isfinite(left):
        seconds = left
    else:
        seconds = np.where(c.drops, arrival, ready)[invited].max(initial=0.0)
    surplus = able & ~reports
    return Outcome(
        reports, np.where(reports, done, 0), late & ~surplus, surplus, communication, computation, float(seconds)
    )


def figures(conditions: Conditions, outcomes: Sequence[Outcome], total: float) -> dict[str, Any]:
    """What a round's line says about absence and time; `docs/record.md` has the fields.

    Args:
        outcomes: of the round's exchanges, none where nobody could be reached.
        total: simulated seconds of the rounds before.
    """
    c, nobody = conditions, np.zeros(len(conditions.present), bool)
    late = np.any([o.late for o in outcomes] or [nobody], axis=0)
    surplus = np.any([o.surplus for o in outcomes] or [nobody], axis=0)
    counts = {
        "unavailable": int((~c.present).sum()),
        "dropped": int(c.drops.sum()),
        "late": int(late.sum()),
        "surplus": int(surplus.sum()),
    }
    names = ("seconds", "total_seconds", "communication_seconds", "computation_seconds", "granularity", "stragglers")
    if not c.timed:
        return counts | dict.fromkeys(names)
    waiting = c.deadline if np.isfinite(c.deadline) else 0.0
    seconds = sum(o.seconds for o in outcomes) if outcomes else waiting
    done = outcomes[-1].reports if outcomes else nobody
    spent = [
        float(np.sum([getattr(o, name)[done] for o in outcomes], axis=0).mean()) if done.any() else None
        for name in ("communication", "computation")
    ]
    granularity = spent[1] / spent[0] if spent[0] and spent[1] is not None else None
    stragglers = float((late | surplus).sum() / c.present.sum()) if c.present.any() else None
    return counts | dict(zip(names, (seconds, total + seconds, *spent, granularity, stragglers), strict=True))


# --- laws


def chance(seed: int, purpose: str, *numbers: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) by counter: the same for the same seed, purpose and numbers; broadcast, float64."""
    return (mix(seed, zlib.crc32(purpose.encode()), *numbers) >> np.uint64(11)) * 2.0**-53


def law(text: str, option: str, seed: int) -> Law:
    """A value for each client, drawn once: `"20"`, `"uniform(5, 50)"`, `"lognormal(median=20, sigma=0.5)"`, `"choice(5, 20)"`.

    Raises:
        ValueError: an unknown law (the nearest is named), wrong arguments, or values that are not positive.
    """
    name, args, options = parse_call(text, option)
    try:
        constant = float(name)
    except ValueError:
        pass
    else:
        _require_positive([constant], text, option)
        return lambda ids: np.full(len(ids), constant)
    if name not in LAWS:
        raise ValueError(f"Expected {option}={text!r} to be a number or one of {', '.join(LAWS)}{nearest(name, LAWS)}.")
    _require_positive([*args, *options.values()], text, option)
    return _called(LAWS[name], name, args, options, text, option)(seed, option)


def uniform(low: float, high: float) -> Callable[[int, str], Law]:
    """Evenly between `low` and `high`."""
    if not low <= high:
        raise ValueError("low is above high")
    return lambda seed, purpose: lambda ids: low + (high - low) * chance(seed, purpose, ids)


def lognormal(median: float, sigma: float) -> Callable[[int, str], Law]:
    """median exp(sigma z) with z standard normal, by Box and Muller's transform of two uniform numbers (1958)."""

    def made(seed: int, purpose: str) -> Law:
        def values(ids: np.ndarray) -> np.ndarray:
            u, v = chance(seed, purpose, ids), chance(seed, f"{purpose} angle", ids)
            return median * np.exp(sigma * np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v))

        return values

    return made


def choice(*values: float) -> Callable[[int, str], Law]:
    """One of the values, each as likely."""
    if not values:
        raise ValueError("no value to choose from")
    table = np.array(values, float)
    return lambda seed, purpose: lambda ids: table[(chance(seed, purpose, ids) * len(table)).astype(np.int64)]


LAWS: dict[str, Callable[..., Any]] = {"uniform": uniform, "lognormal": lognormal, "choice": choice}


def _called(
    make: Callable[..., Any], name: str, args: list[Any], options: dict[str, Any], text: str, option: str
) -> Any:
    try:
        return make(*args, **options)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{name}() ")
        raise ValueError(f"Expected {option}={text!r} to be a call that {name} takes ({reason}).") from None


def _require_positive(values: Sequence[Any], text: str, option: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"Expected the numbers of {option}={text!r} to be > 0, not {value!r}; leave it out for none."
            )


def _scaled(values: Law, unit: float) -> Law:
    return lambda ids: unit * values(ids)


# --- availability


def availability(config: Config) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """(ids (K,), round from 1) -> (K,) bool, or None for everybody always.

    Raises:
        ValueError: an unknown law, impossible probabilities, or a trace with holes.
    """
    text, seed = config.availability, config.seed
    if config.traced:
        return read_trace(Path(text), config.clients, config.rounds)
    name, args, options = parse_call(text, "availability")
    if name not in ("always", *AVAILABILITY):
        known = ("always", *AVAILABILITY)
        raise ValueError(
            f"Expected availability={text!r} to be one of {', '.join(known)} or a .csv file{nearest(name, known)}."
        )
    if name == "always":
        return None
    probability = _called(AVAILABILITY[name], name, args, options, text, "availability")
    return lambda ids, round: chance(seed, "available", round, ids) < probability(seed, ids, round)


def bernoulli(p: float = 0.8) -> Callable[[int, np.ndarray, int], np.ndarray | float]:
    """Each client in each round with probability `p`."""
    if not 0 < p <= 1:
        raise ValueError(f"0 < p={p} <= 1 does not hold")
    return lambda seed, ids, round: p


def diurnal(
    period: float = 24, peak: float = 0.9, low: float = 0.1
) -> Callable[[int, np.ndarray, int], np.ndarray | float]:
    """A wave over rounds between `low` and `peak`; a client's own phase is uniform over the period."""
    if not (0 <= low <= peak <= 1 and peak > 0):
        raise ValueError(f"0 <= low={low} <= peak={peak} <= 1 with a peak above 0 does not hold")
    if not 0 < period < math.inf:
        raise ValueError(f"period={period} > 0 does not hold")

    def probability(seed: int, ids: np.ndarray, round: int) -> np.ndarray:
        turns = round / period - chance(seed, "phase", ids)
        return low + (peak - low) * (1 + np.cos(2 * np.pi * turns)) / 2

    return probability


AVAILABILITY: dict[str, Callable[..., Any]] = {"bernoulli": bernoulli, "diurnal": diurnal}


def files(config: Config) -> list[Path]:
    """Files that the config's network is read from."""
    named = (config.availability if config.traced else None, config.device_table)
    return [Path(name) for name in named if name is not None]
