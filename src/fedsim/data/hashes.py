"""By which hash a run's record knows its data: names and contents of the files that a set is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fedsim.digests import file_sha256, files_sha256

Went = Callable[[int, int], None]


def sha256(name: str, data_dir: str | None = None, went: Went = lambda done, of: None) -> str | None:
    """SHA-256 of a data set, as `dataset` names it; None of packaged ones, of arrays, and where nothing is there.

    Of a set of the Hugging Face hub, whose files lie in a cache, it is that of the fingerprints that `datasets` gives.

    Args:
        data_dir: where prepared sets of TFDS lie.
        went: told how many files have been read, of how many.

    Raises:
        OSError: a file cannot be read.
        ValueError: a folder without the layout of a set.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "tfds":
        from fedsim.data.tfds import prepared

        folder = prepared(rest, data_dir)
        return None if folder is None else files_sha256(below(folder), went)
    if colon and kind == "hf":
        folder = Path(rest).expanduser()
        if folder.is_dir():
            return files_sha256(below(folder), went)
        from fedsim.data.hugging_face import fingerprint

        found = fingerprint(rest)
        return None if found is None else hashlib.sha256(found.encode()).hexdigest()
    path = Path(name).expanduser()
    if path.is_dir():
        from fedsim.data.folder import members

        return files_sha256(members(path), went)
    return file_sha256(path) if path.is_file() else None


def below(folder: Path) -> dict[str, Path]:
    """The files of a set that a library wrote, by path inside; without hidden ones and what `datasets` caches beside them."""
    inside = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {
        path.as_posix(): file
        for path, file in inside.items()
        if not any(part.startswith(".") for part in path.parts) and not path.name.startswith("cache-")
    }
