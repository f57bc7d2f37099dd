"""``raypar evaluate``: weights and a split of the dataset -> metrics and pictures.

    {storage}/{name}/evaluate/
        BoxPR_curve.png  BoxF1_curve.png  BoxP_curve.png  BoxR_curve.png
        confusion_matrix.png  confusion_matrix_normalized.png
        detections.png      labels beside detections; of other tasks val_batch0_labels.jpg and val_batch0_pred.jpg
        metrics.json        written last: where it is, the evaluation is complete

Runs in: the driver. Ray Data deals row groups to a pool of actors, each with a detector; their scores are merged by image id, so the
numbers do not depend on who saw which image.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.manifest import MANIFEST, Manifest, Split
from raypar.pool import DetectorPool, read_facts
from raypar.scores import scores_of
from raypar.storage import Folder
from raypar.weights import Weights, find

RESULT = "metrics.json"
NUM_SAMPLES = 8  # images in detections.png
SAMPLE_CONF = 0.25


@dataclass(frozen=True)
class Job:
    """What every actor must know."""

    dataset: Folder
    class_names: list[str]
    manifest: Manifest
    args: dict[str, Any]  # Ultralytics' settings that differ from its defaults
    is_single_class: bool
    batch: int
    sampled_shard: str  # its first images are in detections.png


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
        ValueError: weights that cannot be read or are for other classes, no dataset.
    """
    section, out, dataset = config.evaluate, config.folder / "evaluate", config.dataset_folder
    manifest = Manifest.load(dataset)
    verify.check_sizes(dataset, manifest, (section.split,))
    split = manifest.split(section.split)
    weights = find(section.weights, config.folder, "evaluate")
    is_single_class = bool(config.train.yolo.get("single_cls", False))
    known, imgsz, sha256 = _known(weights, config, manifest)
    class_names = known if is_single_class else list(manifest.class_names)
    if known != class_names:
        print(f"evaluate: the weights name the classes {known}, the dataset {class_names}; "
              f"they are compared by number", flush=True)  # fmt: skip
    # Ultralytics' default for rotated boxes
    conf = 0.01 if manifest.task == "obb" and section.conf == 0.001 else section.conf
    settings = {
        "weights_sha256": sha256, "split": section.split, "imgsz": imgsz, "conf": conf, "iou": section.iou,
        "max_det": section.max_det, "forward_precision": section.precision,
        "dataset_sha256": hashlib.sha256(dataset.read(MANIFEST)).hexdigest(),
    }  # fmt: skip
    if not section.overwrite and out.exists(RESULT):
        before: dict[str, Any] = out.read_json(RESULT)
        if all(before.get(key) == value for key, value in settings.items()):
            print(
                f"evaluate: {out.uri} is complete for these weights and settings; evaluate.overwrite=true evaluates anew",
                flush=True,
            )
            return before
    verify.check_sums(dataset, manifest, (section.split,))
    out.delete(RESULT)
    weights = weights.staged(out)
    items = [
        {"shard": shard.path, "group": i} for shard in split.shards for i in range(len(shard.row_groups))
    ]
    pool = DetectorPool(weights, sha256, {"imgsz": imgsz, "precision": section.precision, "conf": section.conf, "iou": section.iou,
                        "max_det": section.max_det, "pad": 0.5, "task": manifest.task, "trusted": config.weights_trusted}, min(section.num_workers, len(items)), section.use_gpu)  # fmt: skip
    args = {"imgsz": imgsz, "conf": conf, "iou": section.iou, "max_det": section.max_det, "single_cls": is_single_class,
            "mask_ratio": config.train.yolo.get("mask_ratio", 4), "task": manifest.task}  # fmt: skip
    job = Job(dataset, class_names, manifest, args, is_single_class, section.batch, split.shards[0].path)
    print(f"evaluate: {split.num_images} '{section.split}' images, weights {weights.uri}, imgsz {imgsz}, "
          f"{pool.num_actors} worker(s)", flush=True)  # fmt: skip
    return _evaluate(pool, job, items, split, settings, out)


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
    result = {**metrics, **settings, "task": job.manifest.task, "weights": pool.weights.uri, "num_workers": pool.num_actors,
              "images_per_s": split.num_images / seconds, "num_unreadable": len(unreadable), "unreadable": unreadable, "seconds": seconds,
              "model_ms_per_image": 1000 * sum(part["seconds"] for part in parts) / split.num_images}  # fmt: skip
    out.write_json(RESULT, result)
    _print(result, out)
    return result


def _readable(rows: list[dict[str, Any]]) -> tuple[list[int], list[Any], list[dict[str, str]]]:
    """Which rows' images can be decoded, those images, and what is wrong with the others."""
    from raypar.images import decode

    good, images, unreadable = [], [], []
    for i, row in enumerate(rows):
        try:
            images.append(decode(row["image"]))
            good.append(i)
        except ValueError as error:
            unreadable.append({"image_id": row["image_id"], "reason": str(error)})
    return good, images, unreadable


class Worker:
    """An actor of the pool: a detector and the row groups that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard, group = str(batch["shard"][0]), int(batch["group"][0])
        return {"part": np.array([pickle.dumps(self._score(shard, group))], dtype=object)}

    def _score(self, shard: str, group: int) -> dict[str, Any]:
        from raypar.metrics import Scorer

        scorer, seconds = Scorer(self.job.class_names), 0.0
        tiles: list[tuple[str, bytes]] = []
        unreadable: list[dict[str, str]] = []
        wants_tiles = shard == self.job.sampled_shard and group == 0
        with self.job.dataset.open(shard) as file:
            rows = pq.ParquetFile(file).read_row_group(group).to_pylist()
        for first in range(0, len(rows), self.job.batch):
            began = time.monotonic()
            good, images, bad = _readable(rows[first : first + self.job.batch])
            unreadable += bad
            if not good:
                continue
            some, found = [rows[first + i] for i in good], self.detector(images)
            seconds += time.monotonic() - began
            labels = [_labels(row, self.job.is_single_class) for row in some]
            scorer.update(found, [row["image_id"] for row in some], *map(list, zip(*labels, strict=True)))
            if wants_tiles:
                tiles += [
                    self._tile(*x) for x in zip(some[: NUM_SAMPLES - len(tiles)], found, labels, strict=False)
                ]
        return {"scores": scorer.state(), "num_images": len(rows) - len(unreadable), "pictures": _samples(tiles), "unreadable": unreadable,
                "seconds": seconds}  # fmt: skip

    @staticmethod
    def joined(job: Job, states: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Metrics of all parts, and pictures in a local folder."""
        from raypar.metrics import Scorer

        scorer = Scorer(job.class_names)
        for state in states:
            scorer.merge(state)
        return scorer.compute(plots_folder=folder)

    def _tile(self, row: dict[str, Any], found: Any, labels: tuple[Any, Any]) -> tuple[str, bytes]:
        """Image id and a PNG: the image with its labels, and beside it with what was found."""
        from raypar.draw import boxes_on
        from raypar.images import decode, encode_png

        image = decode(row["image"])
        sure = found.confidences > SAMPLE_CONF
        truth = boxes_on(image, labels[1], labels[0], self.job.class_names)
        drawn = boxes_on(
            image,
            found.boxes_xyxy[sure],
            found.class_ids[sure],
            self.job.class_names,
            found.confidences[sure],
        )
        return row["image_id"], encode_png(
            np.concatenate([truth, np.full((image.shape[0], 4, 3), 255, np.uint8), drawn], 1)
        )


class JudgedWorker:
    """An actor of the pool, for other tasks than detect: Ultralytics' validator and the row groups that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="raypar-evaluate-") as folder:
            part = self._score(str(batch["shard"][0]), int(batch["group"][0]), Path(folder))
        return {"part": np.array([pickle.dumps(part)], dtype=object)}

    def _score(self, shard: str, group: int, folder: Path) -> dict[str, Any]:
        import torch

        judge, seconds = self._judge(self.job, folder), 0.0
        judge.clear(self.detector.model)
        with self.job.dataset.open(shard) as file:
            table = pq.ParquetFile(file).read_row_group(group)
        good, images, unreadable = _readable(table.select(["image_id", "image"]).to_pylist())
        table, wants_sample = table.take(good), shard == self.job.sampled_shard and group == 0
        for first in range(0, len(good), self.job.batch):
            some = images[first : first + self.job.batch]
            for batch in judge.batches(table.slice(first, len(some)), some, self.detector):
                began = time.monotonic()
                with torch.no_grad():
                    raw = self.detector.model(batch["img"])
                seconds += time.monotonic() - began
                judge.update(raw, batch, sample=wants_sample)
                wants_sample = False
        pictures = {path.name: path.read_bytes() for path in folder.glob("*.jpg")}
        return {
            "scores": judge.state(),
            "num_images": judge.num_images,
            "pictures": pictures,
            "unreadable": unreadable,
            "seconds": seconds,
        }

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


def _labels(row: dict[str, Any], is_single_class: bool) -> tuple[Any, Any]:
    """Class ids (N,) and boxes (N, 4) in px of a row."""
    from raypar.boxes import xywhn_to_xyxy

    class_ids = np.asarray(row["class_ids"], np.int32) * (0 if is_single_class else 1)
    return class_ids, xywhn_to_xyxy(
        np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4), (row["height"], row["width"])
    )


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
