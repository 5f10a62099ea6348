"""How Orbax is kept to one process, and quiet."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp


def quiet_orbax() -> None:
    """Keeps what Orbax says to itself and its tracebacks from the terminal; what fails is raised, and told once, here."""
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NotOrbax) for f in logger.filters):
        logger.addFilter(_NotOrbax())
        logging.getLogger("asyncio").addFilter(_not_forgotten)
    if not isinstance(sys.unraisablehook, _NotLate):
        sys.unraisablehook = _NotLate(sys.unraisablehook)


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


def _not_forgotten(record: logging.LogRecord) -> bool:
    """Of several writes that fail, Orbax raises the first one's error; asyncio tells the others' when their tasks are thrown away."""
    return (
        "exception was never retrieved" not in record.getMessage()
        or f"{os.sep}orbax{os.sep}" not in record.getMessage()
    )


class _NotLate:
    """After a failed write, threads of TensorStore answer to a loop of Orbax' that is closed, a traceback for each array."""

    def __init__(self, shown: Callable[[Any], object]) -> None:
        self.shown = shown

    def __call__(self, found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            self.shown(found)


def alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes, the one that holds the folder writes and reads it and waits for no other one."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="fedsim")
