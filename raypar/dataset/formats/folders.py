"""Images in a folder a class, as ImageNet: ``{train,val,test}/CLASS/**/*.jpg``. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

Classes are the folders of ``train`` in the order of their names. ``val`` may be called ``valid`` or ``validation``; a source without a
``train`` folder is itself the folder of classes, and a fifth of each class becomes val.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from raypar.dataset.formats import (
    IMAGE_SUFFIXES,
    SPLITS,
    Labels,
    Listing,
    Record,
    SplitMissingError,
    all_below,
    hold_out,
    optional_test,
    some_of,
    visible,
    wanted,
)
from raypar.dataset.remote import Place, place_of

VAL_SHARE = 0.2  # of the images of a class, where there is no train folder
NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def scan(source: str | Place, seed: int, val_fraction: float | None = None) -> Listing:
    """Lists the images of each class.

    Args:
        source: the folder.
        seed: of the draw, where there is no val.
        val_fraction: share of each class that is drawn for val then; unset: a fifth where there is no train folder either.

    Raises:
        ValueError: a folder is missing or has no images, or val has a class that train lacks.
    """
    root = place_of(source)
    wanted.check(root, "folders", is_folder=True)
    found = {
        split: next((root / name for name in NAMES[split] if (root / name).is_dir()), None)
        for split in SPLITS
    }
    places = {split: folder for split, folder in found.items() if folder is not None}
    if "train" not in places:
        if not any(entry.is_dir() for entry in visible(root)):
            raise wanted.wrong(root, "folders", "has no folders")
        return _drawn(root, seed, val_fraction or VAL_SHARE, f"{root} has no train folder")
    train = places["train"]
    class_names = _class_names(train)
    notes: list[str] = []
    splits = optional_test(lambda split: _listed(places[split], train, class_names), places, notes)
    listing = Listing(
        class_names, splits, (*_absent(train, splits["train"], class_names), *notes), "classify"
    )
    if "val" in places or val_fraction is None:
        return listing
    drawn = _drawn(train, seed, val_fraction, f"{root} has no val folder")
    return replace(drawn, splits={**splits, **drawn.splits}, notes=(*drawn.notes, *notes))


def read_labels(record: Record) -> Labels:
    """The image's one class, as the label of a box around all of it."""
    return Labels(np.array([record.labels], np.int64), np.array([[0.5, 0.5, 1.0, 1.0]]))


def _listed(folder: Place, train: Place, class_names: tuple[str, ...]) -> list[Record]:
    try:
        unknown = sorted(set(_class_names(folder)) - set(class_names))
    except SplitMissingError:
        if any(posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES for path in all_below(folder)):
            raise
        raise SplitMissingError(f"{folder} has no images") from None
    if unknown:
        raise ValueError(f"{folder} has {len(unknown)} classes that {train} lacks ({some_of(unknown)})")
    records = [
        record for class_id, name in enumerate(class_names) for record in _records(folder, name, class_id)
    ]
    if not records:
        raise SplitMissingError(f"{folder} has no images")
    return records


def _drawn(folder: Place, seed: int, share: float, why: str) -> Listing:
    """The classes of a folder, with a share of each set apart for val."""
    class_names = _class_names(folder)
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for class_id, name in enumerate(class_names):
        records = _records(folder, name, class_id)
        for split, rows in zip(splits, hold_out(records, share, [seed, class_id], at_least=0), strict=True):
            splits[split] += [records[i] for i in rows]
    for split, records in splits.items():
        if not records:
            raise ValueError(f"{why}, and too few images in its folders to set some apart for {split}")
    of_each = "a fifth" if share == VAL_SHARE else f"{share:g}"
    note = f"{why}: {len(splits['val'])} images, {of_each} of each class, were set apart for val"
    absent = _absent(folder, splits["train"], class_names)
    return Listing(class_names, splits, (note, *absent), "classify", is_val_drawn=True)


def _class_names(folder: Place) -> tuple[str, ...]:
    names = tuple(entry.name for entry in visible(folder) if entry.is_dir() and not _is_loop(entry, folder))
    if not names:
        raise SplitMissingError(f"{folder} has no folders: it should hold one for each class")
    if {"images", "labels"} <= set(names):
        raise ValueError(
            f"{folder} holds images and labels, not a folder for each class: write prepare.format=yolo and name its data.yaml"
        )
    return names


def _is_loop(entry: Place, folder: Place) -> bool:
    """Whether a folder is a link to the one that it lies in, or to one above."""
    return isinstance(entry, Path) and folder.resolve().is_relative_to(entry.resolve())  # type: ignore[union-attr]


def _records(folder: Place, name: str, class_id: int) -> list[Record]:
    if not (folder / name).is_dir():
        return []
    paths = [
        path for path in all_below(folder / name) if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES
    ]
    start = len(f"{folder}/")
    return [Record(path[start:], path, class_id) for path in sorted(paths)]


def _absent(folder: Place, records: Sequence[Record], class_names: tuple[str, ...]) -> tuple[str, ...]:
    there = {record.labels for record in records}
    absent = [name for class_id, name in enumerate(class_names) if class_id not in there]
    return (f"{len(absent)} folders of {folder} have no images ({some_of(absent)})",) if absent else ()
