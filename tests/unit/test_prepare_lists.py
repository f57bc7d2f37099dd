"""What ``prepare`` makes of a listing before Ray starts: val drawn from train, repeated images, the task of the model; and what it says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

import raypar.predict
from raypar import prepare
from raypar.config import RunConfig
from raypar.dataset import shards
from raypar.dataset.formats import Listing
from raypar.dataset.ingest import ShardJob, ShardReport
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.records import Records
from raypar.sources import Source
from raypar.storage import Folder
from raypar.train import initial

HW = (60, 100)
BOX, POLYGON = "0 0.5 0.5 0.2 0.2\n", "0 0.1 0.2 0.5 0.25 0.3 0.9\n"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", HW[::-1]).save(path)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def config_of(
    root: Path, source: str, format_: str = "yolo", model: str = "yolov8n.yaml", **values: Any
) -> RunConfig:
    section = {"source": source, "format": format_, **values}
    return RunConfig.model_validate(
        {"name": "r", "storage": str(root / "runs"), "prepare": section, "train": {"model": model}}
    )


def listed(config: RunConfig) -> tuple[dict[str, list[str]], str]:
    """Image ids of each split, and the notes."""
    found = prepare._list(config)
    return {
        split: [record.image_id for record in records] for split, records in found.splits.items()
    }, "\n".join(found.notes)


def yolo_source(root: Path, num_images: int = 20, **values: Any) -> str:
    for i in range(num_images):
        write_image(root / "images" / f"{i:02d}.jpg")
        write(root / "labels" / f"{i:02d}.txt", BOX)
    return write(root / "data.yaml", json.dumps({"train": "images", "names": ["cat"]} | values))


def coco_source(root: Path, num_images: int = 20) -> str:
    images = [{"id": i, "file_name": f"{i:02d}.jpg"} for i in range(num_images)]
    annotations = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(num_images)]
    for i in range(num_images):
        write_image(root / f"{i:02d}.jpg")
    return write(
        root / "all.json",
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}),
    )


def voc_source(root: Path, num_images: int = 20) -> str:
    for i in range(num_images):
        write_image(root / "JPEGImages" / f"{i:02d}.jpg")
    (root / "Annotations").mkdir()
    write(root / "ImageSets" / "Main" / "train.txt", "\n".join(f"{i:02d}" for i in range(num_images)))
    write(root / "classes.txt", "cat\n")
    return str(root)


def folders_source(root: Path, num_images: int = 20) -> str:
    for i in range(num_images):
        write_image(root / "train" / ("cat" if i % 4 else "dog") / f"{i:02d}.jpg")
    return str(root)


SOURCES = {"yolo": yolo_source, "coco": coco_source, "voc": voc_source, "folders": folders_source}

# Val


@pytest.mark.parametrize("format_", SOURCES)
def test_a_source_of_train_alone(tmp_path: Path, format_: str) -> None:
    source = SOURCES[format_](tmp_path)
    ids, notes = listed(config_of(tmp_path, source, format_))
    assert {split: len(some) for split, some in ids.items()} == {"train": 20}
    assert "no val split, and training needs one: set prepare.val_fraction=0.1" in notes
    drawn, notes = listed(config_of(tmp_path, source, format_, val_fraction=0.2))
    assert {split: len(some) for split, some in drawn.items()} == {"train": 16, "val": 4}
    assert sorted([*drawn["train"], *drawn["val"]]) == sorted(ids["train"])
    assert "training needs" not in notes
    assert "for val" in notes
    again = config_of(tmp_path, source, format_, val_fraction=0.2)
    assert listed(again)[0] == drawn
    assert listed(again.model_copy(update={"seed": 1}))[0] != drawn


def test_notes_are_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = yolo_source(tmp_path, test="images/none")
    prepare.check(config_of(tmp_path, source))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": note: ")[0] for line in said] == ["prepare"] * 2
    assert "there is no test split: " in said[0]
    assert "training needs one" in said[1]


def test_each_class_gives_its_share_to_val(tmp_path: Path) -> None:
    drawn, _ = listed(config_of(tmp_path, folders_source(tmp_path), "folders", val_fraction=0.4))
    assert Counter(name.split("/")[0] for name in drawn["val"]) == {"cat": 6, "dog": 2}


def test_val_fraction_takes_the_place_of_a_fifth(tmp_path: Path) -> None:
    source = voc_source(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    for fraction, num_val in ((None, 4), (0.5, 10), (0.999, 19), (0.001, 1)):
        drawn, _ = listed(config_of(tmp_path, source, "voc", val_fraction=fraction))
        assert {split: len(some) for split, some in drawn.items()} == {"train": 20 - num_val, "val": num_val}


def test_val_fraction_beside_a_val_split_is_refused(tmp_path: Path) -> None:
    source = yolo_source(tmp_path, val="images")
    with pytest.raises(
        ValueError,
        match=r"val_fraction=0\.1 draws val from train, and the source has a val split of 20 images: leave",
    ):
        prepare.check(config_of(tmp_path, source, val_fraction=0.1))
    with pytest.raises(ValueError, match="too few images"):
        prepare.check(config_of(tmp_path, yolo_source(tmp_path / "one", 1), val_fraction=0.1))
    for wrong in (
        {"val_fraction": 0},
        {"val_fraction": 1},
        {"val_fraction": 1.5},
        {"val_fraction": 0.1, "format": "shapes"},
    ):
        with pytest.raises(ValidationError, match="val_fraction"):
            RunConfig.model_validate({"name": "r", "prepare": {"source": "x", **wrong}})


def test_a_dataset_without_val_says_how_to_get_one() -> None:
    manifest = Manifest(task="detect", class_names=("a",), splits={"train": Split(num_images=3)}, source="x")
    with pytest.raises(ValueError, match=r"no 'val' images \(it has train\): prepare\.val_fraction"):
        manifest.split("val")


def written_here(
    due: list[shards.Portion], splits: dict[str, Records], template: ShardJob
) -> Iterator[tuple[shards.Portion, ShardReport]]:
    """As ``shards.write``, in this process."""
    return ((portion, shards.write_portion(portion, splits[portion.split], template)) for portion in due)


def test_an_image_of_train_never_comes_to_val_when_more_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "write", written_here)

    def prepared(num_images: int) -> dict[str, set[str]]:
        source = yolo_source(tmp_path, num_images)
        config = config_of(tmp_path, source, val_fraction=0.3, append=True)
        manifest = prepare.run(config)
        dataset = config.folder / "dataset"
        return {
            split: {
                row["image_id"]
                for shard in found.shards
                for row in pq.read_table(f"{dataset.path}/{shard.path}").to_pylist()
            }
            for split, found in manifest.splits.items()
        }

    before, after = prepared(20), prepared(50)
    assert {split: len(ids) for split, ids in before.items()} == {"train": 14, "val": 6}
    for split, ids in before.items():
        assert ids < after[split]
    assert not after["train"] & after["val"]
    assert len(after["train"] | after["val"]) == 50


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_test_split_may_be_all_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    monkeypatch.setattr(shards, "write", written_here)
    write(tmp_path / "bad" / "a.jpg", "no image")
    source = yolo_source(tmp_path, 4, **{"val": "images", split: "bad"})
    config = config_of(tmp_path, source, max_rejected=0.5)
    if split == "val":
        with pytest.raises(ValueError, match="no image of split 'val' can be used"):
            prepare.run(config)
        return
    manifest = prepare.run(config)
    assert {name: found.num_images for name, found in manifest.splits.items()} == {
        "train": 4,
        "val": 4,
        "test": 0,
    }
    with pytest.raises(ValueError, match="no 'test' images"):
        Manifest.load(config.folder / "dataset").split("test")


# Repeats


def repeats(root: Path) -> str:
    source = yolo_source(root, 10, train="train.txt", val="images/09.jpg")
    names = ["00", "00", "03", "00", "03", *(f"{i:02d}" for i in range(10))]
    write(root / "train.txt", "".join(f"./images/{name}.jpg\n" for name in names))
    return source


def written(
    config: RunConfig, taken: dict[str, pa.Array] | None = None
) -> tuple[list[dict[str, Any]], list[shards.Portion], list[ShardReport]]:
    """Rows of train, as the tasks of ``prepare`` write them."""
    listing = prepare._list(config)
    dataset = config.folder / "dataset"
    section = config.prepare
    assert section is not None
    splits = {split: records for split, records in listing.splits.items() if isinstance(records, Records)}
    template = ShardJob(dataset, "", "", section.format, len(listing.class_names), (), 4, 10**6, config.seed)
    made = shards.portions({"train": splits["train"]}, template, section, taken=taken or {}, first={})
    reports = [shards.write_portion(portion, splits[portion.split], template) for portion in made]
    rows = [
        row
        for p, r in zip(made, reports, strict=True)
        if r.shard
        for row in pq.read_table(f"{dataset.path}/{p.path}").to_pylist()
    ]
    return rows, made, reports


def test_an_image_that_is_listed_again_is_repeated(tmp_path: Path) -> None:
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    config = config_of(tmp_path, repeats(tmp_path))
    rows, made, reports = written(config)
    assert sum(report.num_images for report in reports) == len(rows) == 15
    assert len({row["image_id"] for row in rows}) == 15
    assert {"00.jpg", "00.jpg#2", "00.jpg#3", "00.jpg#4", "03.jpg#3"} <= {row["image_id"] for row in rows}
    assert sum(report.num_boxes for report in reports) == 15
    data = check_det_dataset(str(tmp_path / "data.yaml"), autodownload=False)
    theirs = YOLODataset(img_path=data["train"], data=data, task="detect", augment=False, cache=False)
    assert Counter(row["image_id"].partition("#")[0] for row in rows) == Counter(
        Path(path).name for path in theirs.im_files
    )
    assert "5 lines of train list an image again: it is repeated" in listed(config)[1]
    # given again, what was finished is found
    dataset = config.folder / "dataset"
    assert shards.finished(dataset, made).keys() == {portion.path for portion in made}
    assert [portion.fingerprint for portion in written(config)[1]] == [
        portion.fingerprint for portion in made
    ]


def test_only_repeats_that_are_new_are_added(tmp_path: Path) -> None:
    config = config_of(tmp_path, repeats(tmp_path))
    before = [row["image_id"] for row in written(config)[0]]
    with (tmp_path / "train.txt").open("a") as file:
        file.write("./images/00.jpg\n./images/07.jpg\n")
    taken = {"train": pa.array([name.encode() for name in before], pa.large_binary())}
    assert sorted(row["image_id"] for row in written(config, taken)[0]) == ["00.jpg#5", "07.jpg#2"]


def test_repeats_stay_on_one_side_of_a_draw(tmp_path: Path) -> None:
    source = yolo_source(tmp_path, 10, train=["images", "images"])
    for seed in range(5):
        config = config_of(tmp_path, source, val_fraction=0.3).model_copy(update={"seed": seed})
        ids, _ = listed(config)
        assert {split: len(some) for split, some in ids.items()} == {"train": 14, "val": 6}
        assert not {i.partition("#")[0] for i in ids["train"]} & {i.partition("#")[0] for i in ids["val"]}


# The task of the model


def polygons(root: Path) -> str:
    source = yolo_source(root, 4, val="images")
    write(root / "labels" / "00.txt", "")
    write(root / "labels" / "01.txt", POLYGON)
    (root / "labels" / "02.txt").unlink()
    return source


def coco_of(root: Path, **annotation: Any) -> str:
    write_image(root / "a.jpg")
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], **annotation}],
        "categories": [
            {"id": 1, "name": "cat", **({"keypoints": ["nose"]} if "keypoints" in annotation else {})}
        ],
    }
    return write(root / "all.json", json.dumps(data))


@pytest.mark.parametrize(
    ("format_", "labels", "model", "task"),
    [
        ("yolo", "polygons", "yolov8n-seg.yaml", "segment"), ("yolo", "polygons", "weights/yolo11n-seg.pt", "segment"), ("yolo", "polygons", "yolov8n-obb.yaml", "obb"),
        ("yolo", "polygons", "yolov8n.yaml", "detect"), ("yolo", "polygons", "my-segments.pt", "detect"), ("yolo", "polygons", "yolov8x-seg-p6.yaml", "segment"),
        ("yolo", "boxes", "yolov8n-seg.yaml", "detect"), ("yolo", "boxes", "yolov8n-pose.pt", "detect"), ("yolo", "keypoints", "yolov8n-pose.yaml", "pose"),
        ("coco", {"segmentation": [[1, 1, 9, 1, 9, 9]]}, "yolo11n-seg.pt", "segment"), ("coco", {"segmentation": []}, "yolo11n-seg.pt", "detect"),
        ("coco", {"keypoints": [1, 1, 2]}, "yolo11n-pose.pt", "pose"), ("coco", {}, "yolo11n-pose.pt", "detect"), ("coco", {"segmentation": [[1, 1, 9, 1, 9, 9]]}, "yolo11n.pt", "detect"),
    ],
)  # fmt: skip
def test_auto_is_the_task_of_the_model_if_the_labels_allow_it(
    tmp_path: Path, format_: str, labels: Any, model: str, task: str
) -> None:
    if format_ == "coco":
        source = coco_of(tmp_path, **labels)
    elif labels == "polygons":
        source = polygons(tmp_path)
    else:
        source = yolo_source(
            tmp_path, 2, val="images", **({"kpt_shape": [1, 3]} if labels == "keypoints" else {})
        )
    found = prepare._list(config_of(tmp_path, source, format_, model))
    assert found.task == task
    said = [note for note in found.notes if note.startswith(f"train.model={model} is for")]
    assert len(said) == (task == "detect" and prepare._task_of(model) is not None)
    # what is written is not changed
    assert prepare._list(config_of(tmp_path, source, format_, model, task="detect")).task == "detect"


def test_shapes_take_the_task_of_the_model(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"name": "r", "prepare": {"format": "shapes"}, "train": {"model": "yolo11n-obb.yaml"}}
    )
    assert prepare._list(config).task == "obb"


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("yolov8n-seg.yaml", "detect", "e.g. train.model=yolov8n.yaml, or prepare it again for 'segment', if its labels allow that: prepare.task=segment"),
        ("yolov8n.yaml", "pose", "e.g. train.model=yolov8n-pose.yaml, or prepare it again for 'detect', if its labels allow that: prepare.task=detect"),
        ("yolov8n-pose.yaml", "obb", "e.g. train.model=yolov8n-obb.yaml, or prepare it again for 'pose'"),
        ("yolov8n-cls.yaml", "detect", "e.g. train.model=yolov8n.yaml, or prepare a dataset for 'classify' from another source"),
    ],
)  # fmt: skip
def test_a_model_for_another_task_says_what_to_change(name: str, wanted: str, said: str) -> None:
    with pytest.raises(ValueError, match="is a model for") as caught:
        initial.find(name, wanted)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Two classes of one name


def test_classes_of_one_name_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Folder.at(str(tmp_path))
    facts = {"num_images": 2, "num_boxes": 12, "rejected": [], "per_class": [7, 5, 0]}
    schema = raypar.predict.SCHEMA.with_metadata({raypar.predict.FACTS: json.dumps(facts).encode()})
    pq.write_table(pa.Table.from_pylist([], schema), tmp_path / "00000.parquet")

    class Pool:
        weights = out

    class Pieces(Source):
        num_images = 2

    source = Pieces([[]], is_local=True, sha256="")
    summary = raypar.predict._finish(Pool(), out, source, {"class_names": ["cat", "cat", "dog"]}, 2, 1.0)  # type: ignore[arg-type]
    assert (
        summary["boxes_per_class"]
        == {"0": 7, "1": 5, "2": 0}
        == json.loads(out.read("summary.json"))["boxes_per_class"]
    )
    assert "12 boxes (cat 7, cat 5), 0 images" in capsys.readouterr().out


def test_prepare_counts_classes_of_one_name_apart(tmp_path: Path) -> None:
    source = yolo_source(tmp_path, 5, names=["cat", "cat"], val="images")
    write(tmp_path / "labels" / "00.txt", BOX + "1 0.2 0.2 0.1 0.1\n")
    config = config_of(tmp_path, source)
    _, _, reports = written(config)
    listing = prepare._list(config)
    manifest = prepare._manifest(config, listing, reports, 0)
    assert manifest.splits["train"].boxes_per_class == (5, 1)
    assert "boxes in train: cat 5, cat 1" in prepare._summary(
        manifest, listing, reports, [], config.folder, 1.0
    )


def test_many_classes_are_cut_to_the_first(tmp_path: Path) -> None:
    split = Split(boxes_per_class=(0,) * 80)
    names = tuple(f"class {i}" for i in range(80))
    manifest = Manifest(task="detect", class_names=names, splits={"train": split}, source="x")
    said = prepare._summary(manifest, Listing(names, {}), [], [], Folder.at(str(tmp_path)), 1.0)
    assert "class 9 0 ... 80 in all" in said
    assert "no box in train: 80 classes (class 0, class 1, class 2, class 3, class 4 ... 80 in all)" in said
