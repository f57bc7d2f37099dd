"""Boxes as arrays: conversions between pixels of corners and normalised centres, clipping, overlap. Pure.

``image_hw`` is (height, width) in px throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]


def xywhn_to_xyxy(boxes_xywhn: Boxes, image_hw: tuple[int, int]) -> Boxes:
    """Centre x, centre y, width, height over W, H -> corners x0, y0, x1, y1 in px; float32 (N, 4) both."""
    boxes = np.asarray(boxes_xywhn, np.float32).reshape(-1, 4)
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], 1) * _scale(image_hw)


def xyxy_to_xywhn(boxes_xyxy: Boxes, image_hw: tuple[int, int]) -> Boxes:
    """Corners x0, y0, x1, y1 in px -> centre x, centre y, width, height over W, H; float32 (N, 4) both."""
    boxes = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4) / _scale(image_hw)
    first, last = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(first + last) / 2, last - first], 1)


def clip(boxes_xyxy: Boxes, image_hw: tuple[int, int]) -> Boxes:
    """Corners moved into the image: x in [0, W], y in [0, H]; float32 (N, 4)."""
    return np.clip(boxes_xyxy, np.float32(0), _scale(image_hw)).astype(np.float32, copy=False)


def iou(boxes_xyxy: Boxes, others_xyxy: Boxes) -> NDArray[np.float32]:
    """Intersection over union of each box (N, 4) with each other one (M, 4): float32 (N, M), 0 where both are empty."""
    a, b = (
        np.asarray(boxes_xyxy, np.float32).reshape(-1, 1, 4),
        np.asarray(others_xyxy, np.float32).reshape(1, -1, 4),
    )
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    both = sides.prod(-1)
    either = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _scale(image_hw: tuple[int, int]) -> Boxes:
    return np.array([image_hw[1], image_hw[0], image_hw[1], image_hw[0]], np.float32)
