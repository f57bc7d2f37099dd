"""Prepare on a real Ray: everything that goes in is written or accounted for, and what is there is complete or recognisably not.

{storage}/{name}/dataset/
    manifest.json  rejected.jsonl  train/00000.parquet  val/00000.parquet
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raypar.prepare
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest
from raypar.dataset.schema import row_schema

pytestmark = pytest.mark.usefixtures("ray_4_cpus")


def make_config(storage: Path, **prepare: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "storage": str(storage), "prepare": prepare})


def rows(config: RunConfig, split: str) -> list[dict[str, Any]]:
    folder = Path(config.folder.uri) / "dataset"
    shards = Manifest.load(config.folder / "dataset").split(split).shards
    return [row for shard in shards for row in pq.read_table(folder / shard.path).to_pylist()]


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return cv2.resize(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8), (width, height))


def write_yolo(root: Path, images: dict[str, bytes], labels: dict[str, str]) -> str:
    for folder in ("images/train", "images/val", "labels/train", "labels/val"):
        (root / folder).mkdir(parents=True)
    for name, data in images.items():
        (root / "images" / name).write_bytes(data)
    for name, text in labels.items():
        (root / "labels" / name).write_text(text)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return str(root / "data.yaml")


def jpeg(seed: int = 0) -> bytes:
    return cv2.imencode(".jpg", picture(seed))[1].tobytes()


def test_layout_rows_and_manifest_agree(tmp_path: Path) -> None:
    config = make_config(tmp_path, format="shapes", shapes={"train": 20, "val": 5, "height": 48, "width": 64}, rows_per_group=8)
    manifest = raypar.prepare.run(config)
    folder = tmp_path / "run" / "dataset"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "manifest.json", "rejected.jsonl", "train/00000.parquet", "val/00000.parquet"]  # fmt: skip
    assert Manifest.load(config.folder / "dataset") == manifest
    for split, count in (("train", 20), ("val", 5)):
        found = manifest.split(split)
        assert found.num_images == count == sum(n for s in found.shards for n in s.row_groups)
        for shard in found.shards:
            file = pq.ParquetFile(folder / shard.path)
            assert file.schema_arrow.equals(row_schema("detect"))
            assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == list(shard.row_groups)
    found_rows = rows(config, "train")
    assert len({row["image_id"] for row in found_rows}) == 20
    assert sum(len(row["class_ids"]) for row in found_rows) == manifest.split("train").num_boxes
    assert [row["image_id"] for row in found_rows] != sorted(row["image_id"] for row in found_rows)  # shuffled


def test_every_damaged_file_is_repaired_or_set_aside(tmp_path: Path) -> None:
    good, box = jpeg(), "0 0.5 0.5 0.4 0.2\n"
    turned = Image.fromarray(picture())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "turned.jpg", exif=exif)
    bomb = Image.new("1", (6000, 6000))
    bomb.save(tmp_path / "bomb.png")
    bad = {"empty.jpg": b"", "text.jpg": b"no image", "cut.jpg": good[: len(good) // 2], "tiny.png": cv2.imencode(".png", picture()[:4, :4])[1].tobytes(),
           "bomb.png": (tmp_path / "bomb.png").read_bytes()}  # fmt: skip
    bad_labels = {
        "class.txt": "7 0.5 0.5 0.1 0.1",
        "nan.txt": "0 nan 0.5 0.1 0.1",
        "words.txt": "0 a b c d",
        "short.txt": "0 0.5 0.5",
        "far.txt": "0 1.7 0.5 0.1 0.1",
    }
    images = {f"train/{name}": data for name, data in bad.items()} | {
        f"train/{Path(name).stem}.jpg": jpeg(i) for i, name in enumerate(bad_labels)
    }
    images |= {f"train/good{i}.jpg": jpeg(i) for i in range(4)} | {
        "train/turned.jpg": (tmp_path / "turned.jpg").read_bytes(),
        "val/v.jpg": good,
        "train/twice.jpg": good,
    }
    labels = {f"train/{name}": text for name, text in bad_labels.items()}
    labels |= {"train/good0.txt": box, "train/turned.txt": box, "train/twice.txt": box + box, "val/v.txt": box}  # good1..3 are backgrounds
    source = write_yolo(tmp_path / "data", images, labels)
    config = make_config(tmp_path, source=source, max_rejected=0.9, max_pixels=1_000_000)
    manifest = raypar.prepare.run(config)

    rejected = [json.loads(line) for line in (tmp_path / "run/dataset/rejected.jsonl").read_text().splitlines()]
    expected = {Path(name).stem for name in [*bad, *bad_labels]}
    assert {Path(line["file"]).stem for line in rejected} == expected
    assert all(line["reason"] and line["split"] == "train" for line in rejected)
    kept = {Path(row["image_id"]).stem: row for row in rows(config, "train")}
    assert kept.keys() == {"good0", "good1", "good2", "good3", "turned", "twice"}
    assert len(kept["twice"]["class_ids"]) == 1
    assert (kept["turned"]["height"], kept["turned"]["width"]) == (60, 40)
    assert cv2.imdecode(np.frombuffer(kept["turned"]["image"], np.uint8), cv2.IMREAD_COLOR).shape == (60, 40, 3)
    np.testing.assert_allclose(kept["good0"]["boxes_xywhn"], [0.5, 0.5, 0.4, 0.2], atol=1e-6)
    assert kept["good0"]["image"] == jpeg(0)  # bytes untouched
    assert manifest.split("train").num_backgrounds == 3
    assert manifest.num_rejected == len(expected)


def test_too_many_rejected_is_an_error_and_leaves_no_manifest(tmp_path: Path) -> None:
    images = {"train/a.jpg": jpeg(), "train/b.jpg": b"broken", "val/v.jpg": jpeg()}
    config = make_config(tmp_path, source=write_yolo(tmp_path / "data", images, {"train/a.txt": "0 0.5 0.5 0.2 0.2"}))
    with pytest.raises(ValueError, match=r"rejected\.jsonl"):
        raypar.prepare.run(config)
    assert not (tmp_path / "run/dataset/manifest.json").exists()
    with pytest.raises(ValueError, match="raypar prepare"):
        Manifest.load(config.folder / "dataset")


def test_stopped_half_way_nothing_looks_complete_and_a_rerun_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, format="shapes", shapes={"train": 12, "val": 4, "height": 48, "width": 64})
    stale = tmp_path / "run/dataset/train/00007.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a larger run that was stopped")
    real = raypar.prepare._stream

    def stopped(*args: Any) -> Any:
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(raypar.prepare, "_stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        raypar.prepare.run(config)
    assert not (tmp_path / "run/dataset/manifest.json").exists()
    monkeypatch.undo()
    assert raypar.prepare.run(config).split("train").num_images == 12
    assert not stale.exists()


def test_a_complete_dataset_is_kept_until_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"format": "shapes", "shapes": {"train": 8, "val": 4, "height": 48, "width": 64}}
    first = raypar.prepare.run(make_config(tmp_path, **settings))
    written = (tmp_path / "run/dataset/train/00000.parquet").stat().st_mtime_ns
    assert raypar.prepare.run(make_config(tmp_path, **settings)) == first
    assert "complete" in capsys.readouterr().out
    assert (tmp_path / "run/dataset/train/00000.parquet").stat().st_mtime_ns == written
    again = raypar.prepare.run(make_config(tmp_path, **settings, overwrite=True))
    assert again == first  # the same bytes, by checksum
    assert (tmp_path / "run/dataset/train/00000.parquet").stat().st_mtime_ns != written


def test_bccd_keeps_every_image(tmp_path: Path, bccd: Path) -> None:
    manifest = raypar.prepare.run(make_config(tmp_path, source=str(bccd), format="voc"))
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert manifest.class_names == ("Platelets", "RBC", "WBC")
    assert manifest.num_rejected == 0
