"""``raypar prepare``: images and labels -> checked Parquet shards and a manifest.

    {storage}/{name}/dataset/
        train/00000.parquet  train/00001.parquet ...      rows in the order of one seeded shuffle of the split
        val/00000.parquet ...   test/00000.parquet ...
        rejected.jsonl                                    a line for each image set aside: split, image_id, file, reason
        manifest.json                                     written last: where it is, the dataset is complete

Runs in: the driver, which lists, shuffles and cuts; a Ray Data task a shard reads, checks and writes (``raypar.dataset.ingest``).
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import raypar
from raypar.config import PrepareConfig, RunConfig
from raypar.dataset.formats import SPLITS, Listing, Record, coco, folders, shapes, voc, yolo
from raypar.dataset.manifest import MANIFEST, Manifest, Shard, Split
from raypar.progress import Progress
from raypar.storage import Folder

if TYPE_CHECKING:
    from raypar.dataset.ingest import ShardJob, ShardReport

REJECTED = "rejected.jsonl"
SMALL_SPLIT = 200  # images; larger splits get several shards however small the images are,
MIN_SHARDS = 4  # so that several tasks can read them


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray and without opening an image.

    Raises:
        ValueError: the source is missing, malformed, has no classes or an empty split; one line that says which.
    """
    _list(_section(config), config.seed)


def run(config: RunConfig) -> Manifest:
    """Writes the dataset of a run; a complete one is kept unless ``prepare.overwrite``.

    Raises:
        ValueError: the source is wrong, or too many of its images had to be set aside.
    """
    section = _section(config)
    dataset = config.folder / "dataset"
    if dataset.exists(MANIFEST):
        if not section.overwrite:
            print(f"{dataset.uri} is complete: nothing to do (prepare.overwrite=true makes it anew)", flush=True)
            return Manifest.load(dataset)
        dataset.delete(MANIFEST)  # first: a half-deleted dataset must not look complete
        dataset.delete()
    started_s = time.monotonic()
    listing = _list(section, config.seed)
    dataset.check_writable()
    jobs, duplicates = _cut(config, listing, dataset)
    reports = _run_jobs(jobs, section, dataset)
    rejected = sorted(duplicates + [line for report in reports for line in report.rejected], key=lambda r: (r["split"], r["image_id"]))
    dataset.write(REJECTED, "".join(json.dumps(line) + "\n" for line in rejected))
    _check_rejected(listing, rejected, reports, section, dataset)
    manifest = Manifest(
        task=listing.task,
        class_names=listing.class_names,
        keypoint_shape=listing.keypoint_shape,
        flip_idx=listing.flip_idx,
        splits={split: _split(split, reports, len(listing.class_names)) for split in listing.splits},
        source=_source(section),
        num_rejected=len(rejected),
        num_repaired=sum(report.num_repaired for report in reports),
        seed=config.seed,
        versions={"raypar": raypar.__version__, **{name: version(name) for name in ("ray", "pyarrow", "opencv-python", "pillow")}},
    )
    kept = {shard.path for split in manifest.splits.values() for shard in split.shards} | {REJECTED}
    for name in set(dataset.list(recursive=True)) - kept:
        dataset.delete(name)  # of a run that was stopped
    manifest.save(dataset)
    print(_summary(manifest, listing, reports, rejected, dataset, time.monotonic() - started_s), flush=True)
    return manifest


def _section(config: RunConfig) -> PrepareConfig:
    if config.prepare is None:
        raise ValueError("the run file has no 'prepare' section: write 'prepare: {source: ..., format: ...}'")
    return config.prepare


def _source(section: PrepareConfig) -> str:
    return "shapes" if section.source is None else str(Path(section.source).expanduser().absolute())


def _list(section: PrepareConfig, seed: int) -> Listing:
    if section.format == "shapes":
        return shapes.scan(
            {split: getattr(section.shapes, split) for split in SPLITS}, "detect" if section.task == "auto" else section.task
        )
    assert section.source is not None
    if "://" in section.source:
        raise ValueError(f"prepare.source {section.source} is remote: prepare reads folders that the driver can open (mount or copy it)")
    if section.format == "voc":
        return voc.scan(section.source, seed)
    if section.format == "folders":
        return folders.scan(section.source, seed)
    return yolo.scan(section.source, section.task) if section.format == "yolo" else coco.scan(section.source, section.task)


def _cut(config: RunConfig, listing: Listing, dataset: Folder) -> tuple[list[ShardJob], list[dict[str, str]]]:
    """Jobs of about ``prepare.shard_mb`` over the shuffled records of each split, and the records that were listed twice."""
    from raypar.dataset.ingest import ShardJob

    section = _section(config)
    jobs, duplicates = [], []
    for split, listed in listing.splits.items():
        unique = {record.image_id: record for record in reversed(listed)}
        seen: set[str] = set()
        for record in listed:
            if record.image_id in seen:
                reason = "image_id is listed twice: the first was kept"
                duplicates.append({"split": split, "image_id": record.image_id, "file": record.image_path, "reason": reason})
            seen.add(record.image_id)
        records = [unique[image_id] for image_id in sorted(unique)]
        order = np.random.default_rng([config.seed, SPLITS.index(split)]).permutation(len(records))
        shuffled = [records[i] for i in order]
        for number, portion in enumerate(cut(shuffled, _sizes(shuffled, section), section.shard_mb * 1e6, section.rows_per_group)):
            jobs.append(
                ShardJob(
                    dataset,
                    f"{split}/{number:05d}.parquet",
                    split,
                    section.format,
                    len(listing.class_names),
                    tuple(portion),
                    section.rows_per_group,
                    section.max_pixels,
                    config.seed,
                    (section.shapes.height, section.shapes.width),
                    listing.task,
                    listing.keypoint_shape,
                )
            )
    return jobs, duplicates


def _sizes(records: list[Record], section: PrepareConfig) -> list[float]:
    """Bytes of each image; a missing file has none."""
    if section.format == "shapes":
        return [shapes.BYTES_PER_PIXEL * section.shapes.height * section.shapes.width] * len(records)
    sizes = []
    for record in records:
        try:
            sizes.append(float(Path(record.image_path).stat().st_size))
        except OSError:
            sizes.append(0.0)
    return sizes


def cut(records: list[Record], sizes: list[float], shard_bytes: float, rows_per_group: int) -> list[list[Record]]:
    """Cuts records into shards of about equal bytes, between row groups; every record lands in one shard, in order."""
    starts = range(0, len(records), rows_per_group)
    groups = [sum(sizes[start : start + rows_per_group]) + 1.0 for start in starts]
    total = sum(groups)
    num_shards = max(1, round(total / shard_bytes))
    if len(records) > SMALL_SPLIT:
        num_shards = max(num_shards, min(MIN_SHARDS, len(groups)))
    middles = np.cumsum(groups) - np.asarray(groups) / 2
    shards: dict[int, list[Record]] = {}
    for start, middle in zip(starts, middles, strict=True):
        shards.setdefault(int(middle / total * num_shards), []).extend(records[start : start + rows_per_group])
    return list(shards.values())


def _run_jobs(jobs: list[ShardJob], section: PrepareConfig, dataset: Folder) -> list[ShardReport]:
    """One Ray Data task a shard; reports in the jobs' order, progress as they come."""
    num_images = sum(len(job.records) for job in jobs)
    print(f"prepare: {num_images} images in {len(jobs)} shards -> {dataset.uri}", flush=True)
    progress = Progress(num_images, "images", "prepare")
    reports: dict[int, ShardReport] = {}
    for number, report in _stream(jobs, section, dataset):
        reports[number] = report
        progress.update(len(jobs[number].records))
    progress.close()
    return [reports[number] for number in range(len(jobs))]


def _stream(jobs: list[ShardJob], section: PrepareConfig, dataset: Folder) -> Iterator[tuple[int, ShardReport]]:
    """(job number, report) in the order in which the tasks end."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    items = [{"job": pickle.dumps((number, job))} for number, job in enumerate(jobs)]
    listed = ray.data.from_items(items, override_num_blocks=len(items))
    written = listed.map_batches(_write_shards, batch_size=1, **_placement(section, dataset))  # type: ignore[arg-type]
    for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
        for report in batch["report"]:
            yield pickle.loads(report)


def _write_shards(batch: dict[str, Any]) -> dict[str, Any]:
    """The task: columns of pickles in and out, one row a shard."""
    from raypar.dataset.ingest import write_shard

    jobs = [pickle.loads(job) for job in batch["job"]]
    return {"report": np.asarray([pickle.dumps((number, write_shard(job))) for number, job in jobs], object)}


def _placement(section: PrepareConfig, dataset: Folder) -> dict[str, Any]:
    """Local files are read and written on the driver's node, whichever node has room for more tasks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) == 1 or (section.format == "shapes" and not dataset.is_local):
        return {"num_cpus": 1}
    node_id = ray.get_runtime_context().get_node_id()
    here = next((node for node in nodes if node["NodeID"] == node_id), None)
    num_cpus = here["Resources"].get("CPU", 0) if here else 0
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    if num_cpus >= 1:
        return {"num_cpus": 1, "scheduling_strategy": strategy}
    return {"num_cpus": 0, "concurrency": os.cpu_count() or 1, "scheduling_strategy": strategy}  # a head that offers Ray no CPUs


def _check_rejected(
    listing: Listing, rejected: list[dict[str, str]], reports: list[ShardReport], section: PrepareConfig, dataset: Folder
) -> None:
    num_images = sum(len(records) for records in listing.splits.values())
    where = f"{dataset.uri}/{REJECTED} names each"
    if len(rejected) > section.max_rejected * num_images:
        raise ValueError(
            f"{len(rejected)} of {num_images} images cannot be used, prepare.max_rejected={section.max_rejected:g} allows "
            f"{int(section.max_rejected * num_images)}: {'; '.join(_top_reasons(rejected))}. {where}"
        )
    for split in listing.splits:
        if not any(report.num_images for report in reports if report.split == split):
            raise ValueError(f"no image of split '{split}' can be used: {'; '.join(_top_reasons(rejected))}. {where}")
    if not any(report.num_boxes for report in reports):
        raise ValueError(f"none of the {num_images} images has a label: nothing can be learnt from them")


def _top_reasons(rejected: list[dict[str, str]], num_reasons: int = 3) -> list[str]:
    counts = Counter(line["reason"] for line in rejected).most_common(num_reasons)
    return [f"{count} x {reason}" for reason, count in counts]


def _split(split: str, reports: list[ShardReport], num_classes: int) -> Split:
    mine = [report for report in reports if report.split == split]
    boxes_per_class = sum((report.boxes_per_class for report in mine), Counter[int]())
    shards: tuple[Shard, ...] = tuple(report.shard for report in mine if report.shard is not None)
    return Split(
        shards=shards,
        num_images=sum(report.num_images for report in mine),
        num_boxes=sum(report.num_boxes for report in mine),
        num_backgrounds=sum(report.num_backgrounds for report in mine),
        boxes_per_class=tuple(boxes_per_class[class_id] for class_id in range(num_classes)),
    )


def _summary(
    manifest: Manifest, listing: Listing, reports: list[ShardReport], rejected: list[dict[str, str]], dataset: Folder, seconds: float
) -> str:
    """One screen: what is there, what was mended, what was set aside, what was chosen for the user."""
    num_images = sum(split.num_images for split in manifest.splits.values())
    lines = [f"prepare: {num_images} images of {len(manifest.class_names)} classes in {dataset.uri}, {seconds:.1f} s"]
    lines.append(f"  {'split':<6} {'images':>8} {'empty':>7} {'boxes':>9} {'shards':>7} {'MB':>9}")
    for name, split in manifest.splits.items():
        num_mb = sum(shard.num_bytes for shard in split.shards) / 1e6
        lines.append(
            f"  {name:<6} {split.num_images:>8} {split.num_backgrounds:>7} {split.num_boxes:>9} {len(split.shards):>7} {num_mb:>9.1f}"
        )
    counts = manifest.splits["train"].boxes_per_class
    shown = sorted(zip(manifest.class_names, counts, strict=True), key=lambda pair: -pair[1])
    classes = ", ".join(f"{name} {count}" for name, count in shown[:10]) + (f" ... and {len(shown) - 10} more" if len(shown) > 10 else "")
    lines.append(f"  boxes in train: {classes}")
    absent = [name for name, count in shown if not count]
    if absent:
        lines.append(f"  no box in train: {len(absent)} classes ({', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''})")
    repairs = sum((report.repairs for report in reports), Counter[str]())
    if repairs:
        kinds = ", ".join(f"{count} {kind}" for kind, count in repairs.most_common())
        lines.append(f"  repaired: {manifest.num_repaired} images ({kinds})")
    if rejected:
        lines.append(f"  set aside: {len(rejected)} images, named in {dataset.uri}/{REJECTED} ({'; '.join(_top_reasons(rejected))})")
    lines += [f"  note: {note}" for note in (*listing.notes, *_shared_images(listing))]
    return "\n".join(lines)


def _shared_images(listing: Listing) -> list[str]:
    """A warning for each pair of splits that hold the same files: metrics on them would flatter."""
    files = {split: {record.image_path for record in records if record.image_path} for split, records in listing.splits.items()}
    names = list(files)
    pairs = [(a, b, len(files[a] & files[b])) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [f"{count} images are in {a} and in {b}" for a, b, count in pairs if count]
