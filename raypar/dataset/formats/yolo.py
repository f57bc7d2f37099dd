"""Ultralytics ``data.yaml`` with a ``.txt`` of labels for each image. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

    data.yaml               path: .   train: images/train   val: images/val   names: [cat, dog]
    images/train/a.jpg      labels/train/a.txt   lines "class cx cy w h" or "class x1 y1 x2 y2 x3 y3 ..." over width/height,
                            or with "kpt_shape: [17, 3]" in data.yaml "class cx cy w h x1 y1 v1 x2 y2 v2 ..."

Paths are resolved as Ultralytics does (``check_det_dataset``, ``BaseDataset.get_img_files``, ``img2label_paths`` of 8.4).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from raypar import strict_yaml
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
    as_corners,
    as_text,
    boxes_around,
    check_table,
    matching,
    optional_test,
    read_label_file,
    read_text,
    some_of,
    visible,
    wanted,
    without_duplicates,
)
from raypar.dataset.formats.numbers import is_absent, shown, whole
from raypar.dataset.records import Records
from raypar.dataset.remote import Place, RemotePath, contents, fs_path, local_path, place_of

MAX_CLASSES = 1 << 20
NUM_PROBES = 20  # images of a list that are looked for
TOLERANCE = 0.01  # how far outside [0, 1] a coordinate may lie: ultralytics.data.utils.verify_image_label


class Loader(strict_yaml.Loader):
    """Every scalar is the text that is written: ``off``, ``null``, ``1.0`` and ``2024-01-01`` may be names of classes or folders."""


Loader.yaml_implicit_resolvers = {"<": strict_yaml.Loader.yaml_implicit_resolvers["<"]}


def scan(source: str | Place, task: str = "auto", wish: str | None = None) -> Listing:
    """Lists the images of a ``data.yaml``.

    Args:
        source: the file, or its folder.
        task: of ``raypar.dataset.schema.TASKS``; auto: pose where the file has ``kpt_shape``, else ``wish`` if the labels allow it,
            else detect.
        wish: the task that the model is for, if that is known.

    Raises:
        ValueError: the file is missing or wrong, a split's path is missing or has no images, or no label file is found.
    """
    file = _yaml_file(place_of(source))
    data = _load(file)
    class_names = _class_names(data, file)
    keypoint_shape, flip_idx = _keypoints(data, file)
    if task == "pose" and not keypoint_shape:
        raise ValueError(
            f"{file} has no 'kpt_shape': for pose write how many keypoints there are, e.g. 'kpt_shape: [17, 3]'; "
            "for boxes alone set prepare.task=detect"
        )
    root = _root(data.get("path"), file)
    notes: list[str] = []
    named = [split for split in SPLITS if data.get(split)]
    splits = optional_test(lambda split: _records(data[split], root, split, file), named, notes)
    if not any(_place(record.labels, file).is_file() for records in splits.values() for record in records):
        raise ValueError(
            f"{file}: no image has labels; the first image's were looked for in {next(iter(splits.values()))[0].labels}"
        )
    if task == "auto":
        has_polygons = wish in ("segment", "obb") and _has_polygons(splits["train"], file)
        task = "pose" if keypoint_shape else str(wish) if has_polygons else "detect"
    if task == "pose" and not flip_idx:
        notes.append(f"{file.name} has no 'flip_idx': images are not mirrored in training")
    return Listing(class_names, splits, tuple(notes), task, keypoint_shape, flip_idx)


def read_labels(record: Record, num_classes: int, image_hw: tuple[int, int], task: str = "detect",
                keypoint_shape: tuple[int, int] | None = None, fetched: Fetched | None = None) -> Labels:  # fmt: skip
    """Parses a label file; no file means no labels. For detect, boxes are those around polygons, which are kept; keypoints are left out.

    Raises:
        ValueError: what Ultralytics calls a corrupt label file, with the reason; or boxes where the task needs polygons.
    """
    data = read_label_file(record.labels, fetched)
    if data is None:
        return Labels.none(task, keypoint_shape)
    lines = [line.split() for line in as_text(data).splitlines() if line.strip()]
    num_columns = 5 + keypoint_shape[0] * keypoint_shape[1] if keypoint_shape else 0
    if keypoint_shape and task != "pose":
        lines = [line[:5] if len(line) == num_columns else line for line in lines]
    is_polygons = task != "pose" and any(len(line) > 6 for line in lines)
    _check_columns(lines, is_polygons, num_columns if task == "pose" else None)
    if lines and not is_polygons and task in ("segment", "obb"):
        raise ValueError(
            f"labels are boxes, prepare.task={task} needs {'polygons' if task == 'segment' else 'four corners'}: "
            "set prepare.task=detect and train a detect model"
        )
    try:
        rows = [tuple(float(value) for value in line) for line in lines]
    except ValueError as error:
        raise ValueError(f"a label line holds something that is not a number ({error})") from error
    unique = without_duplicates(rows)
    polygons = [np.asarray(row[1:], np.float64).reshape(-1, 2) for row in unique] if is_polygons else []
    boxes = (
        boxes_around(polygons)
        if is_polygons
        else np.asarray([row[1:5] for row in unique], np.float64).reshape(-1, 4)
    )
    table = np.concatenate([np.asarray([row[0] for row in unique], np.float64)[:, None], boxes], axis=1)
    check_table(table, num_classes)
    _check_range(boxes)
    keypoints = None
    if task == "pose" and keypoint_shape:
        keypoints = _with_visibility(
            np.asarray([row[5:] for row in unique], np.float64).reshape(-1, *keypoint_shape)
        )
    segments = None
    if task == "obb":
        segments = tuple(as_corners(polygon, image_hw) for polygon in polygons)
    elif task == "segment" or is_polygons:
        segments = tuple(polygons)
    return Labels(table[:, 0].astype(np.int64), boxes, len(rows) - len(unique), segments, keypoints)


def _check_columns(lines: list[list[str]], is_polygons: bool, num_columns: int | None) -> None:
    for line in lines:
        if num_columns is not None and len(line) != num_columns:
            raise ValueError(
                f"a label line has {len(line)} columns, 'kpt_shape' asks for {num_columns}: {' '.join(line)[:60]!r}"
            )
        if is_polygons and len(line) == 5:
            raise ValueError("labels mix lines of boxes and of polygons")
        if num_columns is None and (len(line) < 5 or len(line) % 2 == 0):
            raise ValueError(f"a label line has {len(line)} columns: {' '.join(line)[:60]!r}")


def _check_range(boxes: NDArray[np.float64], what: str = "coordinate") -> None:
    """Boxes (N, 4) or points (N, 2), which must lie in [0, 1] but for a hundredth."""
    if boxes.size and boxes.max() > 1 + TOLERANCE:
        raise ValueError(
            f"{what} {boxes.max():g} is above 1: labels must be divided by the image's width and height"
        )
    if boxes.size and (boxes.min() < -TOLERANCE or (boxes.shape[1] == 4 and boxes[:, 2:].min() < 0)):
        raise ValueError(f"{what} {boxes.min():g} is negative")


def _with_visibility(keypoints: NDArray[np.float64]) -> NDArray[np.float64]:
    """Checked keypoints (N, K, D) as (N, K, 3); without a visibility those with a negative coordinate are invisible."""
    if not np.isfinite(keypoints).all():
        raise ValueError("labels hold a value that is not a finite number")
    _check_range(keypoints[..., :2].reshape(-1, 2), "keypoint")
    if keypoints.shape[2] == 3:
        if keypoints.size and keypoints[..., 2].min() < 0:
            raise ValueError(f"visibility {keypoints[..., 2].min():g} is negative")
        return keypoints
    return np.concatenate([keypoints, (keypoints >= 0).all(-1, keepdims=True)], axis=-1)


def label_path(image_path: str) -> str:
    """The label file of an image: the last folder called ``images`` becomes ``labels``, the suffix ``.txt``."""
    folder, slash, name = image_path.rpartition("/")
    folders = folder.split("/")
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return "/".join(folders) + slash + os.path.splitext(name)[0] + ".txt"  # noqa: PTH122 (a million of them: without a Path each)


def _yaml_file(source: Place) -> Place:
    wanted.check(source, "yolo")
    if source.is_dir():
        found = [file for file in visible(source) if file.suffix.lower() in (".yaml", ".yml")]
        found = [file for file in found if file.name == "data.yaml"] or found
        if len(found) != 1:
            if found:
                names = ", ".join(file.name for file in found[:5])
                raise ValueError(
                    f"prepare.source {source} is a folder with {len(found)} yaml files ({names}): name the one that is meant"
                )
            raise wanted.wrong(source, "yolo", "is a folder with 0 yaml files")
        return found[0]
    return source


def _has_polygons(records: Sequence[Record], file: Place) -> bool:
    """Whether the labels are polygons: those of the first image that has any."""
    for data in contents((_place(record.labels, file) for record in records), MAX_LABEL_BYTES):
        widths = [len(line.split()) for line in (data or b"").splitlines()]
        if any(widths):
            return max(widths) > 6
    return False


def _load(file: Place) -> dict[str, Any]:
    try:
        data = yaml.load(file.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise wanted.wrong(file, "yolo", f"is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise wanted.wrong(file, "yolo", "holds no keys and values (path, train, val, names)")
    data = {key: None if is_absent(value) else value for key, value in data.items()}
    if not data.get("val"):
        data["val"] = data.get("validation")
    if not data.get("train"):
        raise ValueError(f"{file} has no 'train': Ultralytics' data.yaml names the images of train and val")
    for key in SPLITS:
        entries = data.get(key) or []
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(v, str) and not is_absent(v) for v in entries):
            raise ValueError(f"{file}: '{key}' must be a path or a list of paths, not {shown(entries)}")
        data[key] = entries
    channels = 3 if data.get("channels") is None else _whole(data["channels"], "channels", file)
    if channels != 3:
        raise ValueError(
            f"{file}: 'channels: {channels}', and raypar trains on three (RGB): write 'channels: 3' or leave it out"
        )
    return data


def _class_names(data: dict[str, Any], file: Place) -> tuple[str, ...]:
    names = data.get("names")
    num_classes = None if data.get("nc") is None else _whole(data["nc"], "nc", file)
    if num_classes is not None and num_classes > MAX_CLASSES:
        raise ValueError(f"{file}: 'nc: {num_classes}' is more than {MAX_CLASSES} classes")
    if names is None and num_classes:
        names = [f"class_{i}" for i in range(num_classes)]
    if not names or not isinstance(names, list | dict):
        raise ValueError(f"{file} has no classes: write them as 'names: [cat, dog]'")
    if isinstance(names, dict):
        names = _in_order(names, file)
    for class_id, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: class {class_id} of 'names' is {shown(name)}, which is no name")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{file}: 'nc: {num_classes}' but 'names' has {len(names)} entries")
    return tuple(names)


def _in_order(names: dict[str, Any], file: Place) -> list[Any]:
    """Names that are written as {0: cat, 1: dog}, in the order of their keys."""
    by_id: dict[int, Any] = {}
    for key, name in names.items():
        try:
            class_id = whole(key)
        except ValueError as error:
            raise ValueError(f"{file}: the keys of 'names' must be 0, 1, 2 ..., not {shown(key)}") from error
        if class_id in by_id:
            raise ValueError(f"{file}: class {class_id} is written twice in 'names'")
        by_id[class_id] = name
    wrong = sorted(by_id.keys() - range(len(by_id)))
    if wrong:
        raise ValueError(
            f"{file}: the keys of 'names' must be 0 to {len(names) - 1} without a gap, and {some_of(map(str, wrong))} is beyond"
        )
    return [by_id[i] for i in range(len(by_id))]


def _whole(value: Any, key: str, file: Place) -> int:
    try:
        return whole(value)
    except ValueError as error:
        raise ValueError(f"{file}: '{key}': {error}") from error


def _keypoints(data: dict[str, Any], file: Place) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    shape, flip_idx = data.get("kpt_shape") or [], data.get("flip_idx") or []
    if not shape:
        return None, ()
    try:
        if not isinstance(shape, list):
            raise ValueError
        num_keypoints, num_values = map(whole, shape)
        if num_keypoints < 1 or num_values not in (2, 3):
            raise ValueError
    except ValueError as error:
        raise ValueError(
            f"{file}: 'kpt_shape' must be [number of keypoints, 2 or 3], not {shown(shape)}"
        ) from error
    try:
        if not isinstance(flip_idx, list):
            raise ValueError
        flips = tuple(map(whole, flip_idx))
        if flips and sorted(flips) != list(range(num_keypoints)):
            raise ValueError
    except ValueError as error:
        raise ValueError(
            f"{file}: 'flip_idx' must hold each of 0 to {num_keypoints - 1} once, not {shown(flip_idx)}"
        ) from error
    return (num_keypoints, num_values), flips


def _root(path: object, file: Place) -> Place:
    """The dataset's folder: ``path`` from the yaml's folder, then the working directory, then Ultralytics' datasets folder."""
    if not path:
        return file.parent
    if not isinstance(path, str):
        raise ValueError(f"{file}: 'path' must be a folder, not {shown(path)}")
    if isinstance(file, RemotePath):
        root = _joined(file.parent, path, "path", file)
        if not root.is_dir():
            raise ValueError(
                f"{file}: path '{path}' is {root}, which does not exist; without 'path' it is the file's own folder"
            )
        return root
    assert isinstance(file, Path)
    root = local_path(path)
    for base in (file.parent, Path.cwd()):
        if (base / root).exists():
            return (base / root).resolve()
    if not root.is_absolute():
        from ultralytics.utils import DATASETS_DIR

        if (DATASETS_DIR / root).exists():
            return Path(DATASETS_DIR / root).resolve()
        raise ValueError(
            f"{file}: path '{path}' is neither in {file.parent}, nor in {Path.cwd()}, nor in {DATASETS_DIR}: "
            "mend it, or leave 'path' out where the images are beside the file"
        )
    raise ValueError(
        f"{file}: path '{path}' {wanted.absent(root)}: mend it, or leave 'path' out where the images are beside the file"
    )


def _records(entries: list[str], root: Place, split: str, file: Place) -> Records:
    roots: list[Place] = []
    images: list[str] = []
    for entry in entries:
        found: list[str] = []
        places = _places(entry, root, split, file)
        for place in places:
            if place.is_dir():
                found += all_below(place)
                roots.append(place)
            elif place.suffix.lower() in IMAGE_SUFFIXES:
                found.append(str(place))
            elif len(places) == 1 or place.suffix == ".txt":
                found += _listed(place, root, split, file)
        # a pattern such as images/** names folders, and what is in them
        found = found if len(places) == 1 else list(dict.fromkeys(found))
        images += [path for path in found if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122
    if not images:
        raise SplitMissingError(f"{file}: '{split}' ({some_of(entries)}) has no images")
    inside = len(roots) > 0 and all(path.startswith(tuple(f"{r}/" for r in roots)) for path in images)
    folders = [str(r) for r in roots] if inside else [os.path.dirname(path) for path in images]  # noqa: PTH120
    top = os.path.commonpath(folders)
    if isinstance(root, RemotePath):
        top = top.replace(":/", "://", 1)  # as before commonpath
    images.sort()
    return Records.of((Record(_below(path, top), path, label_path(path)) for path in images), label_path)


def _below(path: str, top: str) -> str:
    return path[len(top) + 1 :] if path.startswith(f"{top}/") else Path(os.path.relpath(path, top)).as_posix()


def _places(entry: str, root: Place, split: str, file: Place) -> Sequence[Place]:
    paths = [_joined(root, entry, split, file)]
    if entry.startswith("../"):
        # Roboflow writes ../train/images for train/images
        paths.append(_joined(root, entry[3:], split, file))
    for path in paths:
        if path.exists():
            return [path.resolve() if isinstance(path, Path) else path]
    for path in paths if any(sign in entry for sign in "*?[") else ():
        if found := matching(path):
            return [place.resolve() if isinstance(place, Path) else place for place in found]
    path = paths[0]
    raise SplitMissingError(
        f"{file}: '{split}' points to {path}, which {wanted.absent(path)}: paths start at {root}; mend '{split}' or 'path'"
    )


def _listed(file: Place, root: Place, split: str, yaml_file: Place) -> list[str]:
    """Images named in a text file, one a line: ``./`` is the file's folder, other relative paths start in the working directory or root."""
    paths = []
    for line in read_text(file).splitlines():
        name = line.strip()
        if not name:
            continue
        if isinstance(file, RemotePath):
            bases: list[Place] = [file.parent] if name.startswith("./") else [root, file.parent]
            found = [_joined(base, name, split, yaml_file) for base in bases]
            paths.append(str(next((place for place in found if place.is_file()), found[0])))
            continue
        assert isinstance(file, Path)
        assert isinstance(root, Path)
        places = [
            os.path.normpath(base / name)
            for base in ([file.parent] if name.startswith("./") else [Path.cwd(), root, file.parent])
        ]
        paths.append(next((place for place in places if Path(place).exists()), places[0]))
    if paths and not any(_place(path, file).is_file() for path in paths[:NUM_PROBES]):
        raise SplitMissingError(
            f"{yaml_file}: '{split}' is {file}, and none of the first images that it names is there, e.g. {paths[0]}"
        )
    return paths


def _joined(root: Place, entry: str, key: str, file: Place) -> Place:
    """A path of a ``data.yaml``. In a store, one from the root of a disk leads nowhere."""
    if isinstance(root, Path):
        return Path(os.path.normpath(root / local_path(entry)))
    if entry.startswith(f"{root.tree.scheme}://") and not root.path.startswith("/"):
        return _place(entry, root)
    if "://" in entry or entry.startswith(("/", "~")):
        raise ValueError(
            f"{file}: '{key}' names {entry}, which is not in this store: write it relative to the file, or leave 'path' out"
        )
    return root / entry


def _place(path: str, beside: Place) -> Place:
    """A path as records have it, in the store of another."""
    return RemotePath(beside.tree, fs_path(path)) if isinstance(beside, RemotePath) else Path(path)
