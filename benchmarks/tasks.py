"""Every task: trained on generated shapes, and its best.pt judged by Ultralytics itself.

    python benchmarks/tasks.py [--tasks segment pose] [--family yolov8n] [--epochs 12] [--imgsz 160] [--train 240] [--val 60] [--workers 1]

For each task a row: the figures of training's own validation, of `raypar evaluate` and of `YOLO(best.pt).val()` on the same images.
Each task must reach its goal, and none of evaluate's figures may differ from Ultralytics' by more than 0.003. Training's are of the weights in fp32, which best.pt rounds to fp16: that
may move precision and recall, which are read at the confidence where F1 is largest, but the others not by more than 0.003.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import raypar.evaluate
import raypar.prepare
import raypar.train
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest
from raypar.dataset.rows import row_labels

SUFFIXES = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}
TOLERANCE = 0.003
GOALS = {
    "detect": ("map50", 0.5),
    "segment": ("mask_map50", 0.5),
    "pose": ("pose_map50", 0.5),
    "obb": ("map50", 0.5),
    "classify": ("top1", 0.9),
}
FIGURES = {
    **{f"{of}{ours}": f"metrics/{theirs}({kind})" for kind, of in {"B": "", "M": "mask_", "P": "pose_"}.items()
       for ours, theirs in {"precision": "precision", "recall": "recall", "map50": "mAP50", "map50_95": "mAP50-95"}.items()},
    "top1": "metrics/accuracy_top1", "top5": "metrics/accuracy_top5",
}  # fmt: skip


def as_ultralytics(dataset: Path, manifest: Manifest, root: Path) -> str:
    """The validation split as Ultralytics wants it: a data.yaml, or for classify a folder of folders."""
    num_points = manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
    number = 0
    for shard in manifest.split("val").shards:
        table = pq.read_table(dataset / shard.path)
        for i, image in enumerate(table["image"].to_pylist()):
            number += 1
            class_ids, boxes, polygons, keypoints = row_labels(table, i, manifest.task, num_points)
            if manifest.task == "classify":
                for split in ("train", "val"):  # it wants both
                    folder = root / split / manifest.class_names[class_ids[0]]
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f"{number:05d}.png").write_bytes(image)
                continue
            rows: Any = boxes if polygons is None else table["segments_xyn"][i].as_py()
            if keypoints is not None:
                rows = [[*box, *points.ravel()] for box, points in zip(boxes, keypoints, strict=True)]
            for kind in ("images", "labels"):
                (root / kind).mkdir(parents=True, exist_ok=True)
            (root / "images" / f"{number:05d}.png").write_bytes(image)
            lines = [
                " ".join([str(c), *(repr(float(x)) for x in row)])
                for c, row in zip(class_ids, rows, strict=True)
            ]
            (root / "labels" / f"{number:05d}.txt").write_text("\n".join(lines))
    if manifest.task == "classify":
        return str(root)
    data: dict[str, Any] = {
        "path": str(root),
        "train": "images",
        "val": "images",
        "names": dict(enumerate(manifest.class_names)),
    }
    if manifest.keypoint_shape:
        data |= {
            "kpt_shape": list(manifest.keypoint_shape),
            "flip_idx": list(manifest.flip_idx or range(num_points)),
        }
    (root / "data.yaml").write_text(json.dumps(data))
    return str(root / "data.yaml")


def measure(task: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains a task; returns both sides' figures, by raypar's names."""
    import ray
    from ultralytics import YOLO

    config = RunConfig.model_validate({
        "name": task, "storage": str(folder),
        "prepare": {"format": "shapes", "task": task, "shapes": {"train": args.train, "val": args.val, "height": 120, "width": 160}},
        "train": {"model": f"{args.family}{SUFFIXES[task]}.yaml", "num_workers": args.workers, "batch": 16,
                  "yolo": {"epochs": args.epochs, "imgsz": args.imgsz, "close_mosaic": args.epochs // 4, "optimizer": "AdamW", "lr0": 0.002,
                           "warmup_epochs": 1.0, "nbs": 16}},
    })  # fmt: skip
    ray.init(address="local", num_cpus=args.workers + 2, include_dashboard=False)
    began = time.monotonic()
    manifest = raypar.prepare.run(config)
    raypar.train.check(config)
    summary = raypar.train.run(config)
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in config.folder.read("train/metrics.jsonl").splitlines()]
    ours = next(line for line in lines if line["epoch"] == summary["best_epoch"])
    evaluated = raypar.evaluate.run(config)
    ray.shutdown()  # type: ignore[no-untyped-call]
    run = Path(config.folder.uri)
    theirs = YOLO(run / "train/best.pt").val(
        data=as_ultralytics(run / "dataset", manifest, folder / f"{task}-yolo"), plots=False, verbose=False,
        workers=0, device="cpu", project=str(folder)).results_dict  # fmt: skip
    names = [name for name, key in FIGURES.items() if key in theirs]
    figures = {
        name: (float(ours[name]), float(evaluated[name]), float(theirs[FIGURES[name]])) for name in names
    }
    difference = max(abs(b - c) for _, b, c in figures.values())
    stable = [(a, c) for name, (a, _, c) in figures.items() if not name.endswith(("precision", "recall"))]
    name, least = GOALS[task]
    return {"task": task, "family": args.family, "seconds": round(seconds, 1), "figures": figures, "goal": GOALS[task],
            "is_reached": figures[name][2] >= least, "difference": max(difference, *(abs(a - c) for a, c in stable))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(SUFFIXES), choices=list(SUFFIXES))
    parser.add_argument("--family", default="yolov8n")
    for name, value in {"epochs": 12, "imgsz": 160, "train": 240, "val": 60, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raypar-tasks-") as folder:
        rows = [measure(task, args, Path(folder)) for task in args.tasks]
    for row in rows:
        figures = ", ".join(
            f"{name} {a:.4f} / {b:.4f} / {c:.4f}" for name, (a, b, c) in row["figures"].items()
        )
        print(f"{args.family} {row['task']}: {row['seconds']:.0f} s; training / evaluate / YOLO.val: {figures}; "
              f"largest difference {row['difference']:.5f}, goal {row['goal']}")  # fmt: skip
    print(json.dumps({"benchmark": "tasks", "rows": rows}))
    if any(row["difference"] > TOLERANCE or not row["is_reached"] for row in rows):
        raise SystemExit(f"a goal is not reached, or a figure differs by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
