"""Cases are all there, in their order, and all but the first ones are slow."""

from __future__ import annotations

from typing import NamedTuple

from brief import brief


class Named(NamedTuple):
    one: int


def test_the_first_cases_are_as_they_were_and_the_others_slow() -> None:
    found = brief([1, (2, 3), Named(4)], 1)
    assert found[0] == 1
    assert [param.values for param in found[1:]] == [(2, 3), (Named(4),)]  # a named tuple is one value
    assert all([mark.name for mark in param.marks] == ["slow"] for param in found[1:])
    assert brief(iter("ab"), 2) == ["a", "b"]
