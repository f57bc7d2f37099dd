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
        class_ids: int32 (M,), over all images.
        boxes_xywhn: float32 (M, 4), centre x, centre y, width, height over S.
        image_index: int32 (M,), the image (0 .. B-1) that each box belongs to.
        rows: int64 (B,), the row within the split that each image shows (of a mosaic: its first tile).
        num_replaced: rows that could not be decoded, in whose place another one of the window is shown.
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

    def pack(self) -> pa.Table:
        """One row of buffers; the image slab is not copied."""
        head = np.array([self.epoch, self.step, self.rank, self.num_replaced, *self.images.shape], dtype=np.int64)
        arrays: dict[str, NDArray[Any]] = {"head": head, "images": self.images, "class_ids": self.class_ids,
                  "boxes_xywhn": self.boxes_xywhn, "image_index": self.image_index, "rows": self.rows}  # fmt: skip
        return pa.table({name: _one_binary(array) for name, array in arrays.items()})

    @classmethod
    def unpack(cls, table: pa.Table) -> Batch:
        """The inverse of :meth:`pack`; arrays are views of the table's memory."""
        assert table.num_rows == 1, table.num_rows

        def view(name: str, dtype: type) -> NDArray[Any]:
            return np.frombuffer(table.column(name)[0].as_buffer(), dtype=dtype)

        epoch, step, rank, num_replaced, *shape = (int(x) for x in view("head", np.int64))
        return cls(epoch, step, rank, view("images", np.uint8).reshape(shape), view("class_ids", np.int32),
                   view("boxes_xywhn", np.float32).reshape(-1, 4), view("image_index", np.int32), view("rows", np.int64),
                   num_replaced)  # fmt: skip


def _one_binary(array: NDArray[Any]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
