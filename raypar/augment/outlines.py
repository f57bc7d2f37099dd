"""Polygons, corners of rotated boxes and keypoints: cut at the edges and drawn, as Ultralytics does it (8.4.190). Pure NumPy and OpenCV.

Letters: N instances of an image, P points of a polygon, K keypoints, S the output's side in px. Points are (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import hull, mapped

Floats = NDArray[np.float64]
Points = NDArray[np.float32]
NUM_POINTS = 1000  # of a polygon: YOLODataset.update_labels_info
MAX_PASTED_OVERLAP = 0.3  # CopyPaste
_CORNERS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)


@dataclass(frozen=True)
class Outlines:
    """Polygons that only boxes are wanted of: one after the other, each with its own points alone.

    An object has about 25 of them and 1000 when it is made dense; to move labels takes a tenth of the time.

    Attributes:
        points: float32 (T, 2).
        counts: intp (N,), points of each polygon, at least one.
        num_dense: intp (N,), how many points each has in :func:`densify`, which depends on the others of its image.
    """

    points: Points
    counts: NDArray[np.intp]
    num_dense: NDArray[np.intp]

    @classmethod
    def of(cls, polygons: Sequence[Points]) -> Outlines:
        """The polygons (P, 2) of one image."""
        counts = np.array([len(polygon) for polygon in polygons], np.intp)
        points = np.concatenate([np.zeros((0, 2), np.float32), *polygons])
        return cls(points, counts, np.full(len(counts), _num_dense(polygons), np.intp))

    @classmethod
    def joined(cls, parts: Sequence[Outlines]) -> Outlines:
        """The polygons of several images."""
        return cls(
            np.concatenate([part.points for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.num_dense for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, is_taken: NDArray[np.bool_]) -> Outlines:
        """Some of them, in their order; bool (N,)."""
        points = self.points[np.repeat(is_taken, self.counts)]
        return Outlines(points, self.counts[is_taken], self.num_dense[is_taken])

    def placed(self, times: Floats, plus: Floats) -> Outlines:
        """Each polygon scaled and shifted by its own numbers (N, 2)."""
        times, plus = np.repeat(times, self.counts, axis=0), np.repeat(plus, self.counts, axis=0)
        return Outlines((self.points * times + plus).astype(np.float32), self.counts, self.num_dense)

    def extent(self, points: Points) -> tuple[Points, Points]:
        """Least and greatest coordinates (N, 2) of each polygon, of its own points or of those (T, 2) in their place."""
        starts = np.cumsum(self.counts) - self.counts
        return np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)

    def polygon(self, i: int, points: Points) -> Points:
        """The i-th of them (P, 2); ``points`` as for :meth:`extent`."""
        end = int(self.counts[: i + 1].sum())
        return points[end - int(self.counts[i]) : end]

    def visible_boxes(self, matrix: Floats, size: int, canvas_wh: tuple[int, int] | None = None) -> Floats:
        """Boxes_xyxy float64 (N, 4), px, of what the output shows, as of dense polygons.

        Args:
            matrix: canvas -> output.
            size: S.
            canvas_wh: of a mosaic, whose edges cut polygons before the map; None: nothing is cut there.
        """
        if not len(self):
            return np.zeros((0, 4))
        moved = mapped(self.points.astype(np.float64), matrix).astype(np.float32)
        low, high = self.extent(moved)
        boxes, is_cut = _whole_boxes(low, high, size)
        if canvas_wh is not None:
            low, high = self.extent(self.points)
            leaves_canvas = ((low < 0) | (high > canvas_wh)).any(1)
            is_cut &= ~leaves_canvas
            # what its edges leave of a polygon lies within what they leave of its box
            on_canvas = np.concatenate([low, high], 1).clip(0, [*canvas_wh, *canvas_wh]).astype(np.float64)
            around = hull(on_canvas, matrix).astype(np.float32)
            boxes_there, is_dense = _whole_boxes(around[:, :2], around[:, 2:], size)
            if matrix[0, 1] or matrix[1, 0] or matrix[2, :2].any():
                # turned, it need not touch the sides of that
                is_dense = np.asarray(boxes_there.any(1))
            boxes[leaves_canvas] = boxes_there[leaves_canvas]
            is_dense &= leaves_canvas
            boxes[is_dense] = self._cut_boxes(np.flatnonzero(is_dense), matrix, size, canvas_wh)
        boxes[is_cut] = _seen(moved[np.repeat(is_cut, self.counts)], self.counts[is_cut], size)
        return boxes

    def _cut_boxes(
        self, which: NDArray[np.intp], matrix: Floats, size: int, canvas_wh: tuple[int, int]
    ) -> Floats:
        """Boxes of some polygons whose points are brought to the canvas' edges first: for that they must be dense."""
        num_points = int(self.num_dense.max())
        found = np.zeros((len(which), 4))
        for place, i in enumerate(which):
            dense = _resampled(self.polygon(i, self.points), int(self.num_dense[i]))
            on_canvas = _resampled(dense, num_points).clip(0, canvas_wh)
            moved = mapped(on_canvas.astype(np.float64), matrix).astype(np.float32)
            found[place] = visible_boxes(moved[None], size)[0]
        return found


def _num_dense(polygons: Sequence[Points]) -> int:
    longest = max((len(polygon) for polygon in polygons), default=0)
    return longest + 1 if longest > NUM_POINTS else NUM_POINTS


def densify(polygons: Sequence[NDArray[np.float32]]) -> Points:
    """Polygons (P, 2) of any number of points, all with 1000 (or one more than the longest), none of their own lost.

    Only points are cut at an edge, so polygons need many (ultralytics.utils.ops.resample_segments).
    """
    num_points = _num_dense(polygons)
    return (
        np.stack([_resampled(p, num_points) for p in polygons])
        if len(polygons)
        else np.zeros((0, num_points, 2), np.float32)
    )


def resampled(polygons: Points, num_points: int) -> Points:
    """Polygons (N, P, 2) with another number of points each (ultralytics.utils.ops.resample_segments)."""
    found = [_resampled(polygon, num_points) for polygon in polygons]
    return np.reshape(found, (-1, num_points, 2)).astype(np.float32)


def _resampled(polygon: Points, num_points: int) -> Points:
    if len(polygon) == num_points:
        return polygon
    closed = np.concatenate([polygon, polygon[:1]])
    own = np.arange(len(closed))
    at = np.linspace(0, len(closed) - 1, num_points - len(closed) if len(closed) < num_points else num_points)
    at = np.insert(at, np.searchsorted(at, own), own) if len(closed) < num_points else at
    return np.stack([np.interp(at, own, closed[:, axis]) for axis in (0, 1)], 1).astype(np.float32)


def join(polygons: Sequence[Points]) -> Points:
    """Arrays (N, P, 2) one after the other; where P differs, all get the largest."""
    num_points = max(p.shape[1] for p in polygons)
    return np.concatenate([p if p.shape[1] == num_points else np.stack([_resampled(q, num_points) for q in p])
                           for p in polygons if len(p)] or [np.zeros((0, num_points, 2), np.float32)])  # fmt: skip


def visible_boxes(polygons: Points, size: int) -> Floats:
    """Boxes_xyxy float64 (N, 4), px, of what of each polygon lies within [0, S] x [0, S]; zeros for nothing."""
    boxes, is_cut = _whole_boxes(*_extent(polygons), size)
    cut = polygons[is_cut]
    boxes[is_cut] = _seen(cut.reshape(-1, 2), np.full(len(cut), polygons.shape[1]), size)
    return boxes


def _whole_boxes(low: NDArray[Any], high: NDArray[Any], size: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Boxes of polygons by their extents (N, 2), zeros for those outside; and which of them an edge of the output cuts."""
    boxes = np.concatenate([low, high], 1).astype(np.float64)
    is_inside, is_outside = ((low >= 0) & (high <= size)).all(1), ((high < 0) | (low > size)).any(1)
    boxes[is_outside] = 0
    return boxes, np.asarray(~is_inside & ~is_outside)


def _extent(polygons: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Least and greatest coordinates (N, 2) of polygons (N, P, 2); over a last axis it takes a tenth of the time."""
    by_axis = np.ascontiguousarray(polygons.transpose(0, 2, 1))
    return by_axis.min(-1), by_axis.max(-1)


def clipped(polygons: Points, low: NDArray[Any], high: NDArray[Any]) -> Points:
    """Polygons (N, P, 2), each point brought between ``low`` and ``high`` (N or 1, 2)."""
    inside = np.empty_like(polygons)
    for axis in (0, 1):  # one after the other: loops of P
        np.clip(
            polygons[..., axis],
            low[:, None, axis],
            high[:, None, axis],
            out=inside[..., axis],
            casting="same_kind",
        )
    return inside


def _seen(points: Points, counts: NDArray[np.intp], size: int) -> Floats:
    """Boxes float64 (N, 4) of what lies within [0, S] x [0, S] of polygons, zeros for nothing.

    The hulls of the points inside, of where edges cross the sides, and of the corners that lie inside (ops.segment2box).

    Args:
        points: float32 (T, 2), of one polygon after the other.
        counts: (N,), how many points each has.
        size: S.
    """
    if not len(counts):
        return np.zeros((0, 4))
    owner, ends = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = ends - counts
    after = points[following]
    low, high = np.full((len(counts), 2), np.inf, np.float32), np.full((len(counts), 2), -np.inf, np.float32)

    def reach(whose: NDArray[np.intp], found: Points) -> None:
        np.minimum.at(low, whose, found)
        np.maximum.at(high, whose, found)

    is_inside = ((points >= 0) & (points <= size)).all(1)
    reach(owner[is_inside], points[is_inside])
    for axis, side in ((0, 0), (0, size), (1, 0), (1, size)):
        this, other = points[:, axis], after[:, axis]
        at = np.flatnonzero(((this < side) != (other < side)) | ((this > side) != (other > side)))
        share = (side - this[at]) / (other[at] - this[at])
        along = points[at, 1 - axis] + share * (after[at, 1 - axis] - points[at, 1 - axis])
        is_seen = (along >= 0) & (along <= size)
        crossing = np.full((int(is_seen.sum()), 2), side, np.float32)
        crossing[:, 1 - axis] = along[is_seen]
        reach(owner[at[is_seen]], crossing)
    least, most = np.minimum.reduceat(points, ends - counts), np.maximum.reduceat(points, ends - counts)
    for corner in _CORNERS * size:
        for i in np.flatnonzero(((least <= corner) & (corner <= most)).all(1)):
            polygon = points[ends[i] - counts[i] : ends[i]]
            if cv2.pointPolygonTest(polygon, (float(corner[0]), float(corner[1])), False) >= 0:
                reach(np.array([i]), corner[None])
    boxes = np.concatenate([low, high], 1).astype(np.float64)
    boxes[np.isinf(boxes).any(1)] = 0
    return boxes


def cut_polygon(polygon: Floats, width: float, height: float) -> Floats:
    """The part of a polygon (P, 2) in [0, width] x [0, height]: cut by one side after the other (Sutherland and Hodgman, 1974).

    In place of ``cv2.intersectConvexConvex``, which may return the whole image where a corner lies on its edge.
    """
    for axis, side, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = (polygon[:, axis] - side) * sign  # not negative: inside
        if (depth >= 0).all():
            continue
        kept: list[Floats] = []
        for i, point in enumerate(polygon):
            before, there = depth[i - 1], depth[i]
            if (before < 0) != (there < 0):
                crossing = polygon[i - 1] + (point - polygon[i - 1]) * before / (before - there)
                crossing[axis] = side
                kept.append(crossing)
            if there >= 0:
                kept.append(point)
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def cut_corners(corners: Points, boxes_xyxy: Floats, width: float, height: float) -> tuple[Points, Floats]:
    """Rotated boxes cut at an image's edges keep their direction (Instances.clip, preserve_obb).

    Args:
        corners: float32 (N, 4, 2) px.
        boxes_xyxy: float64 (N, 4) px, upright, around them.
        width, height: of the image, px.

    Returns:
        Both, new; for what is wholly outside zeros.
    """
    corners, boxes_xyxy = corners.copy(), boxes_xyxy.copy()
    for i in np.flatnonzero(((corners < 0) | (corners > [width, height])).any((1, 2))):
        visible = cut_polygon(
            cv2.convexHull(corners[i]).reshape(-1, 2).astype(np.float64), width, height
        ).astype(np.float32)
        if len(visible) < 3 or cv2.contourArea(visible) <= 0:
            corners[i], boxes_xyxy[i] = 0, 0
            continue
        boxes_xyxy[i] = [*visible.min(0), *visible.max(0)]
        _, (long, short), angle = cv2.minAreaRect(corners[i])
        turn = np.deg2rad(angle + 90 if long < short else angle)
        basis = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], np.float32)
        (u1, v1), (u2, v2) = (visible @ basis).min(0), (visible @ basis).max(0)
        corners[i] = np.array([[u2, v2], [u2, v1], [u1, v1], [u1, v2]], np.float32) @ basis.T
    return corners, boxes_xyxy


def boxes_xywhr(corners: Points) -> Points:
    """Corners (N, 4, 2) px -> centre x, centre y, longer side, shorter side (px), angle in [-pi/4, 3pi/4): float32 (N, 5).

    As ``ultralytics.utils.ops.xyxyxyxy2xywhr``.
    """
    found = np.zeros((len(corners), 5))
    for i, points in enumerate(corners):
        centre, (width, height), angle = cv2.minAreaRect(points)
        turn = np.deg2rad(angle + 90 if width < height else angle)
        found[i] = *centre, max(width, height), min(width, height), (turn + np.pi / 4) % np.pi - np.pi / 4
    return found.astype(np.float32)


def cut_keypoints(keypoints: Floats, width: float, height: float) -> Floats:
    """Keypoints float64 (N, K, 3) px: those outside of the image become invisible and are moved to its edge."""
    xy = keypoints[..., :2]
    inside = xy.clip(0, [width, height])
    visibility = np.where((inside != xy).any(-1), 0, keypoints[..., 2])
    return np.concatenate([inside, visibility[..., None]], -1)


def overlap_mask(
    polygons: Points, size: int, ratio: int
) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], NDArray[np.intp]]:
    """One mask for all polygons: i + 1 where the i-th largest is seen, smaller ones over larger ones (polygons2masks_overlap).

    Args:
        polygons: float32 (N, P, 2), px of the output.
        size: S.
        ratio: how many times smaller the mask is.

    Returns:
        The mask uint8 (S // ratio, S // ratio), uint16 for more than 255 polygons, and the order of the polygons in it.
    """
    side = size // ratio
    if not len(polygons):
        return np.zeros((side, side), np.uint8), np.zeros(0, np.intp)
    mask: Any = np.zeros((side, side), np.uint8 if len(polygons) <= 255 else np.uint16)
    whole = polygons.astype(np.int32)
    low, high = (corner.clip(0, size - 1) // ratio * ratio for corner in _extent(whole))
    if size % ratio:
        low, high = np.zeros_like(low), np.full_like(high, size - ratio)
    drawn = [_drawn(*each, ratio) for each in zip(whole, low, high + ratio, strict=True)]
    areas = np.array([small.sum(dtype=np.uint64) for small, _ in drawn], np.uint64)
    # as in Ultralytics, whose areas are unsigned, those of no pixel come first
    order = np.argsort(np.uint64(0) - areas, kind="stable")
    for place, i in enumerate(order):
        small, window = drawn[i]
        np.maximum(mask[window], small.astype(mask.dtype) * mask.dtype.type(place + 1), out=mask[window])
    return mask, order


def _drawn(
    polygon: NDArray[np.int32], low: NDArray[np.int32], high: NDArray[np.int32], ratio: int
) -> tuple[NDArray[np.uint8], tuple[slice, slice]]:
    """A polygon's small mask, only from ``low`` to ``high`` (px), and where that is. A small pixel depends on its own px alone."""
    large = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    cv2.fillPoly(large, [polygon - low], 1)
    small = cv2.resize(large, (large.shape[1] // ratio, large.shape[0] // ratio))
    top, left = low[1] // ratio, low[0] // ratio
    return small, (slice(top, top + small.shape[0]), slice(left, left + small.shape[1]))


def choose_pasted(boxes_xyxy: Floats, width: int, share: float) -> NDArray[np.intp]:
    """Which instances to paste mirrored: a share of those whose mirror image covers nobody by much, the freest first (CopyPaste).

    Args:
        boxes_xyxy: float64 (N, 4) px.
        width: of the canvas.
        share: of those eligible.
    """
    mirrored = boxes_xyxy.copy()
    mirrored[:, [0, 2]] = width - boxes_xyxy[:, [2, 0]]
    low, high = (
        np.maximum(mirrored[:, None, :2], boxes_xyxy[:, :2]),
        np.minimum(mirrored[:, None, 2:], boxes_xyxy[:, 2:]),
    )
    covered = np.clip(high - low, 0, None).prod(2) / ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1) + 1e-7)
    eligible = np.flatnonzero((covered < MAX_PASTED_OVERLAP).all(1))
    eligible = eligible[np.argsort(covered.max(1, initial=0)[eligible], kind="stable")]
    return eligible[: round(share * len(eligible))]
