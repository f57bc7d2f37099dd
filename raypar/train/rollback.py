"""What a loss that was not finite leaves behind: how often in a row training went back, and the share of the learning rate. Pure.

It follows from the epochs in which that happened (``nan_restarts.json``) and from the number of epochs that ended, so a resumed run has
the learning rate of one left alone. A good epoch is one that ends at or after the furthest epoch in which the loss was not finite: epochs
before it, trained again from an older checkpoint, prove nothing. So the count starts again only when training has come further than ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Standing(NamedTuple):
    """Where a run stands after its rollbacks.

    ``in_a_row``: rollbacks since the last good epoch. ``halvings``: of the learning rate; each rollback adds one, each good epoch takes one back.
    """

    in_a_row: int
    halvings: int

    @property
    def lr_scale(self) -> float:
        """The share of the learning rate."""
        return 0.5**self.halvings


def standing(epochs: Sequence[int], num_ended: int) -> Standing:
    """Where a run stands.

    Args:
        epochs: in which the loss was not finite, counted from 1, in the order of the rollbacks.
        num_ended: epochs that have ended so far.
    """
    in_a_row = halvings = furthest = 0
    for epoch in epochs:
        num_good = max(0, epoch - furthest)
        in_a_row = 1 if num_good else in_a_row + 1
        halvings = max(0, halvings - num_good) + 1
        furthest = max(furthest, epoch)
    num_good = max(0, num_ended - furthest + 1)
    return Standing(0 if num_good else in_a_row, max(0, halvings - num_good))
