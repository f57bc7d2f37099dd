"""Images in a folder a class, as ImageNet: ``{train,val,test}/CLASS/**/*.jpg``. ``scan`` runs in the driver, ``read_labels`` in a Ray task.

Classes are the folders of ``train`` in the order of their names. ``val`` may be called ``valid`` or ``validation``; a source without a
``train`` folder is itself the folder of classes, and a fifth of each class becomes val.
"""

from __future__ import annotations

import numpy as np

from raypar.dataset.formats import IMAGE_SUFFIXES, SPLITS, Labels, Listing, Record, wanted
from raypar.dataset.remote import Place, place_of

VAL_SHARE = 0.2  # of the images of a class, where there is no train folder
NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def scan(source: str | Place, seed: int) -> Listing:
    """Lists the images of each class.

    Raises:
        ValueError: a folder is missing or has no images, or val has a class that train lacks.
    """
    root = place_of(source)
    wanted.check(root, "folders", is_folder=True)
    folders = {
        split: next((root / name for name in NAMES[split] if (root / name).is_dir()), None)
        for split in SPLITS
    }
    train = folders["train"]
    if train is None:
        if not any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir()):
            raise wanted.wrong(root, "folders", "has no folders")
        return _split(root, seed)
    if folders["val"] is None:
        raise ValueError(
            f"{root} has a train folder and no val: make one, or name train itself as prepare.source to have a fifth set apart"
        )
    class_names = _class_names(train)
    splits = {}
    for split, folder in folders.items():
        if folder is None:
            continue
        unknown = sorted(set(_class_names(folder)) - set(class_names))
        if unknown:
            raise ValueError(
                f"{folder} has {len(unknown)} classes that {train} lacks ({', '.join(unknown[:5])})"
            )
        splits[split] = [
            record for class_id, name in enumerate(class_names) for record in _records(folder, name, class_id)
        ]
        if not splits[split]:
            raise ValueError(f"{folder} has no images")
    return Listing(class_names, splits, _absent(train, splits["train"], class_names), "classify")


def read_labels(record: Record) -> Labels:
    """The image's one class, as the label of a box around all of it."""
    return Labels(np.array([record.labels], np.int64), np.array([[0.5, 0.5, 1.0, 1.0]]))


def _split(root: Place, seed: int) -> Listing:
    class_names = _class_names(root)
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for class_id, name in enumerate(class_names):
        records = _records(root, name, class_id)
        order = np.random.default_rng([seed, class_id]).permutation(len(records))
        num_val = round(VAL_SHARE * len(records))
        splits["val"] += [records[i] for i in sorted(order[:num_val])]
        splits["train"] += [records[i] for i in sorted(order[num_val:])]
    for split, records in splits.items():
        if not records:
            raise ValueError(
                f"{root} has no train folder, and too few images in its folders to set some apart for {split}"
            )
    note = f"{root} has no train folder: {len(splits['val'])} images, a fifth of each class, were set apart for val"
    return Listing(class_names, splits, (note, *_absent(root, splits["train"], class_names)), "classify")


def _class_names(folder: Place) -> tuple[str, ...]:
    names = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    if not names:
        raise ValueError(f"{folder} has no folders: it should hold one for each class")
    if {"images", "labels"} <= set(names):
        raise ValueError(
            f"{folder} holds images and labels, not a folder for each class: write prepare.format=yolo and name its data.yaml"
        )
    return names


def _records(folder: Place, name: str, class_id: int) -> list[Record]:
    files = sorted(file for file in (folder / name).rglob("*.*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return [Record(file.relative_to(folder).as_posix(), str(file), class_id) for file in files]  # type: ignore[arg-type]


def _absent(folder: Place, records: list[Record], class_names: tuple[str, ...]) -> tuple[str, ...]:
    there = {record.labels for record in records}
    absent = [name for class_id, name in enumerate(class_names) if class_id not in there]
    return (f"{len(absent)} folders of {folder} have no images ({', '.join(absent[:5])})",) if absent else ()
