"""From the same files on disk to a batch: raypar's readers, shards and stream against Ultralytics' dataset with the same draws.

``benchmarks/parity.py`` does the same for 200 images of each kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.parity import KINDS, SEED, compare, prepared, write
from raypar.augment.geometry import Recipe
from raypar.augment.outlines import Outlines
from raypar.dataset.append import added
from raypar.dataset.encoded import encoded_blocks
from raypar.dataset.plan import Plan
from raypar.dataset.rows import row_group
from raypar.dataset.stream import StreamSpec, labels_of, render
from raypar.prepare import _partly_outlined
from raypar.storage import Folder

COUNT, IMGSZ = 20, 256


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_the_same_files_are_equal(tmp_path: Path, kind: str) -> None:
    found = compare(kind, tmp_path, count=COUNT, imgsz=IMGSZ)
    assert found.is_fine(), found
    assert found.images == 64
    assert found.labels >= 64


def test_mix_up_and_cut_mix_too(tmp_path: Path) -> None:
    found = compare(
        "polygons", tmp_path, count=COUNT, imgsz=IMGSZ, mosaic=0.5, mixup=0.4, cutmix=0.6, degrees=15.0
    )
    assert found.is_fine(), found
    assert found.labels >= 64


def spec_of(folder: Path, kind: str, recipe: Recipe | None = None) -> StreamSpec:
    write(kind, folder / "source", COUNT, IMGSZ)
    dataset = Folder.at(str(folder / "dataset"))
    split = prepared(folder / "source", dataset, *KINDS[kind][:2]).split("train")
    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups), seed=SEED, global_batch=8, epochs=1
    )
    recipe = recipe or Recipe(64, scale=0.5, translate=0.1)
    return StreamSpec.of(dataset, split, plan, recipe, mosaic_epochs=1, albumentations=[], world_size=1)


@pytest.mark.parametrize(
    ("kind", "is_kept"),
    [("polygons", True), ("coco", True), ("mixed", False), ("detect", False), ("coco boxes", False)],
)
def test_polygons_of_detect_are_used_when_every_box_has_one(tmp_path: Path, kind: str, is_kept: bool) -> None:
    spec = spec_of(tmp_path, kind)
    assert spec.has_polygons == is_kept
    manifest = prepared(tmp_path / "source", spec.dataset, *KINDS[kind][:2])
    assert len(_partly_outlined(manifest)) == (kind == "mixed")
    assert ("segments_xyn" in spec.label_columns) == is_kept
    table = row_group(spec.dataset, *spec.groups[0], spec.label_columns)
    for i in range(table.num_rows):
        class_ids, boxes, polygons, _ = labels_of(spec, table, i)
        assert len(class_ids) == len(boxes)
        assert isinstance(polygons, Outlines) == is_kept
        if isinstance(polygons, Outlines) and len(polygons):
            low, high = polygons.extent(polygons.points)
            np.testing.assert_allclose(np.concatenate([(low + high) / 2, high - low], 1), boxes, atol=1e-6)


@pytest.mark.parametrize("kind", ["polygons", "coco"])
def test_both_renderers_have_the_same_boxes(tmp_path: Path, kind: str) -> None:
    spec = spec_of(tmp_path, kind)
    num_boxes = 0
    for item in spec.plan.items():
        encoded = [batch for block in encoded_blocks(spec, item) for batch in block]
        for batch, other in zip(render(spec, item), encoded, strict=True):
            np.testing.assert_allclose(batch.boxes_xywhn, other.labels.boxes_xywhn, atol=1e-4)
            num_boxes += len(batch.boxes_xywhn)
    assert num_boxes > 40


def test_a_dataset_from_before_has_no_polygons_and_can_be_added_to(tmp_path: Path) -> None:
    """Shards that lack the column, and a manifest that counts no polygons."""
    spec = spec_of(tmp_path / "a", "polygons")
    manifest = prepared(tmp_path / "a" / "source", spec.dataset, "detect", "yolo")
    for shard in manifest.split("train").shards:
        path = tmp_path / "a" / "dataset" / shard.path
        table = pq.read_table(path).drop_columns(["segments_xyn"])
        pq.write_table(table, path, row_group_size=shard.row_groups[0], use_dictionary=False)
    value = manifest.model_dump(mode="json")
    for split in value["splits"].values():
        del split["num_polygons"]
    before = type(manifest).model_validate(value)
    split = before.split("train")
    old = StreamSpec.of(
        spec.dataset, split, spec.plan, spec.recipe, mosaic_epochs=1, albumentations=[], world_size=1
    )
    assert not old.has_polygons
    assert sum(len(batch.class_ids) for item in old.plan.items() for batch in render(old, item)) > 40
    assert not added(before, manifest).split("train").has_polygons
    assert added(manifest, manifest).split("train").has_polygons
    # a split without a box has none that lacks a polygon: its rows are read as if they had the column
    table = row_group(old.dataset, *old.groups[0], ["class_ids", "boxes_xywhn", "segments_xyn"])
    assert table["segments_xyn"].to_pylist() == [[]] * table.num_rows
