"""``raypar evaluate``: weights and a split of the dataset -> metrics and pictures.

    {storage}/{name}/{evaluate.name}/
        BoxPR_curve.png  BoxF1_curve.png  BoxP_curve.png  BoxR_curve.png
        confusion_matrix.png  confusion_matrix_normalized.png
        detections.png      labels beside detections; of other tasks val_batch0_labels.jpg and val_batch0_pred.jpg
        settings.json  run.yaml
        metrics.json        written last: where it is, the evaluation is complete

Runs in: the driver. It sorts the images by aspect ratio into batches, each with a rectangle of its own, as ``yolo val`` does. Ray Data
deals row groups to a pool of actors, each with a detector, which letterbox an image into the rectangle of its batch whoever its neighbours
are; their scores are merged by the order of the batches, so the numbers do not depend on who saw which image.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.manifest import MANIFEST, Manifest, Split
from raypar.dataset.rows import only_classes, read_sizes, row_group
from raypar.differences import list_differences
from raypar.outputs import Output
from raypar.pool import DetectorPool, read_facts
from raypar.rectangles import SQUARE, raised_max_det, rectangles, squares
from raypar.scores import scores_of
from raypar.storage import Folder
from raypar.weights import Weights, find
from raypar.yolo_keys import chosen_classes

if TYPE_CHECKING:
    from raypar.detector import Detections, Detector, Letterboxed

RESULT = "metrics.json"
NUM_SAMPLES = 8  # images in detections.png
SHEET_IMAGES = 16  # in the pictures of other tasks, as many as Ultralytics draws
SAMPLE_CONF = 0.25


@dataclass(frozen=True)
class Job:
    """What every actor must know."""

    dataset: Folder
    class_names: list[str]
    manifest: Manifest
    args: dict[str, Any]  # Ultralytics' settings that differ from its defaults
    is_single_class: bool
    classes: tuple[int, ...] | None  # whose labels count; None: all
    batch: int
    sampled_shard: str  # its first images are in the pictures


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray.

    Raises:
        ValueError: no dataset, no such split, no weights, or weights that cannot be read or are for another task or other classes.
    """
    manifest = Manifest.load(config.dataset_folder)
    verify.check_sizes(config.dataset_folder, manifest, (config.evaluate.split,))
    _known(find(config.evaluate.weights, config.folder, "evaluate"), config, manifest)


def run(config: RunConfig) -> dict[str, Any]:
    """Evaluates, and returns what ``metrics.json`` holds; a complete result for the same weights and settings is returned as it is.

    Raises:
        ValueError: weights that cannot be read or are for other classes, no dataset, a result with other settings.
    """
    section, dataset = config.evaluate, config.dataset_folder
    output = Output("evaluate", config, RESULT)
    manifest = Manifest.load(dataset)
    verify.check_sizes(dataset, manifest, (section.split,))
    split = manifest.split(section.split)
    weights = find(section.weights, config.folder, "evaluate")
    is_single_class = bool(config.train.yolo.get("single_cls", False))
    known, imgsz, sha256 = _known(weights, config, manifest)
    class_names = known if is_single_class else list(manifest.class_names)
    if known != class_names:
        others = list_differences("class", known, class_names, ("in the weights", "in the dataset"))
        print(f"evaluate: classes are named otherwise ({others}); they are compared by number", flush=True)
    # Ultralytics' default for rotated boxes
    conf = 0.01 if manifest.task == "obb" and section.conf == 0.001 else section.conf
    classes = chosen_classes(config.train.yolo.get("classes"))  # as training validates
    settings = {
        "weights_sha256": sha256, "split": section.split, "imgsz": imgsz, "conf": conf, "iou": section.iou,
        "max_det": section.max_det, "batch": section.batch, "forward_precision": section.precision,
        "dataset_sha256": hashlib.sha256(dataset.read(MANIFEST)).hexdigest(),
        "classes": None if classes is None else list(classes), "single_cls": is_single_class,
    }  # fmt: skip
    if (before := output.finished(settings)) is not None:
        return before
    verify.check_sums(dataset, manifest, (section.split,))
    output.begin(settings)
    weights = weights.staged(output.folder)
    items, num_labels = _items(dataset, split, manifest.task, section.batch)
    max_det = raised_max_det(section.max_det, num_labels)
    if max_det > section.max_det:
        print(
            f"evaluate: images have up to {num_labels} labels: {max_det} boxes an image are kept", flush=True
        )
    pool = DetectorPool(weights, sha256, {"imgsz": imgsz, "precision": section.precision, "conf": section.conf, "iou": section.iou,
                        "max_det": max_det, "pad": 0.5, "task": manifest.task, "trusted": config.weights_trusted}, min(section.num_workers, len(items)), section.use_gpu)  # fmt: skip
    args = {"imgsz": imgsz, "conf": conf, "iou": section.iou, "max_det": max_det, "single_cls": is_single_class, "classes": classes,
            "mask_ratio": config.train.yolo.get("mask_ratio", 4), "task": manifest.task}  # fmt: skip
    job = Job(
        dataset, class_names, manifest, args, is_single_class, classes, section.batch, split.shards[0].path
    )
    print(f"evaluate: {split.num_images} '{section.split}' images, weights {weights.uri}, imgsz {imgsz}, "
          f"{pool.num_actors} worker(s){'' if classes is None else f', labels of classes {list(classes)} alone (train.yolo.classes)'}", flush=True)  # fmt: skip
    return _evaluate(pool, job, items, split, settings, output.folder)


def _items(dataset: Folder, split: Split, task: str, batch: int) -> tuple[list[dict[str, Any]], int]:
    """What the actors are dealt: for each row group where it is, and of its images their rectangles (``sides``, over imgsz) and positions in
    the order of ``yolo val``. And the labels of the image that has most."""
    sizes = read_sizes(dataset, split)
    batches = (
        squares(sizes.image_ids, batch)
        if task == "classify"
        else rectangles(sizes.image_ids, sizes.hws, batch)
    )
    sides = batches.sides[batches.batch_of]
    items, first = [], 0
    for shard in split.shards:
        for group, num_rows in enumerate(shard.row_groups):
            rows = slice(first, first + num_rows)
            first += num_rows
            items.append(
                {
                    "shard": shard.path,
                    "group": group,
                    "sides": sides[rows].tolist(),
                    "positions": batches.position_of[rows].tolist(),
                }
            )
    return items, sizes.num_labels


def _known(weights: Weights, config: RunConfig, manifest: Manifest) -> tuple[list[str], int, str]:
    """Class names of the model, its image size in px, and the checksum of its file: read by the driver, which fails at once."""
    section, num_classes = config.evaluate, len(manifest.class_names)
    is_single_class = bool(config.train.yolo.get("single_cls", False))
    known, imgsz, sha256 = read_facts(
        weights, section.imgsz, manifest.task, precision=section.precision, trusted=config.weights_trusted
    )
    expected = 1 if is_single_class else num_classes
    if len(known) != expected:
        raise ValueError(f"{weights.uri} knows {len(known)} classes, the dataset has {expected}: "
                         f"evaluate weights that were trained on it")  # fmt: skip
    return known, imgsz, sha256


def _evaluate(pool: DetectorPool, job: Job, items: list[dict[str, Any]], split: Split, settings: dict[str, Any],
              out: Folder) -> dict[str, Any]:  # fmt: skip
    from raypar.progress import Progress

    worker = Worker if job.manifest.task == "detect" else JudgedWorker
    parts: list[dict[str, Any]] = []
    began = time.monotonic()
    progress = Progress(split.num_images, "images", "evaluate")
    for row in pool.map(items, worker, job):
        parts.append(pickle.loads(row["part"]))
        progress.update(parts[-1]["num_images"] + len(parts[-1]["unreadable"]))
    seconds = time.monotonic() - began
    progress.close()
    unreadable = sorted(
        (line for part in parts for line in part["unreadable"]), key=lambda line: line["image_id"]
    )
    with tempfile.TemporaryDirectory(prefix="raypar-evaluate-") as folder:
        metrics = worker.joined(job, [part["scores"] for part in parts if part["num_images"]], Path(folder))
        if (num_seen := metrics["num_images"] + len(unreadable)) != split.num_images:
            raise RuntimeError(
                f"{num_seen} images were seen, the dataset has {split.num_images}: prepare it again"
            )
        for part in parts:
            for name, data in part["pictures"].items():
                (Path(folder) / name).write_bytes(data)
        for picture in sorted([*Path(folder).glob("*.png"), *Path(folder).glob("*.jpg")]):
            out.upload(picture, picture.name)
    result = {**metrics, **settings, "boxes_kept": job.args["max_det"], "task": job.manifest.task, "weights": pool.weights.uri, "num_workers": pool.num_actors,
              "images_per_s": split.num_images / seconds, "num_unreadable": len(unreadable), "unreadable": unreadable, "seconds": seconds,
              "model_ms_per_image": 1000 * sum(part["seconds"] for part in parts) / split.num_images}  # fmt: skip
    out.write_json(RESULT, result)
    _print(result, out)
    return result


@dataclass(frozen=True)
class RowGroup:
    """Readable images of a row group.

    Attributes:
        rows: without their encoded images, with the column ``position``.
        shown: of each row, in its rectangle.
        sample: the first images of the first row group, uint8 (H, W, 3) RGB: for the pictures.
        unreadable: image id and reason of the others.
    """

    rows: pa.Table
    shown: list[Letterboxed]
    sample: list[Any]
    unreadable: list[dict[str, str]]

    @classmethod
    def read(cls, job: Job, item: dict[str, Any], detector: Detector) -> RowGroup:
        """What an item of :func:`_items` stands for. Images are letterboxed one by one: decoded they take much more memory."""
        from raypar.images import decode
        from raypar.judge import letterboxed

        shard, group = str(item["shard"]), int(item["group"])
        table = row_group(job.dataset, shard, group)
        num_sampled = SHEET_IMAGES if (shard, group) == (job.sampled_shard, 0) else 0
        good, unreadable = list[int](), list[dict[str, str]]()
        shown, sample = list[Any](), list[Any]()
        for i, row in enumerate(table.select(["image_id", "image", "height", "width"]).to_pylist()):
            try:
                image = decode(row["image"])
                if image.shape[:2] != (row["height"], row["width"]):
                    raise ValueError(f"image is {image.shape[1]}x{image.shape[0]}, it was {row['width']}x{row['height']} when prepared")  # fmt: skip
            except ValueError as error:
                unreadable.append({"image_id": row["image_id"], "reason": str(error)})
                continue
            height, width = item["sides"][i]
            shape = detector.rectangle((float(height), float(width)))
            shown.append(letterboxed(job.manifest.task, image, shape, detector))
            good.append(i)
            if len(sample) < num_sampled:
                sample.append(image)
        rows = table.drop_columns("image").append_column("position", pa.array(item["positions"], pa.int64()))
        return cls(rows.take(good), shown, sample, unreadable)

    def groups(self, batch: int) -> Iterator[Letterboxed]:
        """The images that share a shape, at most ``batch`` at a time; ``indices`` count rows."""
        from raypar.detector import joined

        alike: dict[tuple[int, ...], list[int]] = {}
        for i, one in enumerate(self.shown):
            alike.setdefault(tuple(one.images.shape), []).append(i)
        for indices in alike.values():
            for first in range(0, len(indices), batch):
                some = indices[first : first + batch]
                yield replace(joined([self.shown[i] for i in some]), indices=some)


class Worker:
    """An actor of the pool: a detector and the row groups that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        item = {name: values[0] for name, values in batch.items()}
        return {
            "part": np.array(
                [pickle.dumps(self._score(RowGroup.read(self.job, item, self.detector)))], dtype=object
            )
        }

    def _score(self, found: RowGroup) -> dict[str, Any]:
        from raypar.metrics import Scorer

        scorer, seconds = Scorer(self.job.class_names), 0.0
        rows = found.rows.to_pylist()
        labels = [_labels(row, self.job.is_single_class, self.job.classes) for row in rows]
        detections: dict[int, Detections] = {}
        for group in found.groups(self.job.batch):
            began = time.monotonic()
            detected = self.detector.postprocess(self.detector.forward(group.images), group)
            seconds += time.monotonic() - began
            detections |= dict(zip(group.indices, detected, strict=True))
        ordered = [detections[i] for i in range(len(rows))]
        scorer.update(
            ordered,
            [row["image_id"] for row in rows],
            [class_ids for class_ids, _ in labels],
            [boxes for _, boxes in labels],
            [row["position"] for row in rows],
        )
        tiles = [
            self._tile(rows[i]["image_id"], image, ordered[i], labels[i])
            for i, image in enumerate(found.sample[:NUM_SAMPLES])
        ]
        return {
            "scores": scorer.state(),
            "num_images": len(rows),
            "pictures": _samples(tiles),
            "unreadable": found.unreadable,
            "seconds": seconds,
        }

    @staticmethod
    def joined(job: Job, states: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Metrics of all parts, and pictures in a local folder."""
        from raypar.metrics import Scorer

        scorer = Scorer(job.class_names)
        for state in states:
            scorer.merge(state)
        return scorer.compute(plots_folder=folder)

    def _tile(
        self, image_id: str, image: Any, found: Detections, labels: tuple[Any, Any]
    ) -> tuple[str, bytes]:
        """Image id and a PNG: the image with its labels, and beside it with what was found."""
        from raypar.draw import boxes_on
        from raypar.images import encode_png

        sure = found.confidences > SAMPLE_CONF
        truth = boxes_on(image, labels[1], labels[0], self.job.class_names)
        drawn = boxes_on(
            image,
            found.boxes_xyxy[sure],
            found.class_ids[sure],
            self.job.class_names,
            found.confidences[sure],
        )
        return image_id, encode_png(
            np.concatenate([truth, np.full((image.shape[0], 4, 3), 255, np.uint8), drawn], 1)
        )


class JudgedWorker:
    """An actor of the pool, for other tasks than detect: Ultralytics' validator and the row groups that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        item = {name: values[0] for name, values in batch.items()}
        with tempfile.TemporaryDirectory(prefix="raypar-evaluate-") as folder:
            part = self._score(RowGroup.read(self.job, item, self.detector), Path(folder))
        return {"part": np.array([pickle.dumps(part)], dtype=object)}

    def _score(self, found: RowGroup, folder: Path) -> dict[str, Any]:
        judge, seconds = self._judge(self.job, folder), 0.0
        judge.clear(self.detector.model)
        for group in found.groups(self.job.batch):
            batch = judge.batch(found.rows, group, self.detector.device)
            began = time.monotonic()
            raw = self._forward(batch)
            seconds += time.monotonic() - began
            judge.update(raw, batch)
        if found.sample:
            batch = judge.batch(found.rows, self._sheet(found.sample), self.detector.device)
            judge.draw(self._forward(batch), batch)
        return {
            "scores": judge.state(),
            "num_images": judge.num_images,
            "pictures": {path.name: path.read_bytes() for path in folder.glob("*.jpg")},
            "unreadable": found.unreadable,
            "seconds": seconds,
        }

    def _forward(self, batch: dict[str, Any]) -> Any:
        import torch

        with torch.no_grad():
            return self.detector.model(batch["img"])

    def _sheet(self, images: list[Any]) -> Letterboxed:
        """Images in letterboxes that fit them all: a sheet of pictures has tiles of one size."""
        from raypar.detector import joined
        from raypar.judge import letterboxed

        shape = self.detector.rectangle(SQUARE)
        return joined([letterboxed(self.job.manifest.task, image, shape, self.detector) for image in images])

    @staticmethod
    def _judge(job: Job, folder: Path) -> Any:
        from ultralytics.cfg import get_cfg

        from raypar.judge import Judge

        return Judge(job.manifest, get_cfg(overrides=job.args), folder, plots=True)

    @staticmethod
    def joined(job: Job, states: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Metrics of all parts, and pictures in a local folder."""
        judge = JudgedWorker._judge(job, folder)
        judge.join(states)
        found: dict[str, Any] = judge.compute()
        return {**found, "num_boxes": sum(row["num_boxes"] for row in found["per_class"])}


def _labels(row: dict[str, Any], is_single_class: bool, classes: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Class ids (N,) and boxes (N, 4) in px of a row."""
    from raypar.boxes import xywhn_to_xyxy

    class_ids = np.asarray(row["class_ids"], np.int32)
    boxes = np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4)
    class_ids, boxes, *_ = only_classes((class_ids, boxes, None, None), classes)
    return class_ids * (0 if is_single_class else 1), xywhn_to_xyxy(boxes, (row["height"], row["width"]))


def _samples(tiles: list[tuple[str, bytes]]) -> dict[str, bytes]:
    from raypar.draw import contact_sheet
    from raypar.images import decode, encode_png

    if not tiles:
        return {}
    titles = [f"{image_id}: labels | detections" for image_id, _ in tiles]
    return {
        "detections.png": encode_png(
            contact_sheet([decode(tile) for _, tile in tiles], titles=titles, columns=2, max_side=960)
        )
    }


def _print(result: dict[str, Any], out: Folder) -> None:
    def cell(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.3f}"

    if result["per_class"]:
        width = max(len("all"), *(len(row["class_name"]) for row in result["per_class"]))
        print(f"evaluate: {'class':<{width}}   boxes  precis.  recall   mAP50  mAP50-95")
        for row in [{"class_name": "all", **result}, *result["per_class"]]:
            numbers = "  ".join(cell(row[key]) for key in ("precision", "recall", "map50", "map50_95"))
            print(f"evaluate: {row['class_name']:<{width}} {row['num_boxes']:7d}  {numbers}")
    if result["task"] != "detect":
        print(f"evaluate: {scores_of(result)}")
    if result["num_unreadable"]:
        print(
            f"evaluate: {result['num_unreadable']} image(s) cannot be read and were left out; metrics.json lists them",
            flush=True,
        )
    print(
        f"evaluate: {result['images_per_s']:.1f} images/s; metrics, curves and pictures are in {out.uri}",
        flush=True,
    )
