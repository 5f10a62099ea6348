"""How numbers are written for people: bytes, times, shares, factors."""

from __future__ import annotations


def size(n: int) -> str:
    """Bytes in binary units, four digits at most: `812 B`, `1.18 MiB`, `21.7 GiB`."""
    if abs(n) < 1024:
        return f"{n} B"
    value = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 999.5 or unit == "PiB":
            break
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"


def exact_size(n: int) -> str:
    """Bytes exactly, and in MiB: `1,234,567 B (1.18 MiB)`."""
    return f"{n:,} B" if abs(n) < 1024 else f"{n:,} B ({n / 2**20:,.2f} MiB)"


def duration(seconds: float) -> str:
    """Time as one reads it: `0.42 s`, `12.3 s`, `2:05 min`, `1:02:05 h`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def share(x: float | None, digits: int = 3) -> str:
    """An accuracy or a loss: three digits, or a dash where there is none."""
    return "–" if x is None else f"{x:.{digits}f}"


def times(ratio: float | None) -> str:
    """How many times more something costs: `312x`, `4.1x`, or a dash."""
    return "–" if ratio is None else f"{ratio:,.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x"
