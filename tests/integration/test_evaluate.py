"""Evaluation through Ray Data: the numbers of ``YOLO.val``, however many workers share the images.

{storage}/{name}/evaluate/   metrics.json  BoxPR_curve.png ...  confusion_matrix.png ...  detections.png
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ultralytics import YOLO

import raypar.evaluate
from raypar.config import RunConfig
from raypar.dataset.manifest import MANIFEST, Manifest
from raypar.images import decode

pytestmark = pytest.mark.usefixtures("ray_4_cpus")


def with_evaluate(config: RunConfig, **evaluate: Any) -> RunConfig:
    value = config.model_dump(mode="json")
    value["evaluate"] |= evaluate
    return RunConfig.model_validate(value)


def as_yolo_dataset(config: RunConfig, root: Path) -> Path:
    """The run's val split as Ultralytics wants it: image files, label files, a data.yaml."""
    dataset = config.folder / "dataset"
    manifest = Manifest.load(dataset)
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    for shard in manifest.split("val").shards:
        for i, row in enumerate(pq.read_table(f"{dataset.uri}/{shard.path}").to_pylist()):
            stem = f"{Path(shard.path).stem}_{i}"
            suffix = ".png" if row["image"][:4] == b"\x89PNG" else ".jpg"
            (root / "images" / "val" / f"{stem}{suffix}").write_bytes(row["image"])
            boxes = [row["boxes_xywhn"][4 * j : 4 * j + 4] for j in range(len(row["class_ids"]))]
            lines = [" ".join(map(str, [c, *box])) for c, box in zip(row["class_ids"], boxes, strict=True)]
            (root / "labels" / "val" / f"{stem}.txt").write_text("\n".join(lines))
    data = {
        "path": str(root),
        "train": "images/val",
        "val": "images/val",
        "names": dict(enumerate(manifest.class_names)),
    }
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return root / "data.yaml"


@pytest.fixture(scope="module")
def result(trained_run: RunConfig, ray_4_cpus: None) -> dict[str, Any]:
    return raypar.evaluate.run(with_evaluate(trained_run, num_workers=2))


def test_numbers_are_those_of_yolo_val(
    trained_run: RunConfig, result: dict[str, Any], tmp_path: Path
) -> None:
    data = as_yolo_dataset(trained_run, tmp_path / "data")
    weights = f"{trained_run.folder.uri}/train/best.pt"
    theirs = (
        YOLO(weights)
        .val(
            data=str(data),
            plots=False,
            verbose=False,
            workers=0,
            device="cpu",
            project=str(tmp_path),
        )
        .box
    )
    assert result["map50_95"] == pytest.approx(theirs.map, abs=1e-4)
    assert result["map50"] == pytest.approx(theirs.map50, abs=1e-4)
    assert result["num_boxes"] > 0


def test_what_it_leaves(trained_run: RunConfig, result: dict[str, Any]) -> None:
    folder = Path(trained_run.folder.uri) / "evaluate"
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert result["num_images"] == 16
    assert {
        "map50_95",
        "map50",
        "precision",
        "recall",
        "per_class",
        "weights",
        "weights_sha256",
        "split",
        "imgsz",
        "images_per_s",
    } <= result.keys()
    assert all(0 <= result[key] <= 1 for key in ("map50_95", "map50", "precision", "recall"))
    assert [row["class_name"] for row in result["per_class"]] == list(
        Manifest.load(trained_run.folder / "dataset").class_names
    )
    pictures = {path.name for path in folder.glob("*.png")}
    assert {
        "BoxPR_curve.png",
        "BoxF1_curve.png",
        "confusion_matrix.png",
        "confusion_matrix_normalized.png",
        "detections.png",
    } <= pictures
    assert decode((folder / "detections.png").read_bytes()).std() > 10


def test_the_number_of_workers_changes_nothing(
    trained_run: RunConfig, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no setting of the result: that is complete. Made again with another number, it is the same."""
    again = raypar.evaluate.run(with_evaluate(trained_run, num_workers=1))
    assert "is complete" in capsys.readouterr().out
    assert again == result
    remade = raypar.evaluate.run(with_evaluate(trained_run, num_workers=1, overwrite=True))
    for key in ("map50_95", "map50", "precision", "recall"):
        assert remade[key] == pytest.approx(result[key], abs=1e-6)


def test_other_settings_are_another_result(trained_run: RunConfig, result: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"split: 'val' then, 'train' now.*evaluate\.name=") as caught:
        raypar.evaluate.run(with_evaluate(trained_run, split="train"))
    assert "evaluate.overwrite=true" in str(caught.value)
    train = raypar.evaluate.run(with_evaluate(trained_run, split="train", name="on-train"))
    assert train["num_images"] == 48
    kept = Path(trained_run.folder.uri)
    assert json.loads((kept / "evaluate" / "metrics.json").read_text())["split"] == "val"
    assert json.loads((kept / "on-train" / "metrics.json").read_text()) == train
    assert "split: train" in (kept / "on-train" / "run.yaml").read_text()


def test_an_image_that_cannot_be_read_is_left_out_and_listed(
    trained_run: RunConfig, result: dict[str, Any], tmp_path: Path
) -> None:
    copied = with_evaluate(trained_run.model_copy(update={"storage": str(tmp_path)}))
    shutil.copytree(
        trained_run.folder.uri, copied.folder.uri, ignore=shutil.ignore_patterns("evaluate", "checkpoint_*")
    )
    (shard,) = Manifest.load(copied.folder / "dataset").split("val").shards
    path = f"{copied.folder.uri}/dataset/{shard.path}"
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[3] = b"no image"
    table = table.set_column(
        table.schema.get_field_index("image"), table.schema.field("image"), pa.array(images, pa.binary())
    )
    pq.write_table(table, path, row_group_size=shard.row_groups[0])
    manifest = json.loads((copied.folder / "dataset").read(MANIFEST))  # as if it had been prepared so
    data = Path(path).read_bytes()
    manifest["splits"]["val"]["shards"][0] |= {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (copied.folder / "dataset").write_json(MANIFEST, manifest)
    found = raypar.evaluate.run(copied)
    assert (found["num_images"], found["num_unreadable"]) == (15, 1)
    assert [x["image_id"] for x in found["unreadable"]] == [table["image_id"][3].as_py()]
    assert found["num_boxes"] == result["num_boxes"] - len(table["class_ids"][3])


def test_weights_for_other_classes_are_refused(trained_run: RunConfig, tmp_path: Path) -> None:
    import torch
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", nc=7, verbose=False)
    torch.save({"model": model, "train_args": {"imgsz": 96}}, tmp_path / "seven.pt")
    with pytest.raises(ValueError, match="7 classes"):
        raypar.evaluate.run(with_evaluate(trained_run, weights=str(tmp_path / "seven.pt")))


def test_what_is_missing_is_said(trained_run: RunConfig, tmp_path: Path) -> None:
    for config, message in (
        (with_evaluate(trained_run, weights=str(tmp_path / "none.pt")), "none.pt"),
        (with_evaluate(trained_run, split="test"), "no 'test' images"),
        (RunConfig(name="empty", storage=str(tmp_path)), "raypar prepare"),
    ):
        with pytest.raises(ValueError, match=message):
            raypar.evaluate.check(config)
