"""The label side of rendering: what a sample does to the labels of its sources, and what of it the pixels must know. Pure NumPy.

No pixel of a source is read here: whoever renders (:mod:`raypar.augment.cpu`, :mod:`raypar.augment.gpu`) calls :func:`move_labels`
and paints what it says. The map that moves pixels moves boxes, polygons, corners and keypoints, and what is left of them at an edge
is as in Ultralytics (``Mosaic``, ``CopyPaste``, ``RandomPerspective``, ``MixUp``, ``CutMix``, ``RandomFlip`` and ``Format``, 8.4.190).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import (
    MIN_AREA_IN_CUT,
    MIN_AREA_LEFT,
    Floats,
    Layer,
    Recipe,
    Sample,
    choose_cut,
    hull,
    is_seen,
    layout,
    mapped,
    to_canvas,
)
from raypar.augment.outlines import (
    Outlines,
    Points,
    boxes_xywhr,
    choose_pasted,
    clipped,
    cut_corners,
    cut_keypoints,
    join,
    overlap_mask,
    visible_boxes,
)

Area = tuple[int, int, int, int]
Mask = NDArray[np.uint8] | NDArray[np.uint16]
Polygons = Sequence[NDArray[np.int32]]
MIN_AREA_OF_POLYGON = 0.01  # in place of MIN_AREA_LEFT and MIN_AREA_IN_CUT


class Labelled(Protocol):
    """What a source must say of itself; see :class:`raypar.augment.cpu.Source`."""

    @property
    def hw(self) -> tuple[int, int]: ...
    @property
    def class_ids(self) -> NDArray[np.int32]: ...
    @property
    def boxes_xywhn(self) -> NDArray[np.float32]: ...
    @property
    def polygons(self) -> Points | Outlines | None: ...
    @property
    def keypoints(self) -> Points | None: ...


@dataclass
class Labels:
    """Labels of a batch, flat; the last three only for the tasks that have them.

    Attributes:
        class_ids: int32 (M,).
        boxes_xywhn: float32 (M, 4), over the output's side.
        image_index: int32 (M,), the image of the batch that each belongs to.
        masks: segment: uint8 (B, S/4, S/4), the i-th instance of an image where it says i + 1 (uint16 for more than 255 in an image).
        keypoints: pose: float32 (M, K, 3), x, y over the output's side, visibility.
        boxes_xywhr: obb: float32 (M, 5), centre and sides over the output's side, angle in radians.
    """

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    image_index: NDArray[np.int32]
    masks: Mask | None = None
    keypoints: Points | None = None
    boxes_xywhr: Points | None = None


@dataclass
class Moved:
    """Labels of one output image.

    Attributes:
        class_ids: int32 (N,).
        boxes_xywhn: float32 (N, 4), over the output's side.
        cut: (x0, y0, x1, y1) px of the rectangle to copy from ``sample.cut``'s layer, before flips; None for none.
        pasted: for ``sample.layer``, ``sample.mixed`` and ``sample.cut``, the polygons int32 (P, 2) on the layer's canvas within which
            to paint its mirror image.
        masks, keypoints, boxes_xywhr: as in :class:`Labels`.
    """

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    cut: Area | None = None
    pasted: tuple[Polygons, ...] = ((), (), ())
    masks: Mask | None = None
    keypoints: Points | None = None
    boxes_xywhr: Points | None = None


@dataclass(frozen=True)
class Instances:
    """What a layer shows, in px.

    Attributes:
        class_ids: int32 (N,).
        boxes: float64 (N, 4), x0, y0, x1, y1.
        polygons: float32 (N, P, 2): segment, and detect when they are not only wanted for boxes; the four corners of obb.
        keypoints: float64 (N, K, 3), x, y, visibility: pose.
    """

    class_ids: NDArray[np.int32]
    boxes: Floats
    polygons: Points | None = None
    keypoints: Floats | None = None

    def take(self, which: NDArray[Any]) -> Instances:
        return self._each(lambda values: values[which])

    def _each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Instances:
        polygons, keypoints = self.polygons, self.keypoints
        return Instances(change(self.class_ids), change(self.boxes), None if polygons is None else change(polygons),
                         None if keypoints is None else change(keypoints))  # fmt: skip

    def plus(self, other: Instances) -> Instances:
        return Instances(
            np.concatenate([self.class_ids, other.class_ids]),
            np.concatenate([self.boxes, other.boxes]),
            None
            if self.polygons is None or other.polygons is None
            else join([self.polygons, other.polygons]),
            None
            if self.keypoints is None or other.keypoints is None
            else np.concatenate([self.keypoints, other.keypoints]),
        )

    def cut(self, task: str, width: float, height: float) -> Instances:
        """What is left within [0, width] x [0, height] (Instances.clip)."""
        if task == "obb" and self.polygons is not None:
            corners, boxes = cut_corners(self.polygons, self.boxes, width, height)
            return replace(self, boxes=boxes, polygons=corners)
        return Instances(
            self.class_ids,
            self.boxes.clip(0, [width, height, width, height]),
            None
            if self.polygons is None
            else clipped(self.polygons, np.zeros((1, 2)), np.array([[width, height]])),
            None if self.keypoints is None else cut_keypoints(self.keypoints, width, height),
        )

    def shifted(self, x: float, y: float) -> Instances:
        return Instances(
            self.class_ids,
            self.boxes + np.array([x, y, x, y]),
            None if self.polygons is None else self.polygons + np.array([x, y], np.float32),
            None if self.keypoints is None else self.keypoints + np.array([x, y, 0]),
        )

    def mirrored(self, axis: int, length: float) -> Instances:
        """Left-right (axis 0) or up-down (axis 1)."""
        boxes = self.boxes.copy()
        boxes[:, [axis, axis + 2]] = length - self.boxes[:, [axis + 2, axis]]
        polygons, keypoints = (
            None if points is None else points.copy() for points in (self.polygons, self.keypoints)
        )
        for points in (polygons, keypoints):
            if points is not None:
                points[..., axis] = length - points[..., axis]
        return Instances(self.class_ids, boxes, polygons, keypoints)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Composed:
    """What an output image shows when its layers are one, before it is flipped; ``cut`` and ``pasted`` as in :class:`Moved`."""

    shown: Instances
    cut: Area | None
    pasted: tuple[Polygons, ...]


def move_labels(recipe: Recipe, sample: Sample, sources: Sequence[Labelled]) -> Moved:
    """Labels of the output image that a sample describes; arguments as of :func:`compose_labels`."""
    return finish_labels(recipe, sample, compose_labels(recipe, sample, sources))


def compose_labels(recipe: Recipe, sample: Sample, sources: Sequence[Labelled]) -> Composed:
    """Labels of the image that a sample describes, before flips.

    Args:
        recipe: whose ``imgsz`` is the output's side S.
        sample: of :func:`raypar.augment.geometry.draw`.
        sources: the window.
    """
    cut: Area | None = None
    pasted2: Polygons = ()
    pasted3: Polygons = ()
    shown, pasted = move_layer(recipe, sample.layer, sources)
    if sample.mixed is not None:
        other, pasted2 = move_layer(recipe, sample.mixed[0], sources)
        shown = shown.plus(other)
    if sample.cut is not None:
        other, pasted3 = move_layer(recipe, sample.cut[0], sources)
        has_polygons = sources[0].polygons is not None and len(shown.class_ids) > 0
        chosen = choose_cut(
            *sample.cut[1:],
            shown.boxes,
            other.boxes,
            MIN_AREA_OF_POLYGON if has_polygons else MIN_AREA_IN_CUT,
        )
        if chosen is not None:
            x0, y0, x1, y1 = (int(x) for x in chosen[0])
            cut = x0, y0, x1, y1
            along = other.take(chosen[1]).shifted(-x0, -y0).cut(recipe.task, x1 - x0, y1 - y0)
            if recipe.task == "obb":
                along = along.take(_has_area(along.boxes))
            shown = shown.plus(along.shifted(x0, y0))
    return Composed(shown, cut, (pasted, pasted2, pasted3))


def finish_labels(recipe: Recipe, sample: Sample, composed: Composed) -> Moved:
    """Labels of the output image: flipped, and as the loss wants them."""
    shown = composed.shown
    for axis in (1, 0):
        if sample.flip[axis]:
            shown = shown.mirrored(axis, recipe.imgsz)
            if recipe.flip_idx and shown.keypoints is not None:
                shown = replace(shown, keypoints=shown.keypoints[:, recipe.flip_idx])
    return _finished(recipe, shown, composed.cut, composed.pasted)


def move_layer(recipe: Recipe, layer: Layer, sources: Sequence[Labelled]) -> tuple[Instances, Polygons]:
    """A layer's instances in the output, not flipped, and the polygons pasted on its canvas."""
    size, tiles_of = recipe.imgsz, [sources[i] for i in layer.indices]
    tiles, canvas_hw = layout(layer, [s.hw for s in tiles_of], size)
    height, width = canvas_hw
    wh, origin = to_canvas(tiles, [len(s.class_ids) for s in tiles_of])
    before, outlines = _gathered(recipe.task, tiles_of, wh, origin), _outlines(tiles_of, wh, origin)
    pasted: Polygons = ()
    if not len(before.class_ids):
        return before, pasted
    if layer.centre is not None:
        before = before.cut(recipe.task, width, height)
        is_there = _has_area(before.boxes)
        before = before.take(is_there)
        outlines = None if outlines is None else outlines[is_there]
    if layer.copy_paste and before.polygons is not None and len(before.polygons):
        mirrored = before.mirrored(0, width).take(choose_pasted(before.boxes, width, layer.copy_paste))
        assert mirrored.polygons is not None
        before, pasted = before.plus(mirrored), list(mirrored.polygons.astype(np.int32))
    matrix = layer.matrix(canvas_hw, size)
    after = _mapped(recipe.task, before, matrix, size)
    if outlines is not None:
        canvas_wh = None if layer.centre is None else (width, height)
        after = replace(after, boxes=outlines.visible_boxes(matrix, size, canvas_wh))
    after = after.cut(recipe.task, size, size)
    min_area = MIN_AREA_LEFT if sources[0].polygons is None else MIN_AREA_OF_POLYGON
    return after.take(is_seen(before.boxes, after.boxes, layer.scale, min_area)), pasted


def _gathered(task: str, sources: Sequence[Labelled], wh: Floats, origin: Floats) -> Instances:
    """All instances of a layer, on its canvas."""
    boxes = np.concatenate([s.boxes_xywhn for s in sources])
    centres, half = boxes[:, :2] * wh + origin, boxes[:, 2:] * wh / 2
    polygons = keypoints = None
    if task in ("segment", "obb") or isinstance(sources[0].polygons, np.ndarray):
        polygons = (join([_there(s.polygons) for s in sources]) * wh[:, None] + origin[:, None]).astype(
            np.float32
        )
    if task == "pose":
        keypoints = np.concatenate([_there(s.keypoints) for s in sources]).astype(np.float64)
        keypoints[..., :2] = keypoints[..., :2] * wh[:, None] + origin[:, None]
    class_ids = np.concatenate([s.class_ids for s in sources]).astype(np.int32)
    boxes = np.concatenate([centres - half, centres + half], 1)
    if task == "obb" and polygons is not None:
        # corners may lie outside of their image, to which the boxes in shards are cut; how much is left is of the whole
        boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1).astype(np.float64)
    return Instances(class_ids, boxes, polygons, keypoints)


def _there(points: Points | Outlines | None) -> Points:
    assert isinstance(points, np.ndarray), "the sources lack the labels of the recipe's task"
    return points


def _outlines(sources: Sequence[Labelled], wh: Floats, origin: Floats) -> Outlines | None:
    """All outlines of a layer, on its canvas; None where the sources have none."""
    parts = [s.polygons for s in sources if isinstance(s.polygons, Outlines)]
    return Outlines.joined(parts).placed(wh, origin) if parts else None


def _mapped(task: str, shown: Instances, matrix: Floats, size: int) -> Instances:
    """Instances through a map; where there are polygons, boxes are those of what is seen of them."""
    if shown.polygons is not None:
        polygons = mapped(shown.polygons.astype(np.float64), matrix).astype(np.float32)
        boxes = visible_boxes(polygons, size)
        if task != "obb":
            polygons = clipped(polygons, boxes[:, :2], boxes[:, 2:])
        return replace(shown, boxes=boxes, polygons=polygons)
    if shown.keypoints is not None:
        keypoints = np.concatenate([mapped(shown.keypoints[..., :2], matrix), shown.keypoints[..., 2:]], -1)
        return replace(shown, boxes=hull(shown.boxes, matrix), keypoints=keypoints)
    return replace(shown, boxes=hull(shown.boxes, matrix))


def _has_area(boxes: Floats) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1))


def _finished(recipe: Recipe, shown: Instances, cut: Area | None, pasted: tuple[Polygons, ...]) -> Moved:
    """As the loss wants them (Format): normalised, masks drawn, the largest instance of an image first where there are masks."""
    size, masks, keypoints, rotated = recipe.imgsz, None, None, None
    if recipe.task == "segment":
        assert shown.polygons is not None
        masks, order = overlap_mask(shown.polygons, size, recipe.mask_ratio)
        shown = shown.take(order)
    if recipe.task == "obb":
        assert shown.polygons is not None
        rotated = (boxes_xywhr(shown.polygons) / [size, size, size, size, 1]).astype(np.float32)
    if shown.keypoints is not None:
        keypoints = (shown.keypoints / [size, size, 1]).astype(np.float32)
    boxes = shown.boxes / size
    boxes_xywhn = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).astype(
        np.float32
    )
    return Moved(shown.class_ids, boxes_xywhn, cut, pasted, masks, keypoints, rotated)


def batch_labels(moved: Sequence[Moved]) -> Labels:
    """Labels of several output images as those of a batch."""
    counts = [len(m.class_ids) for m in moved]

    def joined(name: str, join: Callable[..., Any]) -> Any:
        values = [getattr(m, name) for m in moved]
        return None if values[0] is None else join(values)

    return Labels(np.concatenate([m.class_ids for m in moved]), np.concatenate([m.boxes_xywhn for m in moved]),
                  np.repeat(np.arange(len(counts), dtype=np.int32), counts), joined("masks", np.stack),
                  joined("keypoints", np.concatenate), joined("boxes_xywhr", np.concatenate))  # fmt: skip
