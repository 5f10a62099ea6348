"""The campaign in short: every killed, damaged or misused case ends in the right result or in a clear error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from campaign import damages, kills, options
from campaign.common import BAD, Tally

SECONDS = 25.0


@pytest.fixture(scope="module")
def seed() -> int:
    found = random.SystemRandom().randrange(10**6)
    print(f"campaign seed {found}")  # shown where a test fails
    return found


def assert_none_bad(tally: Tally, least: int) -> None:
    print(tally)
    assert tally.cases >= least, tally
    assert not any(tally.ends[end] for end in BAD), "\n".join([str(tally), *tally.bad])


@pytest.mark.slow
def test_killed_runs_end_as_if_left_alone(seed: int, tmp_path: Path, environment: dict[str, str]) -> None:
    assert_none_bad(kills.campaign(tmp_path, environment, SECONDS, seed), 2)


@pytest.mark.slow
def test_damaged_files_are_read_right_or_refused(seed: int, tmp_path: Path) -> None:
    assert_none_bad(damages.campaign(tmp_path, SECONDS, seed), 20)


def test_odd_options_are_taken_or_refused() -> None:
    """The same few hundred sets each time, so that the default run stays the same; `-m slow` tries others."""
    assert_none_bad(options.campaign(60.0, 0, most=300), 300)


@pytest.mark.slow
def test_odd_options_by_chance(seed: int) -> None:
    assert_none_bad(options.campaign(SECONDS, seed), 300)
