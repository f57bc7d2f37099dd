"""Sources as they are found: hidden files, links, blanks and brackets in names, lists, encodings, numbers and names as text, splits that are not there."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raypar.dataset import remote
from raypar.dataset.formats import Listing, Record, coco, folders, matching, names_below, voc, wanted, yolo
from raypar.dataset.ingest import ShardJob, read_labels
from raypar.dataset.remote import RemotePath, Tree
from raypar.storage import Folder

HW = (60, 100)
XML = "<annotation><object><name>{}</name><bndbox><xmin>11</xmin><ymin>31</ymin><xmax>30</xmax><ymax>54</ymax></bndbox></object></annotation>"
HIDDEN = ("._{}", ".ipynb_checkpoints/{}", "__MACOSX/{}", ".x/y/{}", "__MACOSX/._{}")


def write(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", HW[::-1]).save(path)
    return path


def ids(listing: Listing) -> dict[str, list[str]]:
    return {split: sorted(record.image_id for record in records) for split, records in listing.splits.items()}


def labels_of(listing: Listing, format_: str) -> dict[str, list[int] | str]:
    """Classes of each image of train, or why it is rejected."""
    job = ShardJob(
        Folder("/nowhere"), "", "train", format_, len(listing.class_names), (), 1, 1, task=listing.task
    )
    found: dict[str, list[int] | str] = {}
    for record in listing.splits["train"]:
        try:
            found[record.image_id] = read_labels(job, record, HW).class_ids.tolist()
        except ValueError as error:
            found[record.image_id] = str(error)
    return found


# A source of each format with images a and b


def yolo_source(root: Path) -> Listing:
    for split in ("train", "val"):
        for name in "ab":
            write_image(root / "images" / split / f"{name}.jpg")
            write(root / "labels" / split / f"{name}.txt", "0 0.5 0.5 0.1 0.1")
    write(root / "data.yaml", "train: images/train\nval: [images/val]\nnames: [cat]\n")
    return yolo.scan(str(root))


def yolo_pattern(root: Path) -> Listing:
    yolo_source(root)
    write(root / "data.yaml", "train: images/t*/**\nval: images/**/*.jpg\nnames: [cat]\n")
    return yolo.scan(str(root / "data.yaml"))


def voc_source(root: Path) -> Listing:
    for name in "ab":
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write(root / "Annotations" / f"{name}.xml", XML.format("cat"))
    return voc.scan(str(root), 0)


def folders_source(root: Path) -> Listing:
    for split in ("train", "val", "test"):
        for name in "ab":
            write_image(root / split / "cat" / f"{name}.jpg")
    return folders.scan(str(root), 0)


def coco_source(root: Path) -> Listing:
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("ab")]
        data = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        write(root / "annotations" / f"instances_{split}.json", json.dumps(data))
        for name in "ab":
            write_image(root / split / f"{name}.jpg")
    return coco.scan(str(root))


SOURCES = [yolo_source, yolo_pattern, voc_source, folders_source, coco_source]


@pytest.mark.parametrize("make", SOURCES)
def test_hidden_names_are_left_out(tmp_path: Path, make: Callable[[Path], Listing]) -> None:
    expected = make(tmp_path / "clean")
    make(tmp_path / "root")
    for path in [p for p in (tmp_path / "root").rglob("*") if p.is_file()]:
        for hidden in HIDDEN:
            # as macOS writes them: not what their names say
            write(path.parent / hidden.format(path.name), b"\x00\x05\x16\x07 Mac OS X")
    (tmp_path / "root" / "__MACOSX" / "train" / "dog").mkdir(parents=True, exist_ok=True)
    for folder in [p for p in (tmp_path / "root").rglob("*") if p.is_dir() and "__MACOSX" not in p.parts]:
        write(folder / ".DS_Store", b"\0\0\0\1Bud1")
    found = make(tmp_path / "root")
    assert ids(found) == ids(expected)
    assert found.class_names == expected.class_names
    assert found.notes == tuple(note.replace("clean", "root") for note in expected.notes)


@pytest.mark.parametrize("make", SOURCES)
def test_folders_that_links_reach_again_are_listed_once(
    tmp_path: Path, make: Callable[[Path], Listing]
) -> None:
    expected = make(tmp_path / "clean")
    make(tmp_path / "root")
    for number, folder in enumerate([p for p in (tmp_path / "root").rglob("*") if p.is_dir()]):
        (folder / "again").symlink_to(folder)
        (folder / f"up{number}").symlink_to(tmp_path / "root")
        (folder / "itself").symlink_to(folder / "itself")
        (folder / "nowhere").symlink_to(folder / "none")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root")
    found = make(tmp_path / "root")
    # a link to the folder above leads to the other split too: each image of it once
    every = Counter(Path(record.image_path).resolve() for record in found.splits["train"])
    assert set(every.values()) == {1}
    assert {path.name for path in every} == {"a.jpg", "b.jpg"} or make is voc_source
    assert found.class_names == expected.class_names


def test_a_folder_is_listed_under_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "b.jpg")
    write(tmp_path / "set" / "z" / "a.jpg")
    for link, target in (("a", "set/z"), ("c", "pool"), ("b", "pool")):
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    (tmp_path / "set" / "z" / "up").symlink_to(tmp_path / "set")
    found = sorted(path[len(f"{tmp_path}/set/") :] for path in names_below(str(tmp_path / "set")))
    # the folder itself before a link to it, and of two links the first
    assert found == ["b/b.jpg", "z/a.jpg"]


PARTS = st.sampled_from(["a", "ab", "b.jpg", "ab.jpg", "c d", ".h", ".h.jpg", "x[1]"])
PATTERNS = st.sampled_from(["a", "a*", "*", "?b*", "[ab]*", "*.jpg", "**", ".*", "[!a]*", "c ?"])


@given(
    st.sets(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=8),
    st.lists(PATTERNS, min_size=1, max_size=3).filter(lambda parts: parts[-1] != "**"),
)
def test_patterns_match_what_glob_matches(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], pattern: list[str]
) -> None:
    root = tmp_path_factory.mktemp("glob")
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
    expected = glob.glob("/".join([str(root), *pattern]), recursive=True)  # noqa: PTH207
    assert [str(place) for place in matching(root.joinpath(*pattern))] == sorted({*expected}, key=Path)


# Names


@pytest.mark.parametrize(
    "name",
    [
        "a [1].jpg",
        "a b.jpg",
        "[ab].jpg",
        "a*.jpg",
        "a?.jpg",
        "a  b [x] (1).jpg",
        "{a}.jpg",
        "a#2.jpg",
        "'a'.jpg",
    ],
)
@pytest.mark.parametrize("folder", ["set", "set [1]", "my *set?"])
def test_names_with_signs_of_patterns_are_names(tmp_path: Path, folder: str, name: str) -> None:
    root = tmp_path / folder
    for split in ("train [x]", "val"):
        write_image(root / "images" / split / name)
        write(root / "labels" / split / Path(name).with_suffix(".txt"), "1 0.5 0.5 0.1 0.1")
    write(root / "list.txt", f"./images/train [x]/{name}\n")
    for train in (
        "images/train [x]",
        "list.txt",
        "images/train [x]/*",
        "images/train [x]/**",
        f"images/train [x]/{name}",
    ):
        data = {"train": train, "val": f"images/val/{name}", "names": ["cat", "dog"]}
        write(root / "data.yaml", json.dumps(data))
        assert labels_of(yolo.scan(str(root)), "yolo") == {name: [1]}, train


def voc_with(root: Path, line: str, *names: str) -> Listing:
    for name in names or ("a.jpg", "a b.jpg", "a b 1.jpg", "sub/c.jpg", "d.png"):
        write_image(root / "JPEGImages" / name)
        write(root / "Annotations" / Path(name).with_suffix(".xml"), XML.format("cat"))
    write(root / "ImageSets" / "Main" / "train.txt", f"{line}\n")
    return voc.scan(str(root), 0)


@pytest.mark.parametrize(
    ("line", "image"),
    [
        ("a", "a.jpg"), ("a  1", "a.jpg"), ("a -1", "a.jpg"), ("a\t0", "a.jpg"), ("a 1", "a.jpg"), ("a.jpg", "a.jpg"), ("a.jpg  -1", "a.jpg"),
        ('"a"', "a.jpg"), ("'a.jpg'", "a.jpg"), ("a b", "a b.jpg"), ("a b.jpg", "a b.jpg"), ("a b 1", "a b 1.jpg"), ("a b -1", "a b.jpg"),
        ("a b 1  1", "a b 1.jpg"), ('"a b 1"', "a b 1.jpg"), ('"a b" 1', "a b.jpg"), ("sub/c", "sub/c.jpg"), ("sub\\c.jpg", "sub/c.jpg"),
        ("./a.jpg", "a.jpg"), ("JPEGImages/a.jpg", "a.jpg"), ("/data/VOC2012/JPEGImages/sub/c.jpg 1", "sub/c.jpg"), ("d.jpg", "d.png"), ("\ufeffd", "d.png"),
    ],
)  # fmt: skip
def test_a_line_of_a_voc_list_is_the_image_that_it_names(tmp_path: Path, line: str, image: str) -> None:
    assert labels_of(voc_with(tmp_path, line), "voc") == {image: [0]}


@given(st.lists(st.sampled_from("ab 1-.'\"["), min_size=1, max_size=6).map("".join))
def test_any_line_of_a_voc_list_is_an_image_or_a_missing_one(line: str) -> None:
    files = voc.Files({"a": ["a.jpg"], "a b": ["a b.jpg", "a b.png"], "b 1": ["b 1.jpg"]}, {})
    if line.strip():
        found = files.of_line(line.strip())
        assert found in ([["a.jpg"], ["a b.jpg", "a b.png"], ["b 1.jpg"]]) or found[0].endswith(".jpg")


def test_a_line_that_names_no_image_is_a_missing_one(tmp_path: Path) -> None:
    lines = "a\nnone 1\nnone.jpg\n'no ne'\n"
    records = voc_with(tmp_path, lines).splits["train"]
    assert [record.image_id for record in records] == ["a.jpg", "none.jpg", "none.jpg", "no ne.jpg"]


def test_val_is_held_out_of_trainval_however_it_is_written(tmp_path: Path) -> None:
    voc_with(tmp_path, "a")
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    write(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\na b\nsub/c\n")
    write(tmp_path / "ImageSets" / "Main" / "val.txt", "a b.jpg 1\n")
    assert ids(voc.scan(str(tmp_path), 0)) == {"train": ["a.jpg", "sub/c.jpg"], "val": ["a b.jpg"]}


def test_images_of_one_stem_are_all_listed(tmp_path: Path) -> None:
    names = ("a.jpg", "a.png", "b.JPG", "c.jpg")
    found = voc_with(tmp_path, "a\nb\n", *names)
    assert labels_of(found, "voc") == {"a.jpg": [0], "a.png": [0], "b.JPG": [0]}
    assert list(labels_of(voc_with(tmp_path, "a.png"), "voc")) == ["a.png"]
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    drawn = voc.scan(str(tmp_path), 0)
    assert sorted(chain(*ids(drawn).values())) == sorted(
        [*names, "a b.jpg", "a b 1.jpg", "d.png", "sub/c.jpg"]
    )
    # two of one annotation are never on both sides
    for seed in range(10):
        sides = [
            split
            for split, some in ids(voc.scan(str(tmp_path), seed)).items()
            if {"a.jpg", "a.png"} & {*some}
        ]
        assert len(sides) == 1


@pytest.mark.parametrize("suffix", [".XML", ".Xml"])
def test_suffixes_in_capitals(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / "JPEGImages" / "a.JPEG")
    write(tmp_path / "Annotations" / f"a{suffix}", XML.format("cat"))
    write_image(tmp_path / "JPEGImages" / "b.jpg")
    found = voc.scan(str(tmp_path), 0)
    everything = {**labels_of(found, "voc")}
    assert found.class_names == ("cat",)
    assert everything in ({"a.JPEG": [0]}, {"b.jpg": []})


# Annotations


BAD_XML = {
    "gb2312": f'<?xml version="1.0" encoding="gb2312"?>{XML.format("cat")}'.encode(),
    "unknown": f'<?xml version="1.0" encoding="utf8mb4"?>{XML.format("cat")}'.encode(),
    "utf-7": f'<?xml version="1.0" encoding="utf-7"?>{XML.format("cat")}'.encode(),
    "codec": f'<?xml version="1.0" encoding="rot13"?>{XML.format("cat")}'.encode(),
    "idna": f'<?xml version="1.0" encoding="punycode"?>{XML.format("cat")}'.encode(),
    "cut": XML.format("cat")[:-20].encode(),
    "empty": b"",
    "latin": "<annotation><object><name>caf\xe9</name></object></annotation>".encode("latin-1"),
    "zeros": b"\0" * 100,
    "entity": b"<annotation>&none;</annotation>",
}
GOOD_XML = {
    "utf-8-bom": b"\xef\xbb\xbf" + XML.format("cat").encode(),
    "utf-16": f'<?xml version="1.0" encoding="utf-16"?>{XML.format("cat")}'.encode("utf-16"),
    "latin-1": f'<?xml version="1.0" encoding="iso-8859-1"?><!-- \xe9 -->{XML.format("cat")}'.encode(
        "latin-1"
    ),
    "cp1252": f'<?xml version="1.0" encoding="windows-1252"?>{XML.format(" cat ")}'.encode("cp1252"),
}


@pytest.mark.parametrize("has_classes", [False, True])
def test_an_annotation_that_cannot_be_read_rejects_its_image_alone(tmp_path: Path, has_classes: bool) -> None:
    for name, data in {**BAD_XML, **GOOD_XML}.items():
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        write(tmp_path / "Annotations" / f"{name}.xml", data)
    places = {name: tmp_path / "Annotations" / f"{name}.xml" for name in ("pipe", "folder", "link")}
    for name in places:
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
    os.mkfifo(places["pipe"])
    places["folder"].mkdir()
    places["link"].symlink_to("none")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "\n".join([*BAD_XML, *GOOD_XML]))
    if has_classes:
        write(tmp_path / "classes.txt", "cat\n")
    found = labels_of(voc.scan(str(tmp_path), 0), "voc")
    assert {name.removesuffix(".jpg") for name, labels in found.items() if labels == [0]} == set(GOOD_XML)
    assert all("not XML that can be read" in str(labels) for name, labels in found.items() if labels != [0])


@pytest.mark.parametrize("size", [
    "", "<size/>", "<size><width>0</width><height>0</height></size>", "<size><width>x</width><height>60</height></size>", "<size><width>-1</width><height>-1</height></size>",
    "<size><width>100.0</width><height> 60 </height></size>", "<size><width>nan</width><height>inf</height></size>", "<size><height>60</height></size>",
])  # fmt: skip
@pytest.mark.parametrize(("coordinate", "said"), [
    ("11", ""), ("11.0", ""), (" 11 ", ""), ("1.1e1", ""), ("nan", "finite"), ("inf", "finite"), ("1e999", "finite"), ("x", "xmin is 'x', not a number"), ("", "xmin is '', not a number"),
])  # fmt: skip
def test_sizes_and_coordinates_of_voc(tmp_path: Path, size: str, coordinate: str, said: str) -> None:
    xml = (
        XML.format("cat")
        .replace("<annotation>", f"<annotation>{size}")
        .replace("<xmin>11<", f"<xmin>{coordinate}<")
    )
    record = Record("a.jpg", "", (str(write(tmp_path / "a.xml", xml)), ("cat",)))
    if said:
        with pytest.raises(ValueError, match=said):
            voc.read_labels(record, 1, HW)
    else:
        np.testing.assert_allclose(voc.read_labels(record, 1, HW).boxes_xywhn, [[0.2, 0.7, 0.2, 0.4]])


def test_a_class_that_there_is_not_is_said_without_all_of_them(tmp_path: Path) -> None:
    voc_with(tmp_path, "a")
    write(tmp_path / "classes.txt", "\n".join(f"class {i}" for i in range(80)))
    said = labels_of(voc.scan(str(tmp_path), 0), "voc")["a.jpg"]
    assert said == "class 'cat' is not one of class 0, class 1, class 2, class 3, class 4 ... 80 in all"
    write(tmp_path / "classes.txt", "cat\ndog\ncat\n")
    with pytest.raises(ValueError, match=r"classes.txt names the class 'cat' twice"):
        voc.scan(str(tmp_path), 0)


# data.yaml


def scan_yaml(root: Path, text: str) -> Listing:
    if not (root / "images").exists():
        yolo_source(root)
    write(root / "data.yaml", f"train: images/train\nval: images/val\n{text}\n")
    return yolo.scan(str(root))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[off, on]", ("off", "on")), ("[yes, no]", ("yes", "no")), ("[null, ~, true]", ("null", "~", "true")), ("[1.0, 010, 1e3, 0x1F]", ("1.0", "010", "1e3", "0x1F")),
        ("[2024-01-01, 12:30:45, 1_000]", ("2024-01-01", "12:30:45", "1_000")), ("{0: off, 1: on}", ("off", "on")), ("{'1': n, '0': y}", ("y", "n")),
        ("{0.0: cat, '1': dog}", ("cat", "dog")), ("{01: dog, 00: cat}", ("cat", "dog")), ("\n  - on\n  - 'no'\n  - .5", ("on", "no", ".5")), ("[=, '<<', =x]", ("=", "<<", "=x")),
    ],
)  # fmt: skip
def test_names_of_classes_stay_as_they_are_written(
    tmp_path: Path, names: str, expected: tuple[str, ...]
) -> None:
    assert scan_yaml(tmp_path, f"names: {names}").class_names == expected


@pytest.mark.parametrize("count", ["2", "'2'", "2.0", "'2.0'", "' 2 '", "null", ""])
def test_the_number_of_classes_is_read_however_it_is_written(tmp_path: Path, count: str) -> None:
    assert scan_yaml(tmp_path, f"nc: {count}\nnames: [cat, dog]").class_names == ("cat", "dog")


def test_numbers_of_keypoints_may_be_text(tmp_path: Path) -> None:
    found = scan_yaml(tmp_path, "names: [cat]\nkpt_shape: ['2', 3.0]\nflip_idx: ['1', 0]\nchannels: '3'")
    assert (found.keypoint_shape, found.flip_idx) == ((2, 3), (1, 0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nc: 1.9\nnames: [cat, dog]", "'nc': '1.9' is not a whole number"), ("nc: two\nnames: [cat, dog]", "'nc': 'two'"), ("nc: [2]\nnames: [cat]", "'nc': ['2']"),
        ("nc: 1\nnames: [cat, dog]", "'nc: 1' but 'names' has 2 entries"), ("nc: 999999999999", "is more than 1048576 classes"), ("nc: 0", "has no classes"),
        ("names: cat", "has no classes"), ("names: {}", "has no classes"), ("names: [[cat], dog]", "class 0 of 'names' is ['cat'], which is no name"),
        ("names: {0: cat, 1: }", "class 1 of 'names' is ''"), ("names: {a: cat}", "must be 0, 1, 2 ..., not 'a'"), ("names: {1: cat, 2: dog}", "without a gap, and 2 is beyond"),
        ("names: {0: cat, '0': dog}", "'0' is written twice"), ("names: {0: cat, 0.0: dog}", "class 0 is written twice"),
        ("names: [cat]\nchannels: 10", "'channels: 10', and raypar trains on three"), ("names: [cat]\nchannels: 1", "trains on three"), ("names: [cat]\nchannels: RGB", "'channels': 'RGB'"),
        ("names: [cat]\nkpt_shape: 17", "'kpt_shape' must be"), ("names: [cat]\nkpt_shape: [17, 3, 1]", "'kpt_shape' must be"), ("names: [cat]\nkpt_shape: [2, 3]\nflip_idx: [0, a]", "'flip_idx' must"),
        ("names: [cat]\npath: [a]", "'path' must be a folder"), ("names: [cat]\nnames: [dog]", "'names' is written twice"), ("x: " + "[" * 3000, "is not YAML"),
        ("names: &n [*n]", "no name"), ("names: [cat]\npath: ~nobody-of-that-name/x", "path '~nobody-of-that-name/x' is neither in"),
    ],
)  # fmt: skip
def test_a_yaml_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"data\.yaml") as caught:
        scan_yaml(tmp_path, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


YAML_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=4), st.lists(st.one_of(st.text(max_size=3), st.integers(), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3)).map(str), st.text(max_size=3), max_size=3),
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(
            ["train", "val", "test", "validation", "names", "nc", "channels", "kpt_shape", "flip_idx", "path"]
        ),
        YAML_VALUES,
        max_size=3,
    )
)
def test_any_yaml_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    root = tmp_path_factory.getbasetemp() / "any"
    if not root.exists():
        yolo_source(root)
    write(
        root / "any.yaml",
        json.dumps({"train": "images/train", "val": "images/val", "names": ["cat"]} | values),
    )
    message = ""
    try:
        found = yolo.scan(str(root / "any.yaml"))
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert message or (found.class_names and found.splits["train"])


# Splits


@pytest.mark.parametrize(
    "test",
    [
        "images/test",
        "empty",
        "None",
        "null",
        "''",
        "[]",
        "[images/val, images/test]",
        "none.txt",
        "list.txt",
        "images/t?st/*.jpg",
        "[]\nminival: x",
    ],
)
def test_a_test_split_of_yolo_may_be_missing(tmp_path: Path, test: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "list.txt", "./images/none.jpg\n")
    found = scan_yaml(tmp_path, f"names: [cat]\ntest: {test}")
    assert set(found.splits) == {"train", "val"}
    is_named = test.partition("\n")[0] not in ("None", "null", "''", "[]")
    assert [("there is no test split: " in note) for note in found.notes] == [True] * is_named


@pytest.mark.parametrize("key", ["train", "val"])
@pytest.mark.parametrize("value", ["images/none", "[images/train, images/none]", "empty"])
def test_a_split_that_training_needs_may_not(tmp_path: Path, key: str, value: str) -> None:
    yolo_source(tmp_path)
    (tmp_path / "empty").mkdir()
    other = {"train": "val", "val": "train"}[key]
    write(tmp_path / "data.yaml", f"{key}: {value}\n{other}: images/{other}\nnames: [cat]\n")
    with pytest.raises(ValueError, match=f"'{key}'") as caught:
        yolo.scan(str(tmp_path))
    assert ("prepare.val_fraction draws one" in str(caught.value)) == (key == "val")


def test_a_test_split_of_the_other_formats_may_be_missing(tmp_path: Path) -> None:
    folders_source(tmp_path / "empty")
    for name in "ab":
        (tmp_path / "empty" / "test" / "cat" / f"{name}.jpg").unlink()
    folders_source(tmp_path / "bare")
    (tmp_path / "bare" / "test" / "cat").rename(tmp_path / "elsewhere")
    coco_source(tmp_path / "coco")
    info = {"images": [{"id": 1, "file_name": "none.jpg"}], "categories": [{"id": 1, "name": "cat"}]}
    write(tmp_path / "coco" / "annotations" / "instances_test.json", json.dumps(info))
    coco_source(tmp_path / "no_images")
    write(tmp_path / "no_images" / "annotations" / "instances_test.json", json.dumps({**info, "images": []}))
    voc_with(tmp_path / "voc", "a")
    write(tmp_path / "voc" / "ImageSets" / "Main" / "test.txt", "none\n")
    voc_with(tmp_path / "no_lines", "a")
    write(tmp_path / "no_lines" / "ImageSets" / "Main" / "test.txt", " \n")
    scans: dict[str, Callable[[str], Listing]] = {
        "empty": lambda path: folders.scan(path, 0), "bare": lambda path: folders.scan(path, 0), "coco": coco.scan, "no_images": coco.scan,
        "voc": lambda path: voc.scan(path, 0), "no_lines": lambda path: voc.scan(path, 0),
    }  # fmt: skip
    for name, scan in scans.items():
        found = scan(str(tmp_path / name))
        assert "test" not in found.splits, name
        assert ["there is no test split: " in note for note in found.notes].count(True) == 1, name


# In a store


def test_a_store_leaves_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.fs as pafs

    monkeypatch.setattr(wanted, "_near", lambda place: None)
    for make, scan in (
        (yolo_source, yolo.scan),
        (folders_source, lambda place: folders.scan(place, 0)),
        (voc_source, lambda place: voc.scan(place, 0)),
    ):
        root = tmp_path / make.__name__
        make(root)
        for path in [p for p in root.rglob("*") if p.is_file()]:
            for hidden in HIDDEN:
                write(path.parent / hidden.format(path.name), b"\x00\x05\x16\x07")
        store = Folder("store://bucket")
        store.__dict__["_resolved"] = (
            pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()),
            root.name,
        )
        there = scan(RemotePath(Tree(store), root.name))
        assert ids(there) == ids(make(root)), make
    assert remote.is_hidden("._a")
    assert not remote.is_hidden("a.__MACOSX")
