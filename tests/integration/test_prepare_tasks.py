"""``prepare`` of segment, pose and classify as a user runs it, and the stream of what it wrote through Ray Data's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ultralytics.cfg import get_cfg

import raypar.evaluate
import raypar.prepare
import raypar.train
from raypar.config import RunConfig
from raypar.dataset.batch import Batch, pack, unpack
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import Plan
from raypar.dataset.schema import row_schema
from raypar.dataset.stream import StreamSpec, _start, recipe_of, render

pytestmark = pytest.mark.usefixtures("ray_4_cpus")
TEXTS = {
    "segment": "0 0.1 0.2 0.5 0.25 0.3 0.9\n1 0.6 0.1 0.9 0.1 0.9 0.3\n",
    "pose": "0 0.3 0.4 0.2 0.4 0.25 0.3 2 0.35 0.5 1\n",
}


def config_of(tmp_path: Path, **prepare: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "storage": str(tmp_path / "runs"), "prepare": prepare})


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((100, 60), 60).convert("RGB").save(path)


def yolo_tree(root: Path, text: str, bad: str, **values: Any) -> str:
    for split, count in {"train": 12, "val": 4}.items():
        for i in range(count):
            write_image(root / "images" / split / f"{i}.jpg")
            label = root / "labels" / split / f"{i}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(bad if i == 2 else "" if i == 3 else text)
    (root / "data.yaml").write_text(
        json.dumps({"train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | values)
    )
    return str(root / "data.yaml")


def through_ray(config: RunConfig, manifest: Manifest) -> list[Batch]:
    """All batches of two epochs; those of Ray's tasks are those of this process."""
    split = manifest.split("train")
    groups = tuple(rows for shard in split.shards for rows in shard.row_groups)
    plan = Plan(row_groups=groups, seed=0, epochs=2, global_batch=4, window_images=4)
    recipe = recipe_of(vars(get_cfg(overrides={"imgsz": 64})), manifest)
    spec = StreamSpec.of(
        config.folder / "dataset", split, plan, recipe, mosaic_epochs=1, albumentations=None, world_size=1
    )
    items = list(plan.items(0))
    (shard,) = _start(spec, items)
    batches = [
        b
        for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for b in unpack(table)
    ]
    here = [batch for item in items for batch in render(spec, item)]
    assert pack(batches).equals(pack(here))
    return batches


@pytest.mark.parametrize(
    ("task", "values", "bad", "reason"),
    [
        ("segment", {}, "0 0.5 0.5 0.1 0.1\n", "labels are boxes, prepare.task=segment needs polygons"),
        (
            "pose",
            {"kpt_shape": [2, 3], "flip_idx": [1, 0]},
            "0 0.5 0.5 0.1 0.1\n",
            "a label line has 5 columns, 'kpt_shape' asks for 11",
        ),
    ],
    ids=["segment", "pose"],
)
def test_yolo_labels_of_a_task_to_batches(
    tmp_path: Path, task: str, values: dict[str, Any], bad: str, reason: str
) -> None:
    source = yolo_tree(tmp_path / "source", TEXTS[task], bad, **values)
    config = config_of(
        tmp_path, source=source, task="auto" if task == "pose" else task, max_rejected=0.2, rows_per_group=4
    )
    manifest = raypar.prepare.run(config)
    folder = Path(config.folder.uri) / "dataset"
    assert manifest.task == task
    assert (manifest.keypoint_shape, manifest.flip_idx) == (
        ((2, 3), (1, 0)) if task == "pose" else (None, ())
    )
    assert Manifest.load(config.folder / "dataset") == manifest
    assert manifest.splits["train"].num_images == 11
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in rejected] == ["2.jpg", "2.jpg"]
    assert all(line["reason"].startswith(reason) for line in rejected)
    table = pq.read_table(folder / manifest.splits["train"].shards[0].path)
    assert table.schema.equals(row_schema(task))
    for batch in through_ray(config, manifest):
        assert (batch.masks is not None, batch.keypoints is not None) == (task == "segment", task == "pose")


def test_folders_of_classes_to_batches(tmp_path: Path) -> None:
    for split, count in {"train": 5, "val": 2}.items():
        for name in ("cat", "dog", "emu"):
            for i in range(count):
                write_image(tmp_path / "source" / split / name / f"{i}.jpg")
    (tmp_path / "source" / "train" / "emu" / "broken.jpg").write_bytes(b"no image")
    config = config_of(
        tmp_path, source=str(tmp_path / "source"), format="folders", max_rejected=0.1, rows_per_group=4
    )
    manifest = raypar.prepare.run(config)
    assert (manifest.task, manifest.class_names) == ("classify", ("cat", "dog", "emu"))
    assert manifest.splits["train"].boxes_per_class == (5, 5, 5)
    assert manifest.num_rejected == 1
    seen = np.concatenate([batch.class_ids for batch in through_ray(config, manifest)])
    assert set(seen.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"the dataset is for .classify.: .*train\.model=yolov8n-cls\.yaml"):
        raypar.train.check(config)
