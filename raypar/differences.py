"""How two lots of settings differ, in words that fit on a line: long lists, long values and many settings are cut to what differs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

MOST_SETTINGS, MOST_ITEMS = 8, 3  # that are named; of the others only the number
LONGEST_VALUE = 60  # characters


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], sides: tuple[str, str] = ("then", "now")
) -> str:
    """The settings that are not equal, each with both values; empty when all are equal.

    Args:
        before: settings by name, nested or not; what is missing is None.
        now: the same, at another time or place.
        sides: what the two are called.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
    return _cut(
        (_setting(name, old.get(name), new.get(name), sides) for name in names), len(names), MOST_SETTINGS
    )


def list_differences(name: str, before: Sequence[Any], now: Sequence[Any], sides: tuple[str, str]) -> str:
    """The items that two lists do not share, by their number."""
    absent = object()
    pairs = list(enumerate(zip_longest(before, now, fillvalue=absent)))
    unequal = [(i, a, b) for i, (a, b) in pairs if a != b]

    def shown(value: Any) -> str:
        return "nothing" if value is absent else short(value)

    found = (f"{name} {i}: {shown(a)} {sides[0]}, {shown(b)} {sides[1]}" for i, a, b in unequal)
    lengths = "" if len(before) == len(now) else f"{name}: {len(before)} {sides[0]}, {len(now)} {sides[1]}; "
    return lengths + _cut(found, len(unequal), MOST_ITEMS)


def short(value: Any) -> str:
    """A value as it is written, its middle left out when it is long; of a checksum the beginning."""
    text = repr(value)
    if isinstance(value, str) and len(value) >= 32 and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}..."
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} ... {text[-half:]}"


def _setting(name: str, before: Any, now: Any, sides: tuple[str, str]) -> str:
    if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(repr(now)) > LONGEST_VALUE:
        return list_differences(name, before, now, sides)
    return f"{name}: {short(before)} {sides[0]}, {short(now)} {sides[1]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cut(texts: Iterable[str], count: int, most: int) -> str:
    """The first texts, and how many more there are."""
    more = f" and {count - most} more" if count > most else ""
    return ", ".join(islice(texts, most)) + more
