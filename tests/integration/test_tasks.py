"""A task other than detect from images to metrics, through Ray: prepared, trained on two workers, evaluated; as ``YOLO.val`` sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ultralytics import YOLO

import raypar.evaluate
import raypar.prepare
import raypar.train
from raypar.config import RunConfig
from raypar.scores import ULTRALYTICS_NAMES

pytestmark = pytest.mark.usefixtures("ray_4_cpus")
YOLO_SETTINGS = {
    "epochs": 2,
    "imgsz": 96,
    "warmup_epochs": 0.0,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "mosaic": 0.0,
}


@pytest.fixture(scope="module")
def config(ray_4_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Masks of shapes: trained for two epochs on two workers."""
    config = RunConfig.model_validate(
        {
            "name": "segment",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "prepare": {
                "format": "shapes",
                "task": "segment",
                "shapes": {"train": 64, "val": 10, "height": 72, "width": 96},
                "rows_per_group": 4,
            },
            "train": {
                "model": "yolov8n-seg.yaml",
                "num_workers": 2,
                "use_gpu": False,
                "batch": 8,
                "precision": "fp32",
                "yolo": YOLO_SETTINGS,
            },
        }
    )
    raypar.prepare.run(config)
    raypar.train.check(config)
    raypar.train.run(config)
    return config


def test_metrics_have_boxes_and_masks(config: RunConfig) -> None:
    lines = [
        json.loads(line)
        for line in (Path(config.folder.uri) / "train/metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2
    for line in lines:
        assert {
            "map50",
            "map50_95",
            "mask_map50",
            "mask_map50_95",
            "train/seg_loss",
            "val/seg_loss",
            "fitness",
        } <= line.keys()
        assert line["images_missed"] == 0
    header = (Path(config.folder.uri) / "train/results.csv").read_text().splitlines()[0]
    assert "metrics/mAP50-95(M)" in header


def test_evaluate_is_yolo_val(config: RunConfig, tmp_path: Path) -> None:
    result = raypar.evaluate.run(
        config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"num_workers": 2})})
    )
    folder = Path(config.folder.uri)
    assert {
        "MaskPR_curve.png",
        "BoxPR_curve.png",
        "confusion_matrix.png",
        "val_batch0_labels.jpg",
        "val_batch0_pred.jpg",
    } <= {path.name for path in (folder / "evaluate").iterdir()}
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for shard in sorted((folder / "dataset/val").glob("*.parquet")):
        for i, row in enumerate(pq.read_table(shard).to_pylist()):
            (tmp_path / "images" / f"{shard.stem}_{i}.png").write_bytes(row["image"])
            lines = [
                " ".join(map(str, [c, *polygon]))
                for c, polygon in zip(row["class_ids"], row["segments_xyn"], strict=True)
            ]
            (tmp_path / "labels" / f"{shard.stem}_{i}.txt").write_text("\n".join(lines))
    names = dict(enumerate(("circle", "square", "triangle", "star")))
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"path": str(tmp_path), "train": "images", "val": "images", "names": names})
    )
    theirs: dict[str, Any] = (
        YOLO(folder / "train/best.pt")
        .val(
            data=str(tmp_path / "data.yaml"),
            plots=False,
            verbose=False,
            workers=0,
            device="cpu",
            project=str(tmp_path),
        )
        .results_dict
    )
    expected = {ours: float(theirs[name]) for ours, name in ULTRALYTICS_NAMES.items() if name in theirs}
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert result["num_images"] == 10
    assert [row["class_name"] for row in result["per_class"]] == ["circle", "square", "triangle", "star"]
