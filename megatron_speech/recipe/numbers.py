"""Integers the way people write them in recipes: 500000, 500_000, 5e5 or "0.5M"."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKMGBT])")
_FACTOR = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def human_integer(value: Any) -> Any:
    """Turn "0.5M", "2k" or 2e6 into an integer; anything else is left to pydantic."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        value = float(match[1].replace("_", "")) * _FACTOR[match[2]]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


TokenCount = Annotated[int, BeforeValidator(human_integer), Field(gt=0)]
"""A positive count of tokens."""
