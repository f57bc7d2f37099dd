"""The whole path, Parquet -> Ray Data -> packed batches in a consumer, against the bare renderer in as many plain processes.

    python benchmarks/stream.py [--pairs 5] [--images 512] [--imgsz 640]

CPU seconds of everything: raylet, control store, tasks, the driver; once the first --warm-up images are through. Then the pauses: on 200 images, the longest wait for the first batch of an
epoch, over the median wait for any batch, of a consumer that takes as long for a batch as the stream does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(
    YOLO_OFFLINE="1",
    YOLO_VERBOSE="false",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
)
REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

import _data
import _measure
import ray
from ultralytics.cfg import get_cfg

from raypar.augment.geometry import Recipe
from raypar.dataset.batch import Batch, unpack
from raypar.dataset.plan import Item, Plan
from raypar.dataset.stream import StreamSpec, _start, render, settle
from raypar.quiet import quiet_ray
from raypar.storage import Folder

CORES = len(os.sched_getaffinity(0))
GLOBAL_BATCH = 16


def make_spec(folder: Path, images: int, imgsz: int) -> StreamSpec:
    dataset = Folder.at(str(folder / "shards"))
    split = _data.shards(_data.generated(folder / "images", images), dataset)
    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups),
        seed=0,
        global_batch=GLOBAL_BATCH,
        epochs=100_000,
    )
    recipe = Recipe.from_yolo(vars(get_cfg(overrides={"imgsz": imgsz})))
    return StreamSpec.of(
        dataset, split, plan, recipe, mosaic_epochs=plan.epochs, albumentations=None, world_size=1
    )


def bare(spec: StreamSpec, items: list[Item]) -> int:
    settle()
    return sum(len(batch.images) for item in items for batch in render(spec, item))


def through_ray(spec: StreamSpec, items: list[Item]) -> int:
    (shard,) = _start(spec, items)
    return sum(GLOBAL_BATCH for _ in received(shard))


def received(shard: Any) -> Iterator[Batch]:
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield from unpack(table)


def waits(spec: StreamSpec, epochs: int, work_s: float) -> tuple[list[float], list[float]]:
    """Seconds that a consumer waits for each batch: within epochs, and at their edges."""
    items = list(islice(spec.plan.items(), epochs * spec.plan.windows_per_epoch))
    (shard,) = _start(spec, items)
    inside, edges = [], []
    began = time.perf_counter()
    for number, _ in enumerate(received(shard)):
        gap = time.perf_counter() - began
        if number:  # before the first batch everything starts
            (inside if number % spec.plan.steps_per_epoch else edges).append(gap)
        time.sleep(work_s)
        began = time.perf_counter() - work_s  # a gap is from batch to batch
    return inside, edges


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--warm-up", type=int, default=8192, help="images through Ray before the first pair")
    options = parser.parse_args()
    quiet_ray()
    ray.init(
        address="local",
        num_cpus=CORES + 1,
        include_dashboard=False,
        logging_level="warning",
        object_store_memory=2 << 30,
    )
    with (
        tempfile.TemporaryDirectory(prefix="raypar-stream-") as name,
        multiprocessing.get_context("spawn").Pool(CORES) as pool,
    ):
        spec = make_spec(Path(name) / "a", options.images, options.imgsz)
        items = list(
            islice(spec.plan.items(), CORES * 2 * max(1, 512 // options.images) * spec.plan.windows_per_epoch)
        )

        def ray_side() -> _measure.Run:
            return _measure.timed_tree(lambda: through_ray(spec, items))

        def bare_side() -> _measure.Run:
            return _measure.timed_tree(
                lambda: sum(pool.starmap(bare, [(spec, items[i::CORES]) for i in range(CORES)]))
            )

        print(
            f"{options.images} images of 480x640, imgsz {options.imgsz}, {CORES} cores, {len(items)} windows a run",
            flush=True,
        )
        _measure.warm(ray_side, options.warm_up)
        pairs = _measure.paired(ray_side, bare_side, options.pairs)
        rows = [_measure.report("whole path / bare renderer", pairs, ("through Ray", "bare"))]
        small = make_spec(Path(name) / "b", 200, options.imgsz)
        batch_s = GLOBAL_BATCH * median(a.wall_s / a.images for a, _ in pairs)
        inside, edges = waits(small, 12, 1.2 * batch_s)
        ratio = max(edges) / median(inside + edges)
        print(f"epoch edges on 200 images: median gap {1000 * median(inside + edges):.0f} ms, longest within {1000 * max(inside):.0f}, "
              f"longest at an edge {1000 * max(edges):.0f}: {ratio:.2f} of the median")  # fmt: skip
        rows.append(
            {
                "claim": "longest pause at an epoch's edge / median gap",
                "ratio": round(ratio, 3),
                "edges": len(edges),
            }
        )
    _measure.finish("stream", rows, cores=CORES)


if __name__ == "__main__":
    main()
