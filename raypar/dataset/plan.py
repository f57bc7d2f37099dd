"""The epoch plan: (row counts, seed, epoch, global batch, world size) -> what every rank sees, and when.

Pure: it opens no file and starts nothing. Every process that asks the same question gets the same answer.

An epoch orders the split's row groups at random and lays their rows end to end. That line is cut into *windows* of whole
steps (about ``window_images`` images; the last one takes what is left), and rows are shuffled inside each window. So the
rows of a window come from few row groups, and one task can read, decode and augment it alone.

Words: *step* s of an epoch holds positions ``[s*G, (s+1)*G)`` of its order (G: the global batch); rank r takes the r-th
contiguous share of them. The last step is topped up, so an epoch has ``steps_per_epoch * G`` positions. The *cursor* is the
number of positions seen since the run began: it is all the state that the data has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

WINDOW_IMAGES = 256
_GROUPS, _ROWS = 1, 2  # what a random stream is for; keeps streams of the same (seed, epoch) apart


@dataclass(frozen=True)
class Item:
    """A window of an epoch, from one of its steps on: the unit of work of one task."""

    epoch: int
    window: int
    skip_steps: int = 0  # steps at its start that were seen before a resume


@dataclass(frozen=True)
class Window:
    """Rows that are read together, and the order in which they are seen.

    Attributes:
        first_step: of the epoch.
        row_groups: int64 (R,), indices into the plan's row groups, to be read in this order.
        first_row: rows of the first row group that belong to the window before.
        num_rows: rows of the window, counted from ``first_row`` over the row groups laid end to end.
        order: int64 (S*G,), for each position of the window's S steps the row (0 .. num_rows-1) it shows.
    """

    first_step: int
    row_groups: NDArray[np.int64]
    first_row: int
    num_rows: int
    order: NDArray[np.int64]


def first_images(row_groups: Sequence[int], fraction: float | int) -> tuple[int, ...]:
    """Row groups that hold the first images of a split; of the last one its first rows.

    Args:
        row_groups: images in each row group of the split.
        fraction: as in Ultralytics (``get_split_fraction``): a share, or the number of images if it is an integer.
    """
    left, found = fraction if isinstance(fraction, int) else max(1, round(sum(row_groups) * fraction)), []
    for num_rows in row_groups:
        if left:
            found.append(min(num_rows, left))
            left -= found[-1]
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """All epochs of a run.

    Attributes:
        row_groups: images in each row group of the split, all at least 1; they may be the first ones only, and fewer than a group has.
        seed: of the run.
        global_batch: images a step over all ranks.
        epochs: in the whole run.
        window_images: images a task holds at once, at least; rounded to whole steps.
    """

    row_groups: tuple[int, ...] = field(repr=False)
    seed: int
    global_batch: int
    epochs: int
    window_images: int = WINDOW_IMAGES

    def __post_init__(self) -> None:
        if not self.row_groups or min(self.row_groups) < 1:
            raise ValueError("a plan needs at least one row group, and none may be empty")

    @cached_property
    def num_images(self) -> int:
        return sum(self.row_groups)

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch)

    @property
    def positions_per_epoch(self) -> int:
        """Images shown in an epoch: every image once, and the top-up of the last step."""
        return self.steps_per_epoch * self.global_batch

    @property
    def total_positions(self) -> int:
        """The cursor of a finished run."""
        return self.epochs * self.positions_per_epoch

    @cached_property
    def steps_per_window(self) -> int:
        return min(max(1, round(self.window_images / self.global_batch)), self.steps_per_epoch)

    @cached_property
    def windows_per_epoch(self) -> int:
        return self.steps_per_epoch // self.steps_per_window

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.row_groups, dtype=np.int64)

    @cached_property
    def _epoch(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        # what was worked out does not travel
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def steps_of(self, window: int) -> range:
        """The steps of an epoch that a window holds; the last window takes the remainder."""
        assert 0 <= window < self.windows_per_epoch
        first = window * self.steps_per_window
        last = self.steps_per_epoch if window == self.windows_per_epoch - 1 else first + self.steps_per_window
        return range(first, last)

    def items(self, cursor: int = 0) -> Iterator[Item]:
        """The work that is left from a cursor on, in order."""
        assert 0 <= cursor <= self.total_positions, cursor
        assert cursor % self.global_batch == 0, cursor
        epoch, step = divmod(cursor // self.global_batch, self.steps_per_epoch)
        window = min(step // self.steps_per_window, self.windows_per_epoch - 1)
        skip = step - self.steps_of(window).start
        for e in range(epoch, self.epochs):
            for w in range(window if e == epoch else 0, self.windows_per_epoch):
                yield Item(e, w, skip if (e, w) == (epoch, window) else 0)

    def window(self, epoch: int, window: int) -> Window:
        """What a window of an epoch reads and shows."""
        steps = self.steps_of(window)
        first = steps.start * self.global_batch  # rows before this window: earlier steps are never topped up
        num_rows = min(steps.stop * self.global_batch, self.num_images) - first
        groups, ends = self._laid_out(epoch)
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, first + num_rows, side="left"))
        rows = np.random.default_rng([self.seed, epoch, _ROWS, window]).permutation(num_rows)
        order = np.resize(rows, len(steps) * self.global_batch)  # repeats from the start: the top-up
        return Window(
            steps.start,
            groups[low : high + 1],
            int(first - (ends[low] - self._sizes[groups[low]])),
            num_rows,
            order,
        )

    def _laid_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An epoch's row groups in their order, and the number of rows up to the end of each; kept for two epochs at a time."""
        if epoch not in self._epoch:
            groups = np.random.default_rng([self.seed, epoch, _GROUPS]).permutation(len(self._sizes))
            while len(self._epoch) > 1:
                del self._epoch[next(iter(self._epoch))]
            self._epoch[epoch] = groups, np.cumsum(self._sizes[groups])
        return self._epoch[epoch]

    def share(self, rank: int, world_size: int) -> slice:
        """The part of each step's G positions that a rank takes."""
        assert self.global_batch % world_size == 0, (self.global_batch, world_size)
        per_rank = self.global_batch // world_size
        return slice(rank * per_rank, (rank + 1) * per_rank)


def contiguous_share(num_images: int, rank: int, world_size: int) -> range:
    """A rank's images of a split that is seen once and in order (validation): never padded, none dropped."""
    return range(rank * num_images // world_size, (rank + 1) * num_images // world_size)
