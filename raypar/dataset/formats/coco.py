"""COCO JSON. ``scan`` (driver) reads the boxes too; ``read_labels`` (Ray task) only checks and scales them.

    annotations/instances_{train,val,test}*.json   images in train2017/, images/train2017/, train/, images/train/ or images/

or the layout that Roboflow exports, ``{train,valid,test}/_annotations.coco.json`` beside the images, or a single JSON (all of it train).
For pose the first is called person_keypoints_{train,val,test}*.json, or as above. Boxes are [left, top, width, height] in px; crowds are left out; category ids become 0, 1, 2 ... in the order of the ids.
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

from raypar.dataset.formats import (
    SPLITS,
    Labels,
    Listing,
    Record,
    check_declared_size,
    labels_from_xyxy,
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
from raypar.dataset.remote import Place, place_of

NUM_PROBES = 20  # images looked for in each folder that may hold a split


def scan(source: str | Place, task: str = "auto") -> Listing:
    """Lists the images of a COCO folder or JSON file.

    Args:
        source: the folder or file.
        task: detect (also for auto), segment or pose.

    Raises:
        ValueError: a file is missing or wrong, splits disagree about the classes, or the images are not found.
    """
    path = place_of(source)
    wanted.check(path, "coco")
    notes: list[str] = []
    classes: dict[int, str] = {}
    splits = {}
    task = "detect" if task == "auto" else task
    keypoint_shape: tuple[int, int] | None = None
    flip_idx: tuple[int, ...] = ()
    for split, file in ({"train": path} if path.is_file() else _split_files(path, task)).items():
        data = _load(file)
        categories = _categories(data, file)
        if classes and categories != classes:
            raise ValueError(f"{file}: its categories are not those of train")
        classes = categories
        if task == "pose":
            found = keypoints_of(data["categories"], file)
            if keypoint_shape and found != (keypoint_shape, flip_idx):
                raise ValueError(f"{file}: its keypoints are not those of train")
            keypoint_shape, flip_idx = found
        splits[split] = _records(data, file, path if path.is_dir() else file.parent, classes, notes, task)
    if task == "pose" and not flip_idx:
        notes.append("no keypoint is called left or right: images are not mirrored in training")
    if path.is_file():
        notes.append(
            f"{path} is a single JSON, all of it train: training needs a val split too, so name the folder that has both"
        )
    return Listing(
        tuple(classes[i] for i in sorted(classes)), splits, tuple(notes), task, keypoint_shape, flip_idx
    )


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
        try:
            left, top, width, height = (float(value) for value in box)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"bbox is {repr(box)[:60]}, not four numbers") from error
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
    except ValueError as error:
        raise wanted.wrong(file, "coco", f"is not JSON ({error})") from error
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("images"), list)
        or not isinstance(data.get("categories"), list)
    ):
        raise ValueError(
            f"{file} is not a COCO file: it needs the lists 'images', 'annotations' and 'categories'"
        )
    if not data["images"]:
        raise ValueError(f"{file} has no images")
    return data


def _categories(data: dict[str, Any], file: Place) -> dict[int, str]:
    try:
        categories = {int(c["id"]): str(c["name"]) for c in data["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: each category needs an 'id' (a whole number) and a 'name'") from error
    if not categories:
        raise ValueError(f"{file} has no classes: 'categories' is empty")
    return categories


def _records(
    data: dict[str, Any], file: Place, root: Place, classes: dict[int, str], notes: list[str], task: str
) -> list[Record]:
    class_ids = {category: class_id for class_id, category in enumerate(sorted(classes))}
    boxes: dict[Any, list[tuple[Any, ...]]] = {}
    try:
        points = _points_of(data, task)
        for image in data["images"]:
            boxes[image["id"]] = []
        num_unknown = num_without = 0
        for annotation in data.get("annotations") or ():
            if annotation.get("iscrowd"):
                continue
            if annotation["image_id"] not in boxes:
                num_unknown += 1
                continue
            if task == "pose" and not has_keypoints(annotation):
                num_without += 1
                continue
            # -1 is refused by read_labels, and the image with it
            class_id = class_ids.get(annotation["category_id"], -1)
            more = [compact(annotation.get(points))] if points else []
            boxes[annotation["image_id"]].append((class_id, annotation.get("bbox"), *more))
        folder = _image_folder([image["file_name"] for image in data["images"][:NUM_PROBES]], file, root)
        records = []
        for image in data["images"]:
            name = posixpath.normpath(str(image["file_name"]).replace("\\", "/"))
            declared_hw = (int(image.get("height") or 0), int(image.get("width") or 0))
            records.append(
                Record(
                    name, str(folder / name), (declared_hw if all(declared_hw) else None, boxes[image["id"]])
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a COCO file: an image or annotation lacks or misuses {error}"
        ) from error
    if num_unknown:
        notes.append(f"{file.name}: {num_unknown} annotations of images that it does not list were left out")
    if num_without:
        notes.append(
            f"{file.name}: {num_without} annotations without a labelled keypoint were left out, as COCO's evaluation does"
        )
    return records


def _points_of(data: dict[str, Any], task: str) -> str | None:
    """The key of an annotation that is kept beside its box; None for none.

    Detect keeps polygons as ``convert_coco(use_segments=True)`` does, which gives an object without one its box as one.
    """
    if task == "detect" and any(map(has_outline, data.get("annotations") or ())):
        return "segmentation"
    return {"segment": "segmentation", "pose": "keypoints"}.get(task)


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
        if any((place / name.replace("\\", "/")).is_file() for name in names):
            return place
    tried = ", ".join(dict.fromkeys(str(place) for place in places))
    raise ValueError(f"{file}: images such as {names[0]} are in none of {tried}")
