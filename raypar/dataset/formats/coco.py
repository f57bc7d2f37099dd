"""COCO JSON. ``scan`` (driver) reads the boxes too; ``read_labels`` (Ray task) only checks and scales them.

    annotations/instances_{train,val,test}*.json   images in train2017/, images/train2017/, train/, images/train/ or images/

or the layout that Roboflow exports, ``{train,valid,test}/_annotations.coco.json`` beside the images, or a single JSON (all of it train).
Boxes are [left, top, width, height] in px; crowds are left out; category ids become 0, 1, 2 ... in the order of the ids.
"""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

from raypar.dataset.formats import SPLITS, Labels, Listing, Record, check_declared_size, labels_from_xyxy

NUM_PROBES = 20  # images looked for in each folder that may hold a split


def scan(source: str) -> Listing:
    """Lists the images of a COCO folder or JSON file.

    Raises:
        ValueError: a file is missing or wrong, splits disagree about the classes, or the images are not found.
    """
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"prepare.source {path} does not exist")
    notes: list[str] = []
    classes: dict[int, str] = {}
    splits = {}
    for split, file in ({"train": path} if path.is_file() else _split_files(path)).items():
        data = _load(file)
        categories = _categories(data, file)
        if classes and categories != classes:
            raise ValueError(f"{file}: its categories are not those of train")
        classes = categories
        splits[split] = _records(data, file, path if path.is_dir() else file.parent, classes, notes)
    return Listing(tuple(classes[i] for i in sorted(classes)), splits, tuple(notes))


def read_labels(record: Record, num_classes: int, image_hw: tuple[int, int]) -> Labels:
    """Boxes of an image, from px.

    Raises:
        ValueError: a box is malformed or of no known class, or the JSON describes an image of another size.
    """
    declared_hw, annotations = record.labels
    check_declared_size(declared_hw, image_hw)
    rows: list[tuple[float, ...]] = []
    for class_id, box in annotations:
        try:
            left, top, width, height = (float(value) for value in box)
        except (TypeError, ValueError) as error:
            raise ValueError(f"bbox is {box!r}, not four numbers") from error
        rows.append((class_id, left, top, left + width, top + height))
    return labels_from_xyxy(rows, num_classes, image_hw)


def _split_files(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        for name in (split, "valid") if split == "val" else (split,):
            files += [f for f in [root / name / "_annotations.coco.json"] if f.is_file()]
        if len(files) > 1:
            raise ValueError(f"{root} has several files for {split} ({', '.join(f.name for f in files)}): leave one")
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise ValueError(
            f"{root} has no annotations/instances_train*.json (nor train/_annotations.coco.json): name the JSON as prepare.source"
        )
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or not isinstance(data.get("categories"), list):
        raise ValueError(f"{file} is not a COCO file: it needs the lists 'images', 'annotations' and 'categories'")
    if not data["images"]:
        raise ValueError(f"{file} has no images")
    return data


def _categories(data: dict[str, Any], file: Path) -> dict[int, str]:
    try:
        categories = {int(c["id"]): str(c["name"]) for c in data["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: each category needs an 'id' (a whole number) and a 'name'") from error
    if not categories:
        raise ValueError(f"{file} has no classes: 'categories' is empty")
    return categories


def _records(data: dict[str, Any], file: Path, root: Path, classes: dict[int, str], notes: list[str]) -> list[Record]:
    class_ids = {category: class_id for class_id, category in enumerate(sorted(classes))}
    boxes: dict[Any, list[tuple[int, Any]]] = {}
    try:
        for image in data["images"]:
            boxes[image["id"]] = []
        num_unknown = 0
        for annotation in data.get("annotations") or ():
            if annotation.get("iscrowd"):
                continue
            if annotation["image_id"] not in boxes:
                num_unknown += 1
                continue
            class_id = class_ids.get(annotation["category_id"], -1)  # -1 is refused by read_labels, and the image with it
            boxes[annotation["image_id"]].append((class_id, annotation.get("bbox")))
        folder = _image_folder([image["file_name"] for image in data["images"][:NUM_PROBES]], file, root)
        records = []
        for image in data["images"]:
            name = posixpath.normpath(str(image["file_name"]).replace("\\", "/"))
            declared_hw = (int(image.get("height") or 0), int(image.get("width") or 0))
            labels = (declared_hw if all(declared_hw) else None, boxes[image["id"]])
            records.append(Record(name, str(folder / name), labels))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a COCO file: an image or annotation lacks or misuses {error}") from error
    if num_unknown:
        notes.append(f"{file.name}: {num_unknown} annotations of images that it does not list were left out")
    return records


def _image_folder(names: list[str], file: Path, root: Path) -> Path:
    stem = file.stem.removeprefix("instances_")
    split = next((s for s in SPLITS if stem.startswith(s)), stem)
    places = [root / stem, root / "images" / stem, root / split, root / "images" / split, root / "images", file.parent, root]
    if root.name == "annotations":
        places += [root.parent / place.relative_to(root) for place in places[:5]]  # the JSON itself was named: its images are one level up
    for place in places:
        if any((place / name.replace("\\", "/")).is_file() for name in names):
            return place
    tried = ", ".join(dict.fromkeys(str(place) for place in places))
    raise ValueError(f"{file}: images such as {names[0]} are in none of {tried}")
