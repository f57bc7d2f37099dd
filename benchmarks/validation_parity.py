"""`raypar evaluate` against `YOLO(best.pt).val(data=...)`, both at their defaults, on images of seven aspect ratios, every task.

    python benchmarks/validation_parity.py [--tasks segment pose] [--epochs 25] [--imgsz 128] [--train 128] [--val 56]

For each task: generated shapes are written to disk as Ultralytics wants them, prepared and learnt by raypar from those files, and best.pt
is judged by both. No figure may differ by more than 1e-4, and every mAP50-95 (of boxes, masks and keypoints; top-1 of classify) must be
above 0.2, so that the figures say something. `val(batch=1)` is shown too, where each image has a rectangle of its own: how much
rectangles matter. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import raypar.evaluate
import raypar.prepare
import raypar.train
from raypar.config import RunConfig
from raypar.dataset.formats import Labels, shapes
from raypar.images import encode_png
from raypar.scores import ULTRALYTICS_NAMES

SUFFIXES = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}
HWS = ((96, 128), (128, 96), (128, 128), (80, 160), (150, 100), (100, 140), (70, 180))
TOLERANCE, LEAST = 1e-4, 0.2
PLAIN = {"mosaic": 0.0, "scale": 0.2, "erasing": 0.0, "auto_augment": "", "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1.0, "val": False}  # fmt: skip


def write_dataset(folder: Path, task: str, counts: dict[str, int]) -> Path:
    """Images and labels on disk; returns the data.yaml, of classify the folder of folders."""
    for split, count in counts.items():
        for i in range(count):
            image, labels = shapes.draw(0, split, i, *HWS[i % len(HWS)], task=task)
            place = folder / "images" / split
            if task == "classify":
                place = folder / split / shapes.CLASS_NAMES[int(labels.class_ids[0])]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:05d}.png").write_bytes(encode_png(image))
            if task != "classify":
                (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
                (folder / "labels" / split / f"{i:05d}.txt").write_text("\n".join(label_lines(labels)))
    if task == "classify":
        return folder
    data: dict[str, Any] = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(shapes.CLASS_NAMES))}  # fmt: skip
    if task == "pose":
        data |= {"kpt_shape": list(shapes.KEYPOINT_SHAPE), "flip_idx": list(shapes.FLIP_IDX)}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    return folder / "data.yaml"


def label_lines(labels: Labels) -> list[str]:
    """A line of a label file for each object."""
    rows = [list(box) for box in labels.boxes_xywhn]
    if labels.segments_xyn is not None:
        rows = [list(segment.ravel()) for segment in labels.segments_xyn]
    if labels.keypoints is not None:
        rows = [[*box, *points.ravel()] for box, points in zip(rows, labels.keypoints, strict=True)]
    return [
        " ".join([str(int(class_id)), *(f"{x:.6f}" for x in row)])
        for class_id, row in zip(labels.class_ids, rows, strict=True)
    ]


def learnt(task: str, source: Path, args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights that raypar trains on a source, and what its ``evaluate`` finds."""
    import ray

    config = RunConfig.model_validate({
        "name": task, "storage": str(folder),
        "prepare": {"format": "folders" if task == "classify" else "yolo", "source": str(source), "task": task},
        "train": {"model": f"yolov8n{SUFFIXES[task]}.yaml", "num_workers": 1, "batch": 8,
                  "yolo": {"epochs": args.epochs, "imgsz": args.imgsz, **PLAIN}},
    })  # fmt: skip
    ray.init(address="local", num_cpus=3, include_dashboard=False)
    try:
        raypar.prepare.run(config)
        raypar.train.check(config)
        raypar.train.run(config)
        found = raypar.evaluate.run(config)
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]
    return Path(config.folder.uri) / "train" / "best.pt", found


def judged(weights: Path, source: Path, folder: Path, **settings: Any) -> dict[str, float]:
    """What Ultralytics finds, by raypar's names."""
    from ultralytics import YOLO

    theirs = YOLO(weights).val(data=str(source), project=str(folder), plots=False, verbose=False, **settings)
    return {ours: float(theirs.results_dict[name]) for ours, name in ULTRALYTICS_NAMES.items() if name in theirs.results_dict}  # fmt: skip


def measure(task: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides' figures of a task."""
    began = time.monotonic()
    source = write_dataset(folder / f"{task}-source", task, {"train": args.train, "val": args.val})
    weights, ours = learnt(task, source, args, folder)
    theirs, alone = judged(weights, source, folder), judged(weights, source, folder, batch=1)
    figures = {name: (float(ours[name]), value, alone[name]) for name, value in theirs.items()}
    goals = {name: value for name, value in theirs.items() if name.endswith("map50_95") or name == "top1"}
    return {
        "task": task,
        "seconds": round(time.monotonic() - began, 1),
        "figures": figures,
        "largest_difference": max(abs(a - b) for a, b, _ in figures.values()),
        "lowest_goal": min(goals.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(SUFFIXES), choices=list(SUFFIXES))
    for name, value in {"epochs": 25, "imgsz": 128, "train": 128, "val": 56}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raypar-parity-") as folder:
        rows = [measure(task, args, Path(folder)) for task in args.tasks]
    for row in rows:
        figures = ", ".join(f"{name} {a:.5f} / {b:.5f} / {c:.5f}" for name, (a, b, c) in row["figures"].items())  # fmt: skip
        print(f"{row['task']}: evaluate / YOLO.val / YOLO.val(batch=1): {figures}; "
              f"largest difference {row['largest_difference']:.6f}")  # fmt: skip
    print(json.dumps({"benchmark": "validation_parity", "rows": rows}))
    if any(row["largest_difference"] > TOLERANCE or row["lowest_goal"] < LEAST for row in rows):
        raise SystemExit(f"a figure differs by more than {TOLERANCE}, or a score is below {LEAST}")


if __name__ == "__main__":
    main()
