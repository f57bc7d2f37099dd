"""Label formats: one module each, with a pure ``scan`` (driver) and ``read_labels`` (Ray task)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
# What Ultralytics lists as images, raypar lists.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpeg2000", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True)
class Record:
    """One image and where its labels are.

    Attributes:
        image_id: path relative to its split's image root, forward slashes.
        image_path: absolute local path; empty when the image is generated.
        labels: what the format's ``read_labels`` needs: a path, the boxes themselves, an index.
    """

    image_id: str
    image_path: str
    labels: Any = None


@dataclass(frozen=True)
class Listing:
    """All that a source holds, before any image is opened.

    Attributes:
        class_names: by class id.
        splits: records of each split, in any order.
        notes: sentences for the user, about choices made for them.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Record]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labels:
    """Labels of one image as the source states them: not yet clipped to the image.

    Attributes:
        class_ids: int64 (N,).
        boxes_xywhn: float64 (N, 4) centre x, centre y, width, height over the image's width/height.
        num_duplicates: labels that were equal to another and left out.
    """

    class_ids: NDArray[np.int64]
    boxes_xywhn: NDArray[np.float64]
    num_duplicates: int = 0


def without_duplicates(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The rows, each once, in the order of their first appearance; equal means equal as float32, as in Ultralytics."""
    unique = {np.asarray(row, np.float32).tobytes(): row for row in reversed(rows)}
    return list(reversed(unique.values()))


def labels_from_xyxy(rows: list[tuple[float, ...]], num_classes: int, image_hw: tuple[int, int]) -> Labels:
    """Labels from rows of (class id, x1, y1, x2, y2) in px.

    Raises:
        ValueError: a class id outside ``range(num_classes)``, or a coordinate that is not a number.
    """
    unique = without_duplicates(rows)
    table = np.asarray(unique, np.float64).reshape(-1, 5)
    check_table(table, num_classes)
    height, width = image_hw
    x1, y1, x2, y2 = table[:, 1:].T
    boxes = np.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], axis=1)
    return Labels(table[:, 0].astype(np.int64), boxes, len(rows) - len(unique))


def check_table(table: NDArray[np.float64], num_classes: int) -> None:
    """Checks rows of (class id, 4 coordinates), float64 (N, 5).

    Raises:
        ValueError: a value that is not finite, or a class id that is no class.
    """
    if not np.isfinite(table).all():
        raise ValueError("labels hold a value that is not a finite number")
    ids = table[:, 0]
    wrong = ids[(ids < 0) | (ids >= num_classes) | (ids % 1 != 0)]
    if len(wrong):
        raise ValueError(f"class {wrong[0]:g} is not one of the {num_classes} classes (0 to {num_classes - 1})")


def check_declared_size(declared_hw: tuple[int, int] | None, image_hw: tuple[int, int]) -> None:
    """Boxes in px fit only the image that they were drawn on.

    Raises:
        ValueError: the labels were made for an image of another size (or for the image before its EXIF rotation).
    """
    if declared_hw is not None and declared_hw != image_hw:
        raise ValueError(f"labels are for an image of {declared_hw[1]}x{declared_hw[0]} px, this one has {image_hw[1]}x{image_hw[0]} px")
