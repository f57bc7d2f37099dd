"""The README's quick start, word for word but smaller, and the layout that it leaves:

{storage}/demo/
    run.yaml
    dataset/manifest.json  dataset/{train,val}/*.parquet  dataset/rejected.jsonl
    train/checkpoint_*/  train/best.pt  train/last.pt  train/metrics.jsonl  train/results.csv  train/*.png
    evaluate/metrics.json  evaluate/*.png
    predict/*.parquet
    export/
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypar import cli

REPOSITORY = Path(__file__).resolve().parents[2]
SMALLER = [
    "prepare.shapes.train=32", "prepare.shapes.val=12", "prepare.shapes.height=96", "prepare.shapes.width=128",
    "train.num_workers=1", "train.use_gpu=false", "train.batch=8", "train.yolo.epochs=1", "train.yolo.imgsz=96", "train.yolo.close_mosaic=0",
]  # fmt: skip


def quick_start() -> list[list[str]]:
    section = (REPOSITORY / "README.md").read_text().partition("## Quick start")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block
    return [shlex.split(line, comments=True) for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def run(ray_4_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick start."""
    storage = tmp_path_factory.mktemp("quick-start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for program, *arguments in quick_start():
            assert program == "raypar"
            assert cli.main([*arguments, f"storage={storage}", *SMALLER]) == 0, arguments
    return storage / "demo"


def test_layout(run: Path) -> None:
    for name in (
        "run.yaml",
        "dataset/manifest.json",
        "dataset/rejected.jsonl",
        "train/best.pt",
        "train/last.pt",
        "train/results.csv",
    ):
        assert (run / name).is_file(), name
    for pattern in (
        "dataset/train/*.parquet",
        "dataset/val/*.parquet",
        "train/checkpoint_*",
        "train/batch_*.png",
        "evaluate/*.png",
        "predict/*.parquet",
    ):
        assert list(run.glob(pattern)), pattern
    assert list(run.glob("export/**/*.onnx"))
    assert not list(run.rglob("*.part")), "nothing half written is left"


def test_metrics(run: Path) -> None:
    metrics = json.loads((run / "evaluate/metrics.json").read_text())
    assert {
        "map50_95",
        "map50",
        "precision",
        "recall",
        "num_images",
        "per_class",
        "weights",
        "split",
        "images_per_s",
    } <= set(metrics)
    assert metrics["num_images"] == 12
    (line,) = map(json.loads, (run / "train/metrics.jsonl").read_text().splitlines())
    assert {"images_per_s", "world_size", "images_seen", "wait_s", "step_s", "validate_s"} <= set(line)
    assert line["images_seen"] == 32


def test_predictions(run: Path) -> None:
    table = pq.ParquetDataset([str(p) for p in sorted(run.glob("predict/*.parquet"))]).read()
    assert {"image_id", "height", "width", "boxes_xyxy", "class_ids", "confidences"} <= set(
        table.column_names
    )
    assert table.num_rows == 12
    assert len(set(table["image_id"].to_pylist())) == 12


def test_ultralytics_loads_the_weights(run: Path) -> None:
    from ultralytics import YOLO

    assert list(YOLO(run / "train/best.pt").names.values()) == ["circle", "square", "triangle", "star"]


def test_again_keeps_what_is_complete(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    for _, *arguments in quick_start():
        assert cli.main([*arguments, f"storage={run.parent}", *SMALLER]) == 0
        assert "complete" in capfd.readouterr().out, arguments
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_dry_runs_of_a_finished_run(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for verb in set(cli.VERBS) - {"tune"}:  # it has no search space
        assert cli.main([verb, "jobs/demo.yaml", f"storage={run.parent}", *SMALLER, "--dry-run"]) == 0
        assert "all checks passed" in capfd.readouterr().out


def test_more_gpus_than_the_cluster_has(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = [
        f"storage={run.parent}",
        *SMALLER,
        "train.num_workers=8",
        "train.use_gpu=true",
        "train.overwrite=true",
    ]
    assert cli.main(["train", str(REPOSITORY / "jobs/demo.yaml"), *settings]) == 2
    error = capfd.readouterr().err
    assert "error: 8 GPUs are needed, the cluster (1 node(s)) has 0" in error
    assert (run / "train/best.pt").exists(), "refused before anything is deleted"
