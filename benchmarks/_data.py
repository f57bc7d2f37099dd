"""Datasets that both sides read: a folder as Ultralytics wants it, and shards that ``raypar prepare`` would write of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from raypar.dataset.formats import voc, yolo
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.images import encode_jpeg, header_hw
from raypar.storage import Folder

QUALITY = 90
NUM_CLASSES = 4


def generated(
    folder: Path, count: int, hw: tuple[int, int] = (480, 640), seed: int = 0, *, val: int = 0
) -> Path:
    """Textured images (JPEG, about 130 KB at 480 x 640) with 7 boxes on average; returns the data.yaml. Without a val split it names train twice."""
    height, width = hw

    def make(i: int) -> None:
        rng = np.random.default_rng((seed, i))
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        image = (smooth + rng.normal(0, 5, (height, width, 1)).astype(np.int16)).clip(0, 255).astype(np.uint8)
        sides = rng.uniform(0.03, 0.4, (rng.poisson(7), 2))
        boxes = np.concatenate([rng.uniform(sides / 2, 1 - sides / 2), sides], 1)
        split = "train" if i < count else "val"
        _write(
            folder,
            f"{i:05d}",
            encode_jpeg(image, QUALITY),
            rng.integers(NUM_CLASSES, size=len(boxes)),
            boxes,
            split,
        )

    with ThreadPoolExecutor() as pool:  # OpenCV and NumPy let others run
        list(pool.map(make, range(count + val)))
    return yaml_of(folder, "val" if val else "train")


def from_voc(folder: Path, source: Path) -> Path:
    """The train split of a Pascal VOC folder."""
    listing = voc.scan(str(source), 0)
    for record in listing.splits["train"]:
        data = Path(record.image_path).read_bytes()
        labels = voc.read_labels(record, len(listing.class_names), header_hw(data))
        _write(folder, Path(record.image_id).stem, data, labels.class_ids, labels.boxes_xywhn.clip(0, 1))
    return _yaml(folder, list(listing.class_names))


def shards(data_yaml: Path, dataset: Folder) -> Split:
    """The same images as shards; one for each 512."""
    listing = yolo.scan(str(data_yaml))
    records = sorted(listing.splits["train"], key=lambda record: record.image_id)
    made = []
    for number, first in enumerate(range(0, len(records), 512)):
        job = ShardJob(
            dataset,
            f"train/{number:05d}.parquet",
            "train",
            "yolo",
            len(listing.class_names),
            tuple(records[first : first + 512]),
            64,
            10**8,
        )
        report = write_shard(job)
        assert report.shard is not None
        assert not report.rejected, report.rejected[:3]
        made.append(report.shard)
    return Split(shards=tuple(made), num_images=sum(sum(shard.row_groups) for shard in made))


def as_yolo(dataset: Path, folder: Path) -> tuple[Path, int]:
    """The images and labels of a prepared dataset as Ultralytics wants them: its data.yaml, and how many images the train split has."""
    manifest = Manifest.load(Folder.at(str(dataset)))
    for name in ("train", "val"):
        for shard in manifest.split(name).shards:
            for i, row in enumerate(pq.read_table(dataset / shard.path).to_pylist()):
                boxes = np.reshape(row["boxes_xywhn"], (-1, 4))
                _write(
                    folder, f"{Path(shard.path).stem}_{i:05d}", row["image"], row["class_ids"], boxes, name
                )
    path = folder / "data.yaml"
    path.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {list(manifest.class_names)}\n"
    )
    return path, manifest.split("train").num_images


def _write(
    folder: Path,
    name: str,
    image: bytes,
    class_ids: np.ndarray,
    boxes_xywhn: np.ndarray,
    split: str = "train",
) -> None:
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    (folder / f"images/{split}/{name}.jpg").write_bytes(image)
    lines = [
        f"{c} {' '.join(f'{x:.6f}' for x in box)}" for c, box in zip(class_ids, boxes_xywhn, strict=True)
    ]
    (folder / f"labels/{split}/{name}.txt").write_text("\n".join(lines))


def yaml_of(folder: Path, val: str) -> Path:
    """The data.yaml of a folder of generated images."""
    return _yaml(folder, [f"c{i}" for i in range(NUM_CLASSES)], val)


def _yaml(folder: Path, names: list[str], val: str = "train") -> Path:
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images/train\nval: images/{val}\nnames: {names}\n")
    return path
