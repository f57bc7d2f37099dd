"""Training of segment, pose, obb and classify without Ray: the loop learns them, and its validation is that of ``YOLO.val``."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.models.yolo.detect import DetectionValidator

import raypar.evaluate
from raypar.augment.labels import Labels
from raypar.config import EvaluateConfig
from raypar.dataset.batch import Batch
from raypar.dataset.formats import shapes
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.plan import Plan
from raypar.dataset.rows import row_labels
from raypar.dataset.stream import StreamSpec, recipe_of, render
from raypar.detector import Detector
from raypar.images import decode
from raypar.judge import VALIDATORS, Judge, class_of_pixels, classified
from raypar.scores import ULTRALYTICS_NAMES
from raypar.storage import Folder
from raypar.train.loop import Loop, to_tensors
from raypar.train.recipe import Lender, settings, weights_file
from raypar.train.validate import make_validator

NUM_IMAGES, BATCH, STEPS, SIZE = 24, 6, 40, 96
SIZES = ((72, 96), (96, 72), (60, 100), (96, 96), (50, 100), (100, 64))
MODELS = {
    "detect": "yolov8n",
    "segment": "yolov8n-seg",
    "pose": "yolov8n-pose",
    "obb": "yolov8n-obb",
    "classify": "yolov8n-cls",
}
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
    """Images of six aspect ratios, the same for training and validation: what is learnt by heart is found again."""
    listing = shapes.scan({"train": NUM_IMAGES}, task)
    records, reports = tuple(listing.splits["train"]), []
    for i, hw in enumerate(SIZES):
        job = ShardJob(Folder.at(str(folder)), f"train/{i}.parquet", "train", "shapes", 4, records[i :: len(SIZES)], 4, 10**7, 0, hw, task,
                       listing.keypoint_shape)  # fmt: skip
        reports.append(write_shard(job))
    split = Split(
        shards=tuple(report.shard for report in reports if report.shard),
        num_images=sum(report.num_images for report in reports),
        num_boxes=sum(report.num_boxes for report in reports),
        boxes_per_class=(1, 1, 1, 1),
    )
    assert split.num_images == NUM_IMAGES
    return Manifest(task=task, class_names=listing.class_names, splits={"train": split, "val": split}, source="shapes",
                    keypoint_shape=listing.keypoint_shape, flip_idx=listing.flip_idx)  # fmt: skip


def as_yolo(folder: Path, manifest: Manifest, root: Path) -> str:
    """The dataset as Ultralytics wants it: a data.yaml, or for classify a folder of folders."""
    points = manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "train").iterdir())])
    table = table.sort_by("image_id")
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
    row_groups = tuple(n for shard in manifest.split("train").shards for n in shard.row_groups)
    plan = Plan(row_groups, seed=0, global_batch=BATCH, epochs=1)
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
    lender.model.criterion = None
    data = as_yolo(tmp_path / "dataset", manifest, tmp_path / "yolo")

    saved = YOLO(tmp_path / "best.pt").model.float().eval()
    found = make_validator(lender, dataset, rank=0, world_size=1, batch=2 * BATCH)(
        saved, lender.model, torch.device("cpu")
    )
    saved.args = lender.args
    losses_of = [name.removeprefix("val/") for name in found if name.startswith("val/")]
    assert_same(found, theirs_in_training(task, saved, data, losses_of, tmp_path))
    assert found["fitness"] > 0.05  # it did learn, so that the figures say something
    theirs = YOLO(tmp_path / "best.pt").val(
        data=data, plots=False, verbose=False, workers=0, device="cpu", project=str(tmp_path)
    )
    assert_same(
        evaluated(tmp_path, manifest, EvaluateConfig().batch),
        {**theirs.results_dict, "fitness": theirs.fitness},
    )


def theirs_in_training(task: str, model: Any, data: str, losses: list[str], folder: Path) -> dict[str, float]:
    """What Ultralytics' own validator tells its trainer of a model: metrics and losses, of five digits."""
    settings = {"imgsz": SIZE, "task": task, "rect": task != "classify", "workers": 0, "plots": False}
    validator = (VALIDATORS | {"detect": DetectionValidator})[task](
        save_dir=folder, args=vars(get_cfg(overrides=settings))
    )
    validator.data = check_cls_dataset(data) if task == "classify" else check_det_dataset(data)
    validator.stride, validator.device = 32, torch.device("cpu")
    validator.names = model.names  # for classify, whose folders are in another order than the classes
    # as BaseTrainer._build_train_pipeline
    batch = BATCH * (1 if task == "obb" else 2)
    validator.dataloader = validator.get_dataloader(str(validator.data["val"]), batch)
    trainer = SimpleNamespace(
        device=torch.device("cpu"),
        data=validator.data,
        amp=True,
        ema=SimpleNamespace(ema=model),
        loss_items={name: torch.zeros(()) for name in losses},
        stopper=SimpleNamespace(possible_stop=False),
        epoch=0,
        epochs=2,
        world_size=1,
        label_loss_items=lambda items, prefix: {f"{prefix}/{name}": value for name, value in items.items()},
    )
    found: dict[str, float] = validator(trainer)
    return found


def assert_same(found: dict[str, Any], theirs: dict[str, float]) -> None:
    """To the digit: Ultralytics writes five."""
    names = {ours: name for ours, name in ULTRALYTICS_NAMES.items() if name in theirs}
    names |= {name: name for name in theirs if name.startswith("val/") or name == "fitness"}
    assert {ours: found[ours] for ours in names} == pytest.approx(
        {ours: float(theirs[name]) for ours, name in names.items()}, abs=1e-5
    )


def evaluated(folder: Path, manifest: Manifest, batch: int) -> dict[str, Any]:
    """What ``raypar evaluate`` finds, its actors called one by one."""
    dataset, split = Folder.at(str(folder / "dataset")), manifest.split("val")
    items, _ = raypar.evaluate._items(dataset, split, manifest.task, batch)
    conf = 0.01 if manifest.task == "obb" else 0.001
    pool = SimpleNamespace(
        load=lambda: Detector.load(folder / "best.pt", task=manifest.task, conf=conf, pad=0.5)
    )
    args = {"imgsz": SIZE, "conf": conf, "task": manifest.task, "single_cls": False}
    job = raypar.evaluate.Job(
        dataset, list(manifest.class_names), manifest, args, False, None, batch, split.shards[0].path
    )
    kind = raypar.evaluate.Worker if manifest.task == "detect" else raypar.evaluate.JudgedWorker
    worker: Any = kind(pool, job)  # type: ignore[arg-type]
    parts = [
        pickle.loads(worker({name: [value] for name, value in item.items()})["part"][0]) for item in items
    ]
    (folder / "pictures").mkdir()
    for part in parts:
        for name, data in part["pictures"].items():
            (folder / "pictures" / name).write_bytes(data)
    found: dict[str, Any] = kind.joined(
        job, [part["scores"] for part in reversed(parts)], folder / "pictures"
    )
    return found


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_pictures_show_sixteen_images_as_they_are(tmp_path: Path, task: str) -> None:
    """Of all shapes, labels and predictions alike: Ultralytics draws in threads that scale one array in place."""
    manifest = prepared(tmp_path / "dataset", task)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "dataset/train").iterdir())]
    table = pa.concat_tables([tables[i % len(SIZES)].slice(i // len(SIZES), 1) for i in range(NUM_IMAGES)])
    pq.write_table(table, tmp_path / "dataset/train/0.parquet", row_group_size=NUM_IMAGES)
    shard = manifest.split("val").shards[0].model_copy(update={"row_groups": (NUM_IMAGES,)})
    split = manifest.split("val").model_copy(update={"shards": (shard,)})
    manifest = manifest.model_copy(update={"splits": {"val": split}})
    lender = Lender(
        {"imgsz": SIZE}, model=f"{MODELS[task]}.yaml", manifest=manifest, batch=BATCH, seed=0, device=torch.device("cpu")
    )  # fmt: skip
    (tmp_path / "best.pt").write_bytes(weights_file(lender.model, lender.args, epoch=0, metrics={}))
    evaluated(tmp_path, manifest, 16)
    images = [decode(encoded) for encoded in table["image"].to_pylist()[:16]]
    if task == "classify":
        shown = [(classified(image, SIZE).images[0] * 255).numpy().transpose(1, 2, 0) for image in images]
    else:
        detector = Detector(lender.model, list(manifest.class_names), imgsz=SIZE, pad=0.5)
        (group,) = detector.letterbox(images, [detector.rectangle((1, 1))] * 16)
        shown = list(group.images.permute(0, 2, 3, 1).numpy())
    side = shown[0].shape[0]
    for name in ("val_batch0_labels.jpg", "val_batch0_pred.jpg"):
        sheet = decode((tmp_path / "pictures" / name).read_bytes()).astype(float)
        assert sheet.shape == (4 * side, 4 * side, 3)
        for i, expected in enumerate(shown):
            tile = sheet[side * (i % 4) :, side * (i // 4) :][:side, :side]
            # names, boxes and masks are drawn over it
            assert np.median(np.abs(tile - expected)) < 12, (name, i)


def test_each_picture_is_drawn_from_pixels_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics' plots run in threads and scale the pixels that they are given in place."""
    manifest = prepared(tmp_path, "classify")
    judge = Judge(manifest, get_cfg(overrides={"imgsz": SIZE, "task": "classify"}), tmp_path, plots=True)
    seen = []

    def plot(batch: dict[str, Any], *_: object) -> None:
        def scale() -> None:
            seen.append(float(batch["img"].max()))
            batch["img"] *= 255

        threading.Thread(target=scale).start()

    for name in ("plot_val_samples", "plot_predictions"):
        monkeypatch.setattr(judge.validator, name, plot)
    pixels = torch.linspace(0, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)
    batch = {"img": pixels, "cls": torch.zeros(1), "im_file": ["a"], "positions": [0]}
    judge.draw(torch.zeros(1, 4), batch)
    assert seen == [1.0, 1.0]
    assert float(pixels.max()) == 1.0


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
