"""What each format wants as its source, and what to write instead of one that is something else. Runs in: the driver, without opening an image."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

from raypar.dataset.remote import Place, is_hidden

WANTED = {
    "yolo": "a data.yaml, or the folder with one; it says e.g. 'train: images/train', 'val: images/val', 'names: [cat, dog]'",
    "coco": "one COCO JSON, or the folder with annotations/instances_train*.json (or train/_annotations.coco.json)",
    "voc": "the folder with Annotations/ and JPEGImages/",
    "folders": "the folder with train/CLASS/ and val/CLASS/, or the one with CLASS/ alone",
}
FORMAT_OF = {".yaml": "yolo", ".yml": "yolo", ".json": "coco"}
NUM_PARENTS = 3  # how far above a wrong source the right one is looked for
NUM_NAMES = 1000  # of a folder, among which similar ones are looked for


def check(place: Place, format_: str, *, is_folder: bool = False) -> None:
    """Whether a source can be what its format wants.

    Args:
        place: the source.
        format_: as ``prepare.format``.
        is_folder: whether it must be a folder; else it may be a file too.

    Raises:
        ValueError: it is a pattern, not there, an empty folder, or no folder.
    """
    if place.is_dir():
        if all(is_hidden(entry.name) for entry in place.iterdir()):
            raise wrong(place, format_, "is an empty folder")
    elif not place.is_file():
        what = "exists but is neither a file nor a folder" if place.exists() else absent(place)
        raise wrong(
            place,
            format_,
            "is a pattern of names, and one place is wanted"
            if any(sign in str(place) for sign in "*?[")
            else what,
        )
    elif is_folder:
        raise wrong(place, format_, "is a file, not a folder")


def wrong(place: Place, format_: str, why: str) -> ValueError:
    """The error of a source that is not what its format wants: why, and what to write instead."""
    found = _near(place)
    instead = f"format '{format_}' wants {WANTED[format_]}"
    if found is not None and found != (place, format_):
        source, as_format = found
        other = "" if as_format == format_ else f" prepare.format={as_format}"
        instead = (
            f"write prepare.source={source}{other}"
            if source != place
            else f"it looks like another format: write{other}"
        )
    return ValueError(f"prepare.source {place} {why}: {instead}")


def absent(place: Place) -> str:
    """That a place does not exist, and up to where it does, with what is called nearly so there."""
    if not isinstance(place, Path):
        return "does not exist"
    above = next((parent for parent in place.parents if parent.is_dir()), Path("/"))
    name = place.relative_to(above).parts[0]
    if (above / name).exists():
        return f"does not exist ({above / name} is no folder)"
    near = difflib.get_close_matches(name, [entry.name for entry in islice(above.iterdir(), NUM_NAMES)], n=1)
    return f"does not exist ({above} has no '{name}'{f', but {near[0]!r}' if near else ''})"


def _near(place: Place) -> tuple[Place, str] | None:
    """The nearest source of any format, with the format: the place itself or a folder above it."""
    if not isinstance(place, Path):  # in a store, looking around costs listings
        return None
    if place.is_file() and place.suffix.lower() in FORMAT_OF:
        return place, FORMAT_OF[place.suffix.lower()]
    for folder in [place, *islice(place.parents, NUM_PARENTS)]:
        if folder.is_dir() and (found := _recognised(folder)) is not None:
            return found
    return None


def _recognised(folder: Path) -> tuple[Path, str] | None:
    if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir():
        return folder, "voc"
    if (folder / "data.yaml").is_file():
        return folder / "data.yaml", "yolo"
    if (folder / "train" / "_annotations.coco.json").is_file() or any(
        (folder / "annotations").glob("instances_train*.json")
    ):
        return folder, "coco"
    if (folder / "train").is_dir() and not (folder / "train" / "images").is_dir():
        entries = [e for e in islice((folder / "train").iterdir(), NUM_NAMES) if not is_hidden(e.name)]
        if entries and all(entry.is_dir() for entry in entries):
            return folder, "folders"
    return None
