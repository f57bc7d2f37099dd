"""``raypar predict``: weights and images -> detections in Parquet.

    {storage}/{name}/predict/
        settings.json       what a killed run must keep to go on
        00000.parquet ...   one for each piece of the source: image_id, height, width, boxes_xyxy (4N px), class_ids, confidences
        samples.png         the first images, with their boxes
        rejected.jsonl      a line for each image that could not be read
        summary.json        written last: where it is, the prediction is complete

Runs in: the driver. Ray Data deals pieces to a pool of actors, each with a detector, which writes a piece's file whole when it is
done: a run that was killed redoes only the pieces that are missing. Files of the driver's node are read there.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.manifest import Manifest
from raypar.pool import DetectorPool, read_facts
from raypar.sources import Entry, Source, list_source, read
from raypar.storage import Folder
from raypar.weights import Weights, find

SUMMARY, SETTINGS = "summary.json", "settings.json"
FACTS = b"raypar"  # in the metadata of a piece: its counts, and the images set aside
NUM_SAMPLES = 12  # images in samples.png
SCHEMA = pa.schema([
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),  # px
    pa.field("width", pa.int32(), nullable=False),  # px
    pa.field("boxes_xyxy", pa.list_(pa.float32()), nullable=False),  # (4N,) row-major (N, 4), px
    pa.field("class_ids", pa.list_(pa.int32()), nullable=False),  # (N,), 0-based
    pa.field("confidences", pa.list_(pa.float32()), nullable=False),  # (N,), descending
])  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What every actor must know."""

    out: Folder
    batch: int
    max_pixels: int


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray.

    Raises:
        ValueError: no images, no weights, or weights that cannot be read or are for another task.
    """
    weights = find(config.predict.weights, config.folder, "predict")
    list_source(config.predict.source, config.folder, config.dataset_folder)
    if config.predict.source is None:
        dataset = config.dataset_folder
        verify.check_sizes(dataset, Manifest.load(dataset), ("val",))
    _known(weights, config)


def _known(weights: Weights, config: RunConfig) -> tuple[list[str], int, str]:
    section = config.predict
    return read_facts(weights, section.imgsz, precision=section.precision, trusted=config.weights_trusted)


def run(config: RunConfig) -> dict[str, Any]:
    """Predicts what is missing, and returns the summary.

    Raises:
        ValueError: no images, weights that cannot be read, or a run that was begun with other settings.
    """
    section, out = config.predict, config.folder / "predict"
    weights = find(section.weights, config.folder, "predict")
    source = list_source(section.source, config.folder, config.dataset_folder)
    class_names, imgsz, sha256 = _known(weights, config)
    settings = {
        "source": section.source or "val", "source_sha256": source.sha256, "weights_sha256": sha256, "imgsz": imgsz, "conf": section.conf,
        "iou": section.iou, "max_det": section.max_det, "precision": section.precision, "class_names": class_names,
    }  # fmt: skip
    if section.overwrite:
        out.delete()
    if out.exists(SETTINGS):
        _refuse_other(out.read_json(SETTINGS), settings, out)
    if out.exists(SUMMARY):
        print(f"predict: {out.uri} is complete; predict.overwrite=true predicts anew", flush=True)
        summary: dict[str, Any] = out.read_json(SUMMARY)
        return summary
    if section.source is None:
        dataset = config.dataset_folder
        verify.check_sums(dataset, Manifest.load(dataset), ("val",))
    out.write_json(SETTINGS, settings)
    done = {name for name in out.list() if name.endswith(".parquet")}
    due = [i for i in range(len(source.pieces)) if _name(i) not in done]
    pool = DetectorPool(weights.staged(out), sha256, {"imgsz": imgsz, "precision": section.precision, "conf": section.conf,
                        "iou": section.iou, "max_det": section.max_det, "trusted": config.weights_trusted}, max(1, min(section.num_workers, len(due))), section.use_gpu)  # fmt: skip
    resumed = f", {len(done)} of {len(source.pieces)} pieces are done already" if done else ""
    print(
        f"predict: {source.num_images} images of {section.source or 'the val split'}, weights {pool.weights.uri}, imgsz {imgsz}, "
        f"{pool.num_actors} worker(s){resumed}",
        flush=True,
    )
    seconds = _predict(pool, Job(out, section.batch, section.max_pixels), source, due) if due else 0.0
    return _finish(
        pool, out, source, settings, sum(e.num_images for i in due for e in source.pieces[i]), seconds
    )


def _refuse_other(before: dict[str, Any], settings: dict[str, Any], out: Folder) -> None:
    differing = [
        f"{key}: {before.get(key)!r} then, {value!r} now"
        for key, value in settings.items()
        if before.get(key) != value
    ]
    if differing:
        raise ValueError(f"{out.uri} was begun with other settings ({'; '.join(differing)}): set them back, choose another name, "
                         f"or add predict.overwrite=true")  # fmt: skip


def _name(piece: int) -> str:
    return f"{piece:05d}.parquet"


def _predict(pool: DetectorPool, job: Job, source: Source, due: list[int]) -> float:
    """Has the pieces that are due made, and returns the seconds it took."""
    import ray

    from raypar.progress import Progress

    began = time.monotonic()
    progress = Progress(sum(e.num_images for i in due for e in source.pieces[i]), "images", "predict")
    items = [{"piece": i, "entries": pickle.dumps(source.pieces[i])} for i in due]
    before = None
    if source.is_local and len(ray.nodes()) > 1:  # type: ignore[no-untyped-call]
        before = (
            _fetch,
            {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}},
        )
    for row in pool.map(items, Worker, job, before=before):
        progress.update(int(row["num_images"]))
    progress.close()
    return time.monotonic() - began


def _fetch(batch: dict[str, Any]) -> dict[str, Any]:
    """A task on the driver's node: puts the images themselves in the place of their names."""
    read_here = [pickle.dumps(_read(pickle.loads(entries))) for entries in batch["entries"]]
    return {"piece": batch["piece"], "images": np.array(read_here, dtype=object)}


def _read(entries: list[Entry]) -> list[tuple[str, bytes | Exception]]:
    return [image for entry in entries for image in read(entry)]


class Worker:
    """An actor of the pool: a detector and the pieces that come to it."""

    def __init__(self, pool: DetectorPool, job: Job):
        self.job, self.detector = job, pool.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = (
            pickle.loads(batch["images"][0])
            if "images" in batch
            else _read(pickle.loads(batch["entries"][0]))
        )
        return {"num_images": np.array([self._write(int(batch["piece"][0]), images)])}

    def _write(self, piece: int, images: list[tuple[str, bytes | Exception]]) -> int:
        """Detects, and writes the piece's file; returns how many images it had."""
        rows: list[dict[str, Any]] = []
        rejected: list[dict[str, str]] = []
        tiles: list[Any] = []
        for first in range(0, len(images), self.job.batch):
            decoded = list(self._decoded(images[first : first + self.job.batch], rejected))
            for (image_id, image), found in zip(
                decoded, self.detector([image for _, image in decoded]), strict=True
            ):
                height, width = found.image_hw
                rows.append({"image_id": image_id, "height": height, "width": width, "boxes_xyxy": found.boxes_xyxy.reshape(-1),
                             "class_ids": found.class_ids, "confidences": found.confidences})  # fmt: skip
                if piece == 0 and len(tiles) < NUM_SAMPLES:
                    tiles.append((image_id, image, found))
        if tiles:
            self._draw(tiles)
        class_ids = np.concatenate([np.zeros(0, np.int32), *(row["class_ids"] for row in rows)])
        facts = {"num_images": len(rows), "num_boxes": len(class_ids), "rejected": rejected,
                 "per_class": np.bincount(class_ids, minlength=len(self.detector.class_names)).tolist()}  # fmt: skip
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_pylist(rows, SCHEMA.with_metadata({FACTS: json.dumps(facts).encode()})), sink
        )
        self.job.out.write(_name(piece), sink.getvalue().to_pybytes())
        return len(images)

    def _decoded(
        self, images: list[tuple[str, bytes | Exception]], rejected: list[dict[str, str]]
    ) -> Iterator[tuple[str, Any]]:
        from raypar.images import decode

        for image_id, data in images:
            try:
                if isinstance(data, Exception):
                    raise ValueError(f"cannot be read: {data}")
                yield image_id, decode(data, self.job.max_pixels)
            except ValueError as error:
                rejected.append({"image_id": image_id, "reason": str(error)})

    def _draw(self, tiles: list[Any]) -> None:
        from raypar.draw import boxes_on, contact_sheet
        from raypar.images import encode_png

        names = self.detector.class_names
        drawn = [
            boxes_on(image, found.boxes_xyxy, found.class_ids, names, found.confidences)
            for _, image, found in tiles
        ]
        self.job.out.write(
            "samples.png", encode_png(contact_sheet(drawn, titles=[image_id for image_id, _, _ in tiles]))
        )


def _finish(
    pool: DetectorPool, out: Folder, source: Source, settings: dict[str, Any], num_now: int, seconds: float
) -> dict[str, Any]:
    """Adds up what the pieces say of themselves, and writes the summary."""
    facts = []
    for i in range(len(source.pieces)):
        with out.open(_name(i)) as file:
            facts.append(json.loads(pq.read_schema(file).metadata[FACTS]))
    rejected = [line for piece in facts for line in piece["rejected"]]
    num_images = sum(piece["num_images"] for piece in facts)
    if num_images + len(rejected) != source.num_images:
        raise RuntimeError(
            f"{num_images} images and {len(rejected)} rejected ones are not the {source.num_images} of the source"
        )
    out.write("rejected.jsonl", "".join(json.dumps(line) + "\n" for line in rejected))
    per_class = np.sum([piece["per_class"] for piece in facts], axis=0).tolist()
    summary = {
        **settings, "weights": pool.weights.uri, "num_images": num_images, "num_rejected": len(rejected),
        "num_boxes": sum(piece["num_boxes"] for piece in facts), "num_pieces": len(facts),
        "boxes_per_class": dict(zip(settings["class_names"], per_class, strict=True)),
        "seconds": seconds, "images_per_s": num_now / seconds if seconds else None,
    }  # fmt: skip
    out.write_json(SUMMARY, summary)
    boxes = ", ".join(f"{name} {count}" for name, count in summary["boxes_per_class"].items())
    print(f"predict: {num_images} images, {summary['num_boxes']} boxes ({boxes}), {len(rejected)} images could not be read\n"
          f"predict: detections are in {out.uri}/*.parquet, the first images in samples.png", flush=True)  # fmt: skip
    return summary
