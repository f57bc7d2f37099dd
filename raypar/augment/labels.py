"""The label side of rendering: what a sample does to the labels of its sources, and what of it the pixels must know. Pure NumPy.

No pixel is read here: whoever renders (:mod:`raypar.augment.cpu`, :mod:`raypar.augment.gpu`) calls :func:`move_labels` and paints
what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Layer, Recipe, Sample, choose_cut, layout, move_boxes

Area = tuple[int, int, int, int]


class Labelled(Protocol):
    """What a source must say of itself; see :class:`raypar.augment.cpu.Source`."""

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]

    @property
    def hw(self) -> tuple[int, int]: ...


@dataclass
class Labels:
    """Labels of a batch, flat.

    Attributes:
        class_ids: int32 (M,).
        boxes_xywhn: float32 (M, 4), over the output's side.
        image_index: int32 (M,), the image of the batch that each belongs to.
    """

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    image_index: NDArray[np.int32]


@dataclass
class Moved:
    """Labels of one output image.

    Attributes:
        class_ids: int32 (N,).
        boxes_xywhn: float32 (N, 4), over the output's side.
        cut: (x0, y0, x1, y1) px of the rectangle to copy from ``sample.cut``'s layer, before flips; None for none.
    """

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    cut: Area | None = None


def move_labels(recipe: Recipe, sample: Sample, sources: Sequence[Labelled]) -> Moved:
    """Labels of the output image that a sample describes.

    Args:
        recipe: whose ``imgsz`` is the output's side S.
        sample: of :func:`raypar.augment.geometry.draw`.
        sources: the window.
    """
    size, cut = recipe.imgsz, None
    class_ids, boxes = _layer(sample.layer, sources, size)
    if sample.mixed is not None:
        class_ids2, boxes2 = _layer(sample.mixed[0], sources, size)
        class_ids, boxes = np.concatenate([class_ids, class_ids2]), np.concatenate([boxes, boxes2])
    if sample.cut is not None:
        other, areas, pick = sample.cut
        class_ids2, boxes2 = _layer(other, sources, size)
        if (chosen := choose_cut(areas, pick, boxes, boxes2)) is not None:
            area, come = chosen
            x0, y0, x1, y1 = (int(x) for x in area)
            cut = x0, y0, x1, y1
            along = np.concatenate([boxes2[come, :2].clip(area[:2], area[2:]), boxes2[come, 2:].clip(area[:2], area[2:])], 1)
            class_ids, boxes = np.concatenate([class_ids, class_ids2[come]]), np.concatenate([boxes, along])
    boxes = _flipped(boxes, sample.flip, size) / size
    return Moved(class_ids, np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float32), cut)


def batch_labels(moved: Sequence[Moved]) -> Labels:
    """Labels of several output images as those of a batch."""
    counts = [len(m.class_ids) for m in moved]
    return Labels(np.concatenate([m.class_ids for m in moved]), np.concatenate([m.boxes_xywhn for m in moved]),
                  np.repeat(np.arange(len(counts), dtype=np.int32), counts))  # fmt: skip


def _layer(layer: Layer, sources: Sequence[Labelled], size: int) -> tuple[NDArray[np.int32], Floats]:
    """A layer's class_ids and boxes_xyxy in px; not flipped."""
    shown = [sources[i] for i in layer.indices]
    tiles, canvas_hw = layout(layer, [s.hw for s in shown], size)
    return move_boxes(layer, tiles, canvas_hw, [(s.class_ids, s.boxes_xywhn) for s in shown], size)


def _flipped(boxes_xyxy: Floats, flip: tuple[bool, bool], size: int) -> Floats:
    x0, y0, x1, y1 = boxes_xyxy.T
    if flip[0]:
        x0, x1 = size - x1, size - x0
    if flip[1]:
        y0, y1 = size - y1, size - y0
    return np.stack([x0, y0, x1, y1], 1)
