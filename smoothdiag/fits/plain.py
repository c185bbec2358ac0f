"""Values that JSON can hold: infinities and NaN become one-key dictionaries."""

from __future__ import annotations

import math
from typing import Any

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become one-key dictionaries."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The value that `encode` was given; lists come back as tuples."""
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return _SPECIAL[value["float"]]
        return {name: decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    return value
