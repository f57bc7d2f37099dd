"""The epoch plan: (row counts, seed, epoch, global batch, world size) -> what every rank sees, and when.

Pure: it opens no file and starts nothing. Every process that asks the same question gets the same answer.

An epoch orders the split's row groups at random and lays their rows end to end. That line is cut into *windows* of whole
steps (about ``window_images`` images; the last one takes what is left), and rows are shuffled inside each window. So the
rows of a window come from few row groups, and one task can read, decode and augment it alone.

Row groups that were appended to a dataset hold new images only, so they are laid on a line of their own. A window takes from
each line as many rows as one shuffle of all rows would have put there; inside the window they are shuffled together.

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
_GROUPS, _ROWS, _STRATA = (
    1,
    2,
    3,
)  # what a random stream is for; keeps streams of the same (seed, epoch) apart


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
        starts: int64 (R,), the first row of each row group that belongs to the window.
        stops: int64 (R,), the row of each row group after the last one that belongs to it.
        order: int64 (S*G,), for each position of the window's S steps the row it shows: its number among the window's rows laid end to end.
    """

    first_step: int
    row_groups: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return int((self.stops - self.starts).sum())

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Each row group, and its rows that belong to the window."""
        for group, start, stop in zip(self.row_groups, self.starts, self.stops, strict=True):
            yield int(group), slice(int(start), int(stop))


@dataclass(frozen=True)
class Line:
    """An epoch's row groups laid end to end.

    Attributes:
        groups: int64 (R,), indices into the plan's row groups.
        ends: int64 (R,), rows up to the end of each.
    """

    groups: NDArray[np.int64]
    ends: NDArray[np.int64]

    def cut(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The row groups that hold the rows first .. last-1 of the line, and which of their rows: starts and stops."""
        low = int(np.searchsorted(self.ends, first, side="right"))
        high = int(np.searchsorted(self.ends, last, side="left")) + 1 if last > first else low
        ends = self.ends[low:high]
        begins = np.concatenate([self.ends[low - 1 : low] if low else [0], ends[:-1]])[: len(ends)]
        return self.groups[low:high], np.maximum(begins, first) - begins, np.minimum(ends, last) - begins


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


def first_strata(strata: Sequence[int], num_groups: int) -> tuple[int, ...]:
    """What is left of strata, given as numbers of row groups, when only the first row groups are taken."""
    ends = np.minimum(np.cumsum(strata, dtype=np.int64), num_groups)
    return tuple(int(n) for n in np.diff(ends, prepend=0) if n)


@dataclass(frozen=True)
class Plan:
    """All epochs of a run.

    Attributes:
        row_groups: images in each row group of the split, all at least 1; they may be the first ones only, and fewer than a group has.
        seed: of the run.
        global_batch: images a step over all ranks.
        epochs: in the whole run.
        window_images: images a task holds at once, at least; rounded to whole steps.
        strata: numbers of row groups that were shuffled together: those first prepared, then those of each append; unset: all of them were.
    """

    row_groups: tuple[int, ...] = field(repr=False)
    seed: int
    global_batch: int
    epochs: int
    window_images: int = WINDOW_IMAGES
    strata: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.row_groups or min(self.row_groups) < 1:
            raise ValueError("a plan needs at least one row group, and none may be empty")
        assert sum(self.strata) in (0, len(self.row_groups)), "strata hold all row groups"

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
    def _epoch(self) -> dict[int, tuple[list[Line], NDArray[np.int64]]]:
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
        lines, firsts = self._laid_out(epoch)
        cuts = [line.cut(*firsts[window : window + 2, i]) for i, line in enumerate(lines)]
        groups, starts, stops = (np.concatenate(parts) for parts in zip(*cuts, strict=True))
        num_rows = int((stops - starts).sum())
        rows = np.random.default_rng([self.seed, epoch, _ROWS, window]).permutation(num_rows)
        order = np.resize(rows, len(steps) * self.global_batch)  # repeats from the start: the top-up
        return Window(steps.start, groups, starts, stops, order)

    def _laid_out(self, epoch: int) -> tuple[list[Line], NDArray[np.int64]]:
        """An epoch's lines, one for each stratum, and where each window begins on each, int64 (windows + 1, lines); kept for two epochs."""
        if epoch not in self._epoch:
            while len(self._epoch) > 1:
                del self._epoch[next(iter(self._epoch))]
            self._epoch[epoch] = self._lines(epoch), self._firsts(epoch)
        return self._epoch[epoch]

    def _lines(self, epoch: int) -> list[Line]:
        lines, first = [], 0
        for i, num_groups in enumerate(self.strata or (len(self._sizes),)):
            # the first one is the same with and without others
            rng = np.random.default_rng([self.seed, epoch, _GROUPS, *([i] if i else [])])
            groups = first + rng.permutation(num_groups)
            lines.append(Line(groups, np.cumsum(self._sizes[groups])))
            first += num_groups
        return lines

    def _firsts(self, epoch: int) -> NDArray[np.int64]:
        """Where each window begins on each line."""
        # earlier steps are never topped up
        begins = np.arange(self.windows_per_epoch) * self.steps_per_window * self.global_batch
        if len(self.strata) < 2:
            return np.append(begins, self.num_images)[:, None]
        ends = np.cumsum(self.strata)
        sizes = np.diff(np.append(0, np.cumsum(self._sizes))[ends], prepend=0)
        stratum = np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes)
        # one shuffle of all rows: what it puts into each window is what the window takes from each line
        np.random.default_rng([self.seed, epoch, _STRATA]).shuffle(stratum)
        counts = [np.add.reduceat(stratum == i, begins, dtype=np.int64) for i in range(len(sizes))]
        return np.concatenate([np.zeros((1, len(sizes)), np.int64), np.cumsum(counts, axis=1).T])

    def share(self, rank: int, world_size: int) -> slice:
        """The part of each step's G positions that a rank takes."""
        assert self.global_batch % world_size == 0, (self.global_batch, world_size)
        per_rank = self.global_batch // world_size
        return slice(rank * per_rank, (rank + 1) * per_rank)


def contiguous_share(num_images: int, rank: int, world_size: int) -> range:
    """A rank's images of a split that is seen once and in order (validation): never padded, none dropped."""
    return range(rank * num_images // world_size, (rank + 1) * num_images // world_size)
