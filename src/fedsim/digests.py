"""SHA-256 of files: what a record knows its inputs by. No JAX here."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

SHOWN = 16  # hex digits in messages


def file_sha256(file: Path) -> str:
    """SHA-256 of a file in hex digits; each file is read once in a process, as long as its size and time stay.

    Raises:
        OSError: it cannot be read.
    """
    stat = file.stat()
    return _file_sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=256)
def _file_sha256(file: str, *stamp: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown(digest: str | None) -> str:
    """A digest for messages: its first digits."""
    return "none" if digest is None else digest[:SHOWN]
