"""What is said of files that cannot be read or written: the cause, and the remedy that fits it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

MOVE = "move the folder of that name away"


def unreadable(path: Path, error: OSError) -> ValueError:
    """What to say of a file that is there and must not be read."""
    remedy = MOVE if error.errno == errno.EISDIR else "make it so for you"
    return ValueError(f"Expected {path} to be readable ({reason(error)}); {remedy}.")


def unwritten(what: str, error: BaseException) -> OSError:
    """What to say where something could not be written: the cause, and the remedy that fits it."""
    return OSError(f"Expected {what} to be written ({reason(error)}); {remedy_for(error)}.")


def remedy_for(error: BaseException) -> str:
    """What helps against a failed write, by its cause: errors of the system, or of a library that only quotes them."""
    numbers, words = {e.errno for e in causes(error) if isinstance(e, OSError)} | {quoted(error)}, str(error)
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or any(
        word in words for word in ("No space left", "quota", "RESOURCE_EXHAUSTED", "File too large")
    ):
        return "make room or choose another disk"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS} or any(
        word in words for word in ("Permission denied", "PERMISSION_DENIED", "Read-only", "not permitted")
    ):
        return "make its folder writable for you or choose another one"
    if numbers & {errno.ENOENT, errno.ENOTDIR} or "No such file" in words or "NOT_FOUND" in words:
        return "leave the run's folder in its place while the run lasts"
    if errno.EISDIR in numbers:
        return MOVE
    return "see to the cause"


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room, as the next one will."""
    numbers = {e.errno for e in causes(error) if isinstance(e, OSError)} | {quoted(error)}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT})


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from, newest first."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def reason(error: BaseException) -> str:
    """The cause in words, one line: the system's own where it said one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if (number := quoted(error)) is not None:
        return os.strerror(number)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def quoted(error: BaseException) -> int | None:
    """The system's error number that a library quotes, as TensorStore does, under Orbax; None where it quotes none."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None
