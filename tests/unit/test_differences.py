"""How two lots of settings differ, in words: only what differs, and no longer than a line can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

import raypar.train
from raypar import outputs
from raypar.dataset import append
from raypar.dataset.formats import Listing
from raypar.dataset.manifest import Manifest
from raypar.differences import differences, list_differences, short
from raypar.storage import Folder

CLASSES = [f"class {i}" for i in range(80)]


def test_settings_that_differ_are_told_and_no_others() -> None:
    before = {"batch": 16, "seed": 0, "yolo": {"mosaic": 0.5, "lr0": 0.01}}
    now = {"batch": 8, "seed": 0, "yolo": {"lr0": 0.01, "fliplr": 0.1}}
    assert differences(before, now) == (
        "batch: 16 then, 8 now, yolo.fliplr: None then, 0.1 now, yolo.mosaic: 0.5 then, None now"
    )
    assert differences(now, now) == ""


def test_of_a_long_list_the_items_that_differ() -> None:
    other = [*CLASSES[:17], "kite", *CLASSES[18:]]
    assert differences({"names": CLASSES}, {"names": other}) == "names 17: 'class 17' then, 'kite' now"
    said = list_differences("class", CLASSES, CLASSES[:-1], ("in the weights", "in the dataset"))
    assert said == (
        "class: 80 in the weights, 79 in the dataset; class 79: 'class 79' in the weights, nothing in the dataset"
    )
    assert list_differences("class", CLASSES, CLASSES[::-1], ("here", "there")).endswith(" and 77 more")


def test_many_settings_and_long_values_are_cut() -> None:
    said = differences({}, {f"key{i}": i for i in range(30)})
    assert said.count("now") == 8
    assert said.endswith(" and 22 more")
    assert short("0123456789abcdef" * 4) == "0123456789ab..."
    assert len(short("x" * 500)) < 80


@pytest.mark.parametrize("task", ["train", "other verbs"])
def test_a_run_begun_otherwise_says_only_what_differs(task: str) -> None:
    sha256 = "0123456789abcdef" * 4
    before = {"dataset": sha256, "class_names": CLASSES, "yolo": {f"key{i}": i for i in range(30)}}
    now = before | {"class_names": ["kite", *CLASSES[1:]], "dataset": sha256[::-1]}
    if task == "train":
        said = raypar.train.differing(before, now)
    else:
        said = outputs.differing(before, now)
    assert "dataset: 0123456789ab... then, fedcba987654... now" in said
    assert "class_names 0: 'class 0' then, 'kite' now" in said
    assert "class 2" not in said
    assert "key" not in said


def test_a_source_of_other_classes_says_which(tmp_path: Path) -> None:
    """Of two lists of 80 names that were cut at the same length, nobody saw the difference."""
    before = Manifest(task="detect", class_names=tuple(CLASSES), splits={}, source="")
    listing = Listing(tuple([*CLASSES[:-1], "kite"]), {})
    with pytest.raises(ValueError, match="class_names 79: 'class 79' there, 'kite' in the source") as caught:
        append.check(before, listing, Folder.at(tmp_path))
    assert "class 1" not in str(caught.value)
