"""Labels of segment, pose, obb and classify in each format, against Ultralytics' own readers and converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from ultralytics.data.converter import convert_coco, merge_multi_segment
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset

from raypar.config import PrepareConfig
from raypar.dataset.formats import Labels, Record, coco, folders, shapes, yolo
from raypar.dataset.formats.coco_points import keypoints_of, merged
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest
from raypar.dataset.records import Records
from raypar.dataset.tidy import columns, tidy
from raypar.storage import Folder

HW = (60, 100)
POLYGONS = "1 0.1 0.2 0.5 0.25 0.3 0.9\n0 0.6 0.1 0.9 0.1 0.9 0.3 0.6 0.35\n1 0.1 0.2 0.5 0.25 0.3 0.9\n"
# the second leaves the image
CORNERS = "0 0.1 0.2 0.4 0.1 0.5 0.3 0.2 0.4\n1 0.8 0.9 1.1 0.95 1.08 1.1 0.78 1.05\n"
POSES = "0 0.3 0.4 0.2 0.4 0.25 0.3 2 0.35 0.5 1 0 0 0\n1 0.5 0.5 0.1 0.1 0.5 0.5 2 0 0 0 0.51 0.52 2\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", HW[::-1], (90, 120, 40)).save(path)


def tree(root: Path, text: str, **values: Any) -> str:
    for split in ("train", "val"):
        for name in ("a", "b"):
            write_image(root / "images" / split / f"{name}.jpg")
            write(root / "labels" / split / f"{name}.txt", text if name == "a" else "")
    data = {"path": str(root), "train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | values
    return write(root / "data.yaml", json.dumps(data))


def parse(tmp_path: Path, text: str, task: str, keypoint_shape: tuple[int, int] | None = None) -> Labels:
    return yolo.read_labels(Record("x.jpg", "", write(tmp_path / "x.txt", text)), 2, HW, task, keypoint_shape)


@pytest.mark.parametrize(
    ("task", "text", "values"),
    [
        ("segment", POLYGONS, {}),
        ("obb", CORNERS, {}),
        ("pose", POSES, {"kpt_shape": [3, 3], "flip_idx": [1, 0, 2]}),
        (
            "pose",
            "1 0.3 0.4 0.2 0.4 0.25 0.3 0.35 0.5 -0.001 0.2\n",
            {"kpt_shape": [3, 2], "flip_idx": [0, 1, 2]},
        ),
        ("detect", POSES, {"kpt_shape": [3, 3]}),
        ("detect", POLYGONS, {}),
        ("segment", "", {}),
    ],
)
def test_yolo_labels_are_those_that_ultralytics_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, text: str, values: dict[str, Any]
) -> None:
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)
    source = tree(tmp_path / "set", text, **values)
    if not text:
        # at least one image must have labels
        write(tmp_path / "set" / "labels" / "train" / "b.txt", POLYGONS)
    data = check_det_dataset(source, autodownload=False)
    listing = yolo.scan(source, task)
    theirs = YOLODataset(img_path=data["train"], data=data, task=task, augment=False, cache=False)
    for record, label in zip(listing.splits["train"], theirs.labels, strict=True):
        ours = yolo.read_labels(record, 2, HW, listing.task, listing.keypoint_shape)
        assert record.image_path == label["im_file"]
        # theirs may be sorted to find duplicates
        order, other = np.lexsort(ours.boxes_xywhn.T), np.lexsort(label["bboxes"].T)
        assert ours.class_ids[order].tolist() == label["cls"][other, 0].tolist()
        np.testing.assert_allclose(ours.boxes_xywhn[order], label["bboxes"][other], atol=1e-6)
        if label["segments"]:
            assert ours.segments_xyn is not None
            for i, j in zip(order, other, strict=True):
                np.testing.assert_allclose(ours.segments_xyn[i], label["segments"][j], atol=1e-6)
        if task == "pose":
            assert ours.keypoints is not None
            np.testing.assert_allclose(ours.keypoints[order], label["keypoints"][other], atol=1e-6)


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        ("segment", "0 0.5 0.5 0.1 0.1", "needs polygons"),
        ("obb", "0 0.5 0.5 0.1 0.1", "needs four corners"),
        ("segment", "0 0.5 0.5 0.1 0.1\n0 0.1 0.1 0.2 0.2 0.3 0.1", "mix"),
        ("segment", "0 0.1 0.1 0.2 nan 0.3 0.1", "finite"),
        ("segment", "0 0.1 0.1 0.2 1e30 0.3 0.1", "beyond all measure"),
        ("segment", "0 10 10 20 20 30 10", "above 1"),
        ("segment", "2 0.1 0.1 0.2 0.2 0.3 0.1", "class 2"),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 0.5", "'kpt_shape' asks for 11"),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 0.5 2 1.5 0.5 2", "keypoint 1.5 is above 1"),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 0.5 2 -0.5 0.5 2", "keypoint -0.5 is negative"),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 0.5 -1 0.5 0.5 2", "visibility -1"),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 inf 1 0.5 0.5 2", "finite"),
    ],
)
def test_yolo_labels_that_do_not_fit_the_task(tmp_path: Path, task: str, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(tmp_path, text, task, (2, 3) if task == "pose" else None)


def test_the_yaml_says_what_the_task_is(tmp_path: Path) -> None:
    assert yolo.scan(tree(tmp_path / "a", POLYGONS)).task == "detect"
    pose = yolo.scan(tree(tmp_path / "b", POSES, kpt_shape=[3, 3], flip_idx=[1, 0, 2]))
    assert (pose.task, pose.keypoint_shape, pose.flip_idx) == ("pose", (3, 3), (1, 0, 2))
    assert "not mirrored" in yolo.scan(tree(tmp_path / "c", POSES, kpt_shape=[3, 3])).notes[0]
    with pytest.raises(ValueError, match="has no 'kpt_shape'"):
        yolo.scan(tree(tmp_path / "d", POSES), "pose")


def test_tidy_clips_polygons_and_leaves_corners(tmp_path: Path) -> None:
    polygons, repairs = tidy(
        parse(tmp_path, "0 -0.005 0.2 0.5 0.25 0.3 1.005\n1 0.3 0.3 0.3 0.4 0.3 0.5\n", "segment"), "segment"
    )
    assert repairs == {"boxes clipped to the image": 1, "boxes without area dropped": 1}
    assert polygons.segments_xyn is not None
    np.testing.assert_allclose(polygons.segments_xyn[0], [[0, 0.2], [0.5, 0.25], [0.3, 1]])
    np.testing.assert_allclose(polygons.boxes_xywhn, [[0.25, 0.6, 0.5, 0.8]])
    corners, repairs = tidy(parse(tmp_path, CORNERS, "obb"), "obb")
    assert repairs == {"boxes clipped to the image": 1}
    assert corners.segments_xyn is not None
    assert corners.segments_xyn[1].max() == 1.1
    assert (corners.boxes_xywhn[:, :2] + corners.boxes_xywhn[:, 2:] / 2).max() <= 1
    assert [len(c) for c in columns(corners, "obb")["segments_xyn"]] == [8, 8]  # type: ignore[attr-defined]


def test_other_polygons_become_rotated_boxes(tmp_path: Path) -> None:
    labels = parse(tmp_path, "0 0.1 0.1 0.3 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n", "obb")
    assert labels.segments_xyn is not None
    found = sorted(np.round(labels.segments_xyn[0], 4).tolist())
    assert found == [[0.1, 0.1], [0.1, 0.5], [0.5, 0.1], [0.5, 0.5]]


# COCO

NAMES = ["nose", "left_eye", "right_eye"]


def coco_json(path: Path, annotations: list[dict[str, Any]], **category: Any) -> str:
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HW[0], "width": HW[1]}],
        "categories": [{"id": 1, "name": "cat", **category}, {"id": 2, "name": "dog", **category}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": [10, 20, 30, 24], "iscrowd": 0, **a}
                        for i, a in enumerate(annotations)],
    }  # fmt: skip
    write_image(path.parent.parent / "images" / "a.jpg")
    return write(path, json.dumps(data))


PARTS = [[10, 20, 40, 20, 40, 30], [12, 35, 30, 35, 30, 44, 12, 44], [35, 33, 40, 33, 40, 44]]
SEGMENTATIONS: list[dict[str, Any]] = [
    {"segmentation": PARTS[:1]},
    {"segmentation": PARTS[:2]},
    {"segmentation": PARTS},
    {"segmentation": []},
    {},
    {"segmentation": [[1, 2, 3, 4], PARTS[0]]},
    {"segmentation": PARTS[:1], "iscrowd": 1},
]
KEYPOINTS: list[dict[str, Any]] = [
    {"keypoints": [12, 22, 2, 20, 30, 1, 0, 0, 0]},
    {"keypoints": [0, 0, 0, 0, 0, 0, 0, 0, 0]},
    {"keypoints": [13, 22, 2, 21, 30, 1, 14, 24, 2]},
]


@pytest.mark.parametrize(
    ("task", "annotations"), [("segment", SEGMENTATIONS), ("detect", SEGMENTATIONS), ("pose", KEYPOINTS)]
)
def test_coco_labels_are_those_that_ultralytics_converts(
    tmp_path: Path, task: str, annotations: list[dict[str, Any]]
) -> None:
    category = {"keypoints": NAMES} if task == "pose" else {}
    source = coco_json(tmp_path / "annotations" / "instances_train.json", annotations, **category)
    listing = coco.scan(source, task)
    ours = coco.read_labels(listing.splits["train"][0], 2, HW, task, listing.keypoint_shape)
    convert_coco(str(tmp_path / "annotations"), str(tmp_path / "converted"), use_segments=task != "pose",
                 use_keypoints=task == "pose", cls91to80=False)  # fmt: skip
    text = (tmp_path / "converted" / "labels" / "train" / "a.txt").read_text()
    theirs = parse(tmp_path, text, task, listing.keypoint_shape)
    assert ours.class_ids.tolist() == theirs.class_ids.tolist()
    np.testing.assert_allclose(ours.boxes_xywhn, theirs.boxes_xywhn, atol=1e-5)
    if task != "pose":
        assert ours.segments_xyn is not None
        assert theirs.segments_xyn is not None
        for mine, other in zip(ours.segments_xyn, theirs.segments_xyn, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5)
    else:
        assert ours.keypoints is not None
        assert theirs.keypoints is not None
        np.testing.assert_allclose(ours.keypoints, theirs.keypoints, atol=1e-5)
        assert (listing.keypoint_shape, listing.flip_idx) == ((3, 3), (0, 2, 1))
        assert "1 annotations without a labelled keypoint" in listing.notes[0]


def test_a_coco_file_of_boxes_has_no_polygons(tmp_path: Path) -> None:
    crowd = {"segmentation": {"size": list(HW), "counts": [0, HW[0] * HW[1]]}, "iscrowd": 1}
    source = coco_json(tmp_path / "annotations" / "instances_train.json", [{"segmentation": []}, {}, crowd])
    labels = coco.read_labels(coco.scan(source, "detect").splits["train"][0], 2, HW)
    assert len(labels.class_ids) == 2
    assert labels.segments_xyn is None
    assert columns(labels, "detect")["segments_xyn"] == []


def coco_text(counts: list[int]) -> str:
    """Counts of a run-length encoded mask as COCO's tools write them (rleToString)."""
    text = ""
    for i, count in enumerate(counts):
        left, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, left = left & 31, left >> 5
            more = left != (-1 if digit & 16 else 0)
            text += chr(48 + (digit | 32 * more))
    return text


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_the_contours_of_a_coco_mask_are_its_polygon(tmp_path: Path, task: str) -> None:
    mask = np.zeros(HW, np.uint8)
    cv2.fillPoly(mask, [np.array([[10, 8], [70, 12], [64, 50], [20, 44]])], 1)
    cv2.rectangle(mask, (80, 3), (95, 9), 1, -1)
    ends = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    counts = np.diff([0, *ends.tolist(), mask.size]).tolist()
    for number, encoded in enumerate((counts, coco_text(counts))):
        annotation = {"segmentation": {"size": list(HW), "counts": encoded}}
        source = coco_json(tmp_path / str(number) / "annotations" / "instances_train.json", [annotation])
        labels = coco.read_labels(coco.scan(source, task).splits["train"][0], 2, HW, task)
        assert labels.segments_xyn is not None
        drawn = np.zeros(HW, np.uint8)
        cv2.fillPoly(drawn, [np.round(labels.segments_xyn[0] * HW[::-1]).astype(np.int32)], 1)
        assert (drawn != mask).sum() < 20  # the line of no width that joins the parts
    wrong = {"segmentation": {"size": [5, 5], "counts": counts}}  # of another image: the box is taken
    source = coco_json(tmp_path / "c" / "annotations" / "instances_train.json", [wrong])
    labels = coco.read_labels(coco.scan(source, task).splits["train"][0], 2, HW, task)
    np.testing.assert_allclose(labels.boxes_xywhn, [[0.25, 32 / 60, 0.3, 0.4]])


def test_a_wrong_polygon_costs_detect_no_image(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"segmentation": {"size": list(HW), "counts": [1, 2]}},
        {"segmentation": [[1, 2, 3, 4, 5, float("inf")]]},
        {"segmentation": "none"},
    ]
    source = coco_json(tmp_path / "annotations" / "instances_train.json", [{"segmentation": PARTS}, *wrong])
    labels = coco.read_labels(coco.scan(source, "detect").splits["train"][0], 2, HW)
    assert len(labels.class_ids) == 3  # two of the wrong ones are one box of one class
    assert labels.num_duplicates == 1


def test_polygons_of_many_images_take_little_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    annotations = [{"segmentation": [rng.uniform(0, 50, 100).round(2).tolist()]} for _ in range(200)]
    source = coco_json(tmp_path / "annotations" / "instances_train.json", annotations)
    records = Records.of(coco.scan(source, "detect").splits["train"])
    assert records.num_bytes < 200 * (100 * 4 + 150)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=7),
        min_size=2,
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_parts_are_joined_as_by_ultralytics(parts: list[list[tuple[int, int]]]) -> None:
    mine = merged([np.array(part, float) for part in parts])
    theirs = np.concatenate(merge_multi_segment([np.array(part, float).ravel().tolist() for part in parts]))
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("task", "annotation", "reason"),
    [
        ("segment", {"segmentation": {"size": [60, 100], "counts": [0, 5999]}}, "add up to its 6000 pixels"),
        ("segment", {"segmentation": {"size": [60, 100], "counts": [-1, 6001]}}, "add up to its 6000 pixels"),
        ("segment", {"segmentation": {"size": [60, 100], "counts": "PPPPPPPPPPPPPPPPPP"}}, "add up"),
        ("segment", {"segmentation": {"size": [60, 100]}}, "add up"),
        ("segment", {"bbox": None, "segmentation": PARTS}, "bbox is None"),
        ("segment", {"segmentation": [[1, 2, 3, 4, 5, float("inf")]]}, "finite"),
        ("pose", {"keypoints": [1, 2, 2]}, "3 keypoints need 9"),
        ("pose", {"keypoints": ["x", 2, 2]}, "not a list of numbers"),
        ("pose", {"keypoints": [float("nan"), 2, 2, 3, 4, 2, 3, 4, 2]}, "finite"),
    ],
)
def test_coco_annotations_that_cannot_be_used(
    tmp_path: Path, task: str, annotation: dict[str, Any], reason: str
) -> None:
    source = coco_json(tmp_path / "annotations" / "instances_train.json", [annotation], keypoints=NAMES)
    listing = coco.scan(source, task)
    with pytest.raises(ValueError, match=reason):
        coco.read_labels(listing.splits["train"][0], 2, HW, task, listing.keypoint_shape)


def test_coco_keypoints_come_from_their_own_file(tmp_path: Path) -> None:
    coco_json(tmp_path / "annotations" / "instances_train2017.json", [])
    coco_json(tmp_path / "annotations" / "person_keypoints_train2017.json", KEYPOINTS, keypoints=NAMES)
    assert len(coco.scan(str(tmp_path), "pose").splits["train"][0].labels[1]) == 2
    with pytest.raises(ValueError, match="each category needs 'keypoints'"):
        coco.scan(str(tmp_path / "annotations" / "instances_train2017.json"), "pose")
    assert keypoints_of([{"keypoints": ["a", "b"]}], "x") == ((2, 3), ())


def test_parts_of_very_many_points_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1000, (70, 2)).astype(float) for _ in range(4)]
    whole = merged(parts)
    monkeypatch.setattr("raypar.dataset.formats.coco_points.MAX_DISTANCES", 100)  # a row at a time
    np.testing.assert_array_equal(merged(parts), whole)


# Whatever is written

WORDS = st.sampled_from(
    ["0", "1", "2", "-1", "0.5", "0.1", "0.9", "1.009", "-0.001", "1e300", "nan", "inf", "x", "1e-9", "\x00"]
)
LINES = st.lists(
    st.one_of(
        *[st.lists(WORDS, min_size=n, max_size=n) for n in (5, 7, 9, 11, 13)], st.lists(WORDS, max_size=12)
    ),
    max_size=4,
)
CLEAN = st.lists(
    st.lists(st.sampled_from(["0", "1", "0.1", "0.3", "0.7", "0.9"]), min_size=8, max_size=8), max_size=4
)


def assert_usable(labels: Labels, task: str) -> None:
    """The labels make a row, and the row can be rendered."""
    found, _ = tidy(labels, task)
    assert ((found.boxes_xywhn >= 0) & (found.boxes_xywhn <= 1)).all()
    row = columns(found, task)
    assert len(row["class_ids"]) == len(found.class_ids)  # type: ignore[arg-type]
    for name in ("segments_xyn", "keypoints"):
        flat = [np.ravel(x) for x in row[name]] if name in row else []  # type: ignore[attr-defined]
        assert all(np.isfinite(x).all() for x in flat)


@given(
    st.one_of(LINES, CLEAN.map(lambda rows: [["1", *row] for row in rows])),
    st.sampled_from(["detect", "segment", "pose", "obb"]),
)
@settings(max_examples=300, deadline=None)
def test_any_label_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[list[str]], task: str
) -> None:
    text, message = "\n".join(" ".join(line) for line in lines), ""
    try:
        labels = parse(tmp_path_factory.mktemp("labels"), text, task, (2, 2) if task == "pose" else None)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    if not message:
        assert_usable(labels, task)


VALUES = st.one_of(
    st.floats(-10, 120),
    st.sampled_from([float("nan"), float("inf"), 1e300, 10**400, -1, None, "x", True, [1], {"a": 1}]),
)
ANNOTATION = st.fixed_dictionaries(
    {"bbox": st.lists(st.floats(-10, 120), min_size=4, max_size=4)},
    optional={
        "segmentation": st.one_of(st.lists(st.lists(VALUES, max_size=10), max_size=3), VALUES,
                                  st.lists(st.lists(st.floats(0, 100), min_size=6, max_size=6), max_size=3)),
        "keypoints": st.one_of(st.lists(VALUES, max_size=10), VALUES, st.lists(st.floats(0, 60), min_size=9, max_size=9)),
    },
)  # fmt: skip


@example([{"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1e300]]}], "segment")
@given(st.lists(ANNOTATION, max_size=4), st.sampled_from(["segment", "pose"]))
@settings(max_examples=200, deadline=None)
def test_any_coco_annotation_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, annotations: list[dict[str, Any]], task: str
) -> None:
    source = coco_json(
        tmp_path_factory.mktemp("coco") / "annotations" / "instances_train.json", annotations, keypoints=NAMES
    )
    listing, message = coco.scan(source, task), ""
    try:
        labels = coco.read_labels(listing.splits["train"][0], 2, HW, task, listing.keypoint_shape)
    except ValueError as error:
        message = str(error)
    assert len(message) < 400
    if not message:
        assert_usable(labels, task)


# Folders


def class_tree(root: Path, splits: dict[str, dict[str, int]]) -> str:
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_image(root / split / name / f"{i}.jpg")
    return str(root)


def test_folders(tmp_path: Path) -> None:
    source = class_tree(
        tmp_path, {"train": {"dog": 3, "cat": 2, "empty": 0}, "valid": {"dog": 1}, "test": {"cat": 1}}
    )
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    write_image(tmp_path / "train" / "dog" / "puppies" / "p.jpg")
    listing = folders.scan(source, 0)
    assert (listing.task, listing.class_names) == ("classify", ("cat", "dog", "empty"))
    assert {split: len(records) for split, records in listing.splits.items()} == {
        "train": 6,
        "val": 1,
        "test": 1,
    }
    assert listing.splits["train"][-1].image_id == "dog/puppies/p.jpg"
    assert "1 folders" in listing.notes[0]
    assert folders.read_labels(listing.splits["val"][0]).class_ids.tolist() == [1]
    for split, records in listing.splits.items():
        job = ShardJob(
            Folder.at(str(tmp_path / "out")),
            f"{split}.parquet",
            split,
            "folders",
            3,
            tuple(records),
            4,
            10**6,
            task="classify",
        )
        assert write_shard(job).num_boxes == len(records)


def test_folders_without_train_are_split(tmp_path: Path) -> None:
    source = class_tree(tmp_path, {".": {"dog": 10, "cat": 5}})
    listing = folders.scan(source, 0)
    assert {split: len(records) for split, records in listing.splits.items()} == {"train": 12, "val": 3}
    assert sorted(r.labels for r in listing.splits["val"]) == [0, 1, 1]
    assert "set apart" in listing.notes[0]
    assert folders.scan(source, 0) == listing
    assert folders.scan(source, 1).splits != listing.splits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: str(root / "nowhere"), "does not exist"),
        (lambda root: class_tree(root, {"train": {"dog": 1}, "val": {"dog": 1, "cow": 1}}), "train lacks"),
        (lambda root: class_tree(root, {"train": {"dog": 1}, "val": {"dog": 0}}), "has no images"),
        (lambda root: class_tree(root, {".": {"dog": 1}}), "too few images"),
        (lambda root: str(root), "is an empty folder"),
        (lambda root: class_tree(root, {"train/a": {"dog": 1}}) + "/train/a/dog", "has no folders"),
        (
            lambda root: class_tree(root, {".": {"images": 5, "labels": 5}}),
            "images and labels, .*prepare.format=yolo",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folders.scan(make(tmp_path), 0)


# Elsewhere


@pytest.mark.parametrize(
    ("format_", "task"), [("voc", "segment"), ("coco", "obb"), ("folders", "detect"), ("yolo", "classify")]
)
def test_a_format_without_labels_of_the_task(format_: str, task: str) -> None:
    with pytest.raises(ValidationError, match="cannot be read"):
        PrepareConfig.model_validate({"source": "x", "format": format_, "task": task})


def test_manifests_of_before_still_load(tmp_path: Path) -> None:
    manifest = Manifest(task="detect", class_names=("a",), splits={}, source="x")
    folder = Folder.at(str(tmp_path))
    old = {
        k: v
        for k, v in json.loads(manifest.model_dump_json()).items()
        if k not in ("keypoint_shape", "flip_idx")
    }
    folder.write("manifest.json", json.dumps(old))
    assert Manifest.load(folder) == manifest


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_shapes_are_the_same_images_with_other_labels(task: str) -> None:
    image, labels = shapes.draw(0, "train", 3, 120, 160, task=task)
    again, _ = shapes.draw(0, "train", 3, 120, 160, task=task)
    detect, boxes = shapes.draw(0, "train", 3, 120, 160)
    assert np.array_equal(image, again)
    if task != "classify":
        assert np.array_equal(image, detect)
        assert labels.class_ids.tolist() == boxes.class_ids.tolist()
    else:
        assert len(labels.class_ids) == 1
