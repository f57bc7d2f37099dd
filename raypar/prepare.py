"""``raypar prepare``: images and labels -> checked Parquet shards and a manifest.

    {storage}/{name}/dataset/
        train/00000.parquet  train/00001.parquet ...      rows in the order of one seeded shuffle of the split
        val/00000.parquet ...   test/00000.parquet ...
        rejected.jsonl                                    a line for each image set aside: split, image_id, file, reason
        settings.json  run.yaml                           what it was made from; the run file
        manifest.json                                     written last: where it is, the dataset is complete

A run that was killed goes on with the shards that are missing. With ``prepare.append`` images that are new in the source become new shards
of a complete dataset. Runs in: the driver, which lists, shuffles and cuts (``raypar.dataset.shards``); a Ray Data task a shard reads, checks
and writes (``raypar.dataset.ingest``).
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypar import outputs
from raypar.config import PrepareConfig, RunConfig
from raypar.dataset import append, remote, shards, verify
from raypar.dataset.formats import (
    SPLITS,
    Listing,
    Record,
    coco,
    folders,
    hold_out,
    shapes,
    some_of,
    voc,
    yolo,
)
from raypar.dataset.ingest import ShardJob, ShardReport
from raypar.dataset.manifest import MANIFEST, Manifest, Shard, Split
from raypar.dataset.records import Records
from raypar.progress import Progress
from raypar.storage import Folder
from raypar.versions import versions

REJECTED = "rejected.jsonl"
CHECK_HOLDS_S = 60.0
# by the command line, which checks and then runs; and when
_checked: tuple[tuple[PrepareConfig | None, int, str], Listing, float] | None = None


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray and without opening an image.

    Raises:
        ValueError: the source is missing, malformed, has no classes or an empty split; one line that says which.
    """
    global _checked
    _check_same(_section(config), config.folder / "dataset")
    _checked = (_key(config), _list(config), time.monotonic())


def run(config: RunConfig) -> Manifest:
    """Writes the dataset of a run; a complete one is kept, unless ``prepare.overwrite`` or ``prepare.append``.

    Raises:
        ValueError: the source is wrong, too many of its images were rejected, or the dataset was made from something else.
    """
    section = _section(config)
    dataset = config.folder / "dataset"
    _check_same(section, dataset)
    before = None
    if dataset.exists(MANIFEST):
        if section.append:
            before = Manifest.load(dataset)
        elif not section.overwrite:
            print(
                f"{dataset.uri} is complete: nothing to do (prepare.overwrite=true makes it anew, prepare.append=true adds to it)",
                flush=True,
            )
            return Manifest.load(dataset)
        else:
            dataset.delete(MANIFEST)  # first: a half-deleted dataset must not look complete
            dataset.delete()
    return _prepare(config, section, dataset, before)


def _prepare(config: RunConfig, section: PrepareConfig, dataset: Folder, before: Manifest | None) -> Manifest:
    """Writes the shards that are missing, then the manifest; ``before`` is what the dataset has, when images are added to it."""
    started_s = time.monotonic()
    listing = _listed(config)
    if before is not None:
        append.check(before, listing, dataset)
    dataset.check_writable()
    splits = {split: records for split, records in listing.splits.items() if isinstance(records, Records)}
    template = ShardJob(
        dataset, "", "", section.format, len(listing.class_names), (), section.rows_per_group, section.max_pixels, config.seed,
        (section.shapes.height, section.shapes.width), listing.task, listing.keypoint_shape,
        listing.tree.store if listing.tree else None)  # fmt: skip
    taken, first = append.taken(dataset, before, splits) if before is not None else ({}, {})
    if listing.is_val_drawn and taken:
        # another draw than the first, of more images: what is in train must not come to val
        everywhere = pa.concat_arrays(list(taken.values()))
        taken = dict.fromkeys(splits, everywhere)
    wanted = shards.portions(splits, template, section, taken=taken, first=first, tree=listing.tree)
    num_before = sum(split.num_images for split in before.splits.values()) if before is not None else 0
    num_images = num_before + sum(len(portion.rows) for portion in wanted)
    found = _write(wanted, splits, template, section.max_rejected * num_images)
    is_stopped = len(found) < len(wanted)
    wanted, reports = [portion for portion in wanted if portion.path in found], list(found.values())
    rejected = _rejected(reports)
    if before is not None:
        num_images -= len(rejected)
        rejected = append.merged(dataset, rejected, wanted, splits, REJECTED)
        num_images += len(rejected)  # with those of earlier runs
    dataset.write(REJECTED, "".join(json.dumps(line) + "\n" for line in rejected))
    _check_rejected(
        rejected, reports, section, dataset, num_images, is_append=before is not None, is_stopped=is_stopped
    )
    manifest = _manifest(config, listing, reports, len(rejected))
    if before is not None:
        if not any(report.num_images for report in reports):
            dataset.delete(shards.PARTS)
            print(
                f"{dataset.uri} has every image of {_source(section)} that can be used: nothing to add",
                flush=True,
            )
            return before  # and the manifest stays as it is: a training may be going on
        manifest = append.added(before, manifest)
    if before is None:
        dataset.write_json(outputs.SETTINGS, _made_from(section))
    outputs.write_run_file(dataset, config)
    manifest.save(dataset)
    kept = {shard.path for split in manifest.splits.values() for shard in split.shards} | {
        REJECTED,
        MANIFEST,
        outputs.SETTINGS,
        outputs.RUN_FILE,
        verify.VERIFIED,
    }
    for name in set(dataset.list(recursive=True)) - kept:
        dataset.delete(name)  # of a run that was stopped
    dataset.delete(shards.PARTS)
    print(_summary(manifest, listing, reports, rejected, dataset, time.monotonic() - started_s), flush=True)
    return manifest


def _write(
    wanted: list[shards.Portion], splits: dict[str, Records], template: ShardJob, max_rejected: float
) -> dict[str, ShardReport]:
    """Has the shards written that an earlier, killed run did not finish; reports by path, in the order of the shards.

    When more images were set aside than may be of all, the rest is not tried: reports are then fewer.
    """
    reports = shards.finished(template.dataset, wanted)
    due = [portion for portion in wanted if portion.path not in reports]
    if not due:
        print(f"prepare: all {len(wanted)} shards are in {template.dataset.uri} already", flush=True)
        return reports
    num_images = sum(len(portion.rows) for portion in due)
    found = f"; {len(reports)} are done already" if reports else ""
    print(f"prepare: {num_images} images in {len(due)} shards -> {template.dataset.uri}{found}", flush=True)
    progress = Progress(num_images, "images", "prepare")
    for portion, report in shards.write(due, splits, template):
        reports[portion.path] = report
        progress.update(len(portion.rows))
        if sum(len(report.rejected) for report in reports.values()) > max_rejected:
            break
    progress.close()
    return {portion.path: reports[portion.path] for portion in wanted if portion.path in reports}


def _rejected(reports: list[ShardReport]) -> list[dict[str, str]]:
    """The lines of ``rejected.jsonl``."""
    lines = [line for report in reports for line in report.rejected]
    return sorted(lines, key=lambda line: (line["split"], line["image_id"]))


def _manifest(config: RunConfig, listing: Listing, reports: list[ShardReport], num_rejected: int) -> Manifest:
    return Manifest(
        task=listing.task,
        class_names=listing.class_names,
        keypoint_shape=listing.keypoint_shape,
        flip_idx=listing.flip_idx,
        splits={split: _split(split, reports, len(listing.class_names)) for split in listing.splits},
        source=_source(_section(config)),
        num_rejected=num_rejected,
        num_repaired=sum(report.num_repaired for report in reports),
        seed=config.seed,
        versions=versions("ray", "pyarrow", "opencv-python", "opencv-python-headless", "pillow"),
    )


def _made_from(section: PrepareConfig) -> dict[str, Any]:
    """The settings that decide what is in a dataset."""
    shapes = {"shapes": section.shapes.model_dump()} if section.format == "shapes" else {}
    return {
        "source": _source(section),
        "format": section.format,
        "max_pixels": section.max_pixels,
        "val_fraction": section.val_fraction,
        **shapes,
    }


def _check_same(section: PrepareConfig, dataset: Folder) -> None:
    """Whether a complete dataset is the one that these settings describe.

    Raises:
        ValueError: it was made from something else, and is neither to be replaced nor added to.
    """
    if section.append or section.overwrite or not dataset.exists(MANIFEST):
        return
    manifest, now = Manifest.load(dataset), _made_from(section)
    before = dataset.read_json(outputs.SETTINGS) if dataset.exists(outputs.SETTINGS) else {}
    if now["source"] not in manifest.source.split(" + "):
        before["source"] = manifest.source
    elif before.get("source") != now["source"]:
        before = {}  # of the source that it was first prepared from; this one was appended
    if section.task != "auto":
        before["task"], now["task"] = manifest.task, section.task
    if others := outputs.differing(before, now):
        raise ValueError(
            f"{dataset.shown()} is complete with other settings ({others}): set them back, choose another name, "
            "add to it with prepare.append=true, or replace it with prepare.overwrite=true"
        )


def _section(config: RunConfig) -> PrepareConfig:
    if config.dataset is not None:
        raise ValueError(
            f"dataset: this run reads {config.dataset}, which another prepared: leave it out to prepare one here"
        )
    if config.prepare is None:
        raise ValueError("the run file has no 'prepare' section: write 'prepare: {source: ..., format: ...}'")
    return config.prepare


def _source(section: PrepareConfig) -> str:
    if section.source is None:
        return "shapes"
    return (
        remote.shown(section.source)
        if "://" in section.source
        else str(remote.local_path(section.source).absolute())
    )


def _list(config: RunConfig) -> Listing:
    """Lists the source, and says at once what was chosen for the user."""
    section = _section(config)
    listing = _with_val(_scanned(config, section), section, config.seed)
    for name in listing.class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prepare.source: the class name {name!r} is not text in UTF-8") from error
    packed = {split: _packed(records).told_apart() for split, records in listing.splits.items()}
    again = [
        f"{count} lines of {split} list an image again: it is repeated as often as it is listed, as in Ultralytics"
        for split, (_, count) in packed.items()
        if count
    ]
    listing = replace(
        listing,
        splits={split: records for split, (records, _) in packed.items()},
        notes=(*listing.notes, *again),
    )
    for note in listing.notes:
        print(f"prepare: note: {note}", flush=True)
    return listing


def _packed(records: Sequence[Record]) -> Records:
    return records if isinstance(records, Records) else Records.of(records)


def _scanned(config: RunConfig, section: PrepareConfig) -> Listing:
    wish = _task_of(config.train.model) if section.task == "auto" else None
    if section.format == "shapes":
        task = "detect" if section.task == "auto" else section.task
        return shapes.scan({split: getattr(section.shapes, split) for split in SPLITS}, wish or task)
    assert section.source is not None
    try:
        place = remote.place_of(section.source)
        listing = _scan(place, section, config.seed, wish)
    except OSError as error:
        raise ValueError(
            f"prepare.source {remote.shown(section.source)} cannot be read: {' '.join(str(error).split())}"
        ) from error
    if wish and listing.task != wish:
        note = (
            f"train.model={config.train.model} is for {wish}, and the labels are not: the dataset is for {listing.task}; "
            f"train it with a model for {listing.task}"
        )
        listing = replace(listing, notes=(*listing.notes, note))
    return listing if isinstance(place, Path) else replace(listing, tree=place.tree)


def _scan(place: remote.Place, section: PrepareConfig, seed: int, wish: str | None) -> Listing:
    if section.format == "voc":
        return voc.scan(place, seed, section.val_fraction)
    if section.format == "folders":
        return folders.scan(place, seed, section.val_fraction)
    scan = yolo.scan if section.format == "yolo" else coco.scan
    return scan(place, section.task, wish)


def _task_of(model: str) -> str | None:
    """The task that the name of a model says: ``yolov8n-seg.yaml``, ``yolo11n-pose.pt``, ``yolov8x-pose-p6.yaml``."""
    found = re.search(r"-(seg|pose|obb)(?=[-.])", model.rpartition("/")[2])
    return {"seg": "segment", "pose": "pose", "obb": "obb"}[found[1]] if found else None


def _with_val(listing: Listing, section: PrepareConfig, seed: int) -> Listing:
    """The listing with the val split that ``prepare.val_fraction`` asks for; a note where training will lack one.

    Raises:
        ValueError: the source has a val split of its own, or too few images.
    """
    if listing.is_val_drawn:
        return listing
    if section.val_fraction is None:
        note = "there is no val split, and training needs one: set prepare.val_fraction=0.1 to draw it from train"
        return listing if "val" in listing.splits else replace(listing, notes=(*listing.notes, note))
    if "val" in listing.splits:
        raise ValueError(
            f"prepare.val_fraction={section.val_fraction:g} draws val from train, and the source has a val split of "
            f"{len(listing.splits['val'])} images: leave val_fraction out, or val out of the source"
        )
    train = _packed(listing.splits["train"])
    kept, held_out = hold_out(train, section.val_fraction, [seed, len(train)])
    if not held_out:
        raise ValueError("prepare.val_fraction: train has too few images to draw val from them")
    drawn = {"train": train.select(kept), "val": train.select(held_out)}
    note = f"{len(held_out)} of the {len(train)} images of train were drawn for val (seed {seed})"
    merged = {**listing.splits, **drawn}
    splits = {split: merged[split] for split in SPLITS if split in merged}
    return replace(listing, splits=splits, notes=(*listing.notes, note), is_val_drawn=True)


def _listed(config: RunConfig) -> Listing:
    """What ``check`` has just listed, once; else a new listing."""
    global _checked
    checked, _checked = _checked, None
    if checked and checked[0] == _key(config) and time.monotonic() - checked[2] < CHECK_HOLDS_S:
        return checked[1]
    return _list(config)


def _key(config: RunConfig) -> tuple[PrepareConfig | None, int, str]:
    """What a listing follows from."""
    return config.prepare, config.seed, config.train.model


def _check_rejected(
    rejected: list[dict[str, str]], reports: list[ShardReport], section: PrepareConfig, dataset: Folder, num_images: int,
    *, is_append: bool, is_stopped: bool,
) -> None:  # fmt: skip
    num_rejected = len(rejected)
    where = f"{dataset.uri}/{REJECTED} names each"
    if num_rejected > section.max_rejected * num_images:
        raise ValueError(
            f"{'at least ' if is_stopped else ''}{num_rejected} of {num_images} images cannot be used, prepare.max_rejected={section.max_rejected:g} allows "
            f"{int(section.max_rejected * num_images)}: {'; '.join(_top_reasons(rejected))}. {where}"
        )
    if is_append:
        return
    for split in dict.fromkeys(report.split for report in reports if report.split != "test"):
        if not any(report.num_images for report in reports if report.split == split):
            raise ValueError(
                f"no image of split '{split}' can be used: {'; '.join(_top_reasons(rejected))}. {where}"
            )
    if not any(report.num_boxes for report in reports):
        raise ValueError(f"none of the {num_images} images has a label: nothing can be learnt from them")


def _top_reasons(rejected: list[dict[str, str]], num_reasons: int = 3) -> list[str]:
    counts = Counter(line["reason"] for line in rejected).most_common()
    more = [f"and {len(counts) - num_reasons} reasons more"] if len(counts) > num_reasons else []
    return [f"{count} x {reason}" for reason, count in counts[:num_reasons]] + more


def _split(split: str, reports: list[ShardReport], num_classes: int) -> Split:
    mine = [report for report in reports if report.split == split]
    boxes_per_class = sum((report.boxes_per_class for report in mine), Counter[int]())
    shards: tuple[Shard, ...] = tuple(report.shard for report in mine if report.shard is not None)
    return Split(
        shards=shards,
        num_images=sum(report.num_images for report in mine),
        num_boxes=sum(report.num_boxes for report in mine),
        num_polygons=sum(report.num_polygons for report in mine),
        num_backgrounds=sum(report.num_backgrounds for report in mine),
        boxes_per_class=tuple(boxes_per_class[class_id] for class_id in range(num_classes)),
    )


def _summary(
    manifest: Manifest,
    listing: Listing,
    reports: list[ShardReport],
    rejected: list[dict[str, str]],
    dataset: Folder,
    seconds: float,
) -> str:
    """One screen: what is there, what was repaired, what was rejected."""
    num_images = sum(split.num_images for split in manifest.splits.values())
    lines = [
        f"prepare: {num_images} images of {len(manifest.class_names)} classes in {dataset.uri}, {seconds:.1f} s"
    ]
    lines.append(f"  {'split':<6} {'images':>8} {'empty':>7} {'boxes':>9} {'shards':>7} {'MB':>9}")
    for name, split in manifest.splits.items():
        num_mb = sum(shard.num_bytes for shard in split.shards) / 1e6
        lines.append(
            f"  {name:<6} {split.num_images:>8} {split.num_backgrounds:>7} {split.num_boxes:>9} {len(split.shards):>7} {num_mb:>9.1f}"
        )
    counts = manifest.splits["train"].boxes_per_class
    shown = sorted(zip(manifest.class_names, counts, strict=True), key=lambda pair: -pair[1])
    lines.append(f"  boxes in train: {some_of((f'{name} {count}' for name, count in shown), 10)}")
    absent = [name for name, count in shown if not count]
    if absent:
        lines.append(f"  no box in train: {len(absent)} classes ({some_of(absent)})")
    repairs = sum((report.repairs for report in reports), Counter[str]())
    if repairs:
        kinds = ", ".join(f"{count} {kind}" for kind, count in repairs.most_common())
        lines.append(f"  repaired: {manifest.num_repaired} images ({kinds})")
    if rejected:
        lines.append(
            f"  set aside: {len(rejected)} images, named in {dataset.uri}/{REJECTED} ({'; '.join(_top_reasons(rejected))})"
        )
    lines += [f"  note: {note}" for note in (*_partly_outlined(manifest), *_shared_images(listing))]
    return "\n".join(lines)


def _partly_outlined(manifest: Manifest) -> list[str]:
    """A note on polygons that are not used."""
    train = manifest.splits["train"]
    if manifest.task != "detect" or train.num_polygons in (0, train.num_boxes):
        return []
    return [
        f"{train.num_polygons} of {train.num_boxes} objects in train have polygons: unless all have one, "
        "training uses boxes alone, as Ultralytics does"
    ]


def _shared_images(listing: Listing) -> list[str]:
    """A warning for each pair of splits that hold the same files: metrics on them would flatter."""
    files = {
        split: records.image_paths
        for split, records in listing.splits.items()
        if isinstance(records, Records)
    }
    lines, names = [], list(files)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            is_shared = pc.and_(
                pc.is_in(files[a], value_set=files[b]), pc.greater(pc.binary_length(files[a]), 0)
            )
            if count := pc.sum(is_shared).as_py():
                lines.append(f"{count} images are in {a} and in {b}")
    return lines
