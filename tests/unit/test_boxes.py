"""Boxes: conversions invert each other, overlap agrees with torchvision's."""

from __future__ import annotations

import numpy as np
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.boxes import clip, iou, xywhn_to_xyxy, xyxy_to_xywhn

SIDES = st.integers(1, 8000)
SHARES = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=8)


def boxes_of(shares: list[tuple[float, ...]], image_hw: tuple[int, int]) -> np.ndarray:
    """Corners in order, inside the image."""
    corners = np.array(shares, np.float32).reshape(-1, 2, 2)
    scale = np.array([image_hw[1], image_hw[0]] * 2, np.float32)
    return np.concatenate([corners.min(1), corners.max(1)], 1) * scale


@settings(deadline=None)
@given(SHARES, SIDES, SIDES)
def test_conversion_and_back_is_the_same_box(
    shares: list[tuple[float, ...]], height: int, width: int
) -> None:
    boxes = boxes_of(shares, (height, width))
    centres = xyxy_to_xywhn(boxes, (height, width))
    assert centres.dtype == np.float32
    assert (centres >= 0).all()
    assert (centres <= 1 + 1e-6).all()
    np.testing.assert_allclose(xywhn_to_xyxy(centres, (height, width)), boxes, atol=max(height, width) * 1e-6)


def test_a_known_box() -> None:
    np.testing.assert_allclose(
        xywhn_to_xyxy(np.array([[0.5, 0.25, 0.2, 0.1]], np.float32), (100, 200)),
        [[80, 20, 120, 30]],
        atol=1e-5,
    )
    assert xywhn_to_xyxy(np.zeros((0, 4), np.float32), (3, 5)).shape == (0, 4)


@settings(deadline=None)
@given(SHARES, SHARES, SIDES, SIDES)
def test_overlap_is_torchvisions(
    a: list[tuple[float, ...]], b: list[tuple[float, ...]], height: int, width: int
) -> None:
    boxes, others = boxes_of(a, (height, width)), boxes_of(b, (height, width))
    expected = (
        torchvision.ops.box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(others).double())
        .nan_to_num(0)
        .numpy()
    )
    found = iou(boxes, others)
    assert found.shape == (len(boxes), len(others))
    # the quotient of two nearly empty areas is noise in float32
    large = (boxes[:, 2:] - boxes[:, :2]).prod(1) > 1e-3
    np.testing.assert_allclose(found[large], expected[large], atol=2e-3)


def test_overlap_of_empty_boxes_is_none() -> None:
    point = np.array([[3, 3, 3, 3]], np.float32)
    assert iou(point, point) == 0
    assert iou(np.zeros((0, 4), np.float32), point).shape == (0, 1)


def test_clip_moves_corners_to_the_edge() -> None:
    clipped = clip(np.array([[-5, -1, 30, 7], [2, 3, 4, 5]], np.float32), (6, 20))
    np.testing.assert_array_equal(clipped, [[0, 0, 20, 6], [2, 3, 4, 5]])
    assert clipped.dtype == np.float32
