"""``raypar evaluate``: weights and a split of the dataset -> metrics and pictures.

    {storage}/{name}/evaluate/
        BoxPR_curve.png  BoxF1_curve.png  BoxP_curve.png  BoxR_curve.png
        confusion_matrix.png  confusion_matrix_normalized.png
        detections.png      labels beside detections
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
    is_single_class: bool
    batch: int
    sampled_shard: str  # its first images are in detections.png


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray.

    Raises:
        ValueError: no dataset, no such split, no weights.
    """
    manifest = Manifest.load(config.folder / "dataset")
    if manifest.task != "detect":
        raise ValueError(f"the dataset's task is '{manifest.task}': this version evaluates detect")
    verify.check_sizes(config.folder / "dataset", manifest, (config.evaluate.split,))
    find(config.evaluate.weights, config.folder, "evaluate")


def run(config: RunConfig) -> dict[str, Any]:
    """Evaluates, and returns what ``metrics.json`` holds; a complete result for the same weights and settings is returned as it is.

    Raises:
        ValueError: weights that cannot be read or are for other classes, no dataset.
    """
    check(config)
    section, out, dataset = config.evaluate, config.folder / "evaluate", config.folder / "dataset"
    manifest = Manifest.load(dataset)
    split = manifest.split(section.split)
    weights = find(section.weights, config.folder, "evaluate")
    is_single_class = bool(config.train.yolo.get("single_cls", False))
    class_names, imgsz, sha256 = _known(weights, section.imgsz, list(manifest.class_names), is_single_class)
    settings = {
        "weights_sha256": sha256, "split": section.split, "imgsz": imgsz, "conf": section.conf, "iou": section.iou,
        "max_det": section.max_det, "forward_precision": section.precision,
        "dataset_sha256": hashlib.sha256(dataset.read(MANIFEST)).hexdigest(),
    }  # fmt: skip
    if not section.overwrite and out.exists(RESULT):
        before: dict[str, Any] = out.read_json(RESULT)
        if all(before.get(key) == value for key, value in settings.items()):
            print(f"evaluate: {out.uri} is complete for these weights and settings; evaluate.overwrite=true evaluates anew", flush=True)
            return before
    verify.check_sums(dataset, manifest, (section.split,))
    out.delete(RESULT)
    weights = weights.staged(out)
    items = [{"shard": shard.path, "group": i} for shard in split.shards for i in range(len(shard.row_groups))]
    pool = DetectorPool(weights, sha256, {"imgsz": imgsz, "precision": section.precision, "conf": section.conf, "iou": section.iou,
                        "max_det": section.max_det, "pad": 0.5}, min(section.num_workers, len(items)), section.use_gpu)  # fmt: skip
    job = Job(dataset, class_names, is_single_class, section.batch, split.shards[0].path)
    print(f"evaluate: {split.num_images} '{section.split}' images, weights {weights.uri}, imgsz {imgsz}, "
          f"{pool.num_actors} worker(s)", flush=True)  # fmt: skip
    return _evaluate(pool, job, items, split, settings, out)


def _known(weights: Weights, imgsz: int | None, class_names: list[str], is_single_class: bool) -> tuple[list[str], int, str]:
    """Class names of the model, its image size in px, and the checksum of its file: read once by the driver, which fails at once."""
    known, imgsz, sha256 = read_facts(weights, imgsz)
    expected = 1 if is_single_class else len(class_names)
    if len(known) != expected:
        raise ValueError(f"{weights.uri} knows {len(known)} classes, the dataset has {expected}: "
                         f"evaluate weights that were trained on it")  # fmt: skip
    if not is_single_class and known != class_names:
        print(f"evaluate: the weights name the classes {known}, the dataset {class_names}; "
              f"they are compared by number", flush=True)  # fmt: skip
    return (known if is_single_class else class_names), imgsz, sha256


def _evaluate(pool: DetectorPool, job: Job, items: list[dict[str, Any]], split: Split, settings: dict[str, Any],
              out: Folder) -> dict[str, Any]:  # fmt: skip
    from raypar.metrics import Scorer
    from raypar.progress import Progress

    scorer, tiles, unreadable, model_s = Scorer(job.class_names), [], [], 0.0
    began = time.monotonic()
    progress = Progress(split.num_images, "images", "evaluate")
    for row in pool.map(items, Worker, job):
        part = pickle.loads(row["part"])
        scorer.merge(part["scores"])
        progress.update(len(part["scores"]["images"]) + len(part["unreadable"]))
        tiles.extend(part["tiles"])
        unreadable.extend(part["unreadable"])
        model_s += part["seconds"]
    seconds = time.monotonic() - began
    progress.close()
    with tempfile.TemporaryDirectory(prefix="raypar-evaluate-") as folder:
        metrics = scorer.compute(plots_folder=Path(folder))
        if (num_seen := metrics["num_images"] + len(unreadable)) != split.num_images:
            raise RuntimeError(f"{num_seen} images were seen, the dataset has {split.num_images}: prepare it again")
        for picture in sorted(Path(folder).glob("*.png")):
            out.upload(picture, picture.name)
    _write_samples(tiles, out)
    result = {**metrics, **settings, "weights": pool.weights.uri, "num_workers": pool.num_actors, "images_per_s": split.num_images / seconds,
              "num_unreadable": len(unreadable), "unreadable": sorted(unreadable, key=lambda x: x["image_id"]), "seconds": seconds, "model_ms_per_image": 1000 * model_s / split.num_images}  # fmt: skip
    out.write_json(RESULT, result)
    _print(result, out)
    return result


class Worker:
    """An actor of the pool: a detector and the row groups that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard, group = str(batch["shard"][0]), int(batch["group"][0])
        return {"part": np.array([pickle.dumps(self._score(shard, group))], dtype=object)}

    def _score(self, shard: str, group: int) -> dict[str, Any]:
        from raypar.images import decode
        from raypar.metrics import Scorer

        scorer, seconds = Scorer(self.job.class_names), 0.0
        tiles: list[tuple[str, bytes]] = []
        unreadable: list[dict[str, str]] = []
        wants_tiles = shard == self.job.sampled_shard and group == 0
        with self.job.dataset.open(shard) as file:
            rows = pq.ParquetFile(file).read_row_group(group).to_pylist()
        for first in range(0, len(rows), self.job.batch):
            began = time.monotonic()
            some, images = [], []
            for row in rows[first : first + self.job.batch]:
                try:
                    images.append(decode(row["image"]))
                    some.append(row)
                except ValueError as error:
                    unreadable.append({"image_id": row["image_id"], "reason": str(error)})
            if not some:
                continue
            found = self.detector(images)
            seconds += time.monotonic() - began
            labels = [_labels(row, self.job.is_single_class) for row in some]
            scorer.update(found, [row["image_id"] for row in some], *map(list, zip(*labels, strict=True)))
            if wants_tiles:
                tiles += [self._tile(*x) for x in zip(some[: NUM_SAMPLES - len(tiles)], found, labels, strict=False)]
        return {"scores": scorer.state(), "tiles": tiles, "unreadable": unreadable, "seconds": seconds}

    def _tile(self, row: dict[str, Any], found: Any, labels: tuple[Any, Any]) -> tuple[str, bytes]:
        """Image id and a PNG: the image with its labels, and beside it with what was found."""
        from raypar.draw import boxes_on
        from raypar.images import decode, encode_png

        image = decode(row["image"])
        sure = found.confidences > SAMPLE_CONF
        truth = boxes_on(image, labels[1], labels[0], self.job.class_names)
        drawn = boxes_on(image, found.boxes_xyxy[sure], found.class_ids[sure], self.job.class_names, found.confidences[sure])
        return row["image_id"], encode_png(np.concatenate([truth, np.full((image.shape[0], 4, 3), 255, np.uint8), drawn], 1))


def _labels(row: dict[str, Any], is_single_class: bool) -> tuple[Any, Any]:
    """Class ids (N,) and boxes (N, 4) in px of a row."""
    from raypar.boxes import xywhn_to_xyxy

    class_ids = np.asarray(row["class_ids"], np.int32) * (0 if is_single_class else 1)
    return class_ids, xywhn_to_xyxy(np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4), (row["height"], row["width"]))


def _write_samples(tiles: list[tuple[str, bytes]], out: Folder) -> None:
    from raypar.draw import contact_sheet
    from raypar.images import decode, encode_png

    if tiles:
        titles = [f"{image_id}: labels | detections" for image_id, _ in tiles]
        sheet = contact_sheet([decode(tile) for _, tile in tiles], titles=titles, columns=2, max_side=960)
        out.write("detections.png", encode_png(sheet))


def _print(result: dict[str, Any], out: Folder) -> None:
    def cell(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.3f}"

    width = max(len("all"), *(len(row["class_name"]) for row in result["per_class"]))
    print(f"evaluate: {'class':<{width}}   boxes  precis.  recall   mAP50  mAP50-95")
    for row in [{"class_name": "all", **result}, *result["per_class"]]:
        numbers = "  ".join(cell(row[key]) for key in ("precision", "recall", "map50", "map50_95"))
        print(f"evaluate: {row['class_name']:<{width}} {row['num_boxes']:7d}  {numbers}")
    if result["num_unreadable"]:
        print(f"evaluate: {result['num_unreadable']} image(s) cannot be read and were left out; metrics.json lists them", flush=True)
    print(f"evaluate: {result['images_per_s']:.1f} images/s; metrics, curves and pictures are in {out.uri}", flush=True)
