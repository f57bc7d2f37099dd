"""Training of segment, pose, obb and classify without Ray: the loop learns them, and its validation is that of ``YOLO.val``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ultralytics import YOLO

from raypar.augment.labels import Labels
from raypar.dataset.batch import Batch
from raypar.dataset.formats import shapes
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.plan import Plan
from raypar.dataset.rows import row_labels
from raypar.dataset.stream import StreamSpec, recipe_of, render
from raypar.judge import class_of_pixels
from raypar.scores import ULTRALYTICS_NAMES
from raypar.storage import Folder
from raypar.train.loop import Loop, to_tensors
from raypar.train.recipe import Lender, settings, weights_file
from raypar.train.validate import make_validator

NUM_IMAGES, BATCH, STEPS, SIZE = 12, 6, 40, 96
MODELS = {"segment": "yolov8n-seg", "pose": "yolov8n-pose", "obb": "yolov8n-obb", "classify": "yolov8n-cls"}
PLAIN = {
    "mosaic": 0.0,
    "scale": 0.0,
    "translate": 0.0,
    "fliplr": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "erasing": 0.0,
    "auto_augment": "",
}


def prepared(folder: Path, task: str) -> Manifest:
    """The same images for training and validation: what is learnt by heart is found again."""
    listing = shapes.scan({"train": NUM_IMAGES}, task)
    job = ShardJob(Folder.at(str(folder)), "train/0.parquet", "train", "shapes", 4, tuple(listing.splits["train"]), 4, 10**7, 0, (72, 96), task,
                   listing.keypoint_shape)  # fmt: skip
    report = write_shard(job)
    assert report.shard is not None
    split = Split(
        shards=(report.shard,),
        num_images=report.num_images,
        num_boxes=report.num_boxes,
        boxes_per_class=(1, 1, 1, 1),
    )
    return Manifest(task=task, class_names=listing.class_names, splits={"train": split, "val": split}, source="shapes",
                    keypoint_shape=listing.keypoint_shape, flip_idx=listing.flip_idx)  # fmt: skip


def as_yolo(folder: Path, manifest: Manifest, root: Path) -> str:
    """The dataset as Ultralytics wants it: a data.yaml, or for classify a folder of folders."""
    points = manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
    table = pq.read_table(folder / "train/0.parquet")
    for i, image in enumerate(table["image"].to_pylist()):
        class_ids, boxes, polygons, keypoints = row_labels(table, i, manifest.task, points)
        if manifest.task == "classify":
            for split in ("train", "val"):
                (root / split / manifest.class_names[class_ids[0]]).mkdir(parents=True, exist_ok=True)
                (root / split / manifest.class_names[class_ids[0]] / f"{i}.png").write_bytes(image)
            continue
        rows: Any = boxes if polygons is None else table["segments_xyn"][i].as_py()
        if keypoints is not None:
            rows = [
                [*box, *points]
                for box, points in zip(
                    boxes, keypoints.reshape(len(boxes), keypoints[0].size if len(boxes) else 0), strict=True
                )
            ]
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        (root / "images" / f"{i:03d}.png").write_bytes(image)
        lines = [
            " ".join([str(c), *map(repr, map(float, row))]) for c, row in zip(class_ids, rows, strict=True)
        ]
        (root / "labels" / f"{i:03d}.txt").write_text("\n".join(lines))
    if manifest.task == "classify":
        return str(root)
    names = dict(enumerate(manifest.class_names))
    data: dict[str, Any] = {"path": str(root), "train": "images", "val": "images", "names": names}
    if manifest.keypoint_shape:
        data |= {
            "kpt_shape": list(manifest.keypoint_shape),
            "flip_idx": list(manifest.flip_idx or range(points)),
        }
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return str(root / "data.yaml")


@pytest.mark.parametrize("task", list(MODELS))
def test_a_task_is_learnt_and_judged_as_by_ultralytics(tmp_path: Path, task: str) -> None:
    manifest, dataset = prepared(tmp_path / "dataset", task), Folder.at(str(tmp_path / "dataset"))
    torch.set_num_threads(2)
    yolo = {
        "imgsz": SIZE,
        "epochs": STEPS,
        "warmup_epochs": 0.0,
        "optimizer": "AdamW",
        "lr0": 0.003,
        "lrf": 1.0,
        "nbs": BATCH,
        **PLAIN,
    }
    lender = Lender(
        yolo, model=f"{MODELS[task]}.yaml", manifest=manifest, batch=BATCH, seed=0, device=torch.device("cpu")
    )
    plan = Plan(manifest.split("train").shards[0].row_groups, seed=0, global_batch=BATCH, epochs=1)
    spec = StreamSpec.of(dataset, manifest.split("train"), plan, recipe_of(vars(lender.args), manifest), mosaic_epochs=0, albumentations=[],
                         world_size=1)  # fmt: skip
    batches = [to_tensors(batch) for item in plan.items() for batch in render(spec, item)]
    loop = Loop(lender, num_images=NUM_IMAGES, steps_per_epoch=len(batches))
    loop.start_epoch()
    losses = []
    for step in range(STEPS):
        batch = {name: value.clone() for name, value in batches[step % len(batches)].items()}
        losses.append(sum(float(v) for v in loop.step(batch, step).values()))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])

    model = lender.model.eval()
    for module in model.modules():  # few steps: the running statistics lag behind
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3
    model.train()
    with torch.no_grad():
        for _ in range(10):
            for one in batches:
                model(lender.preprocess_batch({k: v.clone() for k, v in one.items()})["img"])
    (tmp_path / "best.pt").write_bytes(weights_file(model, lender.args, epoch=0, metrics={}))
    saved = YOLO(tmp_path / "best.pt").model.float()
    lender.model.criterion = None
    found = make_validator(lender, dataset, rank=0, world_size=1, batch=5)(
        saved.eval(), lender.model, torch.device("cpu")
    )
    theirs = YOLO(tmp_path / "best.pt").val(
        data=as_yolo(tmp_path / "dataset", manifest, tmp_path / "yolo"), imgsz=SIZE, batch=1, plots=False, verbose=False, workers=0,
        device="cpu", project=str(tmp_path), conf=0.01 if task == "obb" else 0.001)  # fmt: skip
    expected = {
        ours: float(theirs.results_dict[name])
        for ours, name in ULTRALYTICS_NAMES.items()
        if name in theirs.results_dict
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["fitness"] == pytest.approx(float(theirs.results_dict["fitness"]), abs=1e-4)
    assert found["fitness"] > 0.05  # it did learn, so that the figures say something
    assert all(np.isfinite(value) for name, value in found.items() if name.startswith("val/"))


def test_the_class_of_each_pixel() -> None:
    masks = torch.tensor([[[0, 1], [2, 2]], [[0, 0], [0, 0]], [[1, 0], [0, 1]]])
    found = class_of_pixels(masks, torch.tensor([3, 1, 2]), torch.tensor([0, 0, 2]))
    assert found[0].tolist() == [[1, 3], [1, 1]]  # where there is none, as in Ultralytics: the last one
    assert not found[1].any()
    assert found[2].tolist() == [[2, 2], [2, 2]]


def test_classify_trains_at_its_trainers_size_unless_told_otherwise() -> None:
    assert (
        settings({}, task="classify").imgsz,
        settings({"imgsz": 64}, task="classify").imgsz,
        settings({}).imgsz,
    ) == (224, 64, 640)


def test_tensors_of_classify_are_images_and_classes() -> None:
    labels = Labels(np.array([2, 0], np.int32), np.zeros((0, 4), np.float32), np.arange(2, dtype=np.int32))
    batch = Batch(
        0,
        0,
        0,
        np.zeros((2, 3, 8, 8), np.uint8),
        labels.class_ids,
        labels.boxes_xywhn,
        labels.image_index,
        np.arange(2),
    )
    tensors = to_tensors(batch)
    assert set(tensors) == {"img", "cls"}
    assert tensors["cls"].tolist() == [2, 0]
