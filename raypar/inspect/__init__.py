"""``raypar inspect``: what is in a dataset, what training makes of it, and how fast.

    {storage}/{name}/inspect/
        histograms.png          classes, box sizes and places, image sizes, time by stage
        samples_raw.png         the first images of the first epoch, with their boxes
        samples_augmented.png   the same, exactly as the model gets them
        report.html             all of it on one page
        report.json             written last: where it is, the inspection is complete

Runs in: the driver. Ray Data counts the shards' label columns (no image is read); speed is timed by actors on one node.
"""

from __future__ import annotations

import hashlib
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.manifest import MANIFEST, Manifest, Split
from raypar.dataset.stream import StreamSpec, recipe_of
from raypar.inspect import report as reports
from raypar.inspect.statistics import Statistics, columns
from raypar.storage import Folder

RESULT = "report.json"
MAX_BLOCKS = 256  # Ray Data tasks that count; each takes its share of the shards
# settings of train that the report depends on
AFFECTING = ("model", "batch", "precision", "albumentations", "yolo")


def check(config: RunConfig) -> None:
    """What can be checked in seconds, without Ray.

    Raises:
        ValueError: no dataset, no such split, a shard is missing, or settings that training would refuse.
    """
    dataset = config.dataset_folder
    manifest = Manifest.load(dataset)
    verify.check_sizes(dataset, manifest, (config.inspect.split,))
    from raypar.augment import albu

    _spec(config, manifest)
    albu.check(config.train.albumentations, manifest.task)


def run(config: RunConfig) -> dict[str, Any]:
    """Inspects, and returns what ``report.json`` holds; a complete report on the same dataset and settings is returned as it is.

    Raises:
        ValueError: see :func:`check`.
    """
    section, out, dataset = config.inspect, config.folder / "inspect", config.dataset_folder
    manifest = Manifest.load(dataset)
    settings = {
        "split": section.split, "num_samples": section.num_samples, "seed": config.seed,
        "train": {key: value for key, value in config.train.model_dump(mode="json").items() if key in AFFECTING},
        "dataset_sha256": hashlib.sha256(dataset.read(MANIFEST)).hexdigest(),
    }  # fmt: skip
    if not section.overwrite and out.exists(RESULT):
        before: dict[str, Any] = out.read_json(RESULT)
        if all(before.get(key) == value for key, value in settings.items()) and (
            before["speed"] or not section.seconds
        ):
            print(
                f"inspect: {out.uri} is complete for this dataset and these settings; inspect.overwrite=true inspects anew",
                flush=True,
            )
            return before
    out.delete(RESULT)
    split, (spec, args) = manifest.split(section.split), _spec(config, manifest)
    found = count(dataset, split, manifest.task, num_classes=len(manifest.class_names), imgsz=args.imgsz)
    if found.num_images != split.num_images:
        raise ValueError(
            f"{dataset.uri} has {found.num_images} '{section.split}' images, its manifest says {split.num_images}: prepare it again"
        )
    report = {
        "name": config.name, **settings, "task": manifest.task, "imgsz": args.imgsz,
        "statistics": reports.describe(found, manifest.class_names, args.imgsz),
        "notes": reports.notes(found, manifest.class_names, args.imgsz, manifest.task),
    }  # fmt: skip
    _say(reports.data_lines(report))
    report["speed"] = _speed(config, spec, args) if section.seconds else None
    return _write(report, found, spec, manifest, out)


def _spec(config: RunConfig, manifest: Manifest) -> tuple[StreamSpec, SimpleNamespace]:
    """The stream that ``train`` would start, but of the split to inspect; and Ultralytics' whole settings."""
    from ultralytics.cfg import get_cfg

    from raypar.dataset.plan import Plan

    split = manifest.split(config.inspect.split)
    try:
        args = get_cfg(overrides={**config.train.yolo, "task": manifest.task})
    except (TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise ValueError(f"train.yolo: {' '.join(str(error).split())}") from error
    if not isinstance(args.imgsz, int) or args.imgsz < 32:
        raise ValueError(f"train.yolo.imgsz={args.imgsz!r}: write one number of px, at least 32")
    groups = tuple(n for shard in split.shards for n in shard.row_groups)
    plan = Plan(groups, seed=config.seed, global_batch=config.train.batch, epochs=args.epochs)
    spec = StreamSpec.of(config.dataset_folder, split, plan, recipe_of(vars(args), manifest), mosaic_epochs=args.epochs - args.close_mosaic,
                         albumentations=config.train.albumentations, world_size=1)  # fmt: skip
    return spec, args


def count(dataset: Folder, split: Split, task: str, *, num_classes: int, imgsz: int) -> Statistics:
    """Counts a split in Ray Data tasks, each its share of the shards, a row group at a time."""
    import ray.data

    items = [{"path": shard.path} for shard in split.shards]
    counted = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
        _count, batch_size=None, batch_format="numpy", num_cpus=1,
        fn_kwargs={"dataset": dataset, "task": task, "num_classes": num_classes, "imgsz": imgsz})  # fmt: skip
    counted.context.enable_progress_bars = counted.context.print_on_execution_start = False
    whole = Statistics.none(num_classes)
    for row in counted.iter_rows():
        whole = whole + pickle.loads(row["part"])
    return whole


def _count(batch: dict[str, Any], dataset: Folder, task: str, num_classes: int, imgsz: int) -> dict[str, Any]:
    """A task: the statistics of some shards, in one row."""
    part = Statistics.none(num_classes)
    for path in batch["path"]:
        with dataset.open(str(path)) as file:
            shard = pq.ParquetFile(file)
            for group in range(shard.num_row_groups):
                part = part + Statistics.of_table(
                    shard.read_row_group(group, columns(task)), task, num_classes=num_classes, imgsz=imgsz
                )
    return {"part": np.array([pickle.dumps(part)], dtype=object)}


def _speed(config: RunConfig, spec: StreamSpec, args: SimpleNamespace) -> dict[str, Any]:
    import ray

    from raypar.inspect.speed import measure_model, measure_pipeline

    print(f"inspect: timing the pipeline and {config.train.model} on this machine ...", flush=True)
    total: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
    measured = measure_pipeline(spec, config.inspect.seconds)
    per_worker = max(1, config.train.batch // config.train.max_workers)
    use_gpu = total.get("GPU", 0) >= 1 if config.train.use_gpu == "auto" else config.train.use_gpu
    model = measure_model(config.train.model, per_worker, args.imgsz, config.train.precision, use_gpu=use_gpu,
                          trusted=config.weights_trusted)  # fmt: skip
    return reports.speed(measured, model, total.get("CPU", 0), total.get("GPU", 0))


def _write(
    report: dict[str, Any], found: Statistics, spec: StreamSpec, manifest: Manifest, out: Folder
) -> dict[str, Any]:
    """Draws, writes, and says what there is."""
    from raypar.inspect import pictures

    counts = report["statistics"]
    boxes = "" if manifest.task == "classify" else f", {counts['num_boxes']:,} boxes"
    title = f"{report['name']}, '{report['split']}': {counts['num_images']:,} images{boxes}"
    raw, augmented = pictures.samples(spec, manifest.class_names, report["num_samples"])
    drawn = {"histograms.png": pictures.histograms(found, manifest.class_names, report["imgsz"], title, report["speed"]),
             "samples_raw.png": raw, "samples_augmented.png": augmented}  # fmt: skip
    for name, png in drawn.items():
        out.write(name, png)
    lines = reports.speed_lines(report["speed"]) if report["speed"] else []
    _say([*lines, f"pictures, numbers and report.html are in {out.uri}"])
    lines = [*reports.data_lines(report), *lines]
    titles = (
        "Statistics",
        "Samples, with their labels",
        "The same samples as the model gets them in the first epoch",
    )
    out.write("report.html", reports.page(report, lines, dict(zip(titles, drawn.values(), strict=True))))
    out.write_json(RESULT, report)
    return report


def _say(lines: list[str]) -> None:
    print("\n".join(f"inspect: {line}" for line in lines), flush=True)
