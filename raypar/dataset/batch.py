"""One rank's share of a step, packed into a few buffers: no Python object an image, no float images, no ragged columns. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step.

    Attributes:
        epoch, step, rank: its place in the plan.
        images: uint8 (B, 3, S, S), RGB, read-only.
        class_ids: int32 (M,), over all images; for classify (B,), one of each image, and no boxes.
        boxes_xywhn: float32 (M, 4), centre x, centre y, width, height over S.
        image_index: int32 (M,), the image (0 .. B-1) that each box belongs to.
        rows: int64 (B,), the row within the split that each image shows (of a mosaic: its first tile).
        num_replaced: rows that could not be decoded, in whose place another one of the window is shown.
        masks: segment only: uint8 (uint16 where an image has more than 255 instances) (B, S/4, S/4), i + 1 where the i-th instance of
            the image is seen.
        keypoints: pose only: float32 (M, K, 3), x, y over S, visibility.
        boxes_xywhr: obb only: float32 (M, 5), centre and sides over S, angle in radians.
    """

    epoch: int
    step: int
    rank: int
    images: NDArray[np.uint8]
    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    image_index: NDArray[np.int32]
    rows: NDArray[np.int64]
    num_replaced: int = 0
    masks: NDArray[np.uint8] | NDArray[np.uint16] | None = None
    keypoints: NDArray[np.float32] | None = None
    boxes_xywhr: NDArray[np.float32] | None = None

    def pack(self) -> pa.Table:
        """One row of buffers; the image slab is not copied."""
        extra = {name: getattr(self, name) for name in ("masks", "keypoints", "boxes_xywhr") if getattr(self, name) is not None}
        mask_shape = (0, 0) if self.masks is None else (self.masks.shape[1], self.masks.itemsize)
        num_keypoints = 0 if self.keypoints is None else self.keypoints.shape[1]
        head = np.array([self.epoch, self.step, self.rank, self.num_replaced, *mask_shape, num_keypoints, *self.images.shape], np.int64)
        arrays: dict[str, NDArray[Any]] = {"head": head, "images": self.images, "class_ids": self.class_ids,
                  "boxes_xywhn": self.boxes_xywhn, "image_index": self.image_index, "rows": self.rows, **extra}  # fmt: skip
        return pa.table({name: _one_binary(array) for name, array in arrays.items()})

    @classmethod
    def unpack(cls, table: pa.Table) -> Batch:
        """The inverse of :meth:`pack`; arrays are views of the table's memory."""
        assert table.num_rows == 1, table.num_rows

        def view(name: str, dtype: type) -> NDArray[Any]:
            return np.frombuffer(table.column(name)[0].as_buffer(), dtype=dtype)

        epoch, step, rank, num_replaced, mask_side, mask_bytes, num_keypoints, *shape = (int(x) for x in view("head", np.int64))
        there = set(table.column_names)
        return cls(
            epoch, step, rank, view("images", np.uint8).reshape(shape), view("class_ids", np.int32),
            view("boxes_xywhn", np.float32).reshape(-1, 4), view("image_index", np.int32), view("rows", np.int64), num_replaced,
            view("masks", np.uint8 if mask_bytes == 1 else np.uint16).reshape(-1, mask_side, mask_side) if "masks" in there else None,
            view("keypoints", np.float32).reshape(-1, num_keypoints, 3) if "keypoints" in there else None,
            view("boxes_xywhr", np.float32).reshape(-1, 5) if "boxes_xywhr" in there else None)  # fmt: skip


def _one_binary(array: NDArray[Any]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
