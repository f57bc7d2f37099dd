"""Conversions between box formats. Pure NumPy; every array is (N, 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def xywhn_to_xyxy(boxes_xywhn: NDArray[Any], image_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Centre x, centre y, width, height over the image's size -> x0, y0, x1, y1 in px, float32."""
    scale = np.array([image_hw[1], image_hw[0]], np.float64)
    centre, half = boxes_xywhn[:, :2] * scale, boxes_xywhn[:, 2:] * scale / 2
    return np.concatenate([centre - half, centre + half], 1).astype(np.float32)


def xyxy_to_xywhn(boxes_xyxy: NDArray[Any], image_hw: tuple[int, int]) -> NDArray[np.float32]:
    """The inverse of :func:`xywhn_to_xyxy`, float32."""
    scale = np.array([image_hw[1], image_hw[0]], np.float64)
    low, high = boxes_xyxy[:, :2] / scale, boxes_xyxy[:, 2:] / scale
    return np.concatenate([(low + high) / 2, high - low], 1).astype(np.float32)


def clip_xyxy(boxes_xyxy: NDArray[Any], image_hw: tuple[int, int]) -> NDArray[Any]:
    """Boxes cut off at the image's edges, same dtype."""
    return boxes_xyxy.clip(0, np.array([image_hw[1], image_hw[0]] * 2, boxes_xyxy.dtype))


def pairwise_iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of boxes_xyxy (N, 4) and (M, 4): float64 (N, M)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2, dtype=np.float64)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1, dtype=np.float64) for x in (a, b))
    return shared / (area_a[:, None] + area_b[None] - shared + 1e-9)
