"""Damage after ``prepare``: shards are refused at start, rows that cannot be decoded are replaced, counted and said."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raypar.evaluate
import raypar.prepare
import raypar.train
from raypar import cli
from raypar.config import RunConfig
from raypar.dataset.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.usefixtures("ray_4_cpus")


def prepared(tmp_path: Path) -> RunConfig:
    config = RunConfig.model_validate(
        {
            "name": "damage",
            "storage": str(tmp_path),
            "prepare": {
                "format": "shapes",
                "shapes": {"train": 24, "val": 8, "height": 64, "width": 80},
                "rows_per_group": 8,
            },
            "train": {
                "model": "yolov8n.yaml",
                "use_gpu": False,
                "batch": 8,
                "yolo": {"epochs": 1, "imgsz": 64},
            },
        }
    )
    raypar.prepare.run(config)
    return config


def test_rows_that_cannot_be_decoded_are_in_the_log_and_the_metrics(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = prepared(tmp_path)
    folder = Path(config.folder.uri) / "dataset"
    table = pq.read_table(folder / "train/00000.parquet")
    images = [b"no image" if i in (3, 11, 17) else data for i, data in enumerate(table["image"].to_pylist())]
    sink = io.BytesIO()
    pq.write_table(
        table.set_column(1, table.schema.field("image"), pa.array(images, pa.binary())),
        sink,
        row_group_size=8,
    )
    (folder / "train/00000.parquet").write_bytes(sink.getvalue())
    # made to agree: as if prepare had let them through
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0] |= {
        "num_bytes": len(sink.getvalue()),
        "sha256": hashlib.sha256(sink.getvalue()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    raypar.train.run(config)
    (line,) = [
        json.loads(text)
        for text in (Path(config.folder.uri) / "train/metrics.jsonl").read_text().splitlines()
    ]
    assert line["images_replaced"] == 3
    assert "3 image(s) of epoch 1 cannot be decoded" in capfd.readouterr().out


def test_a_damaged_shard_stops_train_and_evaluate_at_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_weights: Path
) -> None:
    config = prepared(tmp_path)
    dataset = config.folder / "dataset"
    (shard,) = Manifest.load(dataset).split("val").shards
    data = bytearray(dataset.read(shard.path))
    data[100] ^= 1
    dataset.write(shard.path, bytes(data))
    (tmp_path / "run.yaml").write_text(
        f"name: damage\nstorage: {tmp_path}\ntrain: {{use_gpu: false}}\nevaluate: {{weights: {tiny_weights}}}\n"
    )
    with pytest.raises(ValueError, match=f"shard {shard.path} is altered"):
        raypar.train.run(config)
    with pytest.raises(ValueError, match=f"shard {shard.path} is altered"):
        raypar.evaluate.run(
            RunConfig.model_validate(config.model_dump() | {"evaluate": {"weights": str(tiny_weights)}})
        )
    dataset.write(shard.path, bytes(data[:-5]))
    capsys.readouterr()
    for verb in ("train", "evaluate"):
        assert cli.main([verb, str(tmp_path / "run.yaml")]) == 2
        said = capsys.readouterr().err.strip()
        assert f"shard {shard.path} has {len(data) - 5} bytes, the manifest says {len(data)}" in said
        assert "\n" not in said
