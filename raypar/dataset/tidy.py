"""Labels as a source states them -> the columns of a row: clipped to the image, without what has no area. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from raypar.dataset.formats import Labels, boxes_around

# boxes that leave the image by less (rounding in a text file) are clipped, but not worth counting
CLIP_TOLERANCE = 1e-4


def tidy(labels: Labels, task: str = "detect") -> tuple[Labels, Counter[str]]:
    """Clips boxes and polygons to the image and drops those of no area.

    The corners of rotated boxes stay as they are (clipping would turn the box), and so do keypoints: outside of the image they are
    invisible once the image is augmented.

    Returns:
        The labels in [0, 1], and how many boxes were mended, by kind.
    """
    boxes, segments = labels.boxes_xywhn.copy(), labels.segments_xyn
    has_area = (boxes[:, 2:] > 0).all(axis=1)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    inside = corners.clip(0, 1)
    is_outside = (corners != inside).any(axis=1)
    clipped = np.concatenate([(inside[:, :2] + inside[:, 2:]) / 2, inside[:, 2:] - inside[:, :2]], axis=1)
    boxes[is_outside] = clipped[is_outside]
    if task in ("detect", "segment") and segments:
        segments = tuple(segment.clip(0, 1) for segment in segments)
        boxes = boxes_around(segments)
    is_kept = has_area & (boxes[:, 2:].astype(np.float32) > 0).all(axis=1)  # as they will be stored
    num_clipped = int((is_kept & (np.abs(corners - inside).max(axis=1, initial=0) > CLIP_TOLERANCE)).sum())
    repairs = Counter(
        {
            "boxes clipped to the image": num_clipped,
            "boxes without area dropped": int((~is_kept).sum()),
            "duplicate labels dropped": labels.num_duplicates,
        }
    )
    kept = replace(
        labels,
        class_ids=labels.class_ids[is_kept],
        boxes_xywhn=boxes[is_kept],
        segments_xyn=None if segments is None else tuple(segments[i] for i in np.flatnonzero(is_kept)),
        keypoints=None if labels.keypoints is None else labels.keypoints[is_kept],
    )
    return kept, +repairs


def columns(labels: Labels, task: str) -> dict[str, object]:
    """The label columns of a row, as in :func:`raypar.dataset.schema.row_schema`."""
    if task == "classify":
        return {"class_id": int(labels.class_ids[0])}
    found: dict[str, object] = {
        "class_ids": labels.class_ids.astype(np.int32),
        "boxes_xywhn": labels.boxes_xywhn.astype(np.float32).ravel(),
    }
    if task in ("detect", "segment", "obb"):
        assert task == "detect" or labels.segments_xyn is not None
        found["segments_xyn"] = [segment.astype(np.float32).ravel() for segment in labels.segments_xyn or ()]
    if task == "pose":
        assert labels.keypoints is not None
        found["keypoints"] = labels.keypoints.astype(np.float32).ravel()
    return found
