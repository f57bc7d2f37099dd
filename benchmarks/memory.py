"""Peak memory of the stream at 20,000 images over that at 2,000, or of `raypar prepare`: it must not grow with the dataset.

    python benchmarks/memory.py [--small 2000] [--large 20000]
    python benchmarks/memory.py --of prepare [--small 100000] [--large 1000000]

Each size runs in a process of its own. stream: a dataset of a few hundred encoded JPEGs, repeated; Ray with one training worker that takes every
batch of one epoch and drops it. prepare: a folder of so many small images, which are links to a few hundred files, with YOLO labels, and the
whole verb, from the listing to the manifest. The measure is PSS (shared pages counted once) summed over the process tree, Ray's daemons included, sampled every
0.2 s. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_JPEGS, IMGSZ, BATCH, ROWS_PER_GROUP, GROUPS_PER_SHARD = 256, 320, 32, 64, 8
EVERY_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", choices=list(MEASURES), default="stream")
    parser.add_argument("--small", type=int, help="images; 2,000 of the stream, 100,000 of prepare")
    parser.add_argument("--large", type=int, help="images; ten times as many")
    parser.add_argument(
        "--limit",
        type=float,
        help="exit 1 above this ratio; 1.15 of the stream, 1.3 of prepare, which keeps each image's name",
    )
    parser.add_argument("--run", type=int, help="images: one measurement, in this process")
    options = parser.parse_args()
    work, small, limit = MEASURES[options.of]
    if options.run:
        print(json.dumps(measure(work, options.run)), flush=True)
        return
    small, limit = options.small or small, options.limit or limit
    results = [_in_a_process(options.of, count) for count in (small, options.large or 10 * small)]
    ratio = results[1]["peak_mb"] / results[0]["peak_mb"]
    is_held = ratio <= limit
    print(f"{'held' if is_held else 'NOT HELD'}: peak PSS {ratio:.3f} times, at most {limit}")
    print(
        json.dumps(
            {
                "benchmark": f"memory of {options.of}",
                "small": results[0],
                "large": results[1],
                "ratio": ratio,
                "limit": limit,
                "held": is_held,
            }
        )
    )
    sys.exit(0 if is_held else 1)


def _in_a_process(of: str, count: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--of", of, "--run", str(count)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{count} images: peak {found['peak_mb']:.0f} MB, {found['images_per_s']:.0f} images/s", flush=True)
    return found


def measure(work: Callable[[Path, int], Callable[[], tuple[int, float]]], count: int) -> dict[str, Any]:
    """Peak PSS, MB, while something is done with ``count`` images, once they are there."""
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))  # of Ray's workers
    sys.path.insert(0, os.environ["PYTHONPATH"])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="raypar-memory-") as folder:
        do = work(Path(folder), count)
        began = time.monotonic()
        with Watch() as watch:
            num_seen, seconds = do()
        assert num_seen >= count, num_seen
        return {
            "images": count,
            "peak_mb": watch.peak_mb,
            "images_per_s": num_seen / seconds,
            "seconds": time.monotonic() - began,
        }


def of_prepare(folder: Path, count: int) -> Callable[[], tuple[int, float]]:
    """`raypar prepare` of a folder in Ultralytics' layout, a thousand images in each of its folders."""
    import _data

    from raypar.config import RunConfig

    originals, source = folder / "originals", folder / "source"
    _data.generated(originals, NUM_JPEGS, (48, 64))
    for kind in ("images", "labels"):
        for part in ("val/00000", *(f"train/{i:05d}" for i in range(-(-count // 1000)))):
            (source / kind / part).mkdir(parents=True)
    for i in range(count):
        split, part = ("val", 0) if i % 100 == 0 else ("train", i // 1000)
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            os.link(
                originals / kind / f"train/{i % NUM_JPEGS:05d}.{suffix}",
                source / kind / split / f"{part:05d}/{i:08d}.{suffix}",
            )
    data_yaml = _data.yaml_of(source, "val")
    config = RunConfig.model_validate(
        {"name": "memory", "storage": str(folder), "prepare": {"source": str(data_yaml)}}
    )

    def prepare() -> tuple[int, float]:
        import raypar.prepare
        from raypar import cluster

        began = time.monotonic()
        cluster.connect()
        manifest = raypar.prepare.run(config)
        return sum(split.num_images for split in manifest.splits.values()), time.monotonic() - began

    return prepare


def of_stream(folder: Path, count: int) -> Callable[[], tuple[int, float]]:
    """A training worker takes an epoch."""
    split = write_dataset(folder, count)
    return lambda: consume(folder, split)


def write_dataset(folder: Path, count: int) -> Any:
    """Shards whose images repeat; returns the manifest's split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raypar.dataset.formats import shapes
    from raypar.dataset.manifest import Shard, Split
    from raypar.dataset.schema import row_schema

    rows = []
    for i in range(NUM_JPEGS):
        image, class_ids, boxes = shapes.render(0, "train", i, 480, 640)
        labels = shapes.labels(class_ids, boxes, (480, 640))
        rows.append({"image_id": str(i), "image": shapes.encode(image), "height": 480, "width": 640, "class_ids": labels.class_ids,
                     "boxes_xywhn": labels.boxes_xywhn.ravel(), "segments_xyn": []})  # fmt: skip
    shards, per_shard = [], ROWS_PER_GROUP * GROUPS_PER_SHARD
    for number, start in enumerate(range(0, count, per_shard)):
        path = folder / f"{number:05d}.parquet"
        some = [rows[i % NUM_JPEGS] for i in range(start, min(start + per_shard, count))]
        pq.write_table(
            pa.Table.from_pylist(some, row_schema("detect")),
            path,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=False,
        )
        groups = tuple(min(ROWS_PER_GROUP, len(some) - i) for i in range(0, len(some), ROWS_PER_GROUP))
        shards.append(Shard(path=path.name, row_groups=groups, num_bytes=path.stat().st_size, sha256=""))
    return Split(shards=tuple(shards), num_images=count)


def consume(folder: Path, split: Any) -> tuple[int, float]:
    """Images that a training worker was dealt in an epoch, and the seconds from the first batch to the last."""
    import ray
    import ray.train
    import ray.train.torch

    from raypar.augment.geometry import Recipe
    from raypar.dataset.plan import Plan
    from raypar.dataset.stream import StreamSpec
    from raypar.storage import Folder

    def train_loop(config: dict[str, Any]) -> Any:
        import time

        from raypar.dataset.stream import batches

        num_seen, began = 0, 0.0
        for batch in batches(config["spec"], 0, 0):
            began = began or time.monotonic()
            num_seen += len(batch.images)
        return num_seen, time.monotonic() - began

    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups), seed=0, global_batch=BATCH, epochs=1
    )
    recipe = Recipe(
        imgsz=IMGSZ, mosaic=1.0, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5
    )
    spec = StreamSpec.of(
        Folder.at(folder), split, plan, recipe, mosaic_epochs=1, albumentations=None, world_size=1
    )
    ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, logging_level="warning",
             object_store_memory=1 << 30)  # fmt: skip
    result = ray.train.torch.TorchTrainer(
        train_loop, train_loop_config={"spec": spec}, scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=str(folder / "runs"), logging_config=ray.train.LoggingConfig(log_level="WARNING"))).fit()  # fmt: skip
    ray.shutdown()
    num_seen, seconds = result.return_value
    return num_seen, seconds


class Watch:
    """Samples the PSS of this process and all below it; ``peak_mb`` is the largest sum."""

    def __enter__(self) -> Watch:
        self.peak_mb, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(EVERY_S):
            self.peak_mb = max(
                self.peak_mb,
                sum(_pss_mb(pid) for pid in [me.pid, *(p.pid for p in me.children(recursive=True))]),
            )


def _pss_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)


# the work, images of the smaller size, limit
MEASURES = {"stream": (of_stream, 2000, 1.15), "prepare": (of_prepare, 100_000, 1.3)}

if __name__ == "__main__":
    main()
