"""``train.yolo.time``: how many epochs fit into so many hours, as far as is known. Pure: what epochs took is in the history, so a resume decides alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ENDLESS = 1_000_000  # epochs of a plan whose end is not known yet


def epochs_within(hours: float, history: Sequence[dict[str, Any]], otherwise: int) -> int:
    """Whole epochs that fit, by the mean of those that ended; these at least.

    Args:
        hours: of training and validation; starting and standing still do not count.
        history: lines of ``metrics.jsonl``.
        otherwise: before the first epoch's end.
    """
    spent = sum(line["wait_s"] + line["step_s"] + line["validate_s"] for line in history)
    return max(len(history), int(hours * 3600 * len(history) / spent)) if spent > 0 else otherwise


def mosaic_within(hours: float, history: Sequence[dict[str, Any]], close_mosaic: int) -> int:
    """Epochs with mosaic: closed at the first epoch's end that had ``close_mosaic`` to go at most, and never opened again."""
    for ended in range(1, len(history) + 1):
        if epochs_within(hours, history[:ended], ENDLESS) - close_mosaic <= ended:
            return ended
    return ENDLESS
