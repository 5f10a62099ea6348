"""One exchange under a cohort's conditions: who reports, after how many steps, and when; docs/network.md has the equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsim.network.clients import Conditions


class Outcome(NamedTuple):
    """One exchange: who reported, with how many steps, and what time it took."""

    reports: np.ndarray  # (M,), bool
    steps: np.ndarray  # (M,), int64: local steps in the reply; 0 where there is none
    late: np.ndarray  # (M,), bool: not ready by the deadline, whether it reported in part or not
    surplus: np.ndarray  # (M,), bool: would have reported, after enough others had
    communication: np.ndarray  # (M,), s: both messages and their latency
    computation: np.ndarray  # (M,), s
    seconds: float  # until the server goes on


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
        "unavailable": c.unavailable,
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
