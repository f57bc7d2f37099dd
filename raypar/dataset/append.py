"""Adding images to a complete dataset: those whose ids it has are left alone, new ones become new shards. Runs in: the driver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypar.dataset.formats import Listing
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.dataset.records import Records
from raypar.differences import differences
from raypar.storage import Folder

THREADS = 16


def check(before: Manifest, listing: Listing, dataset: Folder) -> None:
    """A source whose images can be added.

    Raises:
        ValueError: its task, classes or keypoints are not those of the dataset.
    """
    names = ("task", "class_names", "keypoint_shape", "flip_idx")
    has, offers = ({name: getattr(side, name) for name in names} for side in (before, listing))
    if others := differences(has, offers, ("there", "in the source")):
        raise ValueError(f"prepare.append: {dataset.uri} is of another kind ({others}): they must be equal")


def taken(
    dataset: Folder, before: Manifest, splits: dict[str, Records]
) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """Image ids (large_binary) that each split has, and the number of its first new shard."""
    ids, first = {}, {}
    for split in splits.keys() & before.splits.keys():
        paths = [shard.path for shard in before.splits[split].shards]
        with ThreadPoolExecutor(THREADS) as threads:
            found = list(threads.map(lambda path: _image_ids(dataset, path), paths))
        ids[split] = pa.concat_arrays(found) if found else pa.array([], pa.large_binary())
        first[split] = 1 + max((int(path.rpartition("/")[2].partition(".")[0]) for path in paths), default=-1)
    return ids, first


def _image_ids(dataset: Folder, path: str) -> pa.Array:
    with dataset.open(path) as file:
        column = pq.ParquetFile(file).read(columns=["image_id"])["image_id"]
    return pc.cast(column.combine_chunks(), pa.large_binary())


def merged(
    dataset: Folder,
    rejected: list[dict[str, str]],
    wanted: Sequence[Any],
    splits: dict[str, Records],
    name: str,
) -> list[dict[str, str]]:
    """Lines of ``rejected.jsonl``: those of this run, and earlier ones of images that were not tried again."""
    tried = {
        (portion.split, record.image_id)
        for portion in wanted
        for record in splits[portion.split].take(portion.rows)
    }
    earlier = [json.loads(line) for line in dataset.read(name).splitlines()] if dataset.exists(name) else []
    kept = [
        line for line in earlier if (line["split"], line["image_id"]) not in tried and line not in rejected
    ]
    return sorted([*kept, *rejected], key=lambda line: (line["split"], line["image_id"]))


def added(before: Manifest, new: Manifest) -> Manifest:
    """The manifest of both: new shards after those that were there."""
    splits = {
        name: _joined(before.splits.get(name), new.splits.get(name))
        for name in dict.fromkeys([*before.splits, *new.splits])
    }
    sources = dict.fromkeys([*before.source.split(" + "), new.source])
    return before.model_copy(
        update={
            "splits": splits, "source": " + ".join(sources), "num_rejected": new.num_rejected,
            "num_repaired": before.num_repaired + new.num_repaired, "versions": new.versions,
        }
    )  # fmt: skip


def _joined(one: Split | None, other: Split | None) -> Split:
    if one is None or other is None:
        found = one or other
        assert found is not None
        return found
    shards: tuple[Shard, ...] = (*one.shards, *other.shards)
    appended = (*one.appended, len(one.shards)) if one.shards and other.shards else one.appended
    return Split(
        shards=shards,
        appended=appended,
        num_images=one.num_images + other.num_images,
        num_boxes=one.num_boxes + other.num_boxes,
        num_polygons=one.num_polygons + other.num_polygons,
        num_backgrounds=one.num_backgrounds + other.num_backgrounds,
        boxes_per_class=tuple(a + b for a, b in zip(one.boxes_per_class, other.boxes_per_class, strict=True)),
    )
