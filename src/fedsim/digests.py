"""SHA-256 of files: what a record knows its inputs by. No JAX here."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

SHOWN = 16  # hex digits in messages
_sets: dict[str, str] = {}  # of `files_sha256`: a hash of the files' stamps -> that of their contents


def file_sha256(file: Path) -> str:
    """SHA-256 of a file in hex digits; each file is read once in a process, as long as its size and time stay.

    Raises:
        OSError: it cannot be read.
    """
    return _file_sha256(str(file.resolve()), *_stamp(file.stat()))


def _stamp(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_size, about.st_mtime_ns, about.st_ino


@functools.lru_cache(maxsize=256)
def _file_sha256(file: str, *stamp: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(files: Mapping[str, Path], went: Callable[[int, int], None] = lambda done, of: None) -> str:
    """SHA-256 of files by name: of their names and contents, in the order of names. Read once, as `file_sha256` does.

    Args:
        files: by the names that count, such as their paths inside a folder; of a folder the name alone counts.
        went: told how many have been read, of how many.

    Raises:
        OSError: one cannot be read.
    """
    stamps, names = hashlib.sha256(), sorted(files)
    folders = set()
    for name in names:
        about = files[name].stat()
        if stat.S_ISDIR(about.st_mode):
            folders.add(name)
            about = None
        stamps.update(repr((name, about and (*_stamp(about), about.st_dev))).encode())
    known = stamps.hexdigest()
    if known not in _sets:
        whole = hashlib.sha256()
        for done, name in enumerate(names, 1):
            digest = ""
            if name not in folders:
                with open(files[name], "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            whole.update(repr((name, digest)).encode())
            went(done, len(names))
        _sets[known] = whole.hexdigest()
    return _sets[known]


def shown(digest: str | None) -> str:
    """A digest for messages: its first digits."""
    return "none" if digest is None else digest[:SHOWN]
