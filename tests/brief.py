"""Cases of a test that takes long: the first ones are among the default tests, the others among the slow ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def brief(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """The cases for `parametrize`, all but the first `keep` of them slow; a tuple is one of several arguments."""
    found = list(cases)
    later = [case if type(case) is tuple else (case,) for case in found[keep:]]
    return [*found[:keep], *(pytest.param(*case, marks=pytest.mark.slow) for case in later)]
