"""From labels to packed batches for segment, pose, obb and classify: rows as they are written, and what the stream makes of them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from ultralytics.cfg import get_cfg

from raypar.augment import albu
from raypar.augment.classify import ClassifyRecipe
from raypar.dataset.batch import Batch, pack, unpack
from raypar.dataset.cache import CacheSpec, node_cache
from raypar.dataset.formats import shapes
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.plan import Plan
from raypar.dataset.rows import row_labels
from raypar.dataset.schema import TASKS, row_schema
from raypar.dataset.stream import StreamSpec, blocks, recipe_of
from raypar.storage import Folder

HW = (96, 128)
SIZE = 64


def prepared(folder: Path, task: str, num_images: int = 24) -> Manifest:
    listing = shapes.scan({"train": num_images}, task)
    job = ShardJob(Folder.at(str(folder)), "train/0.parquet", "train", "shapes", 4, tuple(listing.splits["train"]), 8, 10**7, 0, HW, task,
                   listing.keypoint_shape)  # fmt: skip
    report = write_shard(job)
    assert report.shard is not None
    assert not report.rejected
    split = Split(shards=(report.shard,), num_images=report.num_images, num_boxes=report.num_boxes)
    return Manifest(task=task, class_names=listing.class_names, splits={"train": split}, source="shapes",
                    keypoint_shape=listing.keypoint_shape, flip_idx=listing.flip_idx)  # fmt: skip


def make_spec(folder: Path, manifest: Manifest, world_size: int = 1, **settings: Any) -> StreamSpec:
    split = manifest.split("train")
    plan = Plan(row_groups=split.shards[0].row_groups, seed=0, epochs=3, global_batch=8, window_images=8)
    recipe = recipe_of(vars(get_cfg(overrides={"imgsz": SIZE, **settings})), manifest)
    return StreamSpec.of(
        Folder.at(str(folder)), split, plan, recipe, mosaic_epochs=2, albumentations=[], world_size=world_size
    )


def stream(spec: StreamSpec) -> list[Batch]:
    return [
        batch for item in spec.plan.items(0) for block in blocks(spec, item) for batch in unpack(pack(block))
    ]


@pytest.mark.parametrize("task", TASKS)
def test_rows_hold_what_was_drawn(tmp_path: Path, task: str) -> None:
    manifest = prepared(tmp_path, task)
    table = pq.read_table(tmp_path / "train" / "0.parquet")
    assert table.schema.equals(row_schema(task))
    num_keypoints = manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
    num_boxes = 0
    for i in range(table.num_rows):
        _, drawn = shapes.draw(0, "train", i, *HW, task=task)
        class_ids, boxes, polygons, keypoints = row_labels(table, i, task, num_keypoints)
        assert class_ids.tolist() == drawn.class_ids.tolist()
        num_boxes += len(class_ids)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (polygons is not None) == (task in ("segment", "obb"))
        assert (keypoints is not None) == (task == "pose")
        if polygons is not None and drawn.segments_xyn is not None:
            assert polygons.shape[0] == len(drawn.segments_xyn)
            for polygon, segment in zip(polygons, drawn.segments_xyn, strict=True):
                np.testing.assert_allclose(polygon.min(0), segment.min(0), atol=1e-6)
                np.testing.assert_allclose(polygon.max(0), segment.max(0), atol=1e-6)
        if keypoints is not None:
            np.testing.assert_allclose(keypoints, drawn.keypoints, atol=1e-6)
    assert num_boxes > 20


def test_shapes_have_the_labels_of_their_pixels() -> None:
    """A shape alone in its image: its polygon covers its pixels, its corners lie close around them, its keypoints on their edge."""
    num_alone = 0
    for index in range(60):
        image, segment = shapes.draw(0, "val", index, *HW, task="segment")
        if len(segment.class_ids) != 1:
            continue
        num_alone += 1
        is_shape = np.ptp(image.astype(int), axis=2) > 80
        mask = np.zeros(HW, np.uint8)
        assert segment.segments_xyn is not None
        cv2.fillPoly(mask, [np.round(segment.segments_xyn[0] * HW[::-1]).astype(np.int32)], 1)
        assert (is_shape & (mask == 1)).sum() > 0.85 * max(is_shape.sum(), mask.sum())
        _, pose = shapes.draw(0, "val", index, *HW, task="pose")
        assert pose.keypoints is not None
        seen = pose.keypoints[0][pose.keypoints[0][:, 2] > 0, :2]
        low, high = segment.segments_xyn[0].min(0), segment.segments_xyn[0].max(0)
        assert ((seen >= low - 1e-9) & (seen <= high + 1e-9)).all()
        _, obb = shapes.draw(0, "val", index, *HW, task="obb")
        assert obb.segments_xyn is not None
        around = (obb.segments_xyn[0] * HW[::-1]).astype(np.float32)
        assert all(
            cv2.pointPolygonTest(around, (float(x), float(y)), True) > -1.0 for y, x in np.argwhere(is_shape)
        )
    assert num_alone > 3


@pytest.mark.parametrize("task", TASKS)
def test_the_stream_packs_the_tasks_labels(tmp_path: Path, task: str) -> None:
    manifest = prepared(tmp_path, task)
    batches = stream(make_spec(tmp_path, manifest))
    assert len(batches) == 9
    for batch in batches:
        num = len(batch.class_ids)
        assert batch.images.shape == (8, 3, SIZE, SIZE)
        assert batch.image_index.max() < 8
        assert (batch.masks is None) == (task != "segment")
        assert (batch.keypoints is None) == (task != "pose")
        assert (batch.boxes_xywhr is None) == (task != "obb")
        if task == "classify":
            assert (num, len(batch.boxes_xywhn)) == (8, 0)
            continue
        assert batch.boxes_xywhn.shape == (num, 4)
        counts = np.bincount(batch.image_index, minlength=8)
        if batch.masks is not None:
            assert batch.masks.shape == (8, SIZE // 4, SIZE // 4)
            assert (batch.masks.max((1, 2)) <= counts).all()
            assert batch.masks.max() > 1
        if batch.keypoints is not None:
            assert batch.keypoints.shape == (num, 5, 3)
            assert ((batch.keypoints[..., :2] >= 0) & (batch.keypoints[..., :2] <= 1)).all()
        if batch.boxes_xywhr is not None:
            assert batch.boxes_xywhr.shape == (num, 5)
    assert sum(len(batch.class_ids) for batch in batches) >= 9 * 8


@pytest.mark.parametrize("task", TASKS)
def test_the_stream_does_not_depend_on_the_number_of_workers(tmp_path: Path, task: str) -> None:
    manifest = prepared(tmp_path, task)
    one, two = (stream(make_spec(tmp_path, manifest, world_size)) for world_size in (1, 2))
    for whole, first, second in zip(one, two[::2], two[1::2], strict=True):
        for name in ("images", "class_ids", "boxes_xywhn", "masks", "keypoints", "boxes_xywhr"):
            values = [getattr(batch, name) for batch in (whole, first, second)]
            if values[0] is not None:
                np.testing.assert_array_equal(values[0], np.concatenate(values[1:]))


# a process keeps one cache open, and lets go of the last
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("task", TASKS)
def test_a_cache_changes_nothing(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepared(tmp_path, task)
    plain = make_spec(tmp_path, manifest)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cached = replace(plain, cache=CacheSpec("disk", f"tasks-{task}", 1 << 28))
    for _ in range(2):  # the second time all comes from the cache
        for one, other in zip(stream(plain), stream(cached), strict=True):
            assert pack([one]).equals(pack([other]))
    node_cache.cache_clear()


def test_classify_is_ultralytics(tmp_path: Path) -> None:
    """The same transforms in the same state of torch's generator give the same bits."""
    import torch
    from PIL import Image
    from ultralytics.data.augment import classify_augmentations

    from raypar.augment.classify import augment

    image, _ = shapes.draw(0, "train", 5, 200, 150, task="classify")
    for auto_augment in (None, "randaugment", "augmix", "autoaugment"):
        settings = {
            "fliplr": 0.5,
            "flipud": 0.3,
            "hsv_h": 0.1,
            "hsv_s": 0.5,
            "hsv_v": 0.4,
            "erasing": 0.6,
            "scale": 0.6,
        }
        args = vars(get_cfg(overrides={"imgsz": SIZE, **settings}))
        args["auto_augment"] = auto_augment
        recipe = ClassifyRecipe.from_yolo(args)
        theirs = classify_augmentations(SIZE, scale=(0.4, 1.0), hflip=0.5, vflip=0.3, auto_augment=auto_augment, hsv_h=0.1, hsv_s=0.5,
                                        hsv_v=0.4, erasing=0.6)  # fmt: skip
        before = torch.get_rng_state()
        for seed in range(20):
            out = np.empty((3, SIZE, SIZE), np.uint8)
            augment(recipe, image, seed, out)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                expected = theirs(Image.fromarray(image))
            assert torch.equal(torch.from_numpy(out).float() / 255, expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_what_classify_cannot_honour_is_said() -> None:
    args = vars(get_cfg(overrides={"imgsz": SIZE}))
    with pytest.raises(ValueError, match="auto_augment"):
        ClassifyRecipe.from_yolo(args | {"auto_augment": "magic"})
    with pytest.raises(ValueError, match="one number"):
        ClassifyRecipe.from_yolo(args | {"scale": (0.5, 1.0)})


def test_a_class_stays_when_albumentations_move_pixels() -> None:
    moving = [{"HorizontalFlip": {"p": 1.0}}]
    image, class_ids, boxes = (
        np.zeros((40, 50, 3), np.uint8),
        np.array([3], np.int32),
        np.array([[0.5, 0.5, 1, 1]], np.float32),
    )
    image[:, 25:] = 200
    flipped, kept, _ = albu.make(moving, "classify")(image, class_ids, boxes, np.random.default_rng(0))
    assert (flipped[:, :25] == 200).all()
    assert kept.tolist() == [3]
