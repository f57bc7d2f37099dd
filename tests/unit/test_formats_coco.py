"""COCO files whose ids and numbers are not what the format says: matched where the meaning is certain, else one error that names file and entry."""

from __future__ import annotations

import contextlib
import json
import operator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raypar.dataset.formats import Labels, coco
from raypar.dataset.formats.numbers import is_absent, number, whole

HW = (60, 100)
TRIANGLE = [[10, 12], [50, 12], [30, 48]]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    for name in ("a", "b"):
        Image.new("RGB", HW[::-1]).save(root / f"{name}.jpg")
    return root


def image(**values: Any) -> dict[str, Any]:
    return {"id": 1, "file_name": "a.jpg", "width": HW[1], "height": HW[0]} | values


def box(**values: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 1, "category_id": 1, "bbox": [10, 12, 40, 36], "iscrowd": 0} | values


def content(**values: Any) -> dict[str, Any]:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": [image()], "categories": categories, "annotations": [box()]} | values


def read(folder: Path, data: Any, task: str = "detect") -> dict[str, Labels]:
    """Labels of each image of a file in a folder with a.jpg and b.jpg."""
    (folder / "x.json").write_text(json.dumps(data))
    listing = coco.scan(str(folder / "x.json"), task)
    return {
        record.image_id: coco.read_labels(record, len(listing.class_names), HW, task, listing.keypoint_shape)
        for record in listing.splits["train"]
    }


def refused(folder: Path, data: Any, task: str = "detect") -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(folder, data, task)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Ids


@pytest.mark.parametrize("listed", [7, 7.0, "7", " 7", "7.0", "007"])
@pytest.mark.parametrize("named", [7, 7.0, "7", "7.0", "0007"])
def test_an_id_is_matched_however_it_is_written(folder: Path, listed: Any, named: Any) -> None:
    categories = [{"id": listed, "name": "cat"}]
    found = read(
        folder,
        content(
            images=[image(id=listed)],
            annotations=[box(image_id=named, category_id=named)],
            categories=categories,
        ),
    )
    assert found["a.jpg"].class_ids.tolist() == [0]


def test_ids_that_are_words_are_matched(folder: Path) -> None:
    categories = [
        {"id": "z", "name": "dog"},
        {"id": "c", "name": "cat"},
        {"id": 10, "name": "ten"},
        {"id": "9", "name": "nine"},
    ]
    annotations = [box(image_id="img", category_id=category) for category in ("z", "c", "10", 9)]
    found = read(folder, content(images=[image(id="img")], annotations=annotations, categories=categories))
    # numbers first, in their order, and then words
    assert found["a.jpg"].class_ids.tolist() == [3, 2, 1, 0]


def test_an_id_of_two_images_is_refused(folder: Path) -> None:
    for other in (1, "1", 1.0):
        message = refused(folder, content(images=[image(), image(id=other, file_name="b.jpg")]))
        assert "x.json: images[1] (id" in message
        assert "the id 1 is that of a.jpg already, and this is b.jpg" in message


def test_an_image_that_is_listed_twice_is_one(folder: Path) -> None:
    assert list(read(folder, content(images=[image(), image(), image(file_name="./a.jpg")]))) == ["a.jpg"]


def test_a_file_of_two_ids_keeps_the_boxes_of_both(folder: Path) -> None:
    images = [image(), image(id=2, file_name=".\\a.jpg", width=None)]
    annotations = [box(), box(image_id=2, category_id=2), box(image_id=2)]
    found = read(folder, content(images=images, annotations=annotations))
    assert sorted(found["a.jpg"].class_ids.tolist()) == [0, 1]
    assert found["a.jpg"].num_duplicates == 1
    message = refused(folder, content(images=[image(), image(id=2, width=50)]))
    assert "images[1] (id 2): a.jpg is listed before with another size" in message


def test_a_category_that_there_is_not_is_named(folder: Path) -> None:
    assert "category_id 7 is not one of the 2 categories" in refused(
        folder, content(annotations=[box(category_id=7)])
    )
    twice = [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]
    assert (
        "categories[1] (id '1'): the id 1 is that of category 'cat' already: give 'dog' its own"
        in refused(folder, content(categories=twice))
    )
    same = [{"id": 1, "name": "cat"}, {"id": 1, "name": "cat"}]
    assert read(folder, content(categories=same))["a.jpg"].class_ids.tolist() == [0]


def test_two_categories_of_one_name_stay_two(folder: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
    found = read(folder, content(categories=categories, annotations=[box(), box(category_id=2)]))
    assert found["a.jpg"].class_ids.tolist() == [0, 1]


def test_categories_of_val_that_differ_are_named(folder: Path, tmp_path: Path) -> None:
    for split, name in (("train", "class 7"), ("val", "class seven")):
        names = [name if i == 7 else f"class {i}" for i in range(80)]
        data = content(categories=[{"id": i, "name": name} for i, name in enumerate(names)])
        (tmp_path / split).mkdir()
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(data))
        Image.new("RGB", HW[::-1]).save(tmp_path / split / "a.jpg")
    with pytest.raises(ValueError, match=r"not those of train: class seven and not class 7$"):
        coco.scan(str(tmp_path))


# Numbers


@pytest.mark.parametrize("value", [100, 100.0, "100", "100.0", None, NAN, "nan", "", 0])
def test_sizes_are_read_however_they_are_written(folder: Path, value: Any) -> None:
    assert read(folder, content(images=[image(width=value)]))["a.jpg"].class_ids.tolist() == [0]


@pytest.mark.parametrize("value", [INF, -INF, "x", -5, 99.5, True, [100], {}, 10**30, "1e2x"])
def test_a_size_that_is_none_is_named(folder: Path, value: Any) -> None:
    message = refused(folder, content(images=[image(), image(id=2, file_name="b.jpg", width=value)]))
    assert "x.json: images[1] (id 2): 'width'" in message


@pytest.mark.parametrize("written", [["10", "12", "40.0", 36], [10.0, 12, 40, "36"]])
def test_numbers_of_a_box_may_be_text(folder: Path, written: list[Any]) -> None:
    np.testing.assert_allclose(
        read(folder, content(annotations=[box(bbox=written)]))["a.jpg"].boxes_xywhn, [[0.3, 0.5, 0.4, 0.6]]
    )


@pytest.mark.parametrize(
    "written", [None, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, True, 4], [[1, 2, 3, 4]], {"1": 1, "2": 2, "3": 3, "4": 4}, 5]
)  # fmt: skip
def test_a_box_that_is_none_is_said(folder: Path, written: Any) -> None:
    assert "not four numbers" in refused(folder, content(annotations=[box(bbox=written)]))


@pytest.mark.parametrize(("value", "is_crowd"), [
    (0, False), (1, True), (False, False), (True, True), ("0", False), ("1", True), ("false", False), ("True", True),
    (None, False), (NAN, False), ("", False), (1.0, True), ("0.0", False),
])  # fmt: skip
def test_crowds_are_left_out_however_they_are_marked(folder: Path, value: Any, is_crowd: bool) -> None:
    assert len(read(folder, content(annotations=[box(iscrowd=value)]))["a.jpg"].class_ids) == (not is_crowd)


# Entries


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"annotations": "none"}, "x.json: 'annotations' is 'none', not a list"),
        ({"annotations": {"0": box()}}, "x.json: 'annotations' is {"),
        ({"annotations": [None]}, "x.json: annotations[0]: None is not an object"),
        ({"annotations": [box(), 7]}, "x.json: annotations[1]: 7 is not an object"),
        ({"annotations": [{"id": 9, "category_id": 1}]}, "annotations[0] (id 9): it needs an 'image_id'"),
        ({"annotations": [{"image_id": 1}]}, "annotations[0]: it needs a 'category_id'"),
        ({"annotations": [box(image_id=None)]}, "annotations[0] (id 5): 'image_id' is None, not a whole number or a text"),
        ({"annotations": [box(image_id=1.5)]}, "'image_id' is 1.5"),
        ({"annotations": [box(category_id=NAN)]}, "'category_id' is nan"),
        ({"annotations": [box(iscrowd="maybe")]}, "'iscrowd' 'maybe' is not a whole number"),
        ({"annotations": [box(iscrowd=2)]}, "'iscrowd' is 2, not 0 or 1"),
        ({"images": [image(), "b.jpg"]}, "x.json: images[1]: 'b.jpg' is not an object"),
        ({"images": [{"id": 3}]}, "x.json: images[0] (id 3): it needs a 'file_name', a text"),
        ({"images": [image(file_name=7)]}, "it needs a 'file_name', a text, not 7"),
        ({"images": [{"file_name": "a.jpg"}]}, "x.json: images[0]: it needs an 'id'"),
        ({"images": {"id": 1}}, "and 'images' is {'id': 1}"),
        ({"categories": [{"id": 4}]}, "x.json: categories[0] (id 4): it needs a 'name', a text"),
        ({"categories": [{"id": 4, "name": None}]}, "it needs a 'name', a text, not None"),
        ({"categories": None}, "and 'categories' is None"),
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_named(folder: Path, values: dict[str, Any], said: str) -> None:
    assert said in refused(folder, content(**values))


def test_no_annotations_are_none(folder: Path) -> None:
    assert not len(read(folder, content(annotations=None))["a.jpg"].class_ids)
    data = content()
    del data["annotations"]
    assert not len(read(folder, data)["a.jpg"].class_ids)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"images": [', "\x00", "[]", "5"])
def test_a_file_that_is_no_coco_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json .*is not") as caught:
        coco.scan(str(tmp_path / "x.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "\x00.jpg", "\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_a_missing_image(folder: Path, name: str) -> None:
    assert "images such as" in refused(folder, content(images=[image(file_name=name)]))


# Polygons


@pytest.mark.parametrize(
    "written",
    [
        [10, 12, 50, 12, 30, 48],
        [[10, 12, 50, 12, 30, 48]],
        TRIANGLE,
        [TRIANGLE],
        ["10", "12", 50, "12.0", 30, 48],
        [["10", "12", "50", "12", "30", "48"]],
        [[["10", 12], [50, 12], [30, "48"]]],
        [[10, 12, 50, 12, 30, 48], []],
        [[10, 12, 50, 12, 30, 48], [1, 2]],
    ],
)
def test_a_polygon_is_read_however_it_is_nested(folder: Path, written: Any) -> None:
    (found,) = (
        read(folder, content(annotations=[box(segmentation=written)]), "segment")["a.jpg"].segments_xyn or ()
    )
    np.testing.assert_allclose(found * HW[::-1], TRIANGLE)


@pytest.mark.parametrize("written", [None, [], [[]], NAN, ""])
def test_without_a_polygon_the_box_is_one(folder: Path, written: Any) -> None:
    (found,) = (
        read(folder, content(annotations=[box(segmentation=written)]), "segment")["a.jpg"].segments_xyn or ()
    )
    np.testing.assert_allclose(found * HW[::-1], [[10, 12], [50, 12], [50, 48], [10, 48]])


@pytest.mark.parametrize(
    "written",
    [
        [10, 12, 50, 12, 30],
        [[10, 12, 50, 12, 30]],
        [[10, 12, 50, 12, 30, 48], [1, 2, 3]],
        [[10, 12], [50, 12], [30]],
        [[10, 12], [50, 12]],
        [[1, 2, 3, 4]],
        [10, 12, [50, 12], 30, 48],
        [["a", 12, 50, 12, 30, 48]],
        [[10, 12, 50, None, 30, 48]],
        [[True, 12, 50, 12, 30, 48]],
        [{"x": 10, "y": 12}],
        "10 12 50 12 30 48",
        7,
    ],
)
def test_a_polygon_that_is_none_is_said(folder: Path, written: Any) -> None:
    assert "polygon" in refused(folder, content(annotations=[box(segmentation=written)]), "segment")


# Whatever is written

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["1", "2.0", "nan", "a.jpg", 10**400, 1]),
    st.lists(st.one_of(st.floats(0, 60), st.none(), st.text(max_size=2)), max_size=9), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.lists(st.lists(st.floats(0, 60), max_size=8), max_size=3),
)  # fmt: skip
PLACES = st.sampled_from([
    ("images",), ("annotations",), ("categories",), ("images", 0), ("annotations", 0), ("categories", 0),
    *[("images", 0, key) for key in ("id", "file_name", "width", "height")],
    *[("annotations", 0, key) for key in ("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "keypoints")],
    *[("categories", 0, key) for key in ("id", "name", "keypoints", "supercategory")],
])  # fmt: skip


@given(
    st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=2),
    st.sampled_from(["auto", "detect", "segment", "pose"]),
)
def test_any_value_anywhere_is_read_or_refused_in_one_line(
    folder: Path, changes: list[tuple[tuple[Any, ...], Any]], task: str
) -> None:
    annotation = box(segmentation=[[10, 12, 50, 12, 30, 48]], keypoints=[10, 12, 2, 50, 12, 2])
    categories = [{"id": i, "name": str(i), "keypoints": ["left eye", "right eye"]} for i in (1, 2)]
    data = content(annotations=[annotation], categories=categories)
    for place, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # another change took the place away
            reduce(operator.getitem, place[:-1], data)[place[-1]] = value
    message = ""
    try:
        (folder / "y.json").write_text(json.dumps(data))
        listing = coco.scan(str(folder / "y.json"), task, "segment")
        for record in listing.splits["train"]:
            coco.read_labels(record, len(listing.class_names), HW, listing.task, listing.keypoint_shape)
    except ValueError as error:
        message = str(error)
        assert message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "value", [None, True, "", "x", "1_0", "1e2", "--1", 1.5, NAN, INF, [], {}, "1.5", "9" * 200]
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        whole(value)


@given(st.integers(-(10**9), 10**9))
def test_whole_numbers_and_numbers(value: int) -> None:
    assert {whole(x) for x in (value, float(value), str(value), f" {value}.0 ")} == {value}
    assert {number(x) for x in (value, float(value), str(value))} == {float(value)}
    assert not is_absent(value)
