"""Which rectangle an image is validated in: Ultralytics sorts a split by aspect ratio and letterboxes each batch to a rectangle of its own.

Runs in: the driver (evaluate) and training worker rank 0, which share the outcome: ``argsort`` may order equal ratios in another way on
another CPU, and which batch such an image is in decides its rectangle. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
SQUARE = (1.0, 1.0)
DEFAULT_MAX_DET = 300  # as in Ultralytics: where it is left alone, images with more labels raise it


@dataclass(frozen=True)
class Rectangles:
    """The batches of a split.

    Attributes:
        sides: float64 (batches, 2): height and width of each batch's rectangle, over imgsz; the longer one is 1.
        position_of: int64 (images,): place of each image, as they were given, in the order in which Ultralytics validates.
        batch: images in a batch; the last one may have fewer.
    """

    sides: NDArray[np.float64]
    position_of: NDArray[np.int64]
    batch: int

    @property
    def batch_of(self) -> NDArray[np.int64]:
        """int64 (images,): the batch of each image."""
        return self.position_of // self.batch

    def weights(self) -> NDArray[np.float64]:
        """float64 (images,), of sum 1: what an image adds to a mean over batches of the batches' own means."""
        num_images = np.bincount(self.batch_of, minlength=len(self.sides))
        return 1.0 / (num_images[self.batch_of] * len(self.sides))


def rectangles(image_ids: Sequence[str], hws: NDArray[np.integer], batch: int) -> Rectangles:
    """The batches that ``BaseDataset.set_rectangle`` of Ultralytics (8.4.190) makes.

    Args:
        image_ids: paths, in any order; Ultralytics lists images in the order of their paths, which decides between equal ratios.
        hws: (images, 2) height and width, px.
        batch: images in a batch.
    """
    listed = _listed(image_ids)
    ratios = (hws[:, 0] / hws[:, 1])[listed]
    by_ratio = (
        ratios.argsort()
    )  # not stable, as in Ultralytics: a stable sort would order equal ratios differently
    ratios = ratios[by_ratio]
    sides = [_sides(ratios[first : first + batch]) for first in range(0, len(ratios), batch)]
    return Rectangles(np.array(sides).reshape(-1, 2), _positions(listed[by_ratio]), batch)


def squares(image_ids: Sequence[str], batch: int) -> Rectangles:
    """Batches in the order of the paths, for tasks without rectangles (classify)."""
    num_batches = -(-len(image_ids) // batch)
    return Rectangles(np.ones((num_batches, 2)), _positions(_listed(image_ids)), batch)


def _positions(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of a permutation."""
    found = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found


def _listed(image_ids: Sequence[str]) -> NDArray[np.int64]:
    """Indices of the images in the order in which Ultralytics lists them."""
    return np.array(sorted(range(len(image_ids)), key=image_ids.__getitem__), np.int64)


def _sides(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """The rectangle of a batch: as flat or as narrow as its least flat or narrow image, and square if it has both kinds."""
    lowest, highest = float(ratios.min()), float(ratios.max())
    if highest < 1:
        return highest, 1.0
    if lowest > 1:
        return 1.0, 1 / lowest
    return SQUARE


def raised_max_det(max_det: int, num_labels: int) -> int:
    """Boxes kept an image, as Ultralytics' ``_check_max_det`` (8.4.190) has it: its default, and no other number, follows the labels.

    Args:
        max_det: that was asked for.
        num_labels: of the image that has most.
    """
    return max(max_det, num_labels) if max_det == DEFAULT_MAX_DET else max_det


class BatchQueue(Generic[Item]):
    """Images that arrive in any order and leave in their batches.

    Args:
        batch_of: of each image of the split.
        shapes: of each batch: images of equal shape can be in one tensor.
        images: which of the split's images arrive here: those of one rank.
        most: images that leave together, at most.
        limit: what may wait, in the unit of ``push``'s ``size``. Beyond it images leave before their batch is complete, together with
            others of their shape.
    """

    def __init__(
        self,
        batch_of: NDArray[np.int64],
        shapes: Sequence[tuple[int, int]],
        images: range,
        *,
        most: int,
        limit: float,
    ):
        self._batch_of, self._shapes = batch_of, shapes
        self._most, self._limit = most, limit
        self._num_absent = np.bincount(batch_of[images.start : images.stop], minlength=len(shapes))
        self._waiting: dict[int, list[tuple[Item, float]]] = {}
        self._size = 0.0

    def push(self, image: int, item: Item, size: float) -> Iterator[list[Item]]:
        """Takes in an image; yields the groups that leave, each of one shape."""
        batch = int(self._batch_of[image])
        self._waiting.setdefault(batch, []).append((item, size))
        self._num_absent[batch] -= 1
        self._size += size
        if not self._num_absent[batch]:
            yield from self._taken([batch])
        while self._size > self._limit:
            yield from self._taken(self._fullest())

    def _fullest(self) -> list[int]:
        """The waiting batches of the shape of which most images wait."""
        alike: dict[tuple[int, int], list[int]] = {}
        for batch in self._waiting:
            alike.setdefault(self._shapes[batch], []).append(batch)
        return max(alike.values(), key=lambda batches: sum(len(self._waiting[batch]) for batch in batches))

    def _taken(self, batches: list[int]) -> Iterator[list[Item]]:
        found = [pair for batch in batches for pair in self._waiting.pop(batch)]
        self._size -= sum(size for _, size in found)
        for first in range(0, len(found), self._most):
            yield [item for item, _ in found[first : first + self._most]]
