"""Who is in which group, and by what a round draws those whom it asks."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.config import Config
from fedsim.randomness import stream
from fedsim.simulation import groups

TWO = ("small(share=0.25)", "large(share=0.75)", "server()")


def test_every_client_is_in_one_group_and_the_shares_are_those_asked_for() -> None:
    found = groups.members(Config(backbone="mlp", peft="full", groups=TWO), 40)
    assert sorted(np.concatenate(list(found.values()))) == list(range(40))
    assert groups.shares(found) == {"small": 0.25, "large": 0.75}, "the server's own has no clients"


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.25, 3), (10, 0.75, 8), (3, 0.01, 1), (4, 1.0, 4)])
def test_a_group_is_asked_for_its_share_rounded_and_for_one_at_least(count: int, share: float, expected: int) -> None:
    assert groups.asked(count, share) == expected


def test_each_group_draws_by_itself_and_one_architecture_as_ever() -> None:
    def drawn(round: int, group: str) -> list[int]:
        return groups.chance(0, round, group).permutation(100).tolist()

    assert drawn(1, "") == stream(0, "sample 1").permutation(100).tolist()
    assert len({tuple(drawn(round, group)) for round in (1, 2) for group in ("", "small", "large")}) == 6
