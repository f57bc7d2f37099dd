"""Pascal VOC: one XML an image. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

    Annotations/a.xml   JPEGImages/a.jpg   ImageSets/Main/{train,val,test}.txt   [classes.txt or labels.txt]

Boxes are 1-based and inclusive px, so that x1 = xmin - 1 and x2 = xmax. Objects marked difficult are left out, as in Ultralytics' VOC.yaml.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np

from raypar.dataset.formats import (
    IMAGE_SUFFIXES,
    SPLITS,
    Fetched,
    Labels,
    Listing,
    Record,
    check_declared_size,
    labels_from_xyxy,
    read_label_file,
    read_text,
    wanted,
)
from raypar.dataset.remote import Place, contents, place_of

VAL_SHARE = 0.2  # of the images, where ImageSets/ is missing


def scan(source: str | Place, seed: int) -> Listing:
    """Lists the images of a VOC folder.

    Raises:
        ValueError: a folder is missing, a split is empty, or there are no classes.
    """
    root = place_of(source)
    wanted.check(root, "voc", is_folder=True)
    for folder in (root / "Annotations", root / "JPEGImages"):
        if not folder.is_dir():
            raise wanted.wrong(root, "voc", f"is not a Pascal VOC folder, {folder} does not exist")
    notes: list[str] = []
    images = _images(root / "JPEGImages")
    class_names = _class_names(root, notes)
    splits = {}
    for split, names in _splits(root, list(images), seed, notes).items():
        if not names:
            raise ValueError(f"{root}: split '{split}' has no images")
        if not any(name in images for name in names):
            raise ValueError(
                f"{root}: none of the {len(names)} images that ImageSets/Main names for {split} is in JPEGImages, e.g. {names[0]}"
            )
        splits[split] = [_record(root, name, images, class_names) for name in names]
    return Listing(class_names, splits, tuple(notes))


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
    try:
        annotation = ElementTree.fromstring(data)
    # LookupError: an encoding that Python does not know
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"labels are not XML ({error})") from error
    size = (_int(annotation.findtext("size/height")), _int(annotation.findtext("size/width")))
    check_declared_size(size if all(size) else None, image_hw)
    rows: list[tuple[float, ...]] = []
    for item in annotation.iter("object"):
        if _int(item.findtext("difficult")) == 1:
            continue
        name = (item.findtext("name") or "").strip()
        if name not in class_names:
            raise ValueError(f"class '{name}' is not one of {', '.join(class_names)}")
        xmin, ymin, xmax, ymax = (_float(item, key) for key in ("xmin", "ymin", "xmax", "ymax"))
        rows.append((class_names.index(name), xmin - 1, ymin - 1, xmax, ymax))
    return labels_from_xyxy(rows, num_classes, image_hw)


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
        raise ValueError(f"an object's {key} is {text!r}, not a number") from error


def _images(folder: Place) -> dict[str, Place]:
    """Images by name: relative path without suffix."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} has no images")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}  # type: ignore[arg-type]


def _splits(root: Place, images: list[str], seed: int, notes: list[str]) -> dict[str, list[str]]:
    folder = root / "ImageSets" / "Main"
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    found = {split: _names(file) for split, file in files.items() if file.is_file()}
    if "train" not in found and (folder / "trainval.txt").is_file():
        held_out = set(found.get("val", []))
        found["train"] = [name for name in _names(folder / "trainval.txt") if name not in held_out]
        notes.append("train is ImageSets/Main/trainval.txt: there is no train.txt")
    if found:
        if "train" not in found:
            raise ValueError(f"{folder} has neither train.txt nor trainval.txt")
        return {split: found[split] for split in SPLITS if split in found}
    order = np.random.default_rng([seed, len(images)]).permutation(len(images))
    num_val = max(1, round(VAL_SHARE * len(images))) if len(images) > 1 else 0
    notes.append(
        f"no ImageSets/Main: {len(images) - num_val} images drawn for train and {num_val} for val (seed {seed})"
    )
    splits = {"train": [images[i] for i in order[num_val:]], "val": [images[i] for i in order[:num_val]]}
    return {split: names for split, names in splits.items() if names}


def _names(file: Place) -> list[str]:
    """First word of each line: ``000012`` or ``000012  1``."""
    return [line.split()[0] for line in read_text(file).splitlines() if line.strip()]


def _class_names(root: Place, notes: list[str]) -> tuple[str, ...]:
    for file in (root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
            if not names:
                raise ValueError(f"{file} has no classes")
            return tuple(names)
    found: set[str] = set()
    for data in contents(sorted((root / "Annotations").rglob("*.xml"))):
        try:
            found |= {
                (name.text or "").strip() for name in ElementTree.fromstring(data).iterfind("object/name")
            }
        except ElementTree.ParseError:
            continue  # its image is set aside by read_labels
    found.discard("")
    if not found:
        raise ValueError(f"{root / 'Annotations'} names no classes: no object has a name")
    notes.append("classes are those of the annotations in alphabetical order: there is no classes.txt")
    return tuple(sorted(found))


def _record(root: Place, name: str, images: dict[str, Place], class_names: tuple[str, ...]) -> Record:
    image = images.get(name, root / "JPEGImages" / f"{name}.jpg")
    labels = (str(root / "Annotations" / f"{name}.xml"), class_names)
    return Record(image.relative_to(root / "JPEGImages").as_posix(), str(image), labels)  # type: ignore[arg-type]
