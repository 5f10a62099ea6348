"""How numbers and names are written for people: bytes, times, shares, factors; words that nobody reads as commands."""

from __future__ import annotations

import math
import unicodedata


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
    """Bytes exactly, and in MiB, from 1 GiB on in larger units: `1,234,567 B (1.18 MiB)`."""
    return f"{n:,} B" if abs(n) < 1024 else f"{n:,} B ({mebibytes(n)})"


def mebibytes(n: int, digits: int = 2) -> str:
    """Bytes in MiB with digits behind the point, from 1 GiB on in GiB, TiB or PiB: `105.34 MiB`, `63.98 GiB`."""
    value, unit = n / 2**20, "MiB"
    for larger in ("GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.{digits}f} {unit}"


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


def short(seconds: float) -> str:
    """Time with three digits however little it is: `12.3 µs`, `4.56 ms`, and from a second on as `duration`."""
    if seconds <= 0:
        return "0 s"
    if seconds >= 0.9995:
        return duration(seconds)
    return f"{seconds * 1e6:.3g} µs" if seconds < 0.9995e-3 else f"{seconds * 1e3:.3g} ms"


def share(x: float | None, digits: int = 3) -> str:
    """A score or a loss: three digits, `1e+29` in a run that diverges, or a dash where there is none."""
    if x is None or math.isnan(x):
        return "–"
    return f"{x:.{digits}f}" if abs(x) < 100 else f"{x:.1f}" if abs(x) < 9999.95 else f"{x:.0e}"


def times(ratio: float | None) -> str:
    """How many times more something costs: `312x`, `4.1x`, or a dash."""
    return "–" if ratio is None else f"{ratio:,.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x"


TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that turn the direction of what follows


def words(text: object) -> str:
    """A name from data, folders or options as plain words: control characters, which a terminal would obey, as `\\x1b`."""

    def shown(c: str) -> str:
        return ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") or c in TURNS else c

    return "".join(map(shown, str(text)))


def drawn(text: object) -> str:
    """A name as matplotlib draws it: `words`, without the `$` of formulas, and seen in a legend if it begins with `_`."""
    plain = words(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
