"""Label formats: one module each, with a pure ``scan`` (driver) and ``read_labels`` (Ray task)."""

from __future__ import annotations

import fnmatch
import glob
import heapq
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypar.dataset.remote import Place, RemotePath, Tree, is_hidden

SPLITS = ("train", "val", "test")
# What Ultralytics lists as images, raypar lists.
IMAGE_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".dng",
        ".heic",
        ".heif",
        ".jp2",
        ".jpeg",
        ".jpeg2000",
        ".jpg",
        ".mpo",
        ".png",
        ".tif",
        ".tiff",
        ".webp",
    }
)
MAX_VALUE = 1e9  # of a coordinate or class id
MAX_LABEL_BYTES = 32 << 20  # of a label file: a million boxes
# Files of a store that were read ahead, by path: bytes, nothing where there is no such file, or what is wrong with it.
Fetched = Mapping[str, bytes | ValueError | None]


@dataclass(frozen=True)
class Record:
    """One image and where its labels are.

    Attributes:
        image_id: path relative to its split's image root, forward slashes.
        image_path: absolute local path, or ``s3://bucket/folder/name`` without options; empty when the image is generated.
        labels: what the format's ``read_labels`` needs: a path, the boxes themselves, an index.
    """

    image_id: str
    image_path: str
    labels: Any = None


@dataclass(frozen=True)
class Listing:
    """All that a source holds, before any image is opened.

    Attributes:
        class_names: by class id.
        splits: records of each split, in any order.
        notes: sentences for the user, about choices made for them.
        task: of ``raypar.dataset.schema.TASKS``.
        keypoint_shape: pose: (K, D), keypoints of an instance and numbers of each (x, y and perhaps visibility).
        flip_idx: pose: where each keypoint of a mirrored image comes from; empty where the source does not say.
        tree: where the files are, if not on a disk; it knows their sizes.
        is_val_drawn: whether val was drawn from the images of train, because the source has no val split.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Record]]
    notes: tuple[str, ...] = ()
    task: str = "detect"
    keypoint_shape: tuple[int, int] | None = None
    flip_idx: tuple[int, ...] = ()
    tree: Tree | None = None
    is_val_drawn: bool = False


class SplitMissingError(ValueError):
    """A split that the source names has no images, or they are not there."""


@dataclass(frozen=True)
class Labels:
    """Labels of one image as the source states them: not yet clipped to the image.

    Attributes:
        class_ids: int64 (N,).
        boxes_xywhn: float64 (N, 4) centre x, centre y, width, height over the image's width/height.
        num_duplicates: labels that were equal to another and left out.
        segments_xyn: segment and obb: N polygons float64 (P, 2), x, y over the image's width/height; P is 4 for obb.
            Detect: the same where the source has polygons, else None.
        keypoints: pose: float64 (N, K, 3), x, y over the image's width/height, visibility (0: not labelled).
    """

    class_ids: NDArray[np.int64]
    boxes_xywhn: NDArray[np.float64]
    num_duplicates: int = 0
    segments_xyn: tuple[NDArray[np.float64], ...] | None = None
    keypoints: NDArray[np.float64] | None = None

    @classmethod
    def none(cls, task: str = "detect", keypoint_shape: tuple[int, int] | None = None) -> Labels:
        """An image without labels."""
        keypoints = np.zeros((0, keypoint_shape[0], 3)) if task == "pose" and keypoint_shape else None
        return cls(
            np.zeros(0, np.int64), np.zeros((0, 4)), 0, () if task in ("segment", "obb") else None, keypoints
        )


def names_below(folder: str) -> Iterator[str]:
    """Paths of all that lies below a folder and has a suffix, in any order; hidden names are left out, links to folders followed.

    A folder that is reached more than once, by a link to a folder above it or by several links, is listed once, under its own
    name where that lies below the folder.

    Raises:
        ValueError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    folders = [folder]
    links: list[str] = []
    while folders or links:
        here = folders.pop() if folders else heapq.heappop(links)
        try:
            info = Path(here).stat()
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if "." in entry.name:
                        yield entry.path
                    if not _is_folder(entry):
                        continue
                    if entry.is_symlink():
                        heapq.heappush(links, entry.path)
                    else:
                        folders.append(entry.path)
        except OSError as error:
            raise ValueError(f"folder {here} cannot be read ({error.strerror or error})") from error


def all_below(place: Place) -> Iterator[str]:
    """``names_below`` of a folder, wherever it is."""
    return names_below(str(place)) if isinstance(place, Path) else place.names_below()


def visible(folder: Place) -> list[Place]:
    """What lies in a folder, but for hidden names, in the order of the names."""
    return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))  # type: ignore[type-var]


def matching(pattern: Place) -> list[Place]:
    """Files and folders that a path stands for as a pattern, as ``glob.glob`` has it.

    A part that exists is that name, whatever characters it has. ``**`` stands for a folder with all below it: the folder itself
    where it is the last part, and the folders below it that are no links otherwise.
    """
    if isinstance(pattern, Path):
        found: list[Place] = [Path(pattern.anchor)]
        parts = pattern.parts[1:]
    else:
        found = [RemotePath(pattern.tree, "/" if pattern.path.startswith("/") else "")]
        parts = tuple(pattern.path.strip("/").split("/"))
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        found = [place for above in found for place in _matching_part(above, part, is_last=is_last)]
    return sorted({place for place in found if place.exists()})  # type: ignore[type-var]


def _matching_part(above: Place, part: str, *, is_last: bool) -> list[Place]:
    if not glob.has_magic(part) or (above / part).exists():
        return [above / part]
    if not above.is_dir():
        return []
    if part == "**":
        return [above] if is_last else _folders_below(above)
    is_wanted = re.compile(fnmatch.translate(part)).match
    if part.startswith("."):
        return [place for place in above.iterdir() if is_wanted(place.name)]
    return [place for place in visible(above) if is_wanted(place.name)]


def _folders_below(folder: Place) -> list[Place]:
    """A folder and all below it that are neither hidden nor links."""
    if isinstance(folder, RemotePath):
        return [RemotePath(folder.tree, path) for path, _ in folder.tree.below(folder.path)]
    found: list[Place] = [folder]
    for place in visible(folder):
        if isinstance(place, Path) and place.is_dir() and not place.is_symlink():
            found += _folders_below(place)
    return found


def optional_test(
    read: Callable[[str], Sequence[Record]], splits: Iterable[str], notes: list[str]
) -> dict[str, Sequence[Record]]:
    """The records of each split; training reads no test split, so a missing one is a note and not an error."""
    found = {}
    for split in splits:
        try:
            found[split] = read(split)
        except SplitMissingError as error:
            if split == "val":
                raise SplitMissingError(
                    f"{error} (without val in the source, prepare.val_fraction draws one from train)"
                ) from error
            if split != "test":
                raise
            notes.append(f"there is no test split: {error}")
    return found


def hold_out(
    records: Sequence[Record], share: float, seed: Sequence[int], *, at_least: int = 1
) -> tuple[list[int], list[int]]:
    """Draws a share of the images for val; those with the same label file, or listed more than once, stay together.

    Returns:
        Indices of the records of train and of val, ascending; at least one image stays in train.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(label_file(record) or record.image_path, []).append(index)
    order = np.random.default_rng(seed).permutation(len(groups))
    num_val = min(max(at_least, round(share * len(groups))), max(len(groups) - 1, 0))
    members = list(groups.values())
    train = sorted(index for group in order[num_val:] for index in members[group])
    val = sorted(index for group in order[:num_val] for index in members[group])
    return train, val


def some_of(names: Iterable[str], limit: int = 5) -> str:
    """The first of some names, for a message."""
    listed = list(names)
    more = f" ... {len(listed)} in all" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def label_file(record: Record) -> str | None:
    """The file that has a record's labels, where they are in one of their own."""
    # of coco and folders: no path
    labels = record.labels[0] if isinstance(record.labels, tuple) else record.labels
    return labels if isinstance(labels, str) else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_label_file(path: str | Path, fetched: Fetched | None = None) -> bytes | None:
    """A label file's bytes; None where there is no file of that name (a folder or a pipe is none).

    Raises:
        ValueError: it is too large to be labels of one image.
        OSError: it cannot be read.
    """
    if fetched is not None:
        found = fetched[str(path)]
        if isinstance(found, ValueError):
            raise ValueError(f"label {found}")
        return found
    file = Path(path)
    if not file.is_file():
        return None
    if (num_bytes := file.stat().st_size) > MAX_LABEL_BYTES:
        raise ValueError(f"label file has {num_bytes >> 20} MB, more than {MAX_LABEL_BYTES >> 20}")
    return file.read_bytes()


def read_text(place: Place) -> str:
    """A small file of a source: UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: it is something else.
    """
    try:
        return place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not text in UTF-8") from error


def as_text(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: it is something else.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("labels are not text in UTF-8") from error


def without_duplicates(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The rows, each once, in the order of their first appearance; equal means equal as float32, as in Ultralytics."""
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite
        unique = {np.asarray(row, np.float32).tobytes(): row for row in reversed(rows)}
    return list(reversed(unique.values()))


def labels_from_xyxy(rows: list[tuple[float, ...]], num_classes: int, image_hw: tuple[int, int], *,
                     keep_duplicates: bool = False) -> Labels:  # fmt: skip
    """Labels from rows of (class id, x1, y1, x2, y2) in px.

    Raises:
        ValueError: a class id outside ``range(num_classes)``, or a coordinate that is not a number.
    """
    unique = rows if keep_duplicates else without_duplicates(rows)
    table = np.asarray(unique, np.float64).reshape(-1, 5)
    check_table(table, num_classes)
    height, width = image_hw
    x1, y1, x2, y2 = table[:, 1:].T
    boxes = np.stack(
        [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], axis=1
    )
    return Labels(table[:, 0].astype(np.int64), boxes, len(rows) - len(unique))


def boxes_around(polygons: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Upright boxes around polygons (P, 2), as ``ultralytics.utils.ops.segments2boxes``: float64 (N, 4), centre and size."""
    low, high = (
        np.array([f(polygon, axis=0) for polygon in polygons]).reshape(-1, 2) for f in (np.min, np.max)
    )
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is for check_table to refuse
        return np.concatenate([(low + high) / 2, high - low], axis=1)


def as_corners(polygon: NDArray[np.float64], image_hw: tuple[int, int]) -> NDArray[np.float64]:
    """The four corners of a rotated box; other polygons become the smallest rotated box around them. Normalised float64 (4, 2)."""
    if len(polygon) == 4:
        return polygon
    import cv2

    wh = np.array(image_hw[::-1], np.float64)
    return np.asarray(cv2.boxPoints(cv2.minAreaRect((polygon * wh).astype(np.float32))), np.float64) / wh


def check_table(table: NDArray[np.float64], num_classes: int) -> None:
    """Checks rows of (class id, 4 coordinates), float64 (N, 5).

    Raises:
        ValueError: a value that is not finite, or a class id that is no class.
    """
    if not (np.abs(table) < MAX_VALUE).all():  # nor NaN
        raise ValueError("labels hold a value that is not a finite number, or is beyond all measure")
    ids = table[:, 0]
    wrong = ids[(ids < 0) | (ids >= num_classes) | (ids % 1 != 0)]
    if len(wrong):
        raise ValueError(
            f"class {wrong[0]:g} is not one of the {num_classes} classes (0 to {num_classes - 1})"
        )


def check_declared_size(declared_hw: tuple[int, int] | None, image_hw: tuple[int, int]) -> None:
    """Boxes in px fit only the image that they were drawn on.

    Raises:
        ValueError: the labels were made for an image of another size (or for the image before its EXIF rotation).
    """
    if declared_hw is not None and declared_hw != image_hw:
        raise ValueError(
            f"labels are for an image of {declared_hw[1]}x{declared_hw[0]} px, this one has {image_hw[1]}x{image_hw[0]} px"
        )
