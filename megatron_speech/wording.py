"""How messages spell what they share: the nearest known name, and lengths of time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The name of `known` that `name` most likely is a misspelling of, or None where none is close.

    Args:
        name: what was found.
        known: what is valid.
        cutoff: least similarity, 0 to 1 (`difflib.get_close_matches`); 0 always finds one.
    """
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a refusal of `name`: "did you mean 'x'?", or the names that are known."""
    known = sorted(known)
    match = nearest(name, known)
    return f"did you mean {match!r}?" if match else f"known: {', '.join(known) or 'none'}"


def clock(seconds: float) -> str:
    """`seconds` as a clock shows them: 1:02:03 or 2:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`seconds` with units: 12.5 s, or 1,234 h 05 min 06 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 3600):,} h {int(seconds // 60 % 60):02d} min {int(seconds % 60):02d} s"
