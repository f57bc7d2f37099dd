"""``raypar export``: weights -> a format that other runtimes load, kept only if it detects what the weights detect.

    {storage}/{name}/export/
        best.onnx           (or best.torchscript, best_openvino_model/, best.engine)
        export.json         written last: what it was made of, and how well it agrees

Runs in: the driver; the export and its check are one Ray task.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypar.config import ExportConfig, RunConfig
from raypar.dataset.manifest import MANIFEST, Manifest
from raypar.pool import read_facts
from raypar.storage import Folder
from raypar.weights import Weights, find, restricted

RESULT = "export.json"
# format -> module
NEEDS = {"onnx": "onnx", "torchscript": "torch", "openvino": "openvino", "engine": "tensorrt"}
NUM_SAMPLES = 16  # images on which export and weights are compared
# boxes above this confidence must agree, at most MOST of an image; where no image has one, the TOP of each
# must
SURE = 0.25
MOST, TOP = 300, 10
MOST_FOUND = 30_000  # among which they are looked for; Ultralytics' NMS takes no more
MIN_AGREEMENT = 0.99  # share of them
SAME_PX = 0.5  # corners that are nearer than this are the same place
# is it fp16 -> least overlap, largest difference of confidence
TOLERANCES = {False: (0.95, 0.01), True: (0.90, 0.03)}


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray.

    Raises:
        ValueError: no weights, not a ``.pt`` of a detect model, or the format's package is not installed.
    """
    section = config.export
    weights = find(section.weights, config.folder, "export")
    if not weights.name.endswith(".pt"):
        raise ValueError(f"export.weights: {weights.uri} is not a .pt: exports are made from weights")
    if importlib.util.find_spec(NEEDS[section.format]) is None:
        raise ValueError(f"export.format '{section.format}' needs the Python package {NEEDS[section.format]}: "
                         f"install it, or use format=onnx")  # fmt: skip
    if section.half and section.format == "torchscript":
        raise ValueError("export.half is for onnx, openvino and engine: leave it out for torchscript")
    read_facts(weights, section.imgsz, trusted=config.weights_trusted)


def run(config: RunConfig) -> dict[str, Any]:
    """Exports, compares, and returns what ``export.json`` holds; a finished export of the same weights is returned as it is.

    Raises:
        ValueError: no weights, the export fails, or it does not detect what the weights detect; then nothing is left.
    """
    import ray

    check(config)
    section, out = config.export, config.folder / "export"
    weights = find(section.weights, config.folder, "export")
    settings = {
        "weights_sha256": _sha256(weights),
        **section.model_dump(mode="json", include={"format", "imgsz", "dynamic", "half"}),
    }
    if not section.overwrite and out.exists(RESULT):
        before: dict[str, Any] = out.read_json(RESULT)
        if before.get("settings") == settings:
            print(
                f"export: {out.uri}/{before['file']} is complete; export.overwrite=true exports anew",
                flush=True,
            )
            return before
    dataset = config.dataset_folder
    has_images = dataset.exists(MANIFEST) and Manifest.load(dataset).splits.get("val") is not None
    print(f"export: {weights.uri} -> {section.format}", flush=True)
    staged = weights.staged(out)
    task = ray.remote(num_cpus=1, num_gpus=1 if section.format == "engine" else 0, max_retries=0)(_export)
    try:
        result: dict[str, Any] = ray.get(
            task.remote(staged, section, dataset if has_images else None, out, trusted=config.weights_trusted)
        )
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise ValueError(
            f"export to {section.format} failed: {' '.join(str(cause).split())[-500:]}"
        ) from error
    finally:
        if staged is not weights:
            out.delete("weights")
    result |= {"settings": settings, "weights": weights.uri}
    out.write_json(RESULT, result)
    print(f"export: {out.uri}/{result['file']}: {result['num_agreeing']} of {result['num_compared']} boxes agree with the weights "
          f"(IoU >= {result['min_iou']}, confidence within {result['max_confidence_difference']})", flush=True)  # fmt: skip
    return result


def _sha256(weights: Weights) -> str:
    from raypar.detector import sha256_of

    with weights.local() as path:
        return sha256_of(path)


def _export(
    weights: Weights, section: ExportConfig, dataset: Folder | None, out: Folder, *, trusted: bool = False
) -> dict[str, Any]:
    """The task: exports in a temporary folder, compares, and only then moves the result into storage."""
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    from raypar.detector import Detector
    from raypar.precision import pick_device

    LOGGER.setLevel("WARNING")
    with tempfile.TemporaryDirectory(prefix="raypar-export-") as folder, contextlib.chdir(folder):
        source = Path(folder) / "best.pt"
        given = weights.download(Path(folder))
        original = Detector.load(given, imgsz=section.imgsz, trusted=trusted)
        given.replace(source)  # the exporter names its file after it
        device = pick_device(section.format == "engine")
        options = {"quantize": 16} if section.half else {}
        with restricted(trusted=trusted):
            model = YOLO(source)
        made = Path(model.export(format=section.format, imgsz=original.imgsz, dynamic=section.dynamic, device=device.type,
                                 verbose=False, **options))  # fmt: skip
        exported = Detector.load(made, device=device)
        # a fixed shape is padded to a square: so are the weights, for the comparison
        original.square = exported.square
        report = compare(original, exported, _samples(dataset, original.imgsz), is_half=section.half)
        if report["num_agreeing"] < MIN_AGREEMENT * report["num_compared"]:
            raise ValueError(f"only {report['num_agreeing']} of {report['num_compared']} boxes agree with the weights "
                             f"(IoU >= {report['min_iou']}, confidence within {report['max_confidence_difference']}); "
                             f"nothing was written")  # fmt: skip
        out.delete(RESULT)
        for file in sorted(made.rglob("*")) if made.is_dir() else [made]:
            if file.is_file():
                out.upload(file, file.relative_to(made.parent).as_posix())
        return {"file": made.name, "sha256": exported.sha256, "format": section.format, "imgsz": exported.imgsz,
                "is_dynamic": not exported.square, "half": section.half, "class_names": exported.class_names, **report}  # fmt: skip


def compare(original: Any, exported: Any, images: list[Any], *, is_half: bool) -> dict[str, Any]:
    """How many boxes of each are also found by the other, with the same class, nearly the same place and confidence.

    A box counts once for each class that it may be of, as in metrics: where two classes are equally likely, the last bit decides which one is
    named, and both are compared.

    Args:
        original: detector of the weights.
        exported: detector of the export.
        images: what both look at.
        is_half: whether the export computes in fp16; then the tolerances are wider.

    Raises:
        ValueError: the weights find nothing on any image even at the lowest confidence, so that there is nothing to compare.
    """
    min_iou, max_difference = TOLERANCES[is_half]
    detectors = [copy.copy(original), copy.copy(exported)]
    for detector in detectors:
        detector.evaluating = True
    # Without NMS, which lets two equally good boxes trade places for a difference in the last bit. Sure ones are few: look for others only
    # where there is none.
    for conf in (SURE - 2 * max_difference, 1e-6):
        pairs = [
            [detector([image], conf=conf, iou=1.0, max_det=MOST_FOUND)[0] for detector in detectors]
            for image in images
        ]
        has_sure = any((found.confidences > SURE).any() for pair in pairs for found in pair)
        if has_sure:
            break
    num_agreeing = num_compared = 0
    for ours, theirs in pairs:
        for some, others in ((ours, theirs), (theirs, ours)):
            picked = (
                np.flatnonzero(some.confidences > SURE)[:MOST] if has_sure else np.arange(min(TOP, len(some)))
            )
            num_compared += len(picked)
            num_agreeing += int(_is_matched(some, picked, others, min_iou, max_difference).sum())
    if not num_compared:
        raise ValueError(
            "neither the weights nor the export find anything on the sample images: there is nothing to compare"
        )
    return {"num_images_compared": len(images), "num_compared": num_compared, "num_agreeing": num_agreeing, "min_iou": min_iou,
            "max_confidence_difference": max_difference, "compared_above_confidence": SURE if has_sure else None}  # fmt: skip


def _is_matched(
    some: Any, picked: NDArray[np.intp], others: Any, min_iou: float, max_difference: float
) -> NDArray[np.bool_]:
    """For each picked box of ``some`` (N,): whether ``others`` has one of its class, place and confidence."""
    from raypar.boxes import iou

    if not len(others):
        return np.zeros(len(picked), bool)
    boxes = some.boxes_xyxy[picked]
    is_there = iou(boxes, others.boxes_xyxy) >= min_iou
    # a box that the image's edge cut to nothing overlaps not even itself
    is_there |= np.abs(boxes[:, None] - others.boxes_xyxy[None]).max(-1) <= SAME_PX
    is_there &= some.class_ids[picked, None] == others.class_ids[None]
    is_there &= np.abs(some.confidences[picked, None] - others.confidences[None]) <= max_difference
    return np.asarray(is_there.any(1), bool)


def _samples(dataset: Folder | None, imgsz: int) -> list[Any]:
    """Encoded images of the dataset's val split; without a dataset, uint8 (H, W, 3) images of random rectangles."""
    if dataset is not None:
        shard = Manifest.load(dataset).split("val").shards[0]
        with dataset.open(shard.path) as file:
            return [
                image.as_py()
                for image in pq.ParquetFile(file).read_row_group(0, columns=["image"])["image"][:NUM_SAMPLES]
            ]
    rng = np.random.default_rng(0)
    images = []
    for i in range(NUM_SAMPLES):
        height, width = (imgsz, imgsz * 3 // 4) if i % 2 else (imgsz * 3 // 4, imgsz)
        image = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
        for _ in range(12):
            top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
            image[
                top : top + int(rng.integers(8, height // 2)), left : left + int(rng.integers(8, width // 2))
            ] = rng.integers(0, 256, 3)
        images.append(image)
    return images
