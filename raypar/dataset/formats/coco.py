"""COCO JSON. ``scan`` (driver) reads the boxes too; ``read_labels`` (Ray task) only checks and scales them.

    annotations/instances_{train,val,test}*.json   images in train2017/, images/train2017/, train/, images/train/ or images/

or the layout that Roboflow exports, ``{train,valid,test}/_annotations.coco.json`` beside the images, or a single JSON (all of it train).
For pose the first is called person_keypoints_{train,val,test}*.json, or as above. Boxes are [left, top, width, height] in px; crowds are left out; category ids become 0, 1, 2 ... in the order of the ids.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raypar.dataset.formats import (
    MAX_VALUE,
    SPLITS,
    Labels,
    Listing,
    Record,
    SplitMissingError,
    check_declared_size,
    labels_from_xyxy,
    optional_test,
    some_of,
    wanted,
)
from raypar.dataset.formats.coco_points import (
    compact,
    has_keypoints,
    has_outline,
    keypoints_of,
    with_keypoints,
    with_polygons,
)
from raypar.dataset.formats.numbers import is_absent, number, shown, whole
from raypar.dataset.remote import Place, place_of

NUM_PROBES = 20  # images looked for in each folder that may hold a split
Id = int | str


@dataclass
class Image:
    """An image of a COCO file.

    Attributes:
        name: its file, below the folder of images.
        declared_hw: px; None where the file does not say.
        annotations: (class id, or what is wrong with it; bbox; and what else the task needs) of each object, as they are written.
    """

    name: str
    declared_hw: tuple[int, int] | None
    annotations: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass
class Source:
    """A COCO folder or file, while its splits are read one after the other.

    Attributes:
        root: the folder.
        task: detect, segment or pose.
        notes: sentences for the user.
        loaded: content of files that are read already.
        classes: category ids and names, in the order of the class ids.
        keypoints: pose: shape and flip_idx.
    """

    root: Place
    task: str
    notes: list[str]
    loaded: dict[Place, dict[str, Any]]
    classes: dict[Id, str] = field(default_factory=dict)
    keypoints: tuple[tuple[int, int] | None, tuple[int, ...]] = (None, ())

    def read(self, file: Place) -> list[Record]:
        """The records of a split.

        Raises:
            SplitMissingError: it has no images, or they are not there.
            ValueError: the file is wrong, or its classes or keypoints are not those of the splits before.
        """
        data = self.loaded.pop(file, None) or _load(file)
        classes = _categories(data, file)
        if self.classes and classes != self.classes:
            differing = [
                f"{classes.get(i, 'none')} and not {name}"
                for i, name in self.classes.items()
                if classes.get(i) != name
            ]
            differing += [f"{name} and not none" for i, name in classes.items() if i not in self.classes]
            raise ValueError(f"{file}: its categories are not those of train: {some_of(differing, 3)}")
        self.classes = classes
        if self.task == "pose":
            found = keypoints_of(data["categories"], file)
            if self.keypoints[0] and found != self.keypoints:
                raise ValueError(f"{file}: its keypoints are not those of train")
            self.keypoints = found
        images, by_id = _images(data, file)
        self._annotate(by_id, data, file)
        folder = _image_folder([image.name for image in images[:NUM_PROBES]], file, self.root)
        return [
            Record(image.name, str(folder / image.name), (image.declared_hw, image.annotations))
            for image in images
        ]

    def _annotate(self, by_id: dict[Id, Image], data: dict[str, Any], file: Place) -> None:
        """Gives each image its annotations."""
        class_ids = {category: class_id for class_id, category in enumerate(self.classes)}
        points = _points_of(data, self.task)
        left_out: Counter[str] = Counter()

        def take(annotation: dict[str, Any]) -> None:
            if _is_crowd(annotation.get("iscrowd")):
                return
            image = by_id.get(_id_of(annotation, "image_id"))
            category = _id_of(annotation, "category_id")
            if image is None:
                left_out["of images that it does not list were left out"] += 1
                return
            if self.task == "pose" and not has_keypoints(annotation):
                left_out["without a labelled keypoint were left out, as COCO's evaluation does"] += 1
                return
            class_id: Any = class_ids.get(category)
            if class_id is None:  # for read_labels, which rejects the image
                class_id = f"category_id {shown(category)} is not one of the {len(class_ids)} categories"
            more = [compact(annotation.get(points))] if points else []
            labels = (class_id, annotation.get("bbox"), *more)
            image.annotations.append(labels)

        _each(data, "annotations", file, take)
        self.notes += [f"{file.name}: {count} annotations {what}" for what, count in left_out.items()]


def scan(source: str | Place, task: str = "auto", wish: str | None = None) -> Listing:
    """Lists the images of a COCO folder or JSON file.

    Args:
        source: the folder or file.
        task: detect, segment or pose; auto: ``wish`` if the labels allow it, else detect.
        wish: the task that the model is for, if that is known.

    Raises:
        ValueError: a file is missing or wrong, splits disagree about the classes, or the images are not found.
    """
    path = place_of(source)
    wanted.check(path, "coco")
    notes: list[str] = []
    loaded: dict[Place, dict[str, Any]] = {}
    if task == "auto":
        task = wish if wish in ("segment", "pose") and _allows(path, wish, loaded) else "detect"
    files = _files(path, task)
    reading = Source(path if path.is_dir() else path.parent, task, notes, loaded)
    splits = optional_test(lambda split: reading.read(files[split]), files, notes)
    keypoint_shape, flip_idx = reading.keypoints
    if task == "pose" and not flip_idx:
        notes.append("no keypoint is called left or right: images are not mirrored in training")
    return Listing(tuple(reading.classes.values()), splits, tuple(notes), task, keypoint_shape, flip_idx)


def read_labels(record: Record, num_classes: int, image_hw: tuple[int, int], task: str = "detect",
                keypoint_shape: tuple[int, int] | None = None) -> Labels:  # fmt: skip
    """Labels of an image, from px.

    Raises:
        ValueError: a box, polygon or keypoint is malformed or of no known class, or the JSON describes an image of another size.
    """
    declared_hw, annotations = record.labels
    check_declared_size(declared_hw, image_hw)
    rows: list[tuple[float, ...]] = []
    has_polygons = any(len(annotation) > 2 for annotation in annotations)
    for class_id, box, *_ in annotations:
        if isinstance(class_id, str):
            raise ValueError(class_id)
        left, top, width, height = _numbers(box)
        rows.append((class_id, left, top, left + width, top + height))
    if task == "segment" or (task == "detect" and has_polygons):
        segmentations = [annotation[2] for annotation in annotations]
        return with_polygons(rows, segmentations, num_classes, image_hw, is_strict=task == "segment")
    if task == "pose":
        assert keypoint_shape is not None
        return with_keypoints(
            rows, [annotation[2] for annotation in annotations], num_classes, image_hw, keypoint_shape[0]
        )
    return labels_from_xyxy(rows, num_classes, image_hw)


def _numbers(box: Any) -> list[float]:
    try:
        if not isinstance(box, list | tuple) or len(box) != 4:
            raise ValueError
        return [number(value) for value in box]
    except ValueError as error:
        raise ValueError(f"bbox is {shown(box)}, not four numbers") from error


def _allows(path: Place, task: str, loaded: dict[Place, dict[str, Any]]) -> bool:
    """Whether the labels of train are those of a task."""
    file = _files(path, task)["train"]
    data = loaded[file] = _load(file)
    if task == "pose":
        return all(isinstance(c, dict) and c.get("keypoints") for c in data["categories"])
    annotations = data.get("annotations")
    return isinstance(annotations, list) and any(
        isinstance(a, dict) and a.get("segmentation") for a in annotations
    )


def _files(path: Place, task: str) -> dict[str, Place]:
    return {"train": path} if path.is_file() else _split_files(path, task)


def _split_files(root: Place, task: str) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for split in SPLITS:
        files: list[Place] = (
            sorted((root / "annotations").glob(f"person_keypoints_{split}*.json")) if task == "pose" else []
        )
        files = files or sorted((root / "annotations").glob(f"instances_{split}*.json"))
        for name in (split, "valid") if split == "val" else (split,):
            files += [f for f in [root / name / "_annotations.coco.json"] if f.is_file()]
        if len(files) > 1:
            raise ValueError(
                f"{root} has several files for {split} ({', '.join(f.name for f in files)}): leave one"
            )
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise wanted.wrong(
            root, "coco", "has no annotations/instances_train*.json (nor train/_annotations.coco.json)"
        )
    return found


def _load(file: Place) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise wanted.wrong(file, "coco", f"is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{file} is not a COCO file: it needs the lists 'images', 'annotations' and 'categories'"
        )
    for key in ("images", "categories"):
        if not isinstance(data.get(key), list):
            raise ValueError(
                f"{file} is not a COCO file: it needs the lists 'images', 'annotations' and 'categories', "
                f"and '{key}' is {shown(data.get(key))}"
            )
    if not data["images"]:
        raise SplitMissingError(f"{file} has no images")
    return data


def _each(data: dict[str, Any], key: str, file: Place, take: Callable[[dict[str, Any]], None]) -> None:
    """Hands on each object of a list of the file; an absent list has none.

    Raises:
        ValueError: it is no list, or an entry is wrong; the message names the entry.
    """
    found = data.get(key)
    if found is None:
        return
    if not isinstance(found, list):
        raise ValueError(f"{file}: '{key}' is {shown(found)}, not a list")
    for index, entry in enumerate(found):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"{shown(entry)} is not an object of keys and values")
            take(entry)
        except ValueError as error:
            raise ValueError(f"{file}: {key}[{index}]{_shown_id(entry)}: {error}") from error


def _shown_id(entry: Any) -> str:
    return f" (id {shown(entry['id'], 30)})" if isinstance(entry, dict) and "id" in entry else ""


def _id_of(entry: dict[str, Any], key: str) -> Id:
    """An id: 7, 7.0 and "7" are one, other texts are as they are written."""
    value = entry.get(key)
    if isinstance(value, str) and value.strip():
        try:
            return whole(value)
        except ValueError:
            return value.strip()
    if key not in entry:
        raise ValueError(f"it needs {'an' if key.startswith('i') else 'a'} '{key}', a whole number or a text")
    try:
        return whole(value)
    except ValueError as error:
        raise ValueError(f"'{key}' is {shown(value)}, not a whole number or a text") from error


def _text_of(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it needs a '{key}', a text{f', not {shown(value)}' if key in entry else ''}")
    return value


def _size_of(entry: dict[str, Any], key: str) -> int:
    """Pixels; 0 where the file does not say."""
    value = entry.get(key)
    if is_absent(value):
        return 0
    try:
        size = whole(value)
    except ValueError as error:
        raise ValueError(f"'{key}' {error}") from error
    if not 0 <= size < MAX_VALUE:
        raise ValueError(f"'{key}' is {shown(value)}, which is no size of an image")
    return size


def _is_crowd(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if is_absent(value):
        return False
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    try:
        found = whole(value)
    except ValueError as error:
        raise ValueError(f"'iscrowd' {error}") from error
    if found not in (0, 1):
        raise ValueError(f"'iscrowd' is {shown(value)}, not 0 or 1")
    return found == 1


def _categories(data: dict[str, Any], file: Place) -> dict[Id, str]:
    """Names by id, in the order of the ids: numbers first."""
    names: dict[Id, str] = {}

    def take(category: dict[str, Any]) -> None:
        category_id = _id_of(category, "id")
        is_number = type(category.get("name")) in (int, float)
        name = str(category["name"]) if is_number else _text_of(category, "name")
        if names.setdefault(category_id, name) != name:
            raise ValueError(
                f"the id {shown(category_id)} is that of category {names[category_id]!r} already: give {name!r} its own"
            )

    _each(data, "categories", file, take)
    if not names:
        raise ValueError(f"{file} has no classes: 'categories' is empty")
    return {i: names[i] for i in sorted(names, key=lambda i: (isinstance(i, str), i))}


def _images(data: dict[str, Any], file: Place) -> tuple[list[Image], dict[Id, Image]]:
    """The images, each file once, and by each id that it has."""
    by_name: dict[str, Image] = {}
    by_id: dict[Id, Image] = {}

    def take(entry: dict[str, Any]) -> None:
        image_id = _id_of(entry, "id")
        name = posixpath.normpath(_text_of(entry, "file_name").replace("\\", "/"))
        hw = (_size_of(entry, "height"), _size_of(entry, "width"))
        declared_hw = hw if all(hw) else None
        image = by_name.setdefault(name, Image(name, declared_hw))
        if declared_hw and image.declared_hw and declared_hw != image.declared_hw:
            raise ValueError(f"{name} is listed before with another size: leave the wrong one out")
        image.declared_hw = image.declared_hw or declared_hw
        other = by_id.setdefault(image_id, image)
        if other is not image:
            raise ValueError(
                f"the id {shown(image_id)} is that of {other.name} already, and this is {name}: "
                "it is unclear which of them the annotations belong to; give each image its own id"
            )

    _each(data, "images", file, take)
    return list(by_name.values()), by_id


def _is_there(place: Place) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _points_of(data: dict[str, Any], task: str) -> str | None:
    """The key of an annotation that is kept with its box; None for none.

    Detect keeps polygons as ``convert_coco(use_segments=True)`` does, which gives an object without one its box as one.
    """
    annotations = data.get("annotations")
    if task == "detect" and isinstance(annotations, list) and any(map(_has_outline, annotations)):
        return "segmentation"
    return {"segment": "segmentation", "pose": "keypoints"}.get(task)


def _has_outline(annotation: Any) -> bool:
    try:
        return (
            isinstance(annotation, dict)
            and has_outline(annotation)
            and not _is_crowd(annotation.get("iscrowd"))
        )
    except ValueError:  # reported when the annotation is read
        return False


def _image_folder(names: list[str], file: Place, root: Place) -> Place:
    stem = file.stem.removeprefix("instances_").removeprefix("person_keypoints_")
    split = next((s for s in SPLITS if stem.startswith(s)), stem)
    places = [
        root / stem,
        root / "images" / stem,
        root / split,
        root / "images" / split,
        root / "images",
        file.parent,
        root,
    ]
    if root.name == "annotations":
        # the JSON itself was named: its images are one level up
        places += [root.parent / place.relative_to(root) for place in places[:5]]  # type: ignore[arg-type]
    for place in places:
        if any(_is_there(place / name) for name in names):
            return place
    tried = ", ".join(dict.fromkeys(str(place) for place in places))
    raise SplitMissingError(f"{file}: images such as {names[0]} are in none of {tried}")
