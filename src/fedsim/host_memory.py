"""How much memory this process may have: the machine's, or less where a container or a batch system limits it (Linux' cgroups)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEMINFO = Path("/proc/meminfo")
OWN = Path("/proc/self/cgroup")  # the process's groups, a line each: number:controllers:path
GROUPS = Path("/sys/fs/cgroup")
UNKNOWN = 2**63 - 1  # bytes: nothing is refused for want of memory


class Files(NamedTuple):
    """Where a version of cgroups has a group's limit, what is used of it, and the share of that which gives way."""

    limit: str
    used: str
    cached: str  # a line of memory.stat


TWO = Files("memory.max", "memory.current", "inactive_file")
ONE = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total() -> int:
    """Bytes of memory that this process can have at most."""
    return min(
        [physical(), *(limit for folder, files in groups() if (limit := number(folder / files.limit)) is not None)]
    )


def available() -> int:
    """Bytes that this process can still get without another one losing any, within the limits of its groups."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        free = physical()
    for folder, files in groups():
        limit, used = number(folder / files.limit), number(folder / files.used)
        if limit is not None and used is not None:
            free = min(free, limit - used + cached(folder, files))
    return free


def physical() -> int:
    """Bytes of the machine's memory."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return UNKNOWN
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def groups() -> Iterator[tuple[Path, Files]]:
    """The folders of the groups that limit this process: its own and those around it, as far as they can be seen.

    In a container the path may be one of the host, of which only the top is there: it is the container's own group.
    """
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, path = line
        if not controllers:
            tops, files = [GROUPS, GROUPS / "unified"], TWO
        elif "memory" in controllers.split(","):
            tops, files = [GROUPS / "memory"], ONE
        else:
            continue
        for top in tops:
            own = top / path.strip("/")
            yield from ((folder, files) for folder in (own, *own.parents) if folder.is_relative_to(top))


def number(file: Path) -> int | None:
    """A file's number; None where there is no file, or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def cached(folder: Path, files: Files) -> int:
    """Bytes of files that a group keeps in memory and would give up."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(stat[files.cached])
    except (OSError, KeyError, ValueError):
        return 0
