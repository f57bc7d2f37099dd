"""Pascal VOC: one XML an image. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

    Annotations/a.xml   JPEGImages/a.jpg   ImageSets/Main/{train,val,test}.txt   [classes.txt or labels.txt]

Boxes are 1-based and inclusive px, so that x1 = xmin - 1 and x2 = xmax. Objects marked difficult are left out, as in Ultralytics' VOC.yaml.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raypar.dataset.formats import (
    IMAGE_SUFFIXES,
    MAX_LABEL_BYTES,
    SPLITS,
    Fetched,
    Labels,
    Listing,
    Record,
    SplitMissingError,
    all_below,
    check_declared_size,
    hold_out,
    labels_from_xyxy,
    optional_test,
    read_label_file,
    read_text,
    some_of,
    wanted,
)
from raypar.dataset.remote import Place, contents, place_of

QUOTES = "\"'"
VAL_SHARE = 0.2  # of the images, where ImageSets/ is missing


@dataclass(frozen=True)
class Files:
    """What lies in JPEGImages and Annotations, by relative path without suffix.

    Attributes:
        images: names of the images' files, relative to JPEGImages; several where only the suffix differs.
        annotations: paths of the XML files.
    """

    images: dict[str, list[str]]
    annotations: dict[str, str]

    def of_line(self, line: str) -> list[str]:
        """Files of the images that a line of a list names; that of a missing one where it names none.

        A line is a name, perhaps with a suffix, in quotes, below JPEGImages or with columns behind it (``000012  1``). The longest
        part of it that is an image is meant, so that names may hold blanks.
        """
        parts = [line[: match.start()] for match in re.finditer(r"\s+|$", line)]
        for part in reversed(parts):
            for name in _spellings(part):
                if files := self._of_name(name):
                    return files
        name = _spellings(line if line[0] in QUOTES else parts[0])[-1]
        return [name if _suffix(name) in IMAGE_SUFFIXES else f"{name}.jpg"]

    def _of_name(self, name: str) -> list[str]:
        if name in self.images:
            return self.images[name]
        files = self.images.get(_stem(name), [])
        if name in files:
            return [name]
        return files if _suffix(name) in IMAGE_SUFFIXES else []


def scan(source: str | Place, seed: int, val_fraction: float | None = None) -> Listing:
    """Lists the images of a VOC folder.

    Args:
        source: the folder.
        seed: of the draw, where there are no lists.
        val_fraction: share of the images that is drawn for val then; unset: a fifth.

    Raises:
        ValueError: a folder is missing, a split is empty, or there are no classes.
    """
    root = place_of(source)
    wanted.check(root, "voc", is_folder=True)
    for folder in (root / "Annotations", root / "JPEGImages"):
        if not folder.is_dir():
            raise wanted.wrong(root, "voc", f"is not a Pascal VOC folder, {folder} does not exist")
    notes: list[str] = []
    files = Files(_images(root / "JPEGImages"), _annotations(root / "Annotations"))
    class_names = _class_names(root, files, notes)
    lists = _lists(root, files, notes)
    if lists:
        splits = optional_test(
            lambda split: _listed(root, split, lists[split], files, class_names), lists, notes
        )
        return Listing(class_names, splits, tuple(notes))
    records = [_record(root, name, files, class_names) for some in files.images.values() for name in some]
    train, val = hold_out(records, val_fraction or VAL_SHARE, [seed, len(files.images)])
    notes.append(
        f"no ImageSets/Main: {len(train)} images drawn for train and {len(val)} for val (seed {seed})"
    )
    drawn = {"train": [records[i] for i in train], "val": [records[i] for i in val]}
    return Listing(
        class_names, {split: some for split, some in drawn.items() if some}, tuple(notes), is_val_drawn=True
    )


def read_labels(
    record: Record, num_classes: int, image_hw: tuple[int, int], fetched: Fetched | None = None
) -> Labels:
    """Parses an annotation file; no file means no labels.

    Raises:
        ValueError: it is not XML, an object is incomplete or of no known class, or it describes another image.
    """
    path, class_names = record.labels
    data = read_label_file(path, fetched)
    if data is None:
        return Labels(np.zeros(0, np.int64), np.zeros((0, 4)))
    annotation = _parsed(data)
    size = (_int(annotation.findtext("size/height")), _int(annotation.findtext("size/width")))
    check_declared_size(size if min(size) > 0 else None, image_hw)
    rows: list[tuple[float, ...]] = []
    for item in annotation.iter("object"):
        if _int(item.findtext("difficult")) == 1:
            continue
        name = _name(item)
        if name not in class_names:
            raise ValueError(f"class '{name[:60]}' is not one of {some_of(class_names)}")
        xmin, ymin, xmax, ymax = (_float(item, key) for key in ("xmin", "ymin", "xmax", "ymax"))
        rows.append((class_names.index(name), xmin - 1, ymin - 1, xmax, ymax))
    return labels_from_xyxy(rows, num_classes, image_hw)


def _parsed(data: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(data)
    # LookupError: an encoding that Python does not know; ValueError: one of several bytes a character, which expat cannot read
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"labels are not XML that can be read ({error})") from error


def _name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()


def _int(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _float(item: ElementTree.Element, key: str) -> float:
    text = item.findtext(f"bndbox/{key}")
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"an object's {key} is {repr(text)[:60]}, not a number") from error


def _images(folder: Place) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(all_below(folder)):
        name = path[len(f"{folder}/") :]
        if _suffix(name) in IMAGE_SUFFIXES:
            found.setdefault(_stem(name), []).append(name)
    if not found:
        raise ValueError(f"{folder} has no images")
    return found


def _annotations(folder: Place) -> dict[str, str]:
    start = len(f"{folder}/")
    paths = sorted(path for path in all_below(folder) if path.lower().endswith(".xml"))
    return {path[start:-4]: path for path in paths}  # of a.XML and a.xml the second


def _lists(root: Place, files: Files, notes: list[str]) -> dict[str, list[str]]:
    """The image files that each split's list names, in the order of the splits."""
    folder = root / "ImageSets" / "Main"

    def named(file: Place) -> list[str]:
        return [name for line in _lines(file) for name in files.of_line(line)]

    places = {split: folder / f"{split}.txt" for split in SPLITS}
    found = {split: named(file) for split, file in places.items() if file.is_file()}
    if "train" not in found and (folder / "trainval.txt").is_file():
        held_out = set(found.get("val", []))
        found["train"] = [name for name in named(folder / "trainval.txt") if name not in held_out]
        notes.append("train is ImageSets/Main/trainval.txt: there is no train.txt")
    if found and "train" not in found:
        raise ValueError(f"{folder} has neither train.txt nor trainval.txt")
    return {split: found[split] for split in SPLITS if split in found}


def _lines(file: Place) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _spellings(text: str) -> list[str]:
    """What a name in a list may be called in the folder."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES:
        text = text[1:-1].strip()
    name = text.replace("\\", "/").removeprefix("./")
    return list(dict.fromkeys([text, name, name.rpartition("JPEGImages/")[2]]))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 (a million of them: without a Path each)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _listed(
    root: Place, split: str, names: list[str], files: Files, class_names: tuple[str, ...]
) -> list[Record]:
    if not names:
        raise SplitMissingError(f"{root}: split '{split}' has no images")
    if not any(name in files.images.get(_stem(name), ()) for name in names):
        raise SplitMissingError(
            f"{root}: none of the {len(names)} images that ImageSets/Main names for {split} is in JPEGImages, e.g. {_stem(names[0])}"
        )
    return [_record(root, name, files, class_names) for name in names]


def _class_names(root: Place, files: Files, notes: list[str]) -> tuple[str, ...]:
    for file in (root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            names = _lines(file)
            if not names:
                raise ValueError(f"{file} has no classes")
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise ValueError(f"{file} names the class '{twice[0]}' twice: leave one of the lines out")
            return tuple(names)
    found = set(_names_in(root, files))
    found.discard("")
    if not found:
        raise ValueError(f"{root / 'Annotations'} names no classes: no object has a name")
    notes.append("classes are those of the annotations in alphabetical order: there is no classes.txt")
    return tuple(sorted(found))


def _names_in(root: Place, files: Files) -> Iterator[str]:
    """Names of the objects of all annotations that can be read; the images of others are rejected by ``read_labels``."""
    places = [
        root / "Annotations" / path[len(f"{root / 'Annotations'}/") :] for path in files.annotations.values()
    ]
    for data in contents(places, MAX_LABEL_BYTES):
        if data is None:
            continue
        try:
            annotation = _parsed(data)
        except ValueError:
            continue
        yield from (_name(item) for item in annotation.iter("object"))


def _record(root: Place, name: str, files: Files, class_names: tuple[str, ...]) -> Record:
    stem = _stem(name)
    annotation = files.annotations.get(stem, f"{root / 'Annotations'}/{stem}.xml")
    return Record(name, f"{root / 'JPEGImages'}/{name}", (annotation, class_names))
