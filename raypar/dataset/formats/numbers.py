"""Numbers as sources write them: 7, 7.0, "7" and " 7.0 " are one whole number; true, "1e3x" and "" are none. Pure."""

from __future__ import annotations

import math
import re
from typing import Any

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?", re.ASCII)


def shown(value: Any, limit: int = 60) -> str:
    """A value for a message: on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def number(value: Any) -> float:
    """A number, perhaps written as text; it may be NaN or infinite.

    Raises:
        ValueError: it is something else, or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{shown(value)} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{shown(value)} is not a number") from error


def whole(value: Any) -> int:
    """A whole number, perhaps written as text or with a decimal point.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()) and len(value) < 100:
        return int(value.strip().partition(".")[0])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"{shown(value)} is not a whole number")


def is_absent(value: Any) -> bool:
    """Whether a value is none at all: null, an empty text, or NaN, as which pandas writes it."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "null", "none")
    return value is None or (isinstance(value, float) and math.isnan(value))
