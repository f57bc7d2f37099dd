"""One rank's share of a step, and how it travels: packed into a few buffers, no Python object an image, no float images, no ragged
columns. Several steps of a rank go as one block, because every block costs Ray about 12 ms of CPU. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypar.dataset.rows import cells


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


OPTIONAL = ("masks", "keypoints", "boxes_xywhr")


def pack(batches: Sequence[Batch]) -> pa.Table:
    """Consecutive steps of one rank as one row of buffers; image slabs that lie side by side in one array are not copied."""
    arrays: dict[str, NDArray[Any]] = {"head": np.array([_head(batch) for batch in batches], np.int64)}
    names = ["images", "class_ids", "boxes_xywhn", "image_index", "rows"]
    for name in names + [name for name in OPTIONAL if getattr(batches[0], name) is not None]:
        arrays[name] = _joined([getattr(batch, name) for batch in batches])
    return pa.table({name: one_binary(array) for name, array in arrays.items()})


def unpack(table: pa.Table) -> list[Batch]:
    """The inverse of :func:`pack`; arrays are views of the table's memory."""
    assert table.num_rows == 1, table.num_rows

    def view(name: str, dtype: Any) -> NDArray[Any]:
        return np.frombuffer(cells(table.column(name))[0], dtype=dtype)

    heads = view("head", np.int64).reshape(-1, len(HEAD))
    facts = dict(zip(HEAD, heads.T, strict=True))
    num_images, side, mask_side = (int(facts[name][0]) for name in ("num_images", "side", "mask_side"))
    of_images, of_boxes = np.arange(1, len(heads)) * num_images, np.cumsum(facts["num_boxes"])[:-1]
    of_labels = np.cumsum(facts["num_labels"])[:-1]
    widest = np.uint8 if facts["mask_bytes"].max() <= 1 else np.uint16
    columns = {
        "images": np.split(
            view("images", np.uint8).reshape(len(heads) * num_images, 3, side, side), of_images
        ),
        "class_ids": np.split(view("class_ids", np.int32), of_labels),
        "boxes_xywhn": np.split(view("boxes_xywhn", np.float32).reshape(-1, 4), of_boxes),
        "image_index": np.split(view("image_index", np.int32), of_boxes),
        "rows": np.split(view("rows", np.int64), of_images),
    }
    there = set(table.column_names)
    if "masks" in there:
        masks = np.split(view("masks", widest).reshape(-1, mask_side, mask_side), of_images)
        columns["masks"] = [
            m if m.itemsize == n else m.astype(np.uint8)
            for m, n in zip(masks, facts["mask_bytes"], strict=True)
        ]
    if "keypoints" in there:
        columns["keypoints"] = np.split(
            view("keypoints", np.float32).reshape(-1, int(facts["num_keypoints"][0]), 3), of_boxes
        )
    if "boxes_xywhr" in there:
        columns["boxes_xywhr"] = np.split(view("boxes_xywhr", np.float32).reshape(-1, 5), of_boxes)
    return [
        Batch(
            epoch, step, rank, num_replaced=replaced, **{name: arrays[i] for name, arrays in columns.items()}
        )
        for i, (epoch, step, rank, replaced) in enumerate(heads[:, :4].tolist())
    ]


HEAD = (
    "epoch",
    "step",
    "rank",
    "num_replaced",
    "num_images",
    "side",
    "num_labels",
    "num_boxes",
    "mask_side",
    "mask_bytes",
    "num_keypoints",
)


def _head(batch: Batch) -> tuple[int, ...]:
    mask_side, mask_bytes = (0, 0) if batch.masks is None else (batch.masks.shape[1], batch.masks.itemsize)
    num_keypoints = 0 if batch.keypoints is None else batch.keypoints.shape[1]
    num_images, side = len(batch.images), batch.images.shape[-1]
    return (batch.epoch, batch.step, batch.rank, batch.num_replaced, num_images, side, len(batch.class_ids), len(batch.image_index),
            mask_side, mask_bytes, num_keypoints)  # fmt: skip


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """All arrays, one after the other: the array that they are the parts of, when there is one."""
    whole = arrays[0].base
    if (
        isinstance(whole, np.ndarray)
        and all(a.base is whole for a in arrays)
        and whole.nbytes == sum(a.nbytes for a in arrays)
    ):
        return whole
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def one_binary(array: NDArray[Any]) -> pa.Array:
    """A column of one row: the array's memory, not copied."""
    data = pa.py_buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
