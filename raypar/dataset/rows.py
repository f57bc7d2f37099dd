"""Rows of shards, and their columns -> what the renderer wants. Runs in: Ray Data tasks, training workers, and the driver (evaluate)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypar.augment.outlines import densify
from raypar.dataset.manifest import Shard, Split
from raypar.dataset.schema import row_schema
from raypar.storage import Folder

Floats = NDArray[np.float32]
RowLabels = tuple[NDArray[np.int32], Floats, Floats | None, Floats | None]
WHOLE = np.array([[0.5, 0.5, 1, 1]], np.float32)  # the box of an image's class
READERS = 16  # shards whose narrow columns are read at a time


def row_group(dataset: Folder, path: str, number: int, columns: list[str] | None = None) -> pa.Table:
    """A row group of a shard, all its columns or some; a store that fails is asked again for a while.

    Shards of detect that were written before raypar kept polygons have none: their rows get empty lists.
    """
    table = dataset.reading(path, lambda file: pq.ParquetFile(file).read_row_group(number, columns=columns))
    if "segments_xyn" in (columns or ()) and "segments_xyn" not in table.column_names:
        field = row_schema("detect").field("segments_xyn")
        table = table.append_column(field, pa.array([[]] * table.num_rows, field.type))
    return table


class Sizes(NamedTuple):
    """What is known of a split's images without their pixels, in the order of its rows.

    Attributes:
        image_ids: of each image.
        hws: int32 (images, 2) height and width, px.
        num_labels: of the image that has most.
    """

    image_ids: list[str]
    hws: NDArray[np.int32]
    num_labels: int


def read_sizes(dataset: Folder, split: Split) -> Sizes:
    """Reads the narrow columns of a split's shards."""
    table = _columns(dataset, split, ["image_id", "height", "width"])
    hws = np.stack([table[name].to_numpy() for name in ("height", "width")], 1)
    return Sizes(table["image_id"].to_pylist(), hws, pc.max(table["num_labels"]).as_py())


def most_labels(dataset: Folder, split: Split) -> int:
    """Labels of the image of a split that has most."""
    return int(pc.max(_columns(dataset, split, ["height"])["num_labels"]).as_py())


def _columns(dataset: Folder, split: Split, names: list[str]) -> pa.Table:
    """Some columns of all rows of a split, and ``num_labels`` int32: of each image."""

    def read(shard: Shard) -> pa.Table:
        return dataset.reading(shard.path, lambda file: _with_num_labels(file, shard, names))

    with ThreadPoolExecutor(READERS) as threads:
        return pa.concat_tables(threads.map(read, split.shards))


def _with_num_labels(file: BinaryIO, shard: Shard, names: list[str]) -> pa.Table:
    opened = pq.ParquetFile(file, pre_buffer=True)
    has_boxes = "class_ids" in opened.schema_arrow.names  # without: classify
    columns = [*names, "class_ids" if has_boxes else "class_id"]
    table = opened.read_row_groups(range(len(shard.row_groups)), columns=columns)
    table = table.slice(
        0, sum(shard.row_groups)
    )  # of a part of a split: the first rows of its last row group
    labels = table.column(len(names))
    num_labels = pc.list_value_length(labels) if has_boxes else pa.array(np.ones(len(labels), np.int32))
    return table.select(names).append_column("num_labels", num_labels)


def cells(column: pa.ChunkedArray) -> list[pa.Buffer]:
    """The values of a binary column without a copy: Arrow's own scalars (``column[i].as_buffer()``) copy each value."""
    found = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64 if pa.types.is_large_binary(chunk.type) else np.int32)
        found += [
            data.slice(a, b - a)
            for a, b in pairwise(ends[chunk.offset : chunk.offset + len(chunk) + 1].tolist())
        ]
    return found


def only_classes(labels: RowLabels, classes: Sequence[int] | None) -> RowLabels:
    """Labels of a row, as of :func:`row_labels`, without those of other classes; class ids stay as they are.

    Args:
        labels: of a row.
        classes: ids; None: all.
    """
    if classes is None:
        return labels
    class_ids, boxes, polygons, keypoints = labels
    kept = np.isin(class_ids, classes)
    return (
        class_ids[kept],
        boxes[kept],
        None if polygons is None else polygons[kept],
        None if keypoints is None else keypoints[kept],
    )


def boxes_per_class(
    dataset: Folder, groups: Sequence[tuple[str, int]], row_groups: Sequence[int], num_classes: int
) -> NDArray[np.int64]:
    """How many labels each class has in the first rows of row groups.

    Args:
        dataset: where the shards are.
        groups: of each row group its shard's path and its number there.
        row_groups: how many of its rows count, for the first row groups.
        num_classes: of the dataset.
    """
    counts = np.zeros(num_classes, np.int64)
    for (path, number), num_rows in zip(groups, row_groups, strict=False):
        column = row_group(dataset, path, number, ["class_ids"])["class_ids"].slice(0, num_rows)
        class_ids = pc.list_flatten(column).to_numpy()
        counts += np.bincount(class_ids, minlength=num_classes)
    return counts


def row_labels(table: pa.Table, i: int, task: str, num_keypoints: int = 0) -> RowLabels:
    """Labels of a row: class_ids (N,), boxes_xywhn (N, 4), polygons (N, P, 2), keypoints (N, K, 3), as ``augment.cpu.Source`` has them.

    Polygons of detect are left out: see :func:`row_polygons`.

    Args:
        table: with the task's columns of :func:`raypar.dataset.schema.row_schema`.
        i: the row.
        task: what its labels are.
        num_keypoints: K, for pose.
    """
    if task == "classify":
        return np.array([table["class_id"][i].as_py()], np.int32), WHOLE, None, None

    def flat(name: str) -> NDArray[Any]:
        found: NDArray[Any] = table[name][i].values.to_numpy(zero_copy_only=False)
        return found

    class_ids, boxes = flat("class_ids"), flat("boxes_xywhn").reshape(-1, 4)
    if task == "pose":
        return class_ids, boxes, None, flat("keypoints").reshape(-1, num_keypoints, 3)
    if task in ("segment", "obb"):
        polygons = row_polygons(table, i)
        return (
            class_ids,
            boxes,
            densify(polygons) if task == "segment" else np.reshape(polygons, (-1, 4, 2)).astype(np.float32),
            None,
        )
    return class_ids, boxes, None, None


def row_polygons(table: pa.Table, i: int) -> list[Floats]:
    """Polygons (P, 2) over width and height of a row, as they are in its shard; none for detect where the source has only boxes."""
    lists = table["segments_xyn"][i].values
    points, ends = (
        lists.values.to_numpy(zero_copy_only=False),
        lists.offsets.to_numpy(zero_copy_only=False),
    )
    return [points[a:b].reshape(-1, 2) for a, b in pairwise(ends)]
