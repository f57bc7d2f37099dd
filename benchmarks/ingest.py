"""Augmented training images a CPU second, in the process that trains: raypar's stream against Ultralytics' loader.

    python benchmarks/ingest.py [--pairs 7] [--imgsz 640] [--voc ../shared/data/bccd] [--cache none ram]

raypar as it trains: Parquet, Ray Data tasks, batches in the consumer; the CPU time of all of Ray's processes counts, once the first --warm-up
images are through (their cost is printed). The rival at its best: Ultralytics' own dataset and loader with as many workers as cores,
`cache=ram` too. The guard, in the same command: forced to the same parameters, boxes equal Ultralytics' to 1e-4 and pixels to 2 grey levels
(its tests are run), and over 10,000 images scale, position, flip and colour of both pipelines are distributed alike.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_VERBOSE="false", NO_ALBUMENTATIONS_UPDATE="1")
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1")
REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

import _data
import _measure
import cv2
import numpy as np
import psutil
import ray
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset

from raypar.augment.geometry import Recipe
from raypar.dataset.batch import unpack
from raypar.dataset.cache import CacheSpec, drop
from raypar.dataset.plan import Plan
from raypar.dataset.stream import MAX_ITEMS, StreamSpec, _start, render
from raypar.quiet import quiet_ray
from raypar.storage import Folder

BATCH = 16
CORES = len(os.sched_getaffinity(0))
TINY, NUM_DRAWS = 64, 10_000
CRITICAL = 1.95  # of the two-sample Kolmogorov-Smirnov statistic, p = 0.001


def our_side(
    data_yaml: Path, folder: Path, imgsz: int, cache: str, num_images: int
) -> Callable[[], _measure.Run]:
    """What training reads: Parquet, Ray Data tasks, packed batches in this process. All of Ray's processes count."""
    dataset = Folder.at(str(folder))
    split = _data.shards(data_yaml, dataset)
    groups = tuple(n for shard in split.shards for n in shard.row_groups)
    plan = Plan(groups, seed=0, global_batch=BATCH, epochs=100_000)
    spec = StreamSpec.of(dataset, split, plan, Recipe.from_yolo(vars(get_cfg(overrides={"imgsz": imgsz}))), mosaic_epochs=plan.epochs,
                         albumentations=None, world_size=1, cache=None if cache == "none" else CacheSpec(cache, folder.name))  # fmt: skip
    (shard,) = _start(spec, list(islice(plan.items(), MAX_ITEMS)))  # one long stream, as in training
    tables = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    batches = (batch for table in tables for batch in unpack(table))
    next(batches)
    return lambda: _measure.timed(
        lambda: sum(len(batch.images) for batch in islice(batches, num_images // BATCH)), _measure.tree
    )


def their_side(data_yaml: Path, imgsz: int, cache: str, num_images: int) -> Callable[[], _measure.Run]:
    hyp = get_cfg(overrides={"imgsz": imgsz})
    dataset = YOLODataset(img_path=str(data_yaml.parent / "images/train"), imgsz=imgsz, augment=True, hyp=hyp, cache="ram" if cache == "ram" else False,
                          data={"names": dict(enumerate("abcd")), "nc": 4, "channels": 3}, task="detect", batch_size=BATCH)  # fmt: skip
    loader = build_dataloader(dataset, BATCH, CORES, shuffle=True, rank=-1, drop_last=True, pin_memory=False)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    before = set(psutil.Process().children(recursive=True))
    batches = endless()
    next(batches)  # starts the workers
    pids = [p.pid for p in set(psutil.Process().children(recursive=True)) - before]
    assert len(pids) >= CORES, pids
    return lambda: _measure.timed(
        lambda: sum(len(next(batches)["img"]) for _ in range(num_images // BATCH)), lambda: pids
    )


def check_equal() -> None:
    """Boxes and pixels under forced parameters.

    Raises:
        SystemExit: they differ.
    """
    tests = ["tests/unit/test_augment.py", "-k", "equal_ultralytics or as_ultralytics or real_photographs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"guard, forced parameters: {done.stdout.strip().splitlines()[-1]}", flush=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])


def check_distributions(folder: Path) -> dict[str, float]:
    """Largest difference between the distributions of what both pipelines make of tiny images, over its critical value.

    Raises:
        SystemExit: one is not below 1.
    """
    data_yaml = _data.generated(folder / "tiny", 64, (48, TINY), seed=1)
    ours, theirs = _features_of_ours(data_yaml, folder / "tiny-shards"), _features_of_theirs(data_yaml)
    found = {}
    for name in ours:
        a, b = np.sort(ours[name]), np.sort(theirs[name])
        at = np.concatenate([a, b])
        gap = np.abs(
            np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
        ).max()
        found[name] = round(float(gap / (CRITICAL * np.sqrt(1 / len(a) + 1 / len(b)))), 3)
    print(f"guard, distributions over {NUM_DRAWS} images (1 = differ at p = 0.001): {found}", flush=True)
    if max(found.values()) >= 1:
        raise SystemExit("the two pipelines' images are not distributed alike")
    return found


def _features(images: np.ndarray, boxes: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    """Of each image of a batch: its largest box and its colour."""
    rows = []
    for i, image in enumerate(images):
        mine = boxes[index == i]
        if len(mine):
            x, y, w, h = mine[mine[:, 2:].prod(1).argmax()]
            hsv = (
                cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2HSV)
                .reshape(-1, 3)
                .mean(0)
            )
            rows.append([x, y, w, h, len(mine), *hsv, (image == 114).all(0).mean()])
    return dict(
        zip(
            ("x", "y", "width", "height", "boxes", "hue", "saturation", "value", "grey"),
            np.array(rows).T,
            strict=True,
        )
    )


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _features_of_ours(data_yaml: Path, folder: Path) -> dict[str, np.ndarray]:
    dataset = Folder.at(str(folder))
    split = _data.shards(data_yaml, dataset)
    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups),
        seed=0,
        global_batch=BATCH,
        epochs=-(-NUM_DRAWS // 64),
    )
    recipe = Recipe.from_yolo(vars(get_cfg(overrides={"imgsz": TINY})))
    spec = StreamSpec.of(
        dataset, split, plan, recipe, mosaic_epochs=plan.epochs, albumentations=None, world_size=1
    )
    return _joined(
        [
            _features(b.images, b.boxes_xywhn, b.image_index)
            for item in plan.items()
            for b in render(spec, item)
        ]
    )


def _features_of_theirs(data_yaml: Path) -> dict[str, np.ndarray]:
    dataset = YOLODataset(img_path=str(data_yaml.parent / "images/train"), imgsz=TINY, augment=True, hyp=get_cfg(overrides={"imgsz": TINY}), cache="ram",
                          data={"names": dict(enumerate("abcd")), "nc": 4, "channels": 3}, task="detect", batch_size=BATCH)  # fmt: skip
    parts = []
    for first in range(0, NUM_DRAWS, BATCH):
        batch = YOLODataset.collate_fn([dataset[i % 64] for i in range(first, first + BATCH)])
        parts.append(_features(batch["img"].numpy(), batch["bboxes"].numpy(), batch["batch_idx"].numpy()))
    return _joined(parts)


def measure(
    data: str, data_yaml: Path, folder: Path, cache: str, options: argparse.Namespace
) -> dict[str, object]:
    """One claim; both sides' processes end with it."""
    print(
        f"\n{data}, imgsz {options.imgsz}, cache {cache}, batch {BATCH}, {CORES} worker processes", flush=True
    )
    out = folder / f"{data_yaml.parent.name}-{cache}-{os.getpid()}"
    ours = our_side(data_yaml, out, options.imgsz, cache, options.run)
    theirs = their_side(data_yaml, options.imgsz, cache, options.run)
    start_ms = _measure.warm(ours, options.warm_up)
    pairs = _measure.paired(ours, theirs, options.pairs)
    drop(CacheSpec("ram", out.name))
    return _measure.report(
        f"{data}, cache {cache}", pairs, ("raypar", "Ultralytics"), imgsz=options.imgsz, start_cpu_ms=start_ms
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--run", type=int, default=2048, help="images a side renders in each run")
    parser.add_argument(
        "--warm-up", type=int, default=8192, help="images that raypar's side renders before the first pair"
    )
    parser.add_argument("--images", type=int, default=512, help="of the generated set")
    parser.add_argument(
        "--voc",
        type=Path,
        default=REPOSITORY.parent / "shared/data/bccd",
        help="a Pascal VOC folder; left out when it is not there",
    )
    parser.add_argument("--cache", nargs="+", default=["none", "ram"], choices=["none", "ram"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows = []
    with tempfile.TemporaryDirectory(prefix="raypar-ingest-") as name:
        folder = Path(name)
        check_equal()
        distributions = check_distributions(folder)
        quiet_ray()
        ray.init(
            address="local",
            num_cpus=CORES + 1,
            include_dashboard=False,
            logging_level="warning",
            object_store_memory=2 << 30,
        )
        sets = {"generated 640x480": _data.generated(folder / "generated", options.images)}
        if options.voc.is_dir():
            sets[options.voc.name] = _data.from_voc(folder / "voc", options.voc)
        for data, data_yaml in sets.items():
            for cache in options.cache:
                rows.append(measure(data, data_yaml, folder, cache, options))
    _measure.finish("ingest", rows, workers=CORES, distributions=distributions)


if __name__ == "__main__":
    main()
