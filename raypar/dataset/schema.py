"""Columns of a row in a shard: names, dtypes, shapes and units. Pure."""

from __future__ import annotations

import pyarrow as pa

TASKS = ("detect", "segment", "pose", "obb", "classify")

_IMAGE = [
    # unique in its split: the source's relative path, with #2, #3 ... where it is listed again
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("image", pa.binary(), nullable=False),  # encoded bytes (JPEG, PNG, WebP ...), upright
    pa.field("height", pa.int32(), nullable=False),  # px, of the upright image
    pa.field("width", pa.int32(), nullable=False),  # px
]
_BOXES = [
    pa.field("class_ids", pa.list_(pa.int32()), nullable=False),  # (N,), 0-based
    # (4N,) row-major (N, 4): centre x, centre y, width, height over the image's width/height, in [0, 1]
    pa.field("boxes_xywhn", pa.list_(pa.float32()), nullable=False),
]
# N flat polygons x, y, x, y ... over width/height: in [0, 1] for segment; the four corners for obb, which may lie outside.
# Detect: in [0, 1], or no polygon at all where the source has only boxes of an image (old datasets lack the column)
_POLYGONS = [pa.field("segments_xyn", pa.list_(pa.list_(pa.float32())), nullable=False)]
# (N*K*3,): x, y over width/height, visibility (0: none)
_KEYPOINTS = [pa.field("keypoints", pa.list_(pa.float32()), nullable=False)]


def row_schema(task: str) -> pa.Schema:
    """The Arrow schema of a shard for one of ``TASKS``."""
    columns = {
        "detect": _BOXES + _POLYGONS,
        "segment": _BOXES + _POLYGONS,
        "obb": _BOXES + _POLYGONS,
        "pose": _BOXES + _KEYPOINTS,
        "classify": [pa.field("class_id", pa.int32(), nullable=False)],
    }
    return pa.schema(_IMAGE + columns[task])
