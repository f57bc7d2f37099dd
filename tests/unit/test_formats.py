"""Each format on a tree written here: paths, classes, and boxes to 1e-6. The boxes are off the diagonal: swapped axes would show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raypar.dataset.formats import Labels, Listing, Record, coco, labels_from_xyxy, voc, yolo
from raypar.dataset.tidy import tidy

HW = (60, 100)  # of every image here
BOX_XYXY = (10.0, 30.0, 30.0, 54.0)  # px
BOX_XYWHN = (0.2, 0.7, 0.2, 0.4)


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", HW[::-1], (90, 120, 40)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def ids(listing: Listing) -> dict[str, list[str]]:
    return {split: [record.image_id for record in records] for split, records in listing.splits.items()}


def assert_labels(labels: Labels, class_ids: list[int], boxes: list[tuple[float, ...]]) -> None:
    assert labels.class_ids.tolist() == class_ids
    np.testing.assert_allclose(labels.boxes_xywhn, np.reshape(boxes, (-1, 4)), atol=1e-6)


# What holds for any labels

numbers = st.floats(-2, 3, width=32)
classes = st.sampled_from(["0", "1", "2", "2.0", "3", "-1", "0.5", "nan"])
shares = st.sampled_from(["0", "0.1", "0.5", "0.9", "1", "1e-3", "1.009"])
words = st.sampled_from(["0.2", "nan", "inf", "1e999", "1.02", "7", "-0.005", "-0.3", "x", ""])


def tidied(labels: Labels) -> tuple[np.ndarray, np.ndarray, Any]:
    found, repairs = tidy(labels)
    return found.class_ids, found.boxes_xywhn, repairs


rows_of_any_box = st.lists(st.tuples(st.integers(0, 2), numbers, numbers, numbers, numbers), max_size=8)


@settings(deadline=None)
@given(rows_of_any_box)
def test_tidy_leaves_boxes_of_some_area_inside_the_image(rows: list[tuple[float, ...]]) -> None:
    table = np.reshape(np.asarray(rows, np.float64), (-1, 5))
    before = table[:, 1:].copy()
    class_ids, boxes, repairs = tidied(Labels(table[:, 0].astype(np.int64), table[:, 1:]))
    np.testing.assert_array_equal(table[:, 1:], before)  # the argument is not changed
    assert len(class_ids) == len(boxes) == len(rows) - repairs["boxes without area dropped"]
    assert (boxes[:, 2:] > 0).all()
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    assert ((corners > -1e-12) & (corners < 1 + 1e-12)).all()
    expected = []  # the same by intersection with the unit square, one box at a time
    for class_id, cx, cy, w, h in rows:
        x1, y1, x2, y2 = max(cx - w / 2, 0), max(cy - h / 2, 0), min(cx + w / 2, 1), min(cy + h / 2, 1)
        if w > 0 and h > 0 and min(np.float32(x2 - x1), np.float32(y2 - y1)) > 0:  # as it will be stored
            expected.append((class_id, x1, y1, x2, y2))
    assert class_ids.tolist() == [row[0] for row in expected]
    np.testing.assert_allclose(corners, np.reshape([row[1:] for row in expected], (-1, 4)), atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), *[st.floats(0, 1, width=32)] * 4), max_size=8, unique=True))
def test_yolo_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, ...]]
) -> None:
    text = "\n".join(" ".join(f"{value:.9g}" for value in row) for row in rows)
    labels = parse_yolo(tmp_path_factory.mktemp("labels"), text)
    assert_labels(labels, [int(row[0]) for row in rows], [row[1:] for row in rows])


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(
            classes,
            st.lists(shares, min_size=3, max_size=3) | st.lists(shares, max_size=8),
            words,
            st.integers(0, 3),
        ),
        max_size=2,
    )
)
def test_yolo_text_of_any_kind_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, list[str], str, int]]
) -> None:
    text = "\n".join(
        " ".join([first, *others[:place], word, *others[place:]]) for first, others, word, place in lines
    )
    message = ""
    try:
        labels = parse_yolo(tmp_path_factory.mktemp("labels"), text)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    if not message:
        assert set(labels.class_ids.tolist()) <= {0, 1, 2}
        assert ((labels.boxes_xywhn >= -yolo.TOLERANCE) & (labels.boxes_xywhn <= 1 + yolo.TOLERANCE)).all()


@settings(deadline=None)
@given(rows_of_any_box, st.integers(10, 5000), st.integers(10, 5000))
def test_pixels_become_shares_of_width_and_height(
    rows: list[tuple[float, ...]], height: int, width: int
) -> None:
    scaled = list(
        dict.fromkeys((c, x1 * width, y1 * height, x2 * width, y2 * height) for c, x1, y1, x2, y2 in rows)
    )
    labels = labels_from_xyxy(scaled, 3, (height, width))
    cx, cy, w, h = labels.boxes_xywhn.T
    back = np.stack(
        [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height], axis=1
    )
    kept = [
        row
        for i, row in enumerate(scaled)
        if np.float32(row).tolist() not in [np.float32(r).tolist() for r in scaled[:i]]
    ]
    assert labels.num_duplicates == len(scaled) - len(kept)
    np.testing.assert_allclose(back, np.reshape([row[1:] for row in kept], (-1, 4)), atol=1e-6)


# YOLO


def yolo_tree(root: Path, *, labels: str = "1 0.2 0.7 0.2 0.4\n") -> Path:
    for split in ("train", "val"):
        write_image(root / "images" / split / "a.jpg")
        write_image(root / "images" / split / "sub" / "b.png")
        write(root / "labels" / split / "a.txt", labels)
        write(root / "labels" / split / "sub" / "b.txt", "")
    return root


def yolo_yaml(root: Path, **values: Any) -> str:
    data = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | values
    # JSON is YAML
    return str(write(root / "data.yaml", json.dumps({k: v for k, v in data.items() if v is not None})))


def parse_yolo(tmp_path: Path, text: str) -> Labels:
    file = write(tmp_path / "labels" / "x.txt", text)
    return yolo.read_labels(Record("x.jpg", "", str(file)), 3, HW)


@pytest.mark.parametrize("names", [["cat", "dog"], {0: "cat", 1: "dog"}, {"1": "dog", "0": "cat"}])
def test_yolo_folders_and_names(tmp_path: Path, names: object) -> None:
    root = yolo_tree(tmp_path)
    listing = yolo.scan(yolo_yaml(root, names=names))
    assert listing.class_names == ("cat", "dog")
    assert {s: [r.image_id for r in records] for s, records in listing.splits.items()} == {
        s: ["a.jpg", "sub/b.png"] for s in ("train", "val")
    }
    first, second = listing.splits["train"]
    assert_labels(yolo.read_labels(first, 2, HW), [1], [BOX_XYWHN])
    assert_labels(yolo.read_labels(second, 2, HW), [], [])


def test_yolo_path_is_relative_to_the_yaml_then_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo_tree(tmp_path / "beside" / "set")
    yolo_tree(tmp_path / "working" / "set")
    (tmp_path / "working" / "set" / "images" / "train" / "a.jpg").rename(
        tmp_path / "working" / "set" / "images" / "train" / "c.jpg"
    )
    monkeypatch.chdir(tmp_path / "working")
    source = yolo_yaml(tmp_path / "beside", path="set")
    assert yolo.scan(source).splits["train"][0].image_path == str(
        tmp_path / "beside" / "set" / "images" / "train" / "a.jpg"
    )
    (tmp_path / "beside" / "set").rename(tmp_path / "beside" / "elsewhere")
    assert yolo.scan(source).splits["train"][0].image_path == str(
        tmp_path / "working" / "set" / "images" / "train" / "c.jpg"
    )


def test_yolo_list_of_folders_glob_and_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo_tree(tmp_path / "set")
    write(
        root / "lists" / "val.txt",
        f"\ufeff./../images/val/a.jpg\n\n{root}/images/val/sub/b.png\nimages/train/a.jpg\n",
    )
    monkeypatch.chdir(tmp_path)
    listing = yolo.scan(
        yolo_yaml(root, train=["images/train", "images/val"], val="lists/val.txt", test="images/*/*.jpg")
    )
    assert [r.image_id for r in listing.splits["train"]] == [
        "train/a.jpg",
        "train/sub/b.png",
        "val/a.jpg",
        "val/sub/b.png",
    ]
    assert sorted(r.image_id for r in listing.splits["val"]) == ["train/a.jpg", "val/a.jpg", "val/sub/b.png"]
    assert [r.image_id for r in listing.splits["test"]] == ["train/a.jpg", "val/a.jpg"]
    assert all(
        Path(r.image_path).is_file() and Path(r.labels).is_file()
        for records in listing.splits.values()
        for r in records
    )


def test_yolo_roboflow_parent_and_validation_key(tmp_path: Path) -> None:
    root = tmp_path
    for split in ("train", "valid"):
        write_image(root / split / "images" / "a.jpg")
        write(root / split / "labels" / "a.txt", "0 0.2 0.7 0.2 0.4")
    listing = yolo.scan(yolo_yaml(root, train="../train/images", val=None, validation="../valid/images"))
    assert listing.splits["val"][0].labels == str(root / "valid" / "labels" / "a.txt")


def test_yolo_label_path_changes_the_last_images_folder() -> None:
    assert yolo.label_path("/images/x/images/train/a.b.jpg") == "/images/x/labels/train/a.b.txt"
    assert yolo.label_path("/pictures/a.jpg") == "/pictures/a.txt"


def test_yolo_resolution_equals_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same images, classes and boxes as ``YOLODataset`` over folders, a text file, polygons, duplicates and backgrounds."""
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    root = yolo_tree(
        tmp_path / "images" / "set", labels="1 0.2 0.7 0.2 0.4\n0 0.5 0.5 0.1 0.3\n1 0.2 0.7 0.2 0.4\n"
    )
    write_image(root / "images" / "train" / "polygon.jpg")
    write(
        root / "labels" / "train" / "polygon.txt",
        "1 0.1 0.2 0.5 0.25 0.3 0.9\n0 0.6 0.1 0.9 0.1 0.9 0.3 0.6 0.35\n",
    )
    write_image(root / "images" / "train" / "bare.jpg")
    write(root / "val.txt", "./images/val/a.jpg\n./images/val/sub/b.png\n")
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)
    source = yolo_yaml(root, path=str(root), val="val.txt")
    data = check_det_dataset(source, autodownload=False)
    listing = yolo.scan(source)
    for split in ("train", "val"):
        theirs = YOLODataset(img_path=data[split], data=data, task="detect", augment=False, cache=False)
        ours = {
            record.image_path: tidied(yolo.read_labels(record, 2, HW)) for record in listing.splits[split]
        }
        assert sorted(ours) == sorted(label["im_file"] for label in theirs.labels)
        for label in theirs.labels:
            class_ids, boxes, _ = ours[label["im_file"]]
            mine = np.concatenate([class_ids[:, None], boxes], axis=1)
            other = np.concatenate([label["cls"], label["bboxes"]], axis=1)
            np.testing.assert_allclose(mine[np.lexsort(mine.T)], other[np.lexsort(other.T)], atol=1e-6)


def test_yolo_polygons_become_boxes(tmp_path: Path) -> None:
    labels = parse_yolo(
        tmp_path, "2 0.1 0.5 0.3 0.6 0.2 0.9\n2 0.1 0.5 0.3 0.6 0.2 0.9\n2 0.1 0.5 0.3 0.9 0.2 0.6\n"
    )
    # equal boxes of unequal polygons both stay, as in Ultralytics
    assert_labels(labels, [2, 2], [BOX_XYWHN, BOX_XYWHN])
    assert labels.num_duplicates == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 columns"),
        ("0 a 0.5 0.1 0.1", "not a number"),
        ("0 nan 0.5 0.1 0.1", "finite"),
        ("3 0.5 0.5 0.1 0.1", "class 3"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("0 1.02 0.5 0.1 0.1", "above 1"),
        ("0 50 30 20 20", "above 1"),
        ("0 -0.02 0.5 0.1 0.1", "negative"),
        ("0 0.5 0.5 -0.001 0.1", "negative"),
        ("0 0.5 0.5 0.1 0.1\n0 0.1 0.1 0.2 0.2 0.3 0.1", "mix"),
    ],
)
def test_yolo_corrupt_labels(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yolo(tmp_path, text)


def test_yolo_small_excess_is_tolerated_and_clipped(tmp_path: Path) -> None:
    class_ids, boxes, repairs = tidied(
        parse_yolo(tmp_path, "0 1.005 0.5 0.1 0.1\n1 0.5 0.5 0 0.1\n1 0.1 0.5 0.1 0.1\n")
    )
    assert class_ids.tolist() == [0, 1]
    np.testing.assert_allclose(boxes, [[0.9775, 0.5, 0.045, 0.1], [0.1, 0.5, 0.1, 0.1]], atol=1e-6)
    assert repairs == {"boxes clipped to the image": 1, "boxes without area dropped": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": None}, "no classes"),
        ({"names": []}, "no classes"),
        ({"names": {0: "cat", 2: "dog"}}, "without a gap"),
        ({"nc": 3}, "2 entries"),
        ({"kpt_shape": [4, 5]}, "kpt_shape"),
        ({"kpt_shape": 4}, "kpt_shape"),
        ({"kpt_shape": [3, 2], "flip_idx": [0, 1, 1]}, "flip_idx"),
        ({"train": None}, "no 'train'"),
        ({"val": {"a": "b"}}, "'val' must be"),
        ({"val": ["images/val", 5, None]}, "'val' must be"),
        ({"val": 5}, "'val' points to .*/5, which does not exist"),
        ({"val": "images/nowhere"}, "does not exist"),
        ({"val": "empty"}, "no images"),
        ({"path": "/nowhere/at/all"}, "does not exist"),
        ({"train": "bare/images", "val": "bare/images"}, "no image has labels"),
    ],
)
def test_yolo_wrong_yaml(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    root = yolo_tree(tmp_path)
    (root / "empty").mkdir()
    write_image(root / "bare" / "images" / "a.jpg")
    with pytest.raises(ValueError, match=message) as caught:
        yolo.scan(yolo_yaml(root, **values))
    assert "\n" not in str(caught.value)


def test_yolo_file_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not YAML"):
        yolo.scan(str(write(tmp_path / "data.yaml", "names: [cat\ntrain: x")))
    with pytest.raises(ValueError, match="does not exist"):
        yolo.scan(str(tmp_path / "other.yaml"))


# COCO


def coco_json(path: Path, **values: Any) -> Path:
    data = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": HW[0], "width": HW[1]},
            {"id": 9, "file_name": "sub/b.jpg", "height": HW[0], "width": HW[1]},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 30, 20, 24]},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [80, 0, 40, 6]},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    return write(path, json.dumps(data | values))


@pytest.mark.parametrize(
    "folder", ["{split}2017", "images/{split}2017", "{split}", "images/{split}", "images"]
)
def test_coco_folder(tmp_path: Path, folder: str) -> None:
    for split in ("train", "val"):
        coco_json(tmp_path / "annotations" / f"instances_{split}2017.json")
        for name in ("a.jpg", "sub/b.jpg"):
            write_image(tmp_path / folder.format(split=split) / name)
    listing = coco.scan(str(tmp_path))
    assert listing.class_names == ("cat", "dog")  # in the order of the ids
    assert set(listing.splits) == {"train", "val"}
    first, second = listing.splits["val"]
    assert (first.image_id, second.image_id) == ("a.jpg", "sub/b.jpg")
    assert Path(first.image_path) == tmp_path / folder.format(split="val") / "a.jpg"
    class_ids, boxes, repairs = tidied(coco.read_labels(first, 2, HW))
    assert class_ids.tolist() == [1, 0]
    np.testing.assert_allclose(boxes, [BOX_XYWHN, (0.9, 0.05, 0.2, 0.1)], atol=1e-6)
    assert repairs == {"boxes clipped to the image": 1}
    assert_labels(coco.read_labels(second, 2, HW), [], [])


@pytest.mark.parametrize("place", ["all.json", "annotations/all.json"])
def test_coco_single_file_is_all_train(tmp_path: Path, place: str) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    listing = coco.scan(str(coco_json(tmp_path / place)))
    assert set(listing.splits) == {"train"}
    assert listing.splits["train"][0].image_path == str(tmp_path / "images" / "a.jpg")


def test_coco_roboflow_layout(tmp_path: Path) -> None:
    for folder in ("train", "valid"):
        write_image(tmp_path / folder / "a.jpg")
        coco_json(tmp_path / folder / "_annotations.coco.json")
    listing = coco.scan(str(tmp_path))
    assert listing.splits["val"][0].image_path == str(tmp_path / "valid" / "a.jpg")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (((60, 100), [(-1, [1, 1, 2, 2])]), "class -1"),
        (((60, 100), [(0, None)]), "bbox is None"),
        (((60, 100), [(0, [1, 2, 3])]), "not four numbers"),
        (((60, 100), [(0, [1, 2, "x", 4])]), "not four numbers"),
        (((60, 100), [(0, [1, 2, float("nan"), 4])]), "finite"),
        (((100, 60), []), "60x100 px, this one has 100x60"),
    ],
)
def test_coco_corrupt_labels(labels: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        coco.read_labels(Record("a.jpg", "", labels), 2, HW)


def test_coco_box_of_negative_size_and_duplicates_are_dropped() -> None:
    rows = [
        (0, [10, 30, 20, 24]),
        (0, [10, 30, 20, 24]),
        (1, [10, 30, 20, 24]),
        (1, [10, 30, -5, 24]),
        (1, [200, 30, 5, 5]),
    ]
    class_ids, boxes, repairs = tidied(coco.read_labels(Record("a.jpg", "", (None, rows)), 2, HW))
    assert class_ids.tolist() == [0, 1]
    np.testing.assert_allclose(boxes, [BOX_XYWHN] * 2, atol=1e-6)
    assert repairs == {"boxes without area dropped": 2, "duplicate labels dropped": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": []}, "no images"),
        ({"categories": []}, "no classes"),
        ({"categories": [{"name": "cat"}]}, "needs an 'id'"),
        ({"annotations": [{"image_id": 7}]}, "category_id"),
        ({"images": None}, "not a COCO file"),
    ],
)
def test_coco_wrong_file(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    write_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=message):
        coco.scan(str(coco_json(tmp_path / "all.json", **values)))


def test_coco_images_not_found_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are in none of"):
        coco.scan(str(coco_json(tmp_path / "all.json")))


# VOC


def voc_object(name: str, box: tuple[object, ...], extra: str = "") -> str:
    coordinates = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{coordinates}</bndbox></object>"


def voc_xml(*objects: str, hw: tuple[int, int] = HW) -> str:
    return f"<annotation><size><width>{hw[1]}</width><height>{hw[0]}</height></size>{''.join(objects)}</annotation>"


def voc_tree(root: Path, num_images: int = 4) -> Path:
    for i in range(num_images):
        write_image(root / "JPEGImages" / f"{i}.jpg")
        write(root / "Annotations" / f"{i}.xml", voc_xml(voc_object("dog" if i else "cat", (11, 31, 30, 54))))
    write(root / "ImageSets" / "Main" / "train.txt", "0\n1  1\n")
    write(root / "ImageSets" / "Main" / "val.txt", "2\n")
    write(root / "ImageSets" / "Main" / "test.txt", "3\n")
    return root


def test_voc_folder(tmp_path: Path) -> None:
    listing = voc.scan(str(voc_tree(tmp_path)), seed=0)
    assert listing.class_names == ("cat", "dog")
    assert {s: [r.image_id for r in rs] for s, rs in listing.splits.items()} == {
        "train": ["0.jpg", "1.jpg"],
        "val": ["2.jpg"],
        "test": ["3.jpg"],
    }
    assert_labels(voc.read_labels(listing.splits["val"][0], 2, HW), [1], [BOX_XYWHN])


def test_voc_classes_file_gives_the_order(tmp_path: Path) -> None:
    write(voc_tree(tmp_path) / "labels.txt", "dog\nbird\ncat\n")
    assert voc.scan(str(tmp_path), seed=0).class_names == ("dog", "bird", "cat")


def test_voc_difficult_is_left_out_and_parts_are_not_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    root = voc_tree(tmp_path)
    items = (
        voc_object("dog", (0, 31, 30, 70), part),
        voc_object("cat", (1, 1, 5, 5), "<difficult>1</difficult>"),
    )
    write(root / "Annotations" / "2.xml", voc_xml(*items))
    listing = voc.scan(str(root), seed=0)
    assert listing.class_names == ("cat", "dog")
    class_ids, boxes, repairs = tidied(voc.read_labels(listing.splits["val"][0], 2, HW))
    assert class_ids.tolist() == [1]
    np.testing.assert_allclose(boxes, [[0.15, 0.75, 0.3, 0.5]], atol=1e-6)  # 0..30, 30..60
    assert repairs == {"boxes clipped to the image": 1}


def test_voc_without_image_sets_is_split_by_the_seed(tmp_path: Path) -> None:
    root = voc_tree(tmp_path, 20)
    (root / "ImageSets").rename(root / "Other")
    first, again, other = (voc.scan(str(root), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.splits != other.splits
    assert {s: len(rs) for s, rs in first.splits.items()} == {"train": 16, "val": 4}
    assert len({r.image_id for rs in first.splits.values() for r in rs}) == 20
    assert any("no ImageSets/Main" in note for note in first.notes)


def test_voc_trainval_stands_in_for_train(tmp_path: Path) -> None:
    root = voc_tree(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    write(root / "ImageSets" / "Main" / "trainval.txt", "0\n1\n2\n")
    # 2 is held out for val
    assert [r.image_id for r in voc.scan(str(root), seed=0).splits["train"]] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("<annotation>", "not XML"),
        (voc_xml(voc_object("bird", (1, 2, 3, 4))), "class 'bird'"),
        (voc_xml(voc_object("dog", (1, 2, "x", 4))), "xmax is 'x'"),
        (voc_xml(voc_object("dog", (1, "nan", 3, 4))), "finite"),
        (voc_xml("<object><name>dog</name></object>"), "xmin is None"),
        (voc_xml(hw=(100, 60)), "60x100 px"),
    ],
)
def test_voc_corrupt_labels(tmp_path: Path, xml: str, reason: str) -> None:
    file = write(tmp_path / "a.xml", xml)
    with pytest.raises(ValueError, match=reason):
        voc.read_labels(Record("a.jpg", "", (str(file), ("cat", "dog"))), 2, HW)


def test_voc_declared_size_of_zero_is_ignored(tmp_path: Path) -> None:
    file = write(tmp_path / "a.xml", voc_xml(voc_object("dog", (11, 31, 30, 54)), hw=(0, 0)))
    assert_labels(voc.read_labels(Record("a.jpg", "", (str(file), ("cat", "dog"))), 2, HW), [1], [BOX_XYWHN])


@pytest.mark.parametrize("missing", ["Annotations", "JPEGImages"])
def test_voc_missing_folder(tmp_path: Path, missing: str) -> None:
    root = voc_tree(tmp_path)
    (root / missing).rename(root / "Other")
    with pytest.raises(ValueError, match=missing):
        voc.scan(str(root), seed=0)
