"""Ultralytics ``data.yaml`` with a ``.txt`` of labels for each image. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

    data.yaml               path: .   train: images/train   val: images/val   names: [cat, dog]
    images/train/a.jpg      labels/train/a.txt   lines "class cx cy w h" or "class x1 y1 x2 y2 x3 y3 ..." over width/height

Paths are resolved as Ultralytics does (``check_det_dataset``, ``BaseDataset.get_img_files``, ``img2label_paths`` of 8.4).
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raypar.dataset.formats import IMAGE_SUFFIXES, SPLITS, Labels, Listing, Record, check_table, without_duplicates

TOLERANCE = 0.01  # how far outside [0, 1] a coordinate may lie: ultralytics.data.utils.verify_image_label


def scan(source: str) -> Listing:
    """Lists the images of a ``data.yaml``.

    Raises:
        ValueError: the file is missing or wrong, a split's path is missing or has no images, or no label file is found.
    """
    file = _yaml_file(Path(source).expanduser().absolute())
    data = _load(file)
    class_names = _class_names(data, file)
    root = _root(data.get("path"), file)
    splits = {split: _records(data[split], root, split, file) for split in SPLITS if data.get(split)}
    records = [record for split in splits.values() for record in split]
    if not any(Path(record.labels).is_file() for record in records):
        raise ValueError(f"{file}: no image has labels; the first image's were looked for in {records[0].labels}")
    return Listing(class_names, splits)


def read_labels(record: Record, num_classes: int, image_hw: tuple[int, int]) -> Labels:
    """Parses a label file; no file means no labels. Polygons become their bounding boxes.

    Raises:
        ValueError: what Ultralytics calls a corrupt label file, with the reason.
    """
    file = Path(record.labels)
    if not file.is_file():
        return Labels(np.zeros(0, np.int64), np.zeros((0, 4)))
    lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    is_polygons = any(len(line) > 6 for line in lines)
    for line in lines:
        if is_polygons and len(line) == 5:
            raise ValueError("labels mix lines of boxes and of polygons")
        if len(line) < 5 or len(line) % 2 == 0:
            raise ValueError(f"a label line has {len(line)} columns: {' '.join(line)[:60]!r}")
    try:
        rows = [tuple(float(value) for value in line) for line in lines]
    except ValueError as error:
        raise ValueError(f"a label line holds something that is not a number ({error})") from error
    unique = without_duplicates(rows)
    table = np.asarray([_box(row) if is_polygons else row for row in unique], np.float64).reshape(-1, 5)
    check_table(table, num_classes)
    boxes = table[:, 1:]
    if len(boxes) and boxes.max() > 1 + TOLERANCE:
        raise ValueError(f"coordinate {boxes.max():g} is above 1: labels must be divided by the image's width and height")
    if len(boxes) and (boxes.min() < -TOLERANCE or boxes[:, 2:].min() < 0):
        raise ValueError(f"coordinate {boxes.min():g} is negative")
    return Labels(table[:, 0].astype(np.int64), boxes, len(rows) - len(unique))


def label_path(image_path: str) -> str:
    """The label file of an image: the last folder called ``images`` becomes ``labels``, the suffix ``.txt``."""
    path = Path(image_path)
    folders = list(path.parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return str(Path(*folders, path.stem + ".txt"))


def _box(row: tuple[float, ...]) -> tuple[float, ...]:
    """(class, x, y, x, y, ...) -> (class, cx, cy, w, h), as ``ultralytics.utils.ops.segments2boxes``."""
    x, y = row[1::2], row[2::2]
    return row[0], (min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)


def _yaml_file(source: Path) -> Path:
    if source.is_dir():
        found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
        found = [file for file in found if file.name == "data.yaml"] or found
        if len(found) != 1:
            raise ValueError(f"prepare.source {source} is a folder with {len(found)} yaml files: name the data.yaml")
        return found[0]
    if not source.is_file():
        raise ValueError(f"prepare.source {source} does not exist")
    return source


def _load(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold keys and values (path, train, val, names), not {type(data).__name__}")
    if data.get("kpt_shape"):  # their lines would pass for polygons
        raise ValueError(f"{file}: 'kpt_shape' says that the labels are keypoints; prepare reads boxes and polygons only")
    if "val" not in data and "validation" in data:
        data["val"] = data["validation"]
    for key in ("train", "val"):
        if not data.get(key):
            raise ValueError(f"{file} has no '{key}': Ultralytics' data.yaml names the images of train and val")
    for key in SPLITS:
        value = data.get(key)
        if value and not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError(f"{file}: '{key}' must be a path or a list of paths, not {value!r}")
    return data


def _class_names(data: dict[str, Any], file: Path) -> tuple[str, ...]:
    names, num_classes = data.get("names"), data.get("nc")
    if names is None and isinstance(num_classes, int) and num_classes > 0:
        names = [f"class_{i}" for i in range(num_classes)]
    if not names or not isinstance(names, list | dict):
        raise ValueError(f"{file} has no classes: write them as 'names: [cat, dog]'")
    if isinstance(names, dict):
        try:
            by_id = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: the keys of 'names' must be 0, 1, 2 ...") from error
        if sorted(by_id) != list(range(len(names))):
            raise ValueError(f"{file}: the keys of 'names' must be 0 to {len(names) - 1} without a gap")
        names = [by_id[i] for i in range(len(by_id))]
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{file}: 'nc: {num_classes}' but 'names' has {len(names)} entries")
    return tuple(str(name) for name in names)


def _root(path: object, file: Path) -> Path:
    """The dataset's folder: ``path`` from the yaml's folder, then the working directory, then Ultralytics' datasets folder."""
    if not path:
        return file.parent
    root = Path(str(path)).expanduser()
    for base in (file.parent, Path.cwd()):
        if (base / root).exists():
            return (base / root).resolve()
    if not root.is_absolute():
        from ultralytics.utils import DATASETS_DIR

        if (DATASETS_DIR / root).exists():
            return Path(DATASETS_DIR / root).resolve()
        raise ValueError(f"{file}: path '{path}' is neither in {file.parent}, nor in {Path.cwd()}, nor in {DATASETS_DIR}")
    raise ValueError(f"{file}: path '{path}' does not exist")


def _records(value: str | list[str], root: Path, split: str, file: Path) -> list[Record]:
    roots: list[Path] = []
    images: list[str] = []
    for entry in [value] if isinstance(value, str) else value:
        for place in _places(entry, root, split, file):
            if place.is_dir():
                found = glob.glob(str(Path(glob.escape(str(place))) / "**" / "*.*"), recursive=True)  # noqa: PTH207 (as Ultralytics)
                roots.append(place)
            elif place.suffix.lower() in IMAGE_SUFFIXES:
                found = [str(place)]
            else:
                found = _listed(place, root)
            images += [path for path in found if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{file}: '{split}' ({value}) has no images")
    inside = len(roots) > 0 and all(any(Path(path).is_relative_to(r) for r in roots) for path in images)
    top = os.path.commonpath([str(r) for r in roots] if inside else [str(Path(path).parent) for path in images])
    return [Record(Path(os.path.relpath(path, top)).as_posix(), path, label_path(path)) for path in sorted(images)]


def _places(entry: str, root: Path, split: str, file: Path) -> list[Path]:
    path = Path(os.path.normpath(root / Path(entry).expanduser()))
    if not path.exists() and entry.startswith("../"):
        path = Path(os.path.normpath(root / entry[3:]))  # Roboflow writes ../train/images for train/images
    if path.exists():
        return [path.resolve()]
    if any(sign in entry for sign in "*?["):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        if found:
            return [Path(place).resolve() for place in found]
    raise ValueError(f"{file}: '{split}' points to {path}, which does not exist")


def _listed(file: Path, root: Path) -> list[str]:
    """Images named in a text file, one a line: ``./`` is the file's folder, other relative paths start in the working directory or root."""
    paths = []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        name = line.strip()
        if not name:
            continue
        bases = [file.parent] if name.startswith("./") else [Path.cwd(), root, file.parent]
        places = [os.path.normpath(base / name) for base in bases]
        paths.append(next((place for place in places if Path(place).exists()), places[0]))
    return paths
