"""Polygons and keypoints of COCO annotations, as ``ultralytics.data.converter.convert_coco`` turns them into labels. Pure."""

from __future__ import annotations

from array import array
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.dataset.formats import MAX_VALUE, Labels, boxes_around, labels_from_xyxy, without_duplicates
from raypar.dataset.formats.numbers import is_absent, number, shown

Floats = NDArray[np.float64]
MAX_DISTANCES = 1 << 20  # between points of two polygons, at once


def keypoints_of(categories: list[dict[str, Any]], file: object) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Keypoint shape and flip_idx by the names of ``categories[].keypoints``: what is left becomes what is right.

    Raises:
        ValueError: there are no keypoints, or classes differ in them.
    """
    listed = [category.get("keypoints") for category in categories]
    found = {tuple(map(str, names)) if isinstance(names, list) else () for names in listed}
    if len(found) != 1 or () in found:
        raise ValueError(
            f"{file}: for pose each category needs 'keypoints', the same list of names; for boxes alone set prepare.task=detect"
        )
    names = found.pop()
    mirrored = [_mirrored(name) for name in names]
    has_sides = (
        len(set(names)) == len(names)
        and any(a != b for a, b in zip(names, mirrored, strict=True))
        and all(name in names for name in mirrored)
    )
    return (len(names), 3), tuple(names.index(name) for name in mirrored) if has_sides else ()


def _mirrored(name: str) -> str:
    for this, other in (("left", "right"), ("right", "left"), ("Left", "Right"), ("Right", "Left")):
        if this in name:
            return name.replace(this, other)
    return name


def has_keypoints(annotation: dict[str, Any]) -> bool:
    """Whether any is labelled; annotations without are no part of COCO's evaluation."""
    values = annotation.get("keypoints")
    return not is_absent(values) and (not isinstance(values, list) or any(map(_is_labelled, values[2::3])))


def _is_labelled(visibility: Any) -> bool:
    try:
        return number(visibility) != 0
    except ValueError:
        return visibility is not None  # refused with all of the annotation


def has_outline(annotation: dict[str, Any]) -> bool:
    """Whether an annotation has polygons or a mask."""
    found = annotation.get("segmentation")
    if isinstance(found, list):
        return any(part != [] for part in found)
    return isinstance(found, dict)


def compact(value: Any) -> Any:
    """Polygons as a record keeps them, in float32: a seventh of the memory of lists. Other values are left as they are."""
    if not isinstance(value, list) or not all(map(_is_polygon, value)):
        return value
    try:
        return [array("f", part) for part in value]
    except OverflowError:  # a number that is too large is reported when the labels are read
        return value


def with_polygons(
    rows: list[tuple[float, ...]],
    segmentations: list[Any],
    num_classes: int,
    image_hw: tuple[int, int],
    *,
    is_strict: bool = True,
) -> Labels:
    """Labels for segment, or for detect with polygons.

    Args:
        rows: (class id, x1, y1, x2, y2) px of each annotation.
        segmentations: of each annotation: a list of polygons [x, y, x, y ...] or a run-length encoded mask, of which the outer
            contours are taken; several are joined in one; without any the box is one.
        num_classes: that there are.
        image_hw: px.
        is_strict: a segmentation that is wrong is an error; else the box is taken in its place.

    Raises:
        ValueError: a segmentation, value or class is wrong.
    """
    labels_from_xyxy(rows, num_classes, image_hw)  # checks
    wh = np.array(image_hw[::-1], np.float64)
    lines = without_duplicates(
        [
            (*row, *_polygon(row, segmentation, image_hw, is_strict=is_strict).ravel())
            for row, segmentation in zip(rows, segmentations, strict=True)
        ]
    )
    segments = tuple(np.reshape(line[5:], (-1, 2)) / wh for line in lines)
    if not all(np.isfinite(segment).all() for segment in segments):
        raise ValueError("labels hold a value that is not a finite number")
    boxes = boxes_around(segments)
    # tidied away, as boxes of no area are elsewhere
    boxes[[line[3] <= line[1] or line[4] <= line[2] for line in lines], 2:] = 0
    return Labels(np.array([line[0] for line in lines], np.int64), boxes, len(rows) - len(lines), segments)


def with_keypoints(rows: list[tuple[float, ...]], keypoints: list[Any], num_classes: int, image_hw: tuple[int, int],
                   num_keypoints: int) -> Labels:  # fmt: skip
    """Labels for pose; arguments as of :func:`with_polygons`, ``keypoints`` [x, y, visibility, x ...] px of each annotation.

    Raises:
        ValueError: an annotation has another number of keypoints, or a value or class is wrong.
    """
    lines = []
    for row, values in zip(rows, keypoints, strict=True):
        try:
            if not isinstance(values, list):
                raise ValueError
            points = [number(value) for value in values]
        except ValueError as error:
            raise ValueError(f"keypoints are {shown(values)}, not a list of numbers") from error
        if len(points) != 3 * num_keypoints:
            raise ValueError(
                f"an annotation has {len(points)} keypoint values, {num_keypoints} keypoints need {3 * num_keypoints}"
            )
        lines.append((*row, *points))
    unique = without_duplicates(lines)
    labels = labels_from_xyxy([line[:5] for line in unique], num_classes, image_hw, keep_duplicates=True)
    points_px = np.reshape([line[5:] for line in unique], (-1, num_keypoints, 3))
    if not np.isfinite(points_px).all():
        raise ValueError("labels hold a value that is not a finite number")
    normalised = points_px / [image_hw[1], image_hw[0], 1]
    return Labels(labels.class_ids, labels.boxes_xywhn, len(rows) - len(unique), keypoints=normalised)


def _polygon(
    row: tuple[float, ...], segmentation: Any, image_hw: tuple[int, int], *, is_strict: bool
) -> Floats:
    """The annotation's polygon float64 (P, 2) px."""
    parts: list[Floats] = []
    try:
        parts = contours(segmentation, image_hw) if isinstance(segmentation, dict) else _parts(segmentation)
    except ValueError:
        if is_strict:
            raise
    if not parts:
        _, x1, y1, x2, y2 = row
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    return parts[0] if len(parts) == 1 else merged(parts)


def _parts(segmentation: Any) -> list[Floats]:
    """The polygons float64 (P, 2) px of an annotation; none where it has no segmentation.

    Written as [[x, y, x, y ...], ...], or less strictly: one polygon without the outer list, points as [x, y], numbers as text.
    Parts of one or two points are left out where there are others, as in Ultralytics.

    Raises:
        ValueError: it is something else.
    """
    if is_absent(segmentation):
        return []
    if not isinstance(segmentation, list):
        raise ValueError(f"a segmentation is {shown(segmentation)}, not a list of polygons")
    is_one = all(map(_is_scalar, segmentation)) or _is_points(segmentation)
    parts = [_points(part) for part in ([segmentation] if is_one else segmentation) if part != []]
    found = [part for part in parts if len(part) >= 3]
    if parts and not found:
        raise ValueError(f"a segmentation is {shown(segmentation)}: no polygon of three points")
    # nor NaN: their distances are no numbers
    if not all((np.abs(part) < MAX_VALUE).all() for part in found):
        raise ValueError("a segmentation holds a value that is not a finite number, or is beyond all measure")
    return found


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _is_points(values: Any) -> bool:
    """Whether a list holds points [x, y], and not polygons or numbers."""
    return len(values) > 0 and all(
        isinstance(value, list) and len(value) == 2 and all(map(_is_scalar, value)) for value in values
    )


def _points(part: Any) -> Floats:
    """A polygon float64 (P, 2) from [x, y, x, y ...] or [[x, y], ...]."""
    if isinstance(part, array):
        return np.asarray(part, np.float64).reshape(-1, 2)
    try:
        if _is_scalar(part) or isinstance(part, dict):
            raise ValueError
        values = [value for point in part for value in point] if _is_points(part) else part
        if not all(type(value) in (int, float) for value in values):
            values = [number(value) for value in values]
        return np.asarray(values, np.float64).reshape(-1, 2)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a polygon is {shown(part)}, not a list of x, y, x, y ...") from error


def contours(segmentation: dict[str, Any], image_hw: tuple[int, int]) -> list[Floats]:
    """Outer contours (P, 2) px of a run-length encoded mask; none where it was made for an image of another size.

    Args:
        segmentation: ``size`` [height, width] and ``counts``: how many pixels are off, on, off ..., by columns; numbers, or COCO's text.
        image_hw: px.

    Raises:
        ValueError: the counts are malformed.
    """
    if segmentation.get("size") != list(image_hw):
        return []
    counts = segmentation.get("counts")
    try:
        lengths = np.array(_counts(counts) if isinstance(counts, str) else counts, np.int64)
    except (TypeError, ValueError, OverflowError):
        lengths = np.array([-1])
    num_pixels = image_hw[0] * image_hw[1]
    if (
        lengths.ndim != 1
        or not ((lengths >= 0) & (lengths <= num_pixels)).all()
        or lengths.sum() != num_pixels
    ):
        raise ValueError(
            f"a run-length encoded mask has counts that do not add up to its {num_pixels} pixels"
        )
    is_on = (np.arange(len(lengths)) % 2).astype(np.uint8)
    mask = np.repeat(is_on, lengths).reshape(image_hw[1], image_hw[0]).T
    found, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [contour.reshape(-1, 2).astype(np.float64) for contour in found if len(contour) >= 3]


def _counts(text: str) -> list[int]:
    """COCO's text of counts: each in digits of five bits, the lowest first; from the third on the difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for char in text:
        digit = ord(char) - 48
        value |= (digit & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("a count of a run-length encoded mask is beyond all measure")
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def _is_polygon(part: Any) -> bool:
    return (
        isinstance(part, array | list)
        and len(part) >= 6
        and len(part) % 2 == 0
        and (isinstance(part, array) or all(type(value) in (int, float) for value in part))
    )


def merged(parts: list[Floats]) -> Floats:
    """Polygons joined in one by lines of no width where neighbours are closest: there along one side of each, back along the other.

    As ``ultralytics.data.converter.merge_multi_segment``.
    """
    parts = list(parts)
    joints: list[list[int]] = [[] for _ in parts]
    for i in range(1, len(parts)):
        here, there = _closest(parts[i - 1], parts[i])
        joints[i - 1].append(here)
        joints[i].append(there)
    path = []
    last = len(parts) - 1
    for i, joint in enumerate(joints):
        if len(joint) == 2 and joint[0] > joint[1]:
            joint = [len(parts[i]) - 1 - at for at in joint]
            parts[i] = parts[i][::-1]
        joints[i] = joint
        rolled = np.roll(parts[i], -joint[0], axis=0)
        parts[i] = np.concatenate([rolled, rolled[:1]])
        path.append(parts[i] if i in (0, last) else parts[i][: joint[1] - joint[0] + 1])
    path += [parts[i][abs(joints[i][1] - joints[i][0]) :] for i in range(last - 1, 0, -1)]
    return np.concatenate(path)


def _closest(these: Floats, those: Floats) -> tuple[int, int]:
    """The first pair of points (P, 2) and (Q, 2) that are the least apart."""
    rows = max(1, MAX_DISTANCES // len(those))
    best, pair = np.inf, (0, 0)
    for start in range(0, len(these), rows):
        apart = ((these[start : start + rows, None] - those[None]) ** 2).sum(-1)
        at = int(np.argmin(apart))
        if apart.flat[at] < best:
            best, pair = float(apart.flat[at]), (start + at // len(those), at % len(those))
    return pair
