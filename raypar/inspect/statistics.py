"""Statistics of a split from its label columns: counts that add up, so that any part can be counted anywhere and merged. Pure NumPy.

Everything is an integer in bins that do not depend on the data: the statistics of a million images take as much memory as those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Counts = NDArray[np.int64]
# others: as detect
COLUMNS = {
    "detect": ["height", "width", "class_ids", "boxes_xywhn"],
    "classify": ["height", "width", "class_id"],
}
OCTAVES = 12  # sides of boxes, as a share of the image's longer side: from 2**-12 to 1
FINE, COARSE = 8, 4  # bins an octave
SIDE_BINS, SHAPE_BINS = OCTAVES * FINE, OCTAVES * COARSE
IMAGE_OCTAVES = 16  # sides of images, px: from 1 to 2**16
IMAGE_BINS = IMAGE_OCTAVES * COARSE
ASPECT_OCTAVES = 4  # width / height: from 2**-4 to 2**4, the middle bin around 1
ASPECT_BINS = 2 * ASPECT_OCTAVES * FINE + 1
HEAT_BINS = 48
MAX_BOXES_AN_IMAGE = 1000  # the last bin is this many or more
# at the training size: what augmentation drops; less than a cell of the finest level; COCO's small, medium, large
SIZES_PX, SIZE_NAMES = (2, 8, 32, 96), ("speck", "tiny", "small", "medium", "large")


@dataclass(frozen=True)
class Statistics:
    """Counts over some images.

    Attributes:
        sums: arrays of counts that add up, int64: ``num_images``, ``num_boxes``, ``num_backgrounds`` (); ``images_per_class`` (C,);
            ``sides_per_class`` (C, SIDE_BINS), boxes by the square root of their area over the image's longer side; ``sizes`` (5,), boxes
            between ``SIZES_PX`` at the training size; ``box_shapes`` (SHAPE_BINS, SHAPE_BINS), by width and height over the image's;
            ``centres`` (HEAT_BINS, HEAT_BINS), by y and x; ``boxes_per_image`` (MAX_BOXES_AN_IMAGE + 1,); ``image_sizes``
            (IMAGE_BINS, IMAGE_BINS), by width and height; ``aspects`` (ASPECT_BINS,), of images; ``pixels`` (), the sum.
        lows: int64 (2,), the least height and width, px; the largest int64 when there is no image.
        highs: int64 (3,), the greatest height and width, px, and the most boxes an image; 0 when there is no image.
    """

    sums: dict[str, Counts]
    lows: Counts
    highs: Counts

    @classmethod
    def none(cls, num_classes: int) -> Statistics:
        """The statistics of no image."""
        shapes: dict[str, tuple[int, ...]] = {
            "num_images": (), "num_boxes": (), "num_backgrounds": (), "pixels": (), "images_per_class": (num_classes,),
            "sides_per_class": (num_classes, SIDE_BINS), "sizes": (len(SIZES_PX) + 1,), "box_shapes": (SHAPE_BINS, SHAPE_BINS),
            "centres": (HEAT_BINS, HEAT_BINS), "boxes_per_image": (MAX_BOXES_AN_IMAGE + 1,), "image_sizes": (IMAGE_BINS, IMAGE_BINS),
            "aspects": (ASPECT_BINS,),
        }  # fmt: skip
        return cls(
            {k: np.zeros(v, np.int64) for k, v in shapes.items()},
            np.full(2, np.iinfo(np.int64).max),
            np.zeros(3, np.int64),
        )

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics({k: self.sums[k] + other.sums[k] for k in self.sums}, np.minimum(self.lows, other.lows),
                          np.maximum(self.highs, other.highs))  # fmt: skip

    @property
    def num_images(self) -> int:
        return int(self.sums["num_images"])

    @property
    def num_boxes(self) -> int:
        return int(self.sums["num_boxes"])

    @property
    def num_backgrounds(self) -> int:
        """Images without a box."""
        return int(self.sums["num_backgrounds"])

    @property
    def boxes_per_class(self) -> Counts:
        """int64 (C,)."""
        return np.asarray(self.sums["sides_per_class"].sum(1))

    def median_side(self, class_id: int | None = None) -> float | None:
        """The median box side (square root of the area) over the image's longer side, to about a tenth; of one class or all."""
        sides = self.sums["sides_per_class"]
        return _median(sides.sum(0) if class_id is None else sides[class_id])

    @classmethod
    def of(cls, heights: NDArray[Any], widths: NDArray[Any], counts: NDArray[Any], class_ids: NDArray[Any], boxes_xywhn: NDArray[Any],
           *, num_classes: int, imgsz: int) -> Statistics:  # fmt: skip
        """Counts images with boxes.

        Args:
            heights, widths: (N,), px.
            counts: (N,), boxes of each image.
            class_ids: (M,), of all images one after the other.
            boxes_xywhn: (M, 4), centre x, centre y, width, height over the image's width and height.
            num_classes: C.
            imgsz: px of the longer side in training, for ``sizes``.

        Raises:
            ValueError: a class id that the dataset does not have.
        """
        found = cls.of_images(heights, widths, num_classes=num_classes)
        _check_classes(class_ids, num_classes)
        image = np.repeat(np.arange(len(counts)), counts)
        x, y, w, h = np.asarray(boxes_xywhn, np.float64).reshape(-1, 4).T
        longer = np.maximum(heights, widths)[image]
        side = np.sqrt(w * widths[image] * h * heights[image]) / longer
        found.sums.update(
            num_boxes=np.array(len(class_ids), np.int64), num_backgrounds=np.array((counts == 0).sum(), np.int64),
            images_per_class=np.bincount(np.unique(image * num_classes + class_ids) % num_classes, minlength=num_classes),
            sides_per_class=_histogram2d(class_ids, _octave(side, OCTAVES, FINE), num_classes, SIDE_BINS),
            sizes=np.bincount(np.searchsorted(SIZES_PX, side * imgsz, side="right"), minlength=len(SIZES_PX) + 1),
            box_shapes=_histogram2d(_octave(w, OCTAVES, COARSE), _octave(h, OCTAVES, COARSE), SHAPE_BINS, SHAPE_BINS),
            centres=_histogram2d(_linear(y), _linear(x), HEAT_BINS, HEAT_BINS),
            boxes_per_image=np.bincount(np.minimum(counts, MAX_BOXES_AN_IMAGE), minlength=MAX_BOXES_AN_IMAGE + 1),
        )  # fmt: skip
        found.highs[2] = counts.max(initial=0)
        return found

    @classmethod
    def of_classes(
        cls, heights: NDArray[Any], widths: NDArray[Any], class_id: NDArray[Any], *, num_classes: int
    ) -> Statistics:
        """Counts images that have one class each and no boxes; arrays (N,)."""
        found = cls.of_images(heights, widths, num_classes=num_classes)
        _check_classes(class_id, num_classes)
        found.sums["images_per_class"] = np.bincount(class_id, minlength=num_classes)
        return found

    @classmethod
    def of_images(cls, heights: NDArray[Any], widths: NDArray[Any], *, num_classes: int) -> Statistics:
        """Counts images alone; arrays (N,), px."""
        found = cls.none(num_classes)
        heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        aspect = np.round(np.log2(widths / heights) * FINE).astype(np.int64) + ASPECT_BINS // 2
        bins = [
            np.clip((np.log2(sides) * COARSE).astype(np.int64), 0, IMAGE_BINS - 1)
            for sides in (widths, heights)
        ]
        found.sums.update(
            num_images=np.array(len(heights), np.int64), pixels=np.array((heights * widths).sum(), np.int64),
            image_sizes=_histogram2d(bins[0], bins[1], IMAGE_BINS, IMAGE_BINS),
            aspects=np.bincount(np.clip(aspect, 0, ASPECT_BINS - 1), minlength=ASPECT_BINS),
        )  # fmt: skip
        if len(heights):
            found.lows[:], found.highs[:2] = (heights.min(), widths.min()), (heights.max(), widths.max())
        return found

    @classmethod
    def of_table(cls, table: pa.Table, task: str, *, num_classes: int, imgsz: int) -> Statistics:
        """Counts rows of a shard that have the ``COLUMNS`` of their task."""
        heights, widths = (table[name].to_numpy() for name in ("height", "width"))
        if task == "classify":
            return cls.of_classes(heights, widths, table["class_id"].to_numpy(), num_classes=num_classes)
        ids, boxes = table["class_ids"].combine_chunks(), table["boxes_xywhn"].combine_chunks()
        return cls.of(heights, widths, ids.value_lengths().to_numpy(zero_copy_only=False), ids.flatten().to_numpy(zero_copy_only=False),
                      boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4), num_classes=num_classes, imgsz=imgsz)  # fmt: skip


def columns(task: str) -> list[str]:
    """The columns that are counted: no image is read."""
    return COLUMNS.get(task, COLUMNS["detect"])


def side_of_bin(index: Any) -> Any:
    """The middle of a bin of ``sides_per_class``, over the image's longer side."""
    return 2.0 ** ((np.asarray(index) + 0.5) / FINE - OCTAVES)


def _median(counts: Counts) -> float | None:
    total = int(counts.sum())
    return float(side_of_bin(np.searchsorted(np.cumsum(counts), (total + 1) // 2))) if total else None


def _check_classes(class_ids: NDArray[Any], num_classes: int) -> None:
    if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < num_classes:
        raise ValueError(
            f"a row has class {class_ids.max()}, the dataset has {num_classes} classes: prepare it again"
        )


def _octave(share: NDArray[np.float64], octaves: int, bins: int) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        return np.clip(np.floor((np.log2(share) + octaves) * bins), 0, octaves * bins - 1).astype(np.int64)


def _linear(share: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip((share * HEAT_BINS).astype(np.int64), 0, HEAT_BINS - 1)


def _histogram2d(rows: NDArray[Any], cols: NDArray[Any], num_rows: int, num_cols: int) -> Counts:
    flat = np.bincount(rows.astype(np.int64) * num_cols + cols, minlength=num_rows * num_cols)
    return flat.reshape(num_rows, num_cols).astype(np.int64)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the whole; at least one part."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole
