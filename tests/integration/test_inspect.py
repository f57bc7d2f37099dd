"""``inspect`` through a real Ray: its numbers are those of a recount of the Parquet, its pictures are those that training makes.

{storage}/{name}/inspect/   histograms.png  samples_raw.png  samples_augmented.png  report.html  report.json
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raypar.inspect
import raypar.prepare
from raypar.boxes import xywhn_to_xyxy
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest
from raypar.dataset.stream import render
from raypar.draw import boxes_on, contact_sheet
from raypar.images import decode
from raypar.inspect.speed import STAGES
from raypar.runfile import load

pytestmark = pytest.mark.usefixtures("ray_4_cpus")
FILES = {
    "histograms.png",
    "samples_raw.png",
    "samples_augmented.png",
    "report.html",
    "report.json",
    "settings.json",
    "run.yaml",
}


def make_config(storage: Path, **sections: Any) -> RunConfig:
    shapes = {"train": 50, "val": 9, "height": 120, "width": 160}
    value = {"name": "inspected", "storage": str(storage), "prepare": {"format": "shapes", "shapes": shapes, "rows_per_group": 16},
             "train": {"batch": 8, "use_gpu": False, "yolo": {"epochs": 20, "imgsz": 96}},
             "inspect": {"num_samples": 6, "seconds": 0.5}}  # fmt: skip
    return RunConfig.model_validate(value | sections)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_4_cpus: None) -> RunConfig:
    made = make_config(tmp_path_factory.mktemp("runs"))
    raypar.prepare.run(made)
    return made


@pytest.fixture(scope="module")
def result(config: RunConfig) -> dict[str, Any]:
    return raypar.inspect.run(config)


def shards(config: RunConfig, split: str = "train") -> pa.Table:
    folder = config.folder / "dataset"
    return pa.concat_tables(
        pq.read_table(f"{folder.uri}/{shard.path}") for shard in Manifest.load(folder).split(split).shards
    )


def folder_of(config: RunConfig) -> Path:
    return Path(config.folder.uri) / "inspect"


def test_what_it_leaves(config: RunConfig, result: dict[str, Any]) -> None:
    assert {path.name for path in folder_of(config).iterdir()} == FILES
    assert json.loads((folder_of(config) / "report.json").read_text()) == result
    page = (folder_of(config) / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("https://", "http").split("<body>")[0], "self-contained"


def test_numbers_are_those_of_the_parquet(config: RunConfig, result: dict[str, Any]) -> None:
    rows, names = shards(config).to_pylist(), Manifest.load(config.folder / "dataset").class_names
    found = result["statistics"]
    per_class = Counter(i for row in rows for i in row["class_ids"])
    assert found["num_images"] == len(rows) == 50
    assert found["num_boxes"] == sum(per_class.values())
    assert found["num_backgrounds"] == sum(not row["class_ids"] for row in rows)
    assert [row["num_boxes"] for row in found["per_class"]] == [per_class[i] for i in range(len(names))]
    assert [row["num_images"] for row in found["per_class"]] == [
        sum(i in row["class_ids"] for row in rows) for i in range(len(names))
    ]
    assert found["max_boxes_per_image"] == max(len(row["class_ids"]) for row in rows)
    assert (found["height"], found["width"]) == ([120, 120], [160, 160])
    sides = [
        (w * 160 * h * 120) ** 0.5 * 96 / 160
        for row in rows
        for w, h in np.reshape(row["boxes_xywhn"], (-1, 4))[:, 2:]
    ]
    assert found["median_box_px"] == pytest.approx(np.median(sides), rel=0.1)
    assert list(found["box_sizes"].values()) == np.histogram(sides, [0, 2, 8, 32, 96, 1e9])[0].tolist()
    assert np.sum(found["box_centres"]) == found["num_boxes"]


def test_augmented_samples_are_those_that_training_renders(config: RunConfig, result: dict[str, Any]) -> None:
    """The first images of the first epoch, mosaics among them, bit for bit."""
    manifest = Manifest.load(config.folder / "dataset")
    spec, _ = raypar.inspect._spec(config, manifest)
    batch = next(render(spec, next(spec.plan.items())))
    drawn = []
    for i in range(6):
        mine = batch.image_index == i
        image = np.ascontiguousarray(batch.images[i].transpose(1, 2, 0))
        drawn.append(
            boxes_on(
                image,
                xywhn_to_xyxy(batch.boxes_xywhn[mine], (96, 96)),
                batch.class_ids[mine],
                manifest.class_names,
            )
        )
    ids = shards(config)["image_id"].to_pylist()
    expected = contact_sheet(drawn, [ids[row] for row in batch.rows[:6]], columns=2)
    sheet = decode((folder_of(config) / "samples_augmented.png").read_bytes())
    np.testing.assert_array_equal(sheet, expected)


def test_pictures_are_not_blank(config: RunConfig, result: dict[str, Any]) -> None:
    for name in ("histograms", "samples_raw", "samples_augmented"):
        image = decode((folder_of(config) / f"{name}.png").read_bytes())
        assert image.std() > 20, name
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50, name


def test_raw_samples_are_the_images_themselves(config: RunConfig, result: dict[str, Any]) -> None:
    """What lies under the first tile, away from boxes and text, is the image of the row that it names."""
    spec, _ = raypar.inspect._spec(config, Manifest.load(config.folder / "dataset"))
    row = shards(config).slice(int(next(render(spec, next(spec.plan.items()))).rows[0]), 1).to_pylist()[0]
    tile = decode((folder_of(config) / "samples_raw.png").read_bytes())[24 : 24 + 120, 4 : 4 + 160]
    same = (tile == decode(row["image"])).all(-1)
    assert 0.5 < same.mean() < 1


def test_speed(result: dict[str, Any]) -> None:
    speed = result["speed"]
    cores = len(os.sched_getaffinity(0))
    assert speed["num_cores_of_node"] == cores
    assert 1 <= speed["num_cores"] <= cores
    assert set(speed["stages_cpu_ms_per_image"]) == set(STAGES)
    stages = speed["stages_cpu_ms_per_image"]
    assert all(stages[name] > 0 for name in ("read", "decode", "render", "pack"))
    assert sum(stages.values()) == pytest.approx(speed["cpu_ms_per_image"], rel=1.0), (
        "the stages are the whole, about"
    )
    needed = speed["cpus_for_images_per_s"]
    assert list(needed) == ["500", "1000", "2000"]
    assert needed["500"] <= needed["1000"] <= 2 * needed["500"]
    assert speed["model"]["images_per_s"] > 0, speed["model"]
    assert "limits" in speed["verdict"]


def test_complete_output_is_kept(
    config: RunConfig, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder_of(config).iterdir()}
    assert raypar.inspect.run(config) == result
    assert "inspect.overwrite=true replaces it" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder_of(config).iterdir()} == before


def test_other_settings_are_inspected_in_another_folder(config: RunConfig, result: dict[str, Any]) -> None:
    value = config.model_dump(mode="json")
    value["inspect"] |= {"split": "val", "seconds": 0, "num_samples": 30}
    with pytest.raises(ValueError, match="split: 'train' then, 'val' now, num_samples: 6 then, 30 now"):
        raypar.inspect.run(RunConfig.model_validate(value))
    value["inspect"]["name"] = "of-val"
    changed = raypar.inspect.run(RunConfig.model_validate(value))
    assert changed["statistics"]["num_images"] == 9
    assert changed["speed"] is None
    sheet = decode((folder_of(config).parent / "of-val" / "samples_raw.png").read_bytes())
    assert sheet.shape[0] > 4 * 120, "more samples than images: the second epoch's are shown too"


def test_a_model_that_cannot_be_loaded_leaves_the_rest(config: RunConfig) -> None:
    value = config.model_dump(mode="json")
    value["train"]["model"] = "yolov999.yaml"
    value["inspect"]["name"] = "without-model"
    found = raypar.inspect.run(RunConfig.model_validate(value))
    assert "yolov999" in found["speed"]["model"]["error"]
    assert found["speed"]["images_per_s"] > 0
    assert "not timed" in found["speed"]["verdict"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inspect": {"split": "test"}}, "the dataset has no 'test' images"),
        ({"name": "nothing"}, "run `raypar prepare`"),
        ({"train": {"yolo": {"imgsz": "wide"}}}, "train.yolo.imgsz='wide'"),
        ({"train": {"yolo": {"degrees": "many"}}}, "train.yolo: "),
        ({"train": {"yolo": {"epoch": 3}}}, "epochs"),
        ({"train": {"albumentations": [{"Blurr": {}}]}}, "did you mean 'Blur'?"),
    ],
)
def test_mistakes(config: RunConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        raypar.inspect.check(RunConfig.model_validate(config.model_dump(mode="json") | changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(config: RunConfig, tmp_path: Path) -> None:
    moved = make_config(tmp_path, prepare={"format": "shapes", "shapes": {"train": 4, "val": 2}})
    raypar.prepare.run(moved)
    next((tmp_path / "inspected/dataset/train").glob("*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"shard train/00000.parquet is missing"):
        raypar.inspect.check(moved)


def test_one_image(tmp_path: Path) -> None:
    tiny = make_config(
        tmp_path, prepare={"format": "shapes", "shapes": {"train": 1, "val": 1}}, inspect={"seconds": 0.2}
    )
    raypar.prepare.run(tiny)
    found = raypar.inspect.run(tiny)
    assert found["statistics"]["num_images"] == 1
    assert {path.name for path in folder_of(tiny).iterdir()} == FILES


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    prepare = {
        "format": "shapes",
        "task": task,
        "shapes": {"train": 20, "val": 2, "height": 120, "width": 160},
    }
    other = make_config(tmp_path, prepare=prepare, inspect={"seconds": 0, "num_samples": 4})
    raypar.prepare.run(other)
    raypar.inspect.check(other)
    found, rows = raypar.inspect.run(other), shards(other).to_pylist()
    per_class = Counter(i for row in rows for i in row.get("class_ids", ()))
    images = Counter(
        i for row in rows for i in (set(row["class_ids"]) if "class_ids" in row else [row["class_id"]])
    )
    assert [row["num_boxes"] for row in found["statistics"]["per_class"]] == [per_class[i] for i in range(4)]
    assert [row["num_images"] for row in found["statistics"]["per_class"]] == [images[i] for i in range(4)]
    assert bool(found["statistics"]["num_boxes"]) == (task != "classify")
    for name in ("histograms", "samples_raw", "samples_augmented"):
        assert decode((folder_of(other) / f"{name}.png").read_bytes()).std() > 20, name


def test_run_file_has_the_section(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ninspect: {split: val, num_sample: 3}\n")
    with pytest.raises(ValueError, match="did you mean 'num_samples'"):
        load(tmp_path / "run.yaml", [])
