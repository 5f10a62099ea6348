"""What Orbax' machinery says to itself stays off the terminal, and nothing else does."""

from __future__ import annotations

import logging
import os

from fedsim.record.orbax import quiet_orbax


def test_writes_that_fail_late_are_not_told_twice() -> None:
    """asyncio tells of a task that nobody asked, when it is thrown away; of Orbax' tasks the first error was raised."""
    quiet_orbax()
    logger = logging.getLogger("asyncio")
    path = os.path.join("site-packages", "orbax", "checkpoint", "a.py")

    def shown(message: str) -> bool:
        return bool(logger.filter(logger.makeRecord("asyncio", logging.ERROR, "events.py", 1, message, (), None)))

    late = "Task exception was never retrieved\nfuture: <Task finished coro=<write() done, defined at {}:1>>"
    assert not shown(late.format(path))
    assert shown(late.format("mine.py")) and shown(f"Executing {path} took 3 seconds")
